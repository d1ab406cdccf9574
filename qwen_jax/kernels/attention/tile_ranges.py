"""Which tiles of keys each tile of queries visits under interval masks, and the reverse."""

import jax
import jax.numpy as jnp


def bounds(start_BT: jax.Array, end_BT: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The keys that some row of each query tile sees lie in low <= j < high; those that all rows see are inner ones.

    Args:
      start_BT, end_BT: mask intervals; T is a multiple of `rows`.
      rows: length of a query tile.

    Returns:
      low, high, inner_low, inner_high, each int32 [B, query tiles]. A tile that sees nothing has 2**30 and 0.
    """
    start, end = (x.reshape(x.shape[0], -1, rows) for x in (start_BT, end_BT))
    sees = start < end
    low, high = jnp.where(sees, start, 2**30).min(axis=2), jnp.where(sees, end, 0).max(axis=2)
    return low, high, start.max(axis=2), end.min(axis=2)


def key_tiles(start_BT: jax.Array, end_BT: jax.Array, rows: int, keys: int) -> jax.Array:
    """The range of key tiles that each query tile visits, and the range in which no pair is masked.

    Args:
      start_BT, end_BT: mask intervals; T is a multiple of `rows`.
      rows, keys: length of a query tile and of a key tile.

    Returns:
      int32 [B, query tiles, 4]: first and end of the visited key tiles, first and end of the unmasked ones.
    """
    low, high, inner_low, inner_high = bounds(start_BT, end_BT, rows)
    first, last = low // keys, -(-high // keys)
    first = jnp.minimum(first, last)
    full_first = jnp.clip(-(-inner_low // keys), first, last)
    full_last = jnp.clip(inner_high // keys, full_first, last)
    return jnp.stack([first, last, full_first, full_last], axis=2)


def query_tiles(start_BT: jax.Array, end_BT: jax.Array, rows: int, keys: int, count: int) -> jax.Array:
    """The reverse of `key_tiles`: the range of query tiles that visit each of `count` key tiles.

    Returns:
      int32 [B, count, 4]: first and end of the visiting query tiles, first and end of the unmasked ones. The first
      range may contain query tiles that see nothing of the key tile; all their pairs are masked.
    """
    start, end = (x.reshape(x.shape[0], 1, -1, rows) for x in (start_BT, end_BT))
    key = jnp.arange(count, dtype=jnp.int32)[:, None] * keys
    sees = start < end
    low = jnp.where(sees, start, 2**30).min(axis=3)
    high = jnp.where(sees, end, 0).max(axis=3)
    meets = (low < key + keys) & (high > key)
    whole = (start.max(axis=3) <= key) & (end.min(axis=3) >= key + keys)
    tiles = start.shape[2]

    def first(x: jax.Array) -> jax.Array:
        return jnp.where(x.any(axis=2), jnp.argmax(x, axis=2), tiles).astype(jnp.int32)

    begin = jnp.where(meets.any(axis=2), first(meets), 0)
    finish = jnp.where(meets.any(axis=2), tiles - first(meets[:, :, ::-1]), 0)
    full_begin = jnp.clip(first(whole), begin, finish)
    # Only the first run of unmasked tiles counts: it ends at the first masked one.
    broken = ~whole & (jnp.arange(tiles) >= full_begin[:, :, None])
    full_finish = jnp.clip(first(broken), full_begin, finish)
    return jnp.stack([begin, finish, full_begin, full_finish], axis=2)


def visit_order(query_tiles: jax.Array, tiles: int) -> jax.Array:
    """For each pair of tiles, the number of earlier key tiles that are visited by the same query tile.

    Args:
      query_tiles: from the function of that name.
      tiles: number of query tiles.

    Returns:
      int32 [B, key tiles, query tiles].
    """
    i = jnp.arange(tiles, dtype=jnp.int32)
    visited = ((query_tiles[..., :1] <= i) & (i < query_tiles[..., 1:2])).astype(jnp.int32)
    return jnp.cumsum(visited, axis=1) - visited
