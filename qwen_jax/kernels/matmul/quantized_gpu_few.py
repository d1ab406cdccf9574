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

A grouped product has several matrices and bundles of rows, each of which is multiplied by one of them: the list has the
tiles of each bundle, one bundle after the other. How many there are is known only on the device, so that the share is
computed there, and codes of matrices without rows are never read.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
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
from qwen_jax.kernels.types import Ref

MAX_ROWS = 64
WARPGROUPS = 4
_MAX_STAGES = 16
_PARTS_BYTES = 200_000  # The cost of partial results beyond their own bytes.
_SHORT_STEPS = 1.05  # The time of steps of 128 inputs, relative to 256: there is more to do besides converting codes.
_SUM_COLUMNS = 64  # Columns of sums that are not scaled yet, together.


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is divided; a static function of its shape.

    Attributes:
      high: warpgroups with different outputs.
      wide: warpgroups with the same outputs and different inputs.
      chunk: inputs of a step for one warpgroup.
      share: steps of a thread block; of a grouped product, the least.
      blocks: thread blocks.
      parts: partial results, the most blocks that share a tile.
      stages: steps in flight.
    """

    high: int
    wide: int
    chunk: int
    share: int
    blocks: int
    parts: int
    stages: int


def width(rows: int) -> int:
    """Columns of the product for this many rows."""
    return -(-rows // 8) * 8


def _parts(tiles: int, steps: int, share: int) -> int:
    """The most blocks that share a tile."""
    return max((t * steps + steps - 1) // share - t * steps // share + 1 for t in range(min(tiles, share)))


@functools.cache
def choose_tiling(
    rows: int, n: int, k: int, code_bits: int, at_once: int = TILE, bundles: int = 0, whole: bool = False
) -> Tiling:
    """Divides a product of `rows` rows with a matrix [n, k], or a grouped product of bundles of so many rows.

    The estimated cost, in bytes read from memory, is the larger of two: W, including the time of idle multiprocessors,
    and everything that goes from L2 to the multiprocessors at about 2.5 times the speed. Writing and reading partial
    results is added.

    Args:
      rows: 1 to `MAX_ROWS`.
      n, k: outputs, a multiple of 64, and inputs, a multiple of 32.
      code_bits: of a code, 4 or 8.
      at_once: inputs that share a scale; see `inputs_at_once`.
      bundles: of a grouped product the fewest that there may be; 0 for one matrix. If there are more, shares are
        longer. Then they are whole tiles if the least share is, and otherwise no tile has more parts than `parts`.
      whole: that there are no partial results.
    """
    columns, matrices = width(rows), max(bundles, 1)
    weights = matrices * n * k * code_bits // 8
    best: tuple[float, Tiling] | None = None
    for high, chunk in itertools.product((1, 2, 4), (128, 256)):
        wide = WARPGROUPS // high
        tiles, steps = -(-n // (ROWS * high)) * matrices, -(-k // (chunk * wide))
        stage = ROWS * high * chunk * wide * code_bits // 8 + columns * chunk * wide * 2
        stages = min(_MAX_STAGES, (TILE_SHARED_BYTES - (wide - 1) * high * ROWS * columns * 4) // stage)
        # Longer steps, and sums of more warpgroups, need more registers.
        if stages < 2 or (chunk == 256 and (columns > 16 or at_once < TILE)) or (wide == 4 and columns > 32):
            continue
        total = tiles * steps
        least = -(-total // MULTIPROCESSORS)
        # More than the least share makes fewer partial results, and leaves multiprocessors idle.
        for share in range(least, min(total, max(2 * least, steps)) + 1):
            if whole and share % steps:
                continue
            if bundles:
                parts = 1 if share % steps == 0 else -(-(steps - 1) // share) + 1
            else:
                parts = _parts(tiles, steps, share)
            longest = weights / total * share * MULTIPROCESSORS * (_SHORT_STEPS if chunk == 128 else 1)
            x_bytes = tiles * rows * k * 2
            cost = max(longest, 0.4 * (weights + x_bytes)) + _PARTS_BYTES * (parts > 1)
            cost += parts * matrices * rows * n * 4
            if best is None or cost < best[0]:
                blocks = MULTIPROCESSORS if bundles else -(-total // share)
                best = cost, Tiling(high, wide, chunk, share, blocks, parts, stages)
    assert best is not None
    return best[1]


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
    p = choose_tiling(rows, N, K, bits(operands.codes.dtype), inputs_at_once(K, G), bundles, whole)
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
        x_smem=tiled((p.stages, columns, p.chunk * p.wide), jnp.bfloat16, min(inputs_at_once(K, G), 64)),
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
    at_once = inputs_at_once(K, G)
    # Products that run at the same time, as many as there are registers for their sums.
    together = max(1, _SUM_COLUMNS // columns)
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
            codes = load_codes(memory.w_smem.at[slot, own_rows, own_inputs])
            # Read one step ahead; the numbers arrive while this step is computed.
            ahead = per_row(after)

            def now(columns: tuple[jax.Array, ...], ref: Ref, j: int) -> jax.Array:
                return as_float32(columns[j], ref, row, group_of(step, j))

            def sums(first: int, *accs: Ref) -> tuple[jax.Array, ...]:
                for j, acc in enumerate(accs, first):
                    z = now(numbers.zeros, operands.zeros, j) if numbers.zeros else None
                    w = operand(codes, j * at_once, at_once, z)
                    inputs = pl.ds(pl.multiple_of(side * p.chunk + j * at_once, at_once), at_once)
                    plgpu.wgmma(acc, w, memory.x_smem.at[slot, :, inputs].T)
                plgpu.wgmma_wait(0)
                return tuple(acc[...] for acc in accs)

            shape = (ROWS, columns)
            # A tile begins with zeros.
            acc = lax.cond(step == 0, lambda _: zeros(shape, WGMMA), lambda acc: acc, acc)
            for first in range(0, p.chunk // at_once, together):
                accs = [plgpu.ACC(shape, jnp.float32)] * min(together, p.chunk // at_once)
                for j, y in enumerate(pl.run_scoped(functools.partial(sums, first), *accs), first):
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
        lax.fori_loop(0, count, one, (zeros((ROWS, columns), WGMMA), place, per_row(place)))

    @pl.when(warpgroup < WARPGROUPS)
    def run_multiply() -> None:
        plgpu.set_max_registers(compute_registers(WARPGROUPS), action="increase")
        multiply()

    @pl.when(warpgroup == WARPGROUPS)
    def run_feed() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        feed()
