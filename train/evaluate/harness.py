"""Tasks of lm-eval (the extra `eval`), answered by our models.

lm-eval makes the prompts and computes the scores; `train.evaluate.harness_lm` turns what it asks into requests to a
`train.evaluate.task.Model`. Responses are kept in a file: a run that was killed repeats no request.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import logging
import numbers
import os
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.tokenizer import Tokenizer
from train.evaluate.harness_data import LocalData
from train.evaluate.store import Store
from train.evaluate.task import Model
from train.files import write_file

RESPONSES, RESULTS, RECORDS = "harness_responses.jsonl", "harness_results.json", "harness_records.jsonl"


@dataclasses.dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval.

    Attributes:
      name: of a task, a group or a tag of lm-eval, or of a YAML file below `Settings.include`.
      shots: solved examples in a prompt; None for what the task says. A task that says 0 keeps it.
    """

    name: str
    shots: int | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Attributes:
      data_root: below it data is found; see `harness_data.LocalData`.
      include: folders with further YAML tasks.
      hub: whether data that is not here is fetched from the Hub.
      limit: items of each task; None for all.
      chat: whether prompts have the form of a conversation.
      system: the system message of conversations.
      multi_turn: whether solved examples are turns of the conversation.
      unsafe_code: whether tasks may run the model's code in this process, outside of any sandbox.
      seed: of sampled texts. The seeds of lm-eval itself are its defaults, as in published scores.
    """

    data_root: Path | None = None
    include: tuple[Path, ...] = ()
    hub: bool = False
    limit: int | None = None
    chat: bool = False
    system: str | None = None
    multi_turn: bool = True
    unsafe_code: bool = False
    seed: int = 0


def installed() -> bool:
    """Whether lm-eval is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("lm_eval", "datasets"))


