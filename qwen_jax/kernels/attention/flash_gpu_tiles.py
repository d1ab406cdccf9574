"""What the attention kernels for Hopper GPUs share: masks, the schedule of query tiles, and the copies of keys."""

import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.tiles import WGMMA, across, rem
from qwen_jax.kernels.softmax import LOWEST
from qwen_jax.kernels.types import Ref

T = TypeVar("T")
Carry = TypeVar("Carry")
Index = tuple[Any, ...]


class BackwardInputs(NamedTuple, Generic[T]):
    """The arguments of a backward kernel, as arrays or as references.

    Attributes:
      q, dout: queries and the gradient with respect to the output, [B, T, H, d].
      k, v: keys and values, [B, S, K, d].
      start, end: mask intervals, [B, padded T].
      log2, delta: from `gradient_terms`, [B, H, padded T].
    """

    q: T
    k: T
    v: T
    dout: T
    start: T
    end: T
    log2: T
    delta: T


class KeyTiles(NamedTuple):
    """The range of key tiles that a thread block visits, and the part of it that needs no mask.

    Attributes:
      first, last: first and end of the visited tiles.
      full_first, full_last: first and end of those in which no pair is masked.
    """

    first: jax.Array
    last: jax.Array
    full_first: jax.Array
    full_last: jax.Array


class Visit(NamedTuple):
    """What a thread block reads about one of its query tiles.

    Attributes:
      tiles: the key tiles to visit.
      number: of the query tile, where its place cannot be computed from the turn.
    """

    tiles: KeyTiles
    number: jax.Array | None = None


class TilePlace(NamedTuple):
    """Where a tile of queries is: row of the batch, query head, and index of the tile in the row."""

    row: jax.Array
    head: jax.Array
    tile: jax.Array


def over_key_tiles(tiles: KeyTiles, body: Callable[..., Carry], carry: Carry) -> Carry:
    """Runs `body(i, carry, masked)` over the visited tiles: masked ones, then unmasked ones, then masked ones."""
    first, last, full_first, full_last = tiles
    for begin, end, masked in ((first, full_first, True), (full_first, full_last, False), (full_last, last, True)):
        carry = lax.fori_loop(begin, end, functools.partial(body, masked=masked), carry)
    return carry


class KeyWalk(NamedTuple):
    """How a thread block walks over keys: what differs between kernels that share the body of the forward pass.

    Attributes:
      turns: how many query tiles the thread block has.
      place: (turn, number) to the place of the query tile; the number is that of the visit, or None before the first
        visit is read.
      visit: (turn) to the visit. Its first key tile is always masked, so it does not count as unmasked. Beyond the last
        turn it is any visit.
      at: (visit, i) to what `mask` needs to know about key tile i. It is called early, because it may read memory.
      mask: (logits, at, low, high) to logits, where those that a row does not see are the lowest one.
      feed: (turn, tiles copied before) copies the key tiles of a turn and returns the new number of copied tiles.
      complete: whether each row visits all keys of its interval.
    """

    turns: jax.Array
    place: Callable[[jax.Array, jax.Array | None], TilePlace]
    visit: Callable[[jax.Array], Visit]
    at: Callable[[Visit, jax.Array], Any]
    mask: Callable[[jax.Array, Any, jax.Array, jax.Array], jax.Array]
    feed: Callable[[jax.Array, jax.Array], jax.Array]
    complete: bool


def mask_logits(s: jax.Array, low: jax.Array, high: jax.Array, axis: int, places: jax.Array | None = None) -> jax.Array:
    """Replaces the logits outside low <= j < high by the lowest one.

    Args:
      s: [rows, columns].
      low, high: int32, one for each query.
      axis: along which the keys j are counted; the queries are the other one.
      places: int32, the j of each logit if they are not counted from 0.
    """
    j = plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=WGMMA) if places is None else places
    low, high = (across(x, s.shape, 1 - axis) for x in (low, high))
    return jnp.where((j >= low) & (j < high), s, LOWEST)


def schedule_tiles(B: int, H: int, tiles: int) -> tuple[jax.Array, Callable[[jax.Array], TilePlace]]:
    """Distributes all query tiles over the thread blocks, which stay resident until all tiles are done.

    Args:
      B, H: rows and query heads.
      tiles: query tiles of a row.

    Returns:
      How many turns this thread block has, and the place of its tile in each turn. Where no tile is left, the tile is
      negative.
    """
    rounds, dealt = deal(B * H * tiles)

    def place(turn: jax.Array) -> TilePlace:
        # The last tiles see most keys under a causal mask. They come first.
        n = dealt(turn)
        rest = rem(n, B * H)
        return TilePlace(lax.div(rest, jnp.int32(H)), rem(rest, H), tiles - 1 - lax.div(n, jnp.int32(B * H)))

    return jnp.where(place(jnp.int32(rounds - 1)).tile < 0, rounds - 1, rounds), place


