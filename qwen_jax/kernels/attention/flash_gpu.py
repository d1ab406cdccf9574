"""Attention over interval masks on Hopper GPUs: forward and backward, for training and prefill.

A thread block has two warpgroups that compute, 64 rows each, and one or two more that move data. The forward pass and,
for head_dim 128, the gradient of the queries walk over tiles of keys; the gradient of keys and values walks over tiles
of queries, of all heads of a group, so that nothing is summed outside. For head_dim 64 that walk gives the gradient of
the queries too (`flash_gpu_fused`); for 128 that was measured to be slower than two walks. Every sum has one order:
results are the same bits from run to run. What a tile must visit, and which part of that needs no mask, is worked out
beforehand (`visits`).

Sources: FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the algorithm and its gradient, FlashAttention-3 (Shah et al.
2024, arXiv:2407.08608) for the roles of the warpgroups and for products that run beside the softmax.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_gpu_backward import run_keys, run_queries
from qwen_jax.kernels.attention.flash_gpu_forward import run_forward
from qwen_jax.kernels.attention.flash_gpu_fused import run_backward
from qwen_jax.kernels.attention.flash_gpu_tiles import ROWS, fill_up, in_eights
from qwen_jax.kernels.softmax import gradient_terms


def supports(dtype: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels can do this, as one device sees it."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim in (64, 128) and num_heads % num_kv_heads == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
    head_major: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention where query row i sees keys start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: queries, bfloat16 or float16.
      k_BSKd, v_BSKd: keys and values. Those that no row sees may be any finite numbers, as in a cache that is not yet
        full: keys have no effect whatever they are, values are multiplied by zero.
      start_BT, end_BT: int32 intervals within the S keys; rows that see nothing have start >= end.
      scale: multiplies the logits.
      head_major: keys and values are [B, K, S, d], as a cache keeps them. Has no gradient.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing; and the natural logarithm of the softmax's
      denominator, float32 [B, H, T], minus infinity there. Both have gradients.

    Raises:
      InputError: what `supports` denies, or a gradient with `head_major`.
    """
    return _forward(q_BTHd, k_BSKd, v_BSKd, start_BT, end_BT, scale, head_major)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, scale: float, head_major: bool
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    heads, keys = (1, 2) if head_major else (2, 1)
    if not supports(q.dtype, q.shape[2], k.shape[heads], q.shape[3]):
        raise InputError(
            f"The attention kernels for Hopper GPUs take bfloat16 or float16 and head_dim 64 or 128; got {q.dtype} "
            f"{q.shape} and {k.shape}. Use implementation='reference'."
        )
    start, end = jnp.maximum(start, 0), jnp.minimum(end, k.shape[keys])
    k_eights, v_eights = (in_eights(x, keys) for x in (k, v))
    out, lse = run_forward(in_eights(q), k_eights, v_eights, start, end, scale=scale, head_major=head_major)
    out, lse = out[:, : q.shape[1]], lse[:, :, : q.shape[1]]
    return (out, lse), (q, k, v, start, end, out, lse)


def _backward(scale: float, head_major: bool, kept: Any, by: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    if head_major:
        raise InputError("Attention over a cache laid out head by head has no gradient. Use head_major=False.")
    q, k, v, start, end, out, lse = kept
    by_out, by_lse = by
    log2, delta = gradient_terms(out, lse, by_out, by_lse, "BTHd")
    arrays: list[Any] = [in_eights(x) for x in (q, k, v, by_out)]
    arrays += [fill_up(x, 2 * ROWS) for x in (start, end, log2, delta)]
    if q.shape[3] == 64:
        dq, dk, dv = run_backward(*arrays, scale=scale)
    else:
        dq, (dk, dv) = run_queries(*arrays, scale=scale), run_keys(*arrays, scale=scale)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]], None, None


attention.defvjp(_forward, _backward)


def gradient(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, start_BT: jax.Array, end_BT: jax.Array,
    out_BTHd: jax.Array, lse_BHT: jax.Array, by_out_BTHd: jax.Array, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradient over a part of the keys; see `kernels.attention_gradient`."""
    start, end = jnp.maximum(start_BT, 0), jnp.minimum(end_BT, k_BSKd.shape[1])
    kept = q_BTHd, k_BSKd, v_BSKd, start, end, out_BTHd, lse_BHT
    dq, dk, dv, *_ = _backward(scale, False, kept, (by_out_BTHd, jnp.zeros_like(lse_BHT)))
    return dq, dk, dv
