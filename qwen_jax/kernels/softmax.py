"""What the running softmax of every attention kernel agrees on."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
LOWEST, LOW = -1e30, -1e15
"""A masked logit, and where the running maximum starts: below every real logit and so far above a masked one that its
probability is zero, also before a row has seen anything."""


def gradient_terms(
    out: jax.Array, lse_BHT: jax.Array, by_out: jax.Array, by_lse_BHT: jax.Array, layout: str
) -> tuple[jax.Array, jax.Array]:
    """What a backward pass needs of each row: its log-sum-exp in base 2, and what is taken off its logits' gradient.

    Args:
      out, by_out: the output, and the gradient by it.
      lse_BHT, by_lse_BHT: natural log-sum-exp, minus infinity where a row sees nothing, and the gradient by it.
      layout: of the first two, such as "BTHd".

    Returns:
      float32 [B, H, T] twice. Of a row without keys the first is so large that its probabilities are zero.
    """
    sees = jnp.isfinite(lse_BHT)
    # A gradient of the log-sum-exp adds the probability itself. That of minus infinity does not move.
    taken = jnp.einsum(f"{layout},{layout}->BHT", out.astype(jnp.float32), by_out.astype(jnp.float32))
    return jnp.where(sees, lse_BHT * LOG2E, -LOWEST), taken - jnp.where(sees, by_lse_BHT, 0.0)


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over all keys, from outputs and log-sum-exps over parts of them.

    Args:
      parts: outputs [B, T, H, d] and log-sum-exps float32 [B, H, T], as from `attention` with `return_lse`. No key may
        be in two of them.

    Returns:
      The same of all keys together. A row that sees nothing in any part is zero, and minus infinity.
    """
    outs, lses = zip(*parts, strict=True)
    lse = jnp.stack(lses)
    top = jax.lax.stop_gradient(jnp.max(lse, axis=0))
    # Minus infinity less itself is no number: a row that sees nothing takes the weights of zeros.
    sees, counts = jnp.isfinite(top), jnp.isfinite(lse)
    weights = jnp.where(counts, jnp.exp(jnp.where(counts, lse - jnp.where(sees, top, 0.0), 0.0)), 0.0)
    total = jnp.where(sees, weights.sum(axis=0), 1.0)
    # Elementwise, so that no part is copied.
    shares = (weights / total).swapaxes(2, 3)[..., None]
    out = sum(share * out.astype(jnp.float32) for share, out in zip(shares, outs, strict=True))
    return out.astype(outs[0].dtype), jnp.where(sees, top + jnp.log(total), -jnp.inf)
