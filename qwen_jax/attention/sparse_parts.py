"""A chunk of queries whose keys are in parts, and single rows of it: probe rows, audit rows, their log-sum-exp."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qwen_jax import kernels
from qwen_jax.kernels.padding import pad_to_multiple

PROBE_ROWS = 64
"""Rows of a chunk from which a vertical-slash pattern is chosen: its last ones."""

AUDIT_ROWS = 64
"""Rows of a chunk, spread over it, on which recall is measured besides."""

# Keys of a range that one copy of a few rows attends to, and how many ranges there are at most. See `rows_lse`.
_RANGE, _MOST_RANGES = 8192, 16


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("q_BTHd", "mask", "critical_BRHd"), meta_fields=()
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Part:
    """The queries of a chunk as they see one part of the keys.

    Plain attention has one part. Dual-chunk attention has three, because queries are rotated differently for the keys
    of their own chunk, of the chunk before and of older ones.

    Attributes:
      q_BTHd: queries, rotated for these keys.
      mask: the keys of the part that each query sees. The intervals of a query in all parts are disjoint and together
        one interval.
      critical_BRHd: the probe rows (see `probe_rows`) rotated for choosing keys, which dual-chunk attention does with
        positions that are not clipped. None means the rows of `q_BTHd`.
    """

    q_BTHd: jax.Array
    mask: kernels.Mask
    critical_BRHd: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The keys that each row, and each tile of rows, sees in the parts and in all of them together.

    Attributes:
      start_PBN, end_PBN: int32, of each part: the keys that some row of a tile sees lie between them.
      whole_start_PBN, whole_end_PBN: int32: every row of a tile sees what lies between them.
      start_BT, end_BT: int32, of each row over all parts.
    """

    start_PBN: jax.Array
    end_PBN: jax.Array
    whole_start_PBN: jax.Array
    whole_end_PBN: jax.Array
    start_BT: jax.Array
    end_BT: jax.Array

    def union(self) -> tuple[jax.Array, jax.Array]:
        """The keys that some row of a tile sees in any part, int32 [B, N] twice; (0, 0) for none."""
        sees = self.start_PBN < self.end_PBN
        start = jnp.where(sees, self.start_PBN, jnp.iinfo(jnp.int32).max).min(axis=0)
        end = jnp.where(sees, self.end_PBN, 0).max(axis=0)
        return jnp.minimum(start, end), end


def bounds(masks: Sequence[kernels.Mask], tile: int) -> Bounds:
    """The bounds of rows and of tiles of `tile` rows."""
    start_PBT, end_PBT = _stacked(masks)
    sees = start_PBT < end_PBT
    start_PBT, end_PBT = jnp.where(sees, start_PBT, jnp.iinfo(jnp.int32).max), jnp.where(sees, end_PBT, 0)

    def by_tile(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, tile)

    start, end = by_tile(start_PBT), by_tile(end_PBT)
    high = end.max(axis=-1)
    end_BT = end_PBT.max(axis=0)
    return Bounds(
        jnp.minimum(start.min(axis=-1), high), high, start.max(axis=-1), end.min(axis=-1),
        jnp.minimum(start_PBT.min(axis=0), end_BT), end_BT,
    )  # fmt: skip


def probe_rows(length: jax.Array) -> jax.Array:
    """The last rows of a chunk of `length` rows, int32 [PROBE_ROWS]; below 0 where the chunk is shorter."""
    return length - PROBE_ROWS + jnp.arange(PROBE_ROWS, dtype=jnp.int32)


def audit_rows(slot: jax.Array, length: jax.Array) -> jax.Array:
    """Rows at pseudo-random places, one in each of AUDIT_ROWS equal parts of the chunk, int32 [AUDIT_ROWS].

    Args:
      slot: int32 scalar, of the first row; the seed.
      length: int32 scalar, rows of the chunk.
    """
    # A hash of the place of the row (the finaliser of MurmurHash3), because a generator costs more than all the rest.
    i = jnp.arange(AUDIT_ROWS, dtype=jnp.uint32)
    x = (i + slot.astype(jnp.uint32)) * jnp.uint32(0x9E3779B9)
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    jitter = (x ^ x >> 16).astype(jnp.float32) / 2.0**32
    row = (i.astype(jnp.float32) + jitter) / AUDIT_ROWS * length.astype(jnp.float32)
    return jnp.clip(row.astype(jnp.int32), 0, length - 1)


