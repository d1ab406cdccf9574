"""Attention kernels behind one function, one for caches and one for paged caches.

| implementation | where      | masks     | dtypes                     | head_dim       | lse | gradient | caches |
|----------------|------------|-----------|----------------------------|----------------|-----|----------|--------|
| gpu            | Hopper GPU | intervals | bfloat16, float16          | 64, 128        | yes | yes      | yes    |
| cudnn          | GPU        | causal    | bfloat16, float16          | 8, 16, ... 256 | no  | yes      | no     |
| tpu            | TPU        | intervals | bfloat16, float32          | 64, 128        | yes | yes      | yes    |
| xla            | anywhere   | intervals | float32, bfloat16, float16 | any            | no  | yes      | no     |
| reference      | anywhere   | intervals | float32, bfloat16, float16 | any            | yes | yes      | yes    |

Masks: "causal" is row i sees keys 0 to i, known while tracing; "intervals" is any `Mask`. lse: the log-sum-exp.
Caches: `decode_attention` and `paged_attention`, which have a gradient by the reference alone. Any number of query
heads may share a key/value head.

`implementation="auto"` takes the first of gpu, cudnn, tpu and reference that does what is asked; xla, which is
`jax.nn.dot_product_attention` written out by XLA, only when it is named. It says once, while tracing, what it took, and
warns where that is the reference on an accelerator. `tests/kernels/test_coverage.py` holds this table to the truth.

Decoding one token a row has a function of its own, `decode_step`, for GPUs of the Hopper generation; `has_decode_step`
says whether "auto" may take it. The products of a decode step have kernels there too: `on_mesh` for a batch,
`layer_gpu` for one row on one device (see `qwen_jax.inference.one_row`).
"""

import dataclasses
import functools
import logging
import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.kernels import reference
from qwen_jax.kernels.mask import Mask, cache_mask, causal_mask, packed_mask
from qwen_jax.kernels.softmax import merge
from qwen_jax.platform import on_hopper, platform

__all__ = [
    "COVERAGE",
    "Coverage",
    "Implementation",
    "Mask",
    "attention",
    "attention_gradient",
    "cache_mask",
    "causal_mask",
    "choose",
    "decode_attention",
    "decode_step",
    "has_decode_step",
    "is_ours",
    "merge",
    "on_hopper",
    "packed_mask",
    "paged_attention",
    "platform",
]

Implementation = Literal["auto", "gpu", "cudnn", "tpu", "xla", "reference"]
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What an implementation does; a row of the table above."""

    where: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] | None = None
    causal_only: bool = False
    log_sum_exp: bool = True
    caches: bool = True


_HALF, _ALL = ("bfloat16", "float16"), ("float32", "bfloat16", "float16")
COVERAGE = {
    "gpu": Coverage("Hopper GPU", _HALF, (64, 128)),
    "cudnn": Coverage("GPU", _HALF, tuple(range(8, 257, 8)), causal_only=True, log_sum_exp=False, caches=False),
    "tpu": Coverage("TPU", ("bfloat16", "float32"), (64, 128)),
    "xla": Coverage("anywhere", _ALL, log_sum_exp=False, caches=False),
    "reference": Coverage("anywhere", _ALL),
}
"""In the order of "auto", which passes xla by."""


def is_ours(implementation: str) -> bool:
    """Whether it is a kernel of this package. Those don't say along which mesh axes their results vary."""
    return implementation in ("gpu", "tpu")


@functools.cache
def say_once(message: str, level: int = logging.INFO) -> None:
    """Logs what was chosen, the first time."""
    _log.log(level, message)


def choose(implementation: str, q: jax.Array, mask: Mask, *, return_lse: bool = False, cache: bool = False) -> str:
    """Names the implementation that runs, or raises `InputError` if the one asked for cannot do it.

    Args:
      implementation: "auto" or a name.
      q: queries, [B, T, H, d].
      mask: of them.
      return_lse: whether the log-sum-exp is wanted.
      cache: whether keys and values are a cache, contiguous or paged.
    """
    here = {"anywhere": True, "GPU": platform() == "gpu", "Hopper GPU": on_hopper(), "TPU": platform() == "tpu"}
    lacks = {
        name: [
            need
            for need, met in {
                f"a {of.where}": here[of.where],
                " or ".join(of.dtypes): q.dtype.name in of.dtypes,
                f"head_dim {_some(of.head_dims)}": of.head_dims is None or q.shape[-1] in of.head_dims,
                "a plain causal mask": mask.is_causal or not of.causal_only,
                "return_lse=False": of.log_sum_exp or not return_lse,
                "keys and values that are no cache": of.caches or not cache,
            }.items()
            if not met
        ]
        for name, of in COVERAGE.items()
    }
    able = [name for name, lack in lacks.items() if not lack and name != "xla"]
    asked = implementation
    if asked == "auto":
        if not able:
            raise InputError(f"Attention needs {' or '.join(_ALL)}; got {q.dtype}.")
        implementation = able[0]
    elif asked not in COVERAGE:
        raise InputError(f"Unknown attention implementation {asked!r}: use auto, {', '.join(COVERAGE)}.")
    elif lacks[asked]:
        raise InputError(
            f"Attention by {asked} needs {' and '.join(lacks[asked])}; got {q.dtype} {q.shape} on {platform()}. "
            f"Use implementation={' or '.join(map(repr, able))}."
        )
    kind = "a cache" if cache else "causal" if mask.is_causal else "intervals"
    message = f"attention on {platform()}, {q.dtype}, head_dim {q.shape[-1]}, {kind}: {implementation}"
    if asked == "auto" and implementation == "reference" and platform() != "cpu":
        why = "; ".join(f"{name} needs {' and '.join(lack)}" for name, lack in lacks.items() if lack)
        say_once(f"{message}, which is slow here ({why})", logging.WARNING)
    else:
        say_once(message)
    return implementation


