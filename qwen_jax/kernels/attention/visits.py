"""Which tiles of keys a tile of queries must visit under interval masks, and the reverse."""

import jax
import jax.numpy as jnp


def visits(start_BT: jax.Array, end_BT: jax.Array, rows: int, keys: int) -> jax.Array:
    """The tiles of keys that a tile of queries visits, and those among them where no pair is masked.

    Args:
      start_BT, end_BT: intervals.
      rows, keys: length of a tile of either.

    Returns:
      int32 [B, tiles, 4]: first and end of the visited, first and end of the unmasked.
    """
    start, end = (x.reshape(x.shape[0], -1, rows) for x in (start_BT, end_BT))
    sees = start < end
    first = jnp.where(sees, start, 2**30).min(axis=2) // keys
    last = -(-jnp.where(sees, end, 0).max(axis=2) // keys)
    first = jnp.minimum(first, last)
    full_first = jnp.clip(-(-start.max(axis=2) // keys), first, last)
    full_last = jnp.clip(end.min(axis=2) // keys, full_first, last)
    return jnp.stack([first, last, full_first, full_last], axis=2)


def visitors(start_BT: jax.Array, end_BT: jax.Array, rows: int, keys: int, count: int) -> jax.Array:
    """The reverse: the tiles of queries that visit each of `count` tiles of keys, as `visits` gives it.

    Tiles between the first and the last that don't see it are counted in; their pairs are all masked.
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
    # The first run of whole tiles: where they are interrupted it ends.
    broken = ~whole & (jnp.arange(tiles) >= full_begin[:, :, None])
    full_finish = jnp.clip(first(broken), full_begin, finish)
    return jnp.stack([begin, finish, full_begin, full_finish], axis=2)


def ranks(visitors: jax.Array, tiles: int) -> jax.Array:
    """How many tiles of keys before it visit the same tile of queries: int32 [B, tiles of keys, tiles of queries].

    Args:
      visitors: as the function of that name gives them.
      tiles: of queries.
    """
    i = jnp.arange(tiles, dtype=jnp.int32)
    visited = ((visitors[..., :1] <= i) & (i < visitors[..., 1:2])).astype(jnp.int32)
    return jnp.cumsum(visited, axis=1) - visited