def take_rows(x_BT: jax.Array, row_R: jax.Array) -> jax.Array:
    """Rows of queries [B, T, H, d] or of anything else [B, T, ...]. A row that does not exist gives some other row."""
    return jnp.take(x_BT, jnp.clip(row_R, 0, x_BT.shape[1] - 1), axis=1)


def mask_rows(mask: kernels.Mask, row_R: jax.Array) -> kernels.Mask:
    """The mask of some rows. A row below 0 sees nothing."""
    ends = jnp.where(row_R >= 0, take_rows(mask.k_end_BT, row_R), 0)
    return kernels.Mask(take_rows(mask.k_start_BT, row_R), ends)


def rows_lse(
    queries: Sequence[jax.Array],
    masks: Sequence[kernels.Mask],
    k_BKSd: jax.Array,
    v_BKSd: jax.Array,
    *,
    scale: float,
    implementation: kernels.Implementation,
) -> jax.Array:
    """The log-sum-exp of a few rows over all the keys that they see, in one or more parts: float32 [B, H, R].

    Hopper GPUs have a kernel for it. Elsewhere the kernel for many queries gives each tile of rows to one core, so that
    a few rows would leave most of a chip idle: each row is repeated, and each copy sees another range of the keys.

    Args:
      queries: [B, R, H, d] for each part.
      masks: of these rows, for each part.
      k_BKSd, v_BKSd: the cache.
      scale, implementation: as for `kernels.decode_attention`.
    """
    n = min(max(k_BKSd.shape[2] // _RANGE, 1), _MOST_RANGES)
    chosen = kernels.select_attention(implementation, queries[0], masks[0], return_lse=True, cache=True)
    lses = []
    for q_BRHd, mask in zip(queries, masks, strict=True):
        if chosen == "gpu":
            lses.append(_lse_on_gpu(q_BRHd, mask, k_BKSd, scale))
            continue
        B, R, H, _ = q_BRHd.shape
        start, end = mask.k_start_BT, mask.k_end_BT
        if n > 1:
            low, high = jnp.where(start < end, start, jnp.iinfo(jnp.int32).max).min(), end.max()
            width = -(-jnp.maximum(high - low, 0) // n)
            first_n = (low + width * jnp.arange(n, dtype=jnp.int32))[None, :, None]
            start = jnp.maximum(start[:, None], first_n).reshape(B, n * R)
            end = jnp.minimum(end[:, None], first_n + width).reshape(B, n * R)
            q_BRHd = jnp.tile(q_BRHd, (1, n, 1, 1))
        mask = kernels.Mask(start, jnp.maximum(end, start))
        lse = kernels.decode_attention(q_BRHd, k_BKSd, v_BKSd, mask, scale=scale, implementation=implementation)[1]
        lses += list(jnp.moveaxis(lse.reshape(B, H, n, R), 2, 0))
    return jax.nn.logsumexp(jnp.stack(lses), axis=0)


def _lse_on_gpu(q_BRHd: jax.Array, mask: kernels.Mask, k_BKSd: jax.Array, scale: float) -> jax.Array:
    """The log-sum-exp by the kernel for Hopper GPUs, float32 [B, H, R]. Rows are padded to what it needs."""
    from qwen_jax.kernels.attention import probe_lse_gpu

    R = q_BRHd.shape[1]
    q, start, end = (pad_to_multiple(x, 1, 64) for x in (q_BRHd, mask.k_start_BT, mask.k_end_BT))
    return probe_lse_gpu.rows_lse(q, k_BKSd, start, end, scale)[:, :, :R]


def _stacked(masks: Sequence[kernels.Mask]) -> tuple[jax.Array, jax.Array]:
    return jnp.stack([m.k_start_BT for m in masks]), jnp.stack([m.k_end_BT for m in masks])
