"""Instructions and layouts of Hopper GPUs that Pallas does not offer, or offers differently from version to version."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from qwen_jax.kernels.types import Layout, Ref

EIGHT_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 32), (8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
"""A layout of registers in which a warpgroup holds eight rows."""


def tiled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, columns: int = 64) -> Any:
    """Shared memory in tiles of 8 rows, swizzled so that the tensor cores read it without bank conflicts.

    Args:
      shape: of the buffer.
      dtype: of its elements.
      columns: of a tile; they must take 128 or 64 bytes.
    """
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    swizzle = columns * info(dtype).bits // 8
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)))


def load(ref: Ref, layout: Layout, optimized: bool = False) -> jax.Array:
    """Reads memory into registers.

    Args:
      ref: global or shared memory.
      layout: of the registers.
      optimized: require accesses without bank conflicts.
    """
    # Before jax 0.11 an index had to be passed; since then it must not be.
    must_index = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
    return plgpu.load(ref, *((),) * must_index, layout=layout, optimized=optimized)


def wait_for_previous_kernel() -> None:
    """Waits until everything launched before this kernel has ended and its results can be read.

    With programmatic dependent launch, a kernel that calls this may start while the previous one still runs. Before the
    call it may do work that needs no result of the previous kernel. Before jax 0.11 kernels never overlap.
    """
    if hasattr(plgpu, "griddepcontrol_wait"):
        plgpu.griddepcontrol_wait()


def allow_next_kernel() -> None:
    """Lets the next kernel start, once every thread block has called this.

    Call it only after `wait_for_previous_kernel`: then everything that the next kernel reads before its own wait is
    complete.
    """
    if hasattr(plgpu, "griddepcontrol_launch_dependents"):
        plgpu.griddepcontrol_launch_dependents()


def read_accumulator(acc: Ref, pending: int = 0) -> jax.Array:
    """Reads a wgmma accumulator after waiting for its products.

    Args:
      acc: from `plgpu.ACC`.
      pending: how many of the most recently started products may still run; they must write other accumulators. Before
        jax 0.11 all products are waited for.
    """
    if pending and hasattr(plgpu, "wgmma_accumulator_load"):
        return plgpu.wgmma_accumulator_load(acc, wait_n=pending)
    return acc[...]


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
def keep_unswizzled(_: Any, ref: Any) -> None:
    """Keeps layout inference from swizzling a buffer that is copied row by row, which jax 0.11.2 does wrongly."""


def run_on_one_thread(code: str, *operands: Any) -> None:
    """Runs PTX on one thread of a warpgroup while the others wait. Call it within `plgpu.inline_mgpu`.

    Args:
      code: PTX in which $0, $1, ... are the operands; it may declare registers.
      *operands: references to global memory (64-bit addresses) or shared memory (32-bit addresses), and int32 values.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm
    from jax.experimental.mosaic.gpu import utils

    # Operands as registers, with the constraint of each: "r" for 32 bits, "l" for 64.
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


def store_at(ref: Ref, places: Sequence[int], arrays: Sequence[jax.Array], layout: Layout) -> None:
    """Writes arrays to memory without the barriers that Pallas puts around every single write.

    Use `plgpu.commit_smem` before other threads read what was written to shared memory.

    Args:
      ref: shared memory without swizzling, or global memory.
      places: the index in the first dimension at which each array begins.
      arrays: in registers.
      layout: of the arrays.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(layout,) * len(arrays)))
    def store(_: Any, ref: Any, *arrays: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        for first, x in zip(places, arrays, strict=True):
            part = utils.memref_slice(ref, (slice(first, first + x.shape[0]),))
            x.store_untiled(part, optimized=utils.is_smem_ref(ref))

    store(ref, *arrays)


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)))
def store_rows(_: Any, ref: Any, rows: Any, own: Any) -> None:
    """Writes those of 64 rows for which `own` is not zero. Each thread writes its own values, two columns at a time."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, vector
    from jax.experimental.mosaic.gpu import utils

    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    # A thread holds two of the 16 rows of its warp, eight apart, and two columns of every eight.
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
