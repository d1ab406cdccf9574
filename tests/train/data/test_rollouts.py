"""Packing of rollouts: nothing is lost, denominators count what counts, and what is malformed is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.random_rollouts import random_rollouts
from tests.helpers.runs import print_seed
from train.data.rollouts import Rollout, RolloutBatch, pack_rollouts
from train.policy import GrpoConfig

ROWS, LENGTH = 12, 48
CONFIG = GrpoConfig(max_segments=3)


def packed(rollouts: list[Rollout], counted: Any = None, config: GrpoConfig = CONFIG, rows: int = ROWS) -> RolloutBatch:
    """Packed with advantages 1, 2, 3, ..."""
    counted = np.ones(len(rollouts), bool) if counted is None else np.asarray(counted)
    return pack_rollouts(rollouts, np.arange(1.0, len(rollouts) + 1), counted, config, rows, LENGTH)


def segments(batch: RolloutBatch) -> dict[tuple[int, ...], np.ndarray]:
    """By the ids of each segment: its advantages, sampler's log-probabilities, loss weights and places [4, n]."""
    found, rows = {}, batch.batch
    for b in range(rows.shape[0]):
        for segment in range(1, rows.segment_ids[b].max() + 1):
            here = rows.segment_ids[b] == segment
            np.testing.assert_array_equal(rows.positions[b, here], np.arange(here.sum()))
            numbers = batch.advantages_BT, batch.sampler_BT, rows.loss_weights, batch.places_BT
            found[tuple(rows.tokens[b, here].tolist())] = np.stack([x[b, here] for x in numbers])
    return found


@pytest.mark.parametrize("aggregation", ["sequence-mean-token-mean", "token-mean", "constant"])
def test_every_token_is_there_once_with_its_numbers(aggregation: Any) -> None:
    rollouts = random_rollouts(print_seed(), 9, 1000)
    constant = 7.0 if aggregation == "constant" else None
    batch = packed(rollouts, config=dataclasses.replace(CONFIG, aggregation=aggregation, constant=constant))
    found = segments(batch)
    assert len(found) == len(rollouts)
    assert batch.batch.segment_ids.max() <= CONFIG.max_segments
    for i, rollout in enumerate(rollouts, 1):
        advantages, sampler, weights, places = found[tuple(rollout.ids)]
        np.testing.assert_array_equal(advantages, i * rollout.trained)
        np.testing.assert_array_equal(sampler, rollout.log_probs)
        each = 1 / rollout.trained.sum() if aggregation == "sequence-mean-token-mean" else 1
        np.testing.assert_allclose(weights, each * rollout.trained, rtol=1e-6)
        last = np.flatnonzero(rollout.trained)[-1]
        np.testing.assert_array_equal(places, i * (np.arange(len(rollout.ids)) == last))
    # No number is on padding.
    padding = batch.batch.segment_ids == 0
    assert not any(x[padding].any() for x in (batch.advantages_BT, batch.sampler_BT, batch.places_BT))
    assert not batch.old_BT.any()
    assert not batch.reference_BT.any()


def test_what_does_not_count_is_left_out() -> None:
    """No reward, no sampled token, or cut where that is asked for; an advantage of 0 counts."""
    rollouts = random_rollouts(print_seed(), 6, 1000)
    rollouts = [dataclasses.replace(r, finished=i != 1) for i, r in enumerate(rollouts)]
    rollouts[2] = dataclasses.replace(rollouts[2], trained=np.zeros(len(rollouts[2].ids), bool))
    counted = np.arange(6) != 4
    advantages = np.array([0.0, 1, 1, 1, np.nan, 1])
    kept = segments(pack_rollouts(rollouts, advantages, counted, CONFIG, ROWS, LENGTH))
    assert kept.keys() == {tuple(rollouts[i].ids) for i in (0, 1, 3, 5)}
    masking = dataclasses.replace(CONFIG, mask_unfinished=True)
    kept = segments(pack_rollouts(rollouts, advantages, counted, masking, ROWS, LENGTH))
    assert kept.keys() == {tuple(rollouts[i].ids) for i in (0, 3, 5)}
    # A batch of nothing is padding.
    nothing = packed(rollouts, np.zeros(6, bool))
    assert not nothing.batch.segment_ids.any()
    assert not nothing.batch.loss_weights.any()


def test_malformed_rollouts_are_refused() -> None:
    good = random_rollouts(print_seed(), 3, 1000)
    n, at = len(good[1].ids), int(np.flatnonzero(good[1].trained)[0])

    def log_prob(value: float) -> np.ndarray:
        return np.where(np.arange(n) == at, value, 0).astype(np.float32)

    fifty = np.arange(50) > 1
    for changes, message in (
        ({"ids": []}, "Rollout 1 has 0 ids"),
        ({"ids": [*good[1].ids, 1]}, f"Rollout 1 has {n + 1} ids"),
        ({"trained": np.ones(n, bool)}, "false on the first token"),
        ({"trained": np.zeros(n)}, "expected bool in trained"),
        ({"log_probs": log_prob(float("nan"))}, f"log-probability of token {at} is nan"),
        ({"log_probs": log_prob(0.5)}, f"log-probability of token {at} is 0.5"),
        ({"ids": [1] * 50, "trained": fifty, "log_probs": -1.0 * fifty}, "Rollout 1 has 50 tokens, a row 48"),
    ):
        with pytest.raises(InputError, match=message):
            packed([good[0], dataclasses.replace(good[1], **changes), good[2]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="advantage of rollout 1 is nan"):
        pack_rollouts(good, np.array([0.0, np.nan, 0.0]), np.ones(3, bool), CONFIG, ROWS, LENGTH)
    with pytest.raises(InputError, match="for each of 3 rollouts, got 2 and 3"):
        pack_rollouts(good, np.zeros(2), np.ones(3, bool), CONFIG, ROWS, LENGTH)
    with pytest.raises(InputError, match=r"4 rollouts of \d+ tokens need 2 rows .* there are 1"):
        packed([*good, good[0]], rows=1)
