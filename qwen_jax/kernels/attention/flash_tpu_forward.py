"""The forward pass of `flash_tpu`."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.attention.flash_tpu_tiles import Tiling, cost, forward_bytes
from qwen_jax.kernels.softmax import LOW, LOWEST
from qwen_jax.kernels.tpu.device import LANES, PACKED_ROWS, SUBLANES
from qwen_jax.kernels.tpu.tiles import product
from qwen_jax.kernels.types import Ref

_LN2 = math.log(2)


class KeyTiles(NamedTuple):
    """The key tiles of a segment that a program visits, and the range of those in which no pair is masked."""

    first: jax.Array
    last: jax.Array
    full_first: jax.Array
    full_last: jax.Array


def segment_key_tiles(
    tiles_ref: Ref, row: jax.Array, tile: jax.Array, segment: jax.Array | int, count: int
) -> KeyTiles:
    """The key tiles of a segment that a query tile visits.

    Args:
      tiles_ref: from `key_tiles`, [B, query tiles, 4].
      row, tile: row of the batch and query tile.
      segment: index of the segment.
      count: tiles of a segment.
    """
    low = segment * count
    return KeyTiles(*(jnp.clip(tiles_ref[row, tile, n], low, low + count) for n in range(4)))


def seen(low: jax.Array, high: jax.Array, first: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """Which pairs of a tile are visible.

    Args:
      low, high: intervals of the queries.
      first: the first key of the tile.
      shape: of the tile.
      axis: along which the keys are; the queries are along the other one.
    """
    j = lax.broadcasted_iota(jnp.int32, shape, axis)
    return (j >= low - first) & (j < high - first)


def over_key_tiles(tiles: KeyTiles, step: Callable[[jax.Array, bool], None]) -> None:
    """Calls `step(i, masked)` for each visited tile."""
    first, last, full_first, full_last = tiles

    def one(i: jax.Array, _: None) -> None:
        full = (i >= full_first) & (i < full_last)
        pl.when(full)(lambda: step(i, False))
        pl.when(~full)(lambda: step(i, True))

    lax.fori_loop(first, last, one, None)


@functools.partial(jax.jit, static_argnames=("factor", "tiles"))
def run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, visited: jax.Array, *,
    factor: float, tiles: Tiling,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output [B, H, T, d] and log-sum-exp [B, H, T].

    Args:
      q: [B, H, T, d]; T is a multiple of `tiles.queries`.
      k, v: [B, K, S, d]; S is a multiple of `tiles.segment`.
      start, end: mask intervals.
      visited: from `key_tiles`.
      factor: scale of the logits in base 2.
      tiles: sizes.
    """
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    group, segment = H // K, tiles.segment

    def at_keys(b: jax.Array, h: jax.Array, i: jax.Array, s: jax.Array, tiles_ref: Ref) -> tuple[jax.Array | int, ...]:
        # A segment that is not visited is not fetched: its index is that of the nearest visited one.
        first, last = tiles_ref[b, i, 0] * tiles.keys, tiles_ref[b, i, 1] * tiles.keys
        s = jnp.clip(s, lax.div(first, segment), jnp.maximum(lax.div(last - 1, segment), 0))
        return b, lax.div(h, group), jnp.minimum(s, S // segment - 1), 0

    queries = pl.BlockSpec((None, None, tiles.queries, d), lambda b, h, i, s, _: (b, h, i, 0))
    keys = pl.BlockSpec((None, None, segment, d), at_keys)
    f32, n, lanes = jnp.float32, tiles.queries // tiles.lanes, tiles.lanes
    program: Callable[..., None]
    if d < lanes:
        program, ends = _keys_down, [start[:, None], end[:, None]]
        ends_spec = pl.BlockSpec((None, 1, tiles.queries), lambda b, h, i, s, _: (b, 0, i))
        scratch = dict(
            acc=pltpu.VMEM((d, tiles.queries), f32),
            top=pltpu.VMEM((SUBLANES, tiles.queries), f32),
            total=pltpu.VMEM((SUBLANES, tiles.queries), f32),
            logits=pltpu.VMEM((n, tiles.keys, lanes), f32),
            tops=pltpu.VMEM((n, SUBLANES, lanes), f32),
            probs=pltpu.VMEM((2, tiles.keys, lanes), v.dtype),
            shrink=pltpu.VMEM((2, SUBLANES, lanes), f32),
            values=pltpu.VMEM((2, d, tiles.keys), v.dtype),
        )
    else:
        # The intervals are in every lane, where they are compared. One number in a row would take as much space.
        program, ends = _keys_across, [jnp.broadcast_to(x[:, :, None], (*x.shape, LANES)) for x in (start, end)]
        ends_spec = pl.BlockSpec((None, tiles.queries, LANES), lambda b, h, i, s, _: (b, i, 0))
        scratch = dict(
            acc=pltpu.VMEM((tiles.queries, d), f32),
            top=pltpu.VMEM((tiles.queries, LANES), f32),
            total=pltpu.VMEM((tiles.queries, LANES), f32),
        )

    def kernel(*refs: Ref) -> None:
        program(_Refs(*refs[:8]), dict(zip(scratch, refs[8:], strict=True)), factor=factor, tiles=tiles)

    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H, T // tiles.queries, S // segment),
            in_specs=[queries, keys, keys, ends_spec, ends_spec],
            out_specs=[queries, pl.BlockSpec((None, None, 1, tiles.queries), lambda b, h, i, s, _: (b, h, 0, i))],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, 1, T), f32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=forward_bytes(tiles, d, q.dtype.itemsize),
        ),
        cost_estimate=cost(2, q, k),
        name="flash_forward",
    )(visited, q, k, v, *ends)
    return out, lse[:, :, 0]


