"""Compares two evaluations, item by item."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from train.evaluate.run import SUMMARY, file_name
from train.evaluate.statistics import paired
from train.files import read_records

# Of a task: where two runs differ in one of these, their scores do not measure the same.
_SAME = ("version", "template", "shots", "of")


def compare(a: Path, b: Path) -> dict[str, Any]:
    """The differences of two runs of `train.evaluate.run`.

    Args:
      a, b: their folders.

    Returns:
      `tasks`: for each common task and metric with a score for each item: both values over the common items, the
      `statistics.Difference`, and whether more is better. `warnings`: settings that differ, tasks of one run alone.

    Raises:
      InputError: a folder without results, or no common task.
    """
    first, second = _summary(a), _summary(b)
    names = [name for name in first["tasks"] if name in second["tasks"]]
    if not names:
        raise InputError(f"{a} and {b} have no task in common: {_listed(first)}; {_listed(second)}.")
    warnings = [
        f"{name} is in one run alone"
        for name in (*first["tasks"], *second["tasks"])
        if name not in first["tasks"] or name not in second["tasks"]
    ]
    if first.get("judge") != second.get("judge"):
        warnings.append("the judges differ")
    tasks: dict[str, Any] = {}
    for name in names:
        one, other = first["tasks"][name], second["tasks"][name]
        warnings += [f"{name}: {key} was {one[key]}, is {other[key]}" for key in _SAME if one[key] != other[key]]
        hashes = [{file["path"]: file["sha256"] for file in task["files"]} for task in (one, other)]
        warnings += [
            f"{name}: {path} has another content" for path in hashes[0] if hashes[0][path] != hashes[1].get(path)
        ]
        tasks[name] = _task(one, _scores(a, name), _scores(b, name))
        left = len(tasks[name]["only_a"]) + len(tasks[name]["only_b"])
        if left:
            warnings.append(f"{name}: {left} items are in one run alone, and do not count")
    return {"a": first["model"]["name"], "b": second["model"]["name"], "tasks": tasks, "warnings": warnings}


def _task(summary: Mapping[str, Any], a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    common = [id for id in a if id in b]
    metrics = {}
    for metric, how in summary["metrics"].items():
        known = [id for id in common if a[id].get(metric) is not None and b[id].get(metric) is not None]
        x, y = [float(a[id][metric]) for id in known], [float(b[id][metric]) for id in known]
        metrics[metric] = {
            "a": sum(x) / len(x) if x else None,
            "b": sum(y) / len(y) if y else None,
            **dataclasses.asdict(paired(x, y)),
            "scale": how["scale"],
            "higher_is_better": how["higher_is_better"],
        }
    return {
        "metrics": metrics,
        "only_a": [id for id in a if id not in b],
        "only_b": [id for id in b if id not in a],
    }


def _scores(folder: Path, task: str) -> dict[str, dict[str, float | None]]:
    path = folder / f"{file_name(task)}.jsonl"
    return {record["id"]: record["scores"] for record in read_records(path, "scores")}


def _summary(folder: Path) -> dict[str, Any]:
    if not (folder / SUMMARY).is_file():
        raise InputError(f"{folder} holds no {SUMMARY}. Give the --output of a finished `qwen-jax eval`.")
    found: dict[str, Any] = read_json(folder / SUMMARY)
    if "tasks" not in found or "model" not in found:
        raise InputError(f"{folder / SUMMARY} is not that of `qwen-jax eval --tasks`.")
    return found


def _listed(summary: Mapping[str, Any]) -> str:
    return ", ".join(summary["tasks"]) or "none"
