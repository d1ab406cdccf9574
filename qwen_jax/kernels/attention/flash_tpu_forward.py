"""The forward pass of `flash_tpu`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.attention.flash_tpu_bodies import KeysAcross, KeysDown, QueryTile
from qwen_jax.kernels.attention.flash_tpu_tiles import Tiling, cost, forward_bytes
from qwen_jax.kernels.softmax import LOWEST
from qwen_jax.kernels.types import Ref


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
    f32 = jnp.float32
    # Which body fits, with its scratch and its layout of the intervals.
    body: type[KeysDown | KeysAcross]
    if d < tiles.lanes:
        body, scratch = KeysDown, KeysDown.scratch(tiles.queries, tiles.keys, tiles.lanes, d, v.dtype)
    else:
        body, scratch = KeysAcross, KeysAcross.scratch(tiles.queries, d)
    ends_spec = body.ends_spec(tiles.queries)

    def kernel(*refs: Ref) -> None:
        operands, memory = _Refs(*refs[:8]), dict(zip(scratch, refs[8:], strict=True))
        tile = QueryTile(operands.q, operands.start, operands.end, operands.out, operands.lse)
        if body is KeysDown:
            _program(operands, KeysDown(tile, memory, factor), tiles)
        else:
            _program(operands, KeysAcross(tile, memory, factor, tiles.lanes), tiles)

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
    )(visited, q, k, v, *body.ends(start, end))
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


def _program(refs: _Refs, body: KeysDown | KeysAcross, tiles: Tiling) -> None:
    """One query tile and one segment of keys."""
    row, tile, segment, keys = pl.program_id(0), pl.program_id(2), pl.program_id(3), tiles.keys
    count = tiles.segment // keys
    pl.when(segment == 0)(body.begin)

    def step(i: jax.Array, masked: bool) -> None:
        def hide(s: jax.Array, low: jax.Array, high: jax.Array, at: int, axis: int) -> jax.Array:
            return jnp.where(seen(low, high, i * keys + at, s.shape, axis), s, LOWEST)

        here = pl.ds(pl.multiple_of((i - segment * count) * keys, keys), keys)
        body.step(i, refs.k.at[here, :], refs.v.at[here, :], hide if masked else None)

    over_key_tiles(segment_key_tiles(refs.tiles, row, tile, segment, count), step)
    pl.when(segment == pl.num_programs(3) - 1)(lambda: body.finish(refs.tiles[row, tile, 1]))
