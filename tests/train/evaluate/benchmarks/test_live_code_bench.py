"""LiveCodeBench's form: dates and releases, tests in packed form, both kinds of tests in the sandbox."""

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, scores_of, verdicts_of, write_lines
from tests.helpers.sandboxes import needs_bwrap
from train.evaluate.benchmarks.live_code_bench import LiveCodeBench, same_output, text_of_pickle
from train.evaluate.task import Item, Request, Tools


def _packed(tests: Any, protocol: int = 4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests), protocol))).decode()


def _record(name: str, date: str, **change: Any) -> dict[str, Any]:
    """A problem made for these tests, in the form of the published files."""
    tests = [{"input": f"{n} {n}\n", "output": f"{2 * n}\n", "testtype": "stdin"} for n in (1, 7)]
    return {
        "question_title": "Sum",
        "question_content": "Add two numbers.",
        "platform": "atcoder",
        "question_id": name,
        "contest_id": "c",
        "contest_date": f"{date}T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": _packed(tests[1:]),
        "metadata": "{}",
        **change,
    }


def _method(name: str, date: str) -> dict[str, Any]:
    tests = [{"input": "[1, 2]\n3", "output": "[3, 6]", "testtype": "functional"}]
    return _record(
        name,
        date,
        starter_code="class Solution:\n    def scale(self, values: List[int], by: int) -> List[int]:\n        ",
        metadata=json.dumps({"func_name": "scale"}),
        public_test_cases=json.dumps(tests),
        private_test_cases=_packed([{"input": "[]\n2", "output": "[]", "testtype": "functional"}]),
    )


def test_a_task_has_the_problems_of_its_release_and_dates(tmp_path: Path) -> None:
    """The first date belongs to the window, the last one does not; a release has the first files."""
    dates = ["2023-04-30", "2023-05-01", "2024-08-31", "2024-09-01"]
    first = write_lines(tmp_path / "a.jsonl", [_record(f"p{n}", date) for n, date in enumerate(dates)])
    second = write_lines(tmp_path / "b.jsonl", [_record("q", "2024-01-01")])
    task = LiveCodeBench("l", release=2, start="2023-05-01", end="2024-09-01")
    items = items_of(task, first, second)
    assert [item.id for item in items] == ["p1", "p2", "q"]
    assert items[0].groups == {"month": "2023-05", "form": "stdin", "difficulty": "easy", "platform": "atcoder"}
    assert len(LiveCodeBench("l", release=1).files) == 1
    assert "2023-05-01" in task.template()
    with pytest.raises(InputError, match="other dates"):
        items_of(LiveCodeBench("l", release=1, start="2025-01-01"), first)


@needs_bwrap
def test_programs_pass_by_public_and_private_tests(tools: Tools, tmp_path: Path) -> None:
    """Programs on standard input and methods: right ones pass, and ones that only the private tests find do not."""
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            *(_record(name, "2024-01-01") for name in ("right", "wrong", "numbers")),
            _method("m", "2024-01-02"),
            _method("w", "2024-01-02"),
        ],
    )
    programs = {
        "right": "a, b = map(int, input().split())\nprint(a + b)",
        "wrong": "print(2)",
        "numbers": "a, b = map(int, sys.stdin.read().split())\nprint(f' {a + b}.0 ')",
        "m": "class Solution:\n    def scale(self, values: List[int], by: int) -> List[int]:\n"
        "        return tuple(value * by % pow(10, 9, 1 << 40) for value in values)",
        "w": "class Solution:\n    def scale(self, values, by):\n        return [3, 6]",
    }
    task = LiveCodeBench("l", release=1)

    def answer(item: Item, number: int, request: Request) -> str:
        return f"I think.\n```python\n{programs[item.id]}\n```"

    verdicts = verdicts_of(task, items_of(task, path), answer, tools)
    assert scores_of(verdicts, "pass@1") == {"right": 1.0, "wrong": 0.0, "numbers": 1.0, "m": 1.0, "w": 0.0}
    assert "test 2 of 2" in verdicts["wrong"].details["samples"][0]["reason"]


@needs_bwrap
def test_tests_that_cannot_be_read_are_no_verdict(tools: Tools, tmp_path: Path) -> None:
    """A pickle that would do something is refused; nothing of it runs."""

    class Evil:
        def __reduce__(self) -> Any:
            return print, ("unpickled",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    path = write_lines(tmp_path / "a.jsonl", [_record("p", "2024-01-01", private_test_cases=packed)])
    task = LiveCodeBench("l", release=1)
    (verdict,) = verdicts_of(task, items_of(task, path), lambda *_: "```\nprint(2)\n```", tools).values()
    assert verdict.scores == {"pass@1": None}
    assert "cannot be read" in str(verdict.problem)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_text_of_a_pickle_is_read_without_unpickling(protocol: int) -> None:
    text = 'a "text" with \u00e9 and \n' * 300
    assert text_of_pickle(pickle.dumps(text, protocol)) == text
    for other in ([text], 3, text.encode(), {"a": text}):
        with pytest.raises(ValueError, match="one text"):
            text_of_pickle(pickle.dumps(other, protocol))


def test_outputs_are_equal_as_texts_or_as_numbers() -> None:
    assert same_output("a b \n c\n", "a b\nc")
    assert same_output("1.0 2\n", "1 2.00")
    assert not same_output("1\n2", "1 2")
    assert not same_output("yes", "no")
    assert not same_output("1 x", "1.0 x")
    # A program may write anything.
    assert not same_output("sNaN", "1")
    assert not same_output("inf", "Infinity")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"contest_date": "soon"}, "line 2.*contest_date"),
        ({"metadata": "{"}, "line 2.*metadata"),
        ({"starter_code": "class Solution:"}, "line 2.*func_name"),
        ({"private_test_cases": None}, "line 2.*private_test_cases"),
        ({"question_id": "p"}, "line 2.*line 1"),
    ],
)
def test_a_record_of_another_form_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [_record("p", "2024-01-01"), {**_record("q", "2024-01-01"), **change}])
    with pytest.raises(InputError, match=said):
        items_of(LiveCodeBench("l", release=1), path)


@pytest.mark.parametrize("settings", [{"release": 0}, {"release": 7}, {"start": "2024"}, {"end": "2024-13-01"}])
def test_a_window_that_there_is_not_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        LiveCodeBench("l", **settings)
