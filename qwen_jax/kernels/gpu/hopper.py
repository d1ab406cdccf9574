"""What the kernels for Hopper GPUs share."""

import inspect
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

EIGHTS = plgpu.Layout.TILED(plgpu.Tiling(((8, 32), (8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)
"""Registers of a warpgroup that hold eight rows."""


def tiled(shape: tuple[int, ...], dtype: Any, columns: int = 64) -> Any:
    """Shared memory in the order that the tensor cores read without bank conflicts, in tiles of 8 rows.

    Args:
      shape: of the buffer.
      dtype: of its elements.
      columns: of a tile; 128 bytes of them, or 64.
    """
    swizzle = columns * jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)))


def load(ref: Any, layout: Any, optimized: bool = False) -> jax.Array:
    """Reads memory into registers.

    Args:
      ref: global or shared memory.
      layout: of the registers.
      optimized: insist on accesses without bank conflicts.
    """
    # Before jax 0.11 an index had to be given; since then it should not be.
    must_index = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
    return plgpu.load(ref, *((),) * must_index, layout=layout, optimized=optimized)


def wait_for_previous() -> None:
    """Waits until all that was launched before has ended and can be read.

    A kernel that says this may be started while the one before it still runs (programmatic dependent launch), and do
    before it whatever needs none of that one's results. Before jax 0.11 kernels never overlap.
    """
    if hasattr(plgpu, "griddepcontrol_wait"):
        plgpu.griddepcontrol_wait()


def let_next_begin() -> None:
    """Lets the next kernel start once every block has said so.

    Say it after `wait_for_previous` only: then what the next one reads before its own wait is surely complete.
    """
    if hasattr(plgpu, "griddepcontrol_launch_dependents"):
        plgpu.griddepcontrol_launch_dependents()


def products_so_far(acc: Any, but: int = 0) -> jax.Array:
    """Reads an accumulator once all products that were begun are done but the last few.

    Args:
      acc: of `plgpu.ACC`.
      but: how many of the last ones may still run, which must not be its own. Before jax 0.11 all are waited for.
    """
    if but and hasattr(plgpu, "wgmma_accumulator_load"):
        return plgpu.wgmma_accumulator_load(acc, wait_n=but)
    return acc[...]


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
def keep_plain(_: Any, ref: Any) -> None:
    """Keeps layout inference from swizzling a buffer that is copied by single rows: jax 0.11.2 does so wrongly."""


def by_one_thread(code: str, *operands: Any) -> None:
    """One thread of a warpgroup runs PTX, to be called within `inline_mgpu`; the others wait before and after.

    Args:
      code: its $0, $1, ... are the operands; it may declare registers.
      *operands: references to global memory, whose address has 64 bits, or to shared memory, whose has 32; and int32s.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm
    from jax.experimental.mosaic.gpu import utils

    values, kinds = [], []
    for operand in operands:
        if isinstance(operand.type, ir.MemRefType):
            in_shared = utils.is_smem_ref(operand)
            operand = utils.memref_ptr(operand)
            if in_shared:
                operand = llvm.ptrtoint(ir.IntegerType.get_signless(32), operand)
            kinds.append("r" if in_shared else "l")
        else:
            kinds.append("r")
        values.append(operand)
    utils.warpgroup_barrier()
    with utils.single_thread(scope=utils.ThreadSubset.WARPGROUP):
        none = ir.Type.parse("!llvm.void")
        llvm.inline_asm(none, values, "{ " + code + " }", ",".join(kinds), has_side_effects=True)
    utils.warpgroup_barrier()


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)))
def store_rows(_: Any, ref: Any, rows: Any, own: Any) -> None:
    """Writes those of 64 rows for which `own` is not zero: each thread what it has of them, two columns at a time."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, vector
    from jax.experimental.mosaic.gpu import utils

    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    # A thread has two rows, eight apart, of the 16 of its warp, and in each of them two columns of every eight.
    thread = arith.remui(utils.thread_idx(), utils.c(128, i32))
    warp, lane = arith.divui(thread, utils.c(32, i32)), arith.remui(thread, utils.c(32, i32))
    row = arith.addi(arith.muli(warp, utils.c(16, i32)), arith.divui(lane, utils.c(4, i32)))
    column = arith.index_cast(index, arith.muli(arith.remui(lane, utils.c(4, i32)), utils.c(2, i32)))
    pairs = rows.registers.reshape(-1, 2)
    for half, mine in enumerate(own.registers.flatten()):
        if isinstance(mine.type, ir.VectorType):
            mine = vector.extract(mine, [], [0])
        at_row = arith.index_cast(index, arith.addi(row, utils.c(8 * half, i32)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ne, mine, utils.c(0, i32))):
            for j, pair in enumerate(pairs[:, half]):
                vector.store(pair, ref, [at_row, arith.addi(column, utils.c(8 * j, index))])
