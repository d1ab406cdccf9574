"""A judge may be down, a prompt cut, a metric no mean, the data of a suite missing: each is said, never hidden."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.evaluated import MadeModel, Sums, adds, write_sums
from tests.helpers.runs import print_seed
from train.evaluate import compare as comparing
from train.evaluate.evaluation import choose, sort_names
from train.evaluate.registry import states
from train.evaluate.report import problems_of, write_report
from train.evaluate.run import RunOptions, run
from train.evaluate.statistics import paired, paired_aggregate
from train.evaluate.suites import suite
from train.evaluate.task import DataFile, Generate, Item, Metric, Request, Response, Tools, Verdict


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_sums(tmp_path / "data", print_seed())
    return tmp_path / "data"


class Judged(Sums):
    """Sums whose verdicts a judge gives, one after the other."""

    name = "judged"
    metrics = (Metric("verdict"),)
    needs_judge = True

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        assert tools.judge is not None
        asked = [Generate(f"Is {rounds[0][0].text} right?", 4) for rounds in responses]
        found: dict[int, Response] = {}
        tools.judge.answer(asked, found.__setitem__)
        answers = [found[i] for i in range(len(asked))]
        return [Verdict({"verdict": None if r.error else float(r.text == "yes")}, {}, r.error) for r in answers]


class FailingJudge(MadeModel):
    """Says yes to everything, and is down after some answers."""

    def answer(self, requests: Sequence[Request], done: Callable[[int, Response], None]) -> None:
        try:
            super().answer(requests, done)
        except KeyboardInterrupt:
            raise InputError("the server has not answered for 600 s.") from None


def test_a_judge_that_is_down_leaves_items_without_a_verdict_and_is_asked_nothing_twice(
    data: Path, tmp_path: Path
) -> None:
    def yes(_: Request) -> Response:
        return Response("yes")

    options, few = RunOptions(data), 7
    down = FailingJudge(yes, "judge", fail_after=few)
    summary = run(MadeModel(adds), [Judged()], tmp_path / "out", options, Tools(down))
    found = summary["tasks"]["judged"]
    verdict = found["metrics"]["verdict"]
    # Items whose questions to the judge are the same share an answer.
    assert verdict["value"] == 1.0
    assert few <= verdict["items"] < 39
    assert verdict["items"] + verdict["unscored"] == 40
    assert any("the judge judge gives no answers: the server has not answered" in line for line in found["problems"])
    up = FailingJudge(yes, "judge")
    again = run(MadeModel(adds), [Judged()], tmp_path / "out", options, Tools(up))
    assert again["tasks"]["judged"]["metrics"]["verdict"]["items"] == 39
    assert not {request.prompt for request in up.asked} & {request.prompt for request in down.asked}  # type: ignore[union-attr]
    whole = FailingJudge(yes, "judge")
    run(MadeModel(adds), [Judged()], tmp_path / "whole", options, Tools(whole))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_prompts_that_lost_their_beginning_are_counted(data: Path, tmp_path: Path) -> None:
    def cut(request: Request) -> Response:
        found = adds(request)
        long = isinstance(request, Generate) and str(request.prompt).startswith("3")
        return Response(found.text, found.finish, found.tokens, found.logprob, found.greedy, found.error, long)

    found = run(MadeModel(cut), [Sums()], tmp_path / "out", RunOptions(data))["tasks"]["sums"]
    # 3 and 30 to 39.
    assert found["prompts_cut"] == 11
    assert any("11 of 40 prompts were longer than the model's context" in line for line in problems_of(found))


class Ratio(Sums):
    """A metric of the whole corpus: right sums over all sums, weighted by the first number."""

    metrics = (
        Metric("ratio", aggregate=lambda parts: sum(p[0] for p in parts) / sum(p[1] for p in parts), of_details=True),
    )

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        def parts(item: Item, text: str) -> tuple[int, int]:
            a, b = item.fields["a"], item.fields["b"]
            return ((a + 1) * (text == str(a + b)), a + 1)

        both = zip(items, responses, strict=True)
        return [Verdict({"ratio": 0.0}, {"ratio": parts(item, rounds[0][0].text)}) for item, rounds in both]


def test_a_metric_of_the_corpus_is_compared_as_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are those of the summaries, and not means over items."""

    def right(request: Request) -> Response:
        assert isinstance(request, Generate)
        text = str(request.prompt)
        return Response(str(sum(map(int, text[:-1].split("+")))) if text.endswith("=") else "yes", tokens=1)

    def mine(request: Request) -> Response:
        return right(request) if isinstance(request, Generate) else Response(logprob=-1.0)

    def worse(request: Request) -> Response:
        return adds(request) if isinstance(request, Generate) else Response(logprob=-1.0)

    monkeypatch.setattr(comparing.registry, "tasks", lambda: {"sums": Ratio()})
    summaries: Mapping[str, Any] = {
        name: run(MadeModel(answer, name), [Ratio()], tmp_path / name, RunOptions(data))
        for name, answer in (("worse", worse), ("mine", mine))
    }
    found = comparing.compare(tmp_path / "worse", tmp_path / "mine")["tasks"]["sums"]["metrics"]["ratio"]
    assert found["test"] == "paired bootstrap"
    assert found["p"] < 0.05
    assert found["value"] > 0.3
    assert found["b"] == summaries["mine"]["tasks"]["sums"]["metrics"]["ratio"]["value"] == 1.0
    assert found["low"] < found["value"] < found["high"]
    same = comparing.compare(tmp_path / "mine", tmp_path / "mine")["tasks"]["sums"]["metrics"]["ratio"]
    assert (same["value"], same["p"]) == (0.0, 1.0)
    # Statistics of another version may mean something else: they are named and not compared.
    monkeypatch.setattr(Ratio, "version", Ratio.version + 1)
    other = comparing.compare(tmp_path / "worse", tmp_path / "mine")
    assert other["tasks"]["sums"]["metrics"]["ratio"]["items"] == 0
    assert any("sums: ratio are not compared: their statistics are of versions 1 and 1" in x for x in other["warnings"])


