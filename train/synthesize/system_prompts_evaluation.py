"""How much a model depends on its system prompt: mean and variance of scores over system prompts."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.data.tables import find_tables, read_rows
from train.files import write_file
from train.lock import lock
from train.rewards import close_rewards, load_reward, score
from train.synthesize.context import all_of
from train.synthesize.generator import Generator, GeneratorDownError, Request
from train.synthesize.item import content_key
from train.synthesize.run import ANSWERS, SUMMARY
from train.synthesize.store import KeptGenerator, Store

RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Scores over system prompts.

    Attributes:
      scores: by system prompt, in their order: the mean score of its answers, or None where none has a score.
      mean: of these.
      variance: of these, the population's.
      worst, best: places of the system prompts with the lowest and the highest score.
      spread: mean over questions of the population variance of a question's scores over system prompts: a question that
        is answered under one prompt and not under another counts, even where the means of the prompts are equal.
      missing: answers without a score.
    """

    scores: tuple[float | None, ...]
    mean: float
    variance: float
    worst: int
    best: int
    spread: float
    missing: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return dataclasses.asdict(self)


async def evaluate_system_prompts(
    generator: Generator,
    system_prompts: Sequence[str],
    questions: Sequence[Mapping[str, Any]],
    score_of: Callable[[Mapping[str, Any], str], float | None],
    *,
    max_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
) -> Robustness:
    """Asks all questions under all system prompts.

    Args:
      generator: that is evaluated.
      system_prompts: at least two; "" stands for none.
      questions: each with the field question, and whatever `score_of` needs.
      score_of: of a question and an answer: 1 for right and 0 for wrong, or in between; None for no verdict. An answer
        that was cut or refused has 0.
      max_tokens, temperature: of answers.
      seed: of sampling.

    Raises:
      InputError: too few system prompts, no question, or no score at all.
    """
    if len(system_prompts) < 2 or not questions:
        raise InputError(
            f"Expected at least two system prompts and a question, got {len(system_prompts)} and {len(questions)}."
        )
    if any(not isinstance(question.get("question"), str) for question in questions):
        raise InputError("Expected questions with a text in the field question.")

    async def one(system: str, question: Mapping[str, Any]) -> float | None:
        messages = [{"role": "user", "content": question["question"]}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        number = int(content_key(seed, system, question["question"])[:8], 16) >> 1
        answer = await generator.ask(Request(messages, max_tokens=max_tokens, temperature=temperature, seed=number))
        return 0.0 if answer.refused is not None or answer.finish != "stop" else score_of(question, answer.text)

    found = await all_of([one(system, question) for system in system_prompts for question in questions])
    table = np.array([np.nan if x is None else x for x in found], np.float64).reshape(len(system_prompts), -1)
    return robustness(table)


def robustness(table: np.ndarray) -> Robustness:
    """The numbers of a table of scores.

    Args:
      table: float [system prompts, questions]; NaN where there is no score.

    Raises:
      InputError: no score at all.
    """
    known = ~np.isnan(table)
    if not known.any():
        raise InputError("No answer has a score. Give questions whose answers can be checked.")
    scores = [float(row[mask].mean()) if mask.any() else None for row, mask in zip(table, known, strict=True)]
    rated = {i: score for i, score in enumerate(scores) if score is not None}
    columns = [column[mask] for column, mask in zip(table.T, known.T, strict=True) if mask.sum() > 1]
    return Robustness(
        scores=tuple(scores),
        mean=float(np.mean(list(rated.values()))),
        variance=float(np.var(list(rated.values()))),
        worst=min(rated, key=lambda i: rated[i]),
        best=max(rated, key=lambda i: rated[i]),
        spread=float(np.mean([np.var(column) for column in columns])) if columns else 0.0,
        missing=int((~known).sum()),
    )


def texts_of_files(files: Sequence[str], column: str) -> list[dict[str, Any]]:
    """The records of files, each of which has a text in a column.

    Raises:
      InputError: no such file, no record, or one without the text.
    """
    found = []
    for path in find_tables(files):
        for row in read_rows(path):
            if not isinstance(text := row.values.get(column), str):
                raise InputError(f"{row.where}: expected a text in the column {column}, got {text!r:.80}.")
            found.append(dict(row.values))
    if not found:
        raise InputError(f"The files {', '.join(files)} have no records. Give files with at least one.")
    return found


def evaluate_into(
    folder: Path,
    generator: Generator,
    system_prompts: Sequence[str],
    questions: Sequence[Mapping[str, Any]],
    reward: str,
    **sampling: Any,
) -> dict[str, Any]:
    """Evaluates a model by a reward, and writes what came out. The same call goes on after an interruption.

    Args:
      folder: gets the answers, results.jsonl with the score of each system prompt, and summary.json.
      generator: that is evaluated; it is closed.
      system_prompts: as of `evaluate_system_prompts`.
      questions: the same; other columns than `question` are those that the reward reads.
      reward: its name, or FILE.py:function.
      **sampling: max_tokens, temperature and seed.

    Returns:
      The summary: the numbers of `Robustness` but for the scores, the worst and the best system prompt as texts.

    Raises:
      InputError: as `evaluate_system_prompts`; the model is down, or the reward fails.
    """
    function = load_reward(reward)

    def rate(question: Mapping[str, Any], text: str) -> float | None:
        columns = {name: [value] for name, value in question.items() if name not in ("question", "provenance")}
        value = float(score({reward: function}, [question["question"]], [text], [True], columns)[0, 0])
        return None if value != value else value

    async def evaluate(kept: KeptGenerator) -> Robustness:
        try:
            return await evaluate_system_prompts(kept, system_prompts, questions, rate, **sampling)
        finally:
            await kept.close()

    with lock(folder):
        store = Store(folder / ANSWERS)
        try:
            found = asyncio.run(evaluate(KeptGenerator(generator, store)))
        except GeneratorDownError as error:
            raise InputError(
                f"{error} What was answered is kept in {folder}: run the same command again to go on."
            ) from None
        finally:
            store.close()
            close_rewards([function])
        lines = ({"system_prompt": text, "score": one} for text, one in zip(system_prompts, found.scores, strict=True))
        write_file(folder / RESULTS, "".join(to_json(line) + "\n" for line in lines).encode("utf-8", "surrogatepass"))
        summary = {name: value for name, value in found.to_json().items() if name != "scores"}
        for name in ("worst", "best"):
            place = summary[name]
            summary[name] = {"system_prompt": system_prompts[place], "score": found.scores[place]}
        summary |= {
            "model": generator.model,
            "system_prompts": len(system_prompts),
            "questions": len(questions),
            "reward": reward,
            **sampling,
        }
        write_file(folder / SUMMARY, (to_json(summary, indent=1) + "\n").encode("utf-8", "surrogatepass"))
    return summary
