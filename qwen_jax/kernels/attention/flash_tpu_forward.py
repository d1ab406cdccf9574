"""The forward pass of `flash_tpu`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.softmax import LOW, LOWEST
from qwen_jax.kernels.tpu.tiles import LANES, Blocks, cost, forward_bytes

_SUBLANES, _PACKED = 8, 16
_LN2 = 0.6931471805599453
_NT, _NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


def product(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a b, or a b^T, summed in float32; float32 operands are not rounded."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = _NT if transposed else _NN
    out: jax.Array = lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
    return out


def own_tiles(visits_ref: Any, row: Any, tile: Any, segment: Any, count: int) -> tuple[Any, ...]:
    """First and end of a segment's tiles that are visited, and of those without a masked pair.

    Args:
      visits_ref: from `visits`, [B, query tiles, 4].
      row, tile: the program's.
      segment: index of the segment.
      count: tiles of a segment.
    """
    low = segment * count
    return tuple(jnp.clip(visits_ref[row, tile, n], low, low + count) for n in range(4))


def seen(lo: jax.Array, hi: jax.Array, first: Any, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """Which pairs of a tile are visible: keys along `axis` from `first` on, the intervals along the other one."""
    j = lax.broadcasted_iota(jnp.int32, shape, axis)
    return (j >= lo - first) & (j < hi - first)


def walk(first: Any, last: Any, full_first: Any, full_last: Any, step: Any) -> None:
    """Calls `step(i, masked)` for each visited tile."""

    def one(i: Any, _: None) -> None:
        full = (i >= full_first) & (i < full_last)
        pl.when(full)(lambda: step(i, False))
        pl.when(~full)(lambda: step(i, True))

    lax.fori_loop(first, last, one, None)


@functools.partial(jax.jit, static_argnames=("factor", "tiles"))
def run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, visited: jax.Array, *,
    factor: float, tiles: Blocks,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output [B, H, T, d] and log-sum-exp [B, H, T]; `factor` is the scale of logits in base 2."""
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    group, segment = H // K, tiles.segment

    def at_keys(b: Any, h: Any, i: Any, s: Any, visits_ref: Any) -> Any:
        # A segment that is not visited is not fetched: the last one stays.
        first, last = visits_ref[b, i, 0] * tiles.keys, visits_ref[b, i, 1] * tiles.keys
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
            top=pltpu.VMEM((_SUBLANES, tiles.queries), f32),
            total=pltpu.VMEM((_SUBLANES, tiles.queries), f32),
            logits=pltpu.VMEM((n, tiles.keys, lanes), f32),
            tops=pltpu.VMEM((n, _SUBLANES, lanes), f32),
            probs=pltpu.VMEM((2, tiles.keys, lanes), v.dtype),
            shrink=pltpu.VMEM((2, _SUBLANES, lanes), f32),
            values=pltpu.VMEM((2, d, tiles.keys), v.dtype),
        )
    else:
        # In every lane, where comparing wants them. A number alone in a row would take as much room.
        program, ends = _keys_across, [jnp.broadcast_to(x[:, :, None], (*x.shape, LANES)) for x in (start, end)]
        ends_spec = pl.BlockSpec((None, tiles.queries, LANES), lambda b, h, i, s, _: (b, i, 0))
        scratch = dict(
            acc=pltpu.VMEM((tiles.queries, d), f32),
            top=pltpu.VMEM((tiles.queries, LANES), f32),
            total=pltpu.VMEM((tiles.queries, LANES), f32),
        )
    names = list(scratch)

    def kernel(*refs: Any) -> None:
        own = dict(zip(names, refs[-len(names) :], strict=True))
        program(*refs[: -len(names)], **own, factor=factor, tiles=tiles)

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


