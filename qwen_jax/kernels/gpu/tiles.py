"""What the kernels for Hopper GPUs share: how they are launched, registers, broadcasts over tiles, and merges."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.device import REGISTERS
from qwen_jax.kernels.types import Layout, Ref

ROWS = 64
"""Rows of a tile of one warpgroup, as wgmma needs them."""
WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
"""Registers with one number for each row or column of a tile in the WGMMA layout."""
FEEDER_REGISTERS = 24
"""Registers of a thread in a warpgroup that only copies."""


def compute_registers(warpgroups: int, feeders: int = 1, feeder_registers: int = FEEDER_REGISTERS) -> int:
    """Registers of a thread in the warpgroups that compute: what the copying warpgroups leave them.

    One register more than the multiprocessor has is a deadlock.
    """
    threads = warpgroups + feeders
    at_launch = REGISTERS // 128 // threads // 8 * 8
    return (threads * at_launch - feeders * feeder_registers) // warpgroups // 8 * 8


def across(x: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """Broadcasts one number for each row (or with axis 1 for each column) to a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def rem(i: jax.Array | int, n: int) -> jax.Array:
    """The remainder of a non-negative int32."""
    return lax.rem(i, jnp.int32(n))


def opaque_zero(i: jax.Array) -> jax.Array:
    """Zero for any index of a loop, which the compiler cannot know.

    Added to an index into shared memory, it keeps the compiler from computing addresses before the loop: there are so
    many that they would be spilled, and spilled registers come back from L2, because shared memory takes all of L1.
    """
    return lax.shift_right_logical(i, jnp.int32(30))


def zeros(shape: tuple[int, ...], layout: Layout) -> jax.Array:
    """Float32 zeros in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def merged(outs: list[jax.Array], tops: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Merges outputs and base-2 log-sum-exps of disjoint shares of the keys."""
    add = functools.partial(functools.reduce, jnp.add)
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp2(t - top) for t in tops]
    total = add(weights)
    return add(o * w for o, w in zip(outs, weights, strict=True)) / total, top + jnp.log2(total)


def kernel(
    name: str,
    block: Callable[..., None],
    out_type: tuple[jax.ShapeDtypeStruct, ...],
    grid: Mapping[str, int],
    threads: int,
    **scratch: object,
) -> Callable[..., Any]:
    """A kernel over a grid.

    Args:
      name: of the kernel.
      block: the program of a thread block. It gets the references to operands and results, and by name those to the
        scratch.
      out_type: of the results.
      grid: sizes by name; the last axis runs fastest.
      threads: warpgroups of a thread block, along the axis "warpgroup".
      scratch: shared memory and barriers of a thread block.
    """

    def body(*refs: Ref) -> None:
        pl.run_scoped(functools.partial(block, *refs), collective_axes="warpgroup", **scratch)

    sizes, names = tuple(grid.values()), tuple(grid)
    mesh = plgpu.Mesh(grid=sizes, grid_names=names, num_threads=threads, thread_name="warpgroup")
    # Reductions are over rows, which no two warps share: they exchange nothing through shared memory.
    params = plgpu.CompilerParams(
        approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    )
    return pl.kernel(body, out_type=out_type, mesh=mesh, compiler_params=params, name=name)
