"""Attention of one or a few new rows over a long cache on Hopper GPUs, with the keys split over the whole chip.

The rows of all query heads that share a key/value head fill one tile of 64; a thread block takes one key/value head of
one sequence and a share of its live tiles of keys, and holds a ring of copies in flight. How many shares there are is
known while tracing; which tiles they cover is worked out on the device from the intervals. What the shares return
meets in a second small kernel, which is already waiting when the first one ends. Every sum has one order: results are
the same bits from run to run.

The cache is either one array, or pages in any order with a table that says where each row's slots lie.

Sources: Flash-Decoding (Dao et al. 2023) for the split keys, PagedAttention (Kwon et al. 2023, arXiv:2309.06180) for
the pages, FlashAttention-2 (Dao 2023, arXiv:2307.08691) for the running softmax.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_gpu_tiles import mask_logits
from qwen_jax.kernels.gpu.hopper import (
    EIGHT_ROWS,
    allow_next_kernel,
    keep_unswizzled,
    load,
    tiled,
    wait_for_previous_kernel,
)
from qwen_jax.kernels.gpu.tiles import ROWS, WGMMA, across, rem, zeros
from qwen_jax.kernels.softmax import LOG2E, LOW, LOWEST

PAGE = 16
"""The size of a page is a multiple of it."""
_SMS = 132
"""Of an H100 or H200; on another part the results are the same and the shares less even."""
_MOST_SPLITS = 128
_STEP_US, _START_US, _MERGE_US = 2.0, 1.5, 2.5
"""What a tile costs every block when all of the chip's read memory, what a round of blocks costs to begin, and what a
merge costs. Only the choice of splits depends on them."""
_COLUMNS = 32
_PER_ROW = WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a thread block works; a static function of the head size.

    Attributes:
      keys: of a tile.
      stages: tiles of keys, and as many of values, that are in flight.
      blocks: that share a multiprocessor.
    """

    keys: int
    stages: int
    blocks: int


SHAPES = {64: Shape(128, 3, 2), 128: Shape(64, 3, 2)}


