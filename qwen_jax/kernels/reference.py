"""Reference implementation of attention, which every kernel must equal. The only code with a dense [T, S] mask."""

import jax
import jax.numpy as jnp

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.kernels.softmax import LOG2E, gradient_terms

# Finite, so that the softmax of a row that sees nothing stays finite.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    k_start_BT: jax.Array,
    k_end_BT: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention where query row i sees the keys k_start[i] <= j < k_end[i].

    Args:
      q_BTHd: queries.
      k_BKSd, v_BKSd: keys and values; H is a multiple of K, and query head h reads head h // (H / K).
      k_start_BT, k_end_BT: int32 intervals. A row with an empty interval gives zeros.
      scale: multiplies the logits.

    Returns:
      [B, T, H, d] in the dtype of q, and the log-sum-exp of the logits, float32 [B, H, T], minus infinity where a row
      sees nothing. Logits, softmax and sums are float32.
    """
    seen_BTS = dense_mask(k_start_BT, k_end_BT, k_BKSd.shape[2])
    return masked_attention(q_BTHd, k_BKSd, v_BKSd, seen_BTS[:, None], scale=scale)


def masked_attention(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, seen: jax.Array, *, scale: float, bias: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """`attention` with any mask: bool [B, H, T, S], or [B, 1, T, S] for all heads. The bias is added to the logits."""
    B, T, H, d = q_BTHd.shape
    K, S = k_BKSd.shape[1:3]
    q_BTKGd = q_BTHd.reshape(B, T, K, H // K, d)
    seen = seen[:, :, None] if seen.shape[1] == 1 else seen.reshape(B, K, H // K, T, S)
    # Logits and softmax.
    logits = einsum_f32("BTKGd,BKSd->BKGTS", q_BTKGd, k_BKSd) * scale
    logits = logits + bias if bias else logits
    logits = jnp.where(seen, logits, _MASKED)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    weights = jnp.where(seen, weights, 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    # Where a row sees nothing, the gradient of its logarithm must not be zero divided by zero.
    sees = total > 0.0
    total = jnp.where(sees, total, 1.0)
    lse = jnp.where(sees, top + jnp.log(total), -jnp.inf).reshape(B, H, T)
    weights = weights / total
    # Weighted sum of the values. The weights are rounded to the model's dtype first, as in Hugging Face.
    out = einsum_f32("BKGTS,BKSd->BTKGd", weights.astype(v_BKSd.dtype), v_BKSd)
    return out.reshape(B, T, H, d).astype(q_BTHd.dtype), lse


def gradient(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, k_start_BT: jax.Array, k_end_BT: jax.Array,
    out_BTHd: jax.Array, lse_BHT: jax.Array, dout_BTHd: jax.Array, *, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradient of attention over a part of the keys, given head-major; see `kernels.attention_gradient`."""
    B, T, H, d = q_BTHd.shape
    K, S = k_BKSd.shape[1:3]
    q, dout = (x.reshape(B, T, K, H // K, d) for x in (q_BTHd, dout_BTHd))
    terms = gradient_terms(out_BTHd, lse_BHT, dout_BTHd, jnp.zeros_like(lse_BHT), "BTHd")
    log2, delta = (x.reshape(B, K, H // K, T, 1) for x in terms)
    # Recompute the softmax from its log-sum-exp.
    logits = einsum_f32("BTKGd,BKSd->BKGTS", q, k_BKSd) * scale
    seen = dense_mask(k_start_BT, k_end_BT, S)[:, None, None]
    weights = jnp.where(seen, jnp.exp2(logits * LOG2E - log2), 0.0)
    # The gradient with respect to the logits, and from it those with respect to queries, keys and values.
    dlogits = (weights * (einsum_f32("BTKGd,BKSd->BKGTS", dout, v_BKSd) - delta) * scale).astype(q.dtype)
    dq = einsum_f32("BKGTS,BKSd->BTKGd", dlogits, k_BKSd).reshape(q_BTHd.shape)
    dk = einsum_f32("BKGTS,BTKGd->BKSd", dlogits, q)
    dv = einsum_f32("BKGTS,BTKGd->BKSd", weights.astype(dout.dtype), dout)
    return dq.astype(q.dtype), dk.astype(k_BKSd.dtype), dv.astype(v_BKSd.dtype)


def attention_by_xla(
    q_BTHd: jax.Array, k_BSKd: jax.Array, v_BSKd: jax.Array, k_start_BT: jax.Array, k_end_BT: jax.Array, *, scale: float
) -> jax.Array:
    """The output of `attention` from `jax.nn.dot_product_attention`, which XLA compiles. Keys are [B, S, K, d]."""
    seen_BTS = dense_mask(k_start_BT, k_end_BT, k_BSKd.shape[1])
    out = jax.nn.dot_product_attention(
        q_BTHd, k_BSKd, v_BSKd, mask=seen_BTS[:, None], scale=scale, implementation="xla"
    )
    # JAX gives a row that sees nothing the mean of all values.
    return jnp.where((k_start_BT < k_end_BT)[:, :, None, None], out, 0)


def dense_mask(k_start_BT: jax.Array, k_end_BT: jax.Array, S: int) -> jax.Array:
    """The interval mask as a bool array [B, T, S]."""
    j = jnp.arange(S, dtype=jnp.int32)
    return (k_start_BT[:, :, None] <= j) & (j < k_end_BT[:, :, None])
