"""Scores of blocks of keys for tiles of queries on Hopper GPUs. Forward only.

A thread block works on 256 query rows of one head and reads the block means twice. The first pass computes the largest
logit of each row, with rows of the accumulator for queries. The second pass computes the logits with rows for means, so
that a sum over the queries of a tile is a sum over columns, which threads of one warp hold.

Each part of the keys has its own queries. Both passes visit one part after the other, and of each part the tiles of
means that some tile of queries scores. The ranges of the parts are disjoint for one tile of queries but may overlap for
several of them: then a later part reads what an earlier one wrote and replaces its own scores.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.flash_gpu_tiles import KeyTiles, deal, mask_logits, over_key_tiles
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import load, read_accumulator, tiled
from qwen_jax.kernels.gpu.tiles import (
    FEEDER_REGISTERS,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    across,
    compute_registers,
    kernel,
    rem,
)
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.softmax import LOG2E, LOWEST
from qwen_jax.kernels.types import Ref

WARPGROUPS, QUERIES, MEANS = 2, 128, 128
"""Warpgroups that compute, query rows of each, and means of a tile."""

_STEP = 8
"""The copy engine needs numbers of rows that are multiples of this for tiled shared memory."""


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block. The first dimension is a warpgroup or a stage of the ring."""

    q_smem: Ref
    k_smem: Ref
    top_smem: Ref
    out_smem: Ref
    first_smem: Ref
    end_smem: Ref
    q_ready: Ref
    old_ready: Ref
    k_ready: Ref
    k_free: Ref


class _Tables(NamedTuple):
    """What a thread block reads about ranges.

    Attributes:
      slots: int32 [B, groups of 256 rows, P, 6]: first and end of the tiles of means to visit, of those that all
        queries score wholly, and of those among which are all that earlier parts visited.
      first, end: int32 [B, P, padded rows], the blocks that each query row scores.
    """

    slots: Ref
    first: Ref
    end: Ref


