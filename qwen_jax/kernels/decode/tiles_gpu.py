"""Tiles of a cache that kernels for Hopper GPUs copy to shared memory: of one array, or of pages through a table."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.tiles import rem
from qwen_jax.kernels.types import Ref

PAGE = 16
"""The number of slots of a page must be a multiple of it."""

Pages = tuple[jax.Array, ...]
"""The pages of a tile's pieces; none where the cache is one array."""


class Table(NamedTuple):
    """The table of the pages of each row, int32 [B, M], and how many slots a page has."""

    pages: Ref
    size: int


def pieces(keys: int, page: int) -> int:
    """How many copies a tile takes: one, or one for each page that it meets.

    Args:
      keys: slots of a tile.
      page: slots of a page; 0 for a cache that is one array.
    """
    return keys // math.gcd(page, keys)


def tiles_of_share(first: jax.Array, tiles: jax.Array, share: jax.Array, shares: int) -> tuple[jax.Array, jax.Array]:
    """The first tile of a share of the keys, and the number of its tiles. Those of all shares differ by at most one.

    Args:
      first, tiles: the used tiles of the sequence.
      share, shares: index of the share and their number.
    """
    begin, end = (lax.div(tiles * n, jnp.int32(shares)) for n in (share, share + 1))
    return first + begin, end - begin


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one key/value head of one row.

    Attributes:
      row, head: their indices.
      keys: slots of a tile.
      table: of the pages [N, K, P, d]; None where the cache is one array [B, K, S, d].
      low, high: the slots that are seen, low <= j < high. A piece of a tile without them may come from any page that
        has some.
    """

    row: jax.Array
    head: jax.Array
    keys: int
    table: Table | None
    low: jax.Array
    high: jax.Array

    def pages(self, first: jax.Array) -> Pages:
        """Reads the table for a tile, also for one beyond the last. Done ahead of its copy, this takes no time.

        Args:
          first: slot of the tile.
        """
        if self.table is None:
            return ()
        piece = math.gcd(self.table.size, self.keys)
        slots = [first + n for n in range(0, self.keys, piece)]
        seen = [jnp.clip(slot, self.low, jnp.maximum(self.high - 1, 0)) for slot in slots]
        return tuple(self.table.pages[self.row, lax.div(slot, jnp.int32(self.table.size))] for slot in seen)

    def copy(self, source: Ref, first: jax.Array, pages: Pages, tile: Ref, ready: Ref) -> None:
        """Starts the copies of a tile.

        Args:
          source: keys or values, in global memory.
          first: slot of the tile.
          pages: of the tile.
          tile: shared memory for it.
          ready: a barrier, at which each of the `pieces` arrives.
        """
        if self.table is None:
            plgpu.copy_gmem_to_smem(source.at[self.row, self.head, pl.ds(first, self.keys)], tile, ready)
            return
        piece = math.gcd(self.table.size, self.keys)
        for n, page in enumerate(pages):
            place = pl.multiple_of(rem(first + n * piece, self.table.size), piece)
            at = page, self.head, pl.ds(place, piece)
            plgpu.copy_gmem_to_smem(source.at[at], tile.at[pl.ds(n * piece, piece)], ready)
