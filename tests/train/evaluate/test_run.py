"""Benchmarks are run so that nothing is asked twice, files do not depend on chance, and no item is a silent zero."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.evaluated import MadeModel, Sums, adds, write_sums
from tests.helpers.runs import print_seed
from train.evaluate.benchmarks.gsm8k import Gsm8k, answer
from train.evaluate.benchmarks.mmlu import Mmlu
from train.evaluate.compare import compare
from train.evaluate.registry import find, locate, tasks
from train.evaluate.report import problems_of, write_report
from train.evaluate.run import RunOptions, run
from train.evaluate.store import Store
from train.evaluate.task import DataFile, Generate, Loglikelihood, Request, Response, Tools


@pytest.fixture
def rng() -> np.random.Generator:
    return print_seed()


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator) -> Path:
    write_sums(tmp_path / "data", rng)
    return tmp_path / "data"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on_and_leaves_the_bytes_of_a_whole_one(
    data: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Whenever it is killed; responses come in another order each time. A finished run asks nothing again."""
    options = RunOptions(data)
    whole = MadeModel(adds, rng=rng)
    run(whole, [Sums()], tmp_path / "whole", options)
    first = int(rng.integers(1, len(whole.asked)))
    killed = MadeModel(adds, rng=rng, fail_after=first)
    with pytest.raises(KeyboardInterrupt):
        run(killed, [Sums()], tmp_path / "killed", options)
    again = MadeModel(adds, rng=rng)
    run(again, [Sums()], tmp_path / "killed", options)
    # All but the request without an answer, which is asked in each run.
    assert len(killed.asked) + len(again.asked) <= len(whole.asked) + 1
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    third = MadeModel(adds, rng=rng)
    run(third, [Sums()], tmp_path / "killed", options)
    assert len(third.asked) == 1
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_scores_and_what_has_none(data: Path, tmp_path: Path) -> None:
    """39 items have an answer, and 38 a verdict; the others are counted apart with their reasons."""
    summary = run(MadeModel(adds), [Sums()], tmp_path / "out", RunOptions(data))
    found = summary["tasks"]["sums"]
    accuracy = found["metrics"]["accuracy"]
    assert (accuracy["items"], accuracy["unscored"]) == (38, 2)
    assert accuracy["value"] == 20 / 38
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    assert found["problems"] == {"no verdict": 1, "no answer: the prompt is too long": 1}
    assert found["truncated"] == 6
    assert found["groups"]["parity"]["0"] == {"items": 20, "accuracy": 1.0, "logprob": pytest.approx(-5, abs=2)}
    sha256 = hashlib.sha256((data / "sums" / "test.jsonl").read_bytes()).hexdigest()
    assert found["files"][0] == {
        "path": "sums/test.jsonl",
        "sha256": sha256,
        "known": None,
        "licence": "none",
        "source": "",
    }
    assert found["template"] == hashlib.sha256(b"{a}+{b}=").hexdigest()
    assert len(problems_of(found)) == 4
    write_report(summary, tmp_path / "out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "52.63" in page
    assert "the prompt is too long" in page
    records = [json.loads(line) for line in (tmp_path / "out" / "sums.jsonl").read_text().splitlines()]
    assert [record["scores"]["accuracy"] for record in records[4:7]] == [1.0, None, 1.0]


def test_a_limit_takes_the_first_items(data: Path, tmp_path: Path) -> None:
    found = run(MadeModel(adds), [Sums()], tmp_path / "out", RunOptions(data, limit=4))["tasks"]["sums"]
    assert (found["items"], found["of"], found["metrics"]["accuracy"]["value"]) == (4, 40, 0.5)
    with pytest.raises(InputError, match="--limit must be at least 1"):
        run(MadeModel(adds), [Sums()], tmp_path / "out", RunOptions(data, limit=0))


def test_missing_and_changed_data_are_refused_before_anything_is_asked(data: Path, tmp_path: Path) -> None:
    model, task, published = MadeModel(adds), Sums(), "0" * 64
    task.files = (DataFile("sums/test.jsonl", (published,), "https://example.org"),)
    with pytest.raises(InputError, match=f"expected the sha256 {published}, got [0-9a-f]+"):
        run(model, [task], tmp_path / "out", RunOptions(data))
    found = run(model, [task], tmp_path / "out", RunOptions(data, allow_changed=True))
    assert "is no published version" in problems_of(found["tasks"]["sums"])[-3]
    with pytest.raises(InputError, match="It is published at https://example"):
        locate(task, tmp_path)
    with pytest.raises(InputError, match="--data-root DIR"):
        locate(task, None)
    task.needs_judge = True
    with pytest.raises(InputError, match="--judge-url"):
        run(MadeModel(adds, "other"), [task], tmp_path / "new", RunOptions(data, allow_changed=True), Tools())
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="There is no task 'gsmk8'"):
        find(["gsmk8"])


def test_responses_of_another_model_are_not_taken(tmp_path: Path) -> None:
    requests = [Generate("a"), Loglikelihood("a", "b"), Generate("a"), Generate("a", seed=1)]
    answered: list[int] = []
    one = MadeModel(lambda _: Response("one"), "one")
    store = Store(one, tmp_path / "responses.jsonl")
    assert [r.text for r in store(requests, lambda: answered.append(1))] == ["one"] * 4
    assert (len(one.asked), len(answered)) == (3, 4)
    assert [r.text for r in Store(one, tmp_path / "responses.jsonl")(requests)] == ["one"] * 4
    assert len(one.asked) == 3
    other = MadeModel(lambda _: Response("other"), "other")
    assert {r.text for r in Store(other, tmp_path / "responses.jsonl")(requests)} == {"other"}
    # Records of another form, and one that was cut in the middle, are asked again, and no other.
    lines = (tmp_path / "responses.jsonl").read_text().splitlines()
    old = json.dumps({**json.loads(lines[0]), "of_an_older_version": 1})
    (tmp_path / "responses.jsonl").write_text("\n".join([old, *lines[2:], lines[1][:40]]))
    one.asked.clear()
    assert [r.text for r in Store(one, tmp_path / "responses.jsonl")(requests)] == ["one"] * 4
    assert len(one.asked) == 2
    assert [r.text for r in Store(one, tmp_path / "responses.jsonl")(requests)] == ["one"] * 4
    assert len(one.asked) == 2


