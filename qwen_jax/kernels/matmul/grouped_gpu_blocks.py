"""Programs of the thread blocks of grouped products on Hopper GPUs: the product, and its gradient for the matrices."""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.hopper import EIGHT_ROWS, keep_unswizzled, load, store_rows
from qwen_jax.kernels.gpu.tiles import PER_COLUMN, PER_ROW, ROWS, across, rem
from qwen_jax.kernels.matmul.grouped_gpu_schedule import TileQueue, claim_tiles, receive_tile
from qwen_jax.kernels.matmul.grouped_gpu_tiles import (
    CHUNK,
    TILE_ROWS,
    WARPGROUPS,
    ZERO_ROWS,
    accumulate,
    place,
    run_roles,
    share,
    wait_for_rest,
    write_rows,
)
from qwen_jax.kernels.types import Ref


class ProductMemory(NamedTuple):
    """Shared memory and barriers of a thread block: rings of x and W, pieces of the result, zeros, the tile queue."""

    x_smem: Ref
    w_smem: Ref
    out_smem: Ref
    zeros_smem: Ref
    ready: Ref
    free: Ref
    queue: TileQueue

    @classmethod
    def of(cls, scratch: dict[str, Ref]) -> "ProductMemory":
        queue = TileQueue(*(scratch.pop(name) for name in TileQueue._fields))
        return cls(queue=queue, **scratch)


class _Tile(NamedTuple):
    """A tile of the product: its number, group, first row, the range of rows of the group, and first column."""

    n: jax.Array
    group: jax.Array
    begin: jax.Array
    first: jax.Array
    end: jax.Array
    column: jax.Array


