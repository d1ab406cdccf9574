"""The heads of reward models: one score of each hidden state."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qwen_jax.config import Score
from qwen_jax.linear import Linear, Weight
from qwen_jax.parallel.sharding import Sharding


class LinearScore(Weight):
    """One linear map without bias: the head of transformers' `Qwen2ForSequenceClassification` with one label."""

    def __init__(self, weight_1D: jax.Array, sharding: Sharding):
        super().__init__(weight_1D, P(None, None))
        self.sharding = sharding

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 scores [B, T] of normalised hidden states."""
        return _dot(x_BTD, self.weight[...], self.sharding)


class MLPScore(nnx.Module):
    """Linear, ReLU, linear, both with bias: the head of Qwen's `Qwen2ForRewardModel`.

    The first product is computed in the dtype of the hidden states, the second in float32.
    """

    def __init__(self, weight_DD: jax.Array, weight_1D: jax.Array, sharding: Sharding):
        s, D = sharding, weight_1D.shape[1]
        self.sharding = s
        self.hidden = Linear(
            "BTD,FD->BTF", weight_DD, x=s.hidden, w=s.gate_up, out=s.feed_forward,
            bias=jnp.zeros((D,)), bias_spec=P("tensor"),
        )  # fmt: skip
        self.output = Weight(weight_1D, P(None, "tensor"), jnp.zeros((1,)), P(None))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 scores [B, T] of normalised hidden states."""
        h_BTD = jax.nn.relu(self.hidden(x_BTD))
        bias = self.output.bias[...].astype(jnp.float32)
        return _dot(h_BTD, self.output.weight[...], self.sharding) + bias


def _dot(x_BTD: jax.Array, weight_1D: jax.Array, sharding: Sharding) -> jax.Array:
    """Float32 [B, T]. Scores are compared with one another, so they are not rounded to the compute dtype."""
    y_BT1: jax.Array = jnp.einsum(
        "BTD,OD->BTO",
        x_BTD.astype(jnp.float32),
        weight_1D.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=P(*sharding.tokens, None),
    )
    return y_BT1[..., 0]


def make_score_head(kind: Score, hidden_size: int, sharding: Sharding, key: jax.Array) -> Any:
    """A score head with random weights: normal with standard deviation 1 / sqrt(D + 1), biases zero.

    Source of the deviation: Huang et al. 2024, arXiv:2403.17031.

    Args:
      kind: which head.
      hidden_size: D.
      sharding: of the current mesh.
      key: a PRNG key.

    Returns:
      A module that maps [B, T, D] to float32 scores [B, T].
    """
    D = hidden_size
    first, last = jax.random.split(key)
    normal = nnx.initializers.normal((D + 1) ** -0.5)
    weight_1D = normal(last, (1, D))
    return (
        LinearScore(weight_1D, sharding) if kind == "linear" else MLPScore(normal(first, (D, D)), weight_1D, sharding)
    )
