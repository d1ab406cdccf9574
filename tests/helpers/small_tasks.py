"""Small tasks for runs that are measured while they train."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from train.evaluate.task import DataFile, Generate, Item, Loglikelihood, Metric, Request, Response, Task, Tools, Verdict
from train.observe.metrics import read_log

WORDS = "some", "text", "of", "no", "importance"


class Choice(Task):
    """The log-probability of a line's last word, and whether it is more likely than the first one."""

    name = "choice"
    files = (DataFile("choice.txt"),)
    metrics = (Metric("accuracy"), Metric("logprob", 1.0))

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        lines = files["choice.txt"].read_text().splitlines()
        return [Item(str(i), {"words": line.split()}) for i, line in enumerate(lines)]

    def template(self) -> str:
        return "{words}"

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        *context, last = item.fields["words"]
        return () if rounds else [Loglikelihood(" ".join(context), f" {word}") for word in (last, context[0])]

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        pairs = [[float(response.logprob or 0) for response in rounds[0]] for rounds in responses]
        return [Verdict({"accuracy": float(a > b), "logprob": a}) for a, b in pairs]


class Written(Choice):
    """The share of vowels in a text that is generated."""

    name = "written"
    metrics = (Metric("vowels"),)

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Request]:
        return () if rounds else [Generate(" ".join(item.fields["words"]), max_tokens=5)]

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        texts = [rounds[0][0].text for rounds in responses]
        return [Verdict({"vowels": sum(c in "aeiou" for c in text) / max(len(text), 1)}) for text in texts]


class Judged(Choice):
    name = "judged"
    needs_judge = True


def write_lines(folder: Path, rng: np.random.Generator) -> None:
    """The file of the tasks: twelve lines of five words."""
    lines = [" ".join(rng.choice(WORDS, 5, replace=False)) for _ in range(12)]
    (folder / "choice.txt").write_text("\n".join(lines))


def measured(output: Path) -> dict[int, dict[str, float]]:
    """The records of tasks by step."""
    found: dict[int, dict[str, float]] = {}
    for record in read_log(output / "metrics.jsonl"):
        if any(name.startswith("task/") for name in record):
            assert int(record["step"]) not in found
            found[int(record["step"])] = {k: v for k, v in record.items() if k != "step"}
    return found