def _some(numbers: tuple[int, ...] | None) -> str:
    if numbers is None or len(numbers) < 4:
        return " or ".join(map(str, numbers or ()))
    return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"


@overload
def attention(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, mask: Mask, *, scale: float,
    implementation: Implementation = ..., recompute: bool = ..., return_lse: Literal[False] = ...,
) -> jax.Array: ...  # fmt: skip
@overload
def attention(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, mask: Mask, *, scale: float,
    implementation: Implementation = ..., recompute: bool = ..., return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip
def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Implementation = "auto",
    recompute: bool = False,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Grouped-query attention over interval masks. Runs on local arrays: call it inside `jax.shard_map` on a mesh.

    Args:
      q_BTHd: queries.
      k_BSKd, v_BSKd: keys and values; H must be a multiple of K.
      mask: intervals over the S keys.
      scale: multiplies the logits; positive.
      implementation: see the table of this module.
      recompute: the backward pass keeps no [T, S] array. Only the reference and xla need to be told.
      return_lse: return the log-sum-exp too, by which `merge` puts outputs over parts of the keys together.

    Returns:
      [B, T, H, d] in the dtype of q. A row that sees nothing is zero. With `return_lse` also the natural logarithm of
      the softmax's denominator, float32 [B, H, T], minus infinity where a row sees nothing.

    Raises:
      InputError: shapes that do not fit, intervals that are no intervals, or an implementation that cannot do this.
    """
    scale = _check(q_BTHd, k_BSKd, v_BSKd, mask, scale, "[B, S, K, d]")
    chosen = choose(implementation, q_BTHd, mask, return_lse=return_lse)
    ends = mask.k_start_BT, mask.k_end_BT
    # Kernels are imported where they are used: Pallas takes a while.
    if chosen == "gpu":
        from qwen_jax.kernels.attention import flash_gpu

        out, lse = flash_gpu.attention(q_BTHd, k_BSKd, v_BSKd, *ends, scale)
    elif chosen == "tpu":
        from qwen_jax.kernels.attention import flash_tpu

        out, lse = flash_tpu.attention(q_BTHd, k_BSKd.swapaxes(1, 2), v_BSKd.swapaxes(1, 2), *ends, scale)
    elif chosen == "cudnn":
        return jax.nn.dot_product_attention(q_BTHd, k_BSKd, v_BSKd, scale=scale, is_causal=True, implementation="cudnn")
    elif chosen == "xla":
        by_xla = functools.partial(reference.attention_by_xla, scale=scale)
        return (jax.checkpoint(by_xla) if recompute else by_xla)(q_BTHd, k_BSKd, v_BSKd, *ends)
    else:
        plain = functools.partial(reference.attention, scale=scale)
        out, lse = (jax.checkpoint(plain) if recompute else plain)(
            q_BTHd, k_BSKd.swapaxes(1, 2), v_BSKd.swapaxes(1, 2), *ends
        )
    return (out, lse) if return_lse else out


def attention_gradient(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    mask: Mask,
    out_BTHd: jax.Array,
    lse_BHT: jax.Array,
    by_out_BTHd: jax.Array,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradient of attention by queries, and by those of its keys and values that are given.

    `attention` has this gradient of itself. This is for who has keys in parts: output and log-sum-exp are those over
    all keys, merged, and a part's share of the gradient needs no more of the others. Runs on local arrays.

    Args:
      q_BTHd: queries.
      k_BSKd, v_BSKd: a part of the keys and values.
      mask: intervals over the S keys of the part.
      out_BTHd, lse_BHT: attention over all keys, as from `merge`.
      by_out_BTHd: the gradient by the output.
      scale: multiplies the logits; positive.
      implementation: see the table of this module; one that gives a log-sum-exp.

    Returns:
      This part's share of the gradient by q, and the gradients by k and v, in the dtypes of those.

    Raises:
      InputError: as `attention`.
    """
    scale = _check(q_BTHd, k_BSKd, v_BSKd, mask, scale, "[B, S, K, d]")
    (B, T, H, _), like_out = q_BTHd.shape, (out_BTHd.shape, by_out_BTHd.shape)
    if like_out != (q_BTHd.shape,) * 2 or lse_BHT.shape != (B, H, T):
        raise InputError(
            f"The gradient for q {q_BTHd.shape} needs an output and a gradient by it of the same shape and a "
            f"log-sum-exp {(B, H, T)}; got {out_BTHd.shape}, {by_out_BTHd.shape} and {lse_BHT.shape}."
        )
    chosen = choose(implementation, q_BTHd, mask, return_lse=True)
    kept = mask.k_start_BT, mask.k_end_BT, out_BTHd, lse_BHT, by_out_BTHd
    if chosen == "gpu":
        from qwen_jax.kernels.attention import flash_gpu

        return flash_gpu.gradient(q_BTHd, k_BSKd, v_BSKd, *kept, scale)
    k_BKSd, v_BKSd = k_BSKd.swapaxes(1, 2), v_BSKd.swapaxes(1, 2)
    if chosen == "tpu":
        from qwen_jax.kernels.attention import flash_tpu

        dq, dk, dv = flash_tpu.gradient(q_BTHd, k_BKSd, v_BKSd, *kept, scale)
    else:
        dq, dk, dv = reference.gradient(q_BTHd, k_BKSd, v_BKSd, *kept, scale=scale)
    return dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def decode_attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention of new tokens over a cache that is stored head by head: one token of each row, a few, or a chunk.

    Few query rows take a kernel that splits the keys over the chip, many that of `attention`. Runs on local arrays.

    Args:
      q_BTHd: queries.
      k_BKSd, v_BKSd: the cache. All its slots must be finite.
      mask: intervals over the S cache slots: lengths, left padding, windows, chunks at an offset (see `cache_mask`).
      scale: multiplies the logits; positive.
      implementation: see the table of this module.

    Returns:
      [B, T, H, d] in the dtype of q, and the log-sum-exp as from `attention`.

    Raises:
      InputError: as `attention`.
    """
    scale = _check(q_BTHd, k_BKSd, v_BKSd, mask, scale, "[B, K, S, d]")
    (_, T, H, d), (K, S) = q_BTHd.shape, k_BKSd.shape[1:3]
    chosen = choose(implementation, q_BTHd, mask, return_lse=True, cache=True)
    args = q_BTHd, k_BKSd, v_BKSd, mask.k_start_BT, mask.k_end_BT, scale
    if chosen == "gpu":
        from qwen_jax.kernels.attention import flash_gpu
        from qwen_jax.kernels.decode import flash_decode_gpu

        if flash_decode_gpu.supports(q_BTHd.dtype, T, H, K, d, S):
            return _without_gradient(flash_decode_gpu.attention, *args)
        if T == 1:
            say_once(f"decoding by the kernel for many queries: {H}/{K} heads, {S} slots", logging.WARNING)
        return flash_gpu.attention(*args, head_major=True)
    if chosen == "tpu":
        from qwen_jax.kernels.attention import flash_tpu
        from qwen_jax.kernels.decode import flash_decode_tpu

        if flash_decode_tpu.supports(q_BTHd.dtype, T, H, K, d):
            return _without_gradient(flash_decode_tpu.attention, *args)
        return flash_tpu.attention(*args)
    return reference.attention(*args[:-1], scale=scale)


def paged_attention(
    q_BTHd: jax.Array,
    k_NKPd: jax.Array,
    v_NKPd: jax.Array,
    pages_BM: jax.Array,
    mask: Mask,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The same over a paged cache: slot j of row b is slot j % P of page pages[b, j // P].

    Pages for many query rows (a chunk of a prompt), and pages that a kernel can't read (of other than a multiple of 16
    slots), are gathered first, which costs one copy of what the table names.

    Args:
      q_BTHd: queries.
      k_NKPd, v_NKPd: pages of P slots.
      pages_BM: int32 page table. Entries for slots that no row sees may be anything.
      mask: intervals over the M P slots of the table.
      scale: multiplies the logits; positive.
      implementation: see the table of this module.

    Returns:
      As `decode_attention`.

    Raises:
      InputError: as `attention`.
    """
    fits = q_BTHd.ndim == k_NKPd.ndim == 4 and pages_BM.ndim == 2 and k_NKPd.shape == v_NKPd.shape
    if not fits or pages_BM.shape[0] != q_BTHd.shape[0] or not jnp.issubdtype(pages_BM.dtype, jnp.integer):
        raise InputError(
            f"Paged attention needs pages [N, K, P, d], the same of keys and values, and an integer page table [B, M] "
            f"for q [B, T, H, d]; got {k_NKPd.shape}, {v_NKPd.shape}, {pages_BM.dtype} {pages_BM.shape} and q "
            f"{q_BTHd.shape}."
        )
    (B, T, H, d), (N, K, P), M = q_BTHd.shape, k_NKPd.shape[:3], pages_BM.shape[1]
    whole = jax.ShapeDtypeStruct((B, K, M * P, k_NKPd.shape[3]), k_NKPd.dtype)
    scale = _check(q_BTHd, whole, whole.update(dtype=v_NKPd.dtype), mask, scale, "[B, K, S, d]")
    chosen = choose(implementation, q_BTHd, mask, return_lse=True, cache=True)
    args = q_BTHd, k_NKPd, v_NKPd, pages_BM, mask.k_start_BT, mask.k_end_BT, scale
    if chosen == "gpu":
        from qwen_jax.kernels.decode import flash_decode_gpu

        if flash_decode_gpu.supports(q_BTHd.dtype, T, H, K, d, M * P, P):
            return _without_gradient(flash_decode_gpu.paged_attention, *args)
    if chosen == "tpu":
        from qwen_jax.kernels.decode import flash_decode_tpu

        if flash_decode_tpu.supports(q_BTHd.dtype, T, H, K, d, P, pages_BM.size):
            return _without_gradient(flash_decode_tpu.paged_attention, *args)
    if chosen in ("gpu", "tpu") and T == 1:
        say_once(f"decoding copies its pages first: {H}/{K} heads, pages of {P}, {M} a row", logging.WARNING)

    def gathered(x_NKPd: jax.Array) -> jax.Array:
        x_BMKPd = x_NKPd[jnp.clip(pages_BM, 0, N - 1)]
        return x_BMKPd.swapaxes(1, 2).reshape(B, K, M * P, d)

    named: Any = chosen
    return decode_attention(q_BTHd, gathered(k_NKPd), gathered(v_NKPd), mask, scale=scale, implementation=named)


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
        say_once(
            f"decoding, {num_heads}/{num_kv_heads} heads of {d}, {dtype}: step {'fused' if takes else 'not fused'}"
        )
    return takes


def decode_step(*args: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_gpu.decode_step`; runs on local arrays."""
    result: tuple[jax.Array, jax.Array, jax.Array] = _decode_gpu().decode_step(*args, scale=scale)
    return result


def _decode_gpu() -> Any:
    # Imported where there is a GPU to use it: Pallas takes a while.
    from qwen_jax.kernels.decode import decode_gpu

    return decode_gpu


def _without_gradient(run: Any, *args: Any) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel that has no gradient, and says so to whoever asks for it."""
    *arrays, scale = args

    def refuse(*_: Any) -> Any:
        raise InputError("Decode attention by a kernel has no gradient. Use implementation='reference', or attention.")

    kernel: Any = jax.custom_vjp(lambda *arrays: run(*arrays, scale))
    kernel.defvjp(refuse, refuse)
    result: tuple[jax.Array, jax.Array] = kernel(*arrays)
    return result


def _check(q: Any, k: Any, v: Any, mask: Mask, scale: Any, layout: str) -> float:
    """Raises `InputError` for what does not fit together; returns the scale as a number.

    Args:
      q, k, v: as the caller gave them.
      mask: of the queries.
      scale: of the logits.
      layout: of k and v.
    """
    heads, slots = layout.split(", ").index("K"), layout.split(", ").index("S")
    fits = (
        q.ndim == k.ndim == v.ndim == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and 0 not in (*q.shape, *k.shape)
        and q.shape[2] % k.shape[heads] == 0
    )
    if not fits:
        raise InputError(
            f"Attention needs q [B, T, H, d], k and v {layout} with H a multiple of K, and nothing empty; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"Attention needs q, k and v of one dtype; got {q.dtype}, {k.dtype} and {v.dtype}.")
    if mask.k_start_BT.shape != q.shape[:2] or mask.k_end_BT.shape != q.shape[:2]:
        raise InputError(
            f"The mask is for {mask.k_start_BT.shape} and {mask.k_end_BT.shape} query rows, q has {q.shape[:2]}."
        )
    if isinstance(scale, jax.core.Tracer) or not (math.isfinite(scale) and scale > 0):
        raise InputError(
            f"Attention needs a positive, finite number as its scale, known while tracing; got {scale}. "
            "The usual one is head_dim ** -0.5."
        )
    mask.check(k.shape[slots])
    return float(scale)