def deal(total: int) -> tuple[int, Callable[[jax.Array], jax.Array]]:
    """Deals tiles out to the thread blocks, in the order of decreasing work.

    Args:
      total: number of tiles.

    Returns:
      The number of rounds, and the tile of this thread block in each turn: `total` or more where no tile is left.
    """
    block, blocks = lax.axis_index("block"), lax.axis_size("block")

    def dealt(turn: jax.Array) -> jax.Array:
        # The direction alternates, so that every block gets about the same amount of work.
        return turn * blocks + jnp.where(rem(turn, 2) == 0, block, blocks - 1 - block)

    return -(-total // blocks), dealt


def block_key_tiles(tiles_ref: Ref, row: jax.Array, tile: jax.Array, warpgroup: jax.Array, warpgroups: int) -> KeyTiles:
    """The key tiles that a thread block visits, and the part of them in which this warpgroup needs no mask.

    Args:
      tiles_ref: from `key_tiles`, for the query tiles of single warpgroups.
      row, tile: row of the batch and query tile of the thread block.
      warpgroup, warpgroups: index of this warpgroup and their number.
    """
    first, last, full_first, full_last = jnp.int32(2**30), jnp.int32(0), jnp.int32(0), jnp.int32(0)
    for w in range(warpgroups):
        own = [tiles_ref[row, warpgroups * tile + w, n] for n in range(4)]
        # An empty range must not widen the range of the block.
        first = jnp.where(own[0] < own[1], jnp.minimum(first, own[0]), first)
        last = jnp.maximum(last, own[1])
        full_first = jnp.where(warpgroup == w, own[2], full_first)
        full_last = jnp.where(warpgroup == w, own[3], full_last)
    first = jnp.minimum(first, last)
    full_first = jnp.clip(full_first, first, last)
    return KeyTiles(first, last, full_first, jnp.clip(full_last, full_first, last))


class KeyRing(NamedTuple):
    """The ring of key and value tiles in shared memory, and its barriers: tile arrived, and slot free again."""

    k_smem: Ref
    v_smem: Ref
    k_ready: Ref
    v_ready: Ref
    k_free: Ref
    v_free: Ref


def feed_keys(
    k_ref: Ref, v_ref: Ref, where: tuple[jax.Array, jax.Array], tiles: KeyTiles, before: jax.Array,
    ring: KeyRing, head_major: bool = False,
) -> None:  # fmt: skip
    """Copies key and value tiles into the ring as its slots become free.

    Args:
      k_ref, v_ref: keys and values in global memory.
      where: row of the batch and key/value head.
      tiles: the tiles to copy.
      before: tiles copied so far by this thread block.
      ring: where they go.
      head_major: the layout is [B, K, S, d].
    """
    keys = ring.k_smem.shape[1]
    row, head = where
    count = tiles.last - tiles.first

    def pieces(i: jax.Array, _: None) -> tuple[list[Index], None]:
        here = pl.ds((tiles.first + i) * keys, keys)
        return [(row, head, here) if head_major else (row, here, head)], None

    feed_pieces(k_ref, v_ref, pieces, None, count, before, ring)


def feed_pieces(
    k_ref: Ref, v_ref: Ref, pieces: Callable[[jax.Array, Carry], tuple[list[Index], Carry]], carry: Carry,
    count: jax.Array, before: jax.Array, ring: KeyRing,
) -> None:  # fmt: skip
    """Copies key and value tiles, each from one or more places, into the ring as its slots become free.

    Args:
      k_ref, v_ref: keys and values in global memory.
      pieces: (i, carry) to the indices of the equal pieces of tile i, and the carry for tile i + 1.
      carry: for the first tile.
      count: the number of tiles.
      before: tiles copied so far by this thread block.
      ring: where they go. Its barriers expect one arrival for each piece.
    """
    stages, keys, _ = ring.k_smem.shape

    def fetch(i: jax.Array, carry: Carry) -> Carry:
        slot = rem(before + i, stages)
        indices, carry = pieces(i, carry)
        size = keys // len(indices)
        for ref, smem, ready, free in (
            (k_ref, ring.k_smem, ring.k_ready, ring.k_free),
            (v_ref, ring.v_smem, ring.v_ready, ring.v_free),
        ):
            pl.when(before + i >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            for n, index in enumerate(indices):
                to = smem.at[slot] if size == keys else smem.at[slot, pl.ds(n * size, size)]
                plgpu.copy_gmem_to_smem(ref.at[index], to, ready.at[slot])
        return carry

    lax.fori_loop(0, count, fetch, carry)
