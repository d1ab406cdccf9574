"""Sizes of the tiles of the flash-attention kernels for TPUs, and what they need of VMEM."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen_jax.kernels.tpu.device import LANES, Core
from qwen_jax.kernels.tpu.device import core as this_core


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of the attention kernels.

    Attributes:
      queries: query rows of a program; a multiple of twice `lanes`.
      keys: keys of a tile; divides both segments.
      lanes: queries of one matrix product.
      segment, backward_segment: keys and values that are in VMEM at once, in the forward and in the backward pass. The
        first is a multiple of the second.
      vmem_bytes: of one core.
    """

    queries: int
    keys: int
    lanes: int
    segment: int
    backward_segment: int
    vmem_bytes: int


def cost(products: int, q: jax.Array, k: jax.Array) -> pl.CostEstimate:
    """The cost of a kernel as XLA and `qwen-jax plan` see it: that of a causal mask, because intervals are data.

    Args:
      products: number of matrix products of [T, S] x head_dim.
      q, k: [B, H, T, d] and [B, K, S, d].
    """
    pairs = math.prod(q.shape[:3]) * k.shape[2] // 2
    moved = products * (q.size * q.dtype.itemsize + k.size * k.dtype.itemsize)
    return pl.CostEstimate(flops=2 * products * pairs * q.shape[3], transcendentals=pairs, bytes_accessed=moved)


def forward_bytes(tiling: Tiling, d: int, itemsize: int) -> int:
    """VMEM of the forward kernel, in bytes.

    A head_dim of 64 takes the lanes of 128, and a single row takes the space of 8. What the pipeline copies has two
    buffers.
    """
    wide, rows = max(d, LANES), tiling.queries
    copied = 2 * itemsize * wide * (2 * rows + 2 * tiling.segment) + 2 * 3 * 4 * 8 * rows
    if d < tiling.lanes:
        scratch = 4 * (d + tiling.keys) * rows + 2 * itemsize * tiling.keys * (tiling.lanes + d)
    else:
        # The accumulator; and in every lane the maximum, the sum, and both ends of the intervals, which are copied.
        scratch = 4 * rows * (wide + 6 * LANES)
    return copied + scratch + _spilled(itemsize)


def backward_bytes(tiling: Tiling, d: int, itemsize: int) -> int:
    """VMEM of the backward kernel, in bytes; see `forward_bytes`."""
    wide, rows, keys = max(d, LANES), tiling.queries, tiling.backward_segment
    copied = 2 * wide * (rows * (2 * itemsize + 4) + 4 * itemsize * keys) + 2 * 4 * 4 * 8 * rows
    scratch = 4 * d * (rows + 2 * keys) + 2 * itemsize * (d * rows + tiling.keys * (2 * tiling.lanes + d))
    return copied + scratch + _spilled(itemsize)


def _spilled(itemsize: int) -> int:
    """Bytes for spilled registers. Float32 products are several bfloat16 products each, and spill more."""
    return itemsize << 20


def choose_tiling(T: int, S: int, d: int, dtype: jax.typing.DTypeLike, core: Core | None = None) -> Tiling:
    """The tile sizes for T queries and S keys of head_dim d.

    Products are as wide as the matrix unit. A program takes up to 1,024 queries, which give the scheduler independent
    work, or 2,048 for long rows. A segment has at most 16,384 keys, because longer ones save nothing, and takes at most
    half of VMEM, unless a single tile takes more. Rows are divided evenly, so that there is little padding.

    Args:
      T, S, d: sizes.
      dtype: of queries, keys and values.
      core: by default the one that is compiled for.
    """
    vmem, lanes = core or this_core()
    itemsize = jnp.dtype(dtype).itemsize
    # Queries of a program, and keys of a tile.
    long = T >= 8192 and vmem >= 64 << 20 and itemsize == 2
    programs = -(-T // (2048 if long else 1024))
    queries = -(-T // (programs * 2 * lanes)) * 2 * lanes
    keys = min(512 if itemsize == 2 else 256, -(-S // LANES) * LANES)
    tiles = -(-S // keys)
    most = min(tiles, 16384 // keys)

    def sized(forward: int, backward: int) -> Tiling:
        return Tiling(queries, keys, lanes, forward * keys, backward * keys, vmem)

    # The longest backward segment that fits.
    backward = most
    while backward > 1 and backward_bytes(sized(backward, backward), d, itemsize) > vmem // 2:
        backward -= 1
    # Of the numbers of segments that fit, one with little padding. Another segment costs about as much as 0.2% more
    # keys.
    fewest = -(-tiles // backward)
    parts = min(range(fewest, 2 * fewest + 1), key=lambda n: -(-tiles // n) * n * (1 + 0.002 * n))
    backward = -(-tiles // parts)

    def fits(n: int) -> bool:
        return n * backward <= most and forward_bytes(sized(n * backward, backward), d, itemsize) <= vmem // 2

    # The forward segment is a whole number of backward segments that divides them all, so it needs no further padding.
    forward = max(n for n in range(1, parts + 1) if parts % n == 0 and (n == 1 or fits(n)))
    return sized(forward * backward, backward)
