"""Attention over interval masks on Hopper GPUs: forward and backward, for training and prefill.

A thread block has two warpgroups that compute, 64 rows each, and a third that keeps shared memory filled. The forward
pass and the gradient of the queries walk over tiles of keys; the gradient of keys and values walks over tiles of
queries, of all heads of a group, so that nothing is summed outside. Every sum has one order: results are the same bits
from run to run. What a tile must visit, and which part of that needs no mask, is worked out beforehand (`_visits`).

Sources: FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the algorithm and its gradient, FlashAttention-3 (Shah et al.
2024, arXiv:2407.08608) for the roles of the warpgroups.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.hopper import load, products_so_far

ROWS = 64
"""Rows of one warpgroup, on which wgmma insists."""
_LOWEST, _LOW = -1e30, -1e15
"""A masked logit, and where the running maximum starts: below every real logit and so far above a masked one that its
probability is zero, also before a row has seen anything."""
_FORWARD = {64: (3, 128), 128: (2, 128)}
"""Warpgroups that compute, and keys of a tile, for each head_dim."""
_SMEM_BYTES = 227 * 1024 - 4096
_LOG2E = math.log2(math.e)
_WGMMA = plgpu.Layout.WGMMA
_FEEDER_REGISTERS = 32


def supports(dtype: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels can do this, as one device sees it."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim in (64, 128) and num_heads % num_kv_heads == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attention(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention where query row i sees keys start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: queries, bfloat16 or float16.
      k_BSKd, v_BSKd: keys and values.
      start_BT, end_BT: int32 intervals within the S keys; rows that see nothing have start >= end.
      scale: multiplies the logits.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing; and the natural logarithm of the softmax's
      denominator, float32 [B, H, T], minus infinity there. Both have gradients.

    Raises:
      InputError: what `supports` denies.
    """
    return _forward(q_BTHd, k_BSKd, v_BSKd, start_BT, end_BT, scale)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, scale: float
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    if not supports(q.dtype, q.shape[2], k.shape[2], q.shape[3]):
        raise InputError(
            f"The attention kernels for Hopper GPUs take bfloat16 or float16 and head_dim 64 or 128; got {q.dtype} "
            f"{q.shape} and {k.shape}. Use implementation='reference'."
        )
    start, end = jnp.maximum(start, 0), jnp.minimum(end, k.shape[1])
    out, lse = _run_forward(_in_eights(q), _in_eights(k), _in_eights(v), start, end, scale=scale)
    out, lse = out[:, : q.shape[1]], lse[:, :, : q.shape[1]]
    return (out, lse), (q, k, v, start, end, out, lse)


def _backward(scale: float, kept: Any, by: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, start, end, out, lse = kept
    by_out, by_lse = by
    # What the softmax takes off each logit's gradient; a gradient of the log-sum-exp adds the probability itself.
    delta = jnp.einsum("BTHd,BTHd->BHT", out.astype(jnp.float32), by_out.astype(jnp.float32)) - by_lse
    # In base 2, and so large for a row without keys that its probabilities are zero.
    log2 = jnp.where(jnp.isfinite(lse), lse * _LOG2E, -_LOWEST)
    arrays: list[Any] = [_in_eights(x) for x in (q, k, v, by_out)]
    arrays += [_padded(x, 2 * ROWS) for x in (start, end, log2, delta)]
    dq, (dk, dv) = _run_queries(*arrays, scale=scale), _run_keys(*arrays, scale=scale)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]], None, None


attention.defvjp(_forward, _backward)


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Fills up the last axis with zeros: rows that are not there see nothing."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def _in_eights(x_BTHd: jax.Array) -> jax.Array:
    """A length in whole eights, which the copy engine wants of what it lays out in tiles; more it fills up itself."""
    return jnp.pad(x_BTHd, ((0, 0), (0, -x_BTHd.shape[1] % 8), (0, 0), (0, 0)))


