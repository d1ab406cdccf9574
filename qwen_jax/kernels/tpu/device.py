"""Facts about the TPU core that is compiled for."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
"""A vector register holds 8 x 128 numbers of 32 bits."""
PACKED_ROWS = 16
"""Rows of 16-bit numbers in a register: slices of bfloat16 arrays must begin at a multiple."""


class Core(NamedTuple):
    """One TPU core.

    Attributes:
      vmem_bytes: capacity of its vector memory.
      mxu_width: rows and columns of its matrix unit.
    """

    vmem_bytes: int
    mxu_width: int


def _is_tpu() -> bool:
    """Whether the device that is compiled for, that of the current mesh or the first one, is a TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return bool(device.device_kind.startswith("TPU"))


def core() -> Core:
    """The core that is compiled for. Without a TPU (in TPU interpret mode) it is that of a v5p."""
    if not _is_tpu():
        return Core(64 << 20, 128)
    info = pltpu.get_tpu_info()
    return Core(info.vmem_capacity_bytes, info.mxu_column_size)


def cores() -> int:
    """The number of cores that share the grid of a kernel: two on v4 and v5p, otherwise one."""
    return pltpu.get_tpu_info().num_cores if _is_tpu() else 1


def unpacks_e4m3b11() -> bool:
    """Whether the core unpacks float8_e4m3b11fnuz, but not float8_e4m3fn, by one instruction: v5 and v6. 7x unpacks
    both, and v4 neither. Without a TPU it is that of a v5p."""
    return not _is_tpu() or pltpu.get_tpu_info().generation in (5, 6)


def multiplies_codes(dtype: jax.typing.DTypeLike) -> bool:
    """Whether the matrix unit multiplies codes faster than bfloat16: int8 from v5e to v6e, float8 from 7x on."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    if not _is_tpu():
        # As on a v5p; see `core`.
        return integer
    info = pltpu.get_tpu_info()
    return (info.int8_ops_per_second if integer else info.fp8_ops_per_second) > info.bf16_ops_per_second


def cache_tile_bytes(bandwidth: float | None = None) -> int:
    """Bytes of a cache that a kernel fetches at once: a power of two near what a core reads in 1.3 us.

    With smaller tiles the latency of a step (product, softmax, product) is longer than its copy. With larger ones, rows
    that use few slots read many that they do not see.

    Args:
      bandwidth: of HBM for one core, in bytes per second. By default that of the core that is compiled for.
    """
    if bandwidth is None:
        bandwidth = pltpu.get_tpu_info().mem_bw_bytes_per_second if _is_tpu() else 1.23e12
    return 1 << round(math.log2(bandwidth * 1.3e-6))
