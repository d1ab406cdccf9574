"""Attention of a few query rows over a long cache on TPUs: contiguous and paged.

The kernels are bound by reading the cache, which may be in 8 bits. The query rows of a group
(tokens x heads that share keys) form one small tile, and keys and values are the stationary side of both products. The
pipeline of the grid copies a contiguous cache in tiles of about a megabyte. A paged cache is copied page by page, one
tile of pages at a time, while the previous tile is processed. Only tiles that some row sees are read. Where there are
too few rows and heads to keep both cores of a chip busy, the used tiles are split between two programs and merged.

Source: Flash-Decoding (Dao et al. 2023) for the split keys.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.softmax import LOG2E, LOW, LOWEST
from qwen_jax.kernels.tpu.device import LANES, PACKED_ROWS, cache_tile_bytes, cores
from qwen_jax.kernels.tpu.tiles import product, unit, widened
from qwen_jax.kernels.types import Ref

_TABLE_BYTES = 768 << 10
"""The maximal size of a page table: scalar memory is a megabyte, not all of which is free."""
ROWS = 128
"""The maximal number of query rows (tokens x heads of a group) that share a key/value head."""


def supports(
    dtype: jax.typing.DTypeLike,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page: int = 16,
    entries: int = 0,
) -> bool:
    """Whether the kernels support these arguments.

    Args:
      dtype: of queries and cache.
      tokens: new tokens of a row.
      num_heads, num_kv_heads, head_dim: of queries and cache, on one device.
      page: slots of a page of a paged cache. A page of all heads is copied at once.
      entries: of the page table, which must fit in scalar memory.
    """
    page_bytes = 2 * num_kv_heads * page * max(head_dim, LANES) * jnp.dtype(dtype).itemsize
    return (
        page % 16 == 0
        and page_bytes <= cache_tile_bytes()
        and 4 * entries <= _TABLE_BYTES
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
        and head_dim in (64, 128)
        and num_heads % num_kv_heads == 0
        and tokens * (num_heads // num_kv_heads) <= ROWS
    )


def attention(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, start_BT: jax.Array, end_BT: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attention over a cache, where query row i sees the slots start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_BKSd, v_BKSd: the cache. All slots must be finite.
      start_BT, end_BT: int32 intervals over the slots; rows that see nothing have start >= end.
      scale: multiplies the logits.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing, and the log-sum-exp of the logits, float32
      [B, H, T], minus infinity there.

    Raises:
      InputError: arguments that `supports` rejects.
    """
    return _attention(q_BTHd, k_BKSd, v_BKSd, None, start_BT, end_BT, scale)


