"""One decode step of attention on Hopper GPUs, from the raw projection to the heads' output, in one kernel.

Bias, RoPE, the cache update and the attention itself are fused: at batch 1 each of these alone costs as much as the
smallest kernel that a GPU can start. A thread block takes one key/value head of one row and a share of the live cache
slots. Shares of a cluster meet in the shared memory of its first block; where a cache is long and the batch small,
several clusters work on one head and XLA merges what they return.

The query heads of a group fill 8 of the 64 rows of a tensor core tile. The other rows hold rubbish that no real row
ever sees: the work is bound by memory, so they cost little.
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
from qwen_jax.kernels.gpu.hopper import (
    EIGHT_ROWS,
    allow_next_kernel,
    keep_unswizzled,
    load,
    tiled,
    wait_for_previous_kernel,
)

TILE = 64
"""Cache slots that are loaded at once; the length of a cache must be a multiple of it."""
_GROUP = 8
"""The most query heads that can share a key/value head."""
_BLOCKS, _CLUSTERED = 132, 112
"""Thread blocks that an H100 or H200 surely runs at once: one a multiprocessor, and as many in clusters of 4 or 8,
which do not reach every multiprocessor. On another part the results are the same and the shares less even."""
_LOWEST = -1e30
"""Stands for minus infinity where a difference of two must not be NaN."""
_WGMMA = plgpu.Layout.WGMMA


def supports(num_heads: int, num_kv_heads: int, head_dim: int, slots: int) -> bool:
    """Whether the kernel can do these shapes, as one device sees them."""
    return num_heads <= _GROUP * num_kv_heads and head_dim in (64, 128) and slots % TILE == 0


def shares(rows: int, slots: int) -> tuple[int, int]:
    """How many ways the live slots of one key/value head are split: (clusters, blocks of a cluster).

    Args:
      rows: key/value heads in the whole batch.
      slots: length of the cache.
    """
    tiles = slots // TILE
    sizes = ((8, _CLUSTERED), (4, _CLUSTERED), (2, _BLOCKS))
    blocks = next((n for n, most in sizes if n <= tiles and n * rows <= most), 1)
    # Another cluster pays for the merge only when it takes many tiles off the others.
    clusters = min(_BLOCKS // (rows * blocks), tiles // (4 * blocks)) if blocks == 8 else 1
    return max(clusters, 1), blocks


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
    """Adds the bias, rotates, writes the new token to the cache, and attends to slots start to slot.

    Args:
      qkv_BRd: bfloat16 projections of the new token: R = H + 2K heads, those of q, then k, then v.
      bias_Rd: bfloat16.
      cos_Bh, sin_Bh: bfloat16 [B, d / 2], as from `rope_tables`.
      cache_k_BKSd, cache_v_BKSd: bfloat16; updated in place where XLA may.
      start_B: int32, the first slot each row sees, at most `slot`.
      slot: int32 scalar, where the new token goes.
      scale: multiplies the logits.

    Returns:
      bfloat16 [B, H, d], and the caches with that slot of each row changed.

    Raises:
      InputError: shapes or dtypes it cannot do; see `supports`.

    Source: Flash-Decoding (Dao et al. 2023) for the split keys, FlashAttention-3 (arXiv:2407.08608) for the tile loop.
    """
    B, R, d = qkv_BRd.shape
    K, S = cache_k_BKSd.shape[1:3]
    H = R - 2 * K
    if not supports(H, K, d, S) or qkv_BRd.dtype != jnp.bfloat16 or cache_k_BKSd.dtype != jnp.bfloat16:
        raise InputError(
            f"The decode kernel needs bfloat16, head_dim 64 or 128, at most {_GROUP} query heads to a key/value head "
            f"and a cache length that is a multiple of {TILE}; got {qkv_BRd.dtype} {qkv_BRd.shape} and "
            f"{cache_k_BKSd.dtype} {cache_k_BKSd.shape}. Use implementation='reference'."
        )
    if H // K + 2 * K < _GROUP:
        # A block reads 8 rows from its first query head on; the last one must not read past the end.
        qkv_BRd, bias_Rd = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, _GROUP), (0, 0)]) for x in (qkv_BRd, bias_Rd))
    clusters, blocks = shares(B * K, S)
    if clusters == 1:
        out_type = [jax.ShapeDtypeStruct((B * H, d), jnp.bfloat16)]
    else:
        out_type = [jax.ShapeDtypeStruct((clusters, B * K, _GROUP, d), jnp.float32)] * 2
    kernel = pl.kernel(
        functools.partial(_block, H=H, K=K, d=d, clusters=clusters, blocks=blocks, scale=scale),
        out_type=tuple(out_type),
        mesh=plgpu.Mesh(
            grid=(B, K, clusters), grid_names=("row", "head", "cluster"), cluster=(blocks,), cluster_names=("block",)
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        name="decode_step",
    )
    keys, values = jax.new_ref(cache_k_BKSd), jax.new_ref(cache_v_BKSd)
    outs = kernel(qkv_BRd.reshape(-1, d), bias_Rd, cos_Bh, sin_Bh, start_B, slot.reshape(1), keys, values)
    if clusters == 1:
        [out] = outs
    else:
        parts, lse = (x[:, :, : H // K] for x in outs)
        weights = jnp.exp2(lse - lse.max(axis=0))
        out = ((parts * weights).sum(axis=0) / weights.sum(axis=0)).astype(jnp.bfloat16)
    return out.reshape(B, H, d), jax.freeze(keys), jax.freeze(values)


def _block(*refs: Any, H: int, K: int, d: int, clusters: int, blocks: int, scale: float) -> None:
    """Gives a thread block its shared memory."""
    # Two blocks that share a multiprocessor must fit in 227 KiB.
    k_stages, v_stages = (3, 2) if d == 128 else (5, 4)
    scratch: dict[str, Any] = dict(
        plain=plgpu.SMEM((8, d), jnp.bfloat16),
        # Both operands of a product must be swizzled alike, and the halves of a head must be tiles of their own.
        qk=tiled((64, d), jnp.bfloat16, d // 2),
        k_tiles=tiled((k_stages, TILE, d), jnp.bfloat16, d // 2),
        v_tiles=tiled((v_stages, TILE, d), jnp.bfloat16, 64),
        k_ready=plgpu.Barrier(num_barriers=k_stages),
        v_ready=plgpu.Barrier(num_barriers=v_stages),
    )
    if blocks > 1:
        scratch |= dict(
            wide=tiled((64, d), jnp.float32, 32),
            lse=plgpu.SMEM((64,), jnp.float32),
            parts=tiled((blocks, 2, 8, d), jnp.float32, 32),
            parts_ready=plgpu.Barrier(num_arrivals=2 * blocks),
        )
    if clusters > 1:
        scratch |= dict(wide_out=plgpu.SMEM((8, d), jnp.float32))
    body = functools.partial(_attend, *refs, H=H, K=K, clusters=clusters, blocks=blocks, scale=scale)
    pl.run_scoped(body, **scratch)


def _attend(
    qkv_ref: Any, bias_ref: Any, cos_ref: Any, sin_ref: Any, start_ref: Any, slot_ref: Any, keys_ref: Any,
    values_ref: Any, *out_refs: Any, plain: Any, qk: Any, k_tiles: Any, v_tiles: Any, k_ready: Any, v_ready: Any,
    wide: Any = None, lse: Any = None, parts: Any = None, parts_ready: Any = None, wide_out: Any = None,
    H: int, K: int, clusters: int, blocks: int, scale: float,
) -> None:  # fmt: skip
    """What one thread block does. `wide` to `wide_out` are there for blocks that merge."""
    keep_unswizzled(plain)
    wait_for_previous_kernel()
    allow_next_kernel()
    row, head, block = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("block")
    (R, d), G, f32 = bias_ref.shape, H // K, jnp.float32
    halves = pl.ds(0, d // 2), pl.ds(d // 2, d // 2)
    share, last_share = lax.axis_index("cluster") * blocks + block, clusters * blocks - 1

    # All that the new token needs is asked for at once; its first use waits for the slots below.
    def with_bias(at: Any, columns: Any, layout: Any) -> tuple[jax.Array, jax.Array]:
        here = pl.ds(row * R + at.start, at.size) if isinstance(at, pl.Slice) else row * R + at
        return load(qkv_ref.at[here, columns], layout), load(bias_ref.at[at, columns], layout)

    q_raw = [with_bias(pl.ds(head * G, 8), half, EIGHT_ROWS) for half in halves]
    k_raw = [with_bias(H + head, half, EIGHT_ROWS.reduce(0)) for half in halves]
    cos, sin = (load(x.at[row], EIGHT_ROWS.reduce(0)) for x in (cos_ref, sin_ref))
    v_raw = with_bias(H + K + head, pl.ds(0, d), _WGMMA.reduce(0))

    start, slot = start_ref[row], slot_ref[0]
    first = lax.div(start, TILE)
    tiles = jnp.maximum(lax.div(slot + TILE - 1, TILE) - first, 0)
    begin = first + lax.div(tiles * share, last_share + 1)
    count = first + lax.div(tiles * (share + 1), last_share + 1) - begin

    def fetch(source: Any, stages: Any, ready: Any, i: Any) -> None:
        stage = lax.rem(i, jnp.int32(stages.shape[0]))
        at = (row, head, pl.ds((begin + i) * TILE, TILE))
        plgpu.copy_gmem_to_smem(source.at[at], stages.at[stage], ready.at[stage])

    fetch_k = functools.partial(fetch, keys_ref, k_tiles, k_ready)
    fetch_v = functools.partial(fetch, values_ref, v_tiles, v_ready)
    k_stages, v_stages = k_tiles.shape[0], v_tiles.shape[0]
    for i in range(k_stages):
        pl.when(i < count)(functools.partial(fetch_k, jnp.int32(i)))
        if i < v_stages:
            pl.when(i < count)(functools.partial(fetch_v, jnp.int32(i)))

    # Bias and rotation of the group's queries and of the new key, which makes a small tile below them.
    def biased(raw: tuple[jax.Array, jax.Array]) -> jax.Array:
        return (raw[0].astype(f32) + raw[1].astype(f32)).astype(jnp.bfloat16)

    def rotated(raw: list[tuple[jax.Array, jax.Array]], cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
        left, right = (biased(x).astype(f32) for x in raw)
        return [x.astype(jnp.bfloat16) for x in (left * cos - right * sin, right * cos + left * sin)]

    def spread(x: jax.Array) -> jax.Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (8, d // 2), [1]), EIGHT_ROWS)

    cos, sin = cos.astype(f32), sin.astype(f32)
    q_new, k_new = rotated(q_raw, spread(cos), spread(sin)), rotated(k_raw, cos, sin)
    v_new = biased(v_raw)
    for half, q, k in zip(halves, q_new, k_new, strict=True):
        qk[pl.ds(0, 8), half] = q
        qk[pl.ds(8, 8), half] = spread(k)
    plgpu.commit_smem()

    @pl.when(share == last_share)
    def _() -> None:
        for half, k in zip(halves, k_new, strict=True):
            keys_ref[row, head, slot, half] = k
        values_ref[row, head, slot] = v_new

    # The new token is not read from the cache: it is where the last share's running softmax starts.
    def logits(k_ref: Any) -> jax.Array:
        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, qk, k_ref.T)
            return acc[...]

        result: jax.Array = pl.run_scoped(product, plgpu.ACC((64, k_ref.shape[0]), f32))
        return result

    factor = scale * math.log2(math.e)
    own = (share == last_share).astype(f32)
    top = (logits(qk.at[pl.ds(8, 8)]) * factor).max(axis=1) + (own - 1) * -_LOWEST
    total = plgpu.layout_cast(jnp.full((64,), own, f32), _WGMMA.reduce(1))
    acc = lax.broadcast_in_dim(v_new.astype(f32) * own, (64, d), [1])

    def across(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, [0])

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        acc, top, total = carry
        k, v = lax.rem(i, jnp.int32(k_stages)), lax.rem(i, jnp.int32(v_stages))
        low, high = start - (begin + i) * TILE, slot - (begin + i) * TILE
        plgpu.barrier_wait(k_ready.at[k])
        s = logits(k_tiles.at[k])
        pl.when(i + k_stages < count)(lambda: fetch_k(i + k_stages))
        j = plgpu.broadcasted_iota(jnp.int32, (64, TILE), 1, layout=_WGMMA)
        s = jnp.where((j >= low) & (j < high), s, _LOWEST)
        new_top = jnp.maximum(top, s.max(axis=1) * factor)
        alpha = jnp.exp2(top - new_top)
        p = jnp.exp2(s * factor - across(new_top, s.shape))
        total = total * alpha + p.sum(axis=1)
        acc = acc * across(alpha, acc.shape)
        plgpu.barrier_wait(v_ready.at[v])

        # Zero times what lies in a slot that is not ours must be zero, whatever lies there.
        @pl.when((low > 0) | (high < TILE))
        def _() -> None:
            j = plgpu.broadcasted_iota(jnp.int32, (TILE, d), 0, layout=_WGMMA)
            tile = load(v_tiles.at[v], _WGMMA, optimized=True)
            v_tiles[v] = jnp.where((j >= low) & (j < high), tile, jnp.zeros_like(tile))
            plgpu.commit_smem()

        p = p.astype(jnp.bfloat16)
        acc = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v_tiles.at[v]))(plgpu.ACC.init(acc))
        pl.when(i + v_stages < count)(lambda: fetch_v(i + v_stages))
        return acc, new_top, total

    acc, top, total = lax.fori_loop(0, count, step, (acc, top, total))

    # A share may have had nothing to do; then its weight in the merge is zero.
    total = jnp.maximum(total, 1e-30)
    out = acc * across(1 / total, acc.shape)

    def finish(out: jax.Array) -> None:
        plain[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(plain.at[pl.ds(0, G)], out_refs[0].at[pl.ds(row * H + head * G, G)])

    if blocks == 1:
        # The tile of queries has done its work and takes the output to its real rows.
        qk[...] = out.astype(jnp.bfloat16)
        finish(load(qk.at[pl.ds(0, 8)], EIGHT_ROWS))
    else:
        wide[...] = out
        lse[...] = top + jnp.log2(total)
        out, weight = load(wide.at[pl.ds(0, 8)], EIGHT_ROWS), load(lse.at[pl.ds(0, 8)], EIGHT_ROWS.reduce(1))
        weight = plgpu.layout_cast(across(weight, (8, d)), EIGHT_ROWS)
        for i, x in enumerate((out, weight)):
            plgpu.async_store_smem(
                x, parts.at[block, i], parts_ready, cluster_idx=jnp.int32(0), cluster_dim="block", optimized=False
            )

        @pl.when(block == 0)
        def _() -> None:
            plgpu.barrier_wait(parts_ready)
            out, lse = _merged(
                [load(parts.at[b, 0], EIGHT_ROWS) for b in range(blocks)],
                [load(parts.at[b, 1], EIGHT_ROWS) for b in range(blocks)],
            )
            if clusters == 1:
                finish(out.astype(jnp.bfloat16))
                return
            keep_unswizzled(wide_out)
            for x, ref in zip((out, lse), out_refs, strict=True):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                wide_out[...] = x
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(wide_out, ref.at[lax.axis_index("cluster"), row * K + head])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _merged(outs: list[jax.Array], tops: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """One softmax-weighted mean and log2-sum of several."""
    sum_of: Callable[[Any], Any] = functools.partial(functools.reduce, jnp.add)
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp2(t - top) for t in tops]
    total = sum_of(weights)
    return sum_of(o * w for o, w in zip(outs, weights, strict=True)) / total, top + jnp.log2(total)
