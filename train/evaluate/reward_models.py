"""Runs the benchmarks of reward models: scores in packed rows, resumable, with hashes of the data and intervals."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.evaluate.reward_figures import figures, incomplete, item_row, mean_rows, report_table, resampled_means
from train.evaluate.reward_sets import Ranking, RewardSet
from train.evaluate.runner import RESULTS, SUMMARY, open_folder
from train.evaluate.task import Message
from train.files import append_record, read_records, write_file

SCORES, TABLE_FILE = "scores.jsonl", "table.md"

Encode = Callable[[Sequence[Message], str], Sequence[int]]
"""The token ids of a prompt's messages and an answer, with the end that is scored."""

Score = Callable[[Sequence[np.ndarray]], Sequence[float] | np.ndarray]
"""The scores of texts as int32 token ids, such as `qwen_jax.inference.scorer.Scorer.score`."""


def evaluate_rewards(
    sets: Sequence[RewardSet],
    encode: Encode,
    score: Score,
    folder: Path,
    settings: Mapping[str, Any],
    *,
    longest: int,
    draws: int = 1000,
    seed: int = 0,
    group: int = 1024,
    started: Callable[[int], None] = lambda texts: None,
    advance: Callable[[int], None] = lambda texts: None,
) -> dict[str, Any]:
    """Scores all answers of some benchmarks that have no score yet, and writes scores, results, summary and table.

    A text is scored once, however often it occurs. Scores are kept by the hash of the token ids: after an
    interruption, or with more data, the same call goes on.

    Args:
      sets: from `train.evaluate.reward_sets.find_sets`.
      encode: makes the token ids of an answer.
      score: the reward model.
      folder: takes settings.json, scores.jsonl, results.jsonl, summary.json and table.md.
      settings: what decides the scores, as JSON values.
      longest: tokens of a text at most. An item with a longer one has no result, and is counted.
      draws: bootstrap samples for the intervals.
      seed: of these.
      group: texts that are scored before their scores are written.
      started: is called with the number of texts that have no score yet.
      advance: is called with the number of texts that were scored.

    Returns:
      The summary: `settings`; `benchmarks`, for each: `figures` (value, the interval of 95% from low to high,
      incomplete: why it is not the published figure, or ""), `parts` (value and items), `files` (sha256, bytes,
      items), `missing`, `items`, `too_long`, `pairs` and `ties`; `missing`, of benchmarks without any file.

    Raises:
      InputError: no data, data that has not the form of its benchmark, or results of other settings in the folder.
    """
    if not any(of.files for of in sets):
        wanted = "".join(f"\n  {line}" for of in sets for line in of.missing)
        raise InputError(f"No data of a reward benchmark was found. Expected some of these:{wanted}")
    if draws < 2 or group < 1:
        raise InputError(f"Expected at least 2 bootstrap samples, got {draws}.")
    open_folder(folder, settings)
    known = _read_scores(folder / SCORES)
    # All texts are read before any is scored: bad data is found first.
    waiting: dict[str, np.ndarray] = {}
    items: dict[str, list[_Item]] = {}
    files: dict[str, dict[str, Any]] = {}
    for of in sets:
        items[of.name], files[of.name] = _read(of, encode, longest, known, waiting)
    # Scores, some texts at a time.
    started(len(waiting))
    texts = list(waiting.items())
    for start in range(0, len(texts), group):
        part = texts[start : start + group]
        for (name, ids), value in zip(part, score([ids for _, ids in part]), strict=True):
            known[name] = float(value)
            append_record(folder / SCORES, {"text": name, "tokens": len(ids), "score": known[name]})
        advance(len(part))
    # Results.
    benchmarks, records = {}, []
    for of in sets:
        if of.files:
            records += [item.record(of.name, known) for item in items[of.name]]
            benchmarks[of.name] = {
                **_summarise(of.name, items[of.name], known, draws, seed),
                "files": files[of.name],
                "missing": list(of.missing),
            }
    missing = {of.name: list(of.missing) for of in sets if not of.files}
    summary = {
        "settings": dict(settings),
        "benchmarks": benchmarks,
        "missing": missing,
        "bootstrap": {"draws": draws, "seed": seed},
    }
    write_file(folder / RESULTS, "".join(to_json(record) + "\n" for record in records).encode())
    write_file(folder / SUMMARY, (to_json(summary, indent=2) + "\n").encode())
    table = report_table({str(settings.get("model", "model")): summary})
    write_file(folder / TABLE_FILE, table.encode())
    return summary


