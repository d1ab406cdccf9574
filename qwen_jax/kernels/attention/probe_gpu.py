"""Sums of the probabilities of a few probe rows along columns and diagonals, on Hopper GPUs.

A warpgroup walks over tiles of 64 keys and, for each query head of the group, multiplies the keys by the 64 probe rows:
S^T = K Q^T, keys by rows. A sum over rows is then a sum within four threads. For diagonals (key minus row is constant)
the tile is cut into strips of eight rows. In shared memory strip c is read 8 c keys further on, so that all strips add
up in registers and eight columns remain; these are added in the same way, each read one key further on. A tile writes
the 127 sums of its diagonals; XLA adds the halves that neighbouring tiles share. There are no atomics: results are
bit-identical from run to run.

Source: the estimate of vertical-slash patterns, Jiang et al. 2024 (MInference, arXiv:2407.02490), algorithm 2.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import keep_unswizzled, load, store_at, tiled
from qwen_jax.kernels.gpu.tiles import PER_COLUMN, PER_ROW, ROWS, WGMMA, across, kernel, rem, zeros
from qwen_jax.kernels.softmax import LOG2E
from qwen_jax.kernels.types import Ref

KEYS = 64
"""Keys of a tile."""
_WARPGROUPS, _STAGES = 2, 2
_STRIPS, _WIDTH = ROWS // 8, 8
# Strip c begins at row 56 + 120 c of its buffer and has zeros before and after it: row 128 c is 8 c + 56 rows before
# key 8 c of the strip, and row 128 c + 64 is where the second half of the diagonals begins.
_GAP, _STEP = KEYS - 8, 2 * KEYS - 8
_STRIP_ROWS = _STRIPS * 2 * KEYS - KEYS
# The eight columns that remain, below eight rows of zeros.
_FOLD_ROWS = 8 + 2 * KEYS


def heads_of_block(group: int, head_dim: int) -> int:
    """How many query heads of a group share a thread block: the most whose queries fit in shared memory.

    Args:
      group: query heads of a key/value head.
      head_dim: of the attention.
    """
    own = _STAGES * KEYS * head_dim * 2 + _STRIP_ROWS * _WIDTH * 2 + _FOLD_ROWS * _WIDTH * 4
    left = TILE_SHARED_BYTES - _WARPGROUPS * own
    return max(n for n in range(1, group + 1) if group % n == 0 and n * ROWS * head_dim * 2 <= left)


def supports(
    dtype: jax.typing.DTypeLike, rows: int, num_heads: int, num_kv_heads: int, head_dim: int, slots: int
) -> bool:
    """Whether the kernel supports these arguments.

    Args:
      dtype: of queries and cache.
      rows: probe rows.
      num_heads, num_kv_heads, head_dim: of the attention, on one device.
      slots: length of the cache.
    """
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half and rows == ROWS and head_dim in (64, 128) and num_heads % num_kv_heads == 0 and slots % 8 == 0


@functools.partial(jax.jit, static_argnames="scale")
def line_sums(
    q_BRHd: jax.Array, k_BKSd: jax.Array, start_BR: jax.Array, end_BR: jax.Array, lse_BHR: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Sums of the probabilities exp(scale q k - lse) along columns and diagonals. Runs on local arrays.

    Args:
      q_BRHd: 64 consecutive queries, bfloat16 or float16, head_dim 64 or 128.
      k_BKSd: the cache, of the same dtype. Slots that no row sees have no effect.
      start_BR, end_BR: int32 intervals; rows that see nothing have start >= end.
      lse_BHR: float32, natural log-sum-exp of the rows; it need not be finite where a row sees nothing.
      scale: multiplies the logits.

    Returns:
      float32 [B, H, S], and float32 [B, H, S + 63], where element j is the diagonal on which the last row sees key j.

    Raises:
      InputError: arguments that `supports` rejects.
    """
    (B, R, H, d), (K, S) = q_BRHd.shape, k_BKSd.shape[1:3]
    if q_BRHd.dtype != k_BKSd.dtype or not supports(q_BRHd.dtype, R, H, K, d, S):
        raise InputError(
            f"The kernel for probe rows needs {ROWS} rows of bfloat16 or float16, head_dim 64 or 128, H a multiple of "
            f"K and a cache of a multiple of 8 slots; got {q_BRHd.dtype} {q_BRHd.shape} over {k_BKSd.dtype} "
            f"{k_BKSd.shape}. Use implementation='reference'."
        )
    tiles = -(-S // KEYS)
    start, end = jnp.maximum(start_BR, 0), jnp.minimum(end_BR, S)
    ranges_B4 = tile_ranges(start, end)
    heads = heads_of_block(H // K, d)
    shares = min(max(MULTIPROCESSORS // (B * H // heads), 1), -(-tiles // _WARPGROUPS))
    own = {"q_smem": tiled((heads, ROWS, d), q_BRHd.dtype), "q_ready": plgpu.Barrier(num_arrivals=heads)}
    columns, parts = kernel(
        "probe_lines",
        functools.partial(_sum_share, scale=scale, heads=heads),
        tuple(jax.ShapeDtypeStruct((B, H, tiles, n), jnp.float32) for n in (KEYS, 2 * KEYS)),
        {"row": B, "head": H // heads, "share": shares},
        _WARPGROUPS,
        k_smem=tiled((_WARPGROUPS * _STAGES, KEYS, d), k_BKSd.dtype),
        k_ready=plgpu.Barrier(num_barriers=_WARPGROUPS * _STAGES),
        strips=plgpu.SMEM((_WARPGROUPS, _STRIP_ROWS, _WIDTH), jnp.float16),
        fold=plgpu.SMEM((_WARPGROUPS, _FOLD_ROWS, _WIDTH), jnp.float32),
        **own,
    )(
        q_BRHd.swapaxes(1, 2), k_BKSd, start, end, jnp.where(jnp.isfinite(lse_BHR), lse_BHR * LOG2E, 0.0), ranges_B4
    )  # fmt: skip
    # Tiles that no row sees are not written. Reading the first tile in place of each of them reads only the caches.
    tile = jnp.arange(tiles, dtype=jnp.int32)
    written_B1N1 = ((ranges_B4[:, :1] <= tile) & (tile < ranges_B4[:, 1:2]))[:, None, :, None]
    place_B1N1 = jnp.where(written_B1N1, tile[:, None], 0)
    columns, parts = (
        jnp.where(written_B1N1, jnp.take_along_axis(x, place_B1N1, axis=2, mode="clip"), 0.0) for x in (columns, parts)
    )
    columns = columns.reshape(B, H, -1)[:, :, :S]
    halves = parts.reshape(B, H, tiles, 2, KEYS)
    low, high = (
        jnp.pad(halves[:, :, :, n].reshape(B, H, -1), ((0, 0), (0, 0), (KEYS * n, KEYS - KEYS * n))) for n in (0, 1)
    )
    return columns, (low + high)[:, :, : S + ROWS - 1]


def tile_ranges(start: jax.Array, end: jax.Array) -> jax.Array:
    """The tiles that some row sees, first and end, and those that all rows see in full: int32 [..., 4].

    Args:
      start, end: int32 intervals [..., R].
    """
    sees = start < end
    low, high = jnp.where(sees, start, jnp.iinfo(jnp.int32).max).min(axis=-1), jnp.where(sees, end, 0).max(axis=-1)
    first = jnp.minimum(low, high) // KEYS
    last = jnp.maximum(-(-high // KEYS), first)
    full_first = jnp.clip((start.max(axis=-1) + (KEYS - 1)) // KEYS, first, last)
    full_last = jnp.clip(jnp.maximum(end.min(axis=-1), 0) // KEYS, full_first, last)
    return jnp.stack([first, last, full_first, full_last], axis=-1)


def walk_share(
    body: Callable[[jax.Array, jax.Array, bool], None], k_ref: Ref, where: tuple[jax.Array, jax.Array],
    tiles: Sequence[jax.Array], warpgroups: int, k_smem: Ref, k_ready: Ref, q_ready: Ref,
) -> None:  # fmt: skip
    """Walks over this warpgroup's share of the key tiles. The numbers of all shares differ by at most one.

    Args:
      body: (tile, its slot of shared memory, whether it needs a mask).
      k_ref: the cache.
      where: row of the batch and key/value head.
      tiles: of `tile_ranges`.
      warpgroups: of a thread block, each with slots of its own.
      k_smem, k_ready: slots for keys, and their barriers.
      q_ready: is waited for before the first tile.
    """
    first, last, full_first, full_last = tiles
    warpgroup, stages = lax.axis_index("warpgroup"), k_smem.shape[0] // warpgroups
    number, shares = lax.axis_index("share") * warpgroups + warpgroup, lax.axis_size("share") * warpgroups
    begin, end = (first + lax.div((last - first) * n, jnp.int32(shares)) for n in (number, number + 1))

    def slot_of(tile: jax.Array) -> jax.Array:
        return warpgroup * stages + rem(tile - begin, stages)

    def fetch(tile: jax.Array) -> None:
        slot, keys = slot_of(tile), pl.ds(pl.multiple_of(tile * KEYS, KEYS), KEYS)
        plgpu.copy_gmem_to_smem(k_ref.at[(*where, keys)], k_smem.at[slot], k_ready.at[slot])

    def step(tile: jax.Array, _: None, masked: bool) -> None:
        slot = slot_of(tile)
        plgpu.barrier_wait(k_ready.at[slot])
        body(tile, slot, masked)
        pl.when(tile + stages < end)(lambda: fetch(tile + stages))

    for n in range(stages):
        pl.when(begin + n < end)(functools.partial(fetch, begin + n))
    plgpu.barrier_wait(q_ready)
    # Tiles in which all rows see all keys need no mask.
    inner_first = jnp.clip(full_first, begin, end)
    inner_last = jnp.clip(full_last, inner_first, end)
    for low, high, masked in ((begin, inner_first, True), (inner_first, inner_last, False), (inner_last, end, True)):
        lax.fori_loop(low, high, functools.partial(step, masked=masked), None)


def _sum_share(
    q_ref: Ref, k_ref: Ref, start_ref: Ref, end_ref: Ref, lse_ref: Ref, tiles_ref: Ref, columns_ref: Ref,
    diagonals_ref: Ref, *, k_smem: Ref, k_ready: Ref, strips: Ref, fold: Ref, q_smem: Ref, q_ready: Ref, scale: float,
    heads: int,
) -> None:  # fmt: skip
    """The program of a thread block: some heads of a group over two shares of the key tiles, one for each warpgroup."""
    row, part, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    kv_head = lax.div(part * heads, jnp.int32(q_ref.shape[1] // k_ref.shape[1]))
    keep_unswizzled(strips)
    keep_unswizzled(fold)
    strips, fold = strips.at[warpgroup], fold.at[warpgroup]

    @pl.when(warpgroup == 0)
    def fetch_queries() -> None:
        for g in range(heads):
            plgpu.copy_gmem_to_smem(q_ref.at[row, part * heads + g], q_smem.at[g], q_ready)

    # Zeros around the strips, and above the first sum.
    for n in range(_STRIP_ROWS // ROWS):
        strips.at[pl.ds(n * ROWS, ROWS)][...] = zeros((ROWS, _WIDTH), WGMMA).astype(jnp.float16)
    fold.at[pl.ds(0, ROWS)][...] = zeros((ROWS, _WIDTH), WGMMA)
    plgpu.commit_smem()

    def over_heads(tile: jax.Array, slot: jax.Array, masked: bool) -> None:
        def one_head(g: jax.Array, _: None) -> None:
            head = part * heads + g
            lse = load(lse_ref.at[row, head], PER_COLUMN)

            def logits(acc: Ref) -> jax.Array:
                plgpu.wgmma(acc, k_smem.at[slot], q_smem.at[g].T)
                return acc[...]

            s = pl.run_scoped(logits, plgpu.ACC((KEYS, ROWS), jnp.float32))
            p = jnp.exp2(s * (scale * LOG2E) - across(lse, s.shape, 1))
            if masked:
                low, high = (
                    across(load(x.at[row], PER_COLUMN) - tile * KEYS, s.shape, 1) for x in (start_ref, end_ref)
                )
                j = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=WGMMA)
                p = jnp.where((j >= low) & (j < high), p, 0.0)
            store_at(columns_ref.at[row, head, tile], (0,), (p.sum(axis=1),), PER_ROW)
            # Diagonals: strips of eight rows, each read eight keys further on than the one before.
            halves = p.astype(jnp.float16)
            at = [_GAP + _STEP * c for c in range(_STRIPS)]
            store_at(strips, at, [halves[:, c * _WIDTH : (c + 1) * _WIDTH] for c in range(_STRIPS)], WGMMA)
            plgpu.commit_smem()
            sums = []
            for n in range(2):
                # The last strip has nothing in the second half.
                at = [2 * KEYS * c + KEYS * n for c in range(_STRIPS - n)]
                parts = [load(strips.at[pl.ds(a, KEYS)], WGMMA).astype(jnp.float32) for a in at]
                sums.append(sum(parts[1:], parts[0]))
            store_at(fold, (8, 8 + KEYS), sums, WGMMA)
            plgpu.commit_smem()
            # The eight columns that remain, each read one key further on. A load takes all columns of its rows.
            column = plgpu.broadcasted_iota(jnp.int32, (KEYS, _WIDTH), 1, layout=WGMMA)
            sums = []
            for n in range(2):
                total = load(fold.at[pl.ds(KEYS * n + 1, KEYS)], WGMMA)
                for e in range(1, _WIDTH):
                    total = jnp.where(column == e, load(fold.at[pl.ds(KEYS * n + 1 + e, KEYS)], WGMMA), total)
                sums.append(total.sum(axis=1))
            store_at(diagonals_ref.at[row, head, tile], (0, KEYS), sums, PER_ROW)

        lax.fori_loop(0, heads, one_head, None)

    tiles = [tiles_ref[row, n] for n in range(4)]
    walk_share(over_heads, k_ref, (row, kv_head), tiles, _WARPGROUPS, k_smem, k_ready, q_ready)