def _keys_down(
    visits_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, out_ref: Any, lse_ref: Any, *,
    acc: Any, top: Any, total: Any, logits: Any, tops: Any, probs: Any, shrink: Any, values: Any, factor: float,
    tiles: Blocks,
) -> None:  # fmt: skip
    """One tile of queries and one segment of keys; logits have keys down and queries across.

    The queries are in n columns. A column's tile goes through three stages: logits, softmax, and the product with the
    values. So that the matrix unit and the vector unit always have both something to do, a step takes the first stage
    of one column beside the second of one that is `lag` columns back and the third of the one before that; around the
    end of the columns this reaches into the step before, and the last few are finished after the last step.
    """
    segment, (n, keys, lanes) = pl.program_id(3), logits.shape
    lag, count, packed = max(n // 2, 1), tiles.segment // keys, _PACKED * 2 // q_ref.dtype.itemsize
    columns = [slice(r * lanes, (r + 1) * lanes) for r in range(n)]

    @pl.when(segment == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, LOW)
        logits[...], tops[...] = jnp.full_like(logits, LOWEST), jnp.full_like(tops, LOWEST)
        for ref in (acc, total, probs, shrink, values):
            ref[...] = jnp.zeros_like(ref)

    def see(r: int, i: Any, masked: bool) -> None:
        at = pl.ds(pl.multiple_of((i - segment * count) * keys, keys), keys)
        s = product(k_ref[at, :], q_ref[columns[r], :], transposed=True) * factor
        if masked:
            s = jnp.where(seen(start_ref[:, columns[r]], end_ref[:, columns[r]], i * keys, s.shape), s, LOWEST)
        logits[r] = s
        tops[r] = s.reshape(-1, _SUBLANES, lanes).max(axis=0)

    def weigh(r: int) -> None:
        new_top = jnp.maximum(top[:, columns[r]], tops[r].max(axis=0, keepdims=True))
        alpha = jnp.exp2(top[:, columns[r]] - new_top)
        sums = total[:, columns[r]] * alpha
        for at in range(0, keys, packed):
            p = jnp.exp2(logits[r, at : at + packed] - new_top[:1])
            sums += p.reshape(-1, _SUBLANES, lanes).sum(axis=0)
            probs[r % 2, at : at + packed] = p.astype(probs.dtype)
        top[:, columns[r]], total[:, columns[r]], shrink[r % 2] = new_top, sums, alpha

    def collect(r: int, i: Any) -> None:
        old = acc[:, columns[r]] * shrink[r % 2, :1]
        acc[:, columns[r]] = old + product(values[lax.rem(i, 2)], probs[r % 2])

    def step(i: Any, masked: bool) -> None:
        at = pl.ds(pl.multiple_of((i - segment * count) * keys, keys), keys)
        values[lax.rem(i, 2)] = v_ref[at, :].T
        for r in range(n):
            see(r, i, masked)
            weigh((r - lag) % n)
            collect((r - lag - 1) % n, i if r > lag else i + 1)

    first, last, full_first, full_last = own_tiles(visits_ref, pl.program_id(0), pl.program_id(2), segment, count)
    walk(first, last, full_first, full_last, step)

    @pl.when(segment == pl.num_programs(3) - 1)
    def _() -> None:
        for r in range(n - lag, n):
            weigh(r)
            collect(r - 1, visits_ref[pl.program_id(0), pl.program_id(2), 1] + 1)
        collect(n - 1, visits_ref[pl.program_id(0), pl.program_id(2), 1] + 1)
        sums = total[...].sum(axis=0, keepdims=True)
        sees = sums > 0
        out_ref[...] = (acc[...] * jnp.where(sees, 1 / sums, 0.0)).T.astype(out_ref.dtype)
        lse_ref[...] = jnp.where(sees, top[:1] * _LN2 + jnp.log(sums), -jnp.inf)


def _keys_across(
    visits_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, out_ref: Any, lse_ref: Any, *,
    acc: Any, top: Any, total: Any, factor: float, tiles: Blocks,
) -> None:  # fmt: skip
    """The same with logits the plain way round, for a head_dim that fills the matrix unit.

    There the unit is the bound, and it needs no more help than the next rows' logits beside these rows' softmax. Each
    lane keeps a sum of its own until the end.
    """
    segment, keys, height = pl.program_id(3), tiles.keys, tiles.lanes
    count = tiles.segment // keys
    rows = [slice(r * height, (r + 1) * height) for r in range(tiles.queries // height)]

    @pl.when(segment == 0)
    def begin() -> None:
        top[...] = jnp.full_like(top, LOW)
        acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)

    def step(i: Any, masked: bool) -> None:
        at = pl.ds(pl.multiple_of((i - segment * count) * keys, keys), keys)

        def see(r: int) -> jax.Array:
            return product(q_ref[rows[r], :], k_ref[at, :], transposed=True) * factor

        s = see(0)
        for r, here in enumerate(rows):
            after = see(r + 1) if r + 1 < len(rows) else s
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
            s = after

    first, last, full_first, full_last = own_tiles(visits_ref, pl.program_id(0), pl.program_id(2), segment, count)
    walk(first, last, full_first, full_last, step)

    @pl.when(segment == pl.num_programs(3) - 1)
    def finish() -> None:
        sums = total[...].sum(axis=1, keepdims=True)
        sees = sums > 0
        out_ref[...] = (acc[...] * jnp.where(sees, 1 / sums, 0.0)).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(sees, top[...] * _LN2 + jnp.log(sums), -jnp.inf).T[:1]
