"""Rotary position embedding (RoPE): frequencies, plain or YaRN, cos and sin tables, and the rotation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig, Yarn


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per token of each rotated pair.

    Args:
      config: gives head_dim, rope_theta (the base) and YaRN, if any.

    Returns:
      float32 [head_dim / 2].

    Source: Su et al. 2021 (arXiv:2104.09864) eq. 15; YaRN: Peng et al. 2023 (arXiv:2309.00071) section 3.2.
    """
    d, theta = config.head_dim, config.rope_theta
    # float32 throughout, as in PyTorch: the tables must agree to the last bit.
    plain = 1.0 / np.power(np.float32(theta), np.arange(0, d, 2, dtype=np.float32) / np.float32(d))
    if config.yarn is None:
        return plain.astype(np.float32)
    keep = _yarn_kept_share(config.yarn, d, theta)
    return (plain / np.float32(config.yarn.factor) * (1 - keep) + plain * keep).astype(np.float32)


def _yarn_kept_share(yarn: Yarn, d: int, theta: float) -> np.ndarray:
    """The share of each frequency that is kept: 1 for high frequencies, 0 for low ones, a ramp in between."""

    def pair_with(rotations: float) -> float:
        turn = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return d * math.log(turn) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), d - 1)
    # A ramp of zero width would divide by zero.
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(d // 2, dtype=np.float32) - low) / np.float32(span), 0, 1)
    return (1 - ramp).astype(np.float32)


Table = tuple[jax.Array, jax.Array]
"""Cosines and sines, each [B, T, 1, head_dim / 2]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotations of one forward pass.

    Attributes:
      keys: rotates the keys.
      queries: rotates the queries: one table, or the three of `dual_chunk`, for the three parts of the keys.
      query_scale_BT: float32 [B, T] or [B, 1], multiplies the rotated queries; None where nothing does.
    """

    keys: Table
    queries: tuple[Table, ...]
    query_scale_BT: jax.Array | None = None


def rope_table(config: ModelConfig, positions_BT: jax.Array, dtype: jnp.dtype) -> Table:
    """Cosines and sines for `rotate`, computed in float32 and cast once, as Hugging Face does.

    Args:
      config: gives the frequencies and YaRN's scale.
      positions_BT: int32, position of each token in its document.
      dtype: of the queries and keys.
    """
    # An elementwise product, not an einsum: TPUs run einsums in bfloat16 by default, which ruins large positions.
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * jnp.asarray(inverse_frequencies(config))
    scale = config.yarn.scale if config.yarn else 1.0
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(x_BTHd: jax.Array, table: Table) -> jax.Array:
    """Rotates pair (i, i + head_dim / 2) of each head by its token's angle (the "NeoX" pairing)."""
    cos, sin = table
    first, second = jnp.split(x_BTHd, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_queries(q_BTHd: jax.Array, rope: Rope) -> tuple[jax.Array, ...]:
    """The queries for each part of the keys."""
    rotated = tuple(rotate(q_BTHd, table) for table in rope.queries)
    if rope.query_scale_BT is None:
        return rotated
    scale = rope.query_scale_BT[:, :, None, None]
    return tuple((q.astype(jnp.float32) * scale).astype(q.dtype) for q in rotated)
