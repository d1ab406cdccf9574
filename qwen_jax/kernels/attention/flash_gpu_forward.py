"""The forward pass of `flash_gpu`.

As many blocks as there are multiprocessors work off all tiles of queries: while the end of one tile is worked out, keys
and queries of the next are already on their way.
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
    fill_up,
    in_phases,
    kernel,
    mask_logits,
    own_visits,
    registers,
    rem,
    zeros,
)
from qwen_jax.kernels.attention.visits import visits
from qwen_jax.kernels.gpu.hopper import load, products_so_far, tiled
from qwen_jax.kernels.softmax import LOG2E, LOW

_WARPGROUPS, _KEYS = 2, 128
"""Warpgroups that compute, and keys of a tile."""


# This, as the backward pass, is jitted so that a model of many layers lowers it once.
@functools.partial(jax.jit, static_argnames=("scale", "head_major"))
def run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, *, scale: float,
    head_major: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    (B, _, H, d) = q.shape
    warpgroups, keys = _WARPGROUPS, _KEYS
    stages = min(4, (SMEM_BYTES - warpgroups * ROWS * (d * 4 + 4)) // (2 * keys * d * 2))
    start, end = (fill_up(x, warpgroups * ROWS) for x in (start, end))
    padded = start.shape[1]
    launch = kernel(
        "flash_forward",
        functools.partial(_forward_block, scale=scale, group=H // k.shape[1 if head_major else 2],
                          head_major=head_major),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, padded), jnp.float32)),
        {"block": min(BLOCKS, B * H * (padded // (warpgroups * ROWS)))},
        warpgroups + 1,
        q_smem=tiled((warpgroups, ROWS, d), q.dtype),
        k_smem=tiled((stages, keys, d), q.dtype),
        v_smem=tiled((stages, keys, d), q.dtype),
        out_smem=tiled((warpgroups, ROWS, d), q.dtype),
        lse_smem=plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=warpgroups),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )  # fmt: skip
    out, lse = launch(q, k, v, start, end, visits(start, end, ROWS, keys))
    return out, lse


def _forward_block(
    q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, visits_ref: Any, out_ref: Any, lse_ref: Any, *,
    q_smem: Any, k_smem: Any, v_smem: Any, out_smem: Any, lse_smem: Any, q_ready: Any, k_ready: Any, v_ready: Any,
    k_free: Any, v_free: Any, scale: float, group: int, head_major: bool,
) -> None:  # fmt: skip
    warpgroup = lax.axis_index("warpgroup")
    (stages, keys, d), warpgroups, f32 = k_smem.shape, q_smem.shape[0], jnp.float32
    B, H, padded = lse_ref.shape
    turns, place = deal(B, H, padded // (warpgroups * ROWS))

    def visited(turn: Any) -> list[Any]:
        """First and end of what a block visits in a turn; and of what one of its warpgroups need not mask of that,
        without the first, which always is masked."""
        row, _, tile = place(turn)
        tile = jnp.maximum(tile, 0)
        first, last, (_, _, full_first, full_last) = own_visits(visits_ref, row, tile, warpgroup, warpgroups)
        # Where nothing is seen, one tile is visited all the same, and all of it is masked.
        first, last = jnp.where(first < last, first, 0), jnp.where(first < last, last, 1)
        return [first, last, jnp.maximum(full_first, first + 1), jnp.maximum(full_last, first + 1)]

    def compute_tile(turn: Any, carry: Any) -> Any:
        before, (first, last, full_first, full_last) = carry
        row, head, tile = place(turn)
        next_visits = visited(turn + 1)
        visits = [first + 1, last, full_first, full_last]
        rows = pl.ds((warpgroups * tile + warpgroup) * ROWS, ROWS)
        q_tile, out_tile = q_smem.at[warpgroup], out_smem.at[warpgroup]
        low, high = (load(x.at[row, rows], WGMMA.reduce(1)) for x in (start_ref, end_ref))
        plgpu.barrier_wait(q_ready.at[warpgroup])
        factor = scale * LOG2E

        def softmax(s: jax.Array, i: Any, top: jax.Array, masked: bool) -> tuple[jax.Array, ...]:
            if masked:
                s = mask_logits(s, low - i * keys, high - i * keys, axis=1)
            new_top = jnp.maximum(top, s.max(axis=1) * factor)
            p = jnp.exp2(s * factor - across(new_top, s.shape))
            # Sums over threads can wait for the end of the walk: until then, a row has eight.
            return p, sum((p[:, n : n + 8] for n in range(8, keys, 8)), p[:, :8]), new_top

        def first_tile(s_acc: Any) -> tuple[jax.Array, ...]:
            slot = rem(before, stages)
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
            s = s_acc[...]
            plgpu.barrier_arrive(k_free.at[slot])
            top = plgpu.layout_cast(jnp.full((ROWS,), LOW, f32), WGMMA.reduce(1))
            p, total, top = softmax(s, first, top, True)
            plgpu.barrier_wait(v_ready.at[slot])
            return zeros((ROWS, d), WGMMA), p.astype(q_smem.dtype), total, top

        def walk(acc: Any) -> tuple[jax.Array, ...]:
            def step(i: Any, carry: Any, masked: bool) -> Any:
                """Products with these keys and with the values before; while the latter run, these keys' softmax."""
                so_far, p, total, top = carry
                slot, slot_before = rem(before + i - first, stages), rem(before + i - first - 1, stages)
                plgpu.barrier_wait(k_ready.at[slot])
                acc[...] = so_far

                def products(s_acc: Any) -> tuple[jax.Array, ...]:
                    plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
                    plgpu.wgmma(acc, p, v_smem.at[slot_before])
                    s = products_so_far(s_acc, but=1)
                    plgpu.barrier_arrive(k_free.at[slot])
                    new_p, here, new_top = softmax(s, i, top, masked)
                    return lax.optimization_barrier((new_p, here, new_top, jnp.exp2(top - new_top)))

                new_p, here, new_top, alpha = pl.run_scoped(products, plgpu.ACC((ROWS, keys), f32))
                # Needed in the next step only. Here, this wait keeps the compiler from moving the exponentials behind
                # the wait for the products.
                plgpu.barrier_wait(v_ready.at[slot])
                so_far = products_so_far(acc)
                plgpu.barrier_arrive(v_free.at[slot_before])
                so_far, total = (x * across(alpha, x.shape) for x in (so_far, total))
                return so_far, new_p.astype(q_smem.dtype), total + here, new_top

            carry = pl.run_scoped(first_tile, plgpu.ACC((ROWS, keys), f32))
            so_far, p, total, top = in_phases(visits, step, carry)
            acc[...] = so_far
            final = rem(before + last - 1 - first, stages)
            plgpu.wgmma(acc, p, v_smem.at[final])
            pl.when(turn + 1 < turns)(lambda: fetch_queries(turn + 1))
            so_far = acc[...]
            plgpu.barrier_arrive(v_free.at[final])
            return so_far, total.sum(axis=1), top

        acc, total, top = pl.run_scoped(walk, plgpu.ACC((ROWS, d), f32))
        sees = low < high
        inverse = jnp.where(sees, 1 / total, 0.0)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_tile[...] = (acc * across(inverse, acc.shape)).astype(q_smem.dtype)
        lse_smem.at[warpgroup][...] = jnp.where(sees, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[row, head, rows])
        return before + last - first, next_visits

    def fetch_queries(turn: Any) -> None:
        row, head, tile = place(turn)
        rows = pl.ds((warpgroups * tile + warpgroup) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_smem.at[warpgroup], q_ready.at[warpgroup])

    @pl.when(warpgroup < warpgroups)
    def _() -> None:
        plgpu.set_max_registers(registers(warpgroups), action="increase")
        fetch_queries(jnp.int32(0))
        lax.fori_loop(0, turns, compute_tile, (jnp.int32(0), visited(jnp.int32(0))))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == warpgroups)
    def _() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")

        def feed(turn: Any, before: Any) -> Any:
            (row, head, _), (first, last, _, _) = place(turn), visited(turn)
            feed_keys(k_ref, v_ref, (row, lax.div(head, jnp.int32(group))), first, last - first, before,
                      k_smem, v_smem, k_ready, v_ready, k_free, v_free, head_major)  # fmt: skip
            return before + last - first

        lax.fori_loop(0, turns, feed, jnp.int32(0))