def test_two_runs_are_compared_item_by_item(data: Path, tmp_path: Path) -> None:
    """B is right where A is, and on every third odd number; settings that differ are named."""

    def better(request: Request) -> Response:
        found = adds(request)
        if isinstance(request, Generate) and isinstance(request.prompt, str) and request.prompt.endswith("="):
            a, b = map(int, request.prompt[:-1].split("+"))
            return Response(str(a + b)) if a % 3 == 0 else found
        return found

    run(MadeModel(adds, "A"), [Sums()], tmp_path / "a", RunOptions(data))
    changed = Sums()
    changed.version = 2
    run(MadeModel(better, "B"), [changed], tmp_path / "b", RunOptions(data, limit=30))
    found = compare(tmp_path / "a", tmp_path / "b")
    accuracy = found["tasks"]["sums"]["metrics"]["accuracy"]
    # The odd multiples of 3 below 30.
    assert (accuracy["items"], round(accuracy["value"] * 28), accuracy["test"]) == (28, 5, "McNemar")
    assert accuracy["p"] == 2 / 2**5
    assert (found["a"], found["b"]) == ("A", "B")
    assert "sums: version was 1, is 2" in found["warnings"]
    assert any("10 items are in one run alone" in warning for warning in found["warnings"])
    with pytest.raises(InputError, match=r"holds no summary.json"):
        compare(tmp_path, tmp_path / "b")


# --- GSM8K and MMLU ---


def test_gsm8k_reads_the_published_form(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    solved = {"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}
    (tmp_path / "gsm8k" / "train.jsonl").write_text(f"{json.dumps(solved)}\n" * 5)
    asked = {"question": "1,000\u2028and 200?", "answer": "Add.\n#### 1,200"}
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(asked, ensure_ascii=False) + "\n", "utf-8")
    for task in (Gsm8k("gsm8k", 4), Gsm8k("gsm8k_chat", 0)):
        for text, score in (("So 1,200. The answer is 1,200.", 1.0), ("The answer is 12", 0.0), ("none", 0.0)):
            model = MadeModel(lambda _, text=text: Response(text), text)
            found = run(model, [task], tmp_path / f"{task.name}{score}{len(text)}", RunOptions(tmp_path))
            assert found["tasks"][task.name]["metrics"]["accuracy"]["value"] == score
        (request,) = model.asked
        assert isinstance(request, Generate)
        if task.shots:
            assert str(request.prompt).count("Question: 2+2?\nAnswer: It is 4. The answer is 4.\n\n") == 4
    for content, says in (
        (b'{"question": 1}\n', "test.jsonl, line 1: the field question must be a text, found 1"),
        (b"\xff\xfe", "test.jsonl: the file is no text in UTF-8"),
        (b"", "test.jsonl: expected at least 1 records, found 0. Is the file cut"),
    ):
        (tmp_path / "gsm8k" / "test.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=says):
            run(model, [task], tmp_path / "bad", RunOptions(tmp_path))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 5. No: the answer is -1,234.50.", "-1234.50"),
        ("This takes 5-10", "10"),
        ("costs $18.", "18"),
        ("3 apples and .5", ".5"),
        ("The answer is unknown, so 7", "7"),
        ("nothing", None),
    ],
)
def test_the_number_of_an_answer(text: str, found: str | None) -> None:
    assert answer(text) == found


def test_mmlu_takes_the_most_likely_letter(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "mmlu").mkdir()
    rows = ["anatomy,Q{i}?,w,x,y,z,{letter}".format(i=i, letter="ABCD"[int(rng.integers(4))]) for i in range(25)]
    (tmp_path / "mmlu" / "dev.csv").write_text("\n".join(rows[:5]) + "\n")
    (tmp_path / "mmlu" / "test.csv").write_text("\n".join(rows[5:]) + "\n")
    right = {f"Q{i}?": row[-1] for i, row in enumerate(rows)}

    def likely(request: Request) -> Response:
        assert isinstance(request, Loglikelihood)
        question = request.context.rsplit("\n", 6)[1]
        return Response(logprob=-1.0 if request.continuation == f" {right[question]}" else -2.0)

    found = run(MadeModel(likely), [Mmlu()], tmp_path / "out", RunOptions(tmp_path))["tasks"]["mmlu"]
    assert found["metrics"]["accuracy"]["value"] == 1.0
    assert found["groups"]["subject"]["anatomy"] == {"items": 20, "accuracy": 1.0}
    (tmp_path / "mmlu" / "test.csv").write_text("anatomy,Q?,w,x,y,z,E\n")
    with pytest.raises(InputError, match=r"test.csv, row 1: .*got 7 fields and 'E'"):
        run(MadeModel(likely), [Mmlu()], tmp_path / "bad", RunOptions(tmp_path))


def test_every_benchmark_says_what_decides_its_scores() -> None:
    """Names, a template, metrics with different names, and files below the data root."""
    for name, task in tasks().items():
        assert task.name == name
        assert task.template().strip(), name
        assert len({metric.name for metric in task.metrics}) == len(task.metrics) > 0, name
        assert task.citation, name
        assert not any(Path(file.path).is_absolute() or ".." in file.path for file in task.files), name
