"""Arena-Hard: a judge compares answers with those of a baseline (Li et al. 2024, arXiv:2406.11939)."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from train.data.tables import read_rows
from train.evaluate.benchmarks import judges
from train.evaluate.benchmarks.recorded import id_of, read_answers
from train.evaluate.task import DataFile, Generate, Item, Metric, Response, Task, Tools, Verdict

_SOURCE = "https://github.com/lmarena/arena-hard-auto"
_HEAD = "You are a fair judge of two assistants' answers to a user. "
_SOLVE = "First write the answer that you would give, and compare both answers with it. "
_TASK = (
    "Are they right, helpful, relevant and concise, and does anything important lack? "
    "Their order and their length must not decide. End with one of these verdicts: [[A>>B]] if assistant A is much "
    "better, [[A>B]] if it is a little better, [[A=B]] if both are equal, [[B>A]] or [[B>>A]] if assistant B is."
)
# Judges also turn verdicts round: A<<B is B>>A.
_VERDICT = re.compile(r"\[\[(A(?:>>|>|=|<<|<)B|B(?:>>|>|=|<<|<)A)\]\]", re.IGNORECASE)
# The score of the first one and the weight of a verdict: as published, a clear one counts three times.
_GAMES = {">>": (1.0, 3), ">": (1.0, 1), "=": (0.5, 1), "<": (0.0, 1), "<<": (0.0, 3)}
# Headings, items of lists and bold words, as published; what stands in fenced code is none of them.
_MARKDOWN = (r"^#{1,6}\s", r"^\s*(?:[-*+]|\d+\.)\s", r"\*\*[^*\n]+\*\*|__[^_\n]+__")
_CODE = re.compile(r"```[^`]*```")
# The published control counts tokens of GPT-4o. Style is divided by its deviation, so that the unit changes little.
_CHARACTERS_OF_A_TOKEN = 4


def win_rate(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of games that the model wins, ties as halves, clear verdicts three times.

    With two players this is the win rate of the Bradley-Terry model that is fitted to these games.

    Args:
      items: `games` of each: score of the model and weight.
    """
    games = np.asarray([game for item in items for game in item["games"]], np.float64)
    return float(np.average(games[:, 0], weights=games[:, 1]))


def controlled_win_rate(items: Sequence[Mapping[str, Any]]) -> float:
    """The win rate that is left when style is held equal: the published style control.

    A Bradley-Terry model of the games whose odds also depend on the differences of style, each divided by its standard
    deviation over the games; then the rate at no difference. Fitted by the weighted log-likelihood, in which a tie is
    half a win. The published program subtracts the mean over the games of all models of its table first. Of one model
    alone this would be the model's own style, so nothing is subtracted here.

    Args:
      items: `games` as for `win_rate`, and `style`: the differences.
    """
    rows = [(score, weight, item["style"]) for item in items for score, weight in item["games"]]
    y, w = np.asarray([row[0] for row in rows]), np.asarray([row[1] for row in rows], np.float64)
    style = np.asarray([row[2] for row in rows], np.float64)
    mean = np.average(style, axis=0, weights=w)
    spread = np.sqrt(np.average((style - mean) ** 2, axis=0, weights=w))
    x = np.concatenate([np.ones((len(y), 1)), style / np.where(spread > 0, spread, 1)], axis=1)
    # So small that it changes nothing, but where style or the player decides all games and the optimum is infinite.
    penalty = 1e-6 * np.eye(x.shape[1])
    b = np.zeros(x.shape[1])
    # Newton's method on a convex loss.
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ b, -30, 30)))
        gradient = x.T @ (w * (p - y)) + penalty @ b
        step = np.linalg.solve((x * (w * p * (1 - p))[:, None]).T @ x + penalty, gradient)
        b = b - step * min(1.0, 5 / max(float(np.abs(step).max()), 1e-12))
        if float(np.abs(step).max()) < 1e-10:
            break
    return 1 / (1 + math.exp(-float(np.clip(b[0], -30, 30))))


