"""The backward pass of `flash_gpu` in one kernel, for head_dim 64: five matrix products where two kernels need seven.

A thread block owns a tile of keys and values, half of it in each of two warpgroups, and walks over the queries that see
them. A third warpgroup adds the contribution of these keys to the gradient of the queries, in float32 in global memory.
Thread blocks take turns there in the order of their keys, so that the sum has a fixed order; a semaphore for each query
tile counts who has been. A block waits only for blocks of earlier keys, which were launched before it, so there is no
deadlock. All blocks walk from the last query tile to the first, and for each tile over the heads, so that they follow
each other one step apart.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.flash_gpu_tiles import BackwardInputs, mask_logits
from qwen_jax.kernels.attention.tile_ranges import query_tiles, visit_order
from qwen_jax.kernels.gpu.hopper import load, read_accumulator, tiled
from qwen_jax.kernels.gpu.tiles import (
    FEEDER_REGISTERS,
    PER_ROW,
    ROWS,
    across,
    compute_registers,
    kernel,
    opaque_zero,
    rem,
)
from qwen_jax.kernels.softmax import LOG2E
from qwen_jax.kernels.types import Ref


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block. The first dimension is a warpgroup, a stage or a buffer."""

    k_smem: Ref
    v_smem: Ref
    q_smem: Ref
    do_smem: Ref
    log2_smem: Ref
    delta_smem: Ref
    p_smem: Ref
    ds_smem: Ref
    dq_smem: Ref
    kv_ready: Ref
    q_ready: Ref
    q_free: Ref
    ds_ready: Ref
    ds_free: Ref
    dq_ready: Ref
    dq_free: Ref


