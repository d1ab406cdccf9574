"""The gradients of `flash_gpu`: of the queries by a walk over keys, of keys and values by a walk over queries.

Blocks of the first stay, as in the forward pass, and begin to fetch a tile's queries while they finish the one before.
In the second, a step's products run on while the next step begins.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.flash_gpu_tiles import (
    BLOCKS,
    FEEDER_REGISTERS,
    ROWS,
    SMEM_BYTES,
    WGMMA,
    across,
    deal,
    feed_keys,
    in_phases,
    kernel,
    mask_logits,
    own_visits,
    registers,
    rem,
    unknown_zero,
    zeros,
)
from qwen_jax.kernels.attention.visits import visitors, visits
from qwen_jax.kernels.gpu.hopper import load, products_so_far, tiled
from qwen_jax.kernels.softmax import LOG2E

# The queries' gradient.


@functools.partial(jax.jit, static_argnames="scale")
def run_queries(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, start: jax.Array, end: jax.Array, log2: jax.Array,
    delta: jax.Array, *, scale: float,
) -> jax.Array:  # fmt: skip
    (B, _, H, d), padded = q.shape, start.shape[1]
    keys = 128
    stages = min(4, (SMEM_BYTES - 6 * ROWS * d * 2) // (2 * keys * d * 2))
    launch = kernel(
        "flash_backward_queries",
        functools.partial(_queries_block, scale=scale, group=H // k.shape[2]),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        {"block": min(BLOCKS, B * H * (padded // (2 * ROWS)))},
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
    (dq,) = launch(q, k, v, do, start, end, log2, delta, visits(start, end, ROWS, keys))
    result: jax.Array = dq
    return result


def _queries_block(
    q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, start_ref: Any, end_ref: Any, log2_ref: Any, delta_ref: Any,
    visits_ref: Any, dq_ref: Any, *, q_smem: Any, do_smem: Any, dq_smem: Any, k_smem: Any, v_smem: Any, q_ready: Any,
    k_ready: Any, v_ready: Any, k_free: Any, v_free: Any, scale: float, group: int,
) -> None:  # fmt: skip
    warpgroup, f32 = lax.axis_index("warpgroup"), jnp.float32
    stages, keys, d = k_smem.shape
    B, H, padded = log2_ref.shape
    turns, place = deal(B, H, padded // (2 * ROWS))

    def visited(turn: Any) -> tuple[Any, Any, list[Any]]:
        row, _, tile = place(turn)
        return own_visits(visits_ref, row, tile, warpgroup, 2)

    def fetch(turn: Any) -> None:
        row, head, tile = place(turn)
        rows = pl.ds((2 * tile + warpgroup) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_smem.at[warpgroup], q_ready.at[warpgroup])
        plgpu.copy_gmem_to_smem(do_ref.at[row, rows, head], do_smem.at[warpgroup], q_ready.at[warpgroup])

    def of_rows(turn: Any) -> list[jax.Array]:
        """Intervals, logarithms and deltas."""
        row, head, tile = place(turn)
        rows = pl.ds((2 * tile + warpgroup) * ROWS, ROWS)
        where = (
            start_ref.at[row, rows],
            end_ref.at[row, rows],
            log2_ref.at[row, head, rows],
            delta_ref.at[row, head, rows],
        )
        return [load(x, WGMMA.reduce(1)) for x in where]

    def compute_tile(turn: Any, carry: Any) -> Any:
        before, (low, high, log2, delta) = carry
        row, head, tile = place(turn)
        first, last, visits = visited(turn)
        rows = pl.ds((2 * tile + warpgroup) * ROWS, ROWS)
        plgpu.barrier_wait(q_ready.at[warpgroup])
        factor = scale * LOG2E

        def step(i: Any, acc: jax.Array, masked: bool) -> jax.Array:
            slot = rem(before + i - first, stages)
            own = warpgroup + unknown_zero(i)
            q_tile, do_tile = q_smem.at[own], do_smem.at[own]
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])

            def by_logits(s_acc: Any, dp_acc: Any) -> jax.Array:
                plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
                plgpu.wgmma(dp_acc, do_tile, v_smem.at[slot].T)
                s = products_so_far(s_acc, but=1)
                if masked:
                    s = mask_logits(s, low - i * keys, high - i * keys, axis=1)
                p = jnp.exp2(s * factor - across(log2, s.shape))
                return p * (products_so_far(dp_acc) - across(delta, s.shape))

            ds = pl.run_scoped(by_logits, *[plgpu.ACC((ROWS, keys), f32)] * 2).astype(q_smem.dtype)
            plgpu.barrier_arrive(v_free.at[slot])
            acc = pl.run_state(lambda acc: plgpu.wgmma(acc, ds, k_smem.at[slot]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(k_free.at[slot])
            return acc

        acc = in_phases(visits, step, zeros((ROWS, d), WGMMA))
        # What the next tile begins with is on its way while this one's end is worked out.
        next_turn = jnp.minimum(turn + 1, turns - 1)
        pl.when(turn + 1 < turns)(lambda: fetch(turn + 1))
        next_rows = of_rows(next_turn)
        dq_tile = dq_smem.at[warpgroup]
        # The tile before has left it.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dq_tile[...] = (acc * scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dq_tile, dq_ref.at[row, rows, head])
        return before + last - first, next_rows

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(registers(2), action="increase")
        fetch(jnp.int32(0))
        lax.fori_loop(0, turns, compute_tile, (jnp.int32(0), of_rows(jnp.int32(0))))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")

        def feed(turn: Any, before: Any) -> Any:
            (row, head, _), (first, last, _) = place(turn), visited(turn)
            feed_keys(k_ref, v_ref, (row, lax.div(head, jnp.int32(group))), first, last - first, before,
                      k_smem, v_smem, k_ready, v_ready, k_free, v_free)  # fmt: skip
            return before + last - first

        lax.fori_loop(0, turns, feed, jnp.int32(0))


# That of keys and values.


@functools.partial(jax.jit, static_argnames="scale")
def run_keys(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, start: jax.Array, end: jax.Array, log2: jax.Array,
    delta: jax.Array, *, scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    (B, S, K, d), keys = k.shape, 2 * ROWS
    rows = 64
    tiles = -(-S // keys)
    stages = min(4, (SMEM_BYTES - 4 * ROWS * d * 2) // (2 * rows * (d * 2 + 4)))
    like = jax.ShapeDtypeStruct(k.shape, k.dtype)
    launch = kernel(
        "flash_backward_keys",
        functools.partial(_keys_block, scale=scale, group=q.shape[2] // K),
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
    dk, dv = launch(q, k, v, do, start, end, log2, delta, visitors(start, end, rows, keys, tiles))
    return dk, dv


def _keys_block(
    q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, start_ref: Any, end_ref: Any, log2_ref: Any, delta_ref: Any,
    visits_ref: Any, dk_ref: Any, dv_ref: Any, *, k_smem: Any, v_smem: Any, q_smem: Any, do_smem: Any, log2_smem: Any,
    delta_smem: Any, k_ready: Any, q_ready: Any, q_free: Any, scale: float, group: int,
) -> None:  # fmt: skip
    warpgroup, row, head, tile = (lax.axis_index(name) for name in ("warpgroup", "row", "head", "tile"))
    stages, rows, d = q_smem.shape
    first, last, full_first, full_last = (visits_ref[row, tile, n] for n in range(4))
    count, f32 = last - first, jnp.float32

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(registers(2), action="increase")
        begin = (2 * tile + warpgroup) * ROWS
        own = (row, pl.ds(begin, ROWS), head)
        k_tile, v_tile = k_smem.at[warpgroup], v_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[own], k_tile, k_ready.at[warpgroup])
        plgpu.copy_gmem_to_smem(v_ref.at[own], v_tile, k_ready.at[warpgroup])
        plgpu.barrier_wait(k_ready.at[warpgroup])
        factor = scale * LOG2E

        def walk(dk_acc: Any, dv_acc: Any) -> tuple[jax.Array, jax.Array]:
            def step(at: Any, _: Any) -> None:
                i, slot, own = first + lax.rem(at, count), rem(at, stages), warpgroup + unknown_zero(at)
                k_tile, v_tile = k_smem.at[own], v_smem.at[own]
                plgpu.barrier_wait(q_ready.at[slot])

                def by_logits(s_acc: Any, dp_acc: Any) -> None:
                    # Keys are the rows here, queries the columns.
                    plgpu.wgmma(s_acc, k_tile, q_smem.at[slot].T)
                    plgpu.wgmma(dp_acc, v_tile, do_smem.at[slot].T)

                    def masked(s: jax.Array) -> jax.Array:
                        here = pl.ds(i * rows, rows)
                        low, high = (load(x.at[row, here], WGMMA.reduce(0)) - begin for x in (start_ref, end_ref))
                        return mask_logits(s, low, high, axis=0)

                    s = products_so_far(s_acc, but=1)
                    # Behind these products, those of the step before are done too.
                    pl.when(at > 0)(lambda: plgpu.barrier_arrive(q_free.at[rem(at - 1, stages)]))
                    s = lax.cond((i >= full_first) & (i < full_last), lambda s: s, masked, s)
                    p = jnp.exp2(s * factor - across(load(log2_smem.at[slot], WGMMA.reduce(0)), s.shape, 1))
                    plgpu.wgmma(dv_acc, p.astype(q_smem.dtype), do_smem.at[slot])
                    delta = across(load(delta_smem.at[slot], WGMMA.reduce(0)), s.shape, 1)
                    ds = p * (products_so_far(dp_acc, but=1) - delta)
                    plgpu.wgmma(dk_acc, ds.astype(q_smem.dtype), q_smem.at[slot])

                pl.run_scoped(by_logits, *[plgpu.ACC((ROWS, rows), f32)] * 2)

            lax.fori_loop(0, count * group, step, None)
            return dk_acc[...], dv_acc[...]

        dk, dv = pl.run_scoped(walk, *[plgpu.ACC((ROWS, d), f32)] * 2)
        k_tile[...] = (dk * scale).astype(q_smem.dtype)
        v_tile[...] = dv.astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[own])
        plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[own])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")

        def fetch(i: Any, wait: bool) -> None:
            slot = rem(i, stages)
            h = head * group + lax.div(i, count)
            here = pl.ds((first + lax.rem(i, count)) * rows, rows)
            if wait:
                plgpu.barrier_wait(q_free.at[slot])
            for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                plgpu.copy_gmem_to_smem(ref.at[row, here, h], smem.at[slot], q_ready.at[slot])
            for ref, smem in ((log2_ref, log2_smem), (delta_ref, delta_smem)):
                plgpu.copy_gmem_to_smem(ref.at[row, h, here], smem.at[slot], q_ready.at[slot])

        total = count * group
        lax.fori_loop(0, jnp.minimum(total, stages), lambda i, _: fetch(i, False), None)
        lax.fori_loop(stages, total, lambda i, _: fetch(i, True), None)
