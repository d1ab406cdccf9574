"""`Batch`: packed rows for the training step, and their placement on the devices of a mesh."""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_jax.parallel import placing
from qwen_jax.parallel.sharding import Sharding

B = TypeVar("B")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "positions", "segment_ids", "loss_weights"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows; every array is [batch, length], in NumPy on the host and in JAX on devices.

    The weights belong to tokens as targets: `loss_weights[b, t]` is the weight of predicting `tokens[b, t]` from the
    tokens before it. The first token of a segment has none before it and is never a target, whatever its weight.

    Attributes:
      tokens: int32 token ids.
      positions: int32, counted from 0 in each document.
      segment_ids: int32, equal within a document and contiguous; 0 is padding.
      loss_weights: float32. They are carried with the tokens, never derived from token ids.
    """

    tokens: Any
    positions: Any
    segment_ids: Any
    loss_weights: Any

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, length)."""
        rows, length = self.tokens.shape
        return rows, length


def place(batch: B, mesh: Mesh) -> B:
    """Puts a batch of NumPy arrays on the devices of a mesh, rows split over data, fsdp and expert.

    Args:
      batch: the whole global batch, the same in every process; each places only the rows of its devices. A `Batch`, or
        any other tree of [batch, length] arrays.
      mesh: from `qwen_jax.parallel.sharding.make_mesh`.
    """
    placed: B = placing.place(batch, NamedSharding(mesh, Sharding.tokens))
    return placed


def row_part(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Determines which part of the rows of a global batch this process has to read.

    Args:
      mesh: from `qwen_jax.parallel.sharding.make_mesh`.
      batch_size: rows in the global batch.

    Returns:
      (index, count): part `index` of `count` equal parts holds all rows of this process's devices. Processes that
      share rows, because a tensor axis spans them, read the same part.
    """
    indices = NamedSharding(mesh, Sharding.rows).addressable_devices_indices_map((batch_size,))
    bounds = [index[0].indices(batch_size) for index in indices.values() if index]
    first, last = min(b[0] for b in bounds), max(b[1] for b in bounds)
    count = batch_size // (last - first)
    while batch_size % count or first * count // batch_size != (last - 1) * count // batch_size:
        count -= 1
    return first * count // batch_size, count


def place_part(part: B, batch_size: int, mesh: Mesh) -> B:
    """Puts this process's part of a global batch on its devices.

    Args:
      part: NumPy arrays [batch_size / count, length], the part that `row_part` returned; a `Batch` or another tree.
      batch_size: rows in the global batch.
      mesh: from `qwen_jax.parallel.sharding.make_mesh`.
    """
    index, count = row_part(mesh, batch_size)
    begin, sharding = index * (batch_size // count), NamedSharding(mesh, Sharding.tokens)

    def put(x: np.ndarray) -> jax.Array:
        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            return x[start - begin : stop - begin]

        return jax.make_array_from_callback((batch_size, x.shape[1]), sharding, rows)

    placed: B = jax.tree.map(put, part)
    return placed
