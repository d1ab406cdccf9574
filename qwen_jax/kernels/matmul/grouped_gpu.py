"""Grouped products on Hopper GPUs, for mixtures of experts: rows sorted by group, each group with a matrix of its own.

As many blocks as there are multiprocessors stay, and each takes the next tile of the result when it has sent for all
of one (`grouped_gpu_schedule`). In a block one warpgroup copies what the next steps need into a ring in shared memory,
and two multiply, each 64 rows of the tile by 256 columns. The ring runs on across tiles: while the end of one tile is
written, the next one is on its way.

Only rows that there are cost anything. A tile of `product` has rows of one group, and begins at the last multiple of 8
before them, since the copy engine lays rows out in eights; the few rows of the group before are multiplied but not
written. 64 rows of a tile that has none are skipped. Zeros beyond the last group are written between the copies.

In `weights_gradient` rows are what is summed over, and those of another group must not count whatever they hold: the
warpgroup that copies writes zeros over them in shared memory, before the tensor cores may see that step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS as BLOCKS
from qwen_jax.kernels.gpu.device import TILE_SHARED_BYTES as SMEM_BYTES
from qwen_jax.kernels.gpu.hopper import EIGHT_ROWS, keep_unswizzled, load, store_rows, tiled
from qwen_jax.kernels.gpu.tiles import ROWS, WGMMA, kernel, rem
from qwen_jax.kernels.matmul.grouped_gpu_schedule import hand_out, hear, turn_scratch

_CHUNK, _COLUMNS = 64, 256
"""What is summed over in one step, and columns of a tile, the most that wgmma takes."""
_WARPGROUPS = 2
"""That multiply; each has 64 rows of a tile."""
_ROWS = _WARPGROUPS * ROWS
_PANEL = 16
"""Tiles of rows over which blocks stay while they go through the columns, so that both are read from L2."""
_PIECES, _PIECE_BYTES = 2, 128 * ROWS
"""Parts of a result that a warpgroup may have on their way to global memory, and their size: 64 rows."""
_ZERO_ROWS = 2
"""Rows of zeros that one copy writes: a kilobyte. With the number of the next tile, that is all of shared memory."""
_PER_ROW = WGMMA.reduce(1)


def supports(dtype: Any, outputs: int, inputs: int) -> bool:
    """Whether the kernels can do groups whose matrices are [outputs, inputs]."""
    return jnp.dtype(dtype) == jnp.bfloat16 and not any(n < 64 or n % 64 for n in (outputs, inputs))


def row_tiles(sizes_G: jax.Array, rows: int, warpgroups: int = _WARPGROUPS) -> tuple[jax.Array, jax.Array]:
    """Cuts the rows of every group into tiles of about equal length, in units of 64 rows.

    Args:
      sizes_G: int32, rows of each group; together at most `rows`.
      rows: how many there may be.
      warpgroups: units to a tile, at most.

    Returns:
      int32 [T, 4], for each tile its group, the row at which it begins (a multiple of 8), and the first row and the end
      of what is the group's own in it; T is as many as there could ever be. And int32 [2]: how many there are, and the
      sum of `sizes`.
    """
    G, most_rows = sizes_G.shape[0], ROWS * warpgroups
    most = max(1, (rows + min(G, rows) * (most_rows + 6)) // most_rows)
    end_G = jnp.cumsum(sizes_G)
    first_G = end_G - sizes_G
    start_G = first_G // 8 * 8
    units_G = jnp.where(sizes_G > 0, -((start_G - end_G) // ROWS), 0)
    tiles_G = -(-units_G // warpgroups)
    last_G = jnp.cumsum(tiles_G)
    t = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum((last_G <= t[:, None]).sum(axis=1, dtype=jnp.int32), G - 1)
    start, first, end, units, tiles, last = (x[group] for x in (start_G, first_G, end_G, units_G, tiles_G, last_G))
    n, tiles = t - (last - tiles), jnp.maximum(tiles, 1)
    begin, stop = (start + ROWS * (i * units // tiles) for i in (n, n + 1))
    table = jnp.stack([group, begin, jnp.maximum(first, begin), jnp.minimum(end, stop)], axis=1)
    return table, jnp.stack([last_G[-1], end_G[-1]])


# Jitted, as the gradient is, so that a model of many layers lowers it once.
@functools.partial(jax.jit, static_argnames="transposed")
def product(x_MK: jax.Array, w_GNK: jax.Array, sizes_G: jax.Array, *, transposed: bool = False) -> jax.Array:
    """Each row times the matrix of its group: x W_g^T, or x W_g. Runs on local arrays.

    Args:
      x_MK: bfloat16 rows, sorted by group: the first sizes[0] belong to group 0, and so on. With `transposed`, [M, N].
      w_GNK: bfloat16; N and K are multiples of 64. Multiples of 256 waste nothing.
      sizes_G: int32, how many rows each group has; any may be 0. Together at most M.
      transposed: multiply by W_g instead of its transpose, which is what the gradient by x needs.

    Returns:
      bfloat16 [M, N], or with `transposed` [M, K]: sums in float32, rounded once. Rows that belong to no group are
      zero, whatever x holds there.

    Raises:
      InputError: shapes or dtypes that it cannot do.
    """
    G, N, K = w_GNK.shape if w_GNK.ndim == 3 else (0, 0, 0)
    length, width = (N, K) if transposed else (K, N)
    if not G or x_MK.ndim != 2 or x_MK.shape[1] != length or sizes_G.shape != (G,):
        raise InputError(
            f"A grouped product takes x [M, {'N' if transposed else 'K'}], w [G, N, K] and sizes [G]; got "
            f"{x_MK.shape}, {w_GNK.shape} and {sizes_G.shape}."
        )
    _check(N, K, sizes_G, x_MK, w_GNK)
    M, x = x_MK.shape[0], _whole(x_MK)
    columns = min(_COLUMNS, width)
    stages = _stages(columns, 2 * _ZERO_ROWS * columns)
    table, counts = row_tiles(sizes_G, x.shape[0])
    launch = kernel(
        "grouped_product",
        functools.partial(_product_block, transposed=transposed),
        (jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),),
        {"block": BLOCKS},
        _WARPGROUPS + 1,
        x_smem=tiled((stages, _ROWS, _CHUNK), x.dtype),
        w_smem=tiled((stages, _CHUNK, columns) if transposed else (stages, columns, _CHUNK), x.dtype),
        out_smem=tiled((_WARPGROUPS, _PIECES, ROWS, _PIECE_BYTES // ROWS // 2), x.dtype),
        zeros_smem=plgpu.SMEM((_ZERO_ROWS, columns), x.dtype),
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
        **turn_scratch(_WARPGROUPS),
    )
    out: jax.Array = launch(table, jnp.append(counts, 0), x, w_GNK)[0]
    return out[:M]


@functools.partial(jax.jit, static_argnames="dtype")
def weights_gradient(dy_MN: jax.Array, x_MK: jax.Array, sizes_G: jax.Array, *, dtype: Any) -> jax.Array:
    """The gradient of `product` by the matrices: for each group, the sum over its rows of dy^T x. On local arrays.

    Args:
      dy_MN: bfloat16 gradient by the product; N is a multiple of 64.
      x_MK: bfloat16 rows as `product` got them; K is a multiple of 64.
      sizes_G: int32, how many rows each group has. Rows beyond their sum may hold anything.
      dtype: of the result, float32 or bfloat16.

    Returns:
      [G, N, K], zero for a group without rows: sums in float32, rounded once.

    Raises:
      InputError: shapes or dtypes that it cannot do.
    """
    if dy_MN.ndim != 2 or x_MK.ndim != 2 or dy_MN.shape[0] != x_MK.shape[0] or sizes_G.ndim != 1 or not sizes_G.size:
        raise InputError(
            f"The gradient by grouped matrices takes dy [M, N], x [M, K] and sizes [G]; got {dy_MN.shape}, "
            f"{x_MK.shape} and {sizes_G.shape}."
        )
    (G,), N, K = sizes_G.shape, dy_MN.shape[1], x_MK.shape[1]
    _check(N, K, sizes_G, dy_MN, x_MK)
    dtype, size = jnp.dtype(dtype), jnp.dtype(dtype).itemsize
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise InputError(f"The gradient by grouped matrices comes in float32 or bfloat16; asked for {dtype}.")
    columns = min(_COLUMNS, K)
    stages = _stages(columns)
    end_G = jnp.cumsum(sizes_G)
    launch = kernel(
        "grouped_weights_gradient",
        _gradient_block,
        (jax.ShapeDtypeStruct((G, N, K), dtype),),
        {"block": BLOCKS},
        _WARPGROUPS + 1,
        dy_smem=tiled((stages, _CHUNK, _ROWS), x_MK.dtype),
        x_smem=tiled((stages, _CHUNK, columns), x_MK.dtype),
        out_smem=tiled((_WARPGROUPS, _PIECES, ROWS, _PIECE_BYTES // ROWS // size), dtype, 128 // size),
        # The second half of them is for steps that have to be cleaned first.
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=2 * stages),
        free=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
        **turn_scratch(_WARPGROUPS),
    )
    if N < _ROWS:
        dy_MN = jnp.pad(dy_MN, [(0, 0), (0, _ROWS - N)])
    # The last row has the counter.
    bounds = jnp.append(jnp.stack([end_G - sizes_G, end_G], axis=1), jnp.zeros((1, 2), jnp.int32), axis=0)
    out: jax.Array = launch(bounds, _whole(dy_MN), _whole(x_MK))[0]
    return out


def _check(N: int, K: int, sizes_G: jax.Array, *arrays: jax.Array) -> None:
    if sizes_G.dtype != jnp.int32 or not all(supports(x.dtype, N, K) for x in arrays):
        raise InputError(
            f"Grouped products on Hopper take bfloat16, matrices [N, K] whose N and K are multiples of 64, and int32 "
            f"sizes; got {' and '.join(str(x.dtype) for x in arrays)}, [{N}, {K}] and {sizes_G.dtype}. Pad the "
            "matrices with zeros, convert, or use another implementation."
        )


def _stages(columns: int, more: int = 0) -> int:
    """Steps of the ring that fit in shared memory beside the results on their way, and `more` bytes."""
    room = SMEM_BYTES - _WARPGROUPS * _PIECES * _PIECE_BYTES - more
    return min(8, room // ((_ROWS + columns) * _CHUNK * 2))


def _whole(x: jax.Array) -> jax.Array:
    """At least as many rows as a copy has, and in whole eights, which the copy engine wants of what it lays out so."""
    missing = max(_ROWS, -(-x.shape[0] // 8) * 8) - x.shape[0]
    return jnp.pad(x, [(0, missing), (0, 0)]) if missing else x


def _share(n: Any) -> Any:
    """How many of n equal things are this block's."""
    return lax.div(n - lax.axis_index("block") + (BLOCKS - 1), jnp.int32(BLOCKS))


