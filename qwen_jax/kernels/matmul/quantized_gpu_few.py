"""Products of a few rows with a quantised matrix on Hopper GPUs, bound by the bandwidth at which the codes are read.

As `few_rows_gpu`, but W is the M side of wgmma and x the N side: a tile of codes goes from shared memory to registers,
becomes bfloat16 there, and is the left operand (`quantized_gpu_tiles`). With 1 to 8 rows of x nothing is wasted.

The sum over a group of inputs is exact products added in float32. It is scaled in float32 and added to the sum of all
groups. This is more exact than "plain", which rounds every dequantised weight to bfloat16. Zero points are subtracted
from the codes, which is exact; minima multiply the sum of x over the group.

Four warpgroups multiply and one copies. Of the four, some have different outputs and some different inputs, whose sums
are added through shared memory. The steps of all tiles of outputs form one list, of which each thread block takes an
equal share, wherever that begins and ends. A tile that several blocks share has several partial results; XLA fuses
their sum into what follows.

One row may come as digits of 8 bits (`quantized_gpu_digits`): then integer codes are multiplied as integers.

A grouped product has several matrices and bundles of rows, each of which is multiplied by one of them: the list has the
tiles of each bundle, one bundle after the other. How many there are is known only on the device, so that the share is
computed there, and codes of matrices without rows are never read.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.hopper import allow_next_kernel, load, tiled, wait_for_previous_kernel
from qwen_jax.kernels.gpu.tiles import (
    FEEDER_REGISTERS,
    PER_COLUMN,
    ROWS,
    WGMMA,
    across,
    compute_registers,
    kernel,
    rem,
    zeros,
)
from qwen_jax.kernels.matmul import quantized_gpu_digits as digits
from qwen_jax.kernels.matmul.quantized_gpu_tiles import (
    TILE,
    Operands,
    as_float32,
    bits,
    inputs_at_once,
    load_codes,
    load_column,
    operand,
    store_transposed,
)
from qwen_jax.kernels.matmul.quantized_gpu_tiling import WARPGROUPS, Tiling, choose_tiling, width
from qwen_jax.kernels.types import Ref

_SUM_COLUMNS = 64  # Columns of sums that are not scaled yet, together.


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block.

    Attributes:
      w_smem, x_smem: rings of codes and of x.
      sums_smem: the sums of all warpgroups but the first with the same outputs, [wide - 1, high, 64, columns].
      full, free: a place of the rings has been filled, or read.
      given, taken: the sums have been written, or read.
    """

    w_smem: Ref
    x_smem: Ref
    full: Ref
    free: Ref
    sums_smem: Ref | None = None
    given: Ref | None = None
    taken: Ref | None = None


def product(
    operands: Operands,
    rows: int,
    outputs: int | None = None,
    bundles: int = 0,
    *,
    whole: bool = False,
    early: bool = False,
) -> jax.Array:
    """Runs the kernel.

    Args:
      operands: of a grouped product with `bundles`, x with `width(rows)` rows for each, and matrices that follow
        each other.
      rows: of the product; of a grouped product, of a bundle.
      outputs: of a matrix; by default all.
      bundles: of a grouped product, the fewest that there may be.
      whole: that there are no partial results.
      early: begin to read the codes while the kernel launched before this one still runs, which must not write the
        matrix. Otherwise the two do not overlap.

    Returns:
      Partial products, float32 [parts, rows, N]; if `whole`, the product rounded to bfloat16, [1, rows, N]. Of a
      grouped product, [parts, bundles * width(rows), N], where rows that are not there are undefined.
    """
    (N, K), G, columns = operands.codes.shape, operands.scales.shape[1], width(rows)
    N = outputs or N
    in_digits = operands.x_factors is not None
    p = choose_tiling(rows, N, K, bits(operands.codes.dtype), inputs_at_once(K, G), bundles, whole, in_digits)
    leaves, treedef = jax.tree.flatten(operands)

    def block(*refs: Ref, **scratch: Ref) -> None:
        *inputs, out_ref = refs
        _block(_Memory(**scratch), jax.tree.unflatten(treedef, inputs), out_ref, p, early)

    sums = {}
    if p.wide > 1:
        sums = {
            "sums_smem": plgpu.SMEM((p.wide - 1, p.high, ROWS, columns), jnp.float32),
            "given": plgpu.Barrier(num_arrivals=p.high * (p.wide - 1)),
            "taken": plgpu.Barrier(num_arrivals=p.high),
        }
    launch = kernel(
        "quantized_few_rows",
        block,
        (
            jax.ShapeDtypeStruct(
                (p.parts, operands.x.shape[0] if bundles else rows, N), jnp.bfloat16 if whole else jnp.float32
            ),
        ),
        {"block": p.blocks},
        WARPGROUPS + 1,
        w_smem=tiled((p.stages, ROWS * p.high, p.chunk * p.wide), operands.codes.dtype, math.gcd(K, TILE)),
        x_smem=tiled(
            (p.stages, columns, p.chunk * p.wide),
            operands.x.dtype,
            min(inputs_at_once(K, G), TILE if in_digits else 64),
        ),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=p.stages),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=p.stages),
        **sums,
    )
    out: jax.Array = launch(*leaves)[0]
    return out


