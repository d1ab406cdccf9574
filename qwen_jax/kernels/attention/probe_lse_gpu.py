"""The log-sum-exp of a few rows over all their keys, on Hopper GPUs: attention without values.

A warpgroup walks over a share of the key tiles and multiplies each by the 64 rows of every query head of the group. The
running maximum and sum of each head stay in shared memory. The shares are merged by XLA.

Source: the running softmax, Milakov and Gimelshein 2018 (arXiv:1805.02867).
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention.flash_gpu_tiles import mask_logits
from qwen_jax.kernels.attention.probe_gpu import KEYS, tile_ranges, walk_share
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import keep_unswizzled, load, store_at, tiled
from qwen_jax.kernels.gpu.tiles import PER_ROW, ROWS, across, kernel, zeros
from qwen_jax.kernels.softmax import LOG2E, LOW
from qwen_jax.kernels.types import Ref

_WARPGROUPS, _STAGES = 3, 2


def supports(
    dtype: jax.typing.DTypeLike, rows: int, num_heads: int, num_kv_heads: int, head_dim: int, slots: int
) -> bool:
    """Whether the kernel supports these arguments.

    Args:
      dtype: of queries and cache.
      rows: queries, a multiple of 64.
      num_heads, num_kv_heads, head_dim: of the attention, on one device.
      slots: length of the cache.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half and rows % ROWS == 0 and head_dim in (64, 128) and num_heads % num_kv_heads == 0 and slots % 8 == 0


