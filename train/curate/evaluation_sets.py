"""Evaluation sets that training data must not contain: which words of each record are looked for."""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from train.data.tables import Row, find_tables, read_rows
from train.data.words import split, texts_of

GRAM = 13
"""The least number of words that training data must share with a test item."""

QUESTIONS = ("question", "problem", "prompt", "instruction", "query", "input", "messages", "text")
ANSWERS = ("answer", "target", "solution", "canonical_solution", "output", "response", "completion", "label")
_CHOICES = ("choices", "options", "endings")
_ONE_CHOICE = ("A", "B", "C", "D", "E", "F")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of fewer than `GRAM` words, which is known by all its words and by its answer.

    Attributes:
      item: number of its item.
      words: hashes of its words, uint64.
      answer: hashes of the words of its answer, uint64; none if it has no answer.
    """

    item: int
    words: np.ndarray
    answer: np.ndarray


@dataclasses.dataclass
class Items:
    """The items of evaluation sets.

    Attributes:
      names: of the sets, in their order.
      owner: number of the set of each item.
      places: file and record of each item.
      texts: of each item, for people.
      sequences: hashes of words that are looked for, uint64, each of at least `GRAM`.
      sequence_items: number of the item of each sequence.
      questions: shorter items.
      empty: for each set, the number of records with words neither in the question nor in a long answer.
    """

    names: list[str] = dataclasses.field(default_factory=list)
    owner: list[int] = dataclasses.field(default_factory=list)
    places: list[str] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)
    sequences: list[np.ndarray] = dataclasses.field(default_factory=list)
    sequence_items: list[int] = dataclasses.field(default_factory=list)
    questions: list[Question] = dataclasses.field(default_factory=list)
    empty: Counter[str] = dataclasses.field(default_factory=Counter)


def find_sets(against: Sequence[str]) -> list[tuple[str, list[Path]]]:
    """The files of evaluation sets, by the name of the set.

    Args:
      against: each NAME=FILE, or FILE, whose name without extension is then that of the set. A file is JSON lines, JSON
        or Parquet, or a pattern of them, or a folder, which is one set. A name may come again with another file.

    Raises:
      InputError: no name, no file, no such file.
    """
    found: dict[str, dict[Path, None]] = {}
    for given in against:
        name, equals, file = given.partition("=")
        if not equals:
            name, file = "", given
        if not file.strip() or (equals and not name.strip()):
            raise InputError(f"Expected an evaluation set as NAME=FILE or FILE, got {given!r}.")
        for path in find_tables([file]):
            own = Path(file).name if Path(file).is_dir() else path.name.partition(".")[0]
            found.setdefault(name.strip() or own, {})[path] = None
    return [(name, list(paths)) for name, paths in found.items()]


def digest_of(sets: Sequence[tuple[str, Sequence[Path]]]) -> list[list[str]]:
    """The name of each set, and the SHA-256 of each of its files."""
    return [[name, *(_sha256(path) for path in paths)] for name, paths in sets]


def read_items(
    sets: Sequence[tuple[str, Sequence[Path]]], question: Sequence[str] = (), answer: Sequence[str] = ()
) -> Items:
    """Reads evaluation sets.

    What is looked for of a record: the question, the question with its choices, and a worked answer, each if it has at
    least `GRAM` words. If neither form of the question has so many words, question and answer are looked for together;
    if they have fewer than `GRAM` words too, they must be there word for word. An answer that is the number or letter
    of a choice stands for that choice. Of a conversation the last message is the question.

    Args:
      sets: from `find_sets`.
      question: columns of the question, of which the first that a record has counts; by default `QUESTIONS`.
      answer: columns of the answer, in the same way; by default `ANSWERS`.

    Raises:
      InputError: a file cannot be read, a record has no question, or a set has no words.
    """
    items = Items()
    for name, paths in sets:
        number, before = len(items.names), len(items.owner)
        items.names.append(name)
        for path in paths:
            rows = read_rows(path)
            # Words of many records are split together.
            while batch := [_parts(row, question, answer) for row in itertools.islice(rows, 512)]:
                found = split(
                    [text for part in batch for text in (part.question, "\n".join(part.choices), part.answer)]
                )
                for at, part in enumerate(batch):
                    edges = found.bounds[3 * at : 3 * at + 4]
                    hashes = [found.hashes[begin:end] for begin, end in itertools.pairwise(edges)]
                    items.empty[name] += not _add(items, part, hashes, number)
        if len(items.owner) == before:
            raise InputError(
                f"{', '.join(map(str, paths)) or name} has no record with words. Give a file of the evaluation set "
                f"{name}, and name the column of its questions with --question."
            )
    return items


@dataclasses.dataclass(frozen=True)
class _Parts:
    where: str
    question: str
    choices: list[str]
    answer: str
    worked: bool  # Whether the answer is a text of its own, not a choice.


def _parts(row: Row, question: Sequence[str], answer: Sequence[str]) -> _Parts:
    asked = next((column for column in question or QUESTIONS if column in row.values), None)
    if asked is None:
        raise InputError(
            f"{row.where} has no question: expected a column {', '.join(question or QUESTIONS)}, got "
            f"{', '.join(sorted(row.values)[:12]) or 'none'}. Name it with --question."
        )
    answered = next((c for c in answer or ANSWERS if c in row.values and c != asked), None)
    text = (list(texts_of(row.values[asked])) or [""])[-1]
    choices = _choices(row.values)
    solution, worked = _answer(row.values[answered], choices) if answered else ("", False)
    return _Parts(row.where, text, choices, solution, worked)


def _add(items: Items, part: _Parts, hashes: Sequence[np.ndarray], number: int) -> bool:
    """Adds a record by the words of its question, choices and answer; false if nothing of it can be looked for."""
    alone, offered, solution = hashes
    with_choices, with_answer = np.concatenate([alone, offered]), np.concatenate([alone, solution])
    sequences = [alone, *([with_choices] if len(offered) else []), *([solution] if part.worked else [])]
    if max(len(alone), len(with_choices)) < GRAM:
        sequences.append(with_answer)
    sequences = [sequence for sequence in sequences if len(sequence) >= GRAM]
    item = len(items.owner)
    if not sequences:
        if not len(alone):
            return False
        items.questions.append(Question(item, alone, solution))
    items.sequences += sequences
    items.sequence_items += [item] * len(sequences)
    items.owner.append(number)
    items.places.append(part.where)
    items.texts.append("\n".join(text for text in (part.question, *part.choices, part.answer) if text))
    return True


def _choices(record: Mapping[str, Any]) -> list[str]:
    for column in _CHOICES:
        value = record.get(column)
        if isinstance(value, Mapping):
            value = value.get("text", list(value.values()))
        if isinstance(value, list | tuple) and value:
            return list(texts_of(value))
    return [text for column in _ONE_CHOICE for text in texts_of(record.get(column))]


def _answer(value: object, choices: Sequence[str]) -> tuple[str, bool]:
    """The text of an answer, of a list the first, of a number or letter of a choice the choice; whether it is none."""
    text = next(texts_of(value), "")
    at = -1
    if isinstance(value, int) and not isinstance(value, bool):
        at = value
    elif len(text.strip()) == 1 and text.strip() in _ONE_CHOICE:
        at = _ONE_CHOICE.index(text.strip())
    text = choices[at] if 0 <= at < len(choices) else text
    return text, text not in choices


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