def product_block(
    memory: ProductMemory, table_ref: Ref, counts_ref: Ref, x_ref: Ref, w_ref: Ref, *refs: Ref, transposed: bool
) -> None:
    """The program of a thread block; `refs` are the result and, if x and w are codes, before it the scales of both."""
    *scales, out_ref = refs
    x_smem, w_smem, out_smem, zeros_smem, ready, free, queue = memory
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    stages, (M, width), length = free.shape[0], out_ref.shape, x_ref.shape[1]
    columns = w_smem.shape[2 if transposed else 1]
    chunk = x_smem.shape[2]
    wide, steps = -(-width // columns), length // chunk
    sums = jnp.int32 if jnp.issubdtype(x_ref.dtype, jnp.integer) else jnp.float32
    tiles, rows = counts_ref[0], counts_ref[1]

    def tile(n: jax.Array) -> _Tile:
        row, column = place(n, tiles, wide)
        row = jnp.minimum(row, table_ref.shape[0] - 1)
        return _Tile(n, table_ref[row, 0], table_ref[row, 1], table_ref[row, 2], table_ref[row, 3], column * columns)

    def multiply() -> None:
        """The program of a warpgroup that multiplies: one turn for each tile of the block."""

        def turn(state: tuple[jax.Array, _Tile]) -> tuple[jax.Array, _Tile]:
            i, (_, group, begin, first, end, column) = state
            before = i * steps
            begin += warpgroup * ROWS
            low, high = jnp.maximum(first - begin, 0), jnp.minimum(end - begin, ROWS)

            def some() -> _Tile:
                def operands(slot: jax.Array) -> tuple[Ref, Ref]:
                    w = w_smem.at[slot]
                    own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
                    return x_smem.at[slot, own], w if transposed else w.T

                here = pl.ds(pl.multiple_of(begin, 8), ROWS)
                of_rows = [load(x.at[here], PER_ROW) for x in scales[:1]]
                y = accumulate((ROWS, columns), before, steps, operands, ready, free, sums)
                if scales:
                    of_columns = load(scales[1].at[group, pl.ds(pl.multiple_of(column, 64), columns)], PER_COLUMN)
                    y = y.astype(jnp.float32) * across(of_rows[0], y.shape) * across(of_columns, y.shape, 1)
                y = y.astype(out_ref.dtype)
                # Receive the next tile while this one is written.
                after = tile(receive_tile(i + 1, queue))

                def whole() -> None:
                    write_rows(y, out_smem.at[warpgroup], out_ref.at[here], column)

                def part() -> None:
                    # Rows of other groups must not be written.
                    r = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)
                    own = ((r >= low) & (r < high)).astype(jnp.int32)
                    for at in range(0, columns, 64):
                        to = out_ref.at[here, pl.ds(pl.multiple_of(column + at, 64), 64)]
                        pl.when(column + at < width)(functools.partial(store_rows, to, y[:, at : at + 64], own))

                lax.cond((low == 0) & (high == ROWS), whole, part)
                return after

            def none() -> _Tile:
                def skip(i: jax.Array, _: None) -> None:
                    slot = rem(before + i, stages)
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

                lax.fori_loop(0, steps, skip, None)
                return tile(receive_tile(i + 1, queue))

            return i + 1, lax.cond(low < high, some, none)

        begin = jnp.int32(0), tile(receive_tile(jnp.int32(0), queue))
        lax.while_loop(lambda state: state[1].n < tiles * wide, turn, begin)

    def feed() -> None:
        """The program of the warpgroup that copies, and writes the zeros after the last group."""
        # The number of copies of zeros. They are spread over the steps.
        keep_unswizzled(zeros_smem)
        zeros_smem[...] = jnp.zeros(zeros_smem.shape, zeros_smem.dtype)
        plgpu.commit_smem()
        zeros = share(lax.div(M - rows + (ZERO_ROWS - 1), jnp.int32(ZERO_ROWS)) * wide)
        at_once = lax.div(zeros, jnp.maximum(share(tiles * wide) * steps, 1)) + 1

        def write_zeros(i: jax.Array, _: None) -> None:
            n = block + i * lax.axis_size("block")
            row = lax.div(n, jnp.int32(wide))
            here = pl.ds(rows + row * ZERO_ROWS, ZERO_ROWS), pl.ds((n - row * wide) * columns, columns)
            plgpu.copy_smem_to_gmem(zeros_smem, out_ref.at[here])

        def turn(n: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            before, written = carry
            _, group, begin, _, end, column = tile(n)
            begin, units = pl.multiple_of(begin, 8), lax.div(end - begin + (ROWS - 1), jnp.int32(ROWS))
            # Copy only the units of 64 rows that a warpgroup multiplies.
            few = [(u * ROWS, units == u) for u in range(1, WARPGROUPS + 1)]

            def step(j: jax.Array, written: jax.Array) -> jax.Array:
                slot, part = rem(before + j, stages), pl.ds(j * chunk, chunk)
                pl.when(before + j >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                here = (part, pl.ds(column, columns)) if transposed else (pl.ds(column, columns), part)
                plgpu.copy_gmem_to_smem(w_ref.at[group, *here], w_smem.at[slot], ready.at[slot])
                for count, there in few:
                    source, to = x_ref.at[pl.ds(begin, count), part], x_smem.at[slot, pl.ds(0, count)]
                    pl.when(there)(functools.partial(plgpu.copy_gmem_to_smem, source, to, ready.at[slot]))
                now = jnp.minimum(written + at_once, zeros)
                lax.fori_loop(written, now, write_zeros, None)
                return now

            return before + steps, lax.fori_loop(0, steps, step, written)

        def finish(carry: tuple[jax.Array, jax.Array]) -> None:
            total, written = carry
            lax.fori_loop(written, zeros, write_zeros, None)
            plgpu.wait_smem_to_gmem(0)
            wait_for_rest(total, free)

        counter_ref = counts_ref.at[pl.ds(2, 1)]
        claim_tiles(tiles * wide, turn, finish, (jnp.int32(0), jnp.int32(0)), counter_ref, queue)

    run_roles(multiply, feed, 40)


class GradientMemory(NamedTuple):
    """Shared memory and barriers of a thread block: rings of dy and x, pieces of the result, and the tile queue."""

    dy_smem: Ref
    x_smem: Ref
    out_smem: Ref
    ready: Ref
    free: Ref
    queue: TileQueue

    @classmethod
    def of(cls, scratch: dict[str, Ref]) -> "GradientMemory":
        queue = TileQueue(*(scratch.pop(name) for name in TileQueue._fields))
        return cls(queue=queue, **scratch)


class _GradientTile(NamedTuple):
    """A tile of the gradient: its number, group, row and column, the range of rows to sum, and the number of steps."""

    n: jax.Array
    group: jax.Array
    row: jax.Array
    column: jax.Array
    first: jax.Array
    end: jax.Array
    steps: jax.Array


class _Step(NamedTuple):
    """A step whose rows of other groups must be cleared if `mixed`: its slot, and the range of rows of the group."""

    mixed: jax.Array
    slot: jax.Array
    low: jax.Array
    high: jax.Array


def gradient_block(memory: GradientMemory, bounds_ref: Ref, dy_ref: Ref, x_ref: Ref, out_ref: Ref) -> None:
    """The program of a thread block."""
    dy_smem, x_smem, out_smem, ready, free, queue = memory
    warpgroup = lax.axis_index("warpgroup")
    (G, N, K), stages, columns = out_ref.shape, free.shape[0], x_smem.shape[2]
    high, wide = -(-N // TILE_ROWS), -(-K // columns)
    tiles = jnp.int32(G * high * wide)

    def tile(n: jax.Array) -> _GradientTile:
        group = lax.div(n, jnp.int32(high * wide))
        row, column = place(n - group * (high * wide), jnp.int32(high), wide)
        group = jnp.minimum(group, G - 1)
        first, end = bounds_ref[group, 0], bounds_ref[group, 1]
        count = lax.div(end - lax.div(first, jnp.int32(8)) * 8 + (CHUNK - 1), jnp.int32(CHUNK))
        return _GradientTile(n, group, row * TILE_ROWS, column * columns, first, end, jnp.where(first < end, count, 0))

    def own_rows(i: jax.Array, first: jax.Array, end: jax.Array) -> tuple[jax.Array, ...]:
        """The first row of a step, and the range of rows of the group, counted from there."""
        begin = pl.multiple_of(lax.div(first, jnp.int32(8)) * 8 + i * CHUNK, 8)
        return begin, jnp.maximum(first - begin, 0), jnp.minimum(end - begin, CHUNK)

    def multiply() -> None:
        """The program of a warpgroup that multiplies: one turn for each tile of the block."""

        def turn(state: tuple[jax.Array, jax.Array, _GradientTile]) -> tuple[jax.Array, jax.Array, _GradientTile]:
            i, before, (_, group, row, column, _, _, steps) = state

            def operands(slot: jax.Array) -> tuple[Ref, Ref]:
                own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
                return dy_smem.at[slot, :, own].T, x_smem.at[slot]

            dw = accumulate((ROWS, columns), before, steps, operands, ready, free)
            after = tile(receive_tile(i + 1, queue))
            row += warpgroup * ROWS
            here = pl.ds(pl.multiple_of(row, ROWS), ROWS)
            pl.when(row < N)(lambda: write_rows(dw, out_smem.at[warpgroup], out_ref.at[group, here], column))
            return i + 1, before + steps, after

        begin = jnp.int32(0), jnp.int32(0), tile(receive_tile(jnp.int32(0), queue))
        lax.while_loop(lambda state: state[2].n < tiles, turn, begin)

    def feed() -> None:
        """The program of the warpgroup that copies, and clears rows of other groups."""

        def clean(slot: jax.Array, low: jax.Array, high: jax.Array) -> None:
            """Clears the rows of a step outside low to high, and then lets the tensor cores read it."""
            plgpu.barrier_wait(ready.at[slot + stages])

            def clean_eight(n: jax.Array) -> None:
                at = pl.ds(pl.multiple_of(n * 8, 8), 8)
                for smem in (dy_smem.at[slot], x_smem.at[slot]):
                    rows = load(smem.at[at], EIGHT_ROWS)
                    r = plgpu.broadcasted_iota(jnp.int32, rows.shape, 0, layout=EIGHT_ROWS) + n * 8
                    smem[at] = jnp.where((r >= low) & (r < high), rows, jnp.zeros_like(rows))

            def eight(n: jax.Array, _: None) -> None:
                pl.when((n * 8 < low) | (n * 8 + 8 > high))(lambda: clean_eight(n))

            lax.fori_loop(0, CHUNK // 8, eight, None)
            plgpu.commit_smem()
            for _ in range(2):
                plgpu.barrier_arrive(ready.at[slot])

        def turn(n: jax.Array, carry: tuple[jax.Array, _Step]) -> tuple[jax.Array, _Step]:
            before, late = carry
            _, _, row, column, first, end, steps = tile(n)

            def step(i: jax.Array, late: _Step) -> _Step:
                slot = rem(before + i, stages)
                begin, low, high = own_rows(i, first, end)
                pl.when(before + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                mixed = (low > 0) | (high < CHUNK)
                arrived = ready.at[jnp.where(mixed, slot + stages, slot)]
                here = pl.ds(begin, CHUNK)
                plgpu.copy_gmem_to_smem(dy_ref.at[here, pl.ds(row, TILE_ROWS)], dy_smem.at[slot], arrived)
                plgpu.copy_gmem_to_smem(x_ref.at[here, pl.ds(column, columns)], x_smem.at[slot], arrived)
                # The previous step is cleared after the copies of this one were started: by then it has arrived.
                clean_late(late)
                return _Step(mixed, slot, low, high)

            mixed, *step_before = lax.fori_loop(0, steps, step, late)
            # If no step follows, the multiplying warpgroups must not wait for one.
            pl.when(mixed & (steps == 0))(lambda: clean(*step_before))
            return before + steps, _Step(mixed & (steps > 0), *step_before)

        def clean_late(late: _Step) -> None:
            pl.when(late.mixed)(lambda: clean(late.slot, late.low, late.high))

        none = _Step(jnp.bool_(False), jnp.int32(0), jnp.int32(0), jnp.int32(0))

        def finish(carry: tuple[jax.Array, _Step]) -> None:
            total, late = carry
            clean_late(late)
            wait_for_rest(total, free)

        claim_tiles(tiles, turn, finish, (jnp.int32(0), none), bounds_ref.at[G, pl.ds(0, 1)], queue)

    run_roles(multiply, feed, 56)
