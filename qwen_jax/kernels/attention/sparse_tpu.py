"""Attention over lists of keys on TPUs: listed pieces of a cache, and gathered columns. Forward only.

A step with few keys costs as much as one with many, because a product and a softmax take a fixed time from end to end.
So a program copies 16 listed pieces of 128 keys from HBM into one tile, a few tiles ahead of the one in work. The tile
has parts as large as the tiles of `flash_tpu`, and what is done with a part is what `flash_tpu` does with a tile. So
lists of all pieces give its results, bit for bit where the compiler fuses the same operations.

XLA prepares what depends on data: a row of scalars for each query tile has the range of list tiles in which a query
sees something, and the start of each piece with a mark on tiles in which every query sees every key. Those run code
without masks. Columns are listed in the same way, piece by piece, but count at places of their own, which are in VMEM.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_tpu_bodies import KeysAcross, KeysDown, QueryTile
from qwen_jax.kernels.attention.flash_tpu_forward import seen
from qwen_jax.kernels.attention.lists import NOWHERE, KeyLists
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.softmax import LOG2E, LOWEST
from qwen_jax.kernels.tpu.device import LANES, Core
from qwen_jax.kernels.tpu.device import core as this_core
from qwen_jax.kernels.types import Ref

PIECE = LANES
"""Keys of a piece."""
_WHOLE, _NONE = 1, 2
"""Marks of an entry of a list, whose start is a multiple of 128: no pair of its tile is masked; it is no piece."""
_BUFFERS = 4
"""Tiles that are in VMEM: one in work, and the next ones, which are being copied. A power of two."""
_CAPACITY = 16384
"""The maximal length of a list. Two rows of scalars, of 4 bytes each, are in scalar memory."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of the kernel.

    Attributes:
      rows: queries of a program.
      per: pieces of a tile of keys.
      parts: into which the pieces of a tile are divided; the running softmax takes one part after the other.
      lanes: queries of one matrix product.
      transposed: whether keys are the rows of the logits; see `flash_tpu_bodies`.
    """

    rows: int
    per: int
    parts: int
    lanes: int
    transposed: bool

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return self.per * PIECE

    @property
    def step(self) -> int:
        """Pieces of a part. A program begins at a multiple, so the parts do not depend on what its rows see."""
        return self.per // self.parts


def tiling(head_dim: int, dtype: jax.typing.DTypeLike, rows: int | None = None, core: Core | None = None) -> Tiling:
    """The sizes that the kernel uses; experiments/kernels/tpu_attention.md has the estimates behind them.

    Args:
      head_dim: of queries and keys.
      dtype: of queries and keys.
      rows: queries of a tile, those of the lists. By default those that lists should have.
      core: by default the one that is compiled for.
    """
    rows, width = rows or 256, (core or this_core()).mxu_width
    transposed = head_dim < width
    # A part has as many keys as a tile of `flash_tpu`.
    step = 4 if jnp.dtype(dtype).itemsize == 2 else 2
    return Tiling(rows, 4 * step, 4, min(width, rows) if transposed else LANES, transposed)


def supports(
    dtype: jax.typing.DTypeLike,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rows: int = 128,
    size: int = PIECE,
    capacity: int = 1,
) -> bool:
    """Whether the kernels support these arguments.

    Args:
      dtype: of queries and keys.
      num_heads, num_kv_heads, head_dim: of queries and keys, on one device.
      rows: queries of a tile.
      size: keys of a piece.
      capacity: length of the lists.
    """
    return (
        jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
        and head_dim in (64, 128)
        and num_heads % num_kv_heads == 0
        and rows in (128, 256, 512)
        and size == PIECE
        and capacity <= _CAPACITY
    )


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    lists: KeyLists,
    scale: float,
    *,
    tiles: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention where query row i sees the keys start[i] <= j < end[i] in the listed pieces. Runs on local arrays.

    The parts at both ends of a list in which no row sees a key are not visited. So the same lists under disjoint masks
    cost little more than one call.

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_BKSd, v_BKSd: the cache. All slots must be finite. A cache whose length is no multiple of 128 is copied.
      start_BT, end_BT: int32 intervals over the slots; rows that see nothing have start >= end.
      lists: pieces of 128 keys at multiples of 128; the order is that of the sums.
      scale: multiplies the logits.
      tiles: sizes; by default those of `tiling`.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing, and the log-sum-exp of the logits, float32
      [B, H, T], minus infinity there.

    Raises:
      InputError: arguments that `supports` rejects.
    """
    S = k_BKSd.shape[2]
    _check(q_BTHd, k_BKSd, lists.rows, lists.size, lists.starts_BHNL.shape[3])
    tiles = tiles or tiling(q_BTHd.shape[3], q_BTHd.dtype, lists.rows)
    start, end = _whole_rows(start_BT, end_BT, S, tiles.rows)
    seen_by = _bounds(start, end, tiles.rows)
    # A place of a list without a piece gets a piece that no row sees.
    counted = jnp.arange(lists.starts_BHNL.shape[3], dtype=jnp.int32) < lists.counts_BHN[..., None]
    valid = counted & (lists.starts_BHNL >= 0) & (lists.starts_BHNL < S)
    starts = _whole_parts(jnp.where(valid, lists.starts_BHNL, NOWHERE), tiles)
    some = (starts + PIECE > seen_by.low) & (starts < seen_by.high)
    every = (starts >= seen_by.inner_low) & (starts + PIECE <= seen_by.inner_high)
    k, v = (pad_to_multiple(x, 2, PIECE) for x in (k_BKSd, v_BKSd))
    return _run(q_BTHd, k, v, start, end, _visits(starts, some, every, tiles), None, scale * LOG2E, tiles)


