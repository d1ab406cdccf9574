"""`PairBatch`: packed rows of preference pairs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from train.data.batch import Batch
from train.data.examples import Example, Pair
from train.data.packing import pack_segments


@functools.partial(jax.tree_util.register_dataclass, data_fields=("batch", "reference_BT", "margin_BT"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Packed rows in which the two answers of a pair are neighbours.

    Segments 2p + 1 and 2p + 2 of a row are the chosen and the rejected answer of its pair p, counted from 0, each after
    its prompt. All arrays are [batch, length].

    Attributes:
      batch: the rows; loss weights are 1 on the tokens of answers.
      reference_BT: float32, at the last token of each segment the log-probability of its answer under the reference
        model, summed over its trained tokens; 0 elsewhere.
      margin_BT: float32, at the last token of each chosen segment the margin of the pair; 0 elsewhere.
    """

    batch: Batch
    reference_BT: Any
    margin_BT: Any


def pack_pairs(
    rows: Sequence[Sequence[Pair]], length: int, references: Sequence[Sequence[Sequence[float]]] | None = None
) -> PairBatch:
    """Writes pairs into rows.

    Args:
      rows: the pairs of each row.
      length: tokens in a row.
      references: of each pair, log-probabilities of the chosen and of the rejected answer; None is 0.

    Returns:
      NumPy arrays [rows, length].
    """
    segments: list[list[Example]] = [[x for pair in row for x in (pair.chosen, pair.rejected)] for row in rows]
    reference_BT, margin_BT = np.zeros((2, len(rows), length), np.float32)
    for b, row in enumerate(rows):
        last = np.cumsum([len(segment.ids) for segment in segments[b]], dtype=np.int64) - 1
        margin_BT[b, last[::2]] = [pair.margin for pair in row]
        if references is not None:
            reference_BT[b, last] = np.asarray(references[b], np.float32).ravel()
    return PairBatch(pack_segments(segments, length), reference_BT, margin_BT)
