"""pass@k, samples of programs, and what a missing verdict does to them."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, scores_of, verdicts_of, write_lines
from tests.helpers.runs import print_seed
from train.evaluate.benchmarks.code import HumanEval
from train.evaluate.benchmarks.passes import Sampling, pass_at_k, sample_seed
from train.evaluate.task import Generate, Item, Request, Response, Tools
from train.sandbox import Outcome, Run


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_passing_sample(samples: int) -> None:
    """The estimator equals an enumeration of all draws of k samples out of n."""
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations(range(samples), k))
        share = sum(min(draw) < passed for draw in draws) / len(draws)
        assert pass_at_k(samples, passed, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over programs that pass with probability p is 1 - (1 - p)^k."""
    p, n, k = print_seed().uniform(0.05, 0.6), 12, 3
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(
    ("samples", "ks", "temperature"), [(2, (3,), 1.0), (4, (0,), 1.0), (4, (1,), 0.0), (0, (1,), 0.0)]
)
def test_sampling_that_gives_no_estimate_is_refused(samples: int, ks: tuple[int, ...], temperature: float) -> None:
    with pytest.raises(InputError):
        Sampling(samples, ks, temperature)


class _Box:
    """A sandbox that passes programs with "good", fails ones with "bad" and cannot run ones with "broken"."""

    def __init__(self) -> None:
        self.programs: list[str] = []

    def run_tests(self, language: str, source: str, tests: Any) -> list[Run]:
        self.programs.append(source)
        outcome = Outcome.PASS if "good" in source else Outcome.FAIL if "bad" in source else Outcome.ERROR
        return [Run(outcome, 0, b"", b"", 0.0, None, "" if outcome is Outcome.PASS else "why")] * len(tests)


def _items(task: HumanEval, folder: Path, count: int = 3) -> list[Item]:
    names = dict.fromkeys(("prompt", "entry_point", "canonical_solution", "test"), "x")
    return items_of(task, write_lines(folder / "h.jsonl", ({"task_id": f"H/{n}", **names} for n in range(count))))


def test_samples_are_distinct_and_the_same_in_every_run(tmp_path: Path) -> None:
    """Seeds depend on the item and the number of the sample only."""
    task = HumanEval("h", sampling=Sampling(5, (1, 5), 0.8, 0.95))
    items = _items(task, tmp_path)
    once, again = ([task.requests(item, ()) for item in order] for order in (items, items[::-1]))
    assert once == again[::-1]
    requests = [request for each in once for request in each]
    assert len({request.seed for request in requests if isinstance(request, Generate)}) == 15
    assert {(r.temperature, r.top_p) for r in requests if isinstance(r, Generate)} == {(0.8, 0.95)}
    assert all(0 <= sample_seed("x", n) < 2**31 for n in range(100))


def test_samples_are_counted_into_pass_at_k(tmp_path: Path) -> None:
    """Each distinct program runs once; the estimate counts every sample."""
    task = HumanEval("h", sampling=Sampling(4, (1, 2, 4), 0.8))
    words = {"H/0": ["good", "bad", "bad", "good"], "H/1": ["bad"] * 4, "H/2": ["good"] * 4}
    box = _Box()
    verdicts = verdicts_of(
        task, _items(task, tmp_path), lambda item, n, _: words[item.id][n], Tools(sandbox=box, workers=2)
    )
    assert scores_of(verdicts, "pass@1") == {"H/0": 0.5, "H/1": 0.0, "H/2": 1.0}
    assert scores_of(verdicts, "pass@2") == {"H/0": pytest.approx(1 - 1 / 6), "H/1": 0.0, "H/2": 1.0}
    assert scores_of(verdicts, "pass@4") == {"H/0": 1.0, "H/1": 0.0, "H/2": 1.0}
    assert len(box.programs) == 4


def test_a_sample_without_a_verdict_is_left_out_and_never_zero(tmp_path: Path) -> None:
    """Where fewer than k samples have a verdict there is no score, and the problem says why."""
    task = HumanEval("h", sampling=Sampling(3, (1, 3), 0.8))
    words = {"H/0": ["good", "broken", "bad"], "H/1": ["broken"] * 3, "H/2": ["bad", "bad", "good"]}

    def answer(item: Item, number: int, request: Request) -> Response:
        long = item.id == "H/2" and number == 2
        return Response(words[item.id][number], "length" if number == 1 else "stop", error="too long" if long else None)

    verdicts = verdicts_of(task, _items(task, tmp_path), answer, Tools(sandbox=_Box(), workers=1))
    assert scores_of(verdicts, "pass@1") == {"H/0": 0.5, "H/1": None, "H/2": 0.0}
    assert scores_of(verdicts, "pass@3") == dict.fromkeys(("H/0", "H/1", "H/2"))
    assert "why" in str(verdicts["H/1"].problem)
    assert "too long" in str(verdicts["H/2"].problem)
    assert [verdict.details["cut"] for verdict in verdicts.values()] == [1, 1, 1]


def test_without_a_sandbox_nothing_is_scored(tmp_path: Path) -> None:
    task = HumanEval("h")
    verdicts = verdicts_of(task, _items(task, tmp_path), lambda *_: "good")
    assert set(scores_of(verdicts, "pass@1").values()) == {None}
    assert all("no sandbox" in str(verdict.problem) for verdict in verdicts.values())
