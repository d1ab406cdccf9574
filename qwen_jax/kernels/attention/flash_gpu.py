"""Attention over interval masks on Hopper GPUs: forward and backward, for training and prefill.

A thread block has two warpgroups that compute, 64 rows each, and one or two more that move data. The forward pass and,
for head_dim 128, the gradient with respect to the queries walk over key tiles. The gradient with respect to keys and
values walks over query tiles, of all heads of a group, so that nothing is summed outside the kernel. For head_dim 64
the same walk also gives the gradient with respect to the queries (`flash_gpu_fused`); for 128 two walks were measured
to be faster. Every sum has a fixed order: results are bit-identical from run to run. `tile_ranges` computes beforehand
which tiles are visited, and which of them need no mask.

Sources: FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the algorithm and its gradient, FlashAttention-3 (Shah et al.
2024, arXiv:2407.08608) for the roles of the warpgroups and for products that overlap with the softmax.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_gpu_backward import run_keys, run_queries
from qwen_jax.kernels.attention.flash_gpu_forward import run_forward
from qwen_jax.kernels.attention.flash_gpu_fused import run_backward
from qwen_jax.kernels.attention.flash_gpu_tiles import BackwardInputs
from qwen_jax.kernels.gpu.tiles import ROWS
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.softmax import gradient_terms

_Residuals = tuple[jax.Array, ...]


def supports(dtype: jax.typing.DTypeLike, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels support these arguments; heads are those of one device."""
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
    """Grouped-query attention where query row i sees the keys start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: queries, bfloat16 or float16.
      k_BSKd, v_BSKd: keys and values. Those that no row sees may be any finite numbers, as in a cache that is not full:
        keys have no effect, values are multiplied by zero.
      start_BT, end_BT: int32 intervals within the S keys; rows that see nothing have start >= end.
      scale: multiplies the logits.
      head_major: keys and values are [B, K, S, d], the layout of a cache. Has no gradient.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing, and the log-sum-exp of the logits, float32
      [B, H, T], minus infinity there. Both have gradients.

    Raises:
      InputError: arguments that `supports` rejects, or a gradient with `head_major`.
    """
    return _forward(q_BTHd, k_BSKd, v_BSKd, start_BT, end_BT, scale, head_major)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, scale: float, head_major: bool
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    heads, keys = (1, 2) if head_major else (2, 1)
    if not supports(q.dtype, q.shape[2], k.shape[heads], q.shape[3]):
        raise InputError(
            f"The attention kernels for Hopper GPUs need bfloat16 or float16 and head_dim 64 or 128; got {q.dtype} "
            f"{q.shape} and {k.shape}. Use implementation='reference'."
        )
    start, end = jnp.maximum(start, 0), jnp.minimum(end, k.shape[keys])
    k_padded, v_padded = (_pad_for_copies(x, keys) for x in (k, v))
    out, lse = run_forward(_pad_for_copies(q), k_padded, v_padded, start, end, scale=scale, head_major=head_major)
    out, lse = out[:, : q.shape[1]], lse[:, :, : q.shape[1]]
    return (out, lse), (q, k, v, start, end, out, lse)


def _backward(
    scale: float, head_major: bool, residuals: _Residuals, gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    if head_major:
        raise InputError("Attention over a head-major cache has no gradient. Use head_major=False.")
    q, k, v, start, end, out, lse = residuals
    dout, dlse = gradients
    log2, delta = gradient_terms(out, lse, dout, dlse, "BTHd")
    arrays = [_pad_for_copies(x) for x in (q, k, v, dout)]
    arrays += [pad_to_multiple(x, -1, 2 * ROWS) for x in (start, end, log2, delta)]
    inputs = BackwardInputs(*arrays)
    if q.shape[3] == 64:
        dq, dk, dv = run_backward(inputs, scale=scale)
    else:
        dq, (dk, dv) = run_queries(inputs, scale=scale), run_keys(inputs, scale=scale)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]], None, None


attention.defvjp(_forward, _backward)


def _pad_for_copies(x: jax.Array, axis: int = 1) -> jax.Array:
    """Pads a length to a multiple of 8, which the copy engine needs for tiled shared memory."""
    return pad_to_multiple(x, axis, 8)


def gradient(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, start_BT: jax.Array, end_BT: jax.Array,
    out_BTHd: jax.Array, lse_BHT: jax.Array, dout_BTHd: jax.Array, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradient over a part of the keys; see `kernels.attention_gradient`."""
    start, end = jnp.maximum(start_BT, 0), jnp.minimum(end_BT, k_BSKd.shape[1])
    residuals = q_BTHd, k_BSKd, v_BSKd, start, end, out_BTHd, lse_BHT
    dq, dk, dv, *_ = _backward(scale, False, residuals, (dout_BTHd, jnp.zeros_like(lse_BHT)))
    assert dq is not None
    assert dk is not None
    assert dv is not None
    return dq, dk, dv
