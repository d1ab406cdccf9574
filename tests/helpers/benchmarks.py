"""A loop for tests of benchmarks: items, requests, answers by a function, verdicts."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from train.evaluate.task import Item, Request, Response, Task, Tools, Verdict


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """Writes records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def items_of(task: Task, *paths: Path) -> list[Item]:
    """The items of a task from its files, in the order of `Task.files`."""
    return list(task.items({file.path: path for file, path in zip(task.files, paths, strict=True)}))


def verdicts_of(
    task: Task,
    items: Iterable[Item],
    answer: Callable[[Item, int, Request], Response | str],
    tools: Tools | None = None,
) -> dict[str, Verdict]:
    """Asks for answers in rounds, and scores them all together.

    Args:
      task: of the items.
      items: to be asked.
      answer: to the request of a number in its round.
      tools: for scoring.

    Returns:
      The verdicts by the ids of the items.
    """
    items = list(items)
    responses = []
    for item in items:
        rounds: list[list[Response]] = []
        while requests := task.requests(item, rounds):
            answers = [answer(item, number, request) for number, request in enumerate(requests)]
            rounds.append([Response(text) if isinstance(text, str) else text for text in answers])
        responses.append(rounds)
    verdicts = task.score(items, responses, tools or Tools())
    names = {metric.name for metric in task.metrics}
    assert all(set(verdict.scores) == names for verdict in verdicts)
    assert all((None in verdict.scores.values()) == (verdict.problem is not None) for verdict in verdicts)
    return dict(zip((item.id for item in items), verdicts, strict=True))


def scores_of(verdicts: Mapping[str, Verdict], metric: str) -> dict[str, float | None]:
    """The scores of one metric by item."""
    return {name: verdict.scores[metric] for name, verdict in verdicts.items()}
