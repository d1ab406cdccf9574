"""Sparse prefill in a layer: writes a chunk of a prompt to the cache and attends to the keys that matter most."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention.cache import ContiguousLayer
from qwen_jax.attention.dual_chunk import continuous_positions
from qwen_jax.attention.rope import rope_table, rotate
from qwen_jax.attention.sparse import Diagnostics, SparsePrefill, attend
from qwen_jax.attention.sparse_parts import Part, probe_rows, take_rows
from qwen_jax.config import ModelConfig
from qwen_jax.parallel.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseChunk:
    """A chunk of a prompt that is read by sparse attention.

    Attributes:
      sparsity: the pattern and the budgets.
      slot: int32 scalar, the cache slot of the first token of the chunk.
      count: int32 scalar, tokens of the chunk that are not padding at its end.
      end: int32 scalar, the cache slot at which the prompts end.
    """

    sparsity: SparsePrefill
    slot: jax.Array
    count: jax.Array
    end: jax.Array

    def layer(self, i: int | jax.Array) -> "SparseChunk":
        """With the budgets of one layer."""
        return dataclasses.replace(self, sparsity=self.sparsity.layer(i))


def attend_sparsely(
    config: ModelConfig,
    sharding: Sharding,
    implementation: kernels.Implementation,
    queries: tuple[jax.Array, ...],
    k: jax.Array,
    v: jax.Array,
    masks: tuple[kernels.Mask, ...],
    cache: ContiguousLayer,
    chunk: SparseChunk,
) -> tuple[jax.Array, ContiguousLayer, Diagnostics]:
    """`Attention.attend` for a chunk of a prompt that visits only the keys that matter most.

    Args:
      config: the architecture.
      sharding: of the current mesh.
      implementation: of attention.
      queries, k, v, masks, cache: as for `Attention.attend`.
      chunk: where it is, and the pattern with the budgets of this layer.

    Returns:
      The heads' outputs, the cache, and what was left out.
    """
    s, chunks, sparsity = sharding, config.dual_chunk, chunk.sparsity
    of_heads = s.heads[2]
    found = P(*s.rows, of_heads)
    diagnostics = Diagnostics(found, found, found, found)  # type: ignore[arg-type]

    @jax.shard_map(
        in_specs=(s.heads, s.heads, s.heads, s.tokens, cache.specs(s), P(), P(), P(), P(of_heads, None)),
        out_specs=(s.heads, cache.specs(s), diagnostics),
        check_vma=False,
    )
    def local(
        queries: tuple[jax.Array, ...],
        k: jax.Array,
        v: jax.Array,
        masks: tuple[kernels.Mask, ...],
        cache: ContiguousLayer,
        slot: jax.Array,
        count: jax.Array,
        end: jax.Array,
        budgets_H2: jax.Array | None,
    ) -> tuple[jax.Array, ContiguousLayer, Diagnostics]:
        cache = cache.write(k, v)
        critical: list[jax.Array | None] = [None] * len(masks)
        if len(masks) > 1 and chunks is not None:
            # Rotations add up: queries at their place in the chunk become queries at continuous positions.
            probe = take_rows(queries[0], probe_rows(count))
            places = continuous_positions(chunks)
            tables = [rope_table(config, jnp.full((1, 1), place), probe.dtype) for place in places]
            critical = [rotate(probe, table) for table in tables]
        parts = [Part(*part) for part in zip(queries, masks, critical, strict=True)]
        out, _, found = attend(
            parts,
            *cache.keys_values(queries[0].dtype),
            sparsity.pattern,
            slot=slot,
            length=count,
            end=end,
            means=cache.means,
            budgets_H2=budgets_H2,
            max_columns=sparsity.max_columns,
            scale=config.head_dim**-0.5,
            implementation=implementation,
        )
        # The diagnostics are computed in this layer. A scheduler may move what no layer waits for to the end of the
        # program; the keys of every layer, which are a copy where the cache has 8 bits, would exist until then.
        out, found = jax.lax.optimization_barrier((out, found))
        return out, cache, found

    budgets_H2 = sparsity.budgets_LH2
    if budgets_H2 is not None:
        budgets_H2 = jax.reshard(budgets_H2, P(of_heads, None))
    with jax.named_scope("attend"):
        return local(queries, k, v, masks, cache, chunk.slot, chunk.count, chunk.end, budgets_H2)
