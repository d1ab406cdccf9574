"""Attention of a few query rows over a long cache on TPUs: contiguous and paged.

The work is bound by reading the cache, so the query rows of a group (tokens x heads that share keys) make one small
tile, and keys and values are the stationary side of both products. A contiguous cache comes through the grid's own
pipeline in tiles of some megabytes; a paged one by copies of single pages, a tile's pages at a time, with the
next tile's on the way. Only tiles that some row sees are read. Where rows and heads are too few to keep both cores of
a chip busy the live tiles are split between two programs and merged.

Source: Flash-Decoding (Dao et al. 2023) for the split keys.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.softmax import LOG2E, LOW, LOWEST
from qwen_jax.kernels.tpu.device import LANES, cache_tile_bytes, cores
from qwen_jax.kernels.tpu.tiles import product

_TABLE_BYTES = 768 << 10
"""Of a page table: scalar memory is a megabyte, and not all of it is ours."""
ROWS = 128
"""The most query rows (tokens x heads of a group) that share a key/value head."""


def supports(
    dtype: Any, tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, page: int = 16, entries: int = 0
) -> bool:
    """Whether the kernels can do this, as one device sees it.

    Args:
      dtype: of all.
      tokens: of a row.
      num_heads, num_kv_heads, head_dim: of queries and cache.
      page: slots of a page, of a paged cache. One of all heads is fetched at once.
      entries: of its page table, which must fit in scalar memory.
    """
    held = 2 * num_kv_heads * page * max(head_dim, LANES) * jnp.dtype(dtype).itemsize
    return (
        page % 16 == 0
        and held <= cache_tile_bytes()
        and 4 * entries <= _TABLE_BYTES
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
        and head_dim in (64, 128)
        and num_heads % num_kv_heads == 0
        and tokens * (num_heads // num_kv_heads) <= ROWS
    )


def attention(
    q_BTHd: jax.Array, k_BKSd: jax.Array, v_BKSd: jax.Array, start_BT: jax.Array, end_BT: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Attention over a cache, where query row i sees slots start[i] <= j < end[i]. Runs on local arrays.

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_BKSd, v_BKSd: the cache. All slots must be finite.
      start_BT, end_BT: int32 intervals over the slots; rows that see nothing have start >= end.
      scale: multiplies the logits.

    Returns:
      [B, T, H, d] in the dtype of q, zero where a row sees nothing; and the natural logarithm of the softmax's
      denominator, float32 [B, H, T], minus infinity there.

    Raises:
      InputError: what `supports` denies.
    """
    (B, *_, d), (K, S) = q_BTHd.shape, k_BKSd.shape[1:3]
    keys = _tile(S, max(d, LANES) * k_BKSd.dtype.itemsize)
    # Most caches are whole tiles; the rest is copied, once a call.
    k, v = (pad_to_multiple(x, 2, keys) for x in (k_BKSd, v_BKSd))
    rows, ends, live = _rows(q_BTHd, K, start_BT, end_BT, S, keys)
    splits, R = _splits(B * K), rows.shape[2]
    cache = pl.BlockSpec((None, None, keys, d), functools.partial(_at_tile, splits=splits))
    block = functools.partial(_contiguous, factor=scale * LOG2E, splits=splits)
    grid = (splits, B, K, -(-k.shape[2] // keys // splits))
    out, lse = pl.pallas_call(
        block,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((None, None, R, d), lambda s, b, h, i, _: (b, h, 0, 0)),
                cache,
                cache,
                pl.BlockSpec((None, R, LANES), lambda s, b, h, i, _: (b, 0, 0)),
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
        name="decode_attention",
    )(live, rows, k, v, ends)
    return _merged(out, lse, q_BTHd)


def paged_attention(
    q_BTHd: jax.Array,
    k_NKPd: jax.Array,
    v_NKPd: jax.Array,
    pages_BM: jax.Array,
    start_BT: jax.Array,
    end_BT: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The same over a paged cache: slot j of row b is slot j % P of page pages[b, j // P].

    Args:
      q_BTHd: queries, bfloat16 or float32.
      k_NKPd, v_NKPd: pages. P is a multiple of 16; all slots of visited tiles must be finite.
      pages_BM: int32 page table. Entries for slots that no row sees may be anything; they are clipped.
      start_BT, end_BT: int32 intervals over the M P slots.
      scale: multiplies the logits.

    Returns:
      As `attention`.

    Raises:
      InputError: what `supports` denies, or pages that are not whole tiles of memory.
    """
    (B, *_, d), (K, P), M = q_BTHd.shape, k_NKPd.shape[1:3], pages_BM.shape[1]
    if not supports(q_BTHd.dtype, 1, K, K, d, P, pages_BM.size):
        raise InputError(
            f"Paged attention on TPUs needs pages of a multiple of 16 slots, {cache_tile_bytes()} bytes at most for "
            f"all heads, and a page table of {_TABLE_BYTES // 4} entries at most; got pages {k_NKPd.shape} and a table "
            f"{pages_BM.shape}. Use implementation='reference'."
        )
    count = max(1, min(M, cache_tile_bytes() // (2 * K * P * max(d, LANES) * k_NKPd.dtype.itemsize)))
    keys = count * P
    rows, ends, live = _rows(q_BTHd, K, start_BT, end_BT, M * P, keys)
    splits, R = _splits(B), rows.shape[2]
    # Whole tiles of pages are copied, of which nobody may see the last ones; a tile that reaches past the table reads
    # its last page again.
    pages = jnp.clip(pages_BM, 0, k_NKPd.shape[0] - 1)
    held = pltpu.VMEM((2, count, K, P, d), k_NKPd.dtype)
    out, lse = pl.pallas_call(
        functools.partial(_paged, factor=scale * LOG2E, splits=splits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(splits, B),
            in_specs=[
                pl.BlockSpec((None, K, R, d), lambda s, b, *_: (b, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((None, R, LANES), lambda s, b, *_: (b, 0, 0)),
            ],
            out_specs=[pl.BlockSpec((None, None, K, R, n), lambda s, b, *_: (s, b, 0, 0, 0)) for n in (d, LANES)],
            scratch_shapes=[held, held, pltpu.SemaphoreType.DMA((2, 2))]
            + [pltpu.VMEM((K, R, n), jnp.float32) for n in (d, LANES, LANES)],
        ),
        out_shape=[jax.ShapeDtypeStruct((splits, B, K, R, n), jnp.float32) for n in (d, LANES)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=4 * cache_tile_bytes() + (8 << 20)
        ),
        name="paged_decode_attention",
    )(live, pages, rows, k_NKPd, v_NKPd, ends)
    return _merged(out, lse, q_BTHd)


def _tile(S: int, row_bytes: int) -> int:
    """Slots of a tile: about `cache_tile_bytes` of keys and values, whole lanes, and where possible a divisor of S."""
    most = min(max(cache_tile_bytes() // (2 * row_bytes), LANES), -(-S // LANES) * LANES)
    return next((n for n in range(most, most // 2, -LANES) if S % n == 0), most)


def _splits(programs: int) -> int:
    return 2 if programs % 2 and cores() == 2 else 1


def _rows(
    q_BTHd: jax.Array, K: int, start_BT: jax.Array, end_BT: jax.Array, S: int, keys: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query rows [B, K, R, d], their intervals in two lanes of [B, R, 128], and the live tiles [B, 2].

    Row t G + g of a group is token t of its head g; more rows fill up the registers.
    """
    B, T, H, d = q_BTHd.shape
    if not supports(q_BTHd.dtype, T, H, K, d):
        raise InputError(
            f"The decode kernels for TPUs take bfloat16 or float32, head_dim 64 or 128 and at most {ROWS} query rows "
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
    return pad_to_multiple(rows, 2, 16), pad_to_multiple(pad_to_multiple(ends, 1, 16), 2, LANES), live


def _share(live_ref: Any, row: Any, split: Any, splits: int) -> tuple[Any, Any]:
    """First and end of the live tiles that a split takes."""
    first, last = live_ref[row, 0], live_ref[row, 1]
    middle = first + lax.div(last - first + 1, 2)
    if splits == 1:
        return first, last
    return jnp.where(split == 0, first, middle), jnp.where(split == 0, middle, last)


def _at_tile(s: Any, b: Any, h: Any, i: Any, live_ref: Any, *, splits: int) -> Any:
    """Which tile of the cache a step gets. Past its share it keeps the last one, which is not fetched again."""
    first, last = _share(live_ref, b, s, splits)
    return b, h, jnp.clip(first + i, 0, jnp.maximum(last - 1, 0)), 0


def _begin(acc: Any, top: Any, total: Any) -> None:
    acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)
    top[...] = jnp.full_like(top, LOW)


def _add(
    tiles: Sequence[tuple[Any, Any, Any]], ends: Any, first: Any, state: Sequence[tuple[Any, Any, Any]], factor: float
) -> None:
    """Takes a tile of keys from `first` on into the running softmax of each head.

    Args:
      tiles: queries [R, d], keys and values [keys, d] of each head.
      ends: intervals of the rows, in the first two lanes.
      first: slot of the first key.
      state: accumulator, maximum and sum of each head.
      factor: scale of the logits in base 2.
    """
    # All heads' logits before any product that waits for a softmax: the matrix unit takes products in order.
    logits = [product(q, k, transposed=True) * factor for q, k, _ in tiles]
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
    for (p, alpha), (_, _, v), (acc, _, _) in zip(weights, tiles, state, strict=True):
        acc[...] = acc[...] * alpha[:, : acc.shape[1]] + product(p.astype(v.dtype), v)


def _end(acc: Any, top: Any, total: Any, out_ref: Any, lse_ref: Any) -> None:
    """The output, and its log-sum-exp in base 2 in every lane."""
    sees = total[...] > 0
    out_ref[...] = acc[...] * jnp.where(sees, 1 / total[...], 0.0)[..., : acc.shape[-1]]
    lse_ref[...] = jnp.where(sees, top[...] + jnp.log2(total[...]), -jnp.inf)


def _contiguous(
    live_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, ends_ref: Any, out_ref: Any, lse_ref: Any, acc: Any, top: Any,
    total: Any, *, factor: float, splits: int,
) -> None:  # fmt: skip
    i, keys = pl.program_id(3), k_ref.shape[0]
    first, last = _share(live_ref, pl.program_id(1), pl.program_id(0), splits)
    pl.when(i == 0)(lambda: _begin(acc, top, total))

    @pl.when(first + i < last)
    def _() -> None:
        tile = q_ref[...], k_ref[...], v_ref[...]
        _add([tile], ends_ref[...], (first + i) * keys, [(acc, top, total)], factor)

    pl.when(i == pl.num_programs(3) - 1)(lambda: _end(acc, top, total, out_ref, lse_ref))


def _paged(
    live_ref: Any, pages_ref: Any, q_ref: Any, k_hbm: Any, v_hbm: Any, ends_ref: Any, out_ref: Any, lse_ref: Any,
    k_held: Any, v_held: Any, arrived: Any, acc: Any, top: Any, total: Any, *, factor: float, splits: int,
) -> None:  # fmt: skip
    row, (_, count, K, P, d) = pl.program_id(1), k_held.shape
    first, last = _share(live_ref, row, pl.program_id(0), splits)
    _begin(acc, top, total)

    def copies(i: Any, wait: bool) -> None:
        slot = lax.rem(i, 2)

        def one(n: Any, _: None) -> None:
            page = pages_ref[row, jnp.minimum(i * count + n, pages_ref.shape[1] - 1)]
            for side, (hbm, held) in enumerate(((k_hbm, k_held), (v_hbm, v_held))):
                copy = pltpu.make_async_copy(hbm.at[page], held.at[slot, n], arrived.at[side, slot])
                copy.wait() if wait else copy.start()

        lax.fori_loop(0, count, one, None)

    pl.when(first < last)(lambda: copies(first, False))

    def step(i: Any, _: None) -> None:
        pl.when(i + 1 < last)(lambda: copies(i + 1, False))
        copies(i, True)
        slot = lax.rem(i, 2)
        cut = lambda x, h: x[slot, :, h].reshape(count * P, d)  # noqa: E731
        tiles = [(q_ref[h], cut(k_held, h), cut(v_held, h)) for h in range(K)]
        state = [(acc.at[h], top.at[h], total.at[h]) for h in range(K)]
        _add(tiles, ends_ref[...], i * count * P, state, factor)

    lax.fori_loop(first, last, step, None)
    _end(acc, top, total, out_ref, lse_ref)


def _merged(out: jax.Array, lse: jax.Array, q_BTHd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, H, d] and log-sum-exp [B, H, T] of what the splits return, [splits, B, K, R, d or 128]."""
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
