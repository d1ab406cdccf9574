"""One attention step of decoding on Hopper GPUs, from the raw projection to the output of the heads, in one kernel.

Bias, RoPE, the cache update and the attention itself are fused: at batch 1 each of them alone costs as much as the
smallest kernel that a GPU can start. A thread block takes one key/value head of one row and a share of the used cache
slots. The shares of a cluster are merged in the shared memory of its first block. Where a cache is long and the batch
small, several clusters work on one head, and XLA merges what they return. Every sum has a fixed order: results are
bit-identical from run to run.

The cache is either one array, or pages in any order with a table of the pages of each row. Rows may share pages that
they only read.

The query heads of a group fill 8 of the 64 rows of a tensor core tile. The other rows are unused, and no real row
depends on them: the kernel is bound by memory bandwidth, so they cost little.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
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
from qwen_jax.kernels.gpu.tiles import PER_COLUMN, PER_ROW, WGMMA, across, merged
from qwen_jax.kernels.types import Layout, Ref

TILE = 64
"""Cache slots that are loaded at once; the length of a cache that is one array must be a multiple of it."""
_GROUP = 8
"""The maximal number of query heads that share a key/value head."""
_CLUSTERED = 112
"""Thread blocks in clusters of 4 or 8 that an H100 or H200 always runs at once. They do not reach every multiprocessor;
without clusters it is one block per multiprocessor."""
_LOWEST = -1e30
"""Stands for minus infinity, so that a difference of two is not NaN."""


def supports(num_heads: int, num_kv_heads: int, head_dim: int, slots: int, page: int = 0) -> bool:
    """Whether the kernel supports these sizes; heads are those of one device.

    Args:
      num_heads, num_kv_heads, head_dim: of the attention.
      slots: length of the cache of a row.
      page: slots of a page; 0 for a cache that is one array.
    """
    fits = slots > 0 and (page % PAGE == 0 if page else slots % TILE == 0)
    return num_heads <= _GROUP * num_kv_heads and head_dim in (64, 128) and fits


def shares(rows: int, slots: int, uneven: bool = False) -> tuple[int, int]:
    """Into how many shares the used slots of one key/value head are split.

    Args:
      rows: key/value heads of the whole batch.
      slots: length of the cache.
      uneven: rows differ in length. Where tables are long, several times as many blocks as run at once keep the chip
        busy until the last block of a long row is done.

    Returns:
      The number of clusters, and of thread blocks in a cluster.
    """
    tiles = -(-slots // TILE)
    sizes = ((8, _CLUSTERED), (4, _CLUSTERED), (2, MULTIPROCESSORS))
    blocks = next((n for n, most in sizes if n <= tiles and n * rows <= most), 1)
    # Another cluster pays for the merge only if it takes many tiles off the others. Several clusters are pairs, which
    # reach every multiprocessor: of clusters of 8 that fill the chip, some would start when the others have ended.
    if blocks == 8 and min(MULTIPROCESSORS // (rows * blocks), tiles // (4 * blocks)) > 1:
        return min(MULTIPROCESSORS // (2 * rows), tiles // 8), 2
    wanted = min(-(-8 * MULTIPROCESSORS // rows), tiles // 32) if uneven else 1
    if wanted > 8:
        return -(-wanted // 2), 2
    return 1, max(blocks, 1 << max(wanted - 1, 0).bit_length())


@functools.partial(jax.jit, static_argnames=("scale",))
def decode_step(
    qkv_BRd: jax.Array,
    bias_Rd: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    cache_k_BKSd: jax.Array,
    cache_v_BKSd: jax.Array,
    start_B: jax.Array,
    slot: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the bias, applies RoPE, writes the new token to the cache, and attends to the slots start to slot.

    Args:
      qkv_BRd: bfloat16 projections of the new token: R = H + 2K heads, those of q, then k, then v.
      bias_Rd: bfloat16.
      cos_Bh, sin_Bh: bfloat16 [B, d / 2], as from `rope_table`.
      cache_k_BKSd, cache_v_BKSd: bfloat16; updated in place where XLA allows it.
      start_B: int32, the first slot that each row sees, at most `slot`.
      slot: int32 scalar, the slot of the new token.
      scale: multiplies the logits.

    Returns:
      bfloat16 [B, H, d], and the caches with that slot of each row updated.

    Raises:
      InputError: shapes or dtypes that are not supported; see `supports`.

    Source: Flash-Decoding (Dao et al. 2023) for the split keys, FlashAttention-3 (arXiv:2407.08608) for the tile loop.
    """
    S = cache_k_BKSd.shape[2]
    _check(qkv_BRd, cache_k_BKSd, S, 0)
    new_token = qkv_BRd, bias_Rd, cos_Bh, sin_Bh
    return _run(new_token, cache_k_BKSd, cache_v_BKSd, (start_B, slot.reshape(1)), scale, S)