class _Refs(NamedTuple):
    """References to the operands and results of a program."""

    tiles: Ref
    q: Ref
    k: Ref
    v: Ref
    start: Ref
    end: Ref
    out: Ref
    lse: Ref


class _KeysDownMemory(NamedTuple):
    """Scratch in VMEM: the running softmax, and what goes from stage to stage for each column of queries.

    Attributes:
      acc, top, total: accumulator, maximum and sum of all columns.
      logits, tops: logits of the last tile and their maxima, one for each column.
      probs, shrink: probabilities, and the factor that rescales the accumulator; two buffers.
      values: transposed values of a tile; two buffers.
    """

    acc: Ref
    top: Ref
    total: Ref
    logits: Ref
    tops: Ref
    probs: Ref
    shrink: Ref
    values: Ref


def _keys_down(refs: _Refs, scratch: dict[str, Ref], *, factor: float, tiles: Tiling) -> None:
    """One query tile and one segment of keys, with transposed logits: keys are rows and queries are columns.

    The queries form n columns of `lanes`. The tile of a column goes through three stages: logits, softmax, and the
    product with the values. To keep both the matrix unit and the vector unit busy, a step runs the first stage of one
    column beside the second stage of the one `lag` columns back and the third stage of the one before that. At the
    first columns this reaches back into the previous step, and the last columns are finished after the last step.
    """
    q_ref, k_ref, v_ref, start_ref, end_ref = refs.q, refs.k, refs.v, refs.start, refs.end
    acc, top, total, logits, tops, probs, shrink, values = _KeysDownMemory(**scratch)
    segment, (n, keys, lanes) = pl.program_id(3), logits.shape
    lag, count, packed = max(n // 2, 1), tiles.segment // keys, PACKED_ROWS * 2 // q_ref.dtype.itemsize
    columns = [slice(r * lanes, (r + 1) * lanes) for r in range(n)]

    @pl.when(segment == 0)
    def initialise() -> None:
        top[...] = jnp.full_like(top, LOW)
        logits[...], tops[...] = jnp.full_like(logits, LOWEST), jnp.full_like(tops, LOWEST)
        for ref in (acc, total, probs, shrink, values):
            ref[...] = jnp.zeros_like(ref)

    def compute_logits(r: int, i: jax.Array, masked: bool) -> None:
        at = pl.ds(pl.multiple_of((i - segment * count) * keys, keys), keys)
        s = product(k_ref[at, :], q_ref[columns[r], :], transposed=True) * factor
        if masked:
            s = jnp.where(seen(start_ref[:, columns[r]], end_ref[:, columns[r]], i * keys, s.shape), s, LOWEST)
        logits[r] = s
        tops[r] = s.reshape(-1, SUBLANES, lanes).max(axis=0)

    def update_softmax(r: int) -> None:
        new_top = jnp.maximum(top[:, columns[r]], tops[r].max(axis=0, keepdims=True))
        alpha = jnp.exp2(top[:, columns[r]] - new_top)
        sums = total[:, columns[r]] * alpha
        for at in range(0, keys, packed):
            p = jnp.exp2(logits[r, at : at + packed] - new_top[:1])
            sums += p.reshape(-1, SUBLANES, lanes).sum(axis=0)
            probs[r % 2, at : at + packed] = p.astype(probs.dtype)
        top[:, columns[r]], total[:, columns[r]], shrink[r % 2] = new_top, sums, alpha

    def accumulate(r: int, i: jax.Array) -> None:
        old = acc[:, columns[r]] * shrink[r % 2, :1]
        acc[:, columns[r]] = old + product(values[lax.rem(i, 2)], probs[r % 2])

    def step(i: jax.Array, masked: bool) -> None:
        at = pl.ds(pl.multiple_of((i - segment * count) * keys, keys), keys)
        values[lax.rem(i, 2)] = v_ref[at, :].T
        for r in range(n):
            compute_logits(r, i, masked)
            update_softmax((r - lag) % n)
            accumulate((r - lag - 1) % n, i if r > lag else i + 1)

    over_key_tiles(segment_key_tiles(refs.tiles, pl.program_id(0), pl.program_id(2), segment, count), step)

    @pl.when(segment == pl.num_programs(3) - 1)
    def finish() -> None:
        # The stages that lag behind the last step.
        for r in range(n - lag, n):
            update_softmax(r)
            accumulate(r - 1, refs.tiles[pl.program_id(0), pl.program_id(2), 1] + 1)
        accumulate(n - 1, refs.tiles[pl.program_id(0), pl.program_id(2), 1] + 1)
        sums = total[...].sum(axis=0, keepdims=True)
        sees = sums > 0
        refs.out[...] = (acc[...] * jnp.where(sees, 1 / sums, 0.0)).T.astype(refs.out.dtype)
        refs.lse[...] = jnp.where(sees, top[:1] * _LN2 + jnp.log(sums), -jnp.inf)


class _KeysAcrossMemory(NamedTuple):
    """Scratch in VMEM: accumulator, maximum and sum of the running softmax."""

    acc: Ref
    top: Ref
    total: Ref


def _keys_across(refs: _Refs, scratch: dict[str, Ref], *, factor: float, tiles: Tiling) -> None:
    """One query tile and one segment of keys, with logits [queries, keys], for a head_dim that fills the matrix unit.

    There the kernel is bound by the matrix unit, and it is enough to compute the logits of the next rows beside the
    softmax of these rows. Each lane keeps its own sum until the end.
    """
    q_ref, k_ref, v_ref, start_ref, end_ref = refs.q, refs.k, refs.v, refs.start, refs.end
    acc, top, total = _KeysAcrossMemory(**scratch)
    segment, keys, height = pl.program_id(3), tiles.keys, tiles.lanes
    count = tiles.segment // keys
    rows = [slice(r * height, (r + 1) * height) for r in range(tiles.queries // height)]

    @pl.when(segment == 0)
    def begin() -> None:
        top[...] = jnp.full_like(top, LOW)
        acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)

    def step(i: jax.Array, masked: bool) -> None:
        at = pl.ds(pl.multiple_of((i - segment * count) * keys, keys), keys)

        def logits(r: int) -> jax.Array:
            return product(q_ref[rows[r], :], k_ref[at, :], transposed=True) * factor

        s = logits(0)
        for r, here in enumerate(rows):
            following = logits(r + 1) if r + 1 < len(rows) else s
            parts = [s[:, c : c + LANES] for c in range(0, keys, LANES)]
            if masked:
                for c, part in enumerate(parts):
                    visible = seen(start_ref[here, :], end_ref[here, :], i * keys + c * LANES, part.shape, axis=1)
                    parts[c] = jnp.where(visible, part, LOWEST)
            highest = functools.reduce(jnp.maximum, parts).max(axis=1, keepdims=True)
            new_top = jnp.maximum(top[here, :], highest)
            alpha = jnp.exp2(top[here, :] - new_top)
            p = [jnp.exp2(part - new_top) for part in parts]
            total[here, :] = total[here, :] * alpha + functools.reduce(jnp.add, p)
            top[here, :] = new_top
            acc[here, :] = acc[here, :] * alpha + product(jnp.concatenate(p, axis=1).astype(v_ref.dtype), v_ref[at, :])
            s = following

    over_key_tiles(segment_key_tiles(refs.tiles, pl.program_id(0), pl.program_id(2), segment, count), step)

    @pl.when(segment == pl.num_programs(3) - 1)
    def finish() -> None:
        sums = total[...].sum(axis=1, keepdims=True)
        sees = sums > 0
        refs.out[...] = (acc[...] * jnp.where(sees, 1 / sums, 0.0)).astype(refs.out.dtype)
        refs.lse[...] = jnp.where(sees, top[...] * _LN2 + jnp.log(sums), -jnp.inf).T[:1]
