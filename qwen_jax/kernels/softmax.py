"""Constants and formulas of the online softmax that all attention kernels share."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
LOWEST, LOW = -1e30, -1e15
"""A masked logit, and the initial running maximum. The maximum is below every real logit and so far above a masked one
that the probability of a masked one is zero, also while a row has not yet seen any key."""


def gradient_terms(
    out: jax.Array, lse_BHT: jax.Array, dout: jax.Array, dlse_BHT: jax.Array, layout: str
) -> tuple[jax.Array, jax.Array]:
    """Per-row terms of the backward pass: the log-sum-exp in base 2, and delta.

    The gradient with respect to the logits is p (dp - delta) (FlashAttention-2, Dao 2023, arXiv:2307.08691), where
    delta is the sum of out * dout. A gradient with respect to the log-sum-exp is subtracted from delta.

    Args:
      out, dout: the output and the gradient with respect to it.
      lse_BHT, dlse_BHT: natural log-sum-exp, minus infinity where a row sees nothing, and the gradient with respect to
        it.
      layout: dimensions of `out` and `dout`, such as "BTHd".

    Returns:
      Two float32 [B, H, T]. For a row without keys the first is so large that its probabilities are zero.
    """
    sees = jnp.isfinite(lse_BHT)
    delta = jnp.einsum(f"{layout},{layout}->BHT", out.astype(jnp.float32), dout.astype(jnp.float32))
    # The log-sum-exp of a row without keys is constant, so its gradient is ignored.
    return jnp.where(sees, lse_BHT * LOG2E, -LOWEST), delta - jnp.where(sees, dlse_BHT, 0.0)


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Merges attention over disjoint parts of the keys into attention over all of them.

    Args:
      parts: outputs [B, T, H, d] and log-sum-exps float32 [B, H, T], as from `attention` with `return_lse`. No key may
        be in two of them.

    Returns:
      Output and log-sum-exp over the keys of all parts. A row that sees nothing in any part gives zeros and minus
      infinity.
    """
    outs, lses = zip(*parts, strict=True)
    lse = jnp.stack(lses)
    top = jax.lax.stop_gradient(jnp.max(lse, axis=0))
    # Minus infinity less itself is NaN, so a row that sees nothing gets weights of zero.
    sees, counts = jnp.isfinite(top), jnp.isfinite(lse)
    weights = jnp.where(counts, jnp.exp(jnp.where(counts, lse - jnp.where(sees, top, 0.0), 0.0)), 0.0)
    total = jnp.where(sees, weights.sum(axis=0), 1.0)
    # Elementwise, so that XLA fuses the sum and does not copy any part.
    shares = (weights / total).swapaxes(2, 3)[..., None]
    out = sum(share * out.astype(jnp.float32) for share, out in zip(shares, outs, strict=True))
    return out.astype(outs[0].dtype), jnp.where(sees, top + jnp.log(total), -jnp.inf)
