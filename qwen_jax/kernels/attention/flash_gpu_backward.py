"""The backward pass of `flash_gpu` in two kernels: one walks over keys for dq, one walks over queries for dk and dv.

Thread blocks of the first stay resident, as in the forward pass, and begin to fetch the queries of a tile while they
finish the previous one. In the second, the products of a step run on while the next step begins.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.flash_gpu_tiles import (
    BackwardInputs,
    KeyRing,
    KeyTiles,
    block_key_tiles,
    feed_keys,
    mask_logits,
    over_key_tiles,
    schedule_tiles,
)
from qwen_jax.kernels.attention.tile_ranges import key_tiles, query_tiles
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import load, read_accumulator, tiled
from qwen_jax.kernels.gpu.tiles import (
    FEEDER_REGISTERS,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    WGMMA,
    across,
    compute_registers,
    kernel,
    opaque_zero,
    rem,
    zeros,
)
from qwen_jax.kernels.softmax import LOG2E
from qwen_jax.kernels.types import Ref

# The gradient with respect to the queries.


class _QueriesMemory(NamedTuple):
    """Shared memory and barriers of a thread block. The first dimension is a warpgroup or a stage of the ring."""

    q_smem: Ref
    do_smem: Ref
    dq_smem: Ref
    k_smem: Ref
    v_smem: Ref
    q_ready: Ref
    k_ready: Ref
    v_ready: Ref
    k_free: Ref
    v_free: Ref

    @property
    def ring(self) -> KeyRing:
        return KeyRing(self.k_smem, self.v_smem, self.k_ready, self.v_ready, self.k_free, self.v_free)


@functools.partial(jax.jit, static_argnames="scale")
def run_queries(inputs: BackwardInputs[jax.Array], *, scale: float) -> jax.Array:
    """The gradient with respect to the queries, [B, T, H, d]."""
    q, k = inputs.q, inputs.k
    (B, _, H, d), padded = q.shape, inputs.start.shape[1]
    keys = 128
    stages = min(4, (TILE_SHARED_BYTES - 6 * ROWS * d * 2) // (2 * keys * d * 2))

    def block(*refs: Ref, **scratch: Ref) -> None:
        group = H // k.shape[2]
        _queries_block(BackwardInputs(*refs[:8]), _QueriesMemory(**scratch), *refs[8:], scale=scale, group=group)

    launch = kernel(
        "flash_backward_queries",
        block,
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        {"block": min(MULTIPROCESSORS, B * H * (padded // (2 * ROWS)))},
        3,
        q_smem=tiled((2, ROWS, d), q.dtype),
        do_smem=tiled((2, ROWS, d), q.dtype),
        dq_smem=tiled((2, ROWS, d), q.dtype),
        k_smem=tiled((stages, keys, d), q.dtype),
        v_smem=tiled((stages, keys, d), q.dtype),
        q_ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    (dq,) = launch(*inputs, key_tiles(inputs.start, inputs.end, ROWS, keys))
    result: jax.Array = dq
    return result


def _queries_block(
    inputs: BackwardInputs[Ref], memory: _QueriesMemory, tiles_ref: Ref, dq_ref: Ref, *, scale: float,
    group: int,
) -> None:  # fmt: skip
    """The program of a thread block: two warpgroups compute, 64 query rows each, and one copies keys and values."""
    warpgroup, f32 = lax.axis_index("warpgroup"), jnp.float32
    q_smem, do_smem, k_smem, v_smem = memory.q_smem, memory.do_smem, memory.k_smem, memory.v_smem
    stages, keys, d = k_smem.shape
    B, H, padded = inputs.log2.shape
    turns, place = schedule_tiles(B, H, padded // (2 * ROWS))

    def visited(turn: jax.Array) -> KeyTiles:
        row, _, tile = place(turn)
        return block_key_tiles(tiles_ref, row, tile, warpgroup, 2)

    def fetch(turn: jax.Array) -> None:
        row, head, tile = place(turn)
        rows = pl.ds((2 * tile + warpgroup) * ROWS, ROWS)
        ready = memory.q_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(inputs.q.at[row, rows, head], q_smem.at[warpgroup], ready)
        plgpu.copy_gmem_to_smem(inputs.dout.at[row, rows, head], do_smem.at[warpgroup], ready)

    def row_terms(turn: jax.Array) -> list[jax.Array]:
        """Start and end of the interval, log-sum-exp and delta of each row."""
        row, head, tile = place(turn)
        rows = pl.ds((2 * tile + warpgroup) * ROWS, ROWS)
        where = (
            inputs.start.at[row, rows],
            inputs.end.at[row, rows],
            inputs.log2.at[row, head, rows],
            inputs.delta.at[row, head, rows],
        )
        return [load(x, PER_ROW) for x in where]

    def compute_tile(turn: jax.Array, carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        before, (low, high, log2, delta) = carry
        row, head, tile = place(turn)
        tiles = visited(turn)
        first, last = tiles.first, tiles.last
        rows = pl.ds((2 * tile + warpgroup) * ROWS, ROWS)
        plgpu.barrier_wait(memory.q_ready.at[warpgroup])
        factor = scale * LOG2E

        def step(i: jax.Array, acc: jax.Array, masked: bool) -> jax.Array:
            slot = rem(before + i - first, stages)
            own = warpgroup + opaque_zero(i)
            q_tile, do_tile = q_smem.at[own], do_smem.at[own]
            plgpu.barrier_wait(memory.k_ready.at[slot])
            plgpu.barrier_wait(memory.v_ready.at[slot])

            def logits_gradient(s_acc: Ref, dp_acc: Ref) -> jax.Array:
                # Recompute the probabilities while the product with the values runs.
                plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
                plgpu.wgmma(dp_acc, do_tile, v_smem.at[slot].T)
                s = read_accumulator(s_acc, pending=1)
                if masked:
                    s = mask_logits(s, low - i * keys, high - i * keys, axis=1)
                p = jnp.exp2(s * factor - across(log2, s.shape))
                return p * (read_accumulator(dp_acc) - across(delta, s.shape))

            ds = pl.run_scoped(logits_gradient, *[plgpu.ACC((ROWS, keys), f32)] * 2).astype(q_smem.dtype)
            plgpu.barrier_arrive(memory.v_free.at[slot])
            acc = pl.run_state(lambda acc: plgpu.wgmma(acc, ds, k_smem.at[slot]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(memory.k_free.at[slot])
            return acc

        acc = over_key_tiles(tiles, step, zeros((ROWS, d), WGMMA))
        # Fetch what the next tile begins with while this one is finished.
        next_turn = jnp.minimum(turn + 1, turns - 1)
        pl.when(turn + 1 < turns)(lambda: fetch(turn + 1))
        next_terms = row_terms(next_turn)
        dq_tile = memory.dq_smem.at[warpgroup]
        # Wait until the previous result has left the buffer.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dq_tile[...] = (acc * scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dq_tile, dq_ref.at[row, rows, head])
        return before + last - first, next_terms

    @pl.when(warpgroup < 2)
    def compute() -> None:
        plgpu.set_max_registers(compute_registers(2), action="increase")
        fetch(jnp.int32(0))
        lax.fori_loop(0, turns, compute_tile, (jnp.int32(0), row_terms(jnp.int32(0))))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def copy() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")

        def feed(turn: jax.Array, before: jax.Array) -> jax.Array:
            (row, head, _), tiles = place(turn), visited(turn)
            feed_keys(inputs.k, inputs.v, (row, lax.div(head, jnp.int32(group))), tiles, before, memory.ring)
            return before + tiles.last - tiles.first

        lax.fori_loop(0, turns, feed, jnp.int32(0))


# The gradients with respect to keys and values.


class _KeysMemory(NamedTuple):
    """Shared memory and barriers of a thread block. The first dimension is a warpgroup or a stage of the ring."""

    k_smem: Ref
    v_smem: Ref
    q_smem: Ref
    do_smem: Ref
    log2_smem: Ref
    delta_smem: Ref
    k_ready: Ref
    q_ready: Ref
    q_free: Ref


@functools.partial(jax.jit, static_argnames="scale")
def run_keys(inputs: BackwardInputs[jax.Array], *, scale: float) -> tuple[jax.Array, jax.Array]:
    """The gradients with respect to keys and values, [B, S, K, d]."""
    q, k = inputs.q, inputs.k
    (B, S, K, d), keys = k.shape, 2 * ROWS
    rows = 64
    tiles = -(-S // keys)
    stages = min(4, (TILE_SHARED_BYTES - 4 * ROWS * d * 2) // (2 * rows * (d * 2 + 4)))
    like = jax.ShapeDtypeStruct(k.shape, k.dtype)

    def block(*refs: Ref, **scratch: Ref) -> None:
        group = q.shape[2] // K
        _keys_block(BackwardInputs(*refs[:8]), _KeysMemory(**scratch), *refs[8:], scale=scale, group=group)

    launch = kernel(
        "flash_backward_keys",
        block,
        (like, like),
        {"tile": tiles, "row": B, "head": K},
        3,
        k_smem=tiled((2, ROWS, d), q.dtype),
        v_smem=tiled((2, ROWS, d), q.dtype),
        q_smem=tiled((stages, rows, d), q.dtype),
        do_smem=tiled((stages, rows, d), q.dtype),
        log2_smem=plgpu.SMEM((stages, rows), jnp.float32),
        delta_smem=plgpu.SMEM((stages, rows), jnp.float32),
        k_ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        q_ready=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    dk, dv = launch(*inputs, query_tiles(inputs.start, inputs.end, rows, keys, tiles))
    return dk, dv


def _keys_block(
    inputs: BackwardInputs[Ref], memory: _KeysMemory, tiles_ref: Ref, dk_ref: Ref, dv_ref: Ref, *,
    scale: float, group: int,
) -> None:  # fmt: skip
    """The program of a thread block: two warpgroups own 64 keys each and walk over queries that a third copies."""
    warpgroup, row, head, tile = (lax.axis_index(name) for name in ("warpgroup", "row", "head", "tile"))
    q_smem, do_smem = memory.q_smem, memory.do_smem
    stages, rows, d = q_smem.shape
    first, last, full_first, full_last = (tiles_ref[row, tile, n] for n in range(4))
    count, f32 = last - first, jnp.float32

    @pl.when(warpgroup < 2)
    def compute() -> None:
        plgpu.set_max_registers(compute_registers(2), action="increase")
        # Keys and values of this warpgroup.
        begin = (2 * tile + warpgroup) * ROWS
        own = (row, pl.ds(begin, ROWS), head)
        k_tile, v_tile, ready = memory.k_smem.at[warpgroup], memory.v_smem.at[warpgroup], memory.k_ready.at[warpgroup]
        plgpu.copy_gmem_to_smem(inputs.k.at[own], k_tile, ready)
        plgpu.copy_gmem_to_smem(inputs.v.at[own], v_tile, ready)
        plgpu.barrier_wait(ready)
        factor = scale * LOG2E

        def walk(dk_acc: Ref, dv_acc: Ref) -> tuple[jax.Array, jax.Array]:
            def step(at: jax.Array, _: None) -> None:
                i, slot, own = first + lax.rem(at, count), rem(at, stages), warpgroup + opaque_zero(at)
                k_tile, v_tile = memory.k_smem.at[own], memory.v_smem.at[own]
                plgpu.barrier_wait(memory.q_ready.at[slot])

                def accumulate(s_acc: Ref, dp_acc: Ref) -> None:
                    # Keys are the rows here, queries the columns.
                    plgpu.wgmma(s_acc, k_tile, q_smem.at[slot].T)
                    plgpu.wgmma(dp_acc, v_tile, do_smem.at[slot].T)

                    def masked(s: jax.Array) -> jax.Array:
                        here = pl.ds(i * rows, rows)
                        low, high = (load(x.at[row, here], PER_COLUMN) - begin for x in (inputs.start, inputs.end))
                        return mask_logits(s, low, high, axis=0)

                    s = read_accumulator(s_acc, pending=1)
                    # wgmma finishes in order, so the products of the previous step are done too.
                    pl.when(at > 0)(lambda: plgpu.barrier_arrive(memory.q_free.at[rem(at - 1, stages)]))
                    s = lax.cond((i >= full_first) & (i < full_last), lambda s: s, masked, s)
                    p = jnp.exp2(s * factor - across(load(memory.log2_smem.at[slot], PER_COLUMN), s.shape, 1))
                    plgpu.wgmma(dv_acc, p.astype(q_smem.dtype), do_smem.at[slot])
                    delta = across(load(memory.delta_smem.at[slot], PER_COLUMN), s.shape, 1)
                    ds = p * (read_accumulator(dp_acc, pending=1) - delta)
                    plgpu.wgmma(dk_acc, ds.astype(q_smem.dtype), q_smem.at[slot])

                pl.run_scoped(accumulate, *[plgpu.ACC((ROWS, rows), f32)] * 2)

            lax.fori_loop(0, count * group, step, None)
            return dk_acc[...], dv_acc[...]

        dk, dv = pl.run_scoped(walk, *[plgpu.ACC((ROWS, d), f32)] * 2)
        # The buffers of keys and values are free now and take the results.
        k_tile[...] = (dk * scale).astype(q_smem.dtype)
        v_tile[...] = dv.astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[own])
        plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[own])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def copy() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")

        def fetch(i: jax.Array, wait: bool) -> None:
            slot = rem(i, stages)
            h = head * group + lax.div(i, count)
            here = pl.ds((first + lax.rem(i, count)) * rows, rows)
            if wait:
                plgpu.barrier_wait(memory.q_free.at[slot])
            for ref, smem in ((inputs.q, q_smem), (inputs.dout, do_smem)):
                plgpu.copy_gmem_to_smem(ref.at[row, here, h], smem.at[slot], memory.q_ready.at[slot])
            for ref, smem in ((inputs.log2, memory.log2_smem), (inputs.delta, memory.delta_smem)):
                plgpu.copy_gmem_to_smem(ref.at[row, h, here], smem.at[slot], memory.q_ready.at[slot])

        total = count * group
        lax.fori_loop(0, jnp.minimum(total, stages), lambda i, _: fetch(i, False), None)
        lax.fori_loop(stages, total, lambda i, _: fetch(i, True), None)
