"""Compares two evaluations, item by item."""

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from train.evaluate import registry
from train.evaluate.run import SUMMARY, file_name
from train.evaluate.statistics import paired, paired_aggregate
from train.evaluate.task import Metric, mean
from train.fields import differences
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
    before, now = first.get("versions", {}), second.get("versions", {})
    warnings += [
        f"{package} was {before.get(package, 'missing')}, is {now.get(package, 'missing')}"
        for package in sorted({*before, *now})
        if before.get(package) != now.get(package)
    ]
    if differ := differences(_harness_settings(first), _harness_settings(second)):
        warnings.append(f"lm-eval was run with other settings: {', '.join(differ)}")
    of_corpus = {
        name: {metric.name: metric for metric in task.metrics if metric.of_details or metric.aggregate is not mean}
        for name, task in registry.tasks().items()
        if name in names
    }
    tasks: dict[str, Any] = {}
    for name in names:
        one, other = first["tasks"][name], second["tasks"][name]
        warnings += [f"{name}: {key} was {one[key]}, is {other[key]}" for key in _SAME if one[key] != other[key]]
        hashes = [{file["path"]: file["sha256"] for file in task["files"]} for task in (one, other)]
        warnings += [
            f"{name}: {path} has another content"
            for path in sorted({*hashes[0], *hashes[1]})
            if hashes[0].get(path) != hashes[1].get(path)
        ]
        metrics = of_corpus.get(name, {})
        # Statistics of another version may have another form.
        current = registry.tasks()[name].version if metrics else None
        outdated = {key for key, metric in metrics.items() if metric.of_details}
        if not metrics or one["version"] == other["version"] == current:
            outdated = set()
        if outdated:
            warnings.append(
                f"{name}: {', '.join(sorted(outdated))} are not compared: their statistics are of versions "
                f"{one['version']} and {other['version']}, this program reads version {current}. Evaluate both again"
            )
        tasks[name] = _task(one, _records(a, name), _records(b, name), metrics, outdated)
        left = len(tasks[name]["only_a"]) + len(tasks[name]["only_b"])
        if left:
            warnings.append(f"{name}: {left} items are in one run alone, and do not count")
    return {"a": first["model"]["name"], "b": second["model"]["name"], "tasks": tasks, "warnings": warnings}


def _task(
    summary: Mapping[str, Any],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    of_corpus: Mapping[str, Metric],
    outdated: Set[str],
) -> dict[str, Any]:
    """The comparison of a task from the records of both runs.

    Args:
      summary: of the task in the first run.
      a, b: records by the ids of items.
      of_corpus: the metrics that are no means.
      outdated: those of them that cannot be computed.
    """
    common = [id for id in a if id in b]
    metrics = {}
    for name, how in summary["metrics"].items():
        metric = of_corpus.get(name)
        part = "details" if metric is not None and metric.of_details else "scores"
        known = [
            id
            for id in common
            if name not in outdated
            and all(run[id]["scores"].get(name) is not None and name in run[id][part] for run in (a, b))
        ]
        x, y = ([run[id][part][name] for id in known] for run in (a, b))
        aggregate = mean if metric is None else metric.aggregate
        found = paired(x, y) if metric is None else paired_aggregate(x, y, aggregate)
        metrics[name] = {
            "a": float(aggregate(x)) if x else None,
            "b": float(aggregate(y)) if y else None,
            **dataclasses.asdict(found),
            "scale": how["scale"],
            "higher_is_better": how["higher_is_better"],
        }
    return {
        "metrics": metrics,
        "only_a": [id for id in a if id not in b],
        "only_b": [id for id in b if id not in a],
    }


def _records(folder: Path, task: str) -> dict[str, dict[str, Any]]:
    """The records of a task by the ids of items; none for a group of lm-eval's tasks, whose parts have them."""
    path = folder / f"{file_name(task)}.jsonl"
    return {record["id"]: record for record in read_records(path, "scores")} if path.is_file() else {}


def _summary(folder: Path) -> dict[str, Any]:
    if not (folder / SUMMARY).is_file():
        raise InputError(f"{folder} holds no {SUMMARY}. Give the --output of a finished `qwen-jax eval`.")
    found: dict[str, Any] = read_json(folder / SUMMARY)
    if "tasks" not in found or "model" not in found:
        raise InputError(f"{folder / SUMMARY} is not that of `qwen-jax eval --tasks`.")
    return found


def _harness_settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of lm-eval, without places of files and the limit, whose effect is seen in the items."""
    settings = (summary.get("harness") or {}).get("settings", {})
    return {name: value for name, value in settings.items() if name not in ("data_root", "include", "hub", "limit")}


def _listed(summary: Mapping[str, Any]) -> str:
    return ", ".join(summary["tasks"]) or "none"
