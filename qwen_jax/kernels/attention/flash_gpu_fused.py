"""The gradient of `flash_gpu` in one walk, for head_dim 64: five matrix products where two walks take seven.

A block owns keys and values, two warpgroups half of them each, and walks over the queries that see them. What its keys
add to the queries' gradient, a third warpgroup adds to global memory in float32. Blocks take turns there, in the order
of their keys, so that the sum has one order; a semaphore for each tile of queries counts who has been. A block waits
only for blocks of earlier keys, which were launched before it: no deadlock. All walk from the last tile of queries to
the first, tile by tile and for each tile head by head, so that they follow each other a step apart.
"""

import functools
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.flash_gpu_tiles import (
    FEEDER_REGISTERS,
    ROWS,
    WGMMA,
    across,
    kernel,
    mask_logits,
    registers,
    rem,
    unknown_zero,
)
from qwen_jax.kernels.attention.visits import ranks, visitors
from qwen_jax.kernels.gpu.hopper import load, products_so_far, tiled
from qwen_jax.kernels.softmax import LOG2E


@functools.partial(jax.jit, static_argnames="scale")
def run_backward(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, start: jax.Array, end: jax.Array, log2: jax.Array,
    delta: jax.Array, *, scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    (B, S, K, d), (_, T, H, _), padded = k.shape, q.shape, start.shape[1]
    keys = rows = 2 * ROWS
    tiles, stages = -(-S // keys), 2
    like = jax.ShapeDtypeStruct(k.shape, k.dtype)
    launch = kernel(
        "flash_backward",
        functools.partial(_block, scale=scale, group=H // K),
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
    there = visitors(start, end, rows, keys, tiles)
    dq, dk, dv = launch(q, k, v, do, start, end, log2, delta, there, ranks(there, padded // rows))
    # What no block has visited was never written.
    sees = (start < end)[:, :T, None, None]
    return jnp.where(sees, dq[:, :T] * scale, 0.0).astype(q.dtype), dk, dv


def _block(
    q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, start_ref: Any, end_ref: Any, log2_ref: Any, delta_ref: Any,
    visits_ref: Any, ranks_ref: Any, dq_ref: Any, dk_ref: Any, dv_ref: Any, *, k_smem: Any, v_smem: Any, q_smem: Any,
    do_smem: Any, log2_smem: Any, delta_smem: Any, p_smem: Any, ds_smem: Any, dq_smem: Any, kv_ready: Any, q_ready: Any,
    q_free: Any, ds_ready: Any, ds_free: Any, dq_ready: Any, dq_free: Any, scale: float, group: int,
) -> None:  # fmt: skip
    warpgroup, row, head, tile = (lax.axis_index(name) for name in ("warpgroup", "row", "head", "tile"))
    (stages, rows, d), f32 = q_smem.shape, jnp.float32
    first, last, full_first, full_last = (visits_ref[row, tile, n] for n in range(4))
    steps = (last - first) * group
    semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((dq_ref.shape[0], dq_ref.shape[2], dq_ref.shape[1] // rows)))

    def place(at: Any) -> tuple[Any, Any]:
        """Head and tile of queries of a step."""
        return head * group + rem(at, group), last - 1 - lax.div(at, jnp.int32(group))

    def compute(own: int) -> None:
        begin = (2 * tile + own) * ROWS
        # As if a step before the first had left its gradient of logits, and both had read what lay there before.
        plgpu.barrier_arrive(ds_ready)
        plgpu.barrier_arrive(ds_free)
        plgpu.barrier_wait(kv_ready)
        factor = scale * LOG2E

        def start_queries(dq_acc: Any, at: Any, zero: Any) -> None:
            """Begins the products for half of the queries' gradient, from both warpgroups' gradients of logits."""
            for w in range(2):
                ds = ds_smem.at[rem(at, 2), w, pl.ds(own * ROWS, ROWS)]
                plgpu.wgmma(dq_acc, ds, k_smem.at[w + zero])

        def hand_over(dq: jax.Array) -> None:
            plgpu.barrier_wait(dq_free)
            dq_smem.at[own][...] = dq
            plgpu.commit_smem()
            plgpu.barrier_arrive(dq_ready)

        def walk(dk_acc: Any, dv_acc: Any) -> tuple[jax.Array, jax.Array]:
            def step(at: Any, _: Any) -> None:
                _, i = place(at)
                slot, zero = rem(at, stages), unknown_zero(at)
                k_tile, v_tile = k_smem.at[own + zero], v_smem.at[own + zero]
                p_tile, ds_tile = p_smem.at[own + zero], ds_smem.at[rem(at, 2), own]
                plgpu.barrier_wait(q_ready.at[slot])

                def by_logits(s_acc: Any, dp_acc: Any) -> None:
                    plgpu.wgmma(s_acc, q_smem.at[slot], k_tile.T)
                    plgpu.wgmma(dp_acc, do_smem.at[slot], v_tile.T)
                    log2, delta = (load(x.at[slot], WGMMA.reduce(1)) for x in (log2_smem, delta_smem))
                    s = products_so_far(s_acc, but=1)
                    # Behind these products, those of the step before are done too.
                    pl.when(at > 0)(lambda: plgpu.barrier_arrive(q_free.at[rem(at - 1, stages)]))

                    def masked(s: jax.Array) -> jax.Array:
                        here = pl.ds(i * rows, rows)
                        low, high = (load(x.at[row, here], WGMMA.reduce(1)) - begin for x in (start_ref, end_ref))
                        return mask_logits(s, low, high, axis=1)

                    s = lax.cond((i >= full_first) & (i < full_last), lambda s: s, masked, s)
                    p = jnp.exp2(s * factor - across(log2, s.shape))
                    p_tile[...] = p.astype(q_smem.dtype)
                    plgpu.commit_smem()
                    plgpu.wgmma(dv_acc, p_tile.T, do_smem.at[slot])
                    ds = p * (products_so_far(dp_acc, but=1) - across(delta, p.shape))
                    plgpu.barrier_wait(ds_ready)
                    plgpu.barrier_wait(ds_free)
                    ds_tile[...] = ds.astype(q_smem.dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_ready)

                pl.run_scoped(by_logits, *[plgpu.ACC((rows, ROWS), f32)] * 2)

                def by_queries(dq_acc: Any) -> None:
                    # Of the step before, whose gradient of logits the other warpgroup has surely left by now. Before
                    # the first there was none: what that one hands over is not added to anything.
                    start_queries(dq_acc, at + 1, zero)
                    plgpu.wgmma(dk_acc, ds_tile.T, q_smem.at[slot])
                    dq = products_so_far(dq_acc, but=1)
                    plgpu.barrier_arrive(ds_free)
                    hand_over(dq)

                pl.run_scoped(by_queries, plgpu.ACC((ROWS, d), f32))

            lax.fori_loop(0, steps, step, None)

            def last_queries(dq_acc: Any) -> jax.Array:
                plgpu.barrier_wait(ds_ready)
                start_queries(dq_acc, steps + 1, 0)
                return dq_acc[...]

            dq = pl.run_scoped(last_queries, plgpu.ACC((ROWS, d), f32))
            plgpu.barrier_wait(ds_free)
            plgpu.barrier_arrive(ds_free)
            hand_over(dq)
            return dk_acc[...], dv_acc[...]

        dk, dv = pl.run_scoped(walk, *[plgpu.ACC((ROWS, d), f32)] * 2)
        # The other warpgroup has read these keys for the last time.
        plgpu.barrier_wait(ds_free)
        plgpu.barrier_wait(dq_free)
        k_tile, v_tile = k_smem.at[own], v_smem.at[own]
        k_tile[...] = (dk * scale).astype(q_smem.dtype)
        v_tile[...] = dv.astype(q_smem.dtype)
        plgpu.commit_smem()
        there = (row, pl.ds(begin, ROWS), head)
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[there])
        plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[there])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(registers(2, 2), action="increase")
        # Each has code of its own, where its places in shared memory are constants: there are no registers to spare.
        for w in range(2):
            pl.when(warpgroup == w)(functools.partial(compute, w))

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        for w in range(2):
            own = (row, pl.ds((2 * tile + w) * ROWS, ROWS), head)
            plgpu.copy_gmem_to_smem(k_ref.at[own], k_smem.at[w], kv_ready)
            plgpu.copy_gmem_to_smem(v_ref.at[own], v_smem.at[w], kv_ready)

        def fetch(at: Any, wait: bool) -> None:
            slot, (h, i) = rem(at, stages), place(at)
            here = pl.ds(i * rows, rows)
            if wait:
                plgpu.barrier_wait(q_free.at[slot])
            for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                plgpu.copy_gmem_to_smem(ref.at[row, here, h], smem.at[slot], q_ready.at[slot])
            for ref, smem in ((log2_ref, log2_smem), (delta_ref, delta_smem)):
                plgpu.copy_gmem_to_smem(ref.at[row, h, here], smem.at[slot], q_ready.at[slot])

        lax.fori_loop(0, jnp.minimum(steps, stages), lambda at, _: fetch(at, False), None)
        lax.fori_loop(stages, steps, lambda at, _: fetch(at, True), None)

    @pl.when(warpgroup == 3)
    def _() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        plgpu.barrier_arrive(dq_free)

        def say_done(at: Any) -> None:
            h, i = place(at)
            plgpu.semaphore_signal(semaphores.at[row, h, i], 1, memory_scope="gpu")

        def write(at: Any) -> None:
            """Adds what the step before this one has left."""
            plgpu.barrier_wait(dq_ready)

            def copy(how: Literal["add"] | None) -> None:
                h, i = place(at - 1)
                for w in range(2):
                    there = dq_ref.at[row, pl.ds(i * rows + w * ROWS, ROWS), h]
                    plgpu.copy_smem_to_gmem(dq_smem.at[w], there, reduction_op=how, commit_group=w == 1)

            @pl.when(at > 0)
            def _() -> None:
                h, i = place(at - 1)
                rank = ranks_ref[row, tile, i]
                pl.when(rank == 0)(lambda: copy(None))

                @pl.when(rank > 0)
                def _() -> None:
                    plgpu.semaphore_wait(semaphores.at[row, h, i], rank, decrement=False, memory_scope="gpu")
                    copy("add")

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(dq_free)
            # The next block may add once what this one began a step ago has arrived.
            plgpu.wait_smem_to_gmem(1)
            pl.when(at > 1)(lambda: say_done(at - 2))

        lax.fori_loop(0, steps + 1, lambda at, _: write(at), None)
        plgpu.wait_smem_to_gmem(0)
        pl.when(steps > 0)(lambda: say_done(steps - 1))