def test_the_paired_bootstrap_is_wrong_as_often_as_it_says() -> None:
    """Of the mean it finds what the permutation test finds, and differs by chance in about one case of twenty."""
    rng, wrong, trials = print_seed(), 0, 60
    for _ in range(trials):
        a, b = rng.standard_normal((2, 40))
        found = paired_aggregate(a.tolist(), b.tolist(), lambda x: float(np.mean(x)))
        assert found.value == pytest.approx(paired(a.tolist(), b.tolist()).value)
        assert found.p is not None
        wrong += found.p <= 0.05
    # A true level of 8%, which a bootstrap of 40 items may have, exceeds 16 of 60 once in 10,000 runs.
    assert wrong <= 16


def test_a_suite_runs_what_is_here_and_says_what_is_not(tmp_path: Path) -> None:
    base = suite("qwen2.5-base")
    nothing = choose(base, tmp_path)
    assert nothing.names == ()
    assert len(nothing.left_out) == len(base.entries)
    (tmp_path / "theorem_qa").mkdir()
    theirs = next(entry for entry in base.entries if entry.side == "lm-eval")
    for path in theirs.data:
        (tmp_path / path).mkdir(parents=True)
    pytest.importorskip("lm_eval")
    found = choose(base, tmp_path)
    assert found.shots == {f"lm-eval:{theirs.task}": theirs.shots}
    assert theirs.benchmark not in found.left_out
    names = sort_names(found.names, found.shots)
    assert [(task.name, task.shots) for task in names.harness] == [(theirs.task, theirs.shots)]
    assert names.ours == ()
    assert len(choose(base, tmp_path, hub=True).names) > 10


def test_the_list_of_files_says_which_have_changed(data: Path) -> None:
    task = Sums()
    assert states(task, data) == {"sums/test.jsonl": "there"}
    assert states(task, None) == {"sums/test.jsonl": "missing"}
    task.files = (DataFile("sums/test.jsonl", ("0" * 64,)), DataFile("sums/none.jsonl"))
    assert states(task, data) == {"sums/test.jsonl": "changed", "sums/none.jsonl": "missing"}


def test_the_page_says_what_was_left_out(tmp_path: Path) -> None:
    summary = {"model": {"name": "made"}, "tasks": {}, "left_out": {"Flores-101": "no data: <none>"}}
    write_report(summary, tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Flores-101" in page
    assert "no data: &lt;none&gt;" in page
    assert json.dumps(summary["left_out"]) not in page