@dataclasses.dataclass(frozen=True)
class _Item:
    """An item with the hashes of its texts, in place of the texts.

    Attributes:
      ranking: without prompt and answers.
      texts: hash of each answer's token ids.
      problem: why the item has no result; None if it has one.
    """

    ranking: Ranking
    texts: tuple[str, ...]
    problem: str | None

    def scores(self, known: Mapping[str, float]) -> list[float]:
        return [known[text] for text in self.texts]

    def record(self, benchmark: str, known: Mapping[str, float]) -> dict[str, Any]:
        """The line of results.jsonl."""
        scores = None if self.problem else self.scores(known)
        won = None if scores is None else [scores[better] > scores[worse] for better, worse in self.ranking.pairs]
        share = None if won is None or not won else sum(won) / len(won) if self.ranking.right else float(all(won))
        return {
            "benchmark": benchmark,
            "id": self.ranking.id,
            "part": self.ranking.part,
            "scores": scores,
            "score": share,
            "problem": self.problem,
        }


def _read(
    of: RewardSet, encode: Encode, longest: int, known: Mapping[str, float], waiting: dict[str, np.ndarray]
) -> tuple[list[_Item], dict[str, Any]]:
    """The items of a benchmark, and what its files are; texts without a score are added to those that wait."""
    items: list[_Item] = []
    files: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    names = collections.Counter[str]()
    for path in of.files:
        before = len(items)
        for ranking in of.read(path):
            # What the part's figures are computed from has one number of answers.
            if ranking.right and sizes.setdefault(ranking.part, len(ranking.right)) != len(ranking.right):
                raise InputError(
                    f"{path}: {ranking.id} has {len(ranking.right)} responses, others of {ranking.part} have "
                    f"{sizes[ranking.part]}. Expected as many for each prompt."
                )
            # Published files may name two items alike.
            names[ranking.id] += 1
            if names[ranking.id] > 1:
                ranking = dataclasses.replace(ranking, id=f"{ranking.id}#{names[ranking.id]}")
            try:
                texts = [np.asarray(encode(ranking.prompt, answer), np.int32) for answer in ranking.answers]
            except InputError as error:
                raise InputError(f"{path}, {ranking.id}: {error}") from None
            most = max(map(len, texts))
            problem = f"{most} tokens, the model's context has {longest}" if most > longest else None
            hashes = tuple(hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:32] for ids in texts)
            if problem is None:
                waiting.update((h, ids) for h, ids in zip(hashes, texts, strict=True) if h not in known)
            items.append(_Item(dataclasses.replace(ranking, prompt=(), answers=()), hashes, problem))
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        files[str(path)] = {"sha256": sha256, "bytes": path.stat().st_size, "items": len(items) - before}
    return items, files


def _summarise(
    benchmark: str,
    items: Sequence[_Item],
    known: Mapping[str, float],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Figures with intervals, parts, and what has no result."""
    rows: dict[str, list[np.ndarray]] = {}
    ties = pairs = 0
    for item in items:
        if item.problem is None:
            scores = item.scores(known)
            rows.setdefault(item.ranking.part, []).append(item_row(item.ranking, scores))
            pairs += len(item.ranking.pairs)
            ties += sum(scores[better] == scores[worse] for better, worse in item.ranking.pairs)
    parts = {part: np.stack(of) for part, of in rows.items()}
    counts = {part: len(of) for part, of in parts.items()}
    found = figures(benchmark, {part: mean_rows(of) for part, of in parts.items()}, counts)
    resampled = {part: resampled_means(of, draws, seed, f"{benchmark}/{part}") for part, of in parts.items()}
    drawn = figures(benchmark, resampled, counts)
    why = incomplete(benchmark, counts)

    def interval(name: str) -> dict[str, float]:
        values = drawn[name][~np.isnan(drawn[name])]
        low, high = np.quantile(values, (0.025, 0.975)) if len(values) else (np.nan, np.nan)
        return {"low": float(low), "high": float(high)}

    return {
        "figures": {
            name: {"value": float(value), **interval(name), "incomplete": why.get(name, "")}
            for name, value in found.items()
        },
        "parts": {
            # Items with right and wrong answers count pairs that are right, and pairs.
            part: {"value": float(of[:, 0].sum() / (of[:, 1].sum() if of.shape[1] > 1 else len(of))), "items": len(of)}
            for part, of in parts.items()
        },
        "items": len(items),
        "too_long": sum(item.problem is not None for item in items),
        "pairs": pairs,
        "ties": ties,
    }


def _read_scores(path: Path) -> dict[str, float]:
    """Scores of an earlier run, by the hash of the text."""
    records = read_records(path, "score", warn=False) if path.exists() else []
    return {r["text"]: r["score"] for r in records if isinstance(r["score"], (int, float)) and "text" in r}
