"""Products of many rows with a quantised matrix on Hopper GPUs: weights are dequantised on the way into the product.

As for few rows, W is the left operand of wgmma, from registers. The weights are dequantised there in float32 and
rounded to bfloat16, the same numbers that "plain" computes, but they never go to memory. While one warpgroup
dequantises, the tensor cores work for the other one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import tiled
from qwen_jax.kernels.gpu.tiles import ROWS, across, kernel, rem
from qwen_jax.kernels.matmul.grouped_gpu_tiles import WARPGROUPS, place, run_roles
from qwen_jax.kernels.matmul.quantized_gpu_tiles import (
    Operands,
    as_float32,
    bits,
    inputs_at_once,
    load_codes,
    load_column,
    operand,
    store_transposed,
)
from qwen_jax.kernels.types import Ref

COLUMNS = 256
"""Rows of x in a tile of the result, the maximum of wgmma."""
_OUTPUTS = ROWS * WARPGROUPS
_CODE_BYTES = 64  # Of an output in one step.
_FEEDER_REGISTERS = 40


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block: rings of codes and x; a place has been filled, or read."""

    w_smem: Ref
    x_smem: Ref
    ready: Ref
    free: Ref


def product(operands: Operands) -> jax.Array:
    """Runs the kernel: float32 [M, N] for x [M, K], where M is a multiple of 8."""
    (M, K), N, dtype = operands.x.shape, operands.codes.shape[0], operands.codes.dtype
    chunk = _CODE_BYTES * 8 // bits(dtype)
    stages = TILE_SHARED_BYTES // (_OUTPUTS * _CODE_BYTES + COLUMNS * chunk * 2)
    tiles = -(-N // _OUTPUTS) * -(-M // COLUMNS)
    given = {name: x for name, x in operands._asdict().items() if x is not None}

    def block(*refs: Ref, **scratch: Ref) -> None:
        *inputs, out_ref = refs
        _block(_Memory(**scratch), Operands(**dict(zip(given, inputs, strict=True))), out_ref)

    launch = kernel(
        "quantized_many_rows",
        block,
        (jax.ShapeDtypeStruct((M, N), jnp.float32),),
        {"block": min(tiles, MULTIPROCESSORS)},
        WARPGROUPS + 1,
        w_smem=tiled((stages, _OUTPUTS, chunk), dtype, math.gcd(K, chunk)),
        x_smem=tiled((stages, COLUMNS, chunk), jnp.bfloat16, min(64, inputs_at_once(K, operands.scales.shape[1]))),
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )
    out: jax.Array = launch(*given.values())[0]
    return out


class _Step(NamedTuple):
    """Per-row numbers of a step, read one step ahead: for each product, scales, zero points and minima as they are."""

    scales: tuple[jax.Array, ...]
    zeros: tuple[jax.Array, ...] = ()
    mins: tuple[jax.Array, ...] = ()


def _block(memory: _Memory, operands: Operands, out_ref: Ref) -> None:
    """The program of a thread block: every tile whose number is its own modulo the number of blocks."""
    block, blocks, warpgroup = lax.axis_index("block"), lax.axis_size("block"), lax.axis_index("warpgroup")
    (N, K), G, M = operands.codes.shape, operands.scales.shape[1], out_ref.shape[0]
    stages, chunk, group = memory.free.shape[0], memory.w_smem.shape[2], K // G
    at_once = min(64, inputs_at_once(K, G))
    high, wide, steps = -(-N // _OUTPUTS), -(-M // COLUMNS), -(-K // chunk)
    own_tiles = lax.div(high * wide - block + (blocks - 1), jnp.int32(blocks))

    def tile(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First output and first row of x of the t-th tile of this block."""
        row, column = place(block + t * blocks, jnp.int32(high), wide)
        return pl.multiple_of(row * _OUTPUTS, _OUTPUTS), pl.multiple_of(column * COLUMNS, COLUMNS)

    def feed() -> None:
        """The program of the warpgroup that copies."""

        def one_tile(t: jax.Array, _: None) -> None:
            row, column = tile(t)

            def step(j: jax.Array, _: None) -> None:
                n = t * steps + j
                slot, inputs = rem(n, stages), pl.ds(pl.multiple_of(j * chunk, chunk), chunk)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(memory.free.at[slot]))
                codes = operands.codes.at[pl.ds(row, _OUTPUTS), inputs]
                plgpu.copy_gmem_to_smem(codes, memory.w_smem.at[slot], memory.ready.at[slot])
                x = operands.x.at[pl.ds(column, COLUMNS), inputs]
                plgpu.copy_gmem_to_smem(x, memory.x_smem.at[slot], memory.ready.at[slot])

            lax.fori_loop(0, steps, step, None)

        lax.fori_loop(0, own_tiles, one_tile, None)
        # No barrier may be left that was not waited for.
        total = own_tiles * steps
        last = jnp.maximum(total - stages, 0)
        lax.fori_loop(last, total, lambda n, _: plgpu.barrier_wait(memory.free.at[rem(n, stages)]), None)

    def multiply() -> None:
        """The program of a warpgroup that multiplies."""
        own_rows = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
        shape = (ROWS, at_once)

        def group_of(step: jax.Array | int, j: int) -> jax.Array:
            return jnp.minimum(lax.div(step * chunk + j * at_once, jnp.int32(group)), G - 1)

        def one_tile(t: jax.Array, _: None) -> None:
            row, column = tile(t)
            first = row + warpgroup * ROWS
            # The last tile may have no rows for a warpgroup, which then writes nothing.
            row = pl.multiple_of(jnp.minimum(first, N - ROWS), ROWS)

            def per_row(step: jax.Array) -> _Step:
                def of(ref: Ref | None) -> tuple[jax.Array, ...]:
                    if ref is None:
                        return ()
                    return tuple(load_column(ref, row, group_of(step, j)) for j in range(chunk // at_once))

                return _Step(of(operands.scales), of(operands.zeros), of(operands.mins))

            def accumulate(acc: Ref) -> jax.Array:
                def step(i: jax.Array, numbers: _Step) -> _Step:
                    slot = rem(t * steps + i, stages)

                    def now(columns: tuple[jax.Array, ...], ref: Ref, j: int) -> jax.Array:
                        return as_float32(columns[j], ref, row, group_of(i, j))

                    plgpu.barrier_wait(memory.ready.at[slot])
                    codes = load_codes(memory.w_smem.at[slot, own_rows])
                    # Read one step ahead; the numbers arrive while this step is computed.
                    ahead = per_row(i + 1)
                    for j in range(chunk // at_once):
                        z = now(numbers.zeros, operands.zeros, j) if numbers.zeros else None
                        w = operand(codes, j * at_once, at_once, z).astype(jnp.float32)
                        w = w * across(now(numbers.scales, operands.scales, j), shape)
                        if numbers.mins:
                            w = w - across(numbers.mins[j], shape)
                        x = memory.x_smem.at[slot, :, pl.ds(j * at_once, at_once)]
                        # The next weights are dequantised while this product runs.
                        plgpu.wgmma(acc, w.astype(jnp.bfloat16), x.T)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(memory.free.at[slot])
                    return ahead

                lax.fori_loop(0, steps, step, per_row(jnp.int32(0)))
                return acc[...]

            y = pl.run_scoped(accumulate, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            size = math.gcd(M, 64)
            for at in range(0, COLUMNS, size):
                here = pl.ds(pl.multiple_of(column + at, size), size), pl.ds(row, ROWS)

                def store(here: tuple[Any, ...] = here, at: int = at) -> None:
                    store_transposed(out_ref.at[here], y[:, at : at + size])

                pl.when((first < N) & (column + at < M))(store)

        lax.fori_loop(0, own_tiles, one_tile, None)

    run_roles(multiply, feed, _FEEDER_REGISTERS)