def quantized_attention(
    q_BTHd: jax.Array,
    k_BKSd: jax.Array,
    k_scales_BKS: jax.Array,
    v_BKSd: jax.Array,
    v_scales_BKS: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`attention` over a cache in 8 bits. Tiles are copied as they are and converted to the dtype of q, exactly.

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_BKSd, v_BKSd: the cache, both int8 or both float8_e4m3fn. All slots must be finite.
      k_scales_BKS, v_scales_BKS: float32, one scale for each key and each value; finite. Those of the keys multiply the
        logits, those of the values the probabilities.
      start_BT, end_BT: int32 intervals over the slots.
      scale: multiplies the logits.

    Returns:
      As `attention`.

    Raises:
      InputError: arguments that `supports` rejects.
    """
    return _attention(q_BTHd, k_BKSd, v_BKSd, (k_scales_BKS, v_scales_BKS), start_BT, end_BT, scale)


def _attention(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, scales: tuple[jax.Array, jax.Array] | None,
    start_BT: jax.Array, end_BT: jax.Array, scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    (B, *_, d), (K, S) = q_BTHd.shape, k_BKSd.shape[1:3]
    # As many keys for 8 bits as for 16, to which they are converted.
    keys = _tile(S, max(d, LANES) * max(k_BKSd.dtype.itemsize, 2))
    # The scales of a tile, as one row of registers.
    in_rows = [x[:, :, None] for x in scales or ()]
    rows, ends, live = _rows(q_BTHd, K, start_BT, end_BT, S, keys)
    splits, R = _splits(B * K), rows.shape[2]
    cache = pl.BlockSpec((None, None, keys, d), functools.partial(_at_tile, splits=splits))
    row = pl.BlockSpec((None, None, 1, keys), functools.partial(_at_tile, splits=splits, in_a_row=True))
    grid = (splits, B, K, -(-S // (keys * splits)))
    out, lse = pl.pallas_call(
        lambda *refs: _contiguous(_refs(*refs), factor=scale * LOG2E, splits=splits, slots=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, None, R, d), lambda s, b, h, i, _: (b, h, 0, 0)),
                cache,
                cache,
                pl.BlockSpec((None, R, LANES), lambda s, b, h, i, _: (b, 0, 0)),
                *[row] * len(in_rows),
            ],
            out_specs=[
                pl.BlockSpec((None, None, None, R, n), lambda s, b, h, i, _: (s, b, h, 0, 0)) for n in (d, LANES)
            ],
            scratch_shapes=[pltpu.VMEM((R, n), jnp.float32) for n in (d, LANES, LANES)],
        ),
        out_shape=[jax.ShapeDtypeStruct((splits, B, K, R, n), jnp.float32) for n in (d, LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=4 * cache_tile_bytes() + (8 << 20),
        ),
        name="decode_attention_8_bits" if scales else "decode_attention",
    )(live, rows, k_BKSd, v_BKSd, ends, *in_rows)
    return _merged(out, lse, q_BTHd)


def paged_attention(
    q_BTHd: jax.Array,
    k_NKPd: jax.Array,
    v_NKPd: jax.Array,
    pages_BM: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attention` over a paged cache: slot j of row b is slot j % P of page pages[b, j // P].

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_NKPd, v_NKPd: pages. P is a multiple of 16, or of 32 for 8 bits; all slots of visited tiles must be finite.
      pages_BM: int32 page table. Entries for slots that no row sees may have any value; they are clipped.
      start_BT, end_BT: int32 intervals over the M P slots.
      scale: multiplies the logits.
      scales: of keys and values in 8 bits, float32 [B, K, M P] in the order of the slots; as for `quantized_attention`.

    Returns:
      As `attention`.

    Raises:
      InputError: arguments that `supports` rejects.
    """
    (B, *_, d), (K, P), M = q_BTHd.shape, k_NKPd.shape[1:3], pages_BM.shape[1]
    if not supports(q_BTHd.dtype, 1, K, K, d, P, pages_BM.size):
        raise InputError(
            f"Paged attention on TPUs needs pages of a multiple of 16 slots, {cache_tile_bytes()} bytes at most for "
            f"all heads, and a page table of {_TABLE_BYTES // 4} entries at most; got pages {k_NKPd.shape} and a table "
            f"{pages_BM.shape}. Use implementation='reference'."
        )
    count = max(1, min(M, cache_tile_bytes() // (2 * K * P * max(d, LANES) * max(k_NKPd.dtype.itemsize, 2))))
    if scales:  # Those of a tile are copied as whole registers.
        count = -(-count * P // math.lcm(P, LANES)) * math.lcm(P, LANES) // P
    keys = count * P
    in_rows = [pad_to_multiple(x, 2, keys)[:, :, None] for x in scales or ()]
    rows, ends, live = _rows(q_BTHd, K, start_BT, end_BT, M * P, keys)
    splits, R = _splits(B), rows.shape[2]
    # Whole tiles of pages are copied, even if no row sees the last pages. A tile beyond the end of the table reads the
    # last page again.
    pages = jnp.clip(pages_BM, 0, k_NKPd.shape[0] - 1)
    buffers = pltpu.VMEM((2, count, K, P, d), k_NKPd.dtype)
    out, lse = pl.pallas_call(
        lambda *refs: _paged(_paged_refs(*refs), factor=scale * LOG2E, splits=splits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(splits, B),
            in_specs=[
                pl.BlockSpec((None, K, R, d), lambda s, b, *_: (b, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((None, R, LANES), lambda s, b, *_: (b, 0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(in_rows),
            ],
            out_specs=[pl.BlockSpec((None, None, K, R, n), lambda s, b, *_: (s, b, 0, 0, 0)) for n in (d, LANES)],
            scratch_shapes=[buffers, buffers, pltpu.SemaphoreType.DMA((2 + len(in_rows), 2))]
            + [pltpu.VMEM((K, R, n), jnp.float32) for n in (d, LANES, LANES)]
            + [pltpu.VMEM((2, K, 1, keys), jnp.float32)] * len(in_rows),
        ),
        out_shape=[jax.ShapeDtypeStruct((splits, B, K, R, n), jnp.float32) for n in (d, LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=4 * cache_tile_bytes() + (8 << 20)
        ),
        name="paged_decode_attention_8_bits" if scales else "paged_decode_attention",
    )(live, pages, rows, k_NKPd, v_NKPd, ends, *in_rows)
    return _merged(out, lse, q_BTHd)


def _tile(S: int, row_bytes: int) -> int:
    """Slots of a tile: about `cache_tile_bytes`, a multiple of the lanes, and if possible a divisor of S.

    Args:
      S: length of the cache.
      row_bytes: of one key or value.
    """
    most = min(max(cache_tile_bytes() // (2 * row_bytes), LANES), -(-S // LANES) * LANES)
    return next((n for n in range(most, most // 2, -LANES) if S % n == 0), most)


def _splits(programs: int) -> int:
    """How many programs share the tiles of a row: two where otherwise one of two cores had less to do."""
    return 2 if programs % 2 and cores() == 2 else 1


def _rows(
    q_BTHd: jax.Array, K: int, start_BT: jax.Array, end_BT: jax.Array, S: int, keys: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query rows [B, K, R, d], their intervals in two lanes of [B, R, 128], and the range of used tiles [B, 2].

    Row t G + g of a group is token t of its head g; padding rows fill the registers.
    """
    B, T, H, d = q_BTHd.shape
    if not supports(q_BTHd.dtype, T, H, K, d):
        raise InputError(
            f"The decode kernels for TPUs need bfloat16 or float32, head_dim 64 or 128 and at most {ROWS} query rows "
            f"to a key/value head; got {q_BTHd.dtype} {q_BTHd.shape} with {K} key/value heads. Use "
            "implementation='reference'."
        )
    rows = jnp.moveaxis(q_BTHd.reshape(B, T, K, H // K, d), 2, 1).reshape(B, K, -1, d)
    start, end = jnp.maximum(start_BT, 0), jnp.minimum(end_BT, S)
    sees = start < end
    low = jnp.where(sees, start, S).min(axis=1) // keys
    high = -(-jnp.where(sees, end, 0).max(axis=1) // keys)
    live = jnp.stack([jnp.minimum(low, high), high], axis=1).astype(jnp.int32)
    ends = jnp.repeat(jnp.stack([start, end], axis=2), H // K, axis=1)
    return (
        pad_to_multiple(rows, 2, PACKED_ROWS),
        pad_to_multiple(pad_to_multiple(ends, 1, PACKED_ROWS), 2, LANES),
        live,
    )


def _share(live_ref: Ref, row: jax.Array | int, split: jax.Array | int, splits: int) -> tuple[jax.Array, jax.Array]:
    """First and end of the used tiles that a split takes."""
    first, last = live_ref[row, 0], live_ref[row, 1]
    middle = first + lax.div(last - first + 1, 2)
    if splits == 1:
        return first, last
    return jnp.where(split == 0, first, middle), jnp.where(split == 0, middle, last)


def _at_tile(
    s: jax.Array, b: jax.Array, h: jax.Array, i: jax.Array, live_ref: Ref, *, splits: int, in_a_row: bool = False
) -> tuple[jax.Array | int, ...]:
    """The index of the cache tile of a step. After its share it stays at the last tile, which is not copied again."""
    first, last = _share(live_ref, b, s, splits)
    tile = jnp.clip(first + i, 0, jnp.maximum(last - 1, 0))
    return (b, h, 0, tile) if in_a_row else (b, h, tile, 0)


class _Softmax(NamedTuple):
    """A running softmax in VMEM: accumulator, maximum and sum."""

    acc: Ref
    top: Ref
    total: Ref


def _begin(softmax: _Softmax) -> None:
    acc, top, total = softmax
    acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)
    top[...] = jnp.full_like(top, LOW)


class _Tile(NamedTuple):
    """Queries [R, d], and keys and values [keys, d] of their dtype; scales [1, keys] of those that were in 8 bits."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    k_scales: jax.Array | None = None
    v_scales: jax.Array | None = None


def _tile_of(q: jax.Array, k: jax.Array, v: jax.Array, scales: Sequence[jax.Array]) -> _Tile:
    """A tile of keys and values that may be in 8 bits, with their scales."""
    return _Tile(q, widened(k, q.dtype), widened(v, q.dtype), *(unit(k.dtype) * x for x in scales))


def _add(
    tiles: Sequence[_Tile],
    ends: jax.Array,
    first: jax.Array,
    state: Sequence[_Softmax],
    factor: float,
) -> None:
    """Adds a tile of keys to the running softmax of each head.

    Args:
      tiles: of each head.
      ends: intervals of the rows, in the first two lanes.
      first: slot of the first key.
      state: running softmax of each head.
      factor: scale of the logits in base 2.
    """
    # The logits of all heads come before any product that waits for a softmax: the matrix unit works in order.
    logits = [
        product(x.q, x.k, transposed=True) * (factor if x.k_scales is None else factor * x.k_scales) for x in tiles
    ]
    j = lax.broadcasted_iota(jnp.int32, logits[0].shape, 1) + first
    visible = (j >= ends[:, :1]) & (j < ends[:, 1:2])
    weights = []
    for s, (_, top, total) in zip(logits, state, strict=True):
        s = jnp.where(visible, s, LOWEST)
        new_top = jnp.maximum(top[...], s.max(axis=1, keepdims=True))
        alpha = jnp.exp2(top[...] - new_top)
        p = jnp.exp2(s - new_top[:, :1])
        total[...] = total[...] * alpha + p.sum(axis=1, keepdims=True)
        top[...] = new_top
        weights.append((p, alpha))
    for (p, alpha), x, (acc, _, _) in zip(weights, tiles, state, strict=True):
        p = p if x.v_scales is None else p * x.v_scales
        acc[...] = acc[...] * alpha[:, : acc.shape[1]] + product(p.astype(x.v.dtype), x.v)


def _end(softmax: _Softmax, out_ref: Ref, lse_ref: Ref) -> None:
    """Writes the output, and the log-sum-exp in base 2 in every lane."""
    acc, top, total = softmax
    sees = total[...] > 0
    out_ref[...] = acc[...] * jnp.where(sees, 1 / total[...], 0.0)[..., : acc.shape[-1]]
    lse_ref[...] = jnp.where(sees, top[...] + jnp.log2(total[...]), -jnp.inf)


class _Refs(NamedTuple):
    """References of a program over a contiguous cache: scalars, operands, results, and the running softmax."""

    live: Ref
    q: Ref
    k: Ref
    v: Ref
    ends: Ref
    scales: tuple[Ref, ...]
    out: Ref
    lse: Ref
    acc: Ref
    top: Ref
    total: Ref


def _refs(*refs: Ref) -> _Refs:
    """The references in the order of the call; the scales of keys and values are there for 8 bits only."""
    live, q, k, v, ends, *scales, out, lse, acc, top, total = refs
    return _Refs(live, q, k, v, ends, tuple(scales), out, lse, acc, top, total)


def _contiguous(refs: _Refs, *, factor: float, splits: int, slots: int) -> None:
    """One tile of a contiguous cache, for one head of one row."""
    k_ref, softmax = refs.k, _Softmax(refs.acc, refs.top, refs.total)
    i, keys = pl.program_id(3), k_ref.shape[0]
    first, last = _share(refs.live, pl.program_id(1), pl.program_id(0), splits)
    pl.when(i == 0)(lambda: _begin(softmax))

    def add(ends: bool) -> None:
        def defined(x: jax.Array, axis: int) -> jax.Array:
            # What lies beyond the cache is undefined, and zero times NaN is not zero.
            inside = lax.broadcasted_iota(jnp.int32, x.shape, axis) < slots - (first + i) * keys
            return jnp.where(inside, x, jnp.zeros_like(x)) if ends else x

        tile = _tile_of(refs.q[...], k_ref[...], refs.v[...], [defined(x[...], 1) for x in refs.scales])
        _add([tile._replace(v=defined(tile.v, 0))], refs.ends[...], (first + i) * keys, [softmax], factor)

    # The last tile may extend beyond the cache.
    extends = ((first + i + 1) * keys > slots) if slots % keys else False
    pl.when((first + i < last) & jnp.logical_not(extends))(lambda: add(False))
    if slots % keys:
        pl.when((first + i < last) & extends)(lambda: add(True))

    pl.when(i == pl.num_programs(3) - 1)(lambda: _end(softmax, refs.out, refs.lse))


class _PagedRefs(NamedTuple):
    """References of a program over a paged cache: scalars, operands (pages in HBM), results and scratch.

    Attributes:
      k_buffers, v_buffers: two tiles of pages each.
      arrived: semaphores of the copies, for keys and values (and their scales) and each of the two tiles.
      acc, top, total: the running softmax of all heads.
      scales, scale_buffers: of keys and values in 8 bits, in HBM and for two tiles each; otherwise empty.
    """

    live: Ref
    pages: Ref
    q: Ref
    k: Ref
    v: Ref
    ends: Ref
    out: Ref
    lse: Ref
    k_buffers: Ref
    v_buffers: Ref
    arrived: Ref
    acc: Ref
    top: Ref
    total: Ref
    scales: tuple[Ref, ...]
    scale_buffers: tuple[Ref, ...]


def _paged_refs(*refs: Ref) -> _PagedRefs:
    """The references in the order of the call."""
    n = (len(refs) - 14) // 2
    return _PagedRefs._make((*refs[:6], *refs[6 + n : 14 + n], refs[6 : 6 + n], refs[14 + n :]))


def _paged(refs: _PagedRefs, *, factor: float, splits: int) -> None:
    """All used pages of one row, for all heads. While a tile of pages is processed, the next one is copied."""
    k_buffers, softmax = refs.k_buffers, _Softmax(refs.acc, refs.top, refs.total)
    row, (_, count, K, P, d) = pl.program_id(1), k_buffers.shape
    first, last = _share(refs.live, row, pl.program_id(0), splits)
    _begin(softmax)

    def copies(i: jax.Array, wait: bool) -> None:
        """Starts the copies of a tile of pages, or waits for them."""
        slot = lax.rem(i, 2)

        def one(n: jax.Array, _: None) -> None:
            page = refs.pages[row, jnp.minimum(i * count + n, refs.pages.shape[1] - 1)]
            for side, (hbm, buffers) in enumerate(((refs.k, k_buffers), (refs.v, refs.v_buffers))):
                copy = pltpu.make_async_copy(hbm.at[page], buffers.at[slot, n], refs.arrived.at[side, slot])
                copy.wait() if wait else copy.start()

        lax.fori_loop(0, count, one, None)
        tile = pl.ds(pl.multiple_of(i * count * P, LANES), count * P)
        for side, (hbm, buffers) in enumerate(zip(refs.scales, refs.scale_buffers, strict=True), 2):
            copy = pltpu.make_async_copy(hbm.at[row, :, :, tile], buffers.at[slot], refs.arrived.at[side, slot])
            copy.wait() if wait else copy.start()

    pl.when(first < last)(lambda: copies(first, False))

    def step(i: jax.Array, _: None) -> None:
        pl.when(i + 1 < last)(lambda: copies(i + 1, False))
        copies(i, True)
        slot = lax.rem(i, 2)

        def of_head(h: int) -> _Tile:
            k, v = (x[slot, :, h].reshape(count * P, d) for x in (k_buffers, refs.v_buffers))
            return _tile_of(refs.q[h], k, v, [x[slot, h] for x in refs.scale_buffers])

        tiles = [of_head(h) for h in range(K)]
        state = [_Softmax(*(x.at[h] for x in softmax)) for h in range(K)]
        _add(tiles, refs.ends[...], i * count * P, state, factor)

    lax.fori_loop(first, last, step, None)
    _end(softmax, refs.out, refs.lse)


def _merged(out: jax.Array, lse: jax.Array, q_BTHd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, d] and log-sum-exp [B, H, T], merged from those of the splits, [splits, B, K, R, d or 128]."""
    (B, T, H, _), K = q_BTHd.shape, out.shape[2]
    log2 = lse[..., 0]
    top = jnp.maximum(log2.max(axis=0), LOW)
    weights = jnp.exp2(log2 - top)
    total = weights.sum(axis=0)
    out = (out * weights[..., None]).sum(axis=0) / jnp.where(total == 0, 1, total)[..., None]
    log = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(total)) / LOG2E)

    def heads(x: jax.Array) -> jax.Array:
        x = x[:, :, : T * (H // K)].reshape(B, K, T, H // K, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(B, T, H, *x.shape[4:])

    return heads(out).astype(q_BTHd.dtype), heads(log).swapaxes(1, 2)