class _Place(NamedTuple):
    """A step in the list of steps.

    Attributes:
      tile: of outputs, of a matrix.
      step: of the tile.
      bundle: of a grouped product.
      first_row: of a grouped product, the first row of the bundle's matrix.
    """

    tile: jax.Array
    step: jax.Array
    bundle: jax.Array | None = None
    first_row: jax.Array | None = None


class _Step(NamedTuple):
    """Per-row numbers of a step, read one step ahead: for each group, scales, zero points and minima as they are."""

    scales: tuple[jax.Array, ...]
    zeros: tuple[jax.Array, ...] = ()
    mins: tuple[jax.Array, ...] = ()


_Carry = tuple[jax.Array, _Place, _Step]


def _block(memory: _Memory, operands: Operands, out_ref: Ref, p: Tiling, early: bool) -> None:
    """The program of a thread block: its share of the list of steps."""
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    N, K, G, bundles = out_ref.shape[2], operands.codes.shape[1], operands.scales.shape[1], operands.bundles
    columns, stages, group = memory.x_smem.shape[1], memory.full.shape[0], K // G
    at_once, in_digits = inputs_at_once(K, G), operands.x_factors is not None
    # Products that run at the same time, as many as there are registers for their sums.
    together = 1 if in_digits and operands.zeros is not None else max(1, _SUM_COLUMNS // columns)
    tiles, steps = -(-N // (ROWS * p.high)), -(-K // (p.chunk * p.wide))
    total: jax.Array | int = tiles * steps
    share: jax.Array | int = p.share
    if bundles is not None:
        total = bundles.used[0] * (tiles * steps)
        # With one part for each tile, shares are whole tiles.
        unit = steps if p.parts == 1 else 1
        even = lax.div(total + (p.blocks * unit - 1), jnp.int32(p.blocks * unit)) * unit
        share = jnp.maximum(even, p.share)
    begin = block * share
    count = jnp.minimum(share, total - begin)

    def matrix_row(bundle: jax.Array) -> jax.Array:
        return bundles.matrices[jnp.minimum(bundle, bundles.matrices.shape[0] - 1)] * N

    def first_place() -> _Place:
        tile = lax.div(begin, jnp.int32(steps))
        step = begin - tile * steps
        if bundles is None:
            return _Place(tile, step)
        bundle = lax.div(tile, jnp.int32(tiles))
        return _Place(tile - bundle * tiles, step, bundle, matrix_row(bundle))

    def following(place: _Place) -> _Place:
        last = place.step == steps - 1
        tile, step = jnp.where(last, place.tile + 1, place.tile), jnp.where(last, 0, place.step + 1)
        if place.bundle is None:
            return _Place(tile, step)
        # The number of the matrix is read only for another bundle: who needs it waits for it.
        end = tile == tiles
        bundle = jnp.where(end, place.bundle + 1, place.bundle)
        first_row = lax.cond(end, lambda: matrix_row(bundle), lambda: place.first_row)
        return _Place(jnp.where(end, 0, tile), step, bundle, first_row)

    def x_rows(place: _Place) -> Any:
        """The rows of x, and of the result, of a step."""
        if place.bundle is None:
            return slice(None)
        return pl.ds(pl.multiple_of(place.bundle * columns, 8), columns)

    def feed() -> None:
        """The program of the warpgroup that copies."""

        def inputs_of(step: jax.Array) -> Any:
            return pl.ds(pl.multiple_of(step * (p.chunk * p.wide), TILE), p.chunk * p.wide)

        def fetch_codes(i: jax.Array, place: _Place) -> _Place:
            slot = rem(i, stages)
            # The last tile of a matrix may have rows of the next one, which are not used.
            row = place.tile * (ROWS * p.high) + (0 if place.first_row is None else place.first_row)
            codes = operands.codes.at[pl.ds(pl.multiple_of(row, ROWS), ROWS * p.high), inputs_of(place.step)]
            plgpu.copy_gmem_to_smem(codes, memory.w_smem.at[slot], memory.full.at[slot])
            return following(place)

        def fetch_x(i: jax.Array, place: _Place) -> _Place:
            slot = rem(i, stages)
            # Fewer rows than columns are copied as if there were all.
            of_x = pl.ds(block * 0, columns) if place.bundle is None else x_rows(place)
            x = operands.x.at[of_x, inputs_of(place.step)]
            plgpu.copy_gmem_to_smem(x, memory.x_smem.at[slot], memory.full.at[slot])
            return following(place)

        def fetch(i: jax.Array, place: _Place) -> _Place:
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(memory.free.at[rem(i, stages)]))
            fetch_codes(i, place)
            return fetch_x(i, place)

        place, ahead = first_place(), jnp.int32(0)
        if early:
            # Codes for all places of the ring; x, once the kernel before has written it. Nothing else depends on that
            # kernel: results are written after x has arrived.
            ahead = jnp.minimum(count, stages)
            lax.fori_loop(0, ahead, fetch_codes, place)
            wait_for_previous_kernel()
            allow_next_kernel()
            place = lax.fori_loop(0, ahead, fetch_x, place)
        lax.fori_loop(ahead, count, fetch, place)
        # No barrier may be left that was not waited for.
        last = jnp.maximum(count - stages, 0)
        lax.fori_loop(last, count, lambda n, _: plgpu.barrier_wait(memory.free.at[rem(n, stages)]), None)

    def multiply() -> None:
        """The program of a warpgroup that multiplies."""
        level = lax.div(warpgroup, jnp.int32(p.wide))
        side = warpgroup - level * p.wide
        own_rows = pl.ds(pl.multiple_of(level * ROWS, ROWS), ROWS)
        own_inputs = pl.ds(pl.multiple_of(side * p.chunk, TILE), p.chunk)

        ones = digits.ones() if in_digits and operands.zeros is not None else None

        def row_of(tile: jax.Array) -> jax.Array:
            # The last tile may have fewer rows: then some warpgroups have none, and write nothing.
            return pl.multiple_of(jnp.minimum((tile * p.high + level) * ROWS, N - ROWS), ROWS)

        def matrix_row_of(place: _Place, row: jax.Array) -> jax.Array:
            """The place of a row of a matrix among those of all matrices."""
            return row if place.first_row is None else pl.multiple_of(row + place.first_row, ROWS)

        def group_of(step: jax.Array, j: int) -> jax.Array:
            return jnp.minimum(lax.div((step * p.wide + side) * p.chunk + j * at_once, jnp.int32(group)), G - 1)

        def per_row(place: _Place) -> _Step:
            """Scales, zero points and minima of a step."""
            tile = place.tile if place.bundle is not None else jnp.minimum(place.tile, tiles - 1)
            row = matrix_row_of(place, row_of(tile))

            def of(ref: Ref | None) -> tuple[jax.Array, ...]:
                if ref is None:
                    return ()
                return tuple(load_column(ref, row, group_of(place.step, j)) for j in range(p.chunk // at_once))

            return _Step(of(operands.scales), of(operands.zeros), of(operands.mins))

        def one(i: jax.Array, carry: _Carry) -> _Carry:
            acc, place, numbers = carry
            step, slot = place.step, rem(i, stages)
            row, after = matrix_row_of(place, row_of(place.tile)), following(place)
            plgpu.barrier_wait(memory.full.at[slot])
            tile = memory.w_smem.at[slot, own_rows, own_inputs]
            codes = None if in_digits and bits(tile.dtype) == 8 else load_codes(tile)
            # Read one step ahead; the numbers arrive while this step is computed.
            ahead = per_row(after)

            def now(columns: tuple[jax.Array, ...], ref: Ref, j: int) -> jax.Array:
                return as_float32(columns[j], ref, row, group_of(step, j))

            def x_of(j: int) -> Ref:
                inputs = pl.ds(pl.multiple_of(side * p.chunk + j * at_once, at_once), at_once)
                return memory.x_smem.at[slot, :, inputs].T

            def sums(first: int, *accs: Ref) -> tuple[jax.Array, ...]:
                assert codes is not None
                for j, acc in enumerate(accs, first):
                    z = now(numbers.zeros, operands.zeros, j) if numbers.zeros else None
                    plgpu.wgmma(acc, operand(codes, j * at_once, at_once, z), x_of(j))
                plgpu.wgmma_wait(0)
                return tuple(acc[...] for acc in accs)

            def integer_sums(first: int, *accs: Ref) -> tuple[jax.Array, ...]:
                """Sums of codes, or of 16 times int4 codes, times digits, minus the zero points'."""
                unit = 1 if codes is None else 16
                of_codes, of_x = accs[:number], accs[number:]
                factors = [x_factor(j) / unit for j in range(first, first + number)]
                for j, acc in enumerate(of_codes, first):
                    here = tile.at[:, pl.ds(j * at_once, at_once)]
                    plgpu.wgmma(acc, here if codes is None else digits.operand(codes, j * at_once), x_of(j))
                    if numbers.zeros:
                        # A matrix of ones gives each thread the sums of the digits.
                        plgpu.wgmma(of_x[j - first], ones, x_of(j))
                plgpu.wgmma_wait(0)
                found = []
                for j, acc in enumerate(of_codes, first):
                    y = acc[...].astype(jnp.float32)
                    if numbers.zeros:
                        z = now(numbers.zeros, operands.zeros, j) * unit
                        y = y - across(z, shape) * of_x[j - first][...].astype(jnp.float32)
                    found.append(y * factors[j - first])
                return tuple(found)

            def x_factor(j: int) -> jax.Array:
                at = (step * p.wide + side) * (p.chunk // at_once) + j
                return operands.x_factors[jnp.minimum(at, K // at_once - 1)]

            shape = (ROWS, columns)
            # A tile begins with zeros.
            acc = lax.cond(step == 0, lambda _: zeros(shape, WGMMA), lambda acc: acc, acc)
            number = min(together, p.chunk // at_once)
            for first in range(0, p.chunk // at_once, together):
                accs = [plgpu.ACC(shape, jnp.int32 if in_digits else jnp.float32)] * number
                if in_digits:
                    found = pl.run_scoped(functools.partial(integer_sums, first), *accs * (2 if numbers.zeros else 1))
                else:
                    found = pl.run_scoped(functools.partial(sums, first), *accs)
                for j, y in enumerate(found, first):
                    acc = acc + y * across(now(numbers.scales, operands.scales, j), shape)
                    if operands.x_sums is not None:
                        # Inputs beyond the end belong to no group.
                        there = ((step * p.wide + side) * p.chunk + j * at_once < K).astype(jnp.float32)
                        x_sum = operands.x_sums.at[group_of(step, j), x_rows(place)]
                        x_sum = load(x_sum, PER_COLUMN) * there
                        acc = acc - across(numbers.mins[j], shape) * across(x_sum, shape, 1)
            plgpu.barrier_arrive(memory.free.at[slot])
            pl.when((step == steps - 1) | (i == count - 1))(lambda: write(acc, place))
            return acc, after, ahead

        def write(acc: jax.Array, place: _Place) -> None:
            """Adds the sums of the warpgroups with the same outputs, and writes the part of this block."""
            if p.wide == 1:
                store(acc, place)
                return
            assert memory.sums_smem is not None
            assert memory.given is not None
            assert memory.taken is not None
            sums_smem, given, taken = memory.sums_smem, memory.given, memory.taken

            @pl.when(side > 0)
            def give() -> None:
                sums_smem[side - 1, level] = acc
                plgpu.commit_smem()
                plgpu.barrier_arrive(given)
                plgpu.barrier_wait(taken)

            @pl.when(side == 0)
            def add() -> None:
                plgpu.barrier_wait(given)
                total = acc
                for other in range(p.wide - 1):
                    total = total + load(sums_smem.at[other, level], WGMMA)
                plgpu.barrier_arrive(taken)
                store(total, place)

        def store(total: jax.Array, place: _Place) -> None:
            tile, step, bundle, _ = place
            earlier = tile if bundle is None else tile + bundle * tiles
            part = block - lax.div(earlier * steps, jnp.int32(share))
            total = digits.combined(total) if in_digits else total
            row = row_of(tile)
            rows, count_ref = x_rows(place), None if bundle is None else bundles.counts.at[pl.ds(bundle, 1)]

            @pl.when((tile * p.high + level) * ROWS < N)
            def store_rows() -> None:
                store_transposed(out_ref.at[part, rows, pl.ds(row, ROWS)], total.astype(out_ref.dtype), count_ref)
                # The block with the end of the tile also writes zeros for parts that do not exist.
                if p.parts > 1:
                    nothing = zeros(total.shape, WGMMA).astype(out_ref.dtype)

                    def clear(other: jax.Array, _: None) -> None:
                        store_transposed(out_ref.at[other, rows, pl.ds(row, ROWS)], nothing, count_ref)

                    lax.fori_loop(part + 1, jnp.where(step == steps - 1, p.parts, part + 1), clear, None)

        place = first_place()
        numbers = per_row(place)
        if early and in_digits:
            wait_for_previous_kernel()  # It writes the factors.
        lax.fori_loop(0, count, one, (zeros((ROWS, columns), WGMMA), place, numbers))

    @pl.when(warpgroup < WARPGROUPS)
    def run_multiply() -> None:
        plgpu.set_max_registers(compute_registers(WARPGROUPS), action="increase")
        multiply()

    @pl.when(warpgroup == WARPGROUPS)
    def run_feed() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        feed()
