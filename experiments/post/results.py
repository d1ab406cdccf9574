"""The readings of `experiments.post.learning`: a file of them, and their table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.files import append_record, read_records


class Results:
    """The lines of `results.jsonl`: one for each seed, model and metric."""

    def __init__(self, path: Path):
        self._path = path
        self.records = read_records(path, "metric") if path.exists() else []

    def has(self, seed: int, model: str) -> bool:
        """Whether all readings of a model were taken; the last line of a model is `complete`."""
        return any((r["seed"], r["model"], r["metric"]) == (seed, model, "complete") for r in self.records)

    def add(self, seed: int, model: str, readings: Mapping[str, float], **about: Any) -> None:
        """Writes those that are not there yet."""
        seen = {(r["seed"], r["model"], r["metric"]) for r in self.records}
        for metric, value in {**readings, "complete": 1.0}.items():
            if (seed, model, metric) not in seen:
                record = {"seed": seed, "model": model, "metric": metric, "value": value, **about}
                append_record(self._path, record)
                self.records.append(record)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table for the tasks, and one for the pairs: mean +- standard deviation over the seeds."""
    values: dict[tuple[str, str], list[float]] = {}
    for record in records:
        values.setdefault((record["model"], record["metric"]), []).append(float(record["value"]))
    models = list(dict.fromkeys(model for model, _ in values))
    metrics = list(dict.fromkeys(metric for _, metric in values if metric != "complete"))

    def cell(model: str, metric: str) -> str:
        found = values.get((model, metric), [])
        if len(found) < 2:
            return f"{found[0]:.3f}" if found else ""
        return f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f}"

    def rows(of: list[str], metrics: list[str]) -> list[str]:
        head = ["| model | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
        return head + [f"| {m} | " + " | ".join(cell(m, metric) for metric in metrics) + " |" for m in of]

    tasks = [m for m in metrics if m.startswith(("accuracy/", "style/"))]
    others = [m for m in metrics if m not in tasks]
    seeds = len({record["seed"] for record in records})
    written = rows([m for m in models if (m, "accuracy/mean") in values], tasks)
    lines = [f"{seeds} seeds: mean ± standard deviation", "", *written]
    for prefix in ("dpo", "reward", "pretrained"):
        of = [m for m in models if m.startswith(prefix)]
        mine = [metric for metric in others if any((m, metric) in values for m in of)]
        if mine:
            lines += ["", *rows(of, mine)]
    return "\n".join(lines)
