"""Attention kernels behind one function.

| implementation | platforms | masks                                   | dtypes                  |
|----------------|-----------|-----------------------------------------|-------------------------|
| reference      | all       | any intervals                           | float32, bfloat16, float16 |
| gpu            | Hopper    | any intervals                           | bfloat16, float16       |
| cudnn          | GPU       | causal from the first key, no cache     | bfloat16, float16       |

`implementation="auto"` takes cudnn on a GPU where the table allows it, else gpu (`flash_gpu`, head_dim 64 and 128) on a
GPU of the Hopper generation, and the reference otherwise; it says once, at trace time, what it took. Decoding one token
a row has a function of its own, `decode_step`, for GPUs of the Hopper generation; `has_decode_step` says whether "auto"
may take it. The products of a decode step have kernels there too: `on_mesh` for a batch, `layer_gpu` for one row on one
device (see `qwen_jax.inference.single`).
"""

import dataclasses
import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.kernels import reference

Implementation = Literal["auto", "reference", "gpu", "cudnn"]
_log = logging.getLogger(__name__)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k_start_BT", "k_end_BT"), meta_fields=("is_causal",))
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query row sees: k_start[i] <= j < k_end[i].

    Attributes:
      k_start_BT, k_end_BT: int32 [B, T].
      is_causal: known while tracing: every row i sees exactly the keys 0 to i. Lets a kernel without intervals be used.
    """

    k_start_BT: jax.Array
    k_end_BT: jax.Array
    is_causal: bool = False


def causal_mask(batch: int, length: int) -> Mask:
    """Row i sees keys 0 to i. Right padding needs nothing more: no real row looks at it."""
    ends = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (batch, length))
    return Mask(jnp.zeros((batch, length), jnp.int32), ends, is_causal=True)


def packed_mask(segment_ids_BT: jax.Array) -> Mask:
    """Causal within each document of a packed row.

    Args:
      segment_ids_BT: int32, equal and contiguous within a document; 0 is padding, which sees only itself.
    """
    T = segment_ids_BT.shape[1]
    i = jnp.arange(T, dtype=jnp.int32)
    previous = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    opens = (segment_ids_BT != previous) | (segment_ids_BT == 0)
    start = jax.lax.cummax(jnp.where(opens, i, 0), axis=1)
    return Mask(start, jnp.broadcast_to(i + 1, segment_ids_BT.shape))


def on_hopper() -> bool:
    """Whether the devices are GPUs of the generation that our GPU kernels are for."""
    return jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability.startswith("9.")


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)


def choose(implementation: str, q: jax.Array, mask: Mask) -> str:
    """Names the implementation that `attention` runs, or raises `InputError` if the one asked for cannot do it."""
    platform = jax.default_backend()
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    needs = {
        "cudnn": {
            "a GPU": platform == "gpu",
            "a plain causal mask": mask.is_causal,
            "bfloat16 or float16": half,
            "head_dim up to 256, a multiple of 8": q.shape[-1] % 8 == 0 and q.shape[-1] <= 256,
        },
        "gpu": {
            "a GPU of the Hopper generation": on_hopper(),
            "bfloat16 or float16": half,
            "head_dim 64 or 128": q.shape[-1] in (64, 128),
        },
        "reference": {},
    }
    lacks = {name: [need for need, met in of.items() if not met] for name, of in needs.items()}
    if implementation == "auto":
        implementation = next(name for name in needs if not lacks[name])
    elif implementation not in needs:
        raise InputError(f"Unknown attention implementation {implementation!r}: use auto, {', '.join(sorted(needs))}.")
    elif lacks[implementation]:
        raise InputError(
            f"Attention by {implementation} needs {' and '.join(lacks[implementation])}; got {q.dtype} {q.shape} on "
            f"{platform}. Use implementation='{next(name for name in needs if not lacks[name])}'."
        )
    _say_once(f"attention on {platform}, {q.dtype}, {'causal' if mask.is_causal else 'intervals'}: {implementation}")
    return implementation


def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Implementation = "auto",
    recompute: bool = False,
) -> jax.Array:
    """Grouped-query attention over interval masks. Runs on local arrays: call it inside `jax.shard_map` on a mesh.

    Args:
      q_BTHd: queries.
      k_BSKd, v_BSKd: keys and values; H must be a multiple of K.
      mask: intervals over the S keys.
      scale: multiplies the logits.
      implementation: see the table of this module.
      recompute: the backward pass keeps no [T, S] array. Only the reference needs to be told.

    Returns:
      [B, T, H, d] in the dtype of q. A row that sees nothing is zero.

    Raises:
      InputError: shapes that do not fit, or an implementation that cannot do this.
    """
    _check_shapes(q_BTHd, k_BSKd, v_BSKd, mask)
    chosen = choose(implementation, q_BTHd, mask)
    if chosen == "gpu":
        # Imported where there is a GPU to use it: Pallas takes a while.
        from qwen_jax.kernels import flash_gpu

        return flash_gpu.attention(q_BTHd, k_BSKd, v_BSKd, mask.k_start_BT, mask.k_end_BT, scale)[0]
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(q_BTHd, k_BSKd, v_BSKd, scale=scale, is_causal=True, implementation="cudnn")
    k_BKSd, v_BKSd = k_BSKd.swapaxes(1, 2), v_BSKd.swapaxes(1, 2)
    run = functools.partial(reference.attention, scale=scale)
    return (jax.checkpoint(run) if recompute else run)(q_BTHd, k_BKSd, v_BKSd, mask.k_start_BT, mask.k_end_BT)


def decode_attention(q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, mask: Mask, *, scale: float) -> jax.Array:
    """Attention of one or a few query rows over a cache that is stored head by head.

    Args:
      q_BTHd: queries.
      k_BKSd, v_BKSd: the cache.
      mask: intervals over the S cache slots.
      scale: multiplies the logits.

    Returns:
      [B, T, H, d] in the dtype of q.
    """
    _check_shapes(q_BTHd, k_BKSd.swapaxes(1, 2), v_BKSd.swapaxes(1, 2), mask)
    return reference.attention(q_BTHd, k_BKSd, v_BKSd, mask.k_start_BT, mask.k_end_BT, scale=scale)


def has_decode_step(
    implementation: Implementation, dtype: jnp.dtype, length: int, num_heads: int, num_kv_heads: int, cache: jax.Array
) -> bool:
    """Whether `decode_step` does the next tokens; says so once.

    Args:
      implementation: it is taken only by "auto".
      dtype: of the activations.
      length: new tokens a row.
      num_heads, num_kv_heads: on one device.
      cache: a layer's keys or values, [B, K, S, d].
    """
    S, d = cache.shape[2:]
    takes = (
        implementation == "auto"
        and length == 1
        and dtype == cache.dtype == jnp.bfloat16
        and on_hopper()
        and _decode_gpu().supports(num_heads, num_kv_heads, d, S)
    )
    if length == 1:
        _say_once(f"decoding, {num_heads}/{num_kv_heads} heads of {d}, {dtype}: {'kernel' if takes else 'reference'}")
    return takes


def decode_step(*args: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_gpu.decode_step`; runs on local arrays."""
    result: tuple[jax.Array, jax.Array, jax.Array] = _decode_gpu().decode_step(*args, scale=scale)
    return result


def _decode_gpu() -> Any:
    # Imported where there is a GPU to use it: Pallas takes a while.
    from qwen_jax.kernels import decode_gpu

    return decode_gpu


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> None:
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and q.shape[2] % k.shape[2] == 0
    )
    if not fits:
        raise InputError(
            f"Attention needs q [B, T, H, d], k and v [B, S, K, d] with H a multiple of K; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if mask.k_start_BT.shape != q.shape[:2] or mask.k_end_BT.shape != q.shape[:2]:
        raise InputError(
            f"The mask is for {mask.k_start_BT.shape} and {mask.k_end_BT.shape} query rows, q has {q.shape[:2]}."
        )