def _place(n: Any, rows: Any, columns: int) -> tuple[Any, Any]:
    """Row and column of the n-th tile of a result that has `rows` x `columns`: by panels of rows, down each column."""
    panel = lax.div(n, jnp.int32(_PANEL * columns))
    rest = n - panel * (_PANEL * columns)
    here = jnp.clip(rows - panel * _PANEL, 1, _PANEL)
    column = lax.div(rest, here)
    return panel * _PANEL + rest - column * here, column


def _roles(multiply: Callable[[], None], feed: Callable[[], None], feeder: int) -> None:
    """Gives every warpgroup its part of the work and its registers: `feeder` a thread to the one that copies."""
    warpgroup, at_launch = lax.axis_index("warpgroup"), 65536 // 128 // (_WARPGROUPS + 1) // 8 * 8

    @pl.when(warpgroup < _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers((at_launch * (_WARPGROUPS + 1) - feeder) // _WARPGROUPS // 8 * 8, action="increase")
        multiply()
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == _WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(feeder, action="decrease")
        feed()


def _sum(acc_shape: tuple[int, int], before: Any, steps: Any, operands: Any, ready: Any, free: Any) -> Any:
    """Products of `steps` steps of the ring, after `before` others. `operands(slot)` are their two sides."""
    stages = free.shape[0]

    def walk(acc: Any) -> Any:
        def step(i: Any, _: None) -> None:
            slot = rem(before + i, stages)
            plgpu.barrier_wait(ready.at[slot])
            plgpu.wgmma(acc, *operands(slot))
            # All but this step's are done, so the slot of the step before is free.
            plgpu.wgmma_wait(1)
            pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[rem(before + i - 1, stages)]))

        lax.fori_loop(0, steps, step, None)
        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[rem(before + steps - 1, stages)]))
        return acc[...]

    return pl.run_scoped(walk, plgpu.ACC(acc_shape, jnp.float32))


