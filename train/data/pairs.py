"""`PairBatch`: packed rows of preference pairs."""

import dataclasses
from typing import Any

import jax

from train.data.batch import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Packed rows of preference pairs; every array is [batch, length].

    In a row, segments 2p + 1 and 2p + 2, counted from p = 0, are the chosen and the rejected answer of one pair, each
    with its prompt before it.

    Attributes:
      batch: the rows; loss weights are 1 on the tokens of answers.
      reference_BT: float32, at the last token of each segment the log-probability of its answer under the reference
        model, 0 elsewhere.
      margin_BT: float32, at the last token of each chosen segment the margin of the pair, 0 elsewhere.
    """

    batch: Batch
    reference_BT: Any
    margin_BT: Any
