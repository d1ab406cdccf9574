"""Key/value caches. A cache owns its layout: the model writes to it and attends to it, and never looks inside.

The model asks for two things, on each shard's own arrays: `write(k, v)` stores new tokens, and `attend(q, mask)`
attends to what the queries may see. Where `supports_step` says that one kernel does both, it calls `step` instead. All
caches number the tokens of a row by *slots*; masks count slots.

- `ContiguousCache`: one buffer a layer. All rows of a batch end at the same slot, so that a decode step writes one
  slice; shorter prompts begin at a later slot.
- `paged_cache.PagedCache`: pages of a fixed number of slots, shared by all rows through a page table. Each row has its
  own length.
- `packed_cache.PackedCache`: the same pages, for chunks of several texts that share one row.

Buffers and pages may be in 8 bits (`quantized_cache`).

A cache without tokens is `fresh`: its first write is a prompt, and queries attend to the new keys alone.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import quantized_cache
from qwen_jax.attention.pooled_blocks import BLOCK, block_means
from qwen_jax.attention.quantized_cache import Buffer
from qwen_jax.config import ModelConfig
from qwen_jax.parallel.sharding import Sharding


class LayerCache(Protocol):
    """The keys and values of one layer, as the model sees them."""

    @property
    def fresh(self) -> bool:
        """Whether nothing was written before, so that queries attend to new keys only. Static."""
        ...

    def specs(self, sharding: Sharding) -> Any:
        """The same tree with a PartitionSpec in place of each array."""
        ...

    def write(self, k_BTKd: jax.Array, v_BTKd: jax.Array) -> Self:
        """The cache with new keys (rotated) and values in it. Runs on local arrays."""
        ...

    def as_read(self, k_BTKd: jax.Array, v_BTKd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """New keys and values as later queries will read them: rounded as the cache does. Runs on local arrays."""
        ...

    def attend(
        self,
        q_BTHd: jax.Array,
        mask: kernels.Mask,
        *,
        scale: float,
        implementation: kernels.Implementation,
    ) -> tuple[jax.Array, jax.Array]:
        """Attention of the new tokens over the cache, after `write`. Runs on local arrays.

        Args:
          q_BTHd: queries.
          mask: intervals over slots.
          scale, implementation: as for `kernels.attention`.

        Returns:
          The output [B, T, H, d] and the log-sum-exp, float32 [B, H, T].
        """
        ...

    def keys_values(self, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        """All keys and values as head-major arrays [B, K, S, d], for sparse attention. Runs on local arrays.

        Args:
          dtype: of the queries. A cache in 8 bits is dequantised to it.
        """
        ...

    def supports_step(self, implementation: kernels.Implementation, x: jax.Array, heads: int, kv_heads: int) -> bool:
        """Whether one kernel adds the bias, rotates, writes and attends for one new token a row.

        Args:
          implementation: the attention implementation that is requested.
          x: activations [B, T, ...] of the new tokens.
          heads, kv_heads: on one device.
        """
        ...

    def step(
        self,
        qkv_BRd: jax.Array,
        bias_Rd: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        start_B: jax.Array,
        *,
        scale: float,
    ) -> tuple[jax.Array, Self]:
        """That kernel: the heads' outputs [B, H, d] and the cache. Runs on local arrays.

        Args:
          qkv_BRd: projection of one token a row without the bias; R counts the heads of q, k and v.
          bias_Rd: its bias.
          rope: cos and sin, [B, head_dim / 2].
          start_B: int32, the first slot that each row sees.
          scale: multiplies the logits.
        """
        ...


Layer = TypeVar("Layer", bound=LayerCache)


class Cache(Protocol[Layer]):
    """The keys and values of all layers, as the model sees them."""

    @property
    def layers(self) -> Sequence[Layer]:
        """One for each layer."""
        ...

    @property
    def slots(self) -> int:
        """The most tokens that a row can have."""
        ...

    def with_layers(self, layers: Sequence[Layer]) -> Self:
        """The cache with the keys and values that layers have written."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k_BKSd", "v_BKSd", "slot", "shift_B", "means"),
    meta_fields=("fresh",),
)
@dataclasses.dataclass(frozen=True)
class ContiguousLayer:
    """One layer of a `ContiguousCache`.

    Attributes:
      k_BKSd, v_BKSd, slot, fresh: as for `ContiguousCache`.
      shift_B: None where rows need not be shifted.
      means: `block_means` of the keys and of the values, for sparse prefill by pooled blocks. With them, only whole
        blocks are written.
    """

    k_BKSd: Buffer
    v_BKSd: Buffer
    slot: jax.Array
    shift_B: jax.Array | None
    fresh: bool
    means: tuple[jax.Array, jax.Array] | None = None

    def specs(self, sharding: Sharding) -> Any:
        shift = None if self.shift_B is None else sharding.rows
        k, v = (quantized_cache.specs(buffer, sharding) for buffer in (self.k_BKSd, self.v_BKSd))
        means = None if self.means is None else (sharding.cache, sharding.cache)
        arrays: dict[str, Any] = {"k_BKSd": k, "v_BKSd": v, "slot": P(), "shift_B": shift, "means": means}
        return dataclasses.replace(self, **arrays)

    def write(self, k_BTKd: jax.Array, v_BTKd: jax.Array) -> "ContiguousLayer":
        k_BKSd, v_BKSd = self._store(self.k_BKSd, k_BTKd), self._store(self.v_BKSd, v_BTKd)
        means = self.means
        if means is not None:
            new = (block_means(x.swapaxes(1, 2)) for x in self.as_read(k_BTKd, v_BTKd))
            k_mean, v_mean = (
                lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), self.slot // BLOCK, axis=2)
                for old, x in zip(means, new, strict=True)
            )
            means = k_mean, v_mean
        return dataclasses.replace(self, k_BKSd=k_BKSd, v_BKSd=v_BKSd, means=means)

    def as_read(self, k_BTKd: jax.Array, v_BTKd: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quantized_cache.as_read(self.k_BKSd, k_BTKd), quantized_cache.as_read(self.v_BKSd, v_BTKd)

    def _store(self, buffer_BKSd: Buffer, new_BTKd: jax.Array) -> Buffer:
        if self.shift_B is not None:
            # Right-padded prompts of unequal length all end at the same slot.
            new_BTKd = jax.vmap(functools.partial(jnp.roll, axis=0))(new_BTKd, self.shift_B)
        new_BKTd = new_BTKd.swapaxes(1, 2)
        if isinstance(buffer_BKSd, kernels.QuantizedRows):
            return quantized_cache.stored(buffer_BKSd, new_BKTd, self.slot)
        return lax.dynamic_update_slice_in_dim(buffer_BKSd, new_BKTd.astype(buffer_BKSd.dtype), self.slot, axis=2)

    def attend(
        self,
        q_BTHd: jax.Array,
        mask: kernels.Mask,
        *,
        scale: float,
        implementation: kernels.Implementation,
    ) -> tuple[jax.Array, jax.Array]:
        attention: Any = kernels.quantized_attention if self._in_8_bits else kernels.decode_attention
        keys_values = self.k_BKSd, self.v_BKSd
        result: tuple[jax.Array, jax.Array] = attention(
            q_BTHd, *keys_values, mask, scale=scale, implementation=implementation
        )
        return result

    @property
    def _in_8_bits(self) -> bool:
        return isinstance(self.k_BKSd, kernels.QuantizedRows)

    def keys_values(self, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        k, v = (x.dequantized(dtype) if isinstance(x, kernels.QuantizedRows) else x for x in (self.k_BKSd, self.v_BKSd))
        return k, v

    def supports_step(self, implementation: kernels.Implementation, x: jax.Array, heads: int, kv_heads: int) -> bool:
        return not self.fresh and kernels.supports_decode_step(
            implementation, x.dtype, x.shape[1], heads, kv_heads, self.k_BKSd
        )

    def step(
        self,
        qkv_BRd: jax.Array,
        bias_Rd: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        start_B: jax.Array,
        *,
        scale: float,
    ) -> tuple[jax.Array, "ContiguousLayer"]:
        # `supports_step` refuses a cache in 8 bits.
        keys_values: Any = self.k_BKSd, self.v_BKSd
        out, k, v = kernels.decode_step(qkv_BRd, bias_Rd, *rope, *keys_values, start_B, self.slot, scale=scale)
        return out, dataclasses.replace(self, k_BKSd=k, v_BKSd=v)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("keys", "values", "slot", "start_B"), meta_fields=("fresh",)
)
@dataclasses.dataclass(frozen=True)
class ContiguousCache:
    """One buffer for the keys and one for the values of each layer.

    Attributes:
      keys, values: [B, K, S, d] for each layer, arrays or `QuantizedRows`. Separate buffers, not one stacked array: a
        loop on the device updates them in place.
      slot: int32 scalar, where the next tokens are written, the same slot for every row.
      start_B: int32, the first slot of each row. A token's position is its slot minus this.
      fresh: nothing was written yet.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    slot: jax.Array
    start_B: jax.Array
    fresh: bool = False

    @classmethod
    def for_prompts(
        cls,
        config: ModelConfig,
        sharding: Sharding,
        lengths_B: jax.Array,
        slots: int,
        dtype: jnp.dtype,
        key_channels: Sequence[jax.Array] | None = None,
    ) -> "ContiguousCache":
        """An empty cache for prompts of these lengths, which will all end at the same slot.

        Args:
          config: the architecture.
          sharding: of the current mesh.
          lengths_B: int32, tokens of each prompt.
          slots: length of the buffers in tokens.
          dtype: of keys and values; int8 and float8_e4m3fn take half the memory of bfloat16.
          key_channels: for 8 bits, factors [K, d] for each layer; see `quantized_cache.key_channels`.
        """
        shape = len(lengths_B), sharding.kv_heads, slots, config.head_dim
        make = functools.partial(quantized_cache.empty, shape, sharding, dtype)
        keys = tuple(make(key_channels[i] if key_channels else None) for i in range(config.num_layers))
        values = tuple(make() for _ in range(config.num_layers))
        return cls(keys, values, jnp.int32(0), lengths_B.max() - lengths_B, fresh=True)

    @property
    def slots(self) -> int:
        """Length S of the buffers."""
        return self.keys[0].shape[2]

    @property
    def layers(self) -> list[ContiguousLayer]:
        # A single row always ends where it should.
        shift_B = self.start_B if self.fresh and len(self.start_B) > 1 else None
        pairs = zip(self.keys, self.values, strict=True)
        return [ContiguousLayer(k, v, self.slot, shift_B, self.fresh) for k, v in pairs]

    def with_layers(self, layers: Sequence[ContiguousLayer]) -> "ContiguousCache":
        keys, values = tuple(layer.k_BKSd for layer in layers), tuple(layer.v_BKSd for layer in layers)
        return dataclasses.replace(self, keys=keys, values=values)

    def positions(self, length: int) -> jax.Array:
        """Positions int32 [B, T] of the next tokens, within their rows."""
        if self.fresh:
            return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (len(self.start_B), length))
        return (self.slot - self.start_B)[:, None] + jnp.arange(length, dtype=jnp.int32)

    def mask(self, length: int) -> kernels.Mask:
        """What the next tokens see, for `attend`: each its own row up to itself."""
        if self.fresh:
            return kernels.causal_mask(len(self.start_B), length)
        return kernels.cache_mask(self.start_B, self.slot, length)

    def advanced(self, count: int | jax.Array) -> "ContiguousCache":
        """The cache after `count` more slots were written: for prompts, the length of the longest."""
        return dataclasses.replace(self, slot=self.slot + count, fresh=False)
