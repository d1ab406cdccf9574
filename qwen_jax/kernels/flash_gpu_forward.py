"""The forward pass of `flash_gpu`."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.flash_gpu_tiles import (
    FEEDER_REGISTERS,
    LOG2E,
    LOW,
    ROWS,
    SMEM_BYTES,
    WGMMA,
    across,
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
from qwen_jax.kernels.hopper import load, tiled
from qwen_jax.kernels.visits import visits

_SHAPES = {64: (3, 128), 128: (2, 128)}
"""Warpgroups that compute, and keys of a tile, for each head_dim."""


# This, as the backward pass, is jitted so that a model of many layers lowers it once.
@functools.partial(jax.jit, static_argnames="scale")
def run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    (B, _, H, d) = q.shape
    warpgroups, keys = _SHAPES[d]
    stages = min(4, (SMEM_BYTES - warpgroups * ROWS * (d * 2 + 4)) // (2 * keys * d * 2))
    start, end = (fill_up(x, warpgroups * ROWS) for x in (start, end))
    padded = start.shape[1]
    launch = kernel(
        "flash_forward",
        functools.partial(_forward_block, scale=scale, group=H // k.shape[2]),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, padded), jnp.float32)),
        (H, padded // (warpgroups * ROWS), B),
        warpgroups + 1,
        q_smem=tiled((warpgroups, ROWS, d), q.dtype),
        k_smem=tiled((stages, keys, d), q.dtype),
        v_smem=tiled((stages, keys, d), q.dtype),
        lse_smem=plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=warpgroups),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=2),
    )
    out, lse = launch(q, k, v, start, end, visits(start, end, ROWS, keys))
    return out, lse


def _forward_block(
    q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, visits_ref: Any, out_ref: Any, lse_ref: Any, *,
    q_smem: Any, k_smem: Any, v_smem: Any, lse_smem: Any, q_ready: Any, k_ready: Any, v_ready: Any, k_free: Any,
    v_free: Any, turn: Any, scale: float, group: int,
) -> None:  # fmt: skip
    warpgroup, row, head = (lax.axis_index(name) for name in ("warpgroup", "row", "head"))
    # The last tiles see most under a causal mask: they begin first.
    tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")
    (stages, keys, d), warpgroups, f32 = k_smem.shape, q_smem.shape[0], jnp.float32
    first, last, visits = own_visits(visits_ref, row, tile, warpgroup, warpgroups)

    def say_turn() -> None:
        if warpgroups == 2:
            plgpu.barrier_arrive(turn)

    def wait_turn() -> None:
        # One warpgroup's products run while the other one does its softmax. Three find their own way.
        if warpgroups == 2:
            plgpu.barrier_wait(turn)

    def take_turns() -> None:
        say_turn()
        wait_turn()

    @pl.when(warpgroup < warpgroups)
    def _() -> None:
        plgpu.set_max_registers(registers(warpgroups), action="increase")
        rows = pl.ds((warpgroups * tile + warpgroup) * ROWS, ROWS)
        q_tile = q_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_tile, q_ready.at[warpgroup])
        low, high = (load(x.at[row, rows], WGMMA.reduce(1)) for x in (start_ref, end_ref))
        plgpu.barrier_wait(q_ready.at[warpgroup])
        factor = scale * LOG2E

        def step(i: Any, carry: Any, masked: bool) -> Any:
            acc, top, total = carry
            slot = rem(i - first, stages)
            plgpu.barrier_wait(k_ready.at[slot])

            def logits(s_acc: Any) -> jax.Array:
                plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
                take_turns()
                return s_acc[...]

            s = pl.run_scoped(logits, plgpu.ACC((ROWS, keys), f32))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                s = mask_logits(s, low - i * keys, high - i * keys, axis=1)
            new_top = jnp.maximum(top, s.max(axis=1) * factor)
            alpha = jnp.exp2(top - new_top)
            p = jnp.exp2(s * factor - across(new_top, s.shape))
            acc = acc * across(alpha, acc.shape)
            total = total * alpha + p.sum(axis=1)
            p = p.astype(q_smem.dtype)
            acc, total, new_top, p = lax.optimization_barrier((acc, total, new_top, p))
            say_turn()
            plgpu.barrier_wait(v_ready.at[slot])
            wait_turn()
            acc = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v_smem.at[slot]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new_top, total

        pl.when(warpgroup == 1)(take_turns)
        top = plgpu.layout_cast(jnp.full((ROWS,), LOW, f32), WGMMA.reduce(1))
        carry = zeros((ROWS, d), WGMMA), top, zeros((ROWS,), WGMMA.reduce(1))
        acc, top, total = in_phases(visits, step, carry)
        pl.when(warpgroup == 0)(take_turns)

        sees = low < high
        inverse = jnp.where(sees, 1 / total, 0.0)
        q_tile[...] = (acc * across(inverse, acc.shape)).astype(q_smem.dtype)
        lse_smem.at[warpgroup][...] = jnp.where(sees, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, out_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == warpgroups)
    def _() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        feed_keys(k_ref, v_ref, (row, lax.div(head, jnp.int32(group))), first, last - first,
                   k_smem, v_smem, k_ready, v_ready, k_free, v_free)  # fmt: skip
