"""Attention over interval masks on TPUs: forward and backward, for training and prefill.

Where head_dim is smaller than the width of the matrix unit (64 everywhere, 128 on v6e and 7x) the logits are held
transposed, with keys as rows and queries as columns. The maxima and sums of the softmax are then elementwise over
registers instead of across lanes, its statistics are one row, and where head_dim is the number of rows of a product
the unit is filled although head_dim is below its width. The backward pass always holds the logits transposed.
experiments/kernels/tpu_attention.md measures the effect.

Each program has a query tile of one head and a segment of its keys and values in VMEM, and walks over the key tiles of
the segment that its intervals meet (`tile_ranges`). Tiles without a masked pair run code without masks. Every sum has a
fixed order.

Source: FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the algorithm and its gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_tpu_backward import run_backward
from qwen_jax.kernels.attention.flash_tpu_forward import run_forward
from qwen_jax.kernels.attention.flash_tpu_tiles import Tiling, choose_tiling
from qwen_jax.kernels.attention.tile_ranges import key_tiles
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.softmax import LOG2E, gradient_terms

_Residuals = tuple[jax.Array, ...]


def supports(dtype: jax.typing.DTypeLike, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels support these arguments; heads are those of one device."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) and head_dim in (64, 128) and num_heads % num_kv_heads == 0


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
    tiles: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention where query row i sees the keys start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_BKSd, v_BKSd: keys and values, head-major as in a cache. All must be finite, also those that no row sees.
      start_BT, end_BT: int32 intervals; rows that see nothing have start >= end.
      scale: multiplies the logits.
      tiles: sizes; by default those of `choose_tiling` for the device.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing, and the log-sum-exp of the logits, float32
      [B, H, T], minus infinity there. Both have gradients.

    Raises:
      InputError: arguments that `supports` rejects.
    """
    (_, T, H, d), (K, S) = q_BTHd.shape, k_BKSd.shape[1:3]
    if not supports(q_BTHd.dtype, H, K, d):
        raise InputError(
            f"The attention kernels for TPUs need bfloat16 or float32 and head_dim 64 or 128; got {q_BTHd.dtype} "
            f"{q_BTHd.shape} and {k_BKSd.shape}. Use implementation='reference'."
        )
    tiles = tiles or choose_tiling(T, S, d, q_BTHd.dtype)
    out, lse = _attention(*_whole_tiles(q_BTHd, k_BKSd, v_BKSd, start_BT, end_BT, tiles), scale, tiles)
    return out[:, :, :T].swapaxes(1, 2), lse[:, :, :T]


def gradient(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, start_BT: jax.Array, end_BT: jax.Array,
    out_BTHd: jax.Array, lse_BHT: jax.Array, dout_BTHd: jax.Array, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradient over a part of the keys, which is head-major; see `kernels.attention_gradient`."""
    (_, T, _, d), S = q_BTHd.shape, k_BKSd.shape[2]
    tiles = choose_tiling(T, S, d, q_BTHd.dtype)
    out, dout = (pad_to_multiple(x.swapaxes(1, 2), 2, tiles.queries) for x in (out_BTHd, dout_BTHd))
    # Padding rows see nothing, whatever their log-sum-exp is.
    lse = pad_to_multiple(lse_BHT, 2, tiles.queries)
    residuals = *_whole_tiles(q_BTHd, k_BKSd, v_BKSd, start_BT, end_BT, tiles), out, lse
    dq, dk, dv = _gradients(scale, tiles, residuals, (dout, jnp.zeros_like(lse)))
    return dq[:, :, :T].swapaxes(1, 2), dk[:, :, :S], dv[:, :, :S]


def _whole_tiles(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, tiles: Tiling
) -> tuple[jax.Array, ...]:
    """Queries made head-major, and all arguments padded to whole tiles."""
    start, end = jnp.maximum(start, 0), jnp.minimum(end, k.shape[2])
    start, end = (pad_to_multiple(x, 1, tiles.queries) for x in (start, end))
    k, v = (pad_to_multiple(x, 2, tiles.segment) for x in (k, v))
    return pad_to_multiple(q.swapaxes(1, 2), 2, tiles.queries), k, v, start, end


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, scale: float, tiles: Tiling
) -> tuple[jax.Array, jax.Array]:
    """Attention over whole tiles; q and the output are [B, H, T, d]."""
    return _forward(q, k, v, start, end, scale, tiles)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, scale: float, tiles: Tiling
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    visited = key_tiles(start, end, tiles.queries, tiles.keys)
    out, lse = run_forward(q, k, v, start, end, visited, factor=scale * LOG2E, tiles=tiles)
    return (out, lse), (q, k, v, start, end, out, lse)


def _backward(
    scale: float, tiles: Tiling, residuals: _Residuals, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    return *_gradients(scale, tiles, residuals, gradients), None, None


def _gradients(
    scale: float, tiles: Tiling, residuals: _Residuals, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients with respect to q, k and v, given those with respect to output and log-sum-exp."""
    q, k, v, start, end, out, lse = residuals
    dout, dlse = gradients
    log2, delta = gradient_terms(out, lse, dout, dlse, "BHTd")
    run = functools.partial(run_backward, factor=scale * LOG2E, scale=scale, tiles=tiles)
    segment, S = tiles.backward_segment, k.shape[2]
    if segment == S:
        return run(q, k, v, dout, start, end, log2, delta, dtype=q.dtype)

    # One segment of keys after the other, so that only one contribution to dq is held beside dq.
    def one(dq: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k_part, v_part = (lax.dynamic_slice_in_dim(x, first, segment, axis=2) for x in (k, v))
        bounds = (jnp.clip(x - first, 0, segment) for x in (start, end))
        share, dk, dv = run(q, k_part, v_part, dout, *bounds, log2, delta, dtype=jnp.float32)
        # Without the barrier, XLA may fuse the stacking of the results into the kernel. The limit of VMEM is then XLA's
        # default instead of the kernel's own, and the program does not compile.
        share, dk, dv = lax.optimization_barrier((share, dk, dv))
        return dq + share, (dk, dv)

    dq, (dk, dv) = lax.scan(one, jnp.zeros(q.shape, jnp.float32), jnp.arange(0, S, segment, dtype=jnp.int32))
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(k.shape) for x in (dk, dv))
    return dq.astype(q.dtype), dk, dv


_attention.defvjp(_forward, _backward)