def _wait_for_rest(total: Any, free: Any) -> None:
    """Waits until the ring's last steps, of `total`, are done with: no barrier may be left that nobody waited for."""
    stages = free.shape[0]
    last = jnp.maximum(total - stages, 0)
    lax.fori_loop(last, total, lambda n, _: plgpu.barrier_wait(free.at[rem(n, stages)]), None)


def _send(values: jax.Array, pieces: Any, to: Any, begin: Any) -> None:
    """Writes 64 rows to global memory, `to` from column `begin` on, piece by piece through shared memory."""
    (count, _, size), width = pieces.shape, to.shape[-1]

    def send(p: int) -> None:
        piece = pieces.at[p % count]
        # The tile before has left; then, the piece that was here.
        if p == 0 or p >= count:
            plgpu.wait_smem_to_gmem(0 if p == 0 else count - 1, wait_read_only=True)
        piece[...] = values[:, p * size : (p + 1) * size].astype(piece.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(piece, to.at[:, pl.ds(pl.multiple_of(begin + p * size, size), size)])

    for p in range(values.shape[1] // size):
        if width % values.shape[1]:
            pl.when(begin + p * size < width)(functools.partial(send, p))
        else:
            send(p)


# The product.


def _product_block(
    table_ref: Any, counts_ref: Any, x_ref: Any, w_ref: Any, out_ref: Any, *, x_smem: Any, w_smem: Any, out_smem: Any,
    zeros_smem: Any, ready: Any, free: Any, transposed: bool, **turns: Any,
) -> None:  # fmt: skip
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    stages, (M, width), length = free.shape[0], out_ref.shape, x_ref.shape[1]
    columns = w_smem.shape[2 if transposed else 1]
    wide, steps = -(-width // columns), length // _CHUNK
    tiles, rows = counts_ref[0], counts_ref[1]

    def tile(n: Any) -> tuple[Any, ...]:
        """Of the n-th tile: n, group, row at which it begins, its own rows, and first column."""
        row, column = _place(n, tiles, wide)
        row = jnp.minimum(row, table_ref.shape[0] - 1)
        return n, *(table_ref[row, i] for i in range(4)), column * columns

    def multiply() -> None:
        def turn(state: Any) -> Any:
            i, (_, _, begin, first, end, column) = state
            before = i * steps
            begin += warpgroup * ROWS
            low, high = jnp.maximum(first - begin, 0), jnp.minimum(end - begin, ROWS)

            def some() -> Any:
                def operands(slot: Any) -> tuple[Any, Any]:
                    w = w_smem.at[slot]
                    own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
                    return x_smem.at[slot, own], w if transposed else w.T

                y = _sum((ROWS, columns), before, steps, operands, ready, free).astype(out_ref.dtype)
                # What the next tile is, is read while this one is written.
                after = tile(hear(i + 1, **turns))
                here = pl.ds(pl.multiple_of(begin, 8), ROWS)

                def whole() -> None:
                    _send(y, out_smem.at[warpgroup], out_ref.at[here], column)

                def part() -> None:
                    r = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_PER_ROW)
                    own = ((r >= low) & (r < high)).astype(jnp.int32)
                    for at in range(0, columns, 64):
                        to = out_ref.at[here, pl.ds(pl.multiple_of(column + at, 64), 64)]
                        pl.when(column + at < width)(functools.partial(store_rows, to, y[:, at : at + 64], own))

                lax.cond((low == 0) & (high == ROWS), whole, part)
                return after

            def none() -> Any:
                def skip(i: Any, _: None) -> None:
                    slot = rem(before + i, stages)
                    plgpu.barrier_wait(ready.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

                lax.fori_loop(0, steps, skip, None)
                return tile(hear(i + 1, **turns))

            return i + 1, lax.cond(low < high, some, none)

        begin = jnp.int32(0), tile(hear(jnp.int32(0), **turns))
        lax.while_loop(lambda state: state[1][0] < tiles * wide, turn, begin)

    def feed() -> None:
        # Zeros to write, counted by copies; they are spread over the steps.
        keep_unswizzled(zeros_smem)
        zeros_smem[...] = jnp.zeros(zeros_smem.shape, zeros_smem.dtype)
        plgpu.commit_smem()
        zeros = _share(lax.div(M - rows + (_ZERO_ROWS - 1), jnp.int32(_ZERO_ROWS)) * wide)
        at_once = lax.div(zeros, jnp.maximum(_share(tiles * wide) * steps, 1)) + 1

        def write_zeros(i: Any, _: None) -> None:
            n = block + i * BLOCKS
            row = lax.div(n, jnp.int32(wide))
            here = pl.ds(rows + row * _ZERO_ROWS, _ZERO_ROWS), pl.ds((n - row * wide) * columns, columns)
            plgpu.copy_smem_to_gmem(zeros_smem, out_ref.at[here])

        def turn(n: Any, carry: Any) -> Any:
            before, written = carry
            _, group, begin, _, end, column = tile(n)
            begin, units = pl.multiple_of(begin, 8), lax.div(end - begin + (ROWS - 1), jnp.int32(ROWS))
            # Only rows that some warpgroup has, which are 64 to each.
            few = [(u * ROWS, units == u) for u in range(1, _WARPGROUPS + 1)]

            def step(j: Any, written: Any) -> Any:
                slot, part = rem(before + j, stages), pl.ds(j * _CHUNK, _CHUNK)
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

        def finish(carry: Any) -> None:
            total, written = carry
            lax.fori_loop(written, zeros, write_zeros, None)
            plgpu.wait_smem_to_gmem(0)
            _wait_for_rest(total, free)

        counter_ref = counts_ref.at[pl.ds(2, 1)]
        hand_out(tiles * wide, turn, finish, (jnp.int32(0), jnp.int32(0)), counter_ref, **turns)

    _roles(multiply, feed, 40)


# The gradient by the weights.


def _gradient_block(
    bounds_ref: Any, dy_ref: Any, x_ref: Any, out_ref: Any, *, dy_smem: Any, x_smem: Any, out_smem: Any, ready: Any,
    free: Any, **turns: Any,
) -> None:  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    (G, N, K), stages, columns = out_ref.shape, free.shape[0], x_smem.shape[2]
    high, wide = -(-N // _ROWS), -(-K // columns)
    tiles = jnp.int32(G * high * wide)

    def tile(n: Any) -> tuple[Any, ...]:
        """Of the n-th tile: n, group, its row and column in the result, first and end of the rows to sum, and steps."""
        group = lax.div(n, jnp.int32(high * wide))
        row, column = _place(n - group * (high * wide), jnp.int32(high), wide)
        group = jnp.minimum(group, G - 1)
        first, end = bounds_ref[group, 0], bounds_ref[group, 1]
        count = lax.div(end - lax.div(first, jnp.int32(8)) * 8 + (_CHUNK - 1), jnp.int32(_CHUNK))
        return n, group, row * _ROWS, column * columns, first, end, jnp.where(first < end, count, 0)

    def own_rows(i: Any, first: Any, end: Any) -> tuple[Any, Any, Any]:
        """Of a step: the row at which it begins, and first and end of the group's own, counted from there."""
        begin = pl.multiple_of(lax.div(first, jnp.int32(8)) * 8 + i * _CHUNK, 8)
        return begin, jnp.maximum(first - begin, 0), jnp.minimum(end - begin, _CHUNK)

    def multiply() -> None:
        def turn(state: Any) -> Any:
            i, before, (_, group, row, column, _, _, steps) = state

            def operands(slot: Any) -> tuple[Any, Any]:
                own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
                return dy_smem.at[slot, :, own].T, x_smem.at[slot]

            dw = _sum((ROWS, columns), before, steps, operands, ready, free)
            after = tile(hear(i + 1, **turns))
            row += warpgroup * ROWS
            here = pl.ds(pl.multiple_of(row, ROWS), ROWS)
            pl.when(row < N)(lambda: _send(dw, out_smem.at[warpgroup], out_ref.at[group, here], column))
            return i + 1, before + steps, after

        begin = jnp.int32(0), jnp.int32(0), tile(hear(jnp.int32(0), **turns))
        lax.while_loop(lambda state: state[2][0] < tiles, turn, begin)

    def feed() -> None:
        def clean(slot: Any, low: Any, high: Any) -> None:
            plgpu.barrier_wait(ready.at[slot + stages])

            def clean_eight(n: Any) -> None:
                at = pl.ds(pl.multiple_of(n * 8, 8), 8)
                for smem in (dy_smem.at[slot], x_smem.at[slot]):
                    rows = load(smem.at[at], EIGHT_ROWS)
                    r = plgpu.broadcasted_iota(jnp.int32, rows.shape, 0, layout=EIGHT_ROWS) + n * 8
                    smem[at] = jnp.where((r >= low) & (r < high), rows, jnp.zeros_like(rows))

            def eight(n: Any, _: None) -> None:
                pl.when((n * 8 < low) | (n * 8 + 8 > high))(lambda: clean_eight(n))

            lax.fori_loop(0, _CHUNK // 8, eight, None)
            plgpu.commit_smem()
            for _ in range(2):
                plgpu.barrier_arrive(ready.at[slot])

        def turn(n: Any, carry: Any) -> Any:
            before, late = carry
            _, _, row, column, first, end, steps = tile(n)

            def step(i: Any, late: Any) -> Any:
                slot = rem(before + i, stages)
                begin, low, high = own_rows(i, first, end)
                pl.when(before + i >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                mixed = (low > 0) | (high < _CHUNK)
                arrived = ready.at[jnp.where(mixed, slot + stages, slot)]
                here = pl.ds(begin, _CHUNK)
                plgpu.copy_gmem_to_smem(dy_ref.at[here, pl.ds(row, _ROWS)], dy_smem.at[slot], arrived)
                plgpu.copy_gmem_to_smem(x_ref.at[here, pl.ds(column, columns)], x_smem.at[slot], arrived)
                # A step is cleaned after the next one was sent for: by then it will have come.
                clean_late(late)
                return mixed, slot, low, high

            mixed, *step_before = lax.fori_loop(0, steps, step, late)
            # Where no step follows, those that multiply must not wait for one.
            pl.when(mixed & (steps == 0))(lambda: clean(*step_before))
            return before + steps, (mixed & (steps > 0), *step_before)

        def clean_late(late: Any) -> None:
            pl.when(late[0])(lambda: clean(*late[1:]))

        none = jnp.bool_(False), jnp.int32(0), jnp.int32(0), jnp.int32(0)

        def finish(carry: Any) -> None:
            total, late = carry
            clean_late(late)
            _wait_for_rest(total, free)

        hand_out(tiles, turn, finish, (jnp.int32(0), none), bounds_ref.at[G, pl.ds(0, 1)], **turns)

    _roles(multiply, feed, 56)