@functools.partial(jax.jit, static_argnames="scale")
def scores(
    queries: Sequence[jax.Array], k_mean_BKJd: jax.Array, first_PBN: jax.Array, end_PBN: jax.Array, scale: float
) -> jax.Array:
    """Scores of blocks for tiles of queries; see `pooled_blocks.block_scores`.

    Args:
      queries: [B, N r, H, d] for each part; bfloat16 or float16, head_dim 64 or 128, r 8, 16, 32, 64 or 128.
      k_mean_BKJd: means, of the same dtype.
      first_PBN, end_PBN: int32, the blocks that the queries of a part score. The ranges of the parts are disjoint.
      scale: multiplies the logits.

    Returns:
      float32 [B, H, N, J], 0 for blocks in no range.
    """
    (B, T, H, d), (K, J), N = queries[0].shape, k_mean_BKJd.shape[1:3], first_PBN.shape[2]
    rows, dtype = T // N, queries[0].dtype
    assert rows in (8, 16, 32, 64, 128)
    own = QUERIES // rows
    first, end = (jnp.clip(x, 0, J) for x in (first_PBN, end_PBN))
    slots, first_BPT, end_BPT = _tables(first, end, rows)
    blocks, padded = slots.shape[1], -(-J // MEANS) * MEANS
    stages = min(4, (TILE_SHARED_BYTES - WARPGROUPS * QUERIES * (d * 2 + 12 + own * 4)) // (MEANS * d * 2))

    def block(*refs: Ref, **scratch: Ref) -> None:
        *q_refs, k_ref, slots_ref, first_ref, end_ref, out_ref = refs
        tables = _Tables(slots_ref, first_ref, end_ref)
        _block(q_refs, k_ref, tables, out_ref, _Memory(**scratch), rows=rows, scale=scale, group=H // K)

    launch = kernel(
        "block_scores",
        block,
        (jax.ShapeDtypeStruct((B, H, blocks * WARPGROUPS * own, padded), jnp.float32),),
        {"block": min(MULTIPROCESSORS, B * H * blocks)},
        WARPGROUPS + 1,
        q_smem=tiled((WARPGROUPS, QUERIES, d), dtype),
        k_smem=tiled((stages, MEANS, d), dtype),
        top_smem=plgpu.SMEM((WARPGROUPS, QUERIES), jnp.float32),
        out_smem=plgpu.SMEM((WARPGROUPS, own, MEANS), jnp.float32),
        first_smem=plgpu.SMEM((WARPGROUPS, QUERIES), jnp.int32),
        end_smem=plgpu.SMEM((WARPGROUPS, QUERIES), jnp.int32),
        q_ready=plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
        old_ready=plgpu.Barrier(num_arrivals=own, num_barriers=WARPGROUPS),
        k_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )
    [out] = launch(*queries, pad_to_multiple(k_mean_BKJd, 2, _STEP), slots, first_BPT, end_BPT)
    # The kernel leaves undefined what no part scores.
    j = jnp.arange(J, dtype=jnp.int32)
    scored_BNJ = ((first[..., None] <= j) & (j < end[..., None])).any(axis=0)
    return jnp.where(scored_BNJ[:, None], out[:, :, :N, :J], 0.0)


def _tables(first_PBN: jax.Array, end_PBN: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of `_Tables`.

    Args:
      first_PBN, end_PBN: ranges within the blocks.
      rows: query rows of a tile.
    """
    tiles = WARPGROUPS * QUERIES // rows
    first, end = (pad_to_multiple(x, 2, tiles) for x in (first_PBN, end_PBN))
    by_block = [x.reshape(*x.shape[:2], -1, tiles) for x in (first, end)]
    low = jnp.where(by_block[0] < by_block[1], by_block[0], jnp.iinfo(jnp.int32).max).min(axis=3) // MEANS
    high = -(-jnp.where(by_block[0] < by_block[1], by_block[1], 0).max(axis=3) // MEANS)
    low = jnp.minimum(low, high)
    full_low = jnp.clip(-(-by_block[0].max(axis=3) // MEANS), low, high)
    full_high = jnp.clip(by_block[1].min(axis=3) // MEANS, full_low, high)
    # The ranges of all earlier parts lie in one. It may contain tiles that none of them visits, which does no harm.
    visits = low < high
    written_low = lax.cummin(jnp.where(visits, low, jnp.iinfo(jnp.int32).max), axis=0)
    written_high = lax.cummax(jnp.where(visits, high, 0), axis=0)
    written = [jnp.pad(x[:-1], ((1, 0), (0, 0), (0, 0))) for x in (written_low, written_high)]
    slots = jnp.moveaxis(jnp.stack([low, high, full_low, full_high, *written], axis=3), 0, 2)
    first_BPT, end_BPT = (jnp.repeat(x, rows, axis=2).swapaxes(0, 1) for x in (first, end))
    return slots, first_BPT, end_BPT


def _block(
    q_refs: Sequence[Ref], k_ref: Ref, tables: _Tables, out_ref: Ref, memory: _Memory, *,
    rows: int, scale: float, group: int,
) -> None:  # fmt: skip
    """The program of a thread block: two warpgroups compute, 128 query rows each, and one copies means."""
    warpgroup = lax.axis_index("warpgroup")
    P, stages, own, f32 = len(q_refs), memory.k_smem.shape[0], QUERIES // rows, jnp.float32
    (B, _, H, _), blocks = q_refs[0].shape, tables.slots.shape[1]
    rounds, dealt = deal(B * H * blocks)
    turns = jnp.where(dealt(jnp.int32(rounds - 1)) < B * H * blocks, rounds, rounds - 1)
    k_smem, factor = memory.k_smem, scale * LOG2E

    def place(turn: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row of the batch, query head, and 256 query rows. The blocks that run at one time share a head."""
        n = dealt(turn)
        row_and_head = lax.div(n, jnp.int32(blocks))
        row = lax.div(row_and_head, jnp.int32(H))
        return row, row_and_head - row * H, n - row_and_head * blocks

    def slots_of(row: jax.Array, at: jax.Array, part: jax.Array | int) -> KeyTiles:
        return KeyTiles(*(tables.slots[row, at, part, n] for n in range(4)))

    def compute_turn(turn: jax.Array, before: jax.Array) -> jax.Array:
        row, head, at = place(turn)
        here, here_tile = ((WARPGROUPS * at + warpgroup) * n for n in (QUERIES, own))
        q_tile, top_tile = memory.q_smem.at[warpgroup], memory.top_smem.at[warpgroup]
        first_tile, end_tile = memory.first_smem.at[warpgroup], memory.end_smem.at[warpgroup]
        out_tile, old_ready = memory.out_smem.at[warpgroup], memory.old_ready.at[warpgroup]

        def fetch_queries(part: jax.Array) -> None:
            """Copies the queries of a part, and which blocks they score."""
            q_rows, ready = pl.ds(here, QUERIES), memory.q_ready.at[warpgroup]
            for p, q_ref in enumerate(q_refs):
                copy = functools.partial(plgpu.copy_gmem_to_smem, q_ref.at[row, q_rows, head], q_tile, ready)
                pl.when(part == p)(copy)
            plgpu.copy_gmem_to_smem(tables.first.at[row, part, q_rows], first_tile, ready)
            plgpu.copy_gmem_to_smem(tables.end.at[row, part, q_rows], end_tile, ready)
            plgpu.barrier_wait(ready)

        # The first pass: the largest logit of each row, over all parts.
        def maximum_of_part(part: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            before, *tops = carry
            slots = slots_of(row, at, part)
            pl.when(slots.first < slots.last)(functools.partial(fetch_queries, part))
            halves = [pl.ds(half * ROWS, ROWS) for half in range(2)]
            low, high = ([load(x.at[half], PER_ROW) for half in halves] for x in (first_tile, end_tile))

            def maximum(i: jax.Array, tops: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
                stage = rem(before + i - slots.first, stages)
                plgpu.barrier_wait(memory.k_ready.at[stage])

                def products(acc: Ref, next_acc: Ref) -> tuple[jax.Array, ...]:
                    # The product of the second half runs while the first half is compared.
                    plgpu.wgmma(acc, q_tile.at[pl.ds(0, ROWS)], k_smem.at[stage].T)
                    plgpu.wgmma(next_acc, q_tile.at[pl.ds(ROWS, ROWS)], k_smem.at[stage].T)
                    new = []
                    for half, (top, s_acc) in enumerate(zip(tops, (acc, next_acc), strict=True)):
                        s = read_accumulator(s_acc, pending=1 - half)
                        if half:
                            plgpu.barrier_arrive(memory.k_free.at[stage])
                        if masked:
                            s = mask_logits(s, low[half] - i * MEANS, high[half] - i * MEANS, axis=1)
                        new.append(lax.optimization_barrier(jnp.maximum(top, s.max(axis=1))))
                    return tuple(new)

                accumulators = (plgpu.ACC((ROWS, MEANS), f32),) * 2
                result: tuple[jax.Array, ...] = pl.run_scoped(products, *accumulators)
                return result

            return before + slots.last - slots.first, *over_key_tiles(slots, maximum, tuple(tops))

        lowest = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, f32), PER_ROW)
        before, *tops = lax.fori_loop(0, P, maximum_of_part, (before, lowest, lowest))
        for half, top in enumerate(tops):
            top_tile.at[pl.ds(half * ROWS, ROWS)][...] = top * factor
        plgpu.commit_smem()
        top = load(top_tile, PER_COLUMN)

        # The second pass: sums over the queries of each tile.
        def scores_of_part(part: jax.Array, before: jax.Array) -> jax.Array:
            slots = slots_of(row, at, part)
            pl.when(slots.first < slots.last)(functools.partial(fetch_queries, part))
            written_first, written_last = (tables.slots[row, at, part, n] for n in (4, 5))

            def score(i: jax.Array, _: None) -> None:
                stage = rem(before + i - slots.first, stages)
                columns = pl.ds(i * MEANS, MEANS)
                out_rows = [out_ref.at[row, head, here_tile + g, columns] for g in range(own)]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def fetch_written() -> None:
                    """Scores that earlier parts wrote."""
                    plgpu.wait_smem_to_gmem(0)
                    for g, ref in enumerate(out_rows):
                        plgpu.copy_gmem_to_smem(ref, out_tile.at[g], old_ready)
                    plgpu.barrier_wait(old_ready)

                pl.when((written_first <= i) & (i < written_last))(fetch_written)
                plgpu.barrier_wait(memory.k_ready.at[stage])

                def products(acc: Ref, next_acc: Ref) -> None:
                    # The product of the second half runs while the exponentials of the first half are computed.
                    plgpu.wgmma(acc, k_smem.at[stage, pl.ds(0, ROWS)], q_tile.T)
                    plgpu.wgmma(next_acc, k_smem.at[stage, pl.ds(ROWS, ROWS)], q_tile.T)
                    for half, s_acc in enumerate((acc, next_acc)):
                        s = read_accumulator(s_acc, pending=1 - half)
                        if half:
                            plgpu.barrier_arrive(memory.k_free.at[stage])
                        powers = jnp.exp2(s * factor - across(top, s.shape, 1))
                        means = pl.ds(half * ROWS, ROWS)
                        j = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW) + (i * MEANS + half * ROWS)
                        # Every store synchronises the warpgroup, so the sums come first.
                        totals = [powers[:, g * rows : (g + 1) * rows].sum(axis=1) for g in range(own)]
                        for g, total in enumerate(totals):
                            scored = (j >= first_tile[g * rows]) & (j < end_tile[g * rows])
                            old = load(out_tile.at[g, means], PER_ROW)
                            out_tile.at[g, means][...] = jnp.where(scored, total, old)

                pl.run_scoped(products, *(plgpu.ACC((ROWS, QUERIES), f32),) * 2)
                plgpu.commit_smem()
                for g, ref in enumerate(out_rows):
                    plgpu.copy_smem_to_gmem(out_tile.at[g], ref)

            lax.fori_loop(slots.first, slots.last, score, None)
            return before + slots.last - slots.first

        return lax.fori_loop(0, P, scores_of_part, before)

    def feed_turn(turn: jax.Array, before: jax.Array) -> jax.Array:
        row, head, at = place(turn)
        kv_head = lax.div(head, jnp.int32(group))

        def feed_part(visit: jax.Array, before: jax.Array) -> jax.Array:
            slots = slots_of(row, at, rem(visit, P))

            def feed(i: jax.Array, _: None) -> None:
                n = before + i - slots.first
                stage = rem(n, stages)
                pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, memory.k_free.at[stage]))
                means = k_ref.at[row, kv_head, pl.ds(i * MEANS, MEANS)]
                plgpu.copy_gmem_to_smem(means, k_smem.at[stage], memory.k_ready.at[stage])

            lax.fori_loop(slots.first, slots.last, feed, None)
            return before + slots.last - slots.first

        # All parts for the first pass, and again for the second.
        return lax.fori_loop(0, 2 * P, feed_part, before)

    @pl.when(warpgroup < WARPGROUPS)
    def compute() -> None:
        plgpu.set_max_registers(compute_registers(WARPGROUPS), action="increase")
        lax.fori_loop(0, turns, compute_turn, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == WARPGROUPS)
    def copy() -> None:
        plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")
        lax.fori_loop(0, turns, feed_turn, jnp.int32(0))
