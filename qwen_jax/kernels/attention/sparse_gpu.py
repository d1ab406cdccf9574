"""Attention over listed pieces of a cache, and over gathered columns, on Hopper GPUs. Forward only.

The body is that of the dense forward pass (`flash_gpu_forward`), with another walk over the keys. A key tile is one
listed piece of 128 keys or two of 64. XLA computes beforehand which tiles of each list are visited and which of them
need no mask, and sorts the query tiles by their work, because lists differ in length. The order of every sum is that of
the list: results are bit-identical from run to run, and a list of all keys gives the bits of dense attention.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.flash_gpu_forward import KEYS, WARPGROUPS, Operands, launch_forward
from qwen_jax.kernels.attention.flash_gpu_tiles import (
    Index,
    KeyRing,
    KeyTiles,
    KeyWalk,
    TilePlace,
    Visit,
    deal,
    feed_pieces,
    mask_logits,
)
from qwen_jax.kernels.attention.list_ranges import TileRanges, clean_starts, column_tiles, listed_tiles, work_table
from qwen_jax.kernels.attention.lists import NOWHERE, KeyLists
from qwen_jax.kernels.gpu.hopper import load
from qwen_jax.kernels.gpu.tiles import PER_COLUMN, ROWS, WGMMA, across
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.types import Ref

_STEP = 8
"""Pieces start at multiples of this, which the copy engine needs for tiled shared memory."""


@functools.partial(jax.jit, static_argnames="scale")
def attention(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, start_BT: jax.Array, end_BT: jax.Array, lists: KeyLists,
    scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attention over listed pieces of a cache; see `kernels.sparse_attention`.

    Args:
      q_BTHd: queries, bfloat16 or float16, head_dim 64 or 128.
      k_BKSd, v_BKSd: the cache. It is copied if S is not a multiple of 8.
      start_BT, end_BT: int32 intervals within the S keys.
      lists: with 128 rows, and pieces of 64 or 128 keys that start at multiples of 8.
      scale: multiplies the logits.

    Returns:
      Output and log-sum-exp.
    """
    k, v = (pad_to_multiple(x, 2, _STEP) for x in (k_BKSd, v_BKSd))
    start, end = (pad_to_multiple(x, -1, WARPGROUPS * ROWS) for x in (start_BT, end_BT))
    ranges = listed_tiles(lists, start, end, ROWS, KEYS)
    # What a list lacks of a whole key tile lies behind the last key: nothing is read there, and nothing counts.
    starts = clean_starts(lists, KEYS // lists.size, k.shape[2]) // _STEP
    return _run("sparse_forward", q_BTHd, k, v, start, end, ranges, starts, size=lists.size, scale=scale)


@functools.partial(jax.jit, static_argnames=("scale", "bias", "rows"))
def columns(
    q_BTHd: jax.Array, k_BJCd: jax.Array, v_BJCd: jax.Array, start_BT: jax.Array, end_BT: jax.Array,
    places_BHNC: jax.Array, scale: float, bias: float, rows: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attention over gathered columns; see `kernels.column_attention`.

    Args:
      q_BTHd: queries, bfloat16 or float16, head_dim 64 or 128.
      k_BJCd, v_BJCd: columns.
      start_BT, end_BT: int32 intervals within 0 to 2**30.
      places_BHNC: int32.
      scale: multiplies the logits.
      bias: is added to the logits.
      rows: queries of a tile: 128.

    Returns:
      Output and log-sum-exp.
    """
    assert rows == WARPGROUPS * ROWS
    k, v = (pad_to_multiple(x, 2, _STEP) for x in (k_BJCd, v_BJCd))
    start, end = (pad_to_multiple(x, -1, rows) for x in (start_BT, end_BT))
    more = -places_BHNC.shape[3] % KEYS
    places = jnp.pad(places_BHNC, ((0, 0), (0, 0), (0, 0), (0, more)), constant_values=NOWHERE)
    ranges = column_tiles(places, start, end, rows, KEYS)
    out, lse = _run("column_forward", q_BTHd, k, v, start, end, ranges, places, size=None, scale=scale)
    # What is added to all logits of a row is added to their log-sum-exp and leaves the softmax as it is.
    return out, lse + bias if bias else lse


def _run(
    name: str, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, ranges: TileRanges,
    where_BHNL: jax.Array, *, size: int | None, scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Launches the kernel.

    Args:
      name: of the kernel.
      q, k, v: padded for copies.
      start, end: padded to whole query tiles.
      ranges: the key tiles that each query tile visits.
      where_BHNL: starts of pieces divided by 8, or places of columns.
      size: keys of a piece; none for columns.
      scale: multiplies the logits.
    """
    T, K = q.shape[1], k.shape[1]
    # Query tiles have one number in memory. So have the key/value heads of all rows.
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    where = where_BHNL.reshape(-1, where_BHNL.shape[3])
    out, lse = launch_forward(
        name,
        Operands(pad_to_multiple(q, 1, _STEP), k, v, start, end),
        (work_table(ranges, K), where),
        functools.partial(_walk, size=size),
        scale=scale,
        pieces=KEYS // size if size else 1,
    )
    return out[:, :T], lse[:, :, :T]


def _walk(
    inputs: Operands[Ref], more: tuple[Ref, ...], ring: KeyRing, tiles: tuple[int, int, int], warpgroup: jax.Array, *,
    size: int | None,
) -> KeyWalk:  # fmt: skip
    """The walk over listed pieces of the keys, or over columns.

    Args:
      inputs: references to what every kernel reads.
      more: the table of the query tiles, and the starts of pieces or the places of columns.
      ring: where keys go.
      tiles: tiles of queries, [B, H, N].
      warpgroup: index of this warpgroup.
      size: keys of a piece; none for columns.
    """
    table_ref, where_ref = more
    B, H, N = tiles
    total = B * H * N
    rounds, dealt = deal(total)
    per = KEYS // size if size else 1

    def line(turn: jax.Array) -> jax.Array:
        return jnp.minimum(dealt(turn), total - 1)

    def place(turn: jax.Array, number: jax.Array | None) -> TilePlace:
        if number is None:
            number = table_ref[line(turn), 0]
        row_and_head = lax.div(number, jnp.int32(N))
        row = lax.div(row_and_head, jnp.int32(H))
        return TilePlace(row, row_and_head - row * H, number - row_and_head * N)

    def visit(turn: jax.Array) -> Visit:
        # One line holds all of it, so that no load waits for another.
        at = line(turn)
        number, first, last = (table_ref[at, n] for n in (0, 2, 3))
        full_first, full_last = (table_ref[at, 4 + 2 * warpgroup + n] for n in range(2))
        return Visit(KeyTiles(first, last, full_first, full_last), number)

    def starts(number: jax.Array, i: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(where_ref[number, i * per + n] * _STEP for n in range(per))

    def at_pieces(visit: Visit, i: jax.Array) -> tuple[jax.Array, ...]:
        assert visit.number is not None
        return starts(visit.number, i)

    def mask_pieces(s: jax.Array, at: tuple[jax.Array, ...], low: jax.Array, high: jax.Array) -> jax.Array:
        if len(at) == 1:
            return mask_logits(s, low - at[0], high - at[0], axis=1)
        column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=WGMMA)
        return mask_logits(s, low, high, 1, column + jnp.where(column < KEYS // 2, at[0], at[1] - KEYS // 2))

    def at_columns(visit: Visit, i: jax.Array) -> jax.Array:
        assert visit.number is not None
        return load(where_ref.at[visit.number, pl.ds(i * KEYS, KEYS)], PER_COLUMN)

    def mask_columns(s: jax.Array, places: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return mask_logits(s, low, high, 1, across(places, s.shape, 1))

    def feed(turn: jax.Array, before: jax.Array) -> jax.Array:
        at = line(turn)
        number, head, first, last = (table_ref[at, n] for n in range(4))

        def of_list(i: jax.Array, here: tuple[jax.Array, ...]) -> tuple[list[Index], tuple[jax.Array, ...]]:
            # The next starts are read while this tile waits for its slot.
            after = starts(number, first + i + 1)
            return [(head, pl.ds(pl.multiple_of(x, _STEP), KEYS // per)) for x in here], after

        def of_columns(i: jax.Array, _: None) -> tuple[list[Index], None]:
            return [(head, pl.ds((first + i) * KEYS, KEYS))], None

        if size:
            feed_pieces(inputs.k, inputs.v, of_list, starts(number, first), last - first, before, ring)
        else:
            feed_pieces(inputs.k, inputs.v, of_columns, None, last - first, before, ring)
        return before + last - first

    return KeyWalk(
        turns=jnp.where(dealt(jnp.int32(rounds - 1)) < total, rounds, rounds - 1),
        place=place,
        visit=visit,
        at=at_pieces if size else at_columns,
        mask=mask_pieces if size else mask_columns,
        feed=feed,
        complete=False,
    )
