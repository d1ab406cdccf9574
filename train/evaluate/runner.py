"""Runs retrieval tasks on an engine: one record a sample, resumable, with scores by length and depth."""

import contextlib
import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.inference import Completion, SamplingParams
from train.evaluate.score import score
from train.evaluate.tasks import Sample
from train.fields import differences
from train.files import append_record, read_records, write_file

RESULTS, SETTINGS, SUMMARY = "results.jsonl", "settings.json", "summary.json"
# Tokens that are read at once, unless a batch size is given.
_BATCH_TOKENS, _BATCH_ROWS = 65_536, 32


class Generator(Protocol):
    """What answers prompts; `qwen_jax.inference.Engine` is one."""

    def generate(
        self, prompts: Sequence[np.ndarray], sampling: SamplingParams, *, max_new_tokens: int
    ) -> list[Completion]: ...


@dataclasses.dataclass(frozen=True)
class Case:
    """A sample to be made.

    Attributes:
      task: its name.
      length: tokens of prompt and answer together.
      depth: of what is asked for, in percent; None for tasks without a depth.
      sample: its number, from 0.
    """

    task: str
    length: int
    depth: float | None
    sample: int

    def rng(self, seed: int) -> np.random.Generator:
        """Random numbers that depend on the case and the seed alone."""
        depth = -1 if self.depth is None else round(self.depth * 1000)
        return np.random.default_rng([seed, zlib.crc32(self.task.encode()), self.length, depth + 1, self.sample])


Make = Callable[[Case], Sample]


def cases(tasks: Mapping[str, bool], lengths: Sequence[int], depths: Sequence[float], samples: int) -> list[Case]:
    """All cases, by task, length, depth and number.

    Args:
      tasks: by name: whether the task has a depth.
      lengths: in tokens.
      depths: in percent.
      samples: how many of each kind. A task without depths has as many as the others in all.

    Raises:
      InputError: nothing to do, a depth outside of 0 to 100, or something twice.
    """
    for name, given in (("lengths", lengths), ("depths", depths)):
        if not given or len(set(given)) < len(given):
            raise InputError(f"Expected --{name}, each once; got {', '.join(map(str, given)) or 'none'}.")
    if samples < 1 or min(lengths) < 1:
        raise InputError(f"--samples and --lengths must be at least 1, got {samples} and {min(lengths)}.")
    if outside := [depth for depth in depths if not 0 <= depth <= 100]:
        raise InputError(f"--depths are percents from 0 to 100, got {outside[0]:g}.")
    found = []
    for task, has_depth in tasks.items():
        for length in lengths:
            if has_depth:
                found += [Case(task, length, float(depth), i) for depth in depths for i in range(samples)]
            else:
                found += [Case(task, length, None, i) for i in range(samples * len(depths))]
    return found


