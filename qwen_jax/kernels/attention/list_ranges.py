"""Which tiles of its list, or of columns, each tile of queries visits, and in which order query tiles are computed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.kernels.attention.lists import KeyLists
from qwen_jax.kernels.attention.tile_ranges import bounds


class TileRanges(NamedTuple):
    """Ranges of key tiles, counted in the list of each query tile.

    Attributes:
      first_BHN, last_BHN: first and end of the visited key tiles, at least one.
      full_first_BHNw, full_last_BHNw: first and end of those in which no pair is masked, for each of the w parts of a
        query tile. They do not contain the first visited one.
    """

    first_BHN: jax.Array
    last_BHN: jax.Array
    full_first_BHNw: jax.Array
    full_last_BHNw: jax.Array


def clean_starts(lists: KeyLists, pieces: int, slots: int) -> jax.Array:
    """Starts of whole key tiles, and of one more behind each list, which may be read ahead.

    Args:
      lists: as the caller gave them.
      pieces: of a key tile.
      slots: where the keys end. Pieces that a list does not count start there.

    Returns:
      int32 [B, H, N, a multiple of `pieces`].
    """
    starts, counts = lists.starts_BHNL, lists.counts_BHN
    L = starts.shape[3]
    counted = jnp.arange(L) < counts[..., None]
    starts = jnp.where(counted, jnp.clip(starts, 0, slots), slots)
    return jnp.pad(starts, ((0, 0), (0, 0), (0, 0), (0, -L % pieces + pieces)), constant_values=slots)


def listed_tiles(lists: KeyLists, start_BT: jax.Array, end_BT: jax.Array, rows: int, keys: int) -> TileRanges:
    """The ranges for lists of pieces.

    Args:
      lists: as the caller gave them.
      start_BT, end_BT: mask intervals, padded to whole query tiles.
      rows: of a part of a query tile.
      keys: of a key tile; a multiple of the size of a piece.
    """
    starts, parts, pieces = lists.starts_BHNL, lists.rows // rows, keys // lists.size
    counted = jnp.arange(starts.shape[3]) < lists.counts_BHN[..., None]
    low, high, _, _ = (x[:, None, :, None] for x in bounds(start_BT, end_BT, lists.rows))
    inner = bounds(start_BT, end_BT, rows)[2:]
    inner_low, inner_high = (x.reshape(x.shape[0], 1, -1, parts, 1) for x in inner)

    def count(these: jax.Array) -> jax.Array:
        return these.sum(axis=-1, dtype=jnp.int32)

    # Lists are ascending, so each range of keys is a range of the list.
    first = count(counted & (starts + lists.size <= low)) // pieces
    last = -(-count(counted & (starts < high)) // pieces)
    counted, starts = counted[:, :, :, None], starts[:, :, :, None]
    full_first = -(-count(counted & (starts < inner_low)) // pieces)
    full_last = count(counted & (starts + lists.size <= inner_high)) // pieces
    return _at_least_one(first, last, full_first, full_last)


def column_tiles(places_BHNC: jax.Array, start_BT: jax.Array, end_BT: jax.Array, rows: int, keys: int) -> TileRanges:
    """The ranges for columns, all of which are masked.

    Args:
      places_BHNC: places; C is a multiple of `keys`.
      start_BT, end_BT: mask intervals, padded to whole query tiles.
      rows: of a query tile.
      keys: of a key tile.
    """
    low, high, _, _ = (x[:, None, :, None] for x in bounds(start_BT, end_BT, rows))
    seen = (places_BHNC >= low) & (places_BHNC < high)
    seen = seen.reshape(*seen.shape[:3], -1, keys).any(axis=4)
    i = jnp.arange(seen.shape[3], dtype=jnp.int32)
    first = jnp.where(seen, i, 2**30).min(axis=3)
    last = jnp.where(seen, i + 1, 0).max(axis=3)
    none = jnp.zeros((*last.shape, 2), jnp.int32)
    return _at_least_one(first, last, none, none)


def _at_least_one(first: jax.Array, last: jax.Array, full_first: jax.Array, full_last: jax.Array) -> TileRanges:
    """Makes a range that is empty the first key tile, all of which is masked, and clips the unmasked ones."""
    sees = first < last
    first, last = jnp.where(sees, first, 0), jnp.where(sees, last, 1)
    full_first = jnp.clip(full_first, first[..., None] + 1, last[..., None])
    return TileRanges(first, last, full_first, jnp.clip(full_last, full_first, last[..., None]))


def work_table(ranges: TileRanges, num_kv_heads: int) -> jax.Array:
    """What a kernel reads about each query tile, in the order of decreasing work.

    Tiles whose work differs by less than a tenth count as equal and keep their order: tiles of one head, and heads of
    one group, run at the same time and share keys in the cache of the chip.

    Args:
      ranges: of all query tiles, for two parts of each.
      num_kv_heads: of a row.

    Returns:
      int32 [B H N, 8]: number of the query tile, row and key/value head as one number, first and end of the visited key
      tiles, and first and end of the unmasked ones for each part.
    """
    first, last, full_first, full_last = ranges
    B, H, N = first.shape
    number = jnp.arange(B * H * N, dtype=jnp.int32)
    head = number // N // (H // num_kv_heads)
    full = jnp.stack([full_first, full_last], axis=4).reshape(-1, 4)
    table = jnp.concatenate([jnp.stack([number, head, first.ravel(), last.ravel()], axis=1), full], axis=1)
    work = jnp.floor(8 * jnp.log2((last - first).ravel().astype(jnp.float32)))
    # The place of a tile is the number of tiles with more work, or as much and a lower number. XLA makes one loop of
    # this; it takes longer to compile a sort than the rest of a layer, and compiles one for each call.
    more, same = work > work[:, None], work == work[:, None]
    place = jnp.sum(more | (same & (number < number[:, None])), axis=1, dtype=jnp.int32)
    return jnp.zeros_like(table).at[place].set(table, unique_indices=True)