@functools.partial(jax.jit, static_argnames="scale")
def rows_lse(q_BRHd: jax.Array, k_BKSd: jax.Array, start_BR: jax.Array, end_BR: jax.Array, scale: float) -> jax.Array:
    """The log-sum-exp of the logits of each row, float32 [B, H, R]; minus infinity for none. Runs on local arrays.

    Args:
      q_BRHd: queries, bfloat16 or float16, in a multiple of 64; head_dim 64 or 128. Every 64 should see similar keys.
      k_BKSd: the cache, of the same dtype. Slots that no row sees have no effect.
      start_BR, end_BR: int32 intervals; rows that see nothing have start >= end.
      scale: multiplies the logits; positive.

    Raises:
      InputError: arguments that `supports` rejects.
    """
    (B, R, H, d), (K, S) = q_BRHd.shape, k_BKSd.shape[1:3]
    if q_BRHd.dtype != k_BKSd.dtype or not supports(q_BRHd.dtype, R, H, K, d, S):
        raise InputError(
            f"The log-sum-exp kernel needs a multiple of {ROWS} rows of bfloat16 or float16, head_dim 64 or 128, H a "
            f"multiple of K and a cache of a multiple of 8 slots; got {q_BRHd.dtype} {q_BRHd.shape} over "
            f"{k_BKSd.dtype} {k_BKSd.shape}. Use implementation='reference'."
        )
    start, end = jnp.maximum(start_BR, 0), jnp.minimum(end_BR, S)
    group, tiles, n = H // K, -(-S // KEYS), R // ROWS
    # The heads whose queries and running sums fit in shared memory.
    left, size = TILE_SHARED_BYTES - _WARPGROUPS * _STAGES * KEYS * d * 2, ROWS * d * 2 + _WARPGROUPS * 2 * ROWS * 4
    heads = max(m for m in range(1, group + 1) if group % m == 0 and m * size <= left)
    shares = min(max(MULTIPROCESSORS // (B * n * H // heads), 1), -(-tiles // _WARPGROUPS))
    (sums,) = kernel(
        "probe_lse",
        functools.partial(_share_lse, scale=scale, heads=heads),
        (jax.ShapeDtypeStruct((B, H, n, shares * _WARPGROUPS, 2 * ROWS), jnp.float32),),
        {"row": B, "head": H // heads, "rows": n, "share": shares},
        _WARPGROUPS,
        q_smem=tiled((heads, ROWS, d), q_BRHd.dtype),
        k_smem=tiled((_WARPGROUPS * _STAGES, KEYS, d), k_BKSd.dtype),
        running=plgpu.SMEM((_WARPGROUPS, heads, 2 * ROWS), jnp.float32),
        q_ready=plgpu.Barrier(num_arrivals=heads),
        k_ready=plgpu.Barrier(num_barriers=_WARPGROUPS * _STAGES),
    )(
        q_BRHd.swapaxes(1, 2), k_BKSd, start, end,
        tile_ranges(start.reshape(B, n, ROWS), end.reshape(B, n, ROWS)),
    )  # fmt: skip
    top, total = sums[..., :ROWS], sums[..., ROWS:]
    lse = jnp.where(total > 0, top * (1 / LOG2E) + jnp.log(total), -jnp.inf)
    return jax.nn.logsumexp(lse, axis=3).reshape(B, H, R)


def _share_lse(
    q_ref: Ref, k_ref: Ref, start_ref: Ref, end_ref: Ref, tiles_ref: Ref, sums_ref: Ref, *, q_smem: Ref, k_smem: Ref,
    running: Ref, q_ready: Ref, k_ready: Ref, scale: float, heads: int,
) -> None:  # fmt: skip
    """The program of a thread block: 64 rows of some heads of a group over a share of the keys for each warpgroup."""
    row, part, block, warpgroup = (lax.axis_index(name) for name in ("row", "head", "rows", "warpgroup"))
    number = lax.axis_index("share") * _WARPGROUPS + warpgroup
    kv_head = lax.div(part * heads, jnp.int32(q_ref.shape[1] // k_ref.shape[1]))
    rows, factor = pl.ds(pl.multiple_of(block * ROWS, ROWS), ROWS), scale * LOG2E
    keep_unswizzled(running)

    @pl.when(warpgroup == 0)
    def fetch_queries() -> None:
        for g in range(heads):
            plgpu.copy_gmem_to_smem(q_ref.at[row, part * heads + g, rows], q_smem.at[g], q_ready)

    # The threads that hold a row write its maximum and sum, and only they read them: there is nothing to wait for.
    for g in range(heads):
        top = plgpu.layout_cast(jnp.full((ROWS,), LOW, jnp.float32), PER_ROW)
        store_at(running.at[warpgroup, g], (0, ROWS), (top, zeros((ROWS,), PER_ROW)), PER_ROW)

    def sums_of(g: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        top, total = (load(running.at[warpgroup, g, pl.ds(n * ROWS, ROWS)], PER_ROW) for n in range(2))
        return top, total

    def over_heads(tile: jax.Array, slot: jax.Array, masked: bool) -> None:
        def one_head(g: jax.Array, _: None) -> None:
            top, total = sums_of(g)

            def logits(acc: Ref) -> jax.Array:
                plgpu.wgmma(acc, q_smem.at[g], k_smem.at[slot].T)
                return acc[...]

            s = pl.run_scoped(logits, plgpu.ACC((ROWS, KEYS), jnp.float32))
            if masked:
                low, high = (load(x.at[row, rows], PER_ROW) - tile * KEYS for x in (start_ref, end_ref))
                s = mask_logits(s, low, high, axis=1)
            new_top = jnp.maximum(top, s.max(axis=1) * factor)
            p = jnp.exp2(s * factor - across(new_top, s.shape))
            store_at(
                running.at[warpgroup, g], (0, ROWS), (new_top, total * jnp.exp2(top - new_top) + p.sum(axis=1)), PER_ROW
            )

        lax.fori_loop(0, heads, one_head, None)

    tiles = [tiles_ref[row, block, n] for n in range(4)]
    walk_share(over_heads, k_ref, (row, kv_head), tiles, _WARPGROUPS, k_smem, k_ready, q_ready)
    for g in range(heads):
        store_at(sums_ref.at[row, part * heads + g, block, number], (0, ROWS), sums_of(g), PER_ROW)
