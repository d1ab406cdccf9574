"""A paged cache for chunks of several texts that share one row, so that few of the tokens of a step are padding.

The page table is that of one row: it lists the pages of each text one after the other. So each text has an interval of
the row's slots, which begins with a page, and each token sees the slots from the first one of its text up to its own.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import quantized_cache
from qwen_jax.attention.paged_cache import PagesLayer, write_pages
from qwen_jax.parallel.sharding import Sharding


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("k_NKPd", "v_NKPd", "pages_1M", "slot_1T"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class PackedLayer(PagesLayer):
    """One layer of a `PackedCache`."""

    k_NKPd: Any
    v_NKPd: Any
    pages_1M: jax.Array
    slot_1T: jax.Array

    @property
    def fresh(self) -> bool:
        """Queries attend to slots, also where no text has any before its new tokens."""
        return False

    def specs(self, sharding: Sharding) -> Any:
        k, v = (quantized_cache.specs(pages, sharding) for pages in (self.k_NKPd, self.v_NKPd))
        arrays: dict[str, Any] = {"k_NKPd": k, "v_NKPd": v}
        arrays |= {"pages_1M": P(*sharding.rows, None), "slot_1T": sharding.tokens}
        return dataclasses.replace(self, **arrays)

    def write(self, k_1TKd: jax.Array, v_1TKd: jax.Array) -> "PackedLayer":
        # Attention multiplies the values that a query does not see by zero, which makes zero of finite numbers only. So
        # that no text spoils another one of its step, a token whose values are not finite has NaN in its keys instead.
        finite_1TK1 = jnp.isfinite(v_1TKd).all(axis=3, keepdims=True)
        k_1TKd, v_1TKd = jnp.where(finite_1TK1, k_1TKd, jnp.nan), jnp.where(finite_1TK1, v_1TKd, 0)
        # Padding goes to page N, which does not exist: the write is dropped.
        size, slot_1T = self.k_NKPd.shape[2], jnp.maximum(self.slot_1T, 0)
        page_1T = jnp.take_along_axis(self.pages_1M, slot_1T // size, axis=1)
        page_1T = jnp.where(self.slot_1T < 0, self.k_NKPd.shape[0], page_1T)
        k, v = (
            write_pages(pages, new, page_1T, slot_1T % size)
            for pages, new in ((self.k_NKPd, k_1TKd), (self.v_NKPd, v_1TKd))
        )
        return dataclasses.replace(self, k_NKPd=k, v_NKPd=v)

    @property
    def table(self) -> jax.Array:
        return self.pages_1M


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "pages_1M", "slot_1T", "start_1T"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class PackedCache:
    """Pages of P slots for the keys and the values of each layer, and one row of new tokens of several texts.

    Slot j of the row is slot j % P of page pages[j // P]. No two texts write to the same page.

    Attributes:
      keys, values: [N, K, P, d] for each layer, arrays or `QuantizedRows`.
      pages_1M: int32, the pages of each text in order, one text after the other. Further entries may have any value.
      slot_1T: int32, the slot of each new token; -1 for padding, which is not written and sees nothing.
      start_1T: int32, the first slot of each token's text; 0 for padding.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    pages_1M: jax.Array
    slot_1T: jax.Array
    start_1T: jax.Array

    @property
    def slots(self) -> int:
        """The most tokens that all texts can have."""
        return self.pages_1M.shape[1] * self.keys[0].shape[2]

    @property
    def layers(self) -> list[PackedLayer]:
        pairs = zip(self.keys, self.values, strict=True)
        return [PackedLayer(k, v, self.pages_1M, self.slot_1T) for k, v in pairs]

    def with_layers(self, layers: Sequence[PackedLayer]) -> "PackedCache":
        keys, values = tuple(layer.k_NKPd for layer in layers), tuple(layer.v_NKPd for layer in layers)
        return dataclasses.replace(self, keys=keys, values=values)

    @property
    def positions_1T(self) -> jax.Array:
        """Positions int32 of the new tokens, within their texts."""
        return jnp.maximum(self.slot_1T - self.start_1T, 0)

    @property
    def mask(self) -> kernels.Mask:
        """What the new tokens see: each its own text up to itself."""
        return kernels.Mask(self.start_1T, self.slot_1T + 1)
