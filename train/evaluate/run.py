"""Runs benchmarks on a model: asks, scores, and writes every score with all that decides it."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.evaluate.registry import Located, locate
from train.evaluate.runner import progress_bar
from train.evaluate.statistics import estimate
from train.evaluate.store import KeptJudge, Store
from train.evaluate.task import Item, Metric, Model, Request, Response, Task, Tools, Verdict
from train.files import write_file

RESPONSES, JUDGED, SUMMARY = "responses.jsonl", "judge_responses.jsonl", "summary.json"
# Packages that may change a score; those that are installed are written with it.
_PACKAGES = ("qwen-jax", "jax", "flax", "lm-eval", "sacrebleu", "math-verify", "transformers")

Rounds = list[list[Response]]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How benchmarks are run.

    Attributes:
      data_root: below it the files of tasks lie.
      allow_changed: whether a file may differ from all published versions.
      limit: the first items of each task; None for all.
    """

    data_root: Path | None = None
    allow_changed: bool = False
    limit: int | None = None


DEFAULTS, NO_TOOLS = RunOptions(), Tools()


def run(
    model: Model,
    tasks: Sequence[Task],
    folder: Path,
    options: RunOptions = DEFAULTS,
    tools: Tools = NO_TOOLS,
) -> dict[str, Any]:
    """Runs tasks, and writes their results below a folder.

    `responses.jsonl` has each response under a hash of the model and the request, `judge_responses.jsonl` those of the
    judge: after an interruption the same call asks nothing twice. `TASK.jsonl` has a line for each item, `summary.json`
    all scores. Files of a finished run do not depend on interruptions or the order of responses.

    Args:
      model: to be measured.
      tasks: from `registry.find`.
      folder: for results.
      options: how.
      tools: the judge and the sandbox.

    Returns:
      The content of summary.json.

    Raises:
      InputError: missing or changed data, a task without its judge or sandbox, or a limit below 1. Nothing is asked
        before that.
    """
    # Everything that can be wrong is found before the first request.
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit must be at least 1, got {options.limit}.")
    found = [(task, locate(task, options.data_root, options.allow_changed)) for task in tasks]
    work = []
    for task, files in found:
        _check(task, tools)
        items = list(task.items({one.file.path: one.path for one in files}))
        if not items or len({item.id for item in items}) < len(items):
            raise InputError(f"The task {task.name} has {'items with one id' if items else 'no items in its files'}.")
        work.append((task, files, items[: options.limit], len(items)))
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(model, folder / RESPONSES)
    judge_store = None if tools.judge is None else KeptJudge(tools.judge, folder / JUDGED)
    tools = dataclasses.replace(tools, judge=judge_store)
    # Requests of all rounds, then scores.
    results: dict[str, Any] = {}
    for task, files, items, of in work:
        rounds = ask(store, task, items)
        verdicts = judge(task, items, rounds, tools)
        lines = "".join(to_json(_record(*each)) + "\n" for each in zip(items, rounds, verdicts, strict=True))
        write_file(folder / f"{file_name(task.name)}.jsonl", lines.encode())
        results[task.name] = _result(task, files, items, rounds, verdicts, of)
    store.finish()
    if judge_store is not None:
        judge_store.finish()
    summary = {
        "model": {"name": model.name, **model.identity()},
        "judge": None if tools.judge is None else {"name": tools.judge.name, **tools.judge.identity()},
        "versions": _versions(),
        "limit": options.limit,
        "tasks": results,
    }
    write_file(folder / SUMMARY, (to_json(summary, indent=2) + "\n").encode())
    return summary


def ask(store: Store, task: Task, items: Sequence[Item], quiet: bool = False) -> list[Rounds]:
    """The responses of each item, round by round; an item without an answer to a request is asked nothing more.

    Args:
      store: asks the model.
      task: whose items they are.
      items: some or all of them.
      quiet: whether there is no bar.
    """
    rounds: list[Rounds] = [[] for _ in items]
    open_items = list(range(len(items)))
    while True:
        wanted: list[tuple[int, list[Request]]] = []
        for i in open_items:
            if requests := list(task.requests(items[i], rounds[i])):
                wanted.append((i, requests))
        if not wanted:
            return rounds
        requests = [request for _, own in wanted for request in own]
        bar = contextlib.nullcontext(lambda _: None) if quiet else progress_bar(task.name, len(requests))
        with bar as advance:
            responses = iter(store(requests, functools.partial(advance, 1)))
        open_items = []
        for i, own in wanted:
            rounds[i].append([next(responses) for _ in own])
            if all(response.error is None for response in rounds[i][-1]):
                open_items.append(i)


