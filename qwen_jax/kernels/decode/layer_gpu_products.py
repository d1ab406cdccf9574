"""What the kernels for one token are made of: products that blocks share, their stream of weights, their meetings."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu.hopper import load, run_on_one_thread, tiled

CHUNK = 128
"""Columns of a weight matrix to one step; hidden size, width and heads x head_dim must be multiples of it."""
MAX_TILE = 80
_SMEM_BYTES = 227 * 1024 - 3328
"""What a block may have, less barriers, one kilobyte of alignment and two in which sums are exchanged."""
_WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix-vector product and how the blocks share it.

    Attributes:
      outputs: rows of each matrix.
      inputs: columns.
      gates: 1, or 2 for SwiGLU.
      tile: rows of each matrix to one accumulator.
      splits: parts of the columns, each with its own partial result.
      experts: how many matrices of a stack are multiplied, each with an input and a result of its own.
      after: items of a product that is dealt out together with this one, before it.
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
        """Tiles times splits of all experts: what is dealt out to the blocks."""
        return -(-self.outputs // self.tile) * self.splits * self.experts

    @property
    def longest(self) -> int:
        """Columns of the longest split."""
        return -(-self.inputs // CHUNK // self.splits) * CHUNK

    @property
    def microseconds(self) -> float:
        """What an item takes, about: of each step the bytes at 34 GB/s a block, or a fixed cost."""
        step = max(self.gates * self.tile * CHUNK * 2 / 34e3, 0.15)
        return self.longest // CHUNK * step + 0.3


@functools.cache
def plan(outputs: int, inputs: int, gates: int, may_split: bool, blocks: int) -> Product:
    """Divides a product so that the block with the most to do has the least.

    Args:
      outputs, inputs: of the matrix.
      gates: 1 or 2.
      may_split: whether partial results are allowed.
      blocks: that share it.

    Raises:
      InputError: sizes that cannot be run.
    """
    if outputs % 8 or inputs % CHUNK or outputs < 8:
        raise InputError(f"A layer kernel needs outputs in eights and inputs in {CHUNK}s; got {outputs} x {inputs}.")
    best: tuple[float, Product] | None = None
    steps = inputs // CHUNK
    for splits in (1, 2, 4, 8) if may_split else (1,):
        for tile in range(8, min(MAX_TILE, outputs) + 1, 8):
            product = Product(outputs, inputs, gates, tile, splits)
            waves = -(-product.items // blocks)
            if splits > steps or (splits > 1 and waves > 1):
                continue
            # Partial results are read by every block.
            cost = waves * product.microseconds + (splits - 1) * outputs * 4 / 60e3
            if best is None or cost < best[0]:
                best = cost, product
    assert best is not None
    return best[1]


def strided(length: int) -> Any:
    """A vector dealt out to 128 threads, in pieces as long as they may be."""
    vec = next(v for v in (8, 4, 2, 1) if length % (128 * v) == 0)
    return plgpu.Layout.WG_STRIDED((length,), vec_size=vec)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def note_round(_: Any, counter_ref: Any, round_smem: Any) -> None:
    """Notes the round that the counter is in, for `meet`. It can't end before this block has come to a meeting."""
    _meeting(
        "ld.relaxed.gpu.global.u32 seen, [$0]; and.b32 seen, seen, 0xfffffc00; st.shared.u32 [$1], seen;",
        counter_ref,
        round_smem,
    )


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def meet(_: Any, counter_ref: Any, round_smem: Any) -> None:
    """Waits until every block has come here; what each wrote before is seen by all after.

    A round of the counter is 1,024: block 0 adds what the others leave over. It never needs resetting, and 2^32 is a
    whole number of rounds.
    """
    _meeting(_COME + _WAIT, counter_ref, round_smem)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def come(_: Any, counter_ref: Any, round_smem: Any) -> None:
    """The first half of `meet`: says that this block has come."""
    _meeting(_COME, counter_ref, round_smem)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
