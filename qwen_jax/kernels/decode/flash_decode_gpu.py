"""Attention of one or a few new rows over a long cache on Hopper GPUs, with the keys split over the whole chip.

The rows of all query heads that share a key/value head fill one tile of 64. A thread block takes one key/value head of
one sequence and a share of its used key tiles, and keeps a ring of copies in flight. The number of shares is known
while tracing; which tiles they cover is computed on the device from the intervals. A second small kernel, which already
waits when the first one ends, merges the shares. Every sum has a fixed order: results are bit-identical from run to
run.

The cache is either one array, or pages in any order with a table of the pages of each row.

Sources: Flash-Decoding (Dao et al. 2023) for the split keys, PagedAttention (Kwon et al. 2023, arXiv:2309.06180) for
the pages, FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the running softmax.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_gpu_tiles import mask_logits
from qwen_jax.kernels.decode.tiles_gpu import PAGE, Pages, Table, Tiles, pieces, tiles_of_share
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS
from qwen_jax.kernels.gpu.hopper import (
    EIGHT_ROWS,
    allow_next_kernel,
    keep_unswizzled,
    load,
    tiled,
    wait_for_previous_kernel,
)
from qwen_jax.kernels.gpu.tiles import PER_ROW, ROWS, WGMMA, across, rem, zeros
from qwen_jax.kernels.softmax import LOG2E, LOW, LOWEST
from qwen_jax.kernels.types import Ref

_MAX_SPLITS = 2 * MULTIPROCESSORS
"""As many as blocks run at once: one key/value head alone keeps the whole chip busy."""
_STEP_US, _START_US, _MERGE_US = 2.0, 1.5, 2.5
"""Costs that the number of splits is chosen by: a tile for every block while the whole chip reads memory, the start of
a round of blocks, and a merge."""
_COLUMNS = 32
"""Columns of the output that a block of the merge takes."""
_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a thread block works; a static function of head_dim.

    Attributes:
      keys: keys of a tile.
      stages: tiles of keys, and as many of values, that are in flight.
      blocks: thread blocks that share a multiprocessor.
      needed: blocks of each multiprocessor with which the chip reaches its memory bandwidth.
    """

    keys: int
    stages: int
    blocks: int
    needed: int = 1


TILINGS = {64: Tiling(128, 3, 2), 128: Tiling(64, 3, 2)}


