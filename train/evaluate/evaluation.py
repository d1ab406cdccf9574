"""An evaluation: our benchmarks and tasks of lm-eval, on one model, with one summary and one page."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.tokenizer import Tokenizer
from train.evaluate import harness, registry, suites
from train.evaluate.report import write_report
from train.evaluate.run import DEFAULTS, NO_TOOLS, SUMMARY, RunOptions, file_name, run
from train.evaluate.statistics import wilson
from train.evaluate.task import Model, Task, Tools
from train.files import write_file

PAGE = "report.html"
THEIRS = "lm-eval:"
"""Before a name: the task of lm-eval, where the registry has one of the same name."""


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
        if any(name.startswith(THEIRS) for name in theirs):
            harness.check_installed()
        registry.find(names)  # Says what is similar.
    plain = [name.removeprefix(THEIRS) for name in theirs]
    if twice := [name for i, name in enumerate(plain) if name in plain[:i]]:
        raise InputError(f"Expected names of tasks, each once; got {twice[0]} twice.")
    ours = [name for name in names if name in known]
    if ours or not theirs:
        registry.find(ours)
    wanted = shots or {}
    return Names(
        tuple(known[name] for name in ours),
        tuple(harness.HarnessTask(name.removeprefix(THEIRS), wanted.get(name)) for name in theirs),
    )


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The benchmarks of a suite that can run here.

    Attributes:
      names: as `sort_names` takes them.
      shots: of tasks of lm-eval, by name.
      left_out: why a benchmark cannot run, by its name in the report.
    """

    names: tuple[str, ...]
    shots: Mapping[str, int | None]
    left_out: Mapping[str, str]


def choose(suite: suites.Suite, root: Path | None, hub: bool = False, judge: bool = False) -> Chosen:
    """Which benchmarks of a suite can run.

    Args:
      suite: from `suites.suite`.
      root: the data root.
      hub: whether data of lm-eval's tasks may be fetched.
      judge: whether there is a model that judges.
    """
    known = registry.tasks()

    def files_of(name: str) -> list[str] | None:
        return [file.path for file in known[name].files] if name in known else None

    shots: dict[str, int | None] = {}
    left_out = {}
    for entry in suite.entries:
        theirs = entry.side == "lm-eval"
        if theirs and not harness.installed():
            problem: str | None = "lm-eval is not installed: pip install 'qwen-jax[eval]'"
        elif entry.side == "ours" and entry.task in known and known[entry.task].needs_judge and not judge:
            problem = "it needs a model that judges: --judge-url URL"
        else:
            problem = None if theirs and hub else suites.missing(entry, root, files_of)
        if problem is not None:
            left_out[entry.benchmark] = problem
        else:
            shots[f"{THEIRS}{entry.task}" if theirs else entry.task] = entry.shots
    return Chosen(tuple(shots), shots, left_out)


def evaluate(
    model: Model,
    names: Names,
    folder: Path,
    options: RunOptions = DEFAULTS,
    settings: harness.Settings | None = None,
    tools: Tools = NO_TOOLS,
    tokenizer: Tokenizer | None = None,
    left_out: Mapping[str, str] | None = None,
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
      left_out: benchmarks of a suite that cannot run, and why; written with the results.

    Returns:
      The content of summary.json; see `train.evaluate.run.run`.

    Raises:
      InputError: see `run.run` and `harness.run`.
    """
    settings = settings or harness.Settings(data_root=options.data_root, limit=options.limit)
    if names.harness:
        # What is not there is found before the first request of any task.
        harness.check(names.harness, settings)
    summary = run(model, names.ours, folder, options, tools)
    failed: dict[str, str] = {}
    if names.harness:
        # A summary is that of a finished evaluation.
        (folder / SUMMARY).unlink()
        found = harness.run(model, tokenizer, names.harness, folder, settings)
        ours = registry.tasks()
        by_task: dict[str, list[Mapping[str, Any]]] = {}
        for record in found["records"]:
            by_task.setdefault(record["task"], []).append(record)
        for name, task in found["tasks"].items():
            items = _records(by_task.get(name, []))
            summary["tasks"][_key(name, ours)] = _task(task, found, items)
            if items:
                lines = "".join(to_json(one) + "\n" for one in items)
                write_file(folder / f"{file_name(_key(name, ours))}.jsonl", lines.encode())
        failed = {_key(name, ours): why for name, why in found["failed"].items()}
        summary["harness"] = {**found["harness"], "settings": found["settings"], "failed": failed}
    if left_out or failed:
        summary["left_out"] = {**(left_out or {}), **failed}
    write_file(folder / SUMMARY, (to_json(summary, indent=2) + "\n").encode())
    write_report(summary, folder, folder / PAGE)
    return summary


def _key(name: str, ours: Collection[str]) -> str:
    """The name of a task of lm-eval among results, where the registry has one of the same name."""
    return f"{THEIRS}{name}" if name in ours else name


def _task(task: Mapping[str, Any], found: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A task of lm-eval in the form of ours.

    Args:
      task: of the results of `harness.run`.
      found: these results.
      items: its items, from `_records`.
    """
    metrics = {}
    for name, one in task["metrics"].items():
        value, error = one["value"], one["stderr"]
        low, high = _interval(value, error, [item["scores"][name] for item in items if name in item["scores"]])
        metrics[name] = {
            "value": value,
            "low": low,
            "high": high,
            "stderr": error,
            "items": task["items"],
            "scale": _scale(name, value),
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


def _interval(value: float, error: float | None, scores: Sequence[float]) -> tuple[float | None, float | None]:
    """Wilson's interval of a share of items with the score 1; else 1.96 of lm-eval's standard errors."""
    if len(scores) > 1 and set(scores) <= {0.0, 1.0} and math.isclose(value, sum(scores) / len(scores), abs_tol=1e-9):
        return wilson(value, len(scores))
    return (None, None) if error is None else (value - 1.96 * error, value + 1.96 * error)


def _scale(name: str, value: float) -> float:
    """What a metric of lm-eval is multiplied with for people: shares are shown in percent, others as they are."""
    name = name.partition(",")[0]
    share = name.endswith("_acc") or not re.search("perplexity|per_|bleu|chrf|rouge|^ter$", name)
    return 100.0 if share and abs(value) <= 1 else 1.0


def _records(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each item of a task, with the scores of all filters that are numbers."""
    items: dict[str, dict[str, Any]] = {}
    for record in records:
        own = items.setdefault(
            record["item"], {"id": record["item"], "groups": {}, "scores": {}, "problem": None, "details": {}}
        )
        label = "" if record["filter"] == "none" else f",{record['filter']}"
        for metric, value in record["scores"].items():
            if harness.is_number(value):
                own["scores"][metric + label] = float(value)
        own["details"] |= {"expected": str(record["target"]), f"found{label}": str(record["filtered"])[:2000]}
        own["responses"] = record["responses"]
    return list(items.values())