def judge(task: Task, items: Sequence[Item], rounds: Sequence[Rounds], tools: Tools) -> list[Verdict]:
    """The verdict on each item. An item with a request that has no answer is not scored, and says why."""
    names = {metric.name for metric in task.metrics}
    verdicts: dict[int, Verdict] = {}
    answered = []
    for i, own in enumerate(rounds):
        problem = next((r.error for one in own for r in one if r.error is not None), None)
        if problem is None:
            answered.append(i)
        else:
            verdicts[i] = Verdict(dict.fromkeys(names), problem=f"no answer: {problem}")
    scored = task.score([items[i] for i in answered], [rounds[i] for i in answered], tools) if answered else []
    for i, verdict in zip(answered, scored, strict=True):
        if set(verdict.scores) != names:
            raise ValueError(f"{task.name} scored {sorted(verdict.scores)}, but its metrics are {sorted(names)}.")
        verdicts[i] = verdict
    return [verdicts[i] for i in range(len(items))]


def file_name(task: str) -> str:
    """The name of a task in names of files."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", task)


def values_of(metric: Metric, verdicts: Sequence[Verdict]) -> list[Any]:
    """What a metric is aggregated from, without items that have no score."""
    scored = [verdict for verdict in verdicts if verdict.scores[metric.name] is not None]
    if metric.of_details:
        return [verdict.details[metric.name] for verdict in scored]
    return [verdict.scores[metric.name] for verdict in scored]


def _check(task: Task, tools: Tools) -> None:
    if task.needs_judge and tools.judge is None:
        raise InputError(f"The task {task.name} needs a model that judges: --judge-url URL [--judge-model NAME].")
    if task.needs_sandbox and tools.sandbox is None:
        raise InputError(f"The task {task.name} runs the model's code in a sandbox: see qwen-jax sandbox check.")


def _record(item: Item, rounds: Rounds, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": item.id,
        "groups": dict(item.groups),
        "scores": dict(verdict.scores),
        "problem": verdict.problem,
        "details": dict(verdict.details),
        "responses": [[dataclasses.asdict(response) for response in one] for one in rounds],
    }


def _result(
    task: Task,
    files: Sequence[Located],
    items: Sequence[Item],
    rounds: Sequence[Rounds],
    verdicts: Sequence[Verdict],
    of: int,
) -> dict[str, Any]:
    """What summary.json has of a task."""
    metrics: dict[str, dict[str, Any]] = {}
    signatures = task.signatures()
    for metric in task.metrics:
        found = estimate(values_of(metric, verdicts), metric.aggregate)
        metrics[metric.name] = {
            **dataclasses.asdict(found),
            "scale": metric.scale,
            "higher_is_better": metric.higher_is_better,
            "unscored": len(items) - found.items,
        }
        if metric.name in signatures:
            metrics[metric.name]["signature"] = signatures[metric.name]
    cut = sum(any(r.finish == "length" for one in own for r in one) for own in rounds)
    prompts_cut = sum(any(r.prompt_cut for one in own for r in one) for own in rounds)
    return {
        "metrics": metrics,
        "groups": _groups(task, items, verdicts),
        "items": len(items),
        "of": of,
        "truncated": cut,
        "prompts_cut": prompts_cut,
        "problems": dict(Counter(v.problem.split("\n")[0][:200] for v in verdicts if v.problem is not None)),
        "version": task.version,
        "template": hashlib.sha256(task.template().encode()).hexdigest(),
        "shots": task.shots,
        "citation": task.citation,
        "files": [one.to_json() for one in files],
    }


def _groups(task: Task, items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The metrics of each part of a benchmark, by kind of part."""
    parts: dict[str, dict[str, list[Verdict]]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        for kind, name in item.groups.items():
            parts.setdefault(kind, {}).setdefault(name, []).append(verdict)

    def numbers(own: Sequence[Verdict]) -> dict[str, Any]:
        values = {metric.name: values_of(metric, own) for metric in task.metrics}
        found = {m.name: float(m.aggregate(values[m.name])) if values[m.name] else None for m in task.metrics}
        return {"items": len(own), **found}

    return {kind: {name: numbers(own) for name, own in sorted(of.items())} for kind, of in sorted(parts.items())}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