class ArenaHard(Task):
    """The share of games that the model wins against the baseline, in percent, with and without control of style."""

    version = 3
    citation = "arXiv:2406.11939"
    needs_judge = True
    metrics = (
        Metric("win_rate", aggregate=win_rate, of_details=True),
        Metric("win_rate_same_style", aggregate=controlled_win_rate, of_details=True),
    )

    def __init__(self, name: str, folder: str, baseline: str, category: str = "", solves: bool = True):
        """
        Args:
          name: of the task.
          folder: below the data root.
          baseline: the model whose answers are in model_answer/BASELINE.jsonl.
          category: of version 2, whose categories have baselines of their own; "" for all questions.
          solves: whether the judge writes an answer of its own first.
        """
        self.name, self.baseline, self.category = name, baseline, category
        self.instruction = _HEAD + (_SOLVE if solves else "") + _TASK
        self.questions = DataFile(f"{folder}/question.jsonl", source=_SOURCE, licence="Apache-2.0")
        self.answers = DataFile(f"{folder}/model_answer/{baseline}.jsonl", source=_SOURCE, licence="Apache-2.0")
        self.files = (self.questions, self.answers)

    def template(self) -> str:
        """See `Task.template`."""
        prompt = self._prompt("{question}", "{a}", "{b}")
        return f"{prompt}\n---\nboth orders; the last [[verdict]]; baseline {self.baseline}"

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        """See `Task.items`. Reads the forms of version 0.1 (turns, choices) and version 2 (prompt, messages)."""
        answers = read_answers(files[self.answers.path])
        found = []
        for row in read_rows(files[self.questions.path]):
            values, id = row.values, id_of(row.values)
            turns = values.get("turns")
            first = turns[0] if isinstance(turns, list) and turns else values.get("prompt")
            question = first.get("content") if isinstance(first, dict) else first
            if self.category and values.get("category") != self.category:
                continue
            if id is None or not isinstance(question, str):
                raise InputError(f"{row.where}: expected question_id or uid, and a text in turns or prompt.")
            if id not in answers:
                raise InputError(f"{row.where}: {files[self.answers.path]} has no answer to the question {id}.")
            groups = {"category": str(values.get("cluster") or values.get("subcategory") or values.get("category"))}
            found.append(Item(id, {"question": question, "baseline": answers[id][0]}, groups))
        return found

    def requests(self, item: Item, rounds: Sequence[Sequence[Response]]) -> Sequence[Generate]:
        """See `Task.requests`."""
        return () if rounds else (Generate(({"role": "user", "content": item.fields["question"]},), 4096),)

    def score(
        self, items: Sequence[Item], responses: Sequence[Sequence[Sequence[Response]]], tools: Tools
    ) -> Sequence[Verdict]:
        """See `Task.score`. An item needs both of its games."""
        prompts = []
        for item, ((response,),) in zip(items, responses, strict=True):
            question, other = item.fields["question"], item.fields["baseline"]
            prompts += [self._prompt(question, other, response.text), self._prompt(question, response.text, other)]
        answers = judges.ask(tools, prompts, max_tokens=4096)
        verdicts = []
        for item, ((response,),), first, second in zip(items, responses, answers[::2], answers[1::2], strict=True):
            (one, why), (two, why_2) = game(first), game(second)
            if one is None or two is None:
                scores = dict.fromkeys((metric.name for metric in self.metrics), None)
                verdicts.append(Verdict(scores, {"judge": [first.text, second.text]}, why or why_2))
                continue
            # In the first game the baseline was assistant A.
            games = [(1 - one[0], one[1]), two]
            details = {"games": games, "style": style(response.text, item.fields["baseline"])}
            rate = win_rate([details])
            judged = {metric.name: details for metric in self.metrics} | {"judge": [first.text, second.text]}
            verdicts.append(Verdict(dict.fromkeys((metric.name for metric in self.metrics), rate), judged))
        return verdicts

    def _prompt(self, question: str, a: str, b: str) -> str:
        return (
            f"{self.instruction}\n\n<question>\n{question}\n</question>\n<assistant_A>\n{a}\n</assistant_A>\n"
            f"<assistant_B>\n{b}\n</assistant_B>"
        )


def game(response: Response) -> tuple[tuple[float, int] | None, str | None]:
    """The score of assistant A and its weight by the last verdict of a judge, or None and why there is none."""
    if response.error is not None:
        return None, f"the judge failed: {response.error}"
    found = _VERDICT.findall(response.text)
    if not found:
        return None, "the judge gave no [[verdict]]"
    verdict = found[-1].upper()
    score, weight = _GAMES[verdict[1:-1]]
    return (score if verdict[0] == "A" else 1 - score, weight), None


def style(a: str, b: str) -> list[float]:
    """The published differences of style of two texts: length, headings, items of lists, bold words.

    Of lengths in tokens (x - y) / (x + y); of the others, divided by the tokens and one more, (x - y) / (x + y + 1). A
    token is four characters.
    """
    (length, *here), (other, *there) = _counts(a), _counts(b)
    found = [(length - other) / (length + other) if length + other else 0.0]
    for x, y in zip(here, there, strict=True):
        x, y = x / (length + 1), y / (other + 1)
        found.append((x - y) / (x + y + 1))
    return found


def _counts(text: str) -> list[float]:
    """Tokens, headings, items of lists and bold words."""
    plain = _CODE.sub("", text)
    marks = [len(re.findall(pattern, plain, re.MULTILINE)) for pattern in _MARKDOWN]
    return [len(text) / _CHARACTERS_OF_A_TOKEN, *map(float, marks)]


TASKS = (
    ArenaHard("arena_hard", "arena_hard/v0.1", "gpt-4-0314"),
    ArenaHard("arena_hard_v2", "arena_hard/v2.0", "o3-mini-2025-01-31", "hard_prompt"),
    ArenaHard("arena_hard_v2_creative", "arena_hard/v2.0", "gemini-2.0-flash-001", "creative_writing", solves=False),
)