@functools.partial(jax.jit, static_argnames=("scale",))
def paged_decode_step(
    qkv_BRd: jax.Array,
    bias_Rd: jax.Array,
    cos_Bh: jax.Array,
    sin_Bh: jax.Array,
    k_pages_NKPd: jax.Array,
    v_pages_NKPd: jax.Array,
    start_B: jax.Array,
    length_B: jax.Array,
    new_B: jax.Array,
    pages_BM: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`decode_step` over pages: slot j of row b is slot j % P of page pages[b, j // P].

    Args:
      qkv_BRd, bias_Rd, cos_Bh, sin_Bh: as for `decode_step`.
      k_pages_NKPd, v_pages_NKPd: bfloat16; P is a multiple of 16. Updated in place where XLA allows it.
      start_B: int32, the first slot that each row sees, at most its length.
      length_B: int32, tokens that each row has in the cache, which is the slot of its new token. Beyond the table, the
        token is not written.
      new_B: int32, 1, or 0 for a row of padding: it writes nothing, and its output counts for nothing.
      pages_BM: int32 page table. Entries for slots that a row neither sees nor writes are not used; the others must be
        valid page indices. No two rows write to one page, nor does a row write to a page that another one reads.
      scale: multiplies the logits.

    Returns:
      bfloat16 [B, H, d], and the pages with the new tokens in them.

    Raises:
      InputError: shapes or dtypes that are not supported; see `supports`.
    """
    B, size = len(qkv_BRd), k_pages_NKPd.shape[2]
    slots = size * pages_BM.shape[1]
    _check(qkv_BRd, k_pages_NKPd, slots, size)
    rows = start_B, length_B, new_B, pages_BM
    if any(x.dtype != jnp.int32 or len(x) != B for x in rows):
        got = ", ".join(f"{x.dtype} {x.shape}" for x in rows)
        raise InputError(f"The decode kernel needs int32 starts, lengths, counts and tables of {B} rows; got {got}.")
    new_token = qkv_BRd, bias_Rd, cos_Bh, sin_Bh
    return _run(new_token, k_pages_NKPd, v_pages_NKPd, rows, scale, slots)


def _check(qkv: jax.Array, cache: jax.Array, slots: int, page: int) -> None:
    (_, R, d), K = qkv.shape, cache.shape[1]
    if not supports(R - 2 * K, K, d, slots, page) or qkv.dtype != jnp.bfloat16 or cache.dtype != jnp.bfloat16:
        raise InputError(
            f"The decode kernel needs bfloat16, head_dim 64 or 128, at most {_GROUP} query heads to a key/value head, "
            f"and a cache length that is a multiple of {TILE} or pages of a multiple of {PAGE} slots; got "
            f"{qkv.dtype} {qkv.shape} and {cache.dtype} {cache.shape}. Use implementation='reference'."
        )


def _run(
    new_token: tuple[jax.Array, ...],
    cache_k: jax.Array,
    cache_v: jax.Array,
    rows: tuple[jax.Array, ...],
    scale: float,
    slots: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the kernel, and the merge if there are several clusters; with pages, `rows` has counts and a table."""
    qkv, bias, cos, sin = new_token
    (B, R, d), K, paged = qkv.shape, cache_k.shape[1], len(rows) > 2
    H = R - 2 * K
    if H // K + 2 * K < _GROUP:
        # A block reads 8 rows from its first query head on, and the last block must not read past the end.
        qkv, bias = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, _GROUP), (0, 0)]) for x in (qkv, bias))
    clusters, blocks = shares(B * K, slots, uneven=paged and B > 1)
    if clusters == 1:
        out_type = [jax.ShapeDtypeStruct((B * H, d), jnp.bfloat16)]
    else:
        out_type = [jax.ShapeDtypeStruct((clusters, B * K, _GROUP, d), jnp.float32)] * 2
    kernel = pl.kernel(
        functools.partial(_block, num_heads=H, clusters=clusters, blocks=blocks, scale=scale, paged=paged),
        out_type=tuple(out_type),
        mesh=plgpu.Mesh(
            grid=(B, K, clusters), grid_names=("row", "head", "cluster"), cluster=(blocks,), cluster_names=("block",)
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        name="decode_step",
    )
    keys, values = jax.new_ref(cache_k), jax.new_ref(cache_v)
    start, slot, *table = rows
    outs = kernel(qkv.reshape(-1, d), bias, cos, sin, start, slot, keys, values, *table)
    if clusters == 1:
        [out] = outs
    else:
        parts, lse = (x[:, :, : H // K] for x in outs)
        weights = jnp.exp2(lse - lse.max(axis=0))
        out = ((parts * weights).sum(axis=0) / weights.sum(axis=0)).astype(jnp.bfloat16)
    return out.reshape(B, H, d), jax.freeze(keys), jax.freeze(values)


_RawAndBias = tuple[jax.Array, jax.Array]
_Softmax = tuple[jax.Array, jax.Array, jax.Array]
"""Accumulator, maximum and sum of a running softmax."""


class _Inputs(NamedTuple):
    """References to the operands; the caches are updated.

    With pages, `slot` is that of each row, and there are `new` and the table.
    """

    qkv: Ref
    bias: Ref
    cos: Ref
    sin: Ref
    start: Ref
    slot: Ref
    keys: Ref
    values: Ref
    new: Ref | None = None
    pages: Ref | None = None


class _Memory(NamedTuple):
    """Shared memory and barriers of a thread block.

    Attributes:
      plain: one group of rows without swizzling, for copies of single rows.
      qk: the queries of the group, and below them the new key.
      k_tiles, v_tiles: rings of cache tiles.
      k_ready, v_ready: a tile has arrived.
      wide, lse: output and log-sum-exp of this share; for merging, like the next two.
      parts, parts_ready: the shares of the cluster, in its first block.
      wide_out: the merged output of a cluster, where there are several.
    """

    plain: Ref
    qk: Ref
    k_tiles: Ref
    v_tiles: Ref
    k_ready: Ref
    v_ready: Ref
    wide: Ref | None = None
    lse: Ref | None = None
    parts: Ref | None = None
    parts_ready: Ref | None = None
    wide_out: Ref | None = None


def _block(*refs: Ref, num_heads: int, clusters: int, blocks: int, scale: float, paged: bool) -> None:
    """Allocates the shared memory of a thread block and runs its program."""
    operands = len(_Inputs._fields) - (0 if paged else 2)
    inputs, outs = _Inputs(*refs[:operands]), refs[operands:]
    d = inputs.bias.shape[1]
    copies = pieces(TILE, inputs.keys.shape[2] if paged else 0)
    # Two blocks that share a multiprocessor must fit in its shared memory.
    k_stages, v_stages = (3, 2) if d == 128 else (5, 4)
    scratch: dict[str, object] = dict(
        plain=plgpu.SMEM((8, d), jnp.bfloat16),
        # Both operands of a product must be swizzled alike, and the halves of a head must be separate tiles.
        qk=tiled((64, d), jnp.bfloat16, d // 2),
        k_tiles=tiled((k_stages, TILE, d), jnp.bfloat16, d // 2),
        v_tiles=tiled((v_stages, TILE, d), jnp.bfloat16, 64),
        k_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=k_stages),
        v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=v_stages),
    )
    if clusters * blocks > 1:
        scratch |= dict(
            wide=tiled((64, d), jnp.float32, 32),
            lse=plgpu.SMEM((64,), jnp.float32),
            parts=tiled((blocks, 2, 8, d), jnp.float32, 32),
            parts_ready=plgpu.Barrier(num_arrivals=2 * blocks),
        )
    if clusters > 1:
        scratch |= dict(wide_out=plgpu.SMEM((8, d), jnp.float32))

    def body(**memory: Ref) -> None:
        how = {"num_heads": num_heads, "clusters": clusters, "blocks": blocks}
        _attend(inputs, outs, _Memory(**memory), scale=scale, **how)

    pl.run_scoped(body, **scratch)


def _attend(
    inputs: _Inputs, out_refs: tuple[Ref, ...], memory: _Memory, *, num_heads: int, clusters: int, blocks: int,
    scale: float,
) -> None:  # fmt: skip
    """The program of a thread block."""
    plain, qk, k_tiles, v_tiles = memory.plain, memory.qk, memory.k_tiles, memory.v_tiles
    H, K = num_heads, inputs.keys.shape[1]
    keep_unswizzled(plain)
    wait_for_previous_kernel()
    allow_next_kernel()
    row, head, block = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("block")
    (R, d), G, f32 = inputs.bias.shape, H // K, jnp.float32
    halves = pl.ds(0, d // 2), pl.ds(d // 2, d // 2)
    share, last_share = lax.axis_index("cluster") * blocks + block, clusters * blocks - 1

    # Load everything of the new token. It is used only after the copies of the cache below have been started.
    def with_bias(first: jax.Array, rows: int, columns: slice | pl.Slice, layout: Layout) -> _RawAndBias:
        """Some heads of the projection and their bias. With `rows` 0 it is one head, without a dimension for heads."""
        if rows:
            here, at = pl.ds(row * R + first, rows), pl.ds(first, rows)
            return load(inputs.qkv.at[here, columns], layout), load(inputs.bias.at[at, columns], layout)
        return load(inputs.qkv.at[row * R + first, columns], layout), load(inputs.bias.at[first, columns], layout)

    q_raw = [with_bias(head * G, 8, half, EIGHT_ROWS) for half in halves]
    k_raw = [with_bias(H + head, 0, half, EIGHT_ROWS.reduce(0)) for half in halves]
    cos, sin = (load(x.at[row], EIGHT_ROWS.reduce(0)) for x in (inputs.cos, inputs.sin))
    v_raw = with_bias(H + K + head, 0, pl.ds(0, d), PER_COLUMN)

    # The new token's place in the cache, and the slots before it that are seen.
    start, table, size = inputs.start[row], None, jnp.int32(inputs.keys.shape[2])
    if inputs.pages is None:
        slot = end = inputs.slot[0]
        place, written = (row, head, slot), True
    else:
        assert inputs.new is not None
        table, M = Table(inputs.pages, inputs.keys.shape[2]), inputs.pages.shape[1]
        slot = inputs.slot[row]
        end = jnp.minimum(slot, M * size)
        page = inputs.pages[row, jnp.minimum(lax.div(slot, size), M - 1)]
        place, written = (page, head, lax.rem(slot, size)), (inputs.new[row] > 0) & (slot < M * size)

    # The tiles of this share.
    first = lax.div(start, TILE)
    tiles = jnp.maximum(lax.div(end + TILE - 1, TILE) - first, 0)
    begin, count = tiles_of_share(first, tiles, share, last_share + 1)
    cache = Tiles(row, head, TILE, table, start, end)

    # Start copying tiles of the cache, as many as the rings hold.
    def fetch(source: Ref, stages: Ref, ready: Ref, i: jax.Array, pages: Pages) -> None:
        stage = lax.rem(i, jnp.int32(stages.shape[0]))
        cache.copy(source, (begin + i) * TILE, pages, stages.at[stage], ready.at[stage])

    def pages_of(i: jax.Array) -> Pages:
        return cache.pages((begin + i) * TILE)

    fetch_k = functools.partial(fetch, inputs.keys, k_tiles, memory.k_ready)
    fetch_v = functools.partial(fetch, inputs.values, v_tiles, memory.v_ready)
    k_stages, v_stages = k_tiles.shape[0], v_tiles.shape[0]
    ahead = [pages_of(jnp.int32(i)) for i in range(k_stages + 1)]
    for i in range(k_stages):
        pl.when(i < count)(functools.partial(fetch_k, jnp.int32(i), ahead[i]))
        if i < v_stages:
            pl.when(i < count)(functools.partial(fetch_v, jnp.int32(i), ahead[i]))

    # Add the bias to the queries of the group and to the new key, and rotate them. The key is a small tile below.
    def biased(raw: _RawAndBias) -> jax.Array:
        return (raw[0].astype(f32) + raw[1].astype(f32)).astype(jnp.bfloat16)

    def rotated(raw: list[_RawAndBias], cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
        left, right = (biased(x).astype(f32) for x in raw)
        return [x.astype(jnp.bfloat16) for x in (left * cos - right * sin, right * cos + left * sin)]

    def to_eight_rows(x: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (8, d // 2), [1]), EIGHT_ROWS)

    cos, sin = cos.astype(f32), sin.astype(f32)
    q_new, k_new = rotated(q_raw, to_eight_rows(cos), to_eight_rows(sin)), rotated(k_raw, cos, sin)
    v_new = biased(v_raw)
    for half, q, k in zip(halves, q_new, k_new, strict=True):
        qk[pl.ds(0, 8), half] = q
        qk[pl.ds(8, 8), half] = to_eight_rows(k)
    plgpu.commit_smem()

    # The last share writes the new token to the cache.
    @pl.when((share == last_share) & written)
    def update_cache() -> None:
        for half, k in zip(halves, k_new, strict=True):
            inputs.keys[(*place, half)] = k
        inputs.values[place] = v_new

    # The new token is not read from the cache: the running softmax of the last share starts with it.
    def logits(k_ref: Ref) -> jax.Array:
        def product(acc: Ref) -> jax.Array:
            plgpu.wgmma(acc, qk, k_ref.T)
            return acc[...]

        result: jax.Array = pl.run_scoped(product, plgpu.ACC((64, k_ref.shape[0]), f32))
        return result

    factor = scale * math.log2(math.e)
    own = (share == last_share).astype(f32)
    top = (logits(qk.at[pl.ds(8, 8)]) * factor).max(axis=1) + (own - 1) * -_LOWEST
    total = plgpu.layout_cast(jnp.full((64,), own, f32), PER_ROW)
    acc = lax.broadcast_in_dim(v_new.astype(f32) * own, (64, d), [1])

    # The running softmax over the tiles of the share. The ring of keys is one tile ahead of that of values, and the
    # pages are one tile ahead of that of keys.
    assert k_stages == v_stages + 1

    def step(i: jax.Array, carry: tuple[_Softmax, Pages, Pages]) -> tuple[_Softmax, Pages, Pages]:
        (acc, top, total), k_pages, v_pages = carry
        later = pages_of(i + (k_stages + 1))
        k, v = lax.rem(i, jnp.int32(k_stages)), lax.rem(i, jnp.int32(v_stages))
        low, high = start - (begin + i) * TILE, end - (begin + i) * TILE
        plgpu.barrier_wait(memory.k_ready.at[k])
        s = logits(k_tiles.at[k])
        pl.when(i + k_stages < count)(lambda: fetch_k(i + k_stages, k_pages))
        j = plgpu.broadcasted_iota(jnp.int32, (64, TILE), 1, layout=WGMMA)
        s = jnp.where((j >= low) & (j < high), s, _LOWEST)
        new_top = jnp.maximum(top, s.max(axis=1) * factor)
        alpha = jnp.exp2(top - new_top)
        p = jnp.exp2(s * factor - across(new_top, s.shape))
        total = total * alpha + p.sum(axis=1)
        acc = acc * across(alpha, acc.shape)
        plgpu.barrier_wait(memory.v_ready.at[v])

        # A slot outside the interval may hold NaN, and zero times NaN is not zero: clear such values.
        @pl.when((low > 0) | (high < TILE))
        def clear() -> None:
            j = plgpu.broadcasted_iota(jnp.int32, (TILE, d), 0, layout=WGMMA)
            tile = load(v_tiles.at[v], WGMMA, optimized=True)
            v_tiles[v] = jnp.where((j >= low) & (j < high), tile, jnp.zeros_like(tile))
            plgpu.commit_smem()

        p = p.astype(jnp.bfloat16)
        acc = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v_tiles.at[v]))(plgpu.ACC.init(acc))
        pl.when(i + v_stages < count)(lambda: fetch_v(i + v_stages, v_pages))
        return (acc, new_top, total), later, k_pages

    softmax = acc, top, total
    (acc, top, total), *_ = lax.fori_loop(0, count, step, (softmax, ahead[k_stages], ahead[v_stages]))

    # A share without tiles gets a weight of zero in the merge.
    total = jnp.maximum(total, 1e-30)
    out = acc * across(1 / total, acc.shape)

    def finish(out: jax.Array) -> None:
        plain[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(plain.at[pl.ds(0, G)], out_refs[0].at[pl.ds(row * H + head * G, G)])

    if clusters * blocks == 1:
        # Without a merge: the output goes through the tile of the queries, which is no longer needed.
        qk[...] = out.astype(jnp.bfloat16)
        finish(load(qk.at[pl.ds(0, 8)], EIGHT_ROWS))
    else:
        # Send output and log-sum-exp to the first block of the cluster, which merges them.
        wide, lse, parts, parts_ready = memory.wide, memory.lse, memory.parts, memory.parts_ready
        assert wide is not None
        assert lse is not None
        assert parts is not None
        assert parts_ready is not None
        wide[...] = out
        lse[...] = top + jnp.log2(total)
        out, weight = load(wide.at[pl.ds(0, 8)], EIGHT_ROWS), load(lse.at[pl.ds(0, 8)], EIGHT_ROWS.reduce(1))
        weight = plgpu.layout_cast(across(weight, (8, d)), EIGHT_ROWS)
        for i, x in enumerate((out, weight)):
            plgpu.async_store_smem(
                x,
                parts.at[block, i],
                parts_ready,
                cluster_idx=jnp.int32(0),
                cluster_dim="block",
                optimized=False,
            )

        @pl.when(block == 0)
        def merge() -> None:
            plgpu.barrier_wait(parts_ready)
            out, lse = merged(
                [load(parts.at[b, 0], EIGHT_ROWS) for b in range(blocks)],
                [load(parts.at[b, 1], EIGHT_ROWS) for b in range(blocks)],
            )
            if clusters == 1:
                finish(out.astype(jnp.bfloat16))
                return
            wide_out = memory.wide_out
            assert wide_out is not None
            keep_unswizzled(wide_out)
            for x, ref in zip((out, lse), out_refs, strict=True):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                wide_out[...] = x
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(wide_out, ref.at[lax.axis_index("cluster"), row * K + head])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