def run(
    engine: Generator,
    make: Make,
    wanted: Sequence[Case],
    folder: Path,
    settings: Mapping[str, Any],
    batch_size: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Lets an engine answer all cases that are not answered yet, and writes records, summary and settings.

    Records are written after each batch: after an interruption, the same call goes on and leaves the same file.

    Args:
      engine: answers the prompts, greedily.
      make: makes the sample of a case.
      wanted: the cases, neighbours of equal length together.
      folder: takes results.jsonl, settings.json, summary.json; see `open_folder`.
      settings: what decides the results, as JSON values.
      batch_size: prompts that are read at once; by default as many as have 65,536 tokens, at most 32.
      console: for progress; by default standard error.

    Returns:
      The summary; see `summarise`.

    Raises:
      InputError: results of other settings in the folder, or a batch size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {batch_size}.")
    console = console or Console(stderr=True)
    open_folder(folder, settings)
    path = folder / RESULTS
    done = _read(path)
    left = [case for case in wanted if case not in done]
    final = {(case.task, case.length): case for case in left}
    with _progress(console) as progress:
        bar = progress.add_task("", total=sum(case.length for case in wanted))
        progress.advance(bar, sum(case.length for case in wanted if case in done))
        for batch in _batches(left, batch_size):
            progress.update(bar, description=f"{batch[0].task}, {batch[0].length:,} tokens")
            for case, record in zip(batch, _answer(engine, make, batch), strict=True):
                append_record(path, record)
                done[case] = record
            progress.advance(bar, sum(case.length for case in batch))
            last = batch[-1].task, batch[-1].length
            if not console.is_terminal and final[last] == batch[-1]:
                scores = [done[case]["score"] for case in wanted if (case.task, case.length) == last]
                console.print(
                    f"{last[0]}, {last[1]:,} tokens: {_mean(scores):.3f} over {len(scores)} samples", highlight=False
                )
    summary = summarise([done[case] for case in wanted], settings)
    write_file(folder / SUMMARY, (to_json(summary, indent=2) + "\n").encode())
    return summary


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder for results, or checks that its results have the same settings.

    Args:
      folder: new, empty, or of an earlier run.
      settings: what decides the results, as JSON values. "model" is a name or a path and may change, if "weights", the
        hash of the content, is there and does not.

    Raises:
      InputError: the folder is of something else, or of other settings.
    """
    path = folder / SETTINGS
    if path.is_file():
        changed = differences(read_json(path), dict(settings))
        if "weights" in settings and "weights" not in changed:
            changed.pop("model", None)
        if changed:
            listed = "; ".join(f"{name} was {before!r}, is {now!r}" for name, (before, now) in changed.items())
            raise InputError(
                f"{folder} holds results of other settings: {listed}. Give another folder (--output), or remove it."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds no results of an evaluation. Give another folder (--output).")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, (to_json(dict(settings), indent=2) + "\n").encode())


def summarise(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Mean scores.

    Args:
      records: of `run`.
      settings: that decided them.

    Returns:
      `settings`; `cells`: task, length, depth, mean score and number of samples of each kind; `lengths`: mean score by
      task and length; `tasks`: mean score by task; `errors`: samples that have none, because the model failed.
    """
    cells: dict[tuple[str, int, float | None], list[float | None]] = {}
    for record in records:
        cells.setdefault((record["task"], record["length"], record["depth"]), []).append(record["score"])
    lengths: dict[str, dict[str, list[float | None]]] = {}
    for (task, length, _), scores in cells.items():
        lengths.setdefault(task, {}).setdefault(str(length), []).extend(scores)
    return {
        "settings": dict(settings),
        "cells": [
            {"task": task, "length": length, "depth": depth, "score": _mean(scores), "samples": len(scores)}
            for (task, length, depth), scores in cells.items()
        ],
        "lengths": {task: {n: _mean(scores) for n, scores in of.items()} for task, of in lengths.items()},
        "tasks": {task: _mean([score for scores in of.values() for score in scores]) for task, of in lengths.items()},
        "errors": sum(record["score"] is None for record in records),
    }


def _mean(scores: Sequence[float | None]) -> float:
    """The mean of the scores that there are; NaN if there is none."""
    known = [value for value in scores if value is not None]
    return sum(known) / len(known) if known else math.nan


def _read(path: Path) -> dict[Case, dict[str, Any]]:
    """The records of a file. What a crash has left of a record is removed from the file."""
    if not path.exists():
        return {}
    records = read_records(path, "score", warn=False)
    whole = "".join(to_json(record) + "\n" for record in records).encode()
    if whole != path.read_bytes():
        write_file(path, whole)
    return {Case(r["task"], r["length"], r["depth"], r["sample"]): r for r in records}


def _batches(left: Sequence[Case], batch_size: int | None) -> Iterator[list[Case]]:
    """Neighbours of one task and length."""
    batch: list[Case] = []
    for case in left:
        size = batch_size or max(1, min(_BATCH_ROWS, _BATCH_TOKENS // case.length))
        if batch and (len(batch) >= size or (case.task, case.length) != (batch[0].task, batch[0].length)):
            yield batch
            batch = []
        batch.append(case)
    if batch:
        yield batch


def _answer(engine: Generator, make: Make, batch: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Records of a batch, whose prompts have one length."""
    samples = [make(case) for case in batch]
    new_tokens = samples[0].new_tokens
    completions = engine.generate(
        [sample.prompt for sample in samples], SamplingParams(temperature=0), max_new_tokens=new_tokens
    )
    for case, sample, completion in zip(batch, samples, completions, strict=True):
        answer = completion.text
        if sample.metric == "ids" or answer is None:
            answer = " ".join(map(str, completion.token_ids))
        failed = completion.error is not None
        yield {
            **dataclasses.asdict(case),
            "prompt_tokens": len(sample.prompt),
            "prompt_sha256": hashlib.sha256(np.asarray(sample.prompt, "<i4").tobytes()).hexdigest(),
            "place": sample.place,
            "expected": list(sample.references),
            "output": answer,
            "finish_reason": completion.finish_reason,
            "error": completion.error,
            "score": None if failed else score(sample.metric, answer, sample.references),
        }


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, with the time left, if that is a terminal.

    Args:
      what: is done.
      total: tokens.

    Yields:
      A function that is called with the number of tokens that were done.
    """
    with _progress(Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda tokens: progress.advance(bar, tokens)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
