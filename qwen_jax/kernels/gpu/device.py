"""Facts about Hopper GPUs (H100 and H200 in their SXM form, compute capability 9.0)."""

import jax

MULTIPROCESSORS = 132
"""On another part the results are the same, and the work is divided less evenly."""
SHARED_BYTES = 227 * 1024
"""Shared memory that a thread block may use."""
TILE_SHARED_BYTES = SHARED_BYTES - 2048
"""The same without what barriers and alignment take: what the tiles of a kernel may use."""
REGISTERS = 65536
"""32-bit registers of a multiprocessor."""


def multiprocessors() -> int:
    """The number of multiprocessors of the first local device, or of an H100 if it does not tell."""
    return int(getattr(jax.local_devices()[0], "core_count", None) or MULTIPROCESSORS)
