"""MT-Bench: two turns by rounds, a rating for each, and no verdict where the judge gives none."""

from pathlib import Path
from typing import Any

import pytest

from qwen_jax.errors import InputError
from tests.helpers.benchmarks import items_of, verdicts_of, write_lines
from tests.helpers.evaluated import MadeModel
from train.evaluate.benchmarks.mt_bench import TASKS
from train.evaluate.benchmarks.recorded import read_answers
from train.evaluate.task import Generate, Request, Response, Tools


def rated(request: Request) -> Response:
    """The judge, which rates by what it reads."""
    assert isinstance(request, Generate)
    text = str(request.prompt[0]["content"])  # type: ignore[index]
    second = "Rating: [[8.5]]/10, not [[4]]" if "fine second" in text else "[3]"
    return Response("none" if "bad second" in text else second)


def test_both_turns_are_asked_and_rated(tmp_path: Path) -> None:
    (task,) = TASKS
    records = [{"question_id": i, "category": "writing", "turns": ["Q1", "Q2"]} for i in (1, 2)]
    items = items_of(task, write_lines(tmp_path / "q.jsonl", records), write_lines(tmp_path / "r.jsonl", []))
    asked: list[Any] = []

    def answer(item: Any, number: int, request: Any) -> str:
        asked.append(request)
        return "first" if len(request.prompt) == 1 else ("fine second" if item.id == "1" else "bad second")

    found = verdicts_of(task, items, answer, Tools(judge=MadeModel(rated)))
    assert [one["content"] for one in asked[1].prompt] == ["Q1", "first", "Q2"]
    assert asked[0].temperature == 0.7
    assert found["1"].scores == {"rating": 5.75, "turn_1": 3.0, "turn_2": 8.5}
    assert found["2"].scores == {"rating": None, "turn_1": 3.0, "turn_2": None}
    assert found["2"].problem == "the judge gave no [[rating]]"


def test_the_judge_sees_references_of_mathematics_reasoning_and_coding_alone(tmp_path: Path) -> None:
    """Of the first turn when it rates the first, of both when it rates the second; without one it is not asked."""
    (task,) = TASKS
    categories = ("math", "reasoning", "coding", "writing", "stem", "extraction")
    questions = [
        {"question_id": i, "category": name, "turns": [f"Q1-{i}", f"Q2-{i}"], "reference": ["old"] * 2}
        for i, name in enumerate(categories)
    ]
    answers = [{"question_id": i, "choices": [{"turns": [f"one-{i}", f"two-{i}"]}]} for i in range(len(categories))]
    paths = write_lines(tmp_path / "q.jsonl", questions), write_lines(tmp_path / "r.jsonl", answers)
    prompts: list[str] = []

    def judge(request: Request) -> Response:
        assert isinstance(request, Generate)
        prompts.append(str(request.prompt[0]["content"]))  # type: ignore[index]
        return Response("[[5]]")

    items = items_of(task, *paths)
    verdicts_of(task, items, lambda *_: "answer", Tools(judge=MadeModel(judge)))
    assert len(prompts) == 2 * len(categories)
    for i, name in enumerate(categories):
        first, second = sorted((one for one in prompts if f"Q1-{i}" in one), key=len)
        known = name in ("math", "reasoning", "coding")
        assert (f"one-{i}" in first, f"two-{i}" in first) == (known, False)
        assert (f"one-{i}" in second, f"two-{i}" in second) == (known, known)
        assert "old" not in first + second
    write_lines(paths[1], answers[1:])
    with pytest.raises(InputError, match=r"q\.jsonl, line 1: the judge needs the answers of GPT-4 .* 0 \(math\)"):
        items_of(task, *paths)
    write_lines(paths[1], [*answers, answers[2]])
    with pytest.raises(InputError, match="the question 2 is answered a second time"):
        items_of(task, *paths)


@pytest.mark.parametrize(
    "line",
    [
        {"question_id": 7, "choices": [{"turns": ["a", "b"]}, {"turns": ["c", "d"]}]},
        {"question_id": "7", "choices": [{"turns": [{"content": "a"}, {"content": "b"}]}]},
        {
            "uid": "7",
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": {"answer": "a"}},
                {"role": "user", "content": "y"},
                {"role": "assistant", "content": "b"},
            ],
        },
    ],
)
def test_recorded_answers_are_read_in_all_published_forms(line: dict[str, Any], tmp_path: Path) -> None:
    assert read_answers(write_lines(tmp_path / "a.jsonl", [line])) == {"7": ["a", "b"]}
    # A table of both forms has both columns, one of them null.
    both = {**line, "question_id": line.get("question_id"), "uid": line.get("uid")}
    assert read_answers(write_lines(tmp_path / "a.jsonl", [both])) == {"7": ["a", "b"]}
    for name in list(line):
        rest = {key: value for key, value in line.items() if key != name}
        with pytest.raises(InputError, match=r"line 1: expected question_id or uid, and texts"):
            read_answers(write_lines(tmp_path / "a.jsonl", [rest]))
