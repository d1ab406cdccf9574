"""Dual-chunk attention (DCA): attention over texts that are longer than those of training, without new positions.

A document is cut into chunks of c = chunk_size - local_size tokens. Every key is rotated by its place in its chunk, so
that a cached key is final. A query sees the keys in three parts, and is rotated differently for each:

| part       | keys                              | position of a query at place r of its chunk |
|------------|-----------------------------------|---------------------------------------------|
| intra      | of its own chunk, up to itself    | r                                           |
| successive | of the chunk before               | min(r + c, chunk_size)                      |
| inter      | of all chunks before that         | min(2 c - 1, chunk_size)                    |

So no relative position exceeds chunk_size, and those up to local_size are exact. The parts are intervals of keys, and
their results are merged by their log-sum-exp. A document of at most c tokens has an intra part only, which is plain
attention.

Beyond the length of training the logits are multiplied by f^2, f = 0.1 ln(length / trained length) + 1, the attention
temperature of YaRN. Here the factor is on the queries alone, in float32: cached keys do not depend on the final length.

Sources: An et al. 2024 (arXiv:2402.17463); Qwen2.5-1M Technical Report (arXiv:2501.15383), section 5.1, equation 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qwen_jax import kernels
from qwen_jax.attention.rope import Rope, rope_table
from qwen_jax.config import DualChunk, ModelConfig

Attend = Callable[[jax.Array, kernels.Mask], tuple[jax.Array, jax.Array | None]]
"""Attention of queries [B, T, H, d] over a part of the keys: output, and the log-sum-exp [B, H, T] if there are several
parts."""


def is_needed(config: ModelConfig, length: int) -> bool:
    """Whether a text of this length, which is known while tracing, may have more than one chunk."""
    return config.dual_chunk is not None and length > config.dual_chunk.chunk_len


def length_factor(dual_chunk: DualChunk, length: jax.Array) -> jax.Array:
    """The factor f of the module's docstring in float32, exactly 1 up to the length of training.

    Args:
      dual_chunk: gives the length of training.
      length: int32 array of any shape, tokens of texts.
    """
    trained = dual_chunk.original_max_position_embeddings
    ratio = length.astype(jnp.float32) / trained
    return jnp.where(length > trained, 0.1 * jnp.log(ratio) + 1.0, 1.0)


def rope(config: ModelConfig, positions_BT: jax.Array, length_BT: jax.Array, dtype: jnp.dtype) -> Rope:
    """The rotation of keys, and those of queries for the three parts: intra, successive, inter.

    Args:
      config: with `dual_chunk`.
      positions_BT: int32, position of each token in its document.
      length_BT: int32 [B, T] or [B, 1], tokens of each token's text, which the length factor is for.
      dtype: of queries and keys.
    """
    assert config.dual_chunk is not None
    c, size = config.dual_chunk.chunk_len, config.dual_chunk.chunk_size
    place_BT = jnp.maximum(positions_BT, 0) % c
    own = rope_table(config, place_BT, dtype)
    successive = rope_table(config, jnp.minimum(place_BT + c, size), dtype)
    inter = rope_table(config, jnp.full_like(place_BT, min(2 * c - 1, size)), dtype)
    factor_BT = length_factor(config.dual_chunk, length_BT)
    return Rope(own, (own, successive, inter), factor_BT * factor_BT)


def split_mask(dual_chunk: DualChunk, mask: kernels.Mask, positions_BT: jax.Array) -> tuple[kernels.Mask, ...]:
    """The intervals of the three parts: intra, successive, inter.

    Args:
      dual_chunk: gives the length of a chunk.
      mask: causal: the last key that a row sees is its own.
      positions_BT: int32, position of each token in its document.
    """
    c, (start, end) = dual_chunk.chunk_len, (mask.k_start_BT, mask.k_end_BT)
    # The first keys of a row's own chunk and of the chunk before.
    own_chunk = end - 1 - jnp.maximum(positions_BT, 0) % c
    intra, successive = (jnp.maximum(start, first) for first in (own_chunk, own_chunk - c))
    return kernels.Mask(intra, end), kernels.Mask(successive, intra), kernels.Mask(start, successive)


def rope_and_masks(
    config: ModelConfig,
    positions_BT: jax.Array,
    mask: kernels.Mask | tuple[kernels.Mask, ...],
    longest: int,
    length_BT: jax.Array | None,
    dtype: jnp.dtype,
) -> tuple[Rope, tuple[kernels.Mask, ...]]:
    """The rotations of queries and keys, and the masks of the parts of the keys.

    There is one part, unless dual-chunk attention is configured and a text may be longer than one chunk, or the caller
    gives several: rows that see two intervals of keys, such as a document and a question on it.

    Args:
      config: the architecture.
      positions_BT: int32, position of each token in its document.
      mask: the keys that each row sees, or disjoint parts of them.
      longest: tokens that a text may have.
      length_BT: int32 [B, T] or [B, 1], tokens of each token's text; by default up to the row's last position.
      dtype: of queries and keys.

    Raises:
      ValueError: parts of the caller's beside those of dual-chunk attention.
    """
    if config.dual_chunk is None or not is_needed(config, longest):
        table = rope_table(config, positions_BT, dtype)
        masks = mask if isinstance(mask, tuple) else (mask,)
        return Rope(table, (table,) * len(masks)), masks
    if isinstance(mask, tuple):
        raise ValueError("Dual-chunk attention splits one mask into parts, and takes no parts of the caller's.")
    length_BT = positions_BT.max(axis=1, keepdims=True) + 1 if length_BT is None else length_BT
    return rope(config, positions_BT, length_BT, dtype), split_mask(config.dual_chunk, mask, positions_BT)


def continuous_positions(dual_chunk: DualChunk) -> tuple[int, ...]:
    """What is added to a query's position in its chunk, for each part, to choose keys of sparse attention by.

    These positions are not clipped, so that they grow with the distance of a key. Source: Qwen2.5-1M report, section
    5.2.
    """
    return 0, dual_chunk.chunk_len, dual_chunk.chunk_size


def over_parts(
    attend: Attend, queries: tuple[jax.Array, ...], masks: tuple[kernels.Mask, ...], *, one_call: bool
) -> jax.Array:
    """Attention over all parts of the keys, [B, T, H, d]. Runs on local arrays.

    Args:
      attend: over one part.
      queries: for each part.
      masks: of each part.
      one_call: the parts of one new token are rows of one call, which reads the cache once. A row of the call must not
        depend on the number of rows; that is so in kernels. XLA may sum a product of more rows in another order.
    """
    if len(masks) == 1:
        return attend(queries[0], masks[0])[0]
    if queries[0].shape[1] > 1 or not one_call:
        parts = [attend(q, mask) for q, mask in zip(queries, masks, strict=True)]
    else:
        start = jnp.concatenate([mask.k_start_BT for mask in masks], axis=1)
        end = jnp.concatenate([mask.k_end_BT for mask in masks], axis=1)
        rows = kernels.Mask(start, end, is_disjoint=True)
        out, lse = attend(jnp.concatenate(queries, axis=1), rows)
        assert lse is not None
        parts = [(out[:, i : i + 1], lse[:, :, i : i + 1]) for i in range(len(masks))]
    return kernels.merge([(out, lse) for out, lse in parts if lse is not None])[0]