@functools.partial(jax.jit, static_argnames="scale")
def run_backward(inputs: BackwardInputs[jax.Array], *, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients with respect to queries, keys and values."""
    q, k, start = inputs.q, inputs.k, inputs.start
    (B, S, K, d), (_, T, H, _), padded = k.shape, q.shape, start.shape[1]
    keys = rows = 2 * ROWS
    tiles, stages = -(-S // keys), 2
    like = jax.ShapeDtypeStruct(k.shape, k.dtype)

    def block(*refs: Ref, **scratch: Ref) -> None:
        _block(BackwardInputs(*refs[:8]), _Memory(**scratch), *refs[8:], scale=scale, group=H // K)

    launch = kernel(
        "flash_backward",
        block,
        (jax.ShapeDtypeStruct((B, padded, H, d), jnp.float32), like, like),
        {"tile": tiles, "row": B, "head": K},
        4,
        k_smem=tiled((2, ROWS, d), q.dtype),
        v_smem=tiled((2, ROWS, d), q.dtype),
        q_smem=tiled((stages, rows, d), q.dtype),
        do_smem=tiled((stages, rows, d), q.dtype),
        log2_smem=plgpu.SMEM((stages, rows), jnp.float32),
        delta_smem=plgpu.SMEM((stages, rows), jnp.float32),
        p_smem=tiled((2, rows, ROWS), q.dtype),
        ds_smem=tiled((2, 2, rows, ROWS), q.dtype),
        dq_smem=tiled((2, ROWS, d), jnp.float32, 32),
        kv_ready=plgpu.Barrier(num_arrivals=4),
        q_ready=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ds_ready=plgpu.Barrier(num_arrivals=2),
        ds_free=plgpu.Barrier(num_arrivals=2),
        dq_ready=plgpu.Barrier(num_arrivals=2),
        dq_free=plgpu.Barrier(),
    )
    there = query_tiles(start, inputs.end, rows, keys, tiles)
    dq, dk, dv = launch(*inputs, there, visit_order(there, padded // rows))
    # Query tiles that no block visited were never written.
    sees = (start < inputs.end)[:, :T, None, None]
    return jnp.where(sees, dq[:, :T] * scale, 0.0).astype(q.dtype), dk, dv


def _block(
    inputs: BackwardInputs[Ref], memory: _Memory, tiles_ref: Ref, order_ref: Ref, dq_ref: Ref, dk_ref: Ref,
    dv_ref: Ref, *, scale: float, group: int,
) -> None:  # fmt: skip
    """The program of a thread block: two warpgroups compute, one copies queries, and one adds up the gradient dq."""
    warpgroup, row, head, tile = (lax.axis_index(name) for name in ("warpgroup", "row", "head", "tile"))
    (stages, rows, d), f32 = memory.q_smem.shape, jnp.float32
    first, last, full_first, full_last = (tiles_ref[row, tile, n] for n in range(4))
    steps = (last - first) * group
    semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((dq_ref.shape[0], dq_ref.shape[2], dq_ref.shape[1] // rows)))

    def place(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Query head and query tile of a step."""
        return head * group + rem(at, group), last - 1 - lax.div(at, jnp.int32(group))

    def compute(own: int) -> None:
        """The program of a computing warpgroup, which owns the keys of half `own` of the tile."""
        begin = (2 * tile + own) * ROWS
        # Put the barriers in the state after a step: the gradient of the logits is written and read.
        plgpu.barrier_arrive(memory.ds_ready)
        plgpu.barrier_arrive(memory.ds_free)
        plgpu.barrier_wait(memory.kv_ready)
        factor = scale * LOG2E

        def start_queries(dq_acc: Ref, at: jax.Array, zero: jax.Array | int) -> None:
            """Starts the products for half of dq, from the logit gradients of both warpgroups."""
            for w in range(2):
                ds = memory.ds_smem.at[rem(at, 2), w, pl.ds(own * ROWS, ROWS)]
                plgpu.wgmma(dq_acc, ds, memory.k_smem.at[w + zero])

        def hand_over(dq: jax.Array) -> None:
            plgpu.barrier_wait(memory.dq_free)
            memory.dq_smem.at[own][...] = dq
            plgpu.commit_smem()
            plgpu.barrier_arrive(memory.dq_ready)

        def walk(dk_acc: Ref, dv_acc: Ref) -> tuple[jax.Array, jax.Array]:
            def step(at: jax.Array, carry: None) -> None:
                i = place(at)[1]
                slot, zero = rem(at, stages), opaque_zero(at)
                k_tile, v_tile = memory.k_smem.at[own + zero], memory.v_smem.at[own + zero]
                p_tile, ds_tile = memory.p_smem.at[own + zero], memory.ds_smem.at[rem(at, 2), own]
                plgpu.barrier_wait(memory.q_ready.at[slot])

                def logits_gradient(s_acc: Ref, dp_acc: Ref) -> None:
                    # Logits, and the gradient with respect to the probabilities.
                    plgpu.wgmma(s_acc, memory.q_smem.at[slot], k_tile.T)
                    plgpu.wgmma(dp_acc, memory.do_smem.at[slot], v_tile.T)
                    log2, delta = (load(x.at[slot], PER_ROW) for x in (memory.log2_smem, memory.delta_smem))
                    s = read_accumulator(s_acc, pending=1)
                    # wgmma finishes in order, so the products of the previous step are done too.
                    pl.when(at > 0)(lambda: plgpu.barrier_arrive(memory.q_free.at[rem(at - 1, stages)]))

                    def masked(s: jax.Array) -> jax.Array:
                        here = pl.ds(i * rows, rows)
                        low, high = (load(x.at[row, here], PER_ROW) - begin for x in (inputs.start, inputs.end))
                        return mask_logits(s, low, high, axis=1)

                    # Recompute the probabilities, and start the product for dv.
                    s = lax.cond((i >= full_first) & (i < full_last), lambda s: s, masked, s)
                    p = jnp.exp2(s * factor - across(log2, s.shape))
                    p_tile[...] = p.astype(memory.q_smem.dtype)
                    plgpu.commit_smem()
                    plgpu.wgmma(dv_acc, p_tile.T, memory.do_smem.at[slot])
                    # The gradient with respect to the logits, for both warpgroups to read.
                    ds = p * (read_accumulator(dp_acc, pending=1) - across(delta, p.shape))
                    plgpu.barrier_wait(memory.ds_ready)
                    plgpu.barrier_wait(memory.ds_free)
                    ds_tile[...] = ds.astype(memory.q_smem.dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(memory.ds_ready)

                pl.run_scoped(logits_gradient, *[plgpu.ACC((rows, ROWS), f32)] * 2)

                def queries_gradient(dq_acc: Ref) -> None:
                    # dq of the previous step, whose logit gradient the other warpgroup has written by now. The first
                    # step has no previous one: what it hands over is never added.
                    start_queries(dq_acc, at + 1, zero)
                    plgpu.wgmma(dk_acc, ds_tile.T, memory.q_smem.at[slot])
                    dq = read_accumulator(dq_acc, pending=1)
                    plgpu.barrier_arrive(memory.ds_free)
                    hand_over(dq)

                pl.run_scoped(queries_gradient, plgpu.ACC((ROWS, d), f32))

            lax.fori_loop(0, steps, step, None)

            # dq of the last step.
            def last_queries(dq_acc: Ref) -> jax.Array:
                plgpu.barrier_wait(memory.ds_ready)
                start_queries(dq_acc, steps + 1, 0)
                return dq_acc[...]

            dq = pl.run_scoped(last_queries, plgpu.ACC((ROWS, d), f32))
            plgpu.barrier_wait(memory.ds_free)
            plgpu.barrier_arrive(memory.ds_free)
            hand_over(dq)
            return dk_acc[...], dv_acc[...]

        dk, dv = pl.run_scoped(walk, *[plgpu.ACC((ROWS, d), f32)] * 2)
        # Wait until the other warpgroup has read these keys for the last time; their buffers then take the results.
        plgpu.barrier_wait(memory.ds_free)
        plgpu.barrier_wait(memory.dq_free)
        k_tile, v_tile = memory.k_smem.at[own], memory.v_smem.at[own]
        k_tile[...] = (dk * scale).astype(memory.q_smem.dtype)
        v_tile[...] = dv.astype(memory.q_smem.dtype)
        plgpu.commit_smem()
        there = (row, pl.ds(begin, ROWS), head)
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[there])
        plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[there])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < 2)
    def compute_half() -> None:
        plgpu.set_max_registers(compute_registers(2, 2), action="increase")
        # Each warpgroup has its own code, in which its addresses in shared memory are constants, to save registers.
        for w in range(2):
            pl.when(warpgroup == w)(functools.partial(compute, w))

    @pl.when(warpgroup == 2)
    def copy_inputs() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        for w in range(2):
            own = (row, pl.ds((2 * tile + w) * ROWS, ROWS), head)
            plgpu.copy_gmem_to_smem(inputs.k.at[own], memory.k_smem.at[w], memory.kv_ready)
            plgpu.copy_gmem_to_smem(inputs.v.at[own], memory.v_smem.at[w], memory.kv_ready)

        def fetch(at: jax.Array, wait: bool) -> None:
            slot, (h, i) = rem(at, stages), place(at)
            here = pl.ds(i * rows, rows)
            if wait:
                plgpu.barrier_wait(memory.q_free.at[slot])
            for ref, smem in ((inputs.q, memory.q_smem), (inputs.dout, memory.do_smem)):
                plgpu.copy_gmem_to_smem(ref.at[row, here, h], smem.at[slot], memory.q_ready.at[slot])
            for ref, smem in ((inputs.log2, memory.log2_smem), (inputs.delta, memory.delta_smem)):
                plgpu.copy_gmem_to_smem(ref.at[row, h, here], smem.at[slot], memory.q_ready.at[slot])

        lax.fori_loop(0, jnp.minimum(steps, stages), lambda at, _: fetch(at, False), None)
        lax.fori_loop(stages, steps, lambda at, _: fetch(at, True), None)

    @pl.when(warpgroup == 3)
    def add_queries_gradient() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        plgpu.barrier_arrive(memory.dq_free)

        def signal_done(at: jax.Array) -> None:
            h, i = place(at)
            plgpu.semaphore_signal(semaphores.at[row, h, i], 1, memory_scope="gpu")

        def write(at: jax.Array) -> None:
            """Adds what the previous step handed over."""
            plgpu.barrier_wait(memory.dq_ready)

            def copy(reduction: Literal["add"] | None) -> None:
                h, i = place(at - 1)
                for w in range(2):
                    there = dq_ref.at[row, pl.ds(i * rows + w * ROWS, ROWS), h]
                    plgpu.copy_smem_to_gmem(memory.dq_smem.at[w], there, reduction_op=reduction, commit_group=w == 1)

            @pl.when(at > 0)
            def add() -> None:
                h, i = place(at - 1)
                turn = order_ref[row, tile, i]
                pl.when(turn == 0)(lambda: copy(None))

                # All blocks but the first wait for their turn.
                @pl.when(turn > 0)
                def wait_and_add() -> None:
                    plgpu.semaphore_wait(semaphores.at[row, h, i], turn, decrement=False, memory_scope="gpu")
                    copy("add")

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(memory.dq_free)
            # The next block may add once the copy that this one started a step ago has arrived.
            plgpu.wait_smem_to_gmem(1)
            pl.when(at > 1)(lambda: signal_done(at - 2))

        lax.fori_loop(0, steps + 1, lambda at, _: write(at), None)
        plgpu.wait_smem_to_gmem(0)
        pl.when(steps > 0)(lambda: signal_done(steps - 1))
