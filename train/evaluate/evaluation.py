"""An evaluation: our benchmarks and tasks of lm-eval, on one model, with one summary and one page."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.files import to_json
from qwen_jax.tokenizer import Tokenizer
from train.evaluate import harness, registry
from train.evaluate.report import write_report
from train.evaluate.run import DEFAULTS, NO_TOOLS, SUMMARY, RunOptions, file_name, run
from train.evaluate.task import Model, Task, Tools
from train.files import write_file

PAGE = "report.html"


@dataclasses.dataclass(frozen=True)
class Names:
    """What was asked for.

    Attributes:
      ours: benchmarks of the registry.
      harness: tasks of lm-eval.
    """

    ours: tuple[Task, ...]
    harness: tuple[harness.HarnessTask, ...]


def sort_names(names: Sequence[str], shots: Mapping[str, int | None] | None = None) -> Names:
    """Takes names that the registry does not know for those of lm-eval.

    Args:
      names: of tasks.
      shots: solved examples of tasks of lm-eval; by default what the task says.

    Raises:
      InputError: no names, or one twice; or a name that the registry does not know while lm-eval is not installed.
    """
    known = registry.tasks()
    theirs = [name for name in names if name not in known]
    if theirs and not harness.installed():
        registry.find(names)  # Says what is similar.
    ours = [name for name in names if name in known]
    if ours or not theirs:
        registry.find(ours)
    wanted = shots or {}
    return Names(
        tuple(known[name] for name in ours), tuple(harness.HarnessTask(name, wanted.get(name)) for name in theirs)
    )


def evaluate(
    model: Model,
    names: Names,
    folder: Path,
    options: RunOptions = DEFAULTS,
    settings: harness.Settings | None = None,
    tools: Tools = NO_TOOLS,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Runs all tasks, and writes summary.json and report.html beside the records of each task.

    Args:
      model: to be measured.
      names: from `sort_names`.
      folder: for results.
      options: of our benchmarks.
      settings: of lm-eval; by default data root and limit of `options`.
      tools: the judge and the sandbox.
      tokenizer: formats conversations of lm-eval; None if the model formats them itself.

    Returns:
      The content of summary.json; see `train.evaluate.run.run`.

    Raises:
      InputError: see `run.run` and `harness.run`.
    """
    summary = run(model, names.ours, folder, options, tools)
    if names.harness:
        settings = settings or harness.Settings(data_root=options.data_root, limit=options.limit)
        found = harness.run(model, tokenizer, names.harness, folder, settings)
        for name, task in found["tasks"].items():
            summary["tasks"][name] = _task(task, found)
        for name in {record["task"] for record in found["records"]}:
            lines = "".join(to_json(one) + "\n" for one in _records(name, found["records"]))
            write_file(folder / f"{file_name(name)}.jsonl", lines.encode())
        summary["harness"] = {**found["harness"], "settings": found["settings"]}
        write_file(folder / SUMMARY, (to_json(summary, indent=2) + "\n").encode())
    write_report(summary, folder, folder / PAGE)
    return summary


def _task(task: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A task of lm-eval in the form of ours. Its intervals are 1.96 standard errors."""
    metrics = {}
    for name, one in task["metrics"].items():
        value, error = one["value"], one["stderr"]
        metrics[name] = {
            "value": value,
            "low": None if error is None else value - 1.96 * error,
            "high": None if error is None else value + 1.96 * error,
            "stderr": error,
            "items": task["items"],
            "scale": 1.0 if "perplexity" in name or "per_" in name else 100.0,
            "higher_is_better": one["higher_is_better"] is not False,
            "unscored": 0,
        }
    return {
        "metrics": metrics,
        "groups": {},
        "items": task["items"],
        "of": task["of"],
        "truncated": task["truncated"],
        "prompts_cut": task["prompts_cut"],
        "problems": {},
        "version": task["version"],
        "template": task["template"],
        "shots": task["shots"],
        "citation": f"lm-eval {found['harness']['version']}",
        "files": [{"path": path, "sha256": sha256} for path, sha256 in sorted(dict(found["files"]).items())],
    }


def _records(name: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each item, with the scores of all filters that are numbers."""
    items: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["task"] != name:
            continue
        own = items.setdefault(
            record["item"], {"id": record["item"], "groups": {}, "scores": {}, "problem": None, "details": {}}
        )
        label = "" if record["filter"] == "none" else f",{record['filter']}"
        for metric, value in record["scores"].items():
            if isinstance(value, (bool, int, float)):
                own["scores"][metric + label] = float(value)
        own["details"] |= {"expected": str(record["target"]), f"found{label}": str(record["filtered"])[:2000]}
        own["responses"] = record["responses"]
    return list(items.values())
