"""Parts of the grouped products for Hopper GPUs: sizes, the order of tiles, roles of warpgroups, the ring of steps."""

import functools
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.tiles import ROWS, compute_registers, rem
from qwen_jax.kernels.types import Ref

CHUNK, COLUMNS = 64, 256
"""Length of the sum in one step (twice as long for codes of 8 bits), and columns of a tile, the maximum of wgmma."""
WARPGROUPS = 2
"""Warpgroups that multiply; each has 64 rows of a tile."""
TILE_ROWS = WARPGROUPS * ROWS
PANEL = 16
"""Row tiles that blocks stay with while they go through the columns, so that both are read from L2."""
PIECES, PIECE_BYTES = 2, 128 * ROWS
"""Pieces of a result that a warpgroup may have in flight to global memory, and the size of one: 64 rows."""
ZERO_ROWS = 2
"""Rows of zeros that one copy writes: a kilobyte. With the tile queue, that uses up the shared memory."""


def share(n: jax.Array) -> jax.Array:
    """The number of items of this block if n items are distributed evenly."""
    blocks = lax.axis_size("block")
    return lax.div(n - lax.axis_index("block") + (blocks - 1), jnp.int32(blocks))


def place(n: jax.Array, rows: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of the n-th tile of a result of `rows` x `columns` tiles: by panels of rows, down each column."""
    panel = lax.div(n, jnp.int32(PANEL * columns))
    rest = n - panel * (PANEL * columns)
    here = jnp.clip(rows - panel * PANEL, 1, PANEL)
    column = lax.div(rest, here)
    return panel * PANEL + rest - column * here, column


def run_roles(multiply: Callable[[], None], feed: Callable[[], None], feeder_registers: int) -> None:
    """Runs the program of each warpgroup with its share of the registers.

    Args:
      multiply: of the warpgroups that multiply.
      feed: of the one that copies.
      feeder_registers: of a thread that copies.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def run_multiply() -> None:
        plgpu.set_max_registers(compute_registers(WARPGROUPS, 1, feeder_registers), action="increase")
        multiply()
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def run_feed() -> None:
        plgpu.set_max_registers(feeder_registers, action="decrease")
        feed()


def accumulate(
    shape: tuple[int, int],
    before: jax.Array,
    steps: jax.Array | int,
    operands: Callable[[jax.Array], tuple[Ref, Ref]],
    ready: Ref,
    free: Ref,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Accumulates the products of some steps of the ring.

    Args:
      shape: of the accumulator.
      before: steps before these.
      steps: number of steps.
      operands: from the slot of a step, its two operands.
      ready, free: barriers of the slots.
      dtype: of the sums.
    """
    stages = free.shape[0]

    def walk(acc: Ref) -> jax.Array:
        def step(i: jax.Array, _: None) -> None:
            slot = rem(before + i, stages)
            plgpu.barrier_wait(ready.at[slot])
            plgpu.wgmma(acc, *operands(slot))
            # All products but the one of this step are done, so the slot of the previous step is free.
            plgpu.wgmma_wait(1)
            pl.when(i > 0)(lambda: plgpu.barrier_arrive(free.at[rem(before + i - 1, stages)]))

        lax.fori_loop(0, steps, step, None)
        plgpu.wgmma_wait(0)
        pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[rem(before + steps - 1, stages)]))
        return acc[...]

    result: jax.Array = pl.run_scoped(walk, plgpu.ACC(shape, jnp.dtype(dtype)))
    return result


def wait_for_rest(total: jax.Array, free: Ref) -> None:
    """Waits until the last steps of the ring, of `total`, are read: no barrier may be left that was not waited for."""
    stages = free.shape[0]
    last = jnp.maximum(total - stages, 0)
    lax.fori_loop(last, total, lambda n, _: plgpu.barrier_wait(free.at[rem(n, stages)]), None)


def write_rows(values: jax.Array, pieces: Ref, to: Ref, begin: jax.Array) -> None:
    """Writes 64 rows to global memory piece by piece, through shared memory.

    Args:
      values: the rows.
      pieces: buffers in shared memory.
      to: the rows in global memory.
      begin: first column there.
    """
    (count, _, size), width = pieces.shape, to.shape[-1]

    def write(p: int) -> None:
        piece = pieces.at[p % count]
        # Wait until the previous tile, or the previous piece in this buffer, has been read.
        if p == 0 or p >= count:
            plgpu.wait_smem_to_gmem(0 if p == 0 else count - 1, wait_read_only=True)
        piece[...] = values[:, p * size : (p + 1) * size].astype(piece.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(piece, to.at[:, pl.ds(pl.multiple_of(begin + p * size, size), size)])

    for p in range(values.shape[1] // size):
        if width % values.shape[1]:
            pl.when(begin + p * size < width)(functools.partial(write, p))
        else:
            write(p)
