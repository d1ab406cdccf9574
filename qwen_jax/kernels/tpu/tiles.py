"""What the kernels for TPUs share: the device they are for, and the sizes of their tiles."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the attention kernels' tiles.

    Attributes:
      queries: rows of a program; a multiple of twice `lanes`.
      keys: keys of a tile; divides both segments.
      lanes: queries of one product.
      segment, backward_segment: keys and values that are in VMEM at once. The first is a multiple of the second.
      vmem_bytes: of one core.
    """

    queries: int
    keys: int
    lanes: int
    segment: int
    backward_segment: int
    vmem_bytes: int


def _is_tpu() -> bool:
    """Whether what is compiled for is a TPU: the current mesh's device, or the first one."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return bool(device.device_kind.startswith("TPU"))


def device() -> tuple[int, int]:
    """Bytes of VMEM and width of the matrix unit of the core that is compiled for.

    Where it is none (TPU interpret mode): those of a v5p.
    """
    if not _is_tpu():
        return 64 << 20, 128
    info = pltpu.get_tpu_info()
    return info.vmem_capacity_bytes, info.mxu_column_size


def cores() -> int:
    """Cores that share a kernel's grid: two on v4 and v5p."""
    return pltpu.get_tpu_info().num_cores if _is_tpu() else 1


def tile_bytes(bandwidth: float | None = None) -> int:
    """Bytes of a cache that are fetched at once: what a core reads in about 1.3 us, a power of two.

    Less, and a step's own latency (products, softmax, products) is longer than its copy; more, and rows of a few slots
    read what they don't see.

    Args:
      bandwidth: of a core, in bytes a second; by default of the one that is compiled for, or a v5p's.
    """
    if bandwidth is None:
        bandwidth = pltpu.get_tpu_info().mem_bw_bytes_per_second if _is_tpu() else 1.23e12
    return 1 << round(math.log2(bandwidth * 1.3e-6))


def fill_up(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Fills up an axis with zeros: rows that are not there see nothing, keys that are not there nobody sees."""
    return jnp.pad(x, [(0, -n % multiple if a == axis else 0) for a, n in enumerate(x.shape)])


def cost(products: int, q: jax.Array, k: jax.Array) -> pl.CostEstimate:
    """What XLA and `qwen-jax plan` are told of a kernel: the work of a causal mask, since intervals are data.

    Args:
      products: matrix products of [T, S] x head_dim that it does.
      q, k: [B, H, T, d] and [B, K, S, d].
    """
    pairs = math.prod(q.shape[:3]) * k.shape[2] // 2
    moved = products * (q.size * q.dtype.itemsize + k.size * k.dtype.itemsize)
    return pl.CostEstimate(flops=2 * products * pairs * q.shape[3], transcendentals=pairs, bytes_accessed=moved)


def forward_bytes(tiles: Blocks, d: int, itemsize: int) -> int:
    """VMEM of the forward kernel. A head_dim of 64 takes the lanes of 128, and a row alone those of 8 rows; what is
    moved is there twice."""
    wide, rows = max(d, LANES), tiles.queries
    moved = 2 * itemsize * wide * (2 * rows + 2 * tiles.segment) + 2 * 3 * 4 * 8 * rows
    if d < tiles.lanes:
        scratch = 4 * (d + tiles.keys) * rows + 2 * itemsize * tiles.keys * (tiles.lanes + d)
    else:
        # The accumulator; and in every lane the maximum, the sum, and both ends of intervals, which are moved.
        scratch = 4 * rows * (wide + 6 * LANES)
    return moved + scratch + _spilled(itemsize)


def backward_bytes(tiles: Blocks, d: int, itemsize: int) -> int:
    """VMEM of the backward kernel, in the same way."""
    wide, rows, keys = max(d, LANES), tiles.queries, tiles.backward_segment
    moved = 2 * wide * (rows * (2 * itemsize + 4) + 4 * itemsize * keys) + 2 * 4 * 4 * 8 * rows
    scratch = 4 * d * (rows + 2 * keys) + 2 * itemsize * (d * rows + tiles.keys * (2 * tiles.lanes + d))
    return moved + scratch + _spilled(itemsize)


def _spilled(itemsize: int) -> int:
    """Room for registers that are put away; float32 products are several each."""
    return itemsize << 20


def blocks(T: int, S: int, d: int, dtype: Any, core: tuple[int, int] | None = None) -> Blocks:
    """Sizes for T queries and S keys of head_dim d, on a core as `device` describes it: that which is compiled for.

    Products are as wide as the matrix unit. A program takes up to 1,024 queries, which give the scheduler independent
    work, or 2,048 where rows are long. A segment has at most 16,384 keys, more of which save nothing, and takes half of
    VMEM at most, unless a single tile takes more. Rows are cut evenly, so that little is filled up.
    """
    vmem, lanes = core or device()
    itemsize = jnp.dtype(dtype).itemsize
    long = T >= 8192 and vmem >= 64 << 20 and itemsize == 2
    programs = -(-T // (2048 if long else 1024))
    queries = -(-T // (programs * 2 * lanes)) * 2 * lanes
    keys = min(512 if itemsize == 2 else 256, -(-S // LANES) * LANES)
    tiles = -(-S // keys)
    most = min(tiles, 16384 // keys)

    def sized(forward: int, backward: int) -> Blocks:
        return Blocks(queries, keys, lanes, forward * keys, backward * keys, vmem)

    backward = most
    while backward > 1 and backward_bytes(sized(backward, backward), d, itemsize) > vmem // 2:
        backward -= 1
    # Of the numbers of parts that fit, one that fills up little; another part costs about as much as 0.2% more keys.
    fewest = -(-tiles // backward)
    parts = min(range(fewest, 2 * fewest + 1), key=lambda n: -(-tiles // n) * n * (1 + 0.002 * n))
    backward = -(-tiles // parts)

    def fits(n: int) -> bool:
        return n * backward <= most and forward_bytes(sized(n * backward, backward), d, itemsize) <= vmem // 2

    # A divisor of the parts: the forward pass fills up no more than the backward pass does.
    forward = max(n for n in range(1, parts + 1) if parts % n == 0 and (n == 1 or fits(n)))
    return sized(forward * backward, backward)
