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