def columns(
    q_BTHd: jax.Array,
    k_BJCd: jax.Array,
    v_BJCd: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    places_BHNC: jax.Array,
    scale: float,
    bias: float,
    rows: int,
    *,
    tiles: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over gathered keys, where query row i sees column c if start[i] <= place of c < end[i].

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_BJCd, v_BJCd: gathered keys and values, finite; H is a multiple of J.
      start_BT, end_BT: int32 intervals over places; rows that see nothing have start >= end.
      places_BHNC: int32, the place of each column for each tile of queries; 2**30 switches it off.
      scale: multiplies the logits.
      bias: is added to every logit, in natural units.
      rows: queries of a tile.
      tiles: sizes; by default those of `tiling`.

    Returns:
      As `attention`.

    Raises:
      InputError: arguments that `supports` rejects.
    """
    C = k_BJCd.shape[2]
    _check(q_BTHd, k_BJCd, rows, PIECE, -(-C // PIECE))
    tiles = tiles or tiling(q_BTHd.shape[3], q_BTHd.dtype, rows)
    start, end = _whole_rows(start_BT, end_BT, NOWHERE, rows)
    # Pieces of columns: [B, H, N, pieces, 128].
    places = jnp.pad(places_BHNC, [(0, 0)] * 3 + [(0, -C % PIECE)], constant_values=NOWHERE)
    places = _whole_parts(places.reshape(*places.shape[:3], -1, PIECE), tiles)
    low, high, inner_low, inner_high = (x[..., None] for x in _bounds(start, end, rows))
    some = ((places >= low) & (places < high)).any(axis=4)
    every = ((places >= inner_low) & (places < inner_high)).all(axis=4)
    here = jnp.arange(some.shape[3], dtype=jnp.int32) * PIECE
    starts = jnp.broadcast_to(jnp.where(here < C, here, NOWHERE), some.shape)
    k, v = (pad_to_multiple(x, 2, PIECE) for x in (k_BJCd, v_BJCd))
    out, lse = _run(q_BTHd, k, v, start, end, _visits(starts, some, every, tiles), places, scale * LOG2E, tiles)
    # One number that is added to all logits cancels in the softmax.
    return out, lse + bias


def _check(q: jax.Array, k: jax.Array, rows: int, size: int, capacity: int) -> None:
    if not supports(q.dtype, q.shape[2], k.shape[1], q.shape[3], rows, size, capacity):
        raise InputError(
            "Sparse attention on TPUs needs bfloat16 or float32, head_dim 64 or 128, tiles of 128, 256 or 512 queries, "
            f"and lists of at most {_CAPACITY} pieces of {PIECE} keys; got {q.dtype} {q.shape} and {k.shape}, tiles of "
            f"{rows} queries and {capacity} pieces of {size} keys. Use implementation='reference'."
        )


def _whole_rows(start: jax.Array, end: jax.Array, slots: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """Intervals within the slots, padded to whole query tiles; padding rows see nothing."""
    return pad_to_multiple(jnp.maximum(start, 0), 1, rows), pad_to_multiple(jnp.minimum(end, slots), 1, rows)


def _whole_parts(x: jax.Array, tiles: Tiling) -> jax.Array:
    """Pads the pieces, axis 3, to whole parts, and so that a tile may begin at any part. No row sees the padding."""
    more = -x.shape[3] % tiles.step + tiles.per - tiles.step
    return jnp.pad(x, [(0, more if axis == 3 else 0) for axis in range(x.ndim)], constant_values=NOWHERE)


class _Bounds(NamedTuple):
    """For each query tile, [B, 1, N, 1]: some row sees keys of [low, high), and every row those of the inner range."""

    low: jax.Array
    high: jax.Array
    inner_low: jax.Array
    inner_high: jax.Array


def _bounds(start_BT: jax.Array, end_BT: jax.Array, rows: int) -> _Bounds:
    start, end = (x.reshape(x.shape[0], 1, -1, rows) for x in (start_BT, end_BT))
    sees = start < end
    low, high = jnp.where(sees, start, NOWHERE), jnp.where(sees, end, 0)
    ends = low.min(axis=3), high.max(axis=3), start.max(axis=3), end.min(axis=3)
    return _Bounds(*(x[..., None] for x in ends))


def _visits(starts_BHNL: jax.Array, some_BHNL: jax.Array, every_BHNL: jax.Array, tiles: Tiling) -> jax.Array:
    """The scalars of each query tile, int32 [B, H, N, 1, 128 + L or more].

    The first is the place of the first piece that is visited, the second the number of list tiles. From the 128th on
    there are the starts of the pieces, plus `_WHOLE` where a tile that begins there has no masked pair, and `_NONE`
    where there is no piece.

    Args:
      starts_BHNL: first key of each piece, or `NOWHERE`; in whole parts.
      some_BHNL, every_BHNL: whether some row sees a key of a piece, and whether every row sees all of them.
      tiles: sizes.
    """
    parts = *starts_BHNL.shape[:3], -1, tiles.step
    visited = some_BHNL.reshape(parts).any(axis=4)
    first = jnp.argmax(visited, axis=3)
    last = jnp.where(visited.any(axis=3), visited.shape[3] - jnp.argmax(visited[..., ::-1], axis=3), first)
    head = jnp.stack([LANES + first * tiles.step, -((first - last) // tiles.parts)], axis=3).astype(jnp.int32)
    # Whether all parts of a tile are whole, for a tile that begins at each part.
    whole = every_BHNL.reshape(parts).all(axis=4, keepdims=True)
    ahead = jnp.pad(whole, [(0, 0)] * 3 + [(0, tiles.parts - 1), (0, 0)])
    whole = functools.reduce(jnp.logical_and, [ahead[:, :, :, n : n + whole.shape[3]] for n in range(tiles.parts)])
    entries = jnp.where(starts_BHNL == NOWHERE, _NONE, starts_BHNL).reshape(parts) + whole * _WHOLE
    entries = entries.reshape(starts_BHNL.shape)
    ends = [(0, 0)] * 3
    head, entries = jnp.pad(head, [*ends, (0, LANES - 2)]), jnp.pad(entries, [*ends, (0, -entries.shape[3] % LANES)])
    return jnp.concatenate([head, entries], axis=3)[:, :, :, None]


@functools.partial(jax.jit, static_argnames=("factor", "tiles"))
def _run(
    q_BTHd: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, visits: jax.Array,
    places: jax.Array | None, factor: float, tiles: Tiling,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output [B, T, H, d] and log-sum-exp [B, H, T].

    Args:
      q_BTHd: queries.
      k, v: [B, K, S, d]; S is a multiple of 128.
      start, end: mask intervals, padded to whole query tiles.
      visits: from `_visits`.
      places: of columns, [B, H, N, pieces, 128].
      factor: scale of the logits in base 2.
      tiles: sizes.
    """
    (B, T, H, d), (heads, slots) = q_BTHd.shape, k.shape[1:3]
    q, rows, keys = pad_to_multiple(q_BTHd.swapaxes(1, 2), 2, tiles.rows), tiles.rows, tiles.keys
    body: type[KeysDown | KeysAcross] = KeysDown if tiles.transposed else KeysAcross
    if tiles.transposed:
        scratch = KeysDown.scratch(rows, keys, tiles.lanes, d, v.dtype, tiles.parts)
    else:
        scratch = KeysAcross.scratch(rows, d)
    # Operands and their blocks.
    queries = pl.BlockSpec((None, None, rows, d), lambda b, h, i: (b, h, i, 0))
    scalars = pl.BlockSpec(
        (None, None, None, 1, visits.shape[4]), lambda b, h, i: (b, h, i, 0, 0), memory_space=pltpu.SMEM
    )
    operands = [visits, q, *(x.reshape(-1, d) for x in (k, v)), *body.ends(start, end)]
    specs = [scalars, queries, *[pl.BlockSpec(memory_space=pl.ANY)] * 2, *[body.ends_spec(rows)] * 2]
    if places is not None:
        operands.append(places)
        specs.append(pl.BlockSpec((None, None, None, *places.shape[3:]), lambda b, h, i: (b, h, i, 0, 0)))
    memory = [
        *[pltpu.VMEM((_BUFFERS, keys, d), v.dtype)] * 2,
        pltpu.SemaphoreType.DMA((2, _BUFFERS)),
        *scratch.values(),
    ]
    inputs = len(operands)

    def kernel(*refs: Ref) -> None:
        visits, q, k, v, start, end, *more = refs[:inputs]
        out, lse, k_tiles, v_tiles, arrived, *rest = refs[inputs:]
        tile, state = QueryTile(q, start, end, out, lse), dict(zip(scratch, rest, strict=True))
        program = _Program(visits, k, v, k_tiles, v_tiles, arrived, more[0] if more else None)
        base = (pl.program_id(0) * heads + lax.div(pl.program_id(1), H // heads)) * slots
        if tiles.transposed:
            _walk(program, KeysDown(tile, state, factor), base, tiles.per)
        else:
            _walk(program, KeysAcross(tile, state, factor, tiles.lanes, tiles.parts), base, tiles.per)

    out, lse = pl.pallas_call(
        kernel,
        grid=(B, H, q.shape[2] // rows),
        in_specs=specs,
        out_specs=[queries, pl.BlockSpec((None, None, 1, rows), lambda b, h, i: (b, h, 0, i))],
        scratch_shapes=memory,
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, 1, q.shape[2]), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel"),
            disable_bounds_checks=True,
            vmem_limit_bytes=list_bytes(tiles, d, q.dtype.itemsize, 0 if places is None else places.shape[3]),
        ),
        name="list_attention" if places is None else "column_attention",
    )(*operands)
    return out[:, :, :T].swapaxes(1, 2), lse[:, :, 0, :T]


def list_bytes(tiles: Tiling, d: int, itemsize: int, places: int = 0) -> int:
    """VMEM of the kernel, in bytes; see `flash_tpu_tiles.forward_bytes`.

    Args:
      tiles: sizes.
      d: head_dim.
      itemsize: bytes of a number of queries and keys.
      places: pieces of columns, whose places are copied.
    """
    wide, rows, keys = max(d, LANES), tiles.rows, tiles.keys
    copied = 2 * (2 * itemsize * wide * rows + 3 * 4 * 8 * rows + 4 * LANES * places)
    buffers = 2 * (_BUFFERS) * itemsize * wide * keys
    if tiles.transposed:
        scratch = 4 * (d + keys) * rows + 2 * itemsize * keys * (tiles.lanes + d)
    else:
        scratch = 4 * rows * (wide + 6 * LANES)
    # The last term is for spilled registers.
    return copied + buffers + scratch + (itemsize << 20)


class _Program(NamedTuple):
    """References of a program.

    Attributes:
      visits: scalars, from `_visits`.
      k, v: keys and values of all rows and heads, [B K S, d], in HBM.
      k_tiles, v_tiles: tiles in work and being copied.
      arrived: semaphores of the copies, for keys and values and each of the tiles.
      places: of columns.
    """

    visits: Ref
    k: Ref
    v: Ref
    k_tiles: Ref
    v_tiles: Ref
    arrived: Ref
    places: Ref | None

    def copy(self, slot: jax.Array | int, place: jax.Array, base: jax.Array) -> None:
        """Starts the copies of a list tile.

        Args:
          slot: index of the tile in VMEM.
          place: of the first piece of the tile in `visits`.
          base: the first row of the head in all keys.
        """
        for at in range(0, self.k_tiles.shape[1], PIECE):
            # Where there is no piece, the first keys are copied; the mask hides them.
            first = base + (self.visits[0, place + at // PIECE] & -PIECE)
            source, target = pl.ds(pl.multiple_of(first, PIECE), PIECE), pl.ds(at, PIECE)
            for side, (hbm, tiles) in enumerate(((self.k, self.k_tiles), (self.v, self.v_tiles))):
                pltpu.make_async_copy(hbm.at[source], tiles.at[slot, target], self.arrived.at[side, slot]).start()

    def wait(self, slot: jax.Array) -> None:
        """Waits for the copies of a list tile: for as many bytes as a tile has."""
        for side, tiles in enumerate((self.k_tiles, self.v_tiles)):
            pltpu.make_async_copy(tiles.at[slot], tiles.at[slot], self.arrived.at[side, slot]).wait()

    def hide(self, s: jax.Array, low: jax.Array, high: jax.Array, at: int, axis: int, place: jax.Array) -> jax.Array:
        """The mask, piece by piece; see `flash_tpu_bodies.Hide`."""
        strips = []
        for n in range(0, s.shape[axis], PIECE):
            strip = lax.slice_in_dim(s, n, n + PIECE, axis=axis)
            piece = place + (at + n) // PIECE
            if self.places is None:
                entry = self.visits[0, piece]
                first = jnp.where(entry & _NONE == 0, entry & -PIECE, NOWHERE)
                visible = seen(low, high, first, strip.shape, axis)
            else:
                places = _places(self.places, piece - LANES, strip.shape, axis)
                visible = (places >= low) & (places < high)
            strips.append(jnp.where(visible, strip, LOWEST))
        return jnp.concatenate(strips, axis=axis)


def _walk(program: _Program, body: KeysDown | KeysAcross, base: jax.Array, per: int) -> None:
    """All visited tiles of the list of one query tile.

    Args:
      program: references.
      body: what is done with a tile.
      base: the first row of the head in all keys.
      per: pieces of a tile.
    """
    origin, count = program.visits[0, 0], program.visits[0, 1]
    body.begin()
    for n in range(_BUFFERS - 1):
        pl.when(n < count)(functools.partial(program.copy, n, origin + n * per, base))

    def step(i: jax.Array, _: None) -> None:
        ahead, place, slot = i + _BUFFERS - 1, origin + i * per, i & (_BUFFERS - 1)

        # The copy ahead takes the place of the last tile.
        @pl.when(ahead < count)
        def copy() -> None:
            program.copy(ahead & (_BUFFERS - 1), origin + ahead * per, base)

        program.wait(slot)
        k, v = program.k_tiles.at[slot], program.v_tiles.at[slot]
        full = program.visits[0, place] & _WHOLE != 0
        pl.when(full)(lambda: body.step(i, k, v, None))
        pl.when(~full)(lambda: body.step(i, k, v, functools.partial(program.hide, place=place)))

    lax.fori_loop(0, count, step, None)
    body.finish(count)


def _places(places_ref: Ref, piece: jax.Array, shape: Sequence[int], axis: int) -> jax.Array:
    """The places of a piece of columns as an array of the shape of its logits, with the columns along `axis`."""
    row = places_ref[pl.ds(piece, 1), :]
    if axis == 1:
        return jnp.broadcast_to(row, shape)
    column = jnp.broadcast_to(row, (PIECE, PIECE)).T
    return jnp.concatenate([column] * (shape[1] // PIECE), axis=1)
