"""MT-Bench: two turns by rounds, a rating for each, and no verdict where the judge gives none."""

from pathlib import Path
from typing import Any

from tests.helpers.benchmarks import items_of, verdicts_of, write_lines
from tests.helpers.evaluated import MadeModel
from train.evaluate.benchmarks.mt_bench import TASKS
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
    items = items_of(task, write_lines(tmp_path / "q.jsonl", records))
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
