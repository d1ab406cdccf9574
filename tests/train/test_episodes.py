"""Episodes: their numbers for the log, and the file that keeps them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.random_rollouts import random_rollouts
from tests.helpers.runs import print_seed
from train.data.documents import optional_library
from train.episodes import Episode, read_episode, write_episode
from train.policy import GrpoConfig
from train.rollout_page import to_html
from train.sampler import Prompt, Sample

QUERIES, GROUP = 3, 4


def drawn(rng: np.random.Generator) -> Episode:
    """An episode of two reward functions, each without a signal for some of its rollouts."""
    rollouts = random_rollouts(rng, QUERIES * GROUP, 100)
    samples = [
        Sample(
            **{field.name: getattr(r, field.name) for field in dataclasses.fields(r)},
            prompt_length=int(np.argmax(r.trained)),
            text=f"text {i}",
            turns=1 + i % 2,
            failure="no room" if i == 5 else None,
            earlier="a call<|im_end|>" * (i % 2),
        )
        for i, r in enumerate(rollouts)
    ]
    samples[0] = dataclasses.replace(samples[0], finished=True)
    groups = [samples[i : i + GROUP] for i in range(0, len(samples), GROUP)]
    prompts = [Prompt(7 * q, [1, 2], [{"role": "user", "content": f"prompt {q}"}], {"q": q}) for q in range(QUERIES)]
    scores = rng.normal(size=(QUERIES * GROUP, 2)).astype(np.float32)
    scores[3, 0] = scores[8, 1] = np.nan
    return Episode.of(4, prompts, groups, scores, scores.sum(1), ("a", "b"), GrpoConfig())


def test_metrics_are_of_the_rollouts_that_have_the_number() -> None:
    episode = drawn(print_seed())
    found = episode.metrics()
    lengths = np.array([r.trained.sum() for r in episode.rollouts])
    finished = np.array([r.finished for r in episode.rollouts])
    known = episode.rewards[~np.isnan(episode.rewards)]
    a, b = (x[~np.isnan(x)] for x in episode.scores.T)
    want = {
        "reward/mean": known.mean(), "reward/std": known.std(), "reward/missing": 2 / 12,
        "reward/a": a.mean(), "reward/a_std": a.std(), "reward/a_missing": 1 / 12,
        "reward/b": b.mean(), "reward/b_std": b.std(), "reward/b_missing": 1 / 12,
        "groups/without_variance": 0.0, "response/tokens": lengths.mean(), "response/shortest": lengths.min(),
        "response/longest": lengths.max(), "response/finished_tokens": lengths[finished].mean(),
        "response/unfinished": 1 - finished.mean(), "response/turns": 1.5, "response/failed_tools": 1 / 12,
    }  # fmt: skip
    assert found == pytest.approx(want, rel=1e-5)


def test_what_nobody_has_is_no_zero() -> None:
    """Without a signal of a function, and without a response that ended, there is no mean in the log."""
    episode = drawn(print_seed())
    scores = np.where([True, False], np.nan, episode.scores).astype(np.float32)
    groups = [[dataclasses.replace(r, finished=False) for r in group] for group in episode.groups]
    rewards = scores.sum(1)
    found = dataclasses.replace(episode, groups=groups, scores=scores, rewards=rewards).metrics()
    assert found["reward/missing"] == found["reward/a_missing"] == found["response/unfinished"] == 1
    assert "reward/b" in found
    missing = {"reward/mean", "reward/std", "reward/a", "reward/a_std", "response/finished_tokens"}
    assert not missing & found.keys()
    with pytest.raises(InputError, match="no reward function gave a signal for any of 12 responses"):
        dataclasses.replace(episode, rewards=rewards).check_signal()


def test_a_table_has_everything_exactly(tmp_path: Path) -> None:
    """One of before there were gaps is read, too."""
    rng = print_seed()
    episode = drawn(rng)
    assert np.isnan(episode.gaps).all()
    episode.gaps[:5] = rng.random(5)
    write_episode(tmp_path / "a.parquet", episode)
    again = read_episode(tmp_path / "a.parquet")
    for name in ("scores", "rewards", "advantages", "gaps"):
        np.testing.assert_array_equal(getattr(again, name), getattr(episode, name))
    assert [p.number for p in again.prompts] == [p.number for p in episode.prompts]
    for a, b in zip(again.rollouts, episode.rollouts, strict=True):
        for name in ("ids", "finished", "version", "text", "turns", "failure", "earlier"):
            assert getattr(a, name) == getattr(b, name)
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
        np.testing.assert_array_equal(a.trained, b.trained)
    parquet = optional_library("pyarrow.parquet", "Tables of rollouts")
    table = parquet.read_table(tmp_path / "a.parquet")
    parquet.write_table(table.drop_columns(["gap"]), tmp_path / "b.parquet")
    assert np.isnan(read_episode(tmp_path / "b.parquet").gaps).all()


def test_the_page_shows_all_turns() -> None:
    episode = drawn(print_seed())
    shown = json.loads(to_html([episode]).partition('id="data">')[2].partition("</script>")[0])
    for row, rollout in zip(shown[0]["rollouts"], episode.rollouts, strict=True):
        assert row["completion"] == rollout.earlier + str(rollout.text)
