"""Parts of the layer kernels for one token: matrix-vector products, their stream of weights, and grid barriers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu.device import SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import load, run_on_one_thread, tiled
from qwen_jax.kernels.gpu.tiles import PER_COLUMN, WGMMA
from qwen_jax.kernels.types import Layout, Ref

CHUNK = 128
"""Columns of a weight matrix in one step. Hidden and feed-forward size and heads x head_dim must be multiples of it."""
MAX_TILE = 80
"""The maximal number of rows of a weight matrix in one accumulator."""
_SMEM_BYTES = SHARED_BYTES - 3328
"""Shared memory without barriers, one kilobyte of alignment, and two kilobytes that reductions use."""


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix-vector product, and how the thread blocks share it.

    Attributes:
      outputs: rows of each matrix.
      inputs: columns.
      gates: 1, or 2 for SwiGLU.
      tile: rows of each matrix in one accumulator.
      splits: parts of the columns, each with its own partial result.
      experts: how many matrices of a stack are multiplied, each with its own input and result.
      after: items of another product that are distributed together with these, before them.
    """

    outputs: int
    inputs: int
    gates: int
    tile: int
    splits: int
    experts: int = 1
    after: int = 0

    @property
    def items(self) -> int:
        """Tiles times splits of all experts: what is distributed over the blocks."""
        return -(-self.outputs // self.tile) * self.splits * self.experts

    @property
    def longest(self) -> int:
        """Columns of the longest split."""
        return -(-self.inputs // CHUNK // self.splits) * CHUNK

    @property
    def microseconds(self) -> float:
        """Estimated time of an item: the bytes of each step at 34 GB/s per block, or a fixed cost."""
        step = max(self.gates * self.tile * CHUNK * 2 / 34e3, 0.15)
        return self.longest // CHUNK * step + 0.3


@functools.cache
def divide_product(outputs: int, inputs: int, gates: int, may_split: bool, blocks: int) -> Product:
    """Divides a product among thread blocks so that the slowest one finishes as early as possible.

    Args:
      outputs, inputs: size of the matrix.
      gates: 1 or 2.
      may_split: whether partial results are allowed.
      blocks: thread blocks that share the product.

    Raises:
      InputError: sizes that are not supported.
    """
    if outputs % 8 or inputs % CHUNK or outputs < 8:
        raise InputError(
            f"A layer kernel needs outputs that are a multiple of 8 and inputs that are a multiple of {CHUNK}; got "
            f"{outputs} x {inputs}."
        )
    best: tuple[float, Product] | None = None
    steps = inputs // CHUNK
    for splits in (1, 2, 4, 8) if may_split else (1,):
        for tile in range(8, min(MAX_TILE, outputs) + 1, 8):
            product = Product(outputs, inputs, gates, tile, splits)
            waves = -(-product.items // blocks)
            if splits > steps or (splits > 1 and waves > 1):
                continue
            # Every block reads the partial results.
            cost = waves * product.microseconds + (splits - 1) * outputs * 4 / 60e3
            if best is None or cost < best[0]:
                best = cost, product
    assert best is not None
    return best[1]


def strided(length: int) -> Layout:
    """The layout of a vector over 128 threads, in the longest pieces that divide it."""
    vec = next(v for v in (8, 4, 2, 1) if length % (128 * v) == 0)
    return plgpu.Layout.WG_STRIDED((length,), vec_size=vec)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def record_round(_: Any, counter_ref: Any, round_smem: Any) -> None:
    """Records the current round of the counter for `grid_barrier`. It cannot end before this block has arrived."""
    _run_on_counter(
        "ld.relaxed.gpu.global.u32 seen, [$0]; and.b32 seen, seen, 0xfffffc00; st.shared.u32 [$1], seen;",
        counter_ref,
        round_smem,
    )


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def grid_barrier(_: Any, counter_ref: Any, round_smem: Any) -> None:
    """A barrier of all thread blocks. What a block wrote before it is visible to all blocks after it.

    A round of the counter is 1,024: each block adds 1, and block 0 the rest. The counter never needs to be reset, and
    2^32 is a whole number of rounds.
    """
    _run_on_counter(_ARRIVE + _WAIT, counter_ref, round_smem)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def arrive(_: Any, counter_ref: Any, round_smem: Any) -> None:
    """The first half of `grid_barrier`: signals that this block has arrived."""
    _run_on_counter(_ARRIVE, counter_ref, round_smem)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def wait_for_all_blocks(_: Any, counter_ref: Any, round_smem: Any) -> None:
    """The second half of `grid_barrier`, for any warpgroup of a block that has arrived."""
    _run_on_counter("ld.shared.u32 target, [$1];" + _WAIT, counter_ref, round_smem)


_ARRIVE = """
        red.release.gpu.global.add.u32 [$0], $2;
        ld.shared.u32 target, [$1];
        add.u32 target, target, 1024;
        st.shared.u32 [$1], target;"""
_WAIT = """
        again:
        ld.acquire.gpu.global.u32 seen, [$0];
        sub.u32 seen, seen, target;
        setp.lt.s32 behind, seen, 0;
        @behind bra again;
        """


def _run_on_counter(code: str, counter_ref: Any, round_smem: Any) -> None:
    """Runs PTX on one thread: $0 is the counter, $1 the recorded round, $2 what this block adds to a round."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, gpu
    from jax.experimental.mosaic.gpu import utils

    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    is_first = arith.cmpi(arith.CmpIPredicate.eq, gpu.block_id(gpu.Dimension.x), utils.c(0, index))
    rest = arith.subi(utils.c(1025, index), gpu.grid_dim(gpu.Dimension.x))
    own = arith.index_cast(i32, arith.select(is_first, rest, utils.c(1, index)))
    run_on_one_thread(".reg .pred behind; .reg .u32 seen, target; " + code, counter_ref, round_smem, own)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))
def _store_first_row(_: Any, ref: Any, rows: Any) -> None:
    """Writes the first of 64 equal rows: the four threads that hold it store two columns of every eight each."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, vector
    from jax.experimental.mosaic.gpu import utils

    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    # The registers alternate between rows 0 to 7 and rows 8 to 15 of eight columns.
    pairs = rows.registers.flatten()[::2]
    thread = utils.thread_idx()
    with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, utils.c(4, i32))):
        column = arith.index_cast(index, arith.muli(thread, utils.c(2, i32)))
        to = ir.MemRefType(ref.type).element_type
        for j, pair in enumerate(pairs):
            if to != rows.mlir_dtype:
                pair = arith.truncf(ir.VectorType.get((2,), to), pair)
            vector.store(pair, ref, [arith.addi(column, utils.c(8 * j, index))])


def result_of(product: Product) -> jax.ShapeDtypeStruct:
    """The array in which blocks exchange a result: the inner vector of the feed-forward layer, or partial results."""
    shape = (product.splits * product.experts * product.outputs,)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16 if product.gates == 2 else jnp.float32)


