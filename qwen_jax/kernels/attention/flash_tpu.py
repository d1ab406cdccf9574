"""Attention over interval masks on TPUs: forward and backward, for training and prefill.

Where head_dim is less than the width of the matrix unit (64 everywhere, 128 on v6e and 7x) logits are held transposed,
keys down and queries across: the softmax's maxima and sums are then elementwise over registers instead of across
lanes, its statistics are one row, and where head_dim is the number of rows of a product the unit is filled although
head_dim is not its width. The gradient's logits are always transposed. experiments/kernels/tpu_attention.md has what
this is worth.

Each program has a tile of queries of one head and a segment of its keys and values in VMEM, and walks over the tiles
of that segment which its intervals meet (`visits`); tiles without a masked pair take a body without masks. Every sum
has one order.

Sources: FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the algorithm and its gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_tpu_backward import run_backward
from qwen_jax.kernels.attention.flash_tpu_forward import run_forward
from qwen_jax.kernels.attention.visits import visits
from qwen_jax.kernels.softmax import LOG2E, gradient_terms
from qwen_jax.kernels.tpu.tiles import Blocks, blocks, fill_up


def supports(dtype: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels can do this, as one device sees it."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) and head_dim in (64, 128) and num_heads % num_kv_heads == 0


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
    tiles: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention where query row i sees keys start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_BKSd, v_BKSd: keys and values, head by head as a cache has them. All must be finite, also those nobody sees.
      start_BT, end_BT: int32 intervals; rows that see nothing have start >= end.
      scale: multiplies the logits.
      tiles: sizes; by default what `tpu.blocks` finds for the device.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing; and the natural logarithm of the softmax's
      denominator, float32 [B, H, T], minus infinity there. Both have gradients.

    Raises:
      InputError: what `supports` denies.
    """
    (_, T, H, d), (K, S) = q_BTHd.shape, k_BKSd.shape[1:3]
    if not supports(q_BTHd.dtype, H, K, d):
        raise InputError(
            f"The attention kernels for TPUs take bfloat16 or float32 and head_dim 64 or 128; got {q_BTHd.dtype} "
            f"{q_BTHd.shape} and {k_BKSd.shape}. Use implementation='reference'."
        )
    tiles = tiles or blocks(T, S, d, q_BTHd.dtype)
    out, lse = _attention(*_whole_tiles(q_BTHd, k_BKSd, v_BKSd, start_BT, end_BT, tiles), scale, tiles)
    return out[:, :, :T].swapaxes(1, 2), lse[:, :, :T]


def gradient(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, start_BT: jax.Array, end_BT: jax.Array,
    out_BTHd: jax.Array, lse_BHT: jax.Array, by_out_BTHd: jax.Array, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradient over a part of the keys, which are head by head; see `kernels.attention_gradient`."""
    (_, T, _, d), S = q_BTHd.shape, k_BKSd.shape[2]
    tiles = blocks(T, S, d, q_BTHd.dtype)
    out, by_out = (fill_up(x.swapaxes(1, 2), 2, tiles.queries) for x in (out_BTHd, by_out_BTHd))
    # Rows that are not there see nothing, whatever their log-sum-exp is.
    lse = fill_up(lse_BHT, 2, tiles.queries)
    kept = *_whole_tiles(q_BTHd, k_BKSd, v_BKSd, start_BT, end_BT, tiles), out, lse
    dq, dk, dv, *_ = _backward(scale, tiles, kept, (by_out, jnp.zeros_like(lse)))
    return dq[:, :, :T].swapaxes(1, 2), dk[:, :, :S], dv[:, :, :S]


def _whole_tiles(q: Any, k: Any, v: Any, start: Any, end: Any, tiles: Blocks) -> tuple[jax.Array, ...]:
    """Queries head by head, filled up to whole tiles as keys, values and intervals are."""
    start, end = jnp.maximum(start, 0), jnp.minimum(end, k.shape[2])
    start, end = (fill_up(x, 1, tiles.queries) for x in (start, end))
    k, v = (fill_up(x, 2, tiles.segment) for x in (k, v))
    return fill_up(q.swapaxes(1, 2), 2, tiles.queries), k, v, start, end


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, scale: float, tiles: Blocks
) -> tuple[jax.Array, jax.Array]:
    """The same of whole tiles: q and the output are [B, H, T, d]."""
    return _forward(q, k, v, start, end, scale, tiles)[0]


def _forward(q: Any, k: Any, v: Any, start: Any, end: Any, scale: float, tiles: Blocks) -> Any:
    visited = visits(start, end, tiles.queries, tiles.keys)
    out, lse = run_forward(q, k, v, start, end, visited, factor=scale * LOG2E, tiles=tiles)
    return (out, lse), (q, k, v, start, end, out, lse)


def _backward(scale: float, tiles: Blocks, kept: Any, by: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, start, end, out, lse = kept
    by_out, by_lse = by
    log2, delta = gradient_terms(out, lse, by_out, by_lse, "BHTd")
    run = functools.partial(run_backward, factor=scale * LOG2E, scale=scale, tiles=tiles)
    segment, S = tiles.backward_segment, k.shape[2]
    if segment == S:
        dq, dk, dv = run(q, k, v, by_out, start, end, log2, delta, dtype=q.dtype)
        return dq, dk, dv, None, None

    # One segment of keys after the other, so that no more than one share of the queries' gradient is held beside it.
    def one(dq: jax.Array, first: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        k_part, v_part = (lax.dynamic_slice_in_dim(x, first, segment, axis=2) for x in (k, v))
        ends = (jnp.clip(x - first, 0, segment) for x in (start, end))
        share, dk, dv = run(q, k_part, v_part, by_out, *ends, log2, delta, dtype=jnp.float32)
        return dq + share, (dk, dv)

    dq, (dk, dv) = lax.scan(one, jnp.zeros(q.shape, jnp.float32), jnp.arange(0, S, segment, dtype=jnp.int32))
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(k.shape) for x in (dk, dv))
    return dq.astype(q.dtype), dk, dv, None, None


_attention.defvjp(_forward, _backward)
