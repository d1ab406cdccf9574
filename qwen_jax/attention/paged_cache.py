"""A key/value cache in pages, which rows share through a page table; see `attention.cache`."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import quantized_cache
from qwen_jax.attention.quantized_cache import Buffer
from qwen_jax.config import ModelConfig
from qwen_jax.parallel.sharding import Sharding


def write_pages(pages_NKPd: Buffer, new_BTKd: jax.Array, page_BT: jax.Array, place_BT: jax.Array) -> Any:
    """Pages with new keys or values in them. Runs on local arrays.

    Args:
      pages_NKPd: pages of P slots, an array or `QuantizedRows`.
      new_BTKd: of the new tokens.
      page_BT: int32, the page of each token. What would go to page N, which does not exist, is dropped.
      place_BT: int32, the slot in that page; no two tokens have the same.
    """
    K, size, d = pages_NKPd.shape[1:]
    # Pages are seen as rows of d numbers. A scatter into two separate axes would be compiled with a copy of all pages
    # in another layout.
    row_BTK = (page_BT[..., None] * K + jnp.arange(K, dtype=jnp.int32)) * size + place_BT[..., None]

    def written(rows: jax.Array, new: jax.Array) -> jax.Array:
        return rows.at[row_BTK].set(new, mode="drop", unique_indices=True)

    if not isinstance(pages_NKPd, kernels.QuantizedRows):
        rows = written(pages_NKPd.reshape(-1, d), new_BTKd.astype(pages_NKPd.dtype))
        return rows.reshape(pages_NKPd.shape)
    new = pages_NKPd.quantized(new_BTKd.swapaxes(1, 2))
    values, scales = pages_NKPd.values_BKSd, pages_NKPd.scales_BKS
    return dataclasses.replace(
        pages_NKPd,
        values_BKSd=written(values.reshape(-1, d), new.values_BKSd.swapaxes(1, 2)).reshape(values.shape),
        scales_BKS=written(scales.reshape(-1), new.scales_BKS.swapaxes(1, 2)).reshape(scales.shape),
    )


class PagesLayer(abc.ABC):
    """What layers whose keys and values lie in pages have in common.

    Attributes:
      k_NKPd, v_NKPd: the pages, arrays or `QuantizedRows`.
    """

    k_NKPd: Any
    v_NKPd: Any

    @property
    @abc.abstractmethod
    def table(self) -> jax.Array:
        """The page table int32 [rows, pages]."""

    def as_read(self, k_BTKd: jax.Array, v_BTKd: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quantized_cache.as_read(self.k_NKPd, k_BTKd), quantized_cache.as_read(self.v_NKPd, v_BTKd)

    def attend(
        self,
        q_BTHd: jax.Array,
        mask: kernels.Mask,
        *,
        scale: float,
        implementation: kernels.Implementation,
    ) -> tuple[jax.Array, jax.Array]:
        pages = self.k_NKPd, self.v_NKPd, self.table
        return kernels.paged_attention(q_BTHd, *pages, mask, scale=scale, implementation=implementation)

    def keys_values(self, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
        raise ValueError("Sparse attention needs a contiguous cache.")

    def supports_step(self, implementation: kernels.Implementation, x: jax.Array, heads: int, kv_heads: int) -> bool:
        return False

    def step(
        self,
        qkv_BRd: jax.Array,
        bias_Rd: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        start_B: jax.Array,
        *,
        scale: float,
    ) -> tuple[jax.Array, Any]:
        raise ValueError("There is no fused decode step for pages: see supports_step.")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k_NKPd", "v_NKPd", "pages_BM", "lengths_B", "new_B"),
    meta_fields=("fresh",),
)
@dataclasses.dataclass(frozen=True)
class PagedLayer(PagesLayer):
    """One layer of a `PagedCache`."""

    k_NKPd: Any
    v_NKPd: Any
    pages_BM: jax.Array
    lengths_B: jax.Array
    new_B: jax.Array
    fresh: bool

    def specs(self, sharding: Sharding) -> Any:
        s, table = sharding, P(*sharding.rows, None)
        k, v = (quantized_cache.specs(pages, s) for pages in (self.k_NKPd, self.v_NKPd))
        arrays: dict[str, Any] = {"k_NKPd": k, "v_NKPd": v, "pages_BM": table, "lengths_B": s.rows, "new_B": s.rows}
        return dataclasses.replace(self, **arrays)

    def write(self, k_BTKd: jax.Array, v_BTKd: jax.Array) -> "PagedLayer":
        (N, _, size, _), T, M = self.k_NKPd.shape, k_BTKd.shape[1], self.pages_BM.shape[1]
        # The slot of each new token, and the page and the place in it that the table gives for the slot.
        t = jnp.arange(T, dtype=jnp.int32)
        slot_BT = self.lengths_B[:, None] + t
        page_BT = jnp.take_along_axis(self.pages_BM, jnp.minimum(slot_BT // size, M - 1), axis=1)
        # Padding, and what is beyond the table, goes to page N, which does not exist: the write is dropped.
        page_BT = jnp.where((t < self.new_B[:, None]) & (slot_BT < M * size), page_BT, N)
        k, v = (
            write_pages(pages, new, page_BT, slot_BT % size)
            for pages, new in ((self.k_NKPd, k_BTKd), (self.v_NKPd, v_BTKd))
        )
        return dataclasses.replace(self, k_NKPd=k, v_NKPd=v)

    @property
    def table(self) -> jax.Array:
        return self.pages_BM

    def supports_step(self, implementation: kernels.Implementation, x: jax.Array, heads: int, kv_heads: int) -> bool:
        # Pages in 8 bits are not bfloat16.
        return not self.fresh and kernels.supports_decode_step(
            implementation, x.dtype, x.shape[1], heads, kv_heads, self.k_NKPd, self.pages_BM
        )

    def step(
        self,
        qkv_BRd: jax.Array,
        bias_Rd: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        start_B: jax.Array,
        *,
        scale: float,
    ) -> tuple[jax.Array, "PagedLayer"]:
        rows = start_B, self.lengths_B, self.new_B, self.pages_BM
        out, k, v = kernels.paged_decode_step(qkv_BRd, bias_Rd, *rope, self.k_NKPd, self.v_NKPd, *rows, scale=scale)
        return out, dataclasses.replace(self, k_NKPd=k, v_NKPd=v)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "pages_BM", "lengths_B", "new_B"),
    meta_fields=("fresh",),
)
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Pages of P slots for the keys and the values of each layer, and a table of the pages of each row.

    Slot j of row b is slot j % P of page pages[b, j // P]. The table decides which rows share pages; a row must not
    write to a page that another row reads. Where rows are sharded over devices, pages are too, and the table's entries
    count the pages of the row's own shard.

    Attributes:
      keys, values: [N, K, P, d] for each layer, arrays or `QuantizedRows`.
      pages_BM: int32 page table. Entries for slots that are not in use may have any value.
      lengths_B: int32, tokens that each row has in the cache.
      new_B: int32, how many of the next tokens of each row are real; the rest is padding on the right.
      fresh: no row has a token yet.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    pages_BM: jax.Array
    lengths_B: jax.Array
    new_B: jax.Array
    fresh: bool = False

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        sharding: Sharding,
        pages_BM: jax.Array,
        new_B: jax.Array,
        *,
        num_pages: int,
        page_size: int,
        dtype: jnp.dtype,
        key_channels: Sequence[jax.Array] | None = None,
    ) -> "PagedCache":
        """A cache without tokens.

        Args:
          config: the architecture.
          sharding: of the current mesh.
          pages_BM: int32 page table.
          new_B: int32, tokens of each prompt.
          num_pages: pages of all shards together.
          page_size: slots in a page.
          dtype, key_channels: as for `ContiguousCache.for_prompts`.
        """
        shape = num_pages, sharding.kv_heads, page_size, config.head_dim
        make = functools.partial(quantized_cache.empty, shape, sharding, dtype)
        keys = tuple(make(key_channels[i] if key_channels else None) for i in range(config.num_layers))
        values = tuple(make() for _ in range(config.num_layers))
        return cls(keys, values, pages_BM, jnp.zeros_like(new_B), new_B, fresh=True)

    @property
    def slots(self) -> int:
        """The most tokens that a row can have."""
        return self.pages_BM.shape[1] * self.keys[0].shape[2]

    @property
    def start_B(self) -> jax.Array:
        """int32, the first slot of each row."""
        return jnp.zeros_like(self.lengths_B)

    @property
    def layers(self) -> list[PagedLayer]:
        pairs = zip(self.keys, self.values, strict=True)
        return [PagedLayer(k, v, self.pages_BM, self.lengths_B, self.new_B, self.fresh) for k, v in pairs]

    def with_layers(self, layers: Sequence[PagedLayer]) -> "PagedCache":
        keys, values = tuple(layer.k_NKPd for layer in layers), tuple(layer.v_NKPd for layer in layers)
        return dataclasses.replace(self, keys=keys, values=values)

    def positions(self, length: int) -> jax.Array:
        """Positions int32 [B, T] of the next tokens, within their rows."""
        return self.lengths_B[:, None] + jnp.arange(length, dtype=jnp.int32)

    def mask(self, length: int) -> kernels.Mask:
        """What the next tokens see, for `attend`: each its own row up to itself."""
        if self.fresh:
            return kernels.causal_mask(len(self.lengths_B), length)
        return kernels.cache_mask(self.start_B, self.lengths_B, length)

    def advanced(self, new_B: jax.Array) -> "PagedCache":
        """The cache after its next tokens were written.

        Args:
          new_B: int32, how many real tokens of each row come next.
        """
        return dataclasses.replace(self, lengths_B=self.lengths_B + self.new_B, new_B=new_B, fresh=False)
