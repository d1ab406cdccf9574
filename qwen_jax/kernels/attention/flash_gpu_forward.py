"""The forward pass of `flash_gpu`, whose body is also that of `sparse_gpu`.

One thread block per multiprocessor stays resident and works through all query tiles. While it finishes one tile, the
keys and queries of the next are already being copied. Which keys those are is up to a `KeyWalk`.
"""

import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.flash_gpu_tiles import (
    KeyRing,
    KeyTiles,
    KeyWalk,
    Visit,
    block_key_tiles,
    feed_keys,
    mask_logits,
    over_key_tiles,
    schedule_tiles,
)
from qwen_jax.kernels.attention.tile_ranges import key_tiles
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import load, read_accumulator, tiled
from qwen_jax.kernels.gpu.tiles import (
    FEEDER_REGISTERS,
    PER_ROW,
    ROWS,
    WGMMA,
    across,
    compute_registers,
    kernel,
    rem,
    zeros,
)
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.softmax import LOG2E, LOW
from qwen_jax.kernels.types import Ref

T = TypeVar("T")

WARPGROUPS, KEYS = 2, 128
"""Warpgroups that compute, and keys of a tile."""


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block. The first dimension is a warpgroup or a stage of the ring."""

    q_smem: Ref
    k_smem: Ref
    v_smem: Ref
    out_smem: Ref
    lse_smem: Ref
    q_ready: Ref
    k_ready: Ref
    v_ready: Ref
    k_free: Ref
    v_free: Ref

    @property
    def ring(self) -> KeyRing:
        return KeyRing(self.k_smem, self.v_smem, self.k_ready, self.v_ready, self.k_free, self.v_free)


class Operands(NamedTuple, Generic[T]):
    """What every kernel of this body reads, as arrays or as references.

    Attributes:
      q: queries, [B, T, H, d].
      k, v: keys and values, in a layout that is up to the walk.
      start, end: mask intervals, [B, padded T].
    """

    q: T
    k: T
    v: T
    start: T
    end: T


MakeWalk = Callable[[Operands[Ref], tuple[Ref, ...], KeyRing, tuple[int, int, int], jax.Array], KeyWalk]


# This is jitted, like the backward pass, so that a model of many layers lowers it once.
@functools.partial(jax.jit, static_argnames=("scale", "head_major"))
def run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, *, scale: float,
    head_major: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output [B, T, H, d] and log-sum-exp [B, H, padded T]; arguments as those of `flash_gpu.attention`."""
    start, end = (pad_to_multiple(x, -1, WARPGROUPS * ROWS) for x in (start, end))
    walk = functools.partial(_all_keys, group=q.shape[2] // k.shape[1 if head_major else 2], head_major=head_major)
    tiles = key_tiles(start, end, ROWS, KEYS)
    return launch_forward("flash_forward", Operands(q, k, v, start, end), (tiles,), walk, scale=scale)


def launch_forward(
    name: str, operands: Operands[jax.Array], more: tuple[jax.Array, ...], walk: MakeWalk, *, scale: float,
    pieces: int = 1,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Launches a kernel with the body of the forward pass.

    Args:
      name: of the kernel.
      operands: with intervals that are padded to whole query tiles.
      more: operands of the walk.
      walk: makes the walk from references to all operands, the ring, the tiles of queries [B, H, N], and the index of
        the warpgroup.
      scale: multiplies the logits.
      pieces: copies that fill a key tile.

    Returns:
      Output [B, T, H, d] and log-sum-exp [B, H, padded T].
    """
    q, start = operands.q, operands.start
    (B, _, H, d), padded = q.shape, start.shape[1]
    warpgroups, keys = WARPGROUPS, KEYS
    stages = min(4, (TILE_SHARED_BYTES - warpgroups * ROWS * (d * 4 + 4)) // (2 * keys * d * 2))
    count = len(operands) + len(more)

    def block(*refs: Ref, **scratch: Ref) -> None:
        inputs, memory = Operands(*refs[: len(operands)]), _Memory(**scratch)
        out_ref, lse_ref = refs[count:]
        tiles = B, H, padded // (warpgroups * ROWS)
        make = functools.partial(walk, inputs, refs[len(operands) : count], memory.ring, tiles)
        _block(inputs, memory, out_ref, lse_ref, make, scale=scale)

    launch = kernel(
        name,
        block,
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, padded), jnp.float32)),
        {"block": min(MULTIPROCESSORS, B * H * (padded // (warpgroups * ROWS)))},
        warpgroups + 1,
        q_smem=tiled((warpgroups, ROWS, d), q.dtype),
        k_smem=tiled((stages, keys, d), q.dtype),
        v_smem=tiled((stages, keys, d), q.dtype),
        out_smem=tiled((warpgroups, ROWS, d), q.dtype),
        lse_smem=plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=warpgroups),
        k_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )
    out, lse = launch(*operands, *more)
    return out, lse


def _all_keys(
    inputs: Operands[Ref], more: tuple[Ref, ...], ring: KeyRing, tiles: tuple[int, int, int], warpgroup: jax.Array, *,
    group: int, head_major: bool,
) -> KeyWalk:  # fmt: skip
    """The walk over all keys of the intervals."""
    [tiles_ref] = more
    turns, place = schedule_tiles(*tiles)

    def visited(turn: jax.Array) -> KeyTiles:
        row, _, tile = place(turn)
        tile = jnp.maximum(tile, 0)
        first, last, full_first, full_last = block_key_tiles(tiles_ref, row, tile, warpgroup, WARPGROUPS)
        # A block that sees nothing visits one tile all the same, all of which is masked.
        first, last = jnp.where(first < last, first, 0), jnp.where(first < last, last, 1)
        return KeyTiles(first, last, jnp.maximum(full_first, first + 1), jnp.maximum(full_last, first + 1))

    def feed(turn: jax.Array, before: jax.Array) -> jax.Array:
        (row, head, _), tiles = place(turn), visited(turn)
        where = row, lax.div(head, jnp.int32(group))
        feed_keys(inputs.k, inputs.v, where, tiles, before, ring, head_major)
        return before + tiles.last - tiles.first

    return KeyWalk(
        turns=turns,
        place=lambda turn, _: place(turn),
        visit=lambda turn: Visit(visited(turn)),
        at=lambda _, i: i,
        mask=lambda s, i, low, high: mask_logits(s, low - i * KEYS, high - i * KEYS, axis=1),
        feed=feed,
        complete=True,
    )


def _block(
    inputs: Operands[Ref], memory: _Memory, out_ref: Ref, lse_ref: Ref, make_walk: Callable[[jax.Array], KeyWalk], *,
    scale: float,
) -> None:  # fmt: skip
    """The program of a thread block: two warpgroups compute, 64 query rows each, and one copies keys and values."""
    warpgroup = lax.axis_index("warpgroup")
    q_smem, k_smem, v_smem = memory.q_smem, memory.k_smem, memory.v_smem
    (stages, keys, d), warpgroups, f32 = k_smem.shape, q_smem.shape[0], jnp.float32
    walk = make_walk(warpgroup)

    def compute_tile(turn: jax.Array, carry: tuple[jax.Array, Visit]) -> tuple[jax.Array, Visit]:
        before, visit = carry
        first, last, full_first, full_last = visit.tiles
        row, head, tile = walk.place(turn, visit.number)
        next_visit = walk.visit(turn + 1)
        tiles = KeyTiles(first + 1, last, full_first, full_last)
        rows = pl.ds((warpgroups * tile + warpgroup) * ROWS, ROWS)
        q_tile, out_tile = q_smem.at[warpgroup], memory.out_smem.at[warpgroup]
        low, high = (load(x.at[row, rows], PER_ROW) for x in (inputs.start, inputs.end))
        plgpu.barrier_wait(memory.q_ready.at[warpgroup])
        factor = scale * LOG2E

        def softmax(s: jax.Array, at: Any, top: jax.Array, masked: bool) -> tuple[jax.Array, ...]:
            """Probabilities, their sums, and the new maximum."""
            if masked:
                s = walk.mask(s, at, low, high)
            new_top = jnp.maximum(top, s.max(axis=1) * factor)
            p = jnp.exp2(s * factor - across(new_top, s.shape))
            # Sums over threads wait until the end of the tile. Until then a row has eight partial sums.
            return p, sum((p[:, n : n + 8] for n in range(8, keys, 8)), p[:, :8]), new_top

        def first_tile(s_acc: Ref) -> tuple[jax.Array, ...]:
            slot, at = rem(before, stages), walk.at(visit, first)
            plgpu.barrier_wait(memory.k_ready.at[slot])
            plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
            s = s_acc[...]
            plgpu.barrier_arrive(memory.k_free.at[slot])
            top = plgpu.layout_cast(jnp.full((ROWS,), LOW, f32), PER_ROW)
            p, total, top = softmax(s, at, top, True)
            plgpu.barrier_wait(memory.v_ready.at[slot])
            return zeros((ROWS, d), WGMMA), p.astype(q_smem.dtype), total, top

        def over_keys(acc: Ref) -> tuple[jax.Array, ...]:
            def step(i: jax.Array, carry: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
                """Multiplies by these keys and by the previous values; meanwhile computes the softmax of these keys."""
                so_far, p, total, top = carry
                slot, slot_before = rem(before + i - first, stages), rem(before + i - first - 1, stages)
                at = walk.at(visit, i) if masked else None
                plgpu.barrier_wait(memory.k_ready.at[slot])
                acc[...] = so_far

                def products(s_acc: Ref) -> tuple[jax.Array, ...]:
                    plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
                    plgpu.wgmma(acc, p, v_smem.at[slot_before])
                    s = read_accumulator(s_acc, pending=1)
                    plgpu.barrier_arrive(memory.k_free.at[slot])
                    new_p, here, new_top = softmax(s, at, top, masked)
                    return lax.optimization_barrier((new_p, here, new_top, jnp.exp2(top - new_top)))

                new_p, here, new_top, alpha = pl.run_scoped(products, plgpu.ACC((ROWS, keys), f32))
                # These values are needed in the next step only. Waiting here keeps the compiler from moving the
                # exponentials after the wait for the products.
                plgpu.barrier_wait(memory.v_ready.at[slot])
                so_far = read_accumulator(acc)
                plgpu.barrier_arrive(memory.v_free.at[slot_before])
                so_far, total = (x * across(alpha, x.shape) for x in (so_far, total))
                return so_far, new_p.astype(q_smem.dtype), total + here, new_top

            # The first key tile has logits only; afterwards each step runs one tile ahead of its values.
            carry = pl.run_scoped(first_tile, plgpu.ACC((ROWS, keys), f32))
            so_far, p, total, top = over_key_tiles(tiles, step, carry)
            # The product with the last values, during which the queries of the next turn are fetched.
            acc[...] = so_far
            final = rem(before + last - 1 - first, stages)
            plgpu.wgmma(acc, p, v_smem.at[final])
            pl.when(turn + 1 < walk.turns)(lambda: fetch_queries(turn + 1, next_visit.number))
            so_far = acc[...]
            plgpu.barrier_arrive(memory.v_free.at[final])
            return so_far, total.sum(axis=1), top

        acc, total, top = pl.run_scoped(over_keys, plgpu.ACC((ROWS, d), f32))
        # Normalise and write, once the previous results have left shared memory.
        sees = low < high if walk.complete else total != 0.0
        inverse = jnp.where(sees, 1 / total, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_tile[...] = (acc * across(inverse, acc.shape)).astype(q_smem.dtype)
        memory.lse_smem.at[warpgroup][...] = jnp.where(sees, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(memory.lse_smem.at[warpgroup], lse_ref.at[row, head, rows])
        return before + last - first, next_visit

    def fetch_queries(turn: jax.Array, number: jax.Array | None) -> None:
        row, head, tile = walk.place(turn, number)
        rows = pl.ds((warpgroups * tile + warpgroup) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(inputs.q.at[row, rows, head], q_smem.at[warpgroup], memory.q_ready.at[warpgroup])

    @pl.when(warpgroup < warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(compute_registers(warpgroups), action="increase")
        fetch_queries(jnp.int32(0), None)
        lax.fori_loop(0, walk.turns, compute_tile, (jnp.int32(0), walk.visit(jnp.int32(0))))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == warpgroups)
    def copy() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        lax.fori_loop(0, walk.turns, walk.feed, jnp.int32(0))
