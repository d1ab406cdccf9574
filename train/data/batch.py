"""The one data type between documents and the training step."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from qwen_jax.sharding import Sharding


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tokens", "positions", "segment_ids", "loss_weights"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows; every array is [batch, length], in NumPy on the host and in JAX on devices.

    The weights belong to tokens as targets: `loss_weights[b, t]` counts the prediction of `tokens[b, t]` from the
    tokens before it. The first token of a document has nothing before it and is never a target, whatever its weight.

    Attributes:
      tokens: int32 token ids.
      positions: int32, counted from 0 in each document.
      segment_ids: int32, equal within a document and contiguous; 0 is padding.
      loss_weights: float32. Carried with the tokens, never derived from their ids.
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


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Puts a batch of NumPy arrays on the devices of a mesh, rows split over data and fsdp.

    Args:
      batch: the whole global batch.
      mesh: from `qwen_jax.sharding.make_mesh`.
    """
    placed: Batch = jax.device_put(batch, NamedSharding(mesh, Sharding.tokens))
    return placed