def _visits(start_BT: jax.Array, end_BT: jax.Array, rows: int, keys: int) -> jax.Array:
    """The tiles of keys that a tile of queries visits, and those among them where no pair is masked.

    Args:
      start_BT, end_BT: intervals.
      rows, keys: length of a tile of either.

    Returns:
      int32 [B, tiles, 4]: first and end of the visited, first and end of the unmasked.
    """
    start, end = (x.reshape(x.shape[0], -1, rows) for x in (start_BT, end_BT))
    sees = start < end
    first = jnp.where(sees, start, 2**30).min(axis=2) // keys
    last = -(-jnp.where(sees, end, 0).max(axis=2) // keys)
    first = jnp.minimum(first, last)
    full_first = jnp.clip(-(-start.max(axis=2) // keys), first, last)
    full_last = jnp.clip(end.min(axis=2) // keys, full_first, last)
    return jnp.stack([first, last, full_first, full_last], axis=2)


def _visitors(start_BT: jax.Array, end_BT: jax.Array, rows: int, keys: int, count: int) -> jax.Array:
    """The reverse: the tiles of queries that visit each of `count` tiles of keys, as `_visits` gives it.

    Tiles between the first and the last that don't see it are counted in; their pairs are all masked.
    """
    start, end = (x.reshape(x.shape[0], 1, -1, rows) for x in (start_BT, end_BT))
    key = jnp.arange(count, dtype=jnp.int32)[:, None] * keys
    sees = start < end
    low = jnp.where(sees, start, 2**30).min(axis=3)
    high = jnp.where(sees, end, 0).max(axis=3)
    meets = (low < key + keys) & (high > key)
    whole = (start.max(axis=3) <= key) & (end.min(axis=3) >= key + keys)
    tiles = start.shape[2]

    def first(x: jax.Array) -> jax.Array:
        return jnp.where(x.any(axis=2), jnp.argmax(x, axis=2), tiles).astype(jnp.int32)

    begin = jnp.where(meets.any(axis=2), first(meets), 0)
    finish = jnp.where(meets.any(axis=2), tiles - first(meets[:, :, ::-1]), 0)
    full_begin = jnp.clip(first(whole), begin, finish)
    # The first run of whole tiles: where they are interrupted it ends.
    broken = ~whole & (jnp.arange(tiles) >= full_begin[:, :, None])
    full_finish = jnp.clip(first(broken), full_begin, finish)
    return jnp.stack([begin, finish, full_begin, full_finish], axis=2)


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the order that the tensor cores read without bank conflicts."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _registers(warpgroups: int) -> int:
    """Of a thread of the warpgroups that compute, what the feeder leaves them. One more than there are: a deadlock."""
    threads = warpgroups + 1
    at_launch = 65536 // 128 // threads // 8 * 8
    return (threads * at_launch - _FEEDER_REGISTERS) // warpgroups // 8 * 8


def _across(x: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """A number for each row (or, with axis 1, for each column), all along it."""
    return lax.broadcast_in_dim(x, shape, [axis])


def _rem(i: Any, n: int) -> jax.Array:
    return lax.rem(i, jnp.int32(n))


def _in_phases(visits: list[Any], body: Callable[..., Any], carry: Any) -> Any:
    """Runs `body(i, carry, masked)` over the visited tiles; those in the middle need no mask."""
    first, last, full_first, full_last = visits
    for begin, end, masked in ((first, full_first, True), (full_first, full_last, False), (full_last, last, True)):
        carry = lax.fori_loop(begin, end, functools.partial(body, masked=masked), carry)
    return carry


def _masked(s: jax.Array, low: jax.Array, high: jax.Array, axis: int) -> jax.Array:
    """Logits with those outside low <= place < high made lowest; `low` and `high` are for each row.

    Args:
      s: [rows, columns].
      low, high: int32, one for each row and counted along columns (axis 1), or the other way round (axis 0).
      axis: along which the place is counted.
    """
    place = plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=_WGMMA)
    low, high = (_across(x, s.shape, 1 - axis) for x in (low, high))
    return jnp.where((place >= low) & (place < high), s, _LOWEST)


def _zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _kernel(
    name: str, block: Callable[..., None], out_type: Any, grid: tuple[int, int, int], threads: int, **scratch: Any
) -> Any:
    """A kernel over heads, tiles and rows of the batch; `block` gets its operands, results and shared memory."""

    def body(*refs: Any) -> None:
        pl.run_scoped(functools.partial(block, *refs), collective_axes="warpgroup", **scratch)

    mesh = plgpu.Mesh(grid=grid, grid_names=("head", "tile", "row"), num_threads=threads, thread_name="warpgroup")
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    return pl.kernel(body, out_type=out_type, mesh=mesh, compiler_params=params, name=name)


# Forward. This and the two below are jitted so that a model of many layers lowers each of them once.


@functools.partial(jax.jit, static_argnames="scale")
def _run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    (B, _, H, d) = q.shape
    warpgroups, keys = _FORWARD[d]
    stages = min(4, (_SMEM_BYTES - warpgroups * ROWS * (d * 2 + 4)) // (2 * keys * d * 2))
    start, end = (_padded(x, warpgroups * ROWS) for x in (start, end))
    padded = start.shape[1]
    kernel = _kernel(
        "flash_forward",
        functools.partial(_forward_block, scale=scale, group=H // k.shape[2]),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, padded), jnp.float32)),
        (H, padded // (warpgroups * ROWS), B),
        warpgroups + 1,
        q_smem=_tiled((warpgroups, ROWS, d), q.dtype),
        k_smem=_tiled((stages, keys, d), q.dtype),
        v_smem=_tiled((stages, keys, d), q.dtype),
        lse_smem=plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_barriers=warpgroups),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        turn=plgpu.Barrier(num_arrivals=2),
    )
    out, lse = kernel(q, k, v, start, end, _visits(start, end, ROWS, keys))
    return out, lse


def _own_visits(visits_ref: Any, row: Any, tile: Any, warpgroup: Any, warpgroups: int) -> tuple[Any, Any, list[Any]]:
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


def _forward_block(
    q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, visits_ref: Any, out_ref: Any, lse_ref: Any, *,
    q_smem: Any, k_smem: Any, v_smem: Any, lse_smem: Any, q_ready: Any, k_ready: Any, v_ready: Any, k_free: Any,
    v_free: Any, turn: Any, scale: float, group: int,
) -> None:  # fmt: skip
    warpgroup, row, head = (lax.axis_index(name) for name in ("warpgroup", "row", "head"))
    # The last tiles see most under a causal mask: they begin first.
    tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")
    (stages, keys, d), warpgroups, f32 = k_smem.shape, q_smem.shape[0], jnp.float32
    first, last, visits = _own_visits(visits_ref, row, tile, warpgroup, warpgroups)

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
        plgpu.set_max_registers(_registers(warpgroups), action="increase")
        rows = pl.ds((warpgroups * tile + warpgroup) * ROWS, ROWS)
        q_tile = q_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_tile, q_ready.at[warpgroup])
        low, high = (load(x.at[row, rows], _WGMMA.reduce(1)) for x in (start_ref, end_ref))
        plgpu.barrier_wait(q_ready.at[warpgroup])
        factor = scale * _LOG2E

        def step(i: Any, carry: Any, masked: bool) -> Any:
            acc, top, total = carry
            slot = _rem(i - first, stages)
            plgpu.barrier_wait(k_ready.at[slot])

            def logits(s_acc: Any) -> jax.Array:
                plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
                take_turns()
                return s_acc[...]

            s = pl.run_scoped(logits, plgpu.ACC((ROWS, keys), f32))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                s = _masked(s, low - i * keys, high - i * keys, axis=1)
            new_top = jnp.maximum(top, s.max(axis=1) * factor)
            alpha = jnp.exp2(top - new_top)
            p = jnp.exp2(s * factor - _across(new_top, s.shape))
            acc = acc * _across(alpha, acc.shape)
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
        top = plgpu.layout_cast(jnp.full((ROWS,), _LOW, f32), _WGMMA.reduce(1))
        carry = _zeros((ROWS, d), _WGMMA), top, _zeros((ROWS,), _WGMMA.reduce(1))
        acc, top, total = _in_phases(visits, step, carry)
        pl.when(warpgroup == 0)(take_turns)

        sees = low < high
        inverse = jnp.where(sees, 1 / total, 0.0)
        q_tile[...] = (acc * _across(inverse, acc.shape)).astype(q_smem.dtype)
        lse_smem.at[warpgroup][...] = jnp.where(sees, top * (1 / _LOG2E) + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, out_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == warpgroups)
    def _() -> None:
        plgpu.set_max_registers(_FEEDER_REGISTERS, action="decrease")
        _feed_keys(k_ref, v_ref, (row, lax.div(head, jnp.int32(group))), first, last - first,
                   k_smem, v_smem, k_ready, v_ready, k_free, v_free)  # fmt: skip


def _feed_keys(
    k_ref: Any, v_ref: Any, where: tuple[Any, Any], first: Any, count: Any, k_smem: Any, v_smem: Any, k_ready: Any,
    v_ready: Any, k_free: Any, v_free: Any,
) -> None:  # fmt: skip
    """Copies tiles of keys and values to shared memory as it comes free."""
    stages, keys, _ = k_smem.shape
    row, head = where

    def fetch(i: Any, wait: bool) -> None:
        slot = _rem(i, stages)
        at = (row, pl.ds((first + i) * keys, keys), head)
        for ref, smem, ready, free in ((k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)):
            if wait:
                plgpu.barrier_wait(free.at[slot])
            plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], ready.at[slot])

    lax.fori_loop(0, jnp.minimum(count, stages), lambda i, _: fetch(i, False), None)
    lax.fori_loop(stages, count, lambda i, _: fetch(i, True), None)


# Gradient of the queries.


@functools.partial(jax.jit, static_argnames="scale")
def _run_queries(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, start: jax.Array, end: jax.Array, log2: jax.Array,
    delta: jax.Array, *, scale: float,
) -> jax.Array:  # fmt: skip
    (B, _, H, d), padded = q.shape, start.shape[1]
    keys = 128 if d == 64 else 64
    stages = min(4, (_SMEM_BYTES - 4 * ROWS * d * 2) // (2 * keys * d * 2))
    kernel = _kernel(
        "flash_backward_queries",
        functools.partial(_queries_block, scale=scale, group=H // k.shape[2]),
        (jax.ShapeDtypeStruct(q.shape, q.dtype),),
        (H, padded // (2 * ROWS), B),
        3,
        q_smem=_tiled((2, ROWS, d), q.dtype),
        do_smem=_tiled((2, ROWS, d), q.dtype),
        k_smem=_tiled((stages, keys, d), q.dtype),
        v_smem=_tiled((stages, keys, d), q.dtype),
        q_ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    (dq,) = kernel(q, k, v, do, start, end, log2, delta, _visits(start, end, ROWS, keys))
    result: jax.Array = dq
    return result


def _queries_block(
    q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, start_ref: Any, end_ref: Any, log2_ref: Any, delta_ref: Any,
    visits_ref: Any, dq_ref: Any, *, q_smem: Any, do_smem: Any, k_smem: Any, v_smem: Any, q_ready: Any, k_ready: Any,
    v_ready: Any, k_free: Any, v_free: Any, scale: float, group: int,
) -> None:  # fmt: skip
    warpgroup, row, head = (lax.axis_index(name) for name in ("warpgroup", "row", "head"))
    tile = lax.axis_size("tile") - 1 - lax.axis_index("tile")
    stages, keys, d = k_smem.shape
    first, last, visits = _own_visits(visits_ref, row, tile, warpgroup, 2)
    f32 = jnp.float32

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(_registers(2), action="increase")
        rows = pl.ds((2 * tile + warpgroup) * ROWS, ROWS)
        q_tile, do_tile = q_smem.at[warpgroup], do_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_tile, q_ready.at[warpgroup])
        plgpu.copy_gmem_to_smem(do_ref.at[row, rows, head], do_tile, q_ready.at[warpgroup])
        low, high = (load(x.at[row, rows], _WGMMA.reduce(1)) for x in (start_ref, end_ref))
        log2, delta = (load(x.at[row, head, rows], _WGMMA.reduce(1)) for x in (log2_ref, delta_ref))
        plgpu.barrier_wait(q_ready.at[warpgroup])
        factor = scale * _LOG2E

        def step(i: Any, acc: jax.Array, masked: bool) -> jax.Array:
            slot = _rem(i - first, stages)
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])

            def by_logits(s_acc: Any, dp_acc: Any) -> jax.Array:
                plgpu.wgmma(s_acc, q_tile, k_smem.at[slot].T)
                plgpu.wgmma(dp_acc, do_tile, v_smem.at[slot].T)
                s = products_so_far(s_acc, but=1)
                if masked:
                    s = _masked(s, low - i * keys, high - i * keys, axis=1)
                p = jnp.exp2(s * factor - _across(log2, s.shape))
                return p * (products_so_far(dp_acc) - _across(delta, s.shape))

            ds = pl.run_scoped(by_logits, *[plgpu.ACC((ROWS, keys), f32)] * 2).astype(q_smem.dtype)
            plgpu.barrier_arrive(v_free.at[slot])
            acc = pl.run_state(lambda acc: plgpu.wgmma(acc, ds, k_smem.at[slot]))(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(k_free.at[slot])
            return acc

        acc = _in_phases(visits, step, _zeros((ROWS, d), _WGMMA))
        q_tile[...] = (acc * scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[row, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(_FEEDER_REGISTERS, action="decrease")
        _feed_keys(k_ref, v_ref, (row, lax.div(head, jnp.int32(group))), first, last - first,
                   k_smem, v_smem, k_ready, v_ready, k_free, v_free)  # fmt: skip


# Gradient of keys and values.


@functools.partial(jax.jit, static_argnames="scale")
def _run_keys(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, start: jax.Array, end: jax.Array, log2: jax.Array,
    delta: jax.Array, *, scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    (B, S, K, d), keys = k.shape, 2 * ROWS
    rows = 64
    tiles = -(-S // keys)
    stages = min(4, (_SMEM_BYTES - 4 * ROWS * d * 2) // (2 * rows * (d * 2 + 4)))
    like = jax.ShapeDtypeStruct(k.shape, k.dtype)
    kernel = _kernel(
        "flash_backward_keys",
        functools.partial(_keys_block, scale=scale, group=q.shape[2] // K),
        (like, like),
        (K, tiles, B),
        3,
        k_smem=_tiled((2, ROWS, d), q.dtype),
        v_smem=_tiled((2, ROWS, d), q.dtype),
        q_smem=_tiled((stages, rows, d), q.dtype),
        do_smem=_tiled((stages, rows, d), q.dtype),
        log2_smem=plgpu.SMEM((stages, rows), jnp.float32),
        delta_smem=plgpu.SMEM((stages, rows), jnp.float32),
        k_ready=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        q_ready=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    dk, dv = kernel(q, k, v, do, start, end, log2, delta, _visitors(start, end, rows, keys, tiles))
    return dk, dv


def _keys_block(
    q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, start_ref: Any, end_ref: Any, log2_ref: Any, delta_ref: Any,
    visits_ref: Any, dk_ref: Any, dv_ref: Any, *, k_smem: Any, v_smem: Any, q_smem: Any, do_smem: Any, log2_smem: Any,
    delta_smem: Any, k_ready: Any, q_ready: Any, q_free: Any, scale: float, group: int,
) -> None:  # fmt: skip
    warpgroup, row, head, tile = (lax.axis_index(name) for name in ("warpgroup", "row", "head", "tile"))
    stages, rows, d = q_smem.shape
    visits = [visits_ref[row, tile, n] for n in range(4)]
    first, count, f32 = visits[0], visits[1] - visits[0], jnp.float32

    @pl.when(warpgroup < 2)
    def _() -> None:
        plgpu.set_max_registers(_registers(2), action="increase")
        begin = (2 * tile + warpgroup) * ROWS
        own = (row, pl.ds(begin, ROWS), head)
        k_tile, v_tile = k_smem.at[warpgroup], v_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[own], k_tile, k_ready.at[warpgroup])
        plgpu.copy_gmem_to_smem(v_ref.at[own], v_tile, k_ready.at[warpgroup])
        plgpu.barrier_wait(k_ready.at[warpgroup])
        factor = scale * _LOG2E

        def one_head(h: Any, carry: Any) -> Any:
            def step(i: Any, carry: Any, masked: bool) -> Any:
                dk, dv = carry
                slot = _rem(h * count + i - first, stages)
                plgpu.barrier_wait(q_ready.at[slot])

                def by_logits(s_acc: Any, dp_acc: Any) -> tuple[jax.Array, jax.Array]:
                    # Keys are the rows here, queries the columns.
                    plgpu.wgmma(s_acc, k_tile, q_smem.at[slot].T)
                    plgpu.wgmma(dp_acc, v_tile, do_smem.at[slot].T)
                    s = products_so_far(s_acc, but=1)
                    if masked:
                        here = pl.ds(i * rows, rows)
                        low, high = (load(x.at[row, here], _WGMMA.reduce(0)) - begin for x in (start_ref, end_ref))
                        s = _masked(s, low, high, axis=0)
                    p = jnp.exp2(s * factor - _across(load(log2_smem.at[slot], _WGMMA.reduce(0)), s.shape, 1))
                    dp = products_so_far(dp_acc)
                    ds = p * (dp - _across(load(delta_smem.at[slot], _WGMMA.reduce(0)), s.shape, 1))
                    return p.astype(q_smem.dtype), ds.astype(q_smem.dtype)

                p, ds = pl.run_scoped(by_logits, *[plgpu.ACC((ROWS, rows), f32)] * 2)

                def add(accs: Any) -> None:
                    dk_acc, dv_acc = accs
                    plgpu.wgmma(dv_acc, p, do_smem.at[slot])
                    plgpu.wgmma(dk_acc, ds, q_smem.at[slot])

                dk, dv = pl.run_state(add)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))
                plgpu.barrier_arrive(q_free.at[slot])
                return dk, dv

            return _in_phases(visits, step, carry)

        dk, dv = lax.fori_loop(0, group, one_head, (_zeros((ROWS, d), _WGMMA), _zeros((ROWS, d), _WGMMA)))
        k_tile[...] = (dk * scale).astype(q_smem.dtype)
        v_tile[...] = dv.astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[own])
        plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[own])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _() -> None:
        plgpu.set_max_registers(_FEEDER_REGISTERS, action="decrease")

        def fetch(i: Any, wait: bool) -> None:
            slot = _rem(i, stages)
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
