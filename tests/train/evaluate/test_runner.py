"""Runs of retrieval tasks: an engine that is perfect, silent or half right, interruptions, pictures, and errors."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qwen_jax.errors import InputError
from qwen_jax.inference import Completion, SamplingParams
from train.evaluate import pictures, runner, synthetic_ids
from train.evaluate.runner import Case
from train.evaluate.tasks import Sample

LAYOUT = synthetic_ids.IdLayout(0, 64)
SETTINGS = {"model": "scripted", "seed": 3}
QUIET = Console(quiet=True)


def make(case: Case) -> Sample:
    depth = case.depth if case.depth is not None else 50.0
    return synthetic_ids.needle_sample(case.rng(3), case.length, depth, LAYOUT, 2)


def read(prompt: np.ndarray) -> list[int]:
    """The right answer: the values behind the key that is asked for."""
    ids = np.asarray(prompt).tolist()
    at = next(i for i in range(len(ids) - 2) if ids[i] == LAYOUT.needle and ids[i + 1] == ids[-1])
    return ids[at + 2 : at + 5]


class Scripted:
    """An engine that answers with a function of the prompt, and may be interrupted before some call."""

    def __init__(self, answer: Callable[[np.ndarray], list[int]], calls: int | None = None):
        self.answer, self.calls = answer, calls
        self.batches: list[tuple[int, int]] = []

    def generate(
        self, prompts: Sequence[np.ndarray], sampling: SamplingParams, *, max_new_tokens: int
    ) -> list[Completion]:
        if self.calls is not None and len(self.batches) >= self.calls:
            raise KeyboardInterrupt
        assert sampling.temperature == 0
        assert len({len(prompt) for prompt in prompts}) == 1, "batches of one length"
        self.batches.append((len(prompts), len(prompts[0])))
        return [
            Completion(prompt.tolist(), self.answer(prompt)[:max_new_tokens], None, "length", None)
            for prompt in prompts
        ]


def run(engine: Scripted, folder: Path, wanted: Sequence[Case], **more: Any) -> dict[str, Any]:
    return runner.run(engine, make, wanted, folder, SETTINGS, console=QUIET, **more)


@pytest.fixture
def wanted() -> list[Case]:
    return runner.cases({"needle": True, "flat": False}, [40, 64], [0, 100], 3)


def test_perfect_silent_and_half_right_answers(tmp_path: Path, wanted: list[Case]) -> None:
    """Scores are means over the samples, by task, length and depth."""
    perfect = run(Scripted(read), tmp_path / "perfect", wanted)
    assert perfect["tasks"] == {"needle": 1.0, "flat": 1.0}
    assert {(c["task"], c["length"], c["depth"]): c["samples"] for c in perfect["cells"]} == {
        **{("needle", n, d): 3 for n in (40, 64) for d in (0.0, 100.0)},
        **{("flat", n, None): 6 for n in (40, 64)},
    }
    assert run(Scripted(lambda prompt: []), tmp_path / "silent", wanted)["tasks"] == {"needle": 0.0, "flat": 0.0}
    half = Scripted(lambda prompt: read(prompt) if len(prompt) == 37 else [0, 0, 0])
    summary = run(half, tmp_path / "half", wanted)
    assert summary["lengths"] == {"needle": {"40": 1.0, "64": 0.0}, "flat": {"40": 1.0, "64": 0.0}}
    assert summary["tasks"] == {"needle": 0.5, "flat": 0.5}
    assert json.loads((tmp_path / "half" / runner.SUMMARY).read_text()) == summary


def test_records_say_all_that_is_needed_to_judge_them(tmp_path: Path) -> None:
    (case,) = runner.cases({"needle": True}, [50], [25], 1)
    run(Scripted(read), tmp_path / "x", [case])
    (record,) = map(json.loads, (tmp_path / "x" / runner.RESULTS).read_text().splitlines())
    sample = make(case)
    assert record["expected"] == list(sample.references) == [record["output"]]
    assert record["prompt_tokens"] == 47
    assert len(record["prompt_sha256"]) == 64
    assert (record["task"], record["length"], record["depth"], record["sample"]) == ("needle", 50, 25.0, 0)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_a_run_that_was_interrupted_goes_on_to_the_same_file(
    tmp_path: Path, wanted: list[Case], batch_size: int | None
) -> None:
    """Wherever it stopped, and whatever a crash has left of the last record."""
    run(Scripted(read), tmp_path / "whole", wanted, batch_size=batch_size)
    expected = (tmp_path / "whole" / runner.RESULTS).read_bytes()
    calls = len(expected.splitlines()) // (batch_size or 6) // 2
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(read, calls), tmp_path / "part", wanted, batch_size=batch_size)
    path = tmp_path / "part" / runner.RESULTS
    written = path.read_bytes() if path.exists() else b""
    assert written == expected[: len(written)] != expected
    # A crash in the middle of a record.
    path.write_bytes(written[:-25] + b"\0" * 9)
    again = Scripted(read)
    run(again, tmp_path / "part", wanted, batch_size=batch_size)
    assert path.read_bytes() == expected
    assert sum(rows for rows, _ in again.batches) < len(wanted) or not written
    # Nothing is asked twice.
    nothing = Scripted(read, 0)
    run(nothing, tmp_path / "part", wanted, batch_size=batch_size)
    assert not nothing.batches


def test_more_samples_keep_those_that_are_there(tmp_path: Path) -> None:
    """The random numbers of a sample depend on itself alone."""
    few, many = (runner.cases({"needle": True}, [40], [50], n) for n in (2, 5))
    run(Scripted(read), tmp_path / "x", few)
    engine = Scripted(read)
    run(engine, tmp_path / "x", many)
    assert sum(rows for rows, _ in engine.batches) == 3
    run(Scripted(read), tmp_path / "y", many)
    assert (tmp_path / "x" / runner.RESULTS).read_bytes() == (tmp_path / "y" / runner.RESULTS).read_bytes()


def test_a_model_that_fails_has_no_score(tmp_path: Path) -> None:
    """A failure is not a zero: it is counted apart."""

    class Failing(Scripted):
        def generate(self, prompts: Any, sampling: Any, *, max_new_tokens: int) -> list[Completion]:
            done = super().generate(prompts, sampling, max_new_tokens=max_new_tokens)
            return [Completion(done[0].prompt_token_ids, [], None, "error", None, "not finite"), *done[1:]]

    summary = run(Failing(read), tmp_path / "x", runner.cases({"needle": True}, [40], [0, 50], 2), batch_size=2)
    assert summary["errors"] == 2
    assert summary["tasks"] == {"needle": 1.0}
    (tmp_path / "y").mkdir()
    every = run(Failing(read), tmp_path / "y", runner.cases({"needle": True}, [40], [0], 1))
    assert every["errors"] == 1
    # JSON has no NaN.
    assert json.loads((tmp_path / "y" / runner.SUMMARY).read_text())["tasks"] == {"needle": None}
    pictures.plot_scores(every, tmp_path / "empty.png", "nothing")


def test_results_of_other_settings_are_not_mixed(tmp_path: Path, wanted: list[Case]) -> None:
    run(Scripted(read), tmp_path / "x", wanted[:1])
    with pytest.raises(InputError, match="seed was 3, is 4"):
        runner.run(Scripted(read), make, wanted, tmp_path / "x", {**SETTINGS, "seed": 4}, console=QUIET)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="holds no results"):
        run(Scripted(read), tmp_path / "other", wanted)


@pytest.mark.parametrize(
    ("lengths", "depths", "samples", "message"),
    [
        ([], [50], 1, "Expected --lengths"),
        ([40, 40], [50], 1, "each once"),
        ([40], [101], 1, "percents from 0 to 100, got 101"),
        ([40], [50], 0, "at least 1"),
    ],
)
def test_wrong_grids(lengths: list[int], depths: list[float], samples: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runner.cases({"needle": True}, lengths, depths, samples)


def test_the_heat_map_and_the_curves(tmp_path: Path, wanted: list[Case]) -> None:
    summary = run(Scripted(read), tmp_path / "x", wanted)
    pictures.plot_scores(summary, tmp_path / "map.png", "scripted")
    buckets = [{"from": 1, "to": 1, "loss": 3.0}, {"from": 2, "to": 3, "loss": 2.5}]
    pictures.plot_losses({"a": buckets, "b": buckets}, tmp_path / "loss.png", "scripted")
    for name in ("map.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 5000