def supports(
    dtype: Any, length: int, num_heads: int, num_kv_heads: int, head_dim: int, slots: int, page: int = 0
) -> bool:
    """Whether the kernels can do this, as one device sees it.

    Args:
      dtype: of queries and cache.
      length: new rows of a sequence.
      num_heads, num_kv_heads, head_dim: of the attention.
      slots: of the cache of a sequence.
      page: slots of a page; 0 for a cache that is one array.
    """
    return (
        jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        and head_dim in SHAPES
        and num_heads % num_kv_heads == 0
        and 0 < length * (num_heads // num_kv_heads) <= ROWS
        and slots > 0
        and (page % PAGE == 0 if page else slots % 8 == 0)
    )


def splits_for(rows: int, slots: int, shape: Shape, uneven: bool = False) -> int:
    """How many ways the live tiles of a key/value head are shared.

    Args:
      rows: key/value heads in the whole batch.
      slots: of the cache.
      shape: of the thread blocks.
      uneven: sequences differ in length. Several times as many blocks as run at once keep the chip busy until the last
        of a long sequence is done; equal sequences lose a little by it.
    """
    tiles, at_once = -(-slots // shape.keys), _SMS * shape.blocks

    def cost(splits: int) -> float:
        rounds, left = divmod(rows * splits, at_once)
        # A few blocks alone cannot read as fast as memory is.
        last = max(left / at_once, 0.45) if left else 0.0
        merge = _MERGE_US if splits > 1 else 0.0
        return -(-tiles // splits) * _STEP_US * (rounds + last) + _START_US * (rounds + (left > 0)) + merge

    best = min(range(1, min(tiles, _MOST_SPLITS) + 1), key=cost)
    return max(best, min(-(-4 * at_once // rows), tiles // 32, _MOST_SPLITS)) if uneven else best


def share(first: Any, tiles: Any, split: Any, splits: int) -> tuple[Any, Any]:
    """The first of the tiles that a share takes, and their number, which for all shares differ by one at most."""
    begin, end = (lax.div(tiles * n, jnp.int32(splits)) for n in (split, split + 1))
    return first + begin, end - begin


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
      k_BKSd, v_BKSd: the cache, of the same dtype; S is a multiple of 8. What lies in slots that no row of its
        sequence sees, NaN too, has no effect.
      start_BT, end_BT: int32 intervals; rows that see nothing have start >= end.
      scale: multiplies the logits; positive.
      uneven: sequences differ much in length; see `splits_for`. Changes speed alone.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing; and the natural logarithm of the softmax's
      denominator, float32 [B, H, T], minus infinity there.

    Raises:
      InputError: what `supports` denies, or shapes that do not fit.
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
      pages_BM: int32. Entries that hold no slot between the first and the last that any row of the sequence sees are
        not followed; the others must be in range.
      start_BT, end_BT: int32 intervals over the M P slots; rows that see nothing have start >= end.
      scale: multiplies the logits; positive.
      uneven: as in `attention`.

    Returns:
      What `attention` does.

    Raises:
      InputError: what `supports` denies, or shapes that do not fit.
    """
    _check(q_BTHd, k_pages_NKPd, v_pages_NKPd, start_BT, end_BT, pages_BM)
    return _run(q_BTHd, k_pages_NKPd, v_pages_NKPd, start_BT, end_BT, pages_BM, scale=scale, uneven=uneven)


def _check(q: Any, k: Any, v: Any, start: Any, end: Any, pages: Any) -> None:
    if not q.ndim == k.ndim == 4 or k.shape != v.shape or k.shape[3] != q.shape[3]:
        raise InputError(
            f"The split-key kernel takes q [B, T, H, d] and a cache [B, K, S, d] or pages [N, K, P, d]; "
            f"got {q.shape}, {k.shape} and {v.shape}."
        )
    (B, T, H, d), (_, K, S, _) = q.shape, k.shape
    slots, page = (S, 0) if pages is None else (S * pages.shape[1], S)
    if not q.dtype == k.dtype == v.dtype or not supports(q.dtype, T, H, K, d, slots, page):
        raise InputError(
            f"The split-key kernel takes bfloat16 or float16, head_dim 64 or 128, T H / K up to {ROWS} with H a "
            f"multiple of K, and a cache whose length is a multiple of 8 or pages of a multiple of {PAGE} slots; got "
            f"{q.dtype} {q.shape} over {k.dtype} {k.shape} and {v.dtype} {v.shape}. Use implementation='reference'."
        )
    sequences = k.shape[0] if pages is None else pages.shape[0]
    if start.shape != (B, T) or end.shape != (B, T) or sequences != B:
        raise InputError(
            f"q has {B} sequences of {T} rows; the intervals are for {start.shape} and {end.shape}, the cache or its "
            f"table has {sequences} sequences."
        )
    if any(x.dtype != jnp.int32 for x in (start, end, *([] if pages is None else [pages]))):
        raise InputError("The intervals and the table of pages must be int32.")


# Jitted so that a model of many layers lowers it once.
@functools.partial(jax.jit, static_argnames=("scale", "uneven", "splits"))
def _run(
    q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array, pages: jax.Array | None, *,
    scale: float, uneven: bool = False, splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    (B, T, H, d), K, shape = q.shape, k.shape[1], SHAPES[q.shape[3]]
    G = H // K
    slots = k.shape[2] * (1 if pages is None else pages.shape[1])
    splits = splits or splits_for(B * K, slots, shape, uneven)
    used = -(-T * G // 8) * 8
    if splits == 1:
        out_type = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, K, ROWS), jnp.float32)]
    else:
        eights = -(-splits // 8) * 8
        out_type = [
            jax.ShapeDtypeStruct((B, K, used, eights, d), jnp.float32),
            jax.ShapeDtypeStruct((B, K, eights, ROWS), jnp.float32),
        ]
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    attend = pl.kernel(
        functools.partial(_attend, slots=slots, splits=splits, scale=scale, shape=shape),
        out_type=tuple(out_type),
        mesh=plgpu.Mesh(grid=(B, K, splits), grid_names=("row", "head", "split")),
        compiler_params=params,
        name="flash_decode",
    )
    outs = attend(q, k, v, start, end, *([] if pages is None else [pages]))
    if splits > 1:
        merge = pl.kernel(
            functools.partial(_merge, splits=splits, group=G),
            out_type=(
                jax.ShapeDtypeStruct(q.shape, q.dtype),
                jax.ShapeDtypeStruct((B, K, T * G, _COLUMNS), jnp.float32),
            ),
            mesh=plgpu.Mesh(grid=(B, K, T * G, d // _COLUMNS), grid_names=("row", "head", "query", "columns")),
            compiler_params=params,
            name="flash_decode_merge",
        )
        out, lse = merge(*outs)
        lse = lse[..., 0]
    else:
        out, lse = outs
        lse = lse[:, :, : T * G]
    return out, lse.reshape(B, K, T, G).swapaxes(2, 3).reshape(B, H, T)


def _attend(
    q_ref: Any, k_ref: Any, v_ref: Any, start_ref: Any, end_ref: Any, *refs: Any, slots: int, splits: int, scale: float,
    shape: Shape,
) -> None:  # fmt: skip
    """What one thread block does: its share of the tiles of one key/value head of one sequence."""
    *tables, out_ref, lse_ref = refs
    (_, T, H, d), K, dtype, f32 = q_ref.shape, k_ref.shape[1], q_ref.dtype, jnp.float32
    G, keys, stages = H // K, shape.keys, shape.stages
    used = -(-T * G // 8) * 8
    # A tile is one copy, or one for each page that it meets.
    piece = math.gcd(k_ref.shape[2], keys) if tables else keys
    row, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
    wait_for_previous_kernel()
    allow_next_kernel()

    def loop(plain: Any, ring: Any, q_ready: Any, k_ready: Any, v_ready: Any) -> tuple[jax.Array, ...]:
        keep_unswizzled(plain)
        for t in range(T):
            queries = q_ref.at[row, t, pl.ds(head * G, G)]
            plgpu.copy_gmem_to_smem(queries, plain.at[pl.ds(t * G, G)], q_ready)

        bounds = [interval(t) for t in range(T)]
        # Of the rows that see something: all that any sees lies in low to high, all see inner_low to inner_high.
        low, high, inner_low, inner_high = jnp.int32(2**30), jnp.int32(0), jnp.int32(0), jnp.int32(2**30)
        for a, b in bounds:
            sees = a < b
            low, high = jnp.where(sees, jnp.minimum(low, a), low), jnp.where(sees, jnp.maximum(high, b), high)
            inner_low = jnp.where(sees, jnp.maximum(inner_low, a), inner_low)
            inner_high = jnp.where(sees, jnp.minimum(inner_high, b), inner_high)
        low = jnp.minimum(low, high)
        first = lax.div(low, jnp.int32(keys))
        begin, count = share(first, lax.div(high + (keys - 1), jnp.int32(keys)) - first, split, splits)

        def places(i: Any) -> tuple[Any, ...]:
            """Where the pieces of a tile lie: their pages. A piece that nothing is seen of lies anywhere."""
            slot = [(begin + i) * keys + n * piece for n in range(keys // piece)] if tables else []
            size = jnp.int32(k_ref.shape[2])
            return tuple(tables[0][row, lax.div(jnp.clip(s, low, jnp.maximum(high - 1, 0)), size)] for s in slot)

        def fetch(source: Any, place: int, ready: Any, i: Any, where: tuple[Any, ...]) -> None:
            stage = rem(i, stages)
            for n in range(keys // piece):
                to = ring.at[pl.ds(pl.multiple_of(used + (place + stage) * keys + n * piece, 8), piece)]
                slot = (begin + i) * keys + n * piece
                if tables:
                    at = where[n], head, pl.ds(pl.multiple_of(rem(slot, source.shape[2]), piece), piece)
                else:
                    at = row, head, pl.ds(slot, piece)
                plgpu.copy_gmem_to_smem(source.at[at], to, ready.at[stage])

        fetch_k = functools.partial(fetch, k_ref, 0, k_ready)
        fetch_v = functools.partial(fetch, v_ref, stages, v_ready)
        ahead = [places(jnp.int32(i)) for i in range(stages + 1)]
        for i in range(stages):
            pl.when(i < count)(functools.partial(fetch_k, jnp.int32(i), ahead[i]))
            pl.when(i < count)(functools.partial(fetch_v, jnp.int32(i), ahead[i]))

        # Rows of the tile beyond the queries are what follows them in the ring, and see nothing.
        r = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=_PER_ROW)
        row_low, row_high = (plgpu.layout_cast(jnp.zeros((ROWS,), jnp.int32), _PER_ROW) for _ in range(2))
        for t, (a, b) in enumerate(bounds):
            own = (r >= t * G) & (r < (t + 1) * G)
            row_low, row_high = jnp.where(own, a, row_low), jnp.where(own, b, row_high)

        plgpu.barrier_wait(q_ready)
        for n in range(used // 8):
            eight = pl.ds(n * 8, 8)
            ring[eight] = load(plain.at[eight], EIGHT_ROWS)
        plgpu.commit_smem()
        queries, factor = ring.at[pl.ds(0, ROWS)], scale * LOG2E

        def step(i: Any, carry: Any) -> Any:
            acc, top, total, where = carry
            later = places(i + (stages + 1))
            stage, offset = rem(i, stages), (begin + i) * keys
            k_tile, v_tile = (
                ring.at[pl.ds(pl.multiple_of(used + (place + stage) * keys, 8), keys)] for place in (0, stages)
            )
            plgpu.barrier_wait(k_ready.at[stage])

            def logits(s_acc: Any) -> jax.Array:
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
            plgpu.barrier_wait(v_ready.at[stage])

            # Zero times what lies in a slot that is not ours must be zero, whatever lies there.
            @pl.when((offset < inner_low) | (offset + keys > inner_high))
            def _() -> None:
                j = plgpu.broadcasted_iota(jnp.int32, (keys, d), 0, layout=WGMMA) + offset
                tile = load(v_tile, WGMMA, optimized=True)
                seen = functools.reduce(jnp.logical_or, [(j >= a) & (j < b) for a, b in map(interval, range(T))])
                v_tile[...] = jnp.where(seen, tile, jnp.zeros_like(tile))
                plgpu.commit_smem()

            p = p.astype(dtype)
            acc = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v_tile))(plgpu.ACC.init(acc))
            pl.when(i + stages < count)(lambda: fetch_v(i + stages, where))
            return acc, new_top, total, later

        top = plgpu.layout_cast(jnp.full((ROWS,), LOW, f32), _PER_ROW)
        carry = zeros((ROWS, d), WGMMA), top, zeros((ROWS,), _PER_ROW), ahead[stages]
        acc, top, total, _ = lax.fori_loop(0, count, step, carry)
        return acc, top, total

    def interval(t: int) -> tuple[Any, Any]:
        return jnp.maximum(start_ref[row, t], 0), jnp.minimum(end_ref[row, t], slots)

    acc, top, total = pl.run_scoped(
        loop,
        plain=plgpu.SMEM((used, d), dtype),
        ring=tiled((used + 2 * stages * keys, d), dtype),
        q_ready=plgpu.Barrier(num_arrivals=T),
        k_ready=plgpu.Barrier(num_arrivals=keys // piece, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=keys // piece, num_barriers=stages),
    )
    sees = total > 0
    out = acc * across(jnp.where(sees, 1 / total, 0.0), acc.shape)

    def finish(out_smem: Any) -> None:
        # The ring's memory: every warp must be done with it.
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


def _merge(parts_ref: Any, lse_ref: Any, out_ref: Any, out_lse_ref: Any, *, splits: int, group: int) -> None:
    """Some columns of one row: the mean of the shares' outputs, weighted by their part of the softmax."""
    row, head, query, columns = (lax.axis_index(name) for name in ("row", "head", "query", "columns"))
    wait_for_previous_kernel()
    allow_next_kernel()
    at = pl.ds(columns * _COLUMNS, _COLUMNS)
    parts = load(parts_ref.at[row, head, query, :, at], EIGHT_ROWS)
    lse = load(lse_ref.at[row, head, :, query], EIGHT_ROWS.reduce(1))
    # Lines that no share has written hold anything.
    n = plgpu.broadcasted_iota(jnp.int32, parts.shape, 0, layout=EIGHT_ROWS)
    lse = jnp.where(n < splits, across(lse, parts.shape), LOWEST)
    top = lse.max(axis=0)
    weights = jnp.exp2(lse - lax.broadcast_in_dim(top, parts.shape, [1]))
    total = weights.sum(axis=0)
    out = jnp.where(n < splits, parts * weights, 0.0).sum(axis=0) / total
    t, g = lax.div(query, jnp.int32(group)), rem(query, group)
    out_ref[row, t, head * group + g, at] = out.astype(out_ref.dtype)

    @pl.when(columns == 0)
    def _() -> None:
        natural = (top + jnp.log2(total)) * (1 / LOG2E)
        out_lse_ref[row, head, query] = jnp.where(top > 0.5 * LOWEST, natural, -jnp.inf)
