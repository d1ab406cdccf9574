"""`PairBatch`: packed rows of preference pairs."""

import functools
from dataclasses import dataclass
from typing import Any

import jax

from train.data.batch import Batch


@functools.partial(jax.tree_util.register_dataclass, data_fields=("batch", "reference_BT", "margin_BT"), meta_fields=())
@dataclass(frozen=True)
class PairBatch:
    """Packed rows of pairs; every array is [batch, length], in NumPy on the host and in JAX on devices.

    In a row, segments 2p + 1 and 2p + 2, counted from p = 0, are the chosen and the rejected answer of one pair, each
    with its prompt before it.

    Attributes:
      batch: the rows; `loss_weights` are 1 on the tokens of answers.
      reference_BT: float32, at the last token of each segment the log-probability of the answer under the reference
        model: the sum over its trained tokens. 0 elsewhere.
      margin_BT: float32, at the last token of a chosen segment the margin of the pair. 0 elsewhere.
    """

    batch: Batch
    reference_BT: Any
    margin_BT: Any