class Memory(NamedTuple):
    """Shared memory and barriers of a thread block of a layer kernel.

    Attributes:
      w_smem: ring of weight tiles.
      x_smem: input of the current product, and behind it small notes (see `launch`).
      stream_smem: the residual stream.
      full, empty: a slot of the ring has been filled, or read.
      asked, answered: in MoE layers, the barriers between the two warpgroups about the selected experts.
    """

    w_smem: Ref
    x_smem: Ref
    stream_smem: Ref
    full: Ref
    empty: Ref
    asked: Ref | None = None
    answered: Ref | None = None


def launch(
    body: Callable[..., None],
    products: Sequence[Product],
    D: int,
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    blocks: int,
    name: str,
    notes: int = 0,
    **more: object,
) -> Callable[..., Any]:
    """A kernel with one thread block per multiprocessor, each with a multiplying and a copying warpgroup.

    Args:
      body: the program of a thread block. It gets the references to operands and results, and the fields of `Memory`
        by name.
      products: the products of the kernel.
      D: hidden size.
      out_type: of the results.
      blocks: multiprocessors of the device.
      name: of the kernel.
      notes: numbers to keep at the end of `x_smem`.
      more: further shared memory and barriers.

    Raises:
      InputError: the vectors do not fit in shared memory.
    """
    tile = max(p.tile for p in products)
    x_size = max(D, *(p.longest for p in products))
    stages = min((_SMEM_BYTES - (x_size + D + notes) * 2) // (tile * CHUNK * 2), 16)
    if stages < 4:
        raise InputError(f"Vectors of {x_size} numbers do not fit in a multiprocessor's shared memory.")
    return pl.kernel(
        lambda *refs: pl.run_scoped(
            functools.partial(body, *refs),
            w_smem=tiled((stages, tile, CHUNK), jnp.bfloat16),
            # At its end are the 4 bytes of `record_round`: a separate buffer would take a kilobyte.
            x_smem=plgpu.SMEM((x_size + notes + 8,), jnp.bfloat16),
            stream_smem=plgpu.SMEM((D,), jnp.bfloat16),
            full=plgpu.Barrier(num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages),
            **more,
            collective_axes="role",
        ),
        out_type=out_type,
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",), num_threads=2, thread_name="role"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        name=name,
    )


def round_memory(x_smem: Ref) -> Ref:
    """The part of `launch`'s `x_smem` where `record_round` keeps the round."""
    place: Ref = x_smem.at[pl.ds(x_smem.shape[0] - 8, 8)]
    return place


def check(fits: bool, arrays: Sequence[jax.Array]) -> None:
    """Raises `InputError` for arguments that a layer kernel does not support.

    Args:
      fits: whether the shapes are right.
      arrays: all vectors and matrices.
    """
    if not fits or any(x.dtype != jnp.bfloat16 for x in arrays):
        got = ", ".join(f"{x.dtype} {x.shape}" for x in arrays)
        raise InputError(f"A layer kernel needs bfloat16 vectors and matrices of one model's sizes; got {got}.")


class Item(NamedTuple):
    """A part of a product: one tile of rows and one split of the columns.

    Attributes:
      row: first row in the matrix.
      part: index of the expert and the split.
      start, steps: first step of the columns and number of steps.
    """

    row: jax.Array
    part: jax.Array
    start: jax.Array
    steps: jax.Array


Share = tuple[jax.Array, Callable[[jax.Array], Item]]
"""How many items of a product a block has, and a function that gives the i-th of them."""


def share(product: Product, blocks: int) -> Share:
    """The items of this thread block."""
    block = lax.axis_index("block")
    if product.after % blocks:
        block = lax.rem(block + (blocks - product.after % blocks), jnp.int32(blocks))
    base, extra = divmod(product.inputs // CHUNK, product.splits)
    of_each = product.items // product.experts

    def item(i: jax.Array) -> Item:
        which, expert = block + i * blocks, None
        if product.experts > 1:
            expert, which = lax.div(which, jnp.int32(of_each)), lax.rem(which, jnp.int32(of_each))
        row, split = lax.div(which, jnp.int32(product.splits)) * product.tile, lax.rem(which, jnp.int32(product.splits))
        # The last tile ends with the matrix, so it may overlap the one before: some rows are computed twice, with the
        # same result.
        row = pl.multiple_of(lax.min(row, jnp.int32(product.outputs - product.tile)), 8)
        steps = base + (split < extra).astype(jnp.int32)
        part = split if expert is None else expert * product.splits + split
        return Item(row, part, split * base + lax.min(split, jnp.int32(extra)), steps)

    return lax.div(jnp.int32(product.items + blocks - 1) - block, jnp.int32(blocks)), item


def fetch(
    product: Product,
    own: Share,
    w_ref: Ref,
    n: jax.Array,
    memory: Memory,
    first_row: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Copies the weights of one product: every step of every item, as slots become free.

    Args:
      product: what to copy.
      own: the share of this block.
      w_ref: the matrix, or all matrices of a stack below one another.
      n: slots filled so far.
      memory: the ring of slots.
      first_row: from the part of an item, the first row of its matrix.

    Returns:
      Slots filled after that.
    """
    w_smem, full, empty = memory.w_smem, memory.full, memory.empty
    stages, (count, item) = w_smem.shape[0], own

    def one_item(i: jax.Array, n: jax.Array) -> jax.Array:
        row, part, start, steps = item(i)
        if first_row is not None:
            row = pl.multiple_of(first_row(part) + row, 8)

        def one_step(j: jax.Array, n: jax.Array) -> jax.Array:
            for g in range(product.gates):
                slot = lax.rem(n, jnp.int32(stages))
                pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, empty.at[slot]))
                rows = pl.ds(g * product.outputs + row, product.tile)
                tile = w_smem.at[slot, pl.ds(0, product.tile)]
                plgpu.copy_gmem_to_smem(w_ref.at[rows, pl.ds((start + j) * CHUNK, CHUNK)], tile, full.at[slot])
                n = n + 1
            return n

        return lax.fori_loop(0, steps, one_step, n)

    return lax.fori_loop(0, count, one_item, n)


def multiply(
    product: Product,
    own: Share,
    out_ref: Ref,
    n: jax.Array,
    memory: Memory,
    shift: jax.Array | Callable[[jax.Array, jax.Array], jax.Array],
    scale: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Multiplies by the weights that `fetch` copies.

    Args:
      product, own, n, memory: as in `fetch`; the input is in `x_smem`.
      out_ref: for the results; partial ones one after another.
      shift: the column of the matrix at which `x_smem` begins. Or a function that, given the part and the first column
        of an item, loads its input into `x_smem` and returns that column.
      scale: from the part of an item, what its result is multiplied by.

    Returns:
      Slots filled after that.
    """
    w_smem, x_smem, full, empty = memory.w_smem, memory.x_smem, memory.full, memory.empty
    stages, f32, (count, item) = w_smem.shape[0], jnp.float32, own

    def one_item(i: jax.Array, n: jax.Array) -> jax.Array:
        row, part, start, steps = item(i)
        begin = shift(part, start * CHUNK) if callable(shift) else shift

        # One accumulator for each gate. A slot is free one step after its product was started.
        def accumulate(*accs: Ref) -> tuple[jax.Array, ...]:
            def slots(j: jax.Array) -> list[jax.Array]:
                return [lax.rem(n + j * product.gates + g, jnp.int32(stages)) for g in range(product.gates)]

            def release(j: jax.Array) -> None:
                for slot in slots(j):
                    plgpu.barrier_arrive(empty.at[slot])

            def one_step(j: jax.Array, _: None) -> None:
                at = pl.multiple_of((start + j) * CHUNK - begin, CHUNK)
                x = load(x_smem.at[pl.ds(at, CHUNK)], PER_COLUMN)
                x = lax.broadcast_in_dim(x, (64, CHUNK), [1])
                for acc, slot in zip(accs, slots(j), strict=True):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, x, w_smem.at[slot, pl.ds(0, product.tile)].T)
                # All products but those of this step are done.
                plgpu.wgmma_wait(product.gates)
                pl.when(j > 0)(lambda: release(j - 1))

            lax.fori_loop(0, steps, one_step, None)
            plgpu.wgmma_wait(0)
            release(steps - 1)
            return tuple(acc[...] for acc in accs)

        accs = pl.run_scoped(accumulate, *[plgpu.ACC((64, product.tile), f32)] * product.gates)
        y = accs[0] if product.gates == 1 else accs[0] / (1 + jnp.exp(-accs[0])) * accs[1]
        if scale is not None:
            y = y * scale(part)
        # All rows are equal; one of them is written.
        at = pl.multiple_of(part * product.outputs + row, 8)
        _store_first_row(out_ref.at[pl.ds(at, product.tile)], y)
        return n + steps * product.gates

    return lax.fori_loop(0, count, one_item, n)


def total(parts_ref: Ref, parts: int, layout: Layout) -> jax.Array:
    """The sum of partial results, rounded to bfloat16."""
    size = parts_ref.shape[0] // parts
    added = [load(parts_ref.at[pl.ds(s * size, size)], layout) for s in range(parts)]
    return functools.reduce(jnp.add, added).astype(jnp.bfloat16)


def add_and_norm(
    stream: jax.Array, norm: jax.Array, eps: float, added: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with something added, and its RMSNorm."""
    D, f32 = stream.shape[0], jnp.float32
    if added is not None:
        stream = (stream.astype(f32) + added.astype(f32)).astype(jnp.bfloat16)
    x = stream.astype(f32)
    x = (x * lax.rsqrt(jnp.sum(x * x) / D + eps)).astype(jnp.bfloat16)
    return stream, (x.astype(f32) * norm.astype(f32)).astype(jnp.bfloat16)
