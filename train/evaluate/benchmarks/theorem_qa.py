"""TheoremQA: questions on theorems, whose answers are numbers, truth values, lists and options."""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.evaluate.benchmarks.answers import MARKERS, AnswerTask
from train.evaluate.benchmarks.lines import Ids, read_records
from train.evaluate.benchmarks.numbers import value_of
from train.evaluate.task import DataFile, Item, Tools
from train.rewards.text import answer_span

_TOLERANCE = 0.04
_TYPES = ("integer", "float", "bool", "option", "list of integer", "list of float")
# Made here: one for each type of answer.
_EXAMPLES = (
    (
        "A group has 15 elements. How many elements does its centre have?",
        "15 = 3 * 5, and 3 does not divide 5 - 1 = 4, so by Sylow's theorems both Sylow subgroups are normal. The "
        "group is cyclic, hence abelian, and its centre is the whole group. The answer is 15.",
    ),
    (
        "A fair die is thrown until a six appears. What is the probability that this takes at most 3 throws?",
        "No six in 3 throws has probability (5/6)^3 = 125/216. The wanted probability is 1 - 125/216 = 91/216, about "
        "0.421. The answer is 0.421.",
    ),
    (
        "Is every continuous real function on the closed interval [2, 7] uniformly continuous?",
        "A closed bounded interval is compact, and by the Heine-Cantor theorem a continuous function on a compact set "
        "is uniformly continuous. The answer is True.",
    ),
    (
        "What are the eigenvalues of the matrix [[2, 1], [1, 2]]? Give a list.",
        "The characteristic polynomial (2 - x)^2 - 1 = (x - 1)(x - 3) has the roots 1 and 3. The answer is [1, 3].",
    ),
    (
        "Which of these series converges? (a) the sum of 1/n; (b) the sum of 1/n^2; (c) the sum of 1. Choose one.",
        "A sum of 1/n^p converges exactly for p > 1. This leaves the sum of 1/n^2. The answer is (b).",
    ),
)


class TheoremQA(AnswerTask):
    """TheoremQA with five solved examples, or as a chat without any."""

    files = (
        DataFile(
            "theorem_qa/theoremqa_test.json",
            source="github.com/wenhuchen/TheoremQA: theoremqa_test.json",
            licence="MIT",
        ),
    )
    citation = "Chen et al. 2023, TheoremQA, arXiv:2305.12524"
    form = "Question: {question}\nAnswer: "
    examples = _EXAMPLES
    stop = ("\nQuestion:",)
    ask = (
        "{question}\n\nReason step by step. Answers are a number, True or False, a list of numbers such as [2, 3], "
        "or an option such as (a). Finish with one line of the form: The answer is X."
    )
    rules = (
        "answer: what follows the last 'The answer is' up to the end of the sentence or line, or the last \\boxed{}\n"
        "integer: the answer rounded is equal; float: within 4 % of the right value; bool: True and Yes, False and No; "
        "option: the letter; list: as many numbers, and after sorting each one by the rule of its type"
    )

    def items(self, files: Mapping[str, Path]) -> Sequence[Item]:
        ids = Ids()
        found = []
        path = files[self.files[0].path]
        for number, (where, record) in enumerate(read_records(path, {"Question": str, "Answer_type": str}), 1):
            kind = record["Answer_type"].strip().lower()
            if kind not in _TYPES:
                raise InputError(
                    f"{where}: the field Answer_type must be one of {', '.join(_TYPES)}; found {kind!r:.40}."
                )
            answer = expected_of(record.get("Answer"), kind)
            if answer is None:
                raise InputError(
                    f"{where}: the field Answer must be of type {kind}, found {record.get('Answer')!r:.80}."
                )
            name = ids.new(where, str(record.get("id") or number))
            fields = {"question": record["Question"].strip(), "answer": answer, "type": kind}
            groups = {"type": kind, "picture": "yes" if record.get("Picture") else "no"}
            if isinstance(record.get("field"), str):
                groups["field"] = record["field"]
            found.append(Item(name, fields, groups))
        return found

    def judge(self, items: Sequence[Item], answers: Sequence[str], tools: Tools) -> Sequence[tuple[float | None, Any]]:
        judged: list[tuple[float | None, Any]] = []
        for item, answer in zip(items, answers, strict=True):
            span = answer_span(answer, MARKERS)
            equal = span is not None and is_equal(span, item.fields["answer"], item.fields["type"])
            judged.append((float(equal), span))
        return judged


def expected_of(answer: Any, kind: str) -> Any:
    """The right answer as a value of its type, from JSON values or their text; None if it has not that type.

    Args:
      answer: of the file.
      kind: one of the types of answers.
    """
    if kind == "option":
        return _option(answer) if isinstance(answer, str) else None
    if isinstance(answer, str):
        text = answer.strip()
        if kind == "bool":
            return _truth(text)
        try:
            answer = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            answer = value_of(text)
    if kind == "bool":
        return bool(answer) if answer in (0, 1) else None
    if kind.startswith("list"):
        whole = isinstance(answer, (list, tuple)) and bool(answer)
        return list(answer) if whole and all(map(_is_number, answer)) else None
    if not _is_number(answer):
        return None
    # A number that is not whole is compared as one, whatever the file calls it.
    return int(answer) if kind == "integer" and answer == int(answer) else float(answer)


def is_equal(found: str, expected: Any, kind: str) -> bool:
    """Whether an answer is the right one, by the rules of TheoremQA.

    Args:
      found: the final answer of a response.
      expected: the right one, from `expected_of`.
      kind: its type.
    """
    if kind == "bool":
        return _truth(found) is expected
    if kind == "option":
        return _option(found) == expected
    if not kind.startswith("list"):
        value = value_of(found)
        return value is not None and _close(value, expected)
    values = _values(found)
    if values is None or len(values) != len(expected):
        return False
    return all(_close(a, b) for a, b in zip(sorted(values), sorted(expected), strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _close(value: float, expected: float) -> bool:
    if isinstance(expected, int):
        return round(value) == expected
    return abs(value - expected) <= _TOLERANCE * abs(expected)


def _truth(text: str) -> bool | None:
    match = re.match(r"\W*(?:\\text\{)?\W*(true|yes|false|no)\b", text, re.IGNORECASE)
    return None if match is None else match[1].lower() in ("true", "yes")


def _option(text: str) -> str | None:
    match = re.match(r"\W*(?:\\text\{)?\W*(?:option\s*)?\(?([a-fA-F])\b\)?", text)
    return None if match is None else f"({match[1].lower()})"


def _values(text: str) -> list[float] | None:
    """The numbers of a list in brackets, parentheses or braces, or without any."""
    text = re.sub(r"\\(?:left|right)", "", text.strip())
    match = re.fullmatch(r"\\?[\[({](.*?)\\?[\])}]", text, re.DOTALL)
    values = [value_of(part) for part in (match[1] if match else text).split(",")]
    return None if None in values else [value for value in values if value is not None]


TASKS = (TheoremQA("theorem_qa"), TheoremQA("theorem_qa_instruct", chat=True))
