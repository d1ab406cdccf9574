"""Losses of preference pairs as published: DPO, IPO, and Bradley-Terry for reward models. Pure functions."""

from typing import Literal

import jax
import jax.numpy as jnp


def dpo_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    beta: float,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Direct preference optimisation, for each pair.

    With h the log-ratio of chosen to rejected under the policy, less that under the reference, and s the smoothing:

    - "sigmoid": -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h). Rafailov et al. 2023, arXiv:2305.18290,
      equation 7; with s > 0 the conservative loss of Mitchell 2023, "A note on DPO with noisy preferences".
    - "ipo": (h - 1 / (2 beta))^2. Azar et al. 2023, arXiv:2310.12036, equation 17. TRL's takes log-probabilities
      divided by the number of tokens, OpenRLHF's takes sums.

    Args:
      chosen, rejected: float32 log-probabilities of the answers under the policy.
      reference_chosen, reference_rejected: under the reference, likewise. All have one shape.
      beta: strength of the bond to the reference.
      kind: of the loss.
      label_smoothing: probability that a label is wrong, for "sigmoid".

    Returns:
      Losses in the same shape.
    """
    h = (chosen - rejected) - (reference_chosen - reference_rejected)
    if kind == "ipo":
        return jnp.square(h - 1 / (2 * beta))
    z = beta * h
    return (1 - label_smoothing) * jax.nn.softplus(-z) + label_smoothing * jax.nn.softplus(z)


def bradley_terry(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0, centering: float = 0.0
) -> jax.Array:
    """Negative log-likelihood of preferences given scores, for each pair.

    -log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2. Bradley & Terry 1952; margin: Touvron et
    al. 2023, arXiv:2307.09288, equation 2; centring of scores at 0: Eisenstein et al. 2023, arXiv:2312.09244.

    Args:
      chosen, rejected: float32 scores of the answers, in one shape.
      margin: by how much the chosen score is to exceed the other, in the same shape.
      centering: coefficient.

    Returns:
      Losses in the same shape.
    """
    loss = jax.nn.softplus(-(chosen - rejected - margin))
    return loss + centering * jnp.square(chosen + rejected) if centering else loss