def check_installed() -> str:
    """The version of lm-eval. Raises InputError if it is not installed."""
    missing = [name for name in ("lm_eval", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"Tasks of lm-eval need {' and '.join(missing)}: run pip install 'qwen-jax[eval]'.")
    from importlib.metadata import version

    return version("lm_eval")


def run(
    model: Model,
    tokenizer: Tokenizer | None,
    tasks: Sequence[HarnessTask],
    folder: Path | None,
    settings: Settings = Settings(),
) -> dict[str, Any]:
    """Runs tasks and writes their results.

    Args:
      model: answers.
      tokenizer: formats conversations; None if the model formats them itself.
      tasks: of lm-eval.
      folder: takes `RESPONSES`, `RECORDS` (a line for each item) and `RESULTS`; None to write nothing.
      settings: how they are run.

    Returns:
      What `RESULTS` has: for each task its metrics with standard errors, shots, version, hash of its configuration, and
      the sha256 of the files that were read; `failed`: why a task has no score, because requests have no answer.

    Raises:
      InputError: lm-eval is not installed, an unknown task, data that is not here, or requests of every task without
        an answer.
    """
    version = check_installed()
    data = LocalData(settings.data_root, settings.hub)
    failed: dict[str, str] = {}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with data.used(), _quiet():
        from train.evaluate.harness_lm import HarnessLM, UnansweredError

        manager = _manager(tasks, settings)
        store = Store(model, None if folder is None else folder / RESPONSES)
        lm = HarnessLM(model, tokenizer, store, settings.seed)
        found: dict[str, Any] = {}
        records: list[dict[str, Any]] = []
        for task in tasks:
            try:
                raw = _evaluate(lm, manager, task, settings)
            except UnansweredError as error:
                # The other tasks go on.
                failed[task.name] = str(error)
                if len(failed) == len(tasks):
                    raise
                continue
            found.update(_results(raw, lm))
            records += _records(raw)
        store.finish()
    result = {
        "harness": {"name": "lm-eval", "version": version},
        "model": dict(model.identity()),
        "settings": {k: v if isinstance(v, (int, str)) or v is None else str(v) for k, v in vars(settings).items()},
        "files": data.files,
        "tasks": found,
        "failed": failed,
    }
    if folder is not None:
        write_file(folder / RECORDS, "".join(to_json(record, default=_plain) + "\n" for record in records).encode())
        write_file(folder / RESULTS, (to_json(result, indent=2, default=_plain) + "\n").encode())
    return {**result, "records": records}


def check(tasks: Sequence[HarnessTask], settings: Settings = Settings()) -> None:
    """Looks for tasks and their data, before anything is asked.

    Args:
      tasks: of lm-eval.
      settings: how they are to be run.

    Raises:
      InputError: lm-eval is not installed, an unknown task, or data that is not here.
    """
    check_installed()
    with LocalData(settings.data_root, settings.hub).used(), _quiet():
        manager = _manager(tasks, settings)
        for task in tasks:
            manager.load([task.name])


def _evaluate(lm: Any, manager: Any, task: HarnessTask, settings: Settings) -> Mapping[str, Any]:
    """lm-eval's results of one task or group."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    # As lm-eval's own `simple_evaluate`, which also asks every package of the machine for its version. Some tasks
    # shuffle with the global generators when they are loaded.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    loaded = manager.load([task.name])
    for one in loaded["tasks"].values():
        own = one.get_config("num_fewshot")
        if task.shots is not None and own != 0:
            one.set_config(key="num_fewshot", value=task.shots)
        elif own is None:
            one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        raw: Mapping[str, Any] = evaluate(
            lm,
            loaded,
            limit=settings.limit,
            bootstrap_iters=0,
            apply_chat_template=settings.chat,
            system_instruction=settings.system,
            fewshot_as_multiturn=settings.chat and settings.multi_turn,
            confirm_run_unsafe_code=settings.unsafe_code,
        )
    except ValueError as error:
        if "unsafe" in str(error):
            raise InputError(
                f"{task.name} runs the model's code in this process, without a sandbox. Use our task of that "
                "benchmark, which has one, or allow it (--unsafe-code)."
            ) from error
        raise
    return raw


def _results(raw: Mapping[str, Any], lm: Any) -> dict[str, Any]:
    """Metrics of each task and group, which lm-eval names `metric,filter`."""
    found = {}
    for name, values in raw["results"].items():
        metrics: dict[str, Any] = {}
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr") or not isinstance(value, numbers.Real):
                continue
            higher = raw["higher_is_better"].get(name, {}).get(metric)
            metrics[metric if how == "none" else f"{metric},{how}"] = {
                "value": float(value),
                "stderr": _standard_error(float(value), raw.get("samples", {}).get(name, ()), metric, how),
                "higher_is_better": higher,
            }
        config = raw["configs"].get(name, {})
        counts = raw["n-samples"].get(name, {})
        found[name] = {
            "metrics": metrics,
            "items": counts.get("effective"),
            "of": counts.get("original"),
            "truncated": len(lm.truncated[name]) if name in raw["n-samples"] else None,
            "prompts_cut": len(lm.prompts_cut[name]) if name in raw["n-samples"] else None,
            "shots": raw["n-shot"].get(name),
            "version": raw["versions"].get(name),
            "template": _hash(config),
            "data_set": config.get("dataset_path"),
        }
    return found


def _standard_error(value: float, samples: Sequence[Mapping[str, Any]], metric: str, how: str) -> float | None:
    """The standard error of a metric that is the mean over the items; None for others, and for groups."""
    scores = [sample.get(metric) for sample in samples if sample["filter"] == how]
    known = [float(_plain(x)) for x in scores if is_number(x)]
    if len(known) < 2 or len(known) < len(scores) or abs(statistics.fmean(known) - value) > 1e-9:
        return None
    return statistics.stdev(known) / len(known) ** 0.5


def is_number(value: object) -> bool:
    """Whether a score is a number or a truth, of Python or of NumPy."""
    return isinstance(value, numbers.Real) or type(value).__name__ in ("bool", "bool_")


def _records(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record for each item and filter: what was asked, what came, and its scores."""
    records = []
    for name, samples in raw.get("samples", {}).items():
        for sample in samples:
            records.append(
                {
                    "task": name,
                    "item": str(sample["doc_id"]),
                    "filter": sample["filter"],
                    "hash": {key: sample[f"{key}_hash"] for key in ("doc", "prompt", "target")},
                    "target": sample["target"],
                    "responses": sample["resps"],
                    "filtered": sample["filtered_resps"],
                    "scores": {metric: sample[metric] for metric in sample["metrics"]},
                }
            )
    return records


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, which some metrics give for each item, as JSON has them; other objects as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _hash(config: Mapping[str, Any]) -> str:
    """Of what decides the prompts and the scores of a task: all of its configuration."""
    text = json.dumps({k: v for k, v in config.items() if k != "metadata"}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _manager(tasks: Sequence[HarnessTask], settings: Settings) -> Any:
    """What knows the tasks. Reading all of lm-eval's takes seconds, so it is done only if one of them is wanted."""
    from lm_eval.tasks import TaskManager

    include = [str(path) for path in settings.include]
    if missing := [path for path in settings.include if not path.is_dir()]:
        raise InputError(f"{missing[0]} is no folder. Expected one with YAML tasks of lm-eval.")
    if include:
        own = TaskManager(include_path=include, include_defaults=False)
        if all(task.name in own.all_tasks for task in tasks):
            return own
    manager = TaskManager(include_path=include or None)
    known = set(manager.all_tasks)
    if unknown := [task.name for task in tasks if task.name not in known]:
        close = difflib.get_close_matches(unknown[0], known, 3)
        raise InputError(
            f"{unknown[0]} is neither a task of ours nor one of lm-eval"
            + (f"; close names are {', '.join(close)}." if close else ".")
            + " `qwen-jax eval list` shows ours; folders with further YAML tasks are given by --include."
        )
    return manager


@contextlib.contextmanager
def _quiet() -> Any:
    """No progress bars and no chatter of lm-eval."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            os.environ.pop("TQDM_DISABLE", None)