def wait_for_all(_: Any, counter_ref: Any, round_smem: Any) -> None:
    """The second half of `meet`, for any warpgroup of a block that has come."""
    _meeting("ld.shared.u32 target, [$1];" + _WAIT, counter_ref, round_smem)


_COME = """
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


def _meeting(code: str, counter_ref: Any, round_smem: Any) -> None:
    """One thread runs PTX: $0 and $1 are the counter and the noted round, $2 what this block adds to a round."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, gpu
    from jax.experimental.mosaic.gpu import utils

    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    is_first = arith.cmpi(arith.CmpIPredicate.eq, gpu.block_id(gpu.Dimension.x), utils.c(0, index))
    rest = arith.subi(utils.c(1025, index), gpu.grid_dim(gpu.Dimension.x))
    own = arith.index_cast(i32, arith.select(is_first, rest, utils.c(1, index)))
    run_on_one_thread(".reg .pred behind; .reg .u32 seen, target; " + code, counter_ref, round_smem, own)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _WGMMA))
def _store_first_row(_: Any, ref: Any, rows: Any) -> None:
    """Writes one row of equal ones: the four threads that hold it store two columns of every eight."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, vector
    from jax.experimental.mosaic.gpu import utils

    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    # Rows 0 to 7 and 8 to 15 of eight columns take turns.
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
    """Where blocks leave it for one another: the feed-forward layer's inner vector, or partial results."""
    shape = (product.splits * product.experts * product.outputs,)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16 if product.gates == 2 else jnp.float32)


def launch(
    body: Any, products: Sequence[Product], D: int, out_type: Any, blocks: int, name: str, notes: int = 0, **more: Any
) -> Any:
    """A kernel of one block on every multiprocessor, each of a multiplying and a fetching warpgroup.

    Args:
      body: is given the references to arguments and results, and by name those to shared memory: `w_smem`, `x_smem`,
        `stream_smem`, and the barriers `full` and `empty`.
      products: that it goes through.
      D: hidden size.
      out_type: of the results.
      blocks: multiprocessors of the device.
      name: of the kernel.
      notes: numbers to keep at the end of `x_smem`.
      more: shared memory besides.

    Raises:
      InputError: it does not fit.
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
            # At its end, the 4 bytes of `note_round`: a buffer of their own would take a kilobyte.
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


def place_of_round(x_smem: Any) -> Any:
    """Where `note_round` notes it: at the end of `launch`'s `x_smem`."""
    return x_smem.at[pl.ds(x_smem.shape[0] - 8, 8)]


def check(fits: bool, arrays: Sequence[jax.Array]) -> None:
    """Refuses what a layer kernel cannot do.

    Args:
      fits: whether the shapes are right.
      arrays: all vectors and matrices.
    """
    if not fits or any(x.dtype != jnp.bfloat16 for x in arrays):
        got = ", ".join(f"{x.dtype} {x.shape}" for x in arrays)
        raise InputError(f"A layer kernel takes bfloat16 vectors and matrices of one model's sizes; got {got}.")


