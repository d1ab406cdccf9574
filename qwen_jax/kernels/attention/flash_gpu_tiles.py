"""What the attention kernels for Hopper GPUs are made of: tiles in shared memory, masks, and the walk over tiles."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.softmax import LOWEST

BLOCKS = 132
"""Multiprocessors of an H100 or H200."""
ROWS = 64
"""Rows of one warpgroup, on which wgmma insists."""
SMEM_BYTES = 227 * 1024 - 2048
"""What a block may have, less barriers and alignment."""
WGMMA = plgpu.Layout.WGMMA
FEEDER_REGISTERS = 24


def registers(warpgroups: int, others: int = 1) -> int:
    """Of a thread of the warpgroups that compute, what the others leave them. One more than there are: a deadlock."""
    threads = warpgroups + others
    at_launch = 65536 // 128 // threads // 8 * 8
    return (threads * at_launch - others * FEEDER_REGISTERS) // warpgroups // 8 * 8


def across(x: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """A number for each row (or, with axis 1, for each column), all along it."""
    return lax.broadcast_in_dim(x, shape, [axis])


def rem(i: Any, n: int) -> jax.Array:
    return lax.rem(i, jnp.int32(n))


def unknown_zero(i: Any) -> jax.Array:
    """Zero, for any step of a loop, which the compiler doesn't know.

    Added to an index into shared memory, it keeps addresses from being worked out before the loop: there are so many
    that they would be spilled, and what is spilled comes back from L2, since shared memory takes all of L1.
    """
    return lax.shift_right_logical(i, jnp.int32(30))


def in_phases(visits: list[Any], body: Callable[..., Any], carry: Any) -> Any:
    """Runs `body(i, carry, masked)` over the visited tiles; those in the middle need no mask."""
    first, last, full_first, full_last = visits
    for begin, end, masked in ((first, full_first, True), (full_first, full_last, False), (full_last, last, True)):
        carry = lax.fori_loop(begin, end, functools.partial(body, masked=masked), carry)
    return carry


def mask_logits(s: jax.Array, low: jax.Array, high: jax.Array, axis: int) -> jax.Array:
    """Logits with those outside low <= place < high made lowest; `low` and `high` are for each row.

    Args:
      s: [rows, columns].
      low, high: int32, one for each row and counted along columns (axis 1), or the other way round (axis 0).
      axis: along which the place is counted.
    """
    place = plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=WGMMA)
    low, high = (across(x, s.shape, 1 - axis) for x in (low, high))
    return jnp.where((place >= low) & (place < high), s, LOWEST)


def zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def kernel(
    name: str, block: Callable[..., None], out_type: Any, grid: dict[str, int], threads: int, **scratch: Any
) -> Any:
    """A kernel over a grid, whose last axis runs fastest; `block` gets its operands, results and shared memory."""

    def body(*refs: Any) -> None:
        pl.run_scoped(functools.partial(block, *refs), collective_axes="warpgroup", **scratch)

    sizes, names = tuple(grid.values()), tuple(grid)
    mesh = plgpu.Mesh(grid=sizes, grid_names=names, num_threads=threads, thread_name="warpgroup")
    # Reductions are over rows, which no warp shares with another: they exchange nothing through shared memory.
    params = plgpu.CompilerParams(
        approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    )
    return pl.kernel(body, out_type=out_type, mesh=mesh, compiler_params=params, name=name)


def deal(B: int, H: int, tiles: int) -> tuple[jax.Array, Callable[[Any], tuple[Any, Any, Any]]]:
    """Deals out all tiles of all heads to the blocks of a kernel, which stay until all is done.

    Returns:
      How many turns this block has, and what it does in one: row, head and tile; no tile, a negative number, where
      there is none left.
    """
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    rounds = -(-B * H * tiles // blocks)

    def place(turn: Any) -> tuple[Any, Any, Any]:
        # The last tiles see most under a causal mask: they come first, and are dealt out to and fro, so that each block
        # gets about as much.
        n = turn * blocks + jnp.where(rem(turn, 2) == 0, block, blocks - 1 - block)
        rest = rem(n, B * H)
        return lax.div(rest, jnp.int32(H)), rem(rest, H), tiles - 1 - lax.div(n, jnp.int32(B * H))

    return jnp.where(place(jnp.int32(rounds - 1))[2] < 0, rounds - 1, rounds), place


def own_visits(visits_ref: Any, row: Any, tile: Any, warpgroup: Any, warpgroups: int) -> tuple[Any, Any, list[Any]]:
    """First and end of what a block visits, and all four numbers of one of its warpgroups within that."""
    first, last, full_first, full_last = jnp.int32(2**30), jnp.int32(0), jnp.int32(0), jnp.int32(0)
    for w in range(warpgroups):
        own = [visits_ref[row, warpgroups * tile + w, n] for n in range(4)]
        # An empty tile must not widen what the others visit.
        first = jnp.where(own[0] < own[1], jnp.minimum(first, own[0]), first)
        last = jnp.maximum(last, own[1])
        full_first = jnp.where(warpgroup == w, own[2], full_first)
        full_last = jnp.where(warpgroup == w, own[3], full_last)
    first = jnp.minimum(first, last)
    full_first = jnp.clip(full_first, first, last)
    return first, last, [first, last, full_first, jnp.clip(full_last, full_first, last)]


def feed_keys(
    k_ref: Any, v_ref: Any, where: tuple[Any, Any], first: Any, count: Any, before: Any, k_smem: Any, v_smem: Any,
    k_ready: Any, v_ready: Any, k_free: Any, v_free: Any, head_major: bool = False,
) -> None:  # fmt: skip
    """Copies tiles of keys and values to shared memory as it comes free; `before` were copied before."""
    stages, keys, _ = k_smem.shape
    row, head = where

    def fetch(i: Any, _: Any) -> None:
        slot = rem(before + i, stages)
        here = pl.ds((first + i) * keys, keys)
        at = (row, head, here) if head_major else (row, here, head)
        for ref, smem, ready, free in ((k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)):
            pl.when(before + i >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], ready.at[slot])

    lax.fori_loop(0, count, fetch, None)


def fill_up(x: jax.Array, multiple: int) -> jax.Array:
    """Fills up the last axis with zeros: rows that are not there see nothing."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def in_eights(x: jax.Array, axis: int = 1) -> jax.Array:
    """A length in whole eights, which the copy engine wants of what it lays out in tiles; more it fills up itself."""
    return jnp.pad(x, [(0, -n % 8 if a == axis else 0) for a, n in enumerate(x.shape)])
