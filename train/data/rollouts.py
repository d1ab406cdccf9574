"""`Rollout`, a text that the policy generated, and `RolloutBatch`: packed rows of them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwen_jax.errors import InputError
from train.data.batch import Batch
from train.data.examples import Example
from train.data.packing import best_fit, pack_segments
from train.policy import GrpoConfig


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A text that the policy generated, as the tokens that it read and sampled; no text is tokenized again.

    Attributes:
      ids: token ids of the prompt and of all that followed it, of all turns.
      trained: bool [n], true on tokens that the policy sampled, end ids included; false on prompts and on what tools
        returned. The first token is never trained.
      log_probs: float32 [n], log-probabilities of the trained tokens under the sampler, over the whole vocabulary, at
        the sampling temperature; 0 elsewhere.
      finished: whether it ended by itself and was not cut by a length.
      version: of the weights that sampled it: optimiser steps taken by then.
    """

    ids: list[int]
    trained: np.ndarray
    log_probs: np.ndarray
    finished: bool
    version: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("batch", "advantages_BT", "sampler_BT", "old_BT", "reference_BT", "places_BT"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Packed rows of rollouts, each a segment. All arrays are [batch, length]; a number of a token is at its place.

    Attributes:
      batch: the rows. Loss weights are the weights of aggregation: 1 / n on each of the n trained tokens of a sequence
        where the mean is taken over sequences, and 1 on all trained tokens otherwise; 0 elsewhere.
      advantages_BT: float32, on trained tokens; 0 elsewhere.
      sampler_BT: float32 log-probabilities of the sampler on trained tokens; 0 elsewhere.
      old_BT: float32 log-probabilities of the policy before the first of several steps, as the trainer computes them;
        used where `GrpoConfig.old` is "trainer".
      reference_BT: float32 log-probabilities of the reference; used where `GrpoConfig.kl_weight` is not 0.
      places_BT: float32, on the last trained token of each sequence the place of its rollout among those of the step,
        counted from 1; 0 elsewhere.
    """

    batch: Batch
    advantages_BT: Any
    sampler_BT: Any
    old_BT: Any
    reference_BT: Any
    places_BT: Any

    @property
    def ends_BT(self) -> Any:
        """Float32, 1 on the last trained token of each sequence; 0 elsewhere."""
        return (self.places_BT != 0).astype(np.float32)


def packed_places(rollouts: Sequence[Rollout], counted: np.ndarray, config: GrpoConfig) -> list[int]:
    """Places of the rollouts that `pack_rollouts` does not leave out; its arguments."""
    return [
        index
        for index, rollout in enumerate(rollouts)
        if counted[index] and rollout.trained.any() and (rollout.finished or not config.mask_unfinished)
    ]


def pack_rollouts(
    rollouts: Sequence[Rollout], advantages: np.ndarray, counted: np.ndarray, config: GrpoConfig, rows: int, length: int
) -> RolloutBatch:
    """Packs rollouts into rows. The loss does not depend on their order, nor on which share a row.

    Left out, also of the denominators, are rollouts that do not count, those without a trained token, and with
    `mask_unfinished` those that were cut. A rollout whose advantage is 0 counts.

    Args:
      rollouts: of one optimiser step, all of them.
      advantages: of each, from `train.policy.group_advantages`.
      counted: of each, whether it has a reward.
      config: `aggregation`, `mask_unfinished` and `max_segments` of it.
      rows: of the batch; those that are not needed are padding.
      length: tokens in a row.

    Returns:
      NumPy arrays [rows, length]; `old_BT` and `reference_BT` are 0.

    Raises:
      InputError: a rollout that is malformed or longer than a row, an advantage that is not finite, or rollouts that do
        not fit.
    """
    if len(advantages) != len(rollouts) or len(counted) != len(rollouts):
        raise InputError(
            f"Expected an advantage and a count for each of {len(rollouts)} rollouts, got {len(advantages)} and "
            f"{len(counted)}."
        )
    for index, rollout in enumerate(rollouts):
        _check(index, rollout, length)
    used = packed_places(rollouts, counted, config)
    for index in used:
        if not np.isfinite(advantages[index]):
            raise InputError(f"The advantage of rollout {index} is {advantages[index]}; expected a finite number.")

    # Which rollouts are in which row.
    layout = [[used[i] for i in row] for row in best_fit(
        [len(rollouts[index].ids) for index in used], length, config.max_segments
    )]  # fmt: skip
    if len(layout) > rows:
        raise InputError(
            f"{len(used)} rollouts of {sum(len(rollouts[index].ids) for index in used)} tokens need {len(layout)} rows "
            f"of {length} tokens with at most {config.max_segments} sequences each; there are {rows}. Use more or "
            "longer rows, or a larger max_segments."
        )
    layout += [[] for _ in range(rows - len(layout))]

    # The numbers of their tokens.
    batch = pack_segments(
        [[Example(np.asarray(r.ids), r.trained) for r in _of(rollouts, row)] for row in layout], length
    )
    advantages_BT, sampler_BT, places_BT = np.zeros((3, rows, length), np.float32)
    for b, row in enumerate(layout):
        start = 0
        for index, rollout in zip(row, _of(rollouts, row), strict=True):
            places = start + np.flatnonzero(rollout.trained)
            advantages_BT[b, places] = advantages[index]
            sampler_BT[b, places] = rollout.log_probs[rollout.trained]
            places_BT[b, places[-1]] = 1 + index
            if config.aggregation == "sequence-mean-token-mean":
                batch.loss_weights[b, places] = 1.0 / len(places)
            start += len(rollout.ids)
    zeros = np.zeros((rows, length), np.float32)
    return RolloutBatch(batch, advantages_BT, sampler_BT, zeros, zeros.copy(), places_BT)


def _of(rollouts: Sequence[Rollout], row: Sequence[int]) -> list[Rollout]:
    return [rollouts[index] for index in row]


def _check(index: int, rollout: Rollout, length: int) -> None:
    """Raises an `InputError` if a rollout is malformed or too long."""
    n = len(rollout.ids)
    if not n or rollout.trained.shape != (n,) or rollout.log_probs.shape != (n,):
        raise InputError(
            f"Rollout {index} has {n} ids, and its trained and log_probs have shapes {rollout.trained.shape} and "
            f"{rollout.log_probs.shape}; expected one of each for each of at least one id."
        )
    if n > length:
        raise InputError(f"Rollout {index} has {n} tokens, a row {length}. Use longer rows, or shorter responses.")
    if rollout.trained.dtype != bool or rollout.trained[0]:
        raise InputError(
            f"Rollout {index}: expected bool in trained, false on the first token, which nothing predicts; got "
            f"{rollout.trained.dtype}, {rollout.trained[0]}."
        )
    bad = np.flatnonzero(rollout.trained & ~(np.isfinite(rollout.log_probs) & (rollout.log_probs <= 1e-3)))
    if len(bad):
        raise InputError(
            f"Rollout {index}: the sampler's log-probability of token {bad[0]} is {rollout.log_probs[bad[0]]}; "
            "expected a finite number that is at most 0."
        )