def supports(
    dtype: jax.typing.DTypeLike,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    slots: int,
    page: int = 0,
) -> bool:
    """Whether the kernels support these arguments.

    Args:
      dtype: of queries and cache.
      length: new rows of a sequence.
      num_heads, num_kv_heads, head_dim: of the attention, on one device.
      slots: length of the cache of a sequence.
      page: slots of a page; 0 for a cache that is one array.
    """
    return (
        jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        and head_dim in TILINGS
        and num_heads % num_kv_heads == 0
        and 0 < length * (num_heads // num_kv_heads) <= ROWS
        and slots > 0
        and (page % PAGE == 0 if page else slots % 8 == 0)
    )


def splits_for(rows: int, slots: int, tiling: Tiling, uneven: bool = False) -> int:
    """Into how many shares the used key tiles of a key/value head are split.

    Args:
      rows: key/value heads of the whole batch.
      slots: length of the cache.
      tiling: of the thread blocks.
      uneven: sequences differ in length. Several times as many blocks as run at once keep the chip busy until the last
        block of a long sequence is done; for equal sequences this is slightly slower.
    """
    tiles, at_once = -(-slots // tiling.keys), MULTIPROCESSORS * tiling.blocks

    def cost(splits: int) -> float:
        rounds, left = divmod(rows * splits, at_once)
        # Blocks on some of the multiprocessors do not reach the memory bandwidth.
        last = -(-left // (MULTIPROCESSORS * tiling.needed)) * tiling.needed / tiling.blocks
        merge = _MERGE_US if splits > 1 else 0.0
        return -(-tiles // splits) * _STEP_US * (rounds + last) + _START_US * (rounds + (left > 0)) + merge

    best = min(range(1, min(tiles, _MAX_SPLITS) + 1), key=cost)
    return max(best, min(-(-4 * at_once // rows), tiles // 32, _MAX_SPLITS)) if uneven else best


def attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
    *,
    uneven: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention of a few rows, where row i sees slots start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: bfloat16 or float16 queries; T H / K is at most 64.
      k_BKSd, v_BKSd: the cache, of the same dtype; S is a multiple of 8. Slots that no row of the sequence sees have
        no effect, even if they hold NaN.
      start_BT, end_BT: int32 intervals; rows that see nothing have start >= end.
      scale: multiplies the logits; positive.
      uneven: sequences differ much in length; see `splits_for`. It affects only the speed.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing, and the log-sum-exp of the logits, float32
      [B, H, T], minus infinity there.

    Raises:
      InputError: arguments that `supports` rejects, or shapes that do not match.
    """
    _check(q_BTHd, k_BKSd, v_BKSd, start_BT, end_BT, None)
    return _run(q_BTHd, k_BKSd, v_BKSd, start_BT, end_BT, None, scale=scale, uneven=uneven)


def paged_attention(
    q_BTHd: jax.Array,
    k_pages_NKPd: jax.Array,
    v_pages_NKPd: jax.Array,
    pages_BM: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
    *,
    uneven: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """`attention` over pages: slot j of row b is slot j % P of page pages[b, j // P]. Runs on local arrays.

    Args:
      q_BTHd: bfloat16 or float16 queries; T H / K is at most 64.
      k_pages_NKPd, v_pages_NKPd: the pages, of the same dtype; P is a multiple of 16.
      pages_BM: int32 page table. Entries outside the range of slots that the rows of a sequence see are not read; the
        others must be valid page indices.
      start_BT, end_BT: int32 intervals over the M P slots; rows that see nothing have start >= end.
      scale: multiplies the logits; positive.
      uneven: as in `attention`.

    Returns:
      As `attention`.

    Raises:
      InputError: arguments that `supports` rejects, or shapes that do not match.
    """
    _check(q_BTHd, k_pages_NKPd, v_pages_NKPd, start_BT, end_BT, pages_BM)
    return _run(q_BTHd, k_pages_NKPd, v_pages_NKPd, start_BT, end_BT, pages_BM, scale=scale, uneven=uneven)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, pages: jax.Array | None) -> None:
    if not q.ndim == k.ndim == 4 or k.shape != v.shape or k.shape[3] != q.shape[3]:
        raise InputError(
            f"The split-key kernel needs q [B, T, H, d] and a cache [B, K, S, d] or pages [N, K, P, d]; "
            f"got {q.shape}, {k.shape} and {v.shape}."
        )
    (B, T, H, d), (_, K, S, _) = q.shape, k.shape
    slots, page = (S, 0) if pages is None else (S * pages.shape[1], S)
    if not q.dtype == k.dtype == v.dtype or not supports(q.dtype, T, H, K, d, slots, page):
        raise InputError(
            f"The split-key kernel needs bfloat16 or float16, head_dim 64 or 128, T H / K up to {ROWS} with H a "
            f"multiple of K, and a cache whose length is a multiple of 8 or pages of a multiple of {PAGE} slots; got "
            f"{q.dtype} {q.shape} over {k.dtype} {k.shape} and {v.dtype} {v.shape}. Use implementation='reference'."
        )
    sequences = k.shape[0] if pages is None else pages.shape[0]
    if start.shape != (B, T) or end.shape != (B, T) or sequences != B:
        raise InputError(
            f"The split-key kernel needs intervals {(B, T)} and a cache or page table of {B} sequences, as q has; got "
            f"intervals {start.shape} and {end.shape} and {sequences} sequences."
        )
    if any(x.dtype != jnp.int32 for x in (start, end, *([] if pages is None else [pages]))):
        dtypes = [str(x.dtype) for x in (start, end, *([] if pages is None else [pages]))]
        raise InputError(f"The split-key kernel needs int32 intervals and page tables; got {', '.join(dtypes)}.")


# Jitted so that a model of many layers lowers it once.
@functools.partial(jax.jit, static_argnames=("scale", "uneven", "splits"))
def _run(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, pages: jax.Array | None, *,
    scale: float, uneven: bool = False, splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Runs the kernel, and the merge if there are several splits."""
    (B, T, H, d), K, tiling = q.shape, k.shape[1], TILINGS[q.shape[3]]
    G = H // K
    slots = k.shape[2] * (1 if pages is None else pages.shape[1])
    splits = splits or splits_for(B * K, slots, tiling, uneven)
    used = -(-T * G // 8) * 8
    if splits == 1:
        out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, K, ROWS), jnp.float32)]
    else:
        eights = -(-splits // 8) * 8
        out_type = [
            jax.ShapeDtypeStruct((B, K, used, eights, d), jnp.float32),
            jax.ShapeDtypeStruct((B, K, eights, ROWS), jnp.float32),
        ]
    attend = pl.kernel(
        functools.partial(_attend, slots=slots, splits=splits, scale=scale, tiling=tiling),
        out_type=tuple(out_type),
        mesh=plgpu.Mesh(grid=(B, K, splits), grid_names=("row", "head", "split")),
        compiler_params=_PARAMS,
        name="flash_decode",
    )
    outs = attend(q, k, v, start, end, *([] if pages is None else [pages]))
    out, lse = outs
    if splits > 1:
        return merge_shares(out, lse, q, splits)
    return out, lse[:, :, : T * G].reshape(B, K, T, G).swapaxes(2, 3).reshape(B, H, T)


def merge_shares(parts: jax.Array, lse: jax.Array, q_BTHd: jax.Array, splits: int) -> tuple[jax.Array, jax.Array]:
    """Merges the shares of the keys by a kernel.

    Args:
      parts: outputs, float32 [B, K, T H / K or more, splits or more, d]; rows of a token are neighbours. The output of
        a share that sees nothing may be undefined.
      lse: log-sum-exps in base 2, float32 [B, K, splits or more, T H / K or more], the lowest one where a share sees
        nothing.
      q_BTHd: queries, for shape and dtype of the result.
      splits: shares.

    Returns:
      [B, T, H, d] and the log-sum-exp, float32 [B, H, T], as `attention`.
    """
    (B, T, H, d), K = q_BTHd.shape, parts.shape[1]
    G = H // K
    merge = pl.kernel(
        functools.partial(_merge, splits=splits, group=G),
        out_type=(
            jax.ShapeDtypeStruct(q_BTHd.shape, q_BTHd.dtype),
            jax.ShapeDtypeStruct((B, K, T * G, _COLUMNS), jnp.float32),
        ),
        mesh=plgpu.Mesh(grid=(B, K, T * G, d // _COLUMNS), grid_names=("row", "head", "query", "columns")),
        compiler_params=_PARAMS,
        name="flash_decode_merge",
    )
    out, merged = merge(parts, lse)
    return out, merged[..., 0].reshape(B, K, T, G).swapaxes(2, 3).reshape(B, H, T)


_Softmax = tuple[jax.Array, jax.Array, jax.Array]
"""Accumulator, maximum and sum of a running softmax."""


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block.

    Attributes:
      plain: the queries as they are copied, without swizzling.
      ring: the queries, and behind them the ring of key tiles and that of value tiles.
      q_ready, k_ready, v_ready: copies have arrived.
    """

    plain: Ref
    ring: Ref
    q_ready: Ref
    k_ready: Ref
    v_ready: Ref


def _attend(
    q_ref: Ref, k_ref: Ref, v_ref: Ref, start_ref: Ref, end_ref: Ref, *refs: Ref, slots: int, splits: int, scale: float,
    tiling: Tiling,
) -> None:  # fmt: skip
    """The program of a thread block: its share of the tiles of one key/value head of one sequence."""
    *tables, out_ref, lse_ref = refs
    (_, T, H, d), K, dtype, f32 = q_ref.shape, k_ref.shape[1], q_ref.dtype, jnp.float32
    G, keys, stages = H // K, tiling.keys, tiling.stages
    used = -(-T * G // 8) * 8
    table = Table(tables[0], k_ref.shape[2]) if tables else None
    copies = pieces(keys, table.size if table else 0)
    row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
    wait_for_previous_kernel()
    allow_next_kernel()

    def loop(**scratch: Ref) -> tuple[jax.Array, ...]:
        memory = _Memory(**scratch)
        plain, ring = memory.plain, memory.ring
        keep_unswizzled(plain)
        # Copy the queries.
        for t in range(T):
            queries = q_ref.at[row, t, pl.ds(head * G, G)]
            plgpu.copy_gmem_to_smem(queries, plain.at[pl.ds(t * G, G)], memory.q_ready)

        # The tiles of this share. Every slot that any row sees is in low to high; all rows that see something see
        # inner_low to inner_high, which is empty where the intervals are disjoint.
        bounds = [interval(t) for t in range(T)]
        low, high, inner_low, inner_high = jnp.int32(2**30), jnp.int32(0), jnp.int32(0), jnp.int32(2**30)
        for a, b in bounds:
            sees = a < b
            low, high = jnp.where(sees, jnp.minimum(low, a), low), jnp.where(sees, jnp.maximum(high, b), high)
            inner_low = jnp.where(sees, jnp.maximum(inner_low, a), inner_low)
            inner_high = jnp.where(sees, jnp.minimum(inner_high, b), inner_high)
        low = jnp.minimum(low, high)
        first = lax.div(low, jnp.int32(keys))
        begin, count = tiles_of_share(first, lax.div(high + (keys - 1), jnp.int32(keys)) - first, split, splits)

        tiles = Tiles(row, head, keys, table, low, high)

        def places(i: jax.Array) -> Pages:
            return tiles.pages((begin + i) * keys)

        def tile_at(place: int, i: jax.Array) -> Ref:
            """The shared memory of a tile of keys (place 0) or values (behind all those of keys)."""
            return ring.at[pl.ds(pl.multiple_of(used + (place + rem(i, stages)) * keys, 8), keys)]

        def fetch(source: Ref, place: int, ready: Ref, i: jax.Array, where: Pages) -> None:
            tiles.copy(source, (begin + i) * keys, where, tile_at(place, i), ready.at[rem(i, stages)])

        fetch_k = functools.partial(fetch, k_ref, 0, memory.k_ready)
        fetch_v = functools.partial(fetch, v_ref, stages, memory.v_ready)
        # Start as many copies as the ring holds.
        ahead = [places(jnp.int32(i)) for i in range(stages + 1)]
        for i in range(stages):
            pl.when(i < count)(functools.partial(fetch_k, jnp.int32(i), ahead[i]))
            pl.when(i < count)(functools.partial(fetch_v, jnp.int32(i), ahead[i]))

        # The interval of each row. Rows of the tile beyond the queries are whatever follows in the ring; they see
        # nothing.
        r = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)
        row_low, row_high = (plgpu.layout_cast(jnp.zeros((ROWS,), jnp.int32), PER_ROW) for _ in range(2))
        for t, (a, b) in enumerate(bounds):
            own = (r >= t * G) & (r < (t + 1) * G)
            row_low, row_high = jnp.where(own, a, row_low), jnp.where(own, b, row_high)

        # Swizzle the queries, as the tensor cores need them.
        plgpu.barrier_wait(memory.q_ready)
        for n in range(used // 8):
            eight = pl.ds(n * 8, 8)
            ring[eight] = load(plain.at[eight], EIGHT_ROWS)
        plgpu.commit_smem()
        queries, factor = ring.at[pl.ds(0, ROWS)], scale * LOG2E

        # The running softmax over the tiles of the share.
        def step(i: jax.Array, carry: tuple[_Softmax, Pages]) -> tuple[_Softmax, Pages]:
            (acc, top, total), where = carry
            later = places(i + (stages + 1))
            stage, offset = rem(i, stages), (begin + i) * keys
            k_tile, v_tile = tile_at(0, i), tile_at(stages, i)
            plgpu.barrier_wait(memory.k_ready.at[stage])

            def logits(s_acc: Ref) -> jax.Array:
                plgpu.wgmma(s_acc, queries, k_tile.T)
                return s_acc[...]

            s = pl.run_scoped(logits, plgpu.ACC((ROWS, keys), f32))
            pl.when(i + stages < count)(lambda: fetch_k(i + stages, where))
            s = mask_logits(s, row_low - offset, row_high - offset, axis=1)
            new_top = jnp.maximum(top, s.max(axis=1) * factor)
            alpha = jnp.exp2(top - new_top)
            p = jnp.exp2(s * factor - across(new_top, s.shape))
            total = total * alpha + p.sum(axis=1)
            acc = acc * across(alpha, acc.shape)
            plgpu.barrier_wait(memory.v_ready.at[stage])

            # A slot that no row sees may hold NaN, and zero times NaN is not zero: clear such values. There are none
            # where all rows see the whole tile, nor where one of them does.
            @pl.when((offset < inner_low) | (offset + keys > inner_high))
            def clear() -> None:
                ends = [interval(t) for t in range(T)]
                whole = [(a <= offset) & (b >= offset + keys) for a, b in ends]

                @pl.when(jnp.logical_not(functools.reduce(jnp.logical_or, whole)))
                def clear_unseen() -> None:
                    j = plgpu.broadcasted_iota(jnp.int32, (keys, d), 0, layout=WGMMA) + offset
                    tile = load(v_tile, WGMMA, optimized=True)
                    seen = functools.reduce(jnp.logical_or, [(j >= a) & (j < b) for a, b in ends])
                    v_tile[...] = jnp.where(seen, tile, jnp.zeros_like(tile))
                    plgpu.commit_smem()

            p = p.astype(dtype)
            acc = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v_tile))(plgpu.ACC.init(acc))
            pl.when(i + stages < count)(lambda: fetch_v(i + stages, where))
            return (acc, new_top, total), later

        top = plgpu.layout_cast(jnp.full((ROWS,), LOW, f32), PER_ROW)
        carry = (zeros((ROWS, d), WGMMA), top, zeros((ROWS,), PER_ROW)), ahead[stages]
        softmax, _ = lax.fori_loop(0, count, step, carry)
        return softmax

    def interval(t: int) -> tuple[jax.Array, jax.Array]:
        return jnp.maximum(start_ref[row, t], 0), jnp.minimum(end_ref[row, t], slots)

    acc, top, total = pl.run_scoped(
        loop,
        plain=plgpu.SMEM((used, d), dtype),
        ring=tiled((used + 2 * stages * keys, d), dtype),
        q_ready=plgpu.Barrier(num_arrivals=T),
        k_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    )
    # Normalise and write. The output goes through the memory of the ring.
    sees = total > 0
    out = acc * across(jnp.where(sees, 1 / total, 0.0), acc.shape)

    def finish(out_smem: Ref) -> None:
        # Every warp must be done with the ring.
        plgpu.commit_smem()
        if splits == 1:
            keep_unswizzled(out_smem)
            out_smem[...] = out.astype(dtype)
            plgpu.commit_smem()
            for t in range(T):
                plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(t * G, G)], out_ref.at[row, t, pl.ds(head * G, G)])
        else:
            out_smem[...] = out
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, used)], out_ref.at[row, head, :, split])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if splits == 1:
        lse_ref[row, head] = jnp.where(sees, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        pl.run_scoped(finish, plgpu.SMEM((ROWS, d), dtype))
    else:
        lse_ref[row, head, split] = jnp.where(sees, top + jnp.log2(total), LOWEST)
        pl.run_scoped(finish, tiled((ROWS, d), f32, 32))


def _merge(parts_ref: Ref, lse_ref: Ref, out_ref: Ref, out_lse_ref: Ref, *, splits: int, group: int) -> None:
    """Merges the shares for some columns of one row: the mean of their outputs, weighted by their softmax sums."""
    row, head, query, columns = (lax.axis_index(name) for name in ("row", "head", "query", "columns"))
    wait_for_previous_kernel()
    allow_next_kernel()
    at = pl.ds(columns * _COLUMNS, _COLUMNS)
    parts = load(parts_ref.at[row, head, query, :, at], EIGHT_ROWS)
    lse = load(lse_ref.at[row, head, :, query], EIGHT_ROWS.reduce(1))
    # The outputs of shares that see nothing may be undefined. So is everything in the lines beyond the last share.
    n = plgpu.broadcasted_iota(jnp.int32, parts.shape, 0, layout=EIGHT_ROWS)
    lse = jnp.where(n < splits, across(lse, parts.shape), LOWEST)
    top = lse.max(axis=0)
    weights = jnp.exp2(lse - lax.broadcast_in_dim(top, parts.shape, [1]))
    total = weights.sum(axis=0)
    out = jnp.where(lse > 0.5 * LOWEST, parts * weights, 0.0).sum(axis=0) / total
    t, g = lax.div(query, jnp.int32(group)), rem(query, group)
    out_ref[row, t, head * group + g, at] = out.astype(out_ref.dtype)

    @pl.when(columns == 0)
    def write_lse() -> None:
        natural = (top + jnp.log2(total)) * (1 / LOG2E)
        out_lse_ref[row, head, query] = jnp.where(top > 0.5 * LOWEST, natural, -jnp.inf)