def share(product: Product, blocks: int) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, ...]]]:
    """How many items this block has, and what the i-th is: (first row, part, first step, steps)."""
    block = lax.axis_index("block")
    if product.after % blocks:
        block = lax.rem(block + (blocks - product.after % blocks), jnp.int32(blocks))
    base, extra = divmod(product.inputs // CHUNK, product.splits)
    of_each = product.items // product.experts

    def item(i: jax.Array) -> tuple[jax.Array, ...]:
        which, expert = block + i * blocks, None
        if product.experts > 1:
            expert, which = lax.div(which, jnp.int32(of_each)), lax.rem(which, jnp.int32(of_each))
        row, split = lax.div(which, jnp.int32(product.splits)) * product.tile, lax.rem(which, jnp.int32(product.splits))
        # The last tile begins early enough to end with the matrix: some rows may be done twice, with the same result.
        row = pl.multiple_of(lax.min(row, jnp.int32(product.outputs - product.tile)), 8)
        steps = base + (split < extra).astype(jnp.int32)
        part = split if expert is None else expert * product.splits + split
        return row, part, split * base + lax.min(split, jnp.int32(extra)), steps

    return lax.div(jnp.int32(product.items + blocks - 1) - block, jnp.int32(blocks)), item


def fetch(
    product: Product, own: Any, w_ref: Any, n: jax.Array, w_smem: Any, full: Any, empty: Any,
    first_row: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:  # fmt: skip
    """The stream of weights of one product: every step of every item, as slots become free.

    Args:
      product: what to fetch.
      own: its `share` of it.
      w_ref: the matrix, or all of a stack below one another.
      n: slots filled so far.
      w_smem, full, empty: the slots.
      first_row: from an item's part, where its matrices begin.

    Returns:
      Slots filled since then.
    """
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
    product: Product, own: Any, out_ref: Any, n: jax.Array, w_smem: Any, x_smem: Any, full: Any, empty: Any,
    shift: jax.Array | Callable[[jax.Array, jax.Array], jax.Array],
    scale: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:  # fmt: skip
    """One product of what `fetch` brings.

    Args:
      product, own, n, w_smem, full, empty: see `fetch`.
      out_ref: where the results go; parts one after another.
      x_smem: the input.
      shift: which column of the matrix `x_smem` begins with; or what brings the input of an item there and says so,
        given part and first column.
      scale: from an item's part, what its result is multiplied by.

    Returns:
      Slots filled since then.
    """
    stages, f32, (count, item) = w_smem.shape[0], jnp.float32, own

    def one_item(i: jax.Array, n: jax.Array) -> jax.Array:
        row, part, start, steps = item(i)
        begin = shift(part, start * CHUNK) if callable(shift) else shift

        def accumulate(*accs: Any) -> tuple[jax.Array, ...]:
            def slots(j: jax.Array) -> list[jax.Array]:
                return [lax.rem(n + j * product.gates + g, jnp.int32(stages)) for g in range(product.gates)]

            def release(j: jax.Array) -> None:
                for slot in slots(j):
                    plgpu.barrier_arrive(empty.at[slot])

            def one_step(j: jax.Array, _: None) -> None:
                at = pl.multiple_of((start + j) * CHUNK - begin, CHUNK)
                x = load(x_smem.at[pl.ds(at, CHUNK)], _WGMMA.reduce(0))
                x = lax.broadcast_in_dim(x, (64, CHUNK), [1])
                for acc, slot in zip(accs, slots(j), strict=True):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, x, w_smem.at[slot, pl.ds(0, product.tile)].T)
                # All but this step's are done.
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
        # The rows are all the same: one of them goes out.
        at = pl.multiple_of(part * product.outputs + row, 8)
        _store_first_row(out_ref.at[pl.ds(at, product.tile)], y)
        return n + steps * product.gates

    return lax.fori_loop(0, count, one_item, n)


def total(parts_ref: Any, parts: int, layout: Any) -> jax.Array:
    """The sum of partial results, rounded to bfloat16."""
    size = parts_ref.shape[0] // parts
    added = [load(parts_ref.at[pl.ds(s * size, size)], layout) for s in range(parts)]
    return functools.reduce(jnp.add, added).astype(jnp.bfloat16)


def normed(stream: jax.Array, norm: jax.Array, eps: float, x_smem: Any, added: jax.Array | None = None) -> jax.Array:
    """The stream and what is added to it; its norm goes to `x_smem`."""
    D, f32 = stream.shape[0], jnp.float32
    if added is not None:
        stream = (stream.astype(f32) + added.astype(f32)).astype(jnp.bfloat16)
    x = stream.astype(f32)
    x = (x * lax.rsqrt(jnp.sum(x * x) / D + eps)).astype(jnp.bfloat16)
    x_smem[pl.ds(0, D)] = (x.astype(f32) * norm.astype(f32)).astype(jnp.bfloat16)
    return stream
