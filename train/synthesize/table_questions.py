"""Random queries with their answers, in words; and statements that a table supports, refutes, or leaves open."""

import dataclasses
import random
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

from train.synthesize.tables import ORDERS, Step, Table, Value, answer, exact, is_number, plain

Verdict = Literal["supported", "refuted", "not enough information"]
VERDICTS: tuple[Verdict, ...] = ("supported", "refuted", "not enough information")

KINDS = ("lookup", "filter", "count", "aggregate", "extreme", "place", "compare", "distinct", "group")
# Texts of several parts could not be told apart in a list.
_LISTED = re.compile(r"(?!.*\band\b)[^,;&\n]+")
_MOST_LISTED = 5
_WORDS = {
    "=": "is {value}", "!=": "is not {value}", ">": "is greater than {value}", "<": "is less than {value}",
    ">=": "is at least {value}", "<=": "is at most {value}",
}  # fmt: skip
_REDUCED = {
    "sum": "sum", "mean": "mean", "max": "highest", "min": "lowest",
    "range": "difference between the highest and the lowest",
}  # fmt: skip
_OTHER_COLUMNS = (
    "Year of the last inspection", "Favourite season", "Insurance number", "Number of visitors", "Founding date",
    "Preferred language", "Distance to the coast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Question:
    """A query with its answer.

    Attributes:
      kind: one of `KINDS`.
      steps: see `train.synthesize.tables.answer`.
      text: in words.
      needed: what any wording must mention: columns and values.
      answer: that the query has.
    """

    kind: str
    steps: tuple[Step, ...]
    text: str
    needed: tuple[str, ...]
    answer: Value


@dataclasses.dataclass(frozen=True)
class Statement:
    """What may be said of a table.

    Attributes:
      text: in words.
      needed: what any wording must mention.
      verdict: what the table says of it.
    """

    text: str
    needed: tuple[str, ...]
    verdict: Verdict


def draw_question(table: Table, rng: random.Random, tries: int = 50) -> Question | None:
    """A random question that the table answers; None if none was found."""
    numbers = [name for name in table.columns if table.is_numeric(name)]
    keys = [name for name in table.columns if table.is_key(name)]
    texts = [
        name
        for name in table.columns
        if name not in keys and all(isinstance(cell, str) and cell for cell in table.column(name))
    ]
    for _ in range(tries):
        kind = rng.choice(KINDS)
        drawn = _draw(kind, table, rng, numbers, texts, keys)
        if drawn is None:
            continue
        steps, text, needed = drawn
        found = answer(table, steps)
        if found is None or found == "" or (isinstance(found, list) and not _can_be_listed(found)):
            continue
        return Question(kind, tuple(steps), text, tuple(dict.fromkeys(needed)), found)
    return None


def _can_be_listed(texts: Sequence[str]) -> bool:
    return 1 < len(texts) <= _MOST_LISTED and all(_LISTED.fullmatch(text) for text in texts)


def _draw(
    kind: str, table: Table, rng: random.Random, numbers: list[str], texts: list[str], keys: list[str]
) -> tuple[list[Step], str, list[str]] | None:
    """Steps, their words, and what these have to mention; None where the table has no columns for this kind."""
    if kind in ("count", "aggregate", "filter"):
        return _of_some_rows(kind, table, rng, numbers, texts, keys)
    if kind in ("distinct", "group"):
        return _of_groups(kind, rng, numbers, texts)
    if not keys:
        return None
    key = rng.choice(keys)
    if kind == "lookup":
        columns = [name for name in table.columns if name != key]
        if not columns:
            return None
        column, name = rng.choice(columns), str(rng.choice(table.column(key)))
        text = f'What is the {column} of the row whose {key} is "{name}"?'
        return [["filter", key, "=", name], ["value", column]], text, [column, name]
    if not numbers:
        return None
    column = rng.choice(numbers)
    direction, word = rng.choice((("descending", "highest"), ("ascending", "lowest")))
    if kind == "extreme":
        where, said, needed = _maybe_condition(table, rng, [name for name in numbers if name != column], texts)
        text = f"Which {key} has the {word} {column}{said}?"
        return [*where, ["sort", column, direction], ["take", 1], ["value", key]], text, [key, column, *needed]
    if kind == "place":
        count = rng.randint(2, 3)
        text = f"Which {count} rows have the {word} {column}? Give their {key}."
        return [["sort", column, direction], ["take", count], ["values", key]], text, [key, column, str(count)]
    first, second = rng.sample(table.column(key), 2)
    word = "higher" if direction == "descending" else "lower"
    steps: list[Step] = [
        ["filter", key, "in", [first, second]],
        ["sort", column, direction],
        ["take", 1],
        ["value", key],
    ]
    return steps, f'Which has the {word} {column}: "{first}" or "{second}"?', [column, str(first), str(second)]


def _of_some_rows(
    kind: str, table: Table, rng: random.Random, numbers: list[str], texts: list[str], keys: list[str]
) -> tuple[list[Step], str, list[str]] | None:
    """A count, a list or a number of the rows that meet a condition."""
    if kind == "aggregate":
        if not numbers:
            return None
        column, name = rng.choice(numbers), rng.choice(list(_REDUCED))
        where, said, needed = _maybe_condition(table, rng, [one for one in numbers if one != column], texts)
        rounded = " Round it to two decimals." if name == "mean" else ""
        text = f"What is the {_REDUCED[name]} of {column}{said or ' over all rows'}?{rounded}"
        if name in ("max", "min"):
            text = f"What is the {_REDUCED[name]} {column}{said or ' in the table'}?"
        return [*where, [name, column]], text, [column, *needed]
    condition = _condition(table, rng, numbers, texts)
    if condition is None:
        return None
    step, said, needed = condition
    if kind == "count":
        return [step, ["count"]], f"How many rows are there in which {said}?", needed
    if not keys:
        return None
    key = rng.choice(keys)
    return [step, ["values", key]], f"List the {key} of all rows in which {said}.", [key, *needed]


def _of_groups(
    kind: str, rng: random.Random, numbers: list[str], texts: list[str]
) -> tuple[list[Step], str, list[str]] | None:
    """A number of different texts, or the text with the largest sum or the most rows."""
    if not texts:
        return None
    column = rng.choice(texts)
    if kind == "distinct":
        return [["distinct", column]], f"How many different values are there in the column {column}?", [column]
    if numbers and rng.random() < 0.6:
        by = rng.choice(numbers)
        return [["top", column, by]], f"Which {column} has the highest sum of {by} over its rows?", [column, by]
    return [["most", column]], f"Which {column} is in the largest number of rows?", [column]


def _condition(
    table: Table, rng: random.Random, numbers: list[str], texts: list[str]
) -> tuple[Step, str, list[str]] | None:
    """A filter, its words, and what these have to mention."""
    if not numbers and not texts:
        return None
    column = rng.choice(numbers + texts)
    value = rng.choice(table.column(column))
    comparison = rng.choice(ORDERS) if column in numbers else rng.choice(("=", "=", "!="))
    shown = plain(exact(value)) if is_number(value) else f'"{value}"'
    said = f"{column} {_WORDS[comparison].format(value=shown)}"
    return ["filter", column, comparison, value], said, [column, shown.strip('"')]


def _maybe_condition(
    table: Table, rng: random.Random, numbers: list[str], texts: list[str]
) -> tuple[list[Step], str, list[str]]:
    found = _condition(table, rng, numbers, texts) if rng.random() < 0.5 else None
    if found is None:
        return [], "", []
    step, said, needed = found
    return [step], f" among the rows in which {said}", needed


# --- statements ---


def draw_statement(table: Table, rng: random.Random, tries: int = 50) -> Statement | None:
    """A random statement that the table supports, refutes or leaves open; None if none was found."""
    verdict = rng.choice(VERDICTS)
    keys = [name for name in table.columns if table.is_key(name)]
    if verdict == "not enough information":
        if not keys:
            return None
        key = rng.choice(keys)
        known = {name.casefold() for name in table.columns}
        column = rng.choice([name for name in _OTHER_COLUMNS if name.casefold() not in known])
        first, second = (str(cell) for cell in rng.sample(table.column(key), 2)) if len(table.rows) > 1 else ("", "")
        if not first or not second:
            return None
        text = f'The {column} of the row whose {key} is "{first}" is not the same as that of "{second}".'
        return Statement(text, (column, first, second), verdict)
    for _ in range(tries):
        question = draw_question(table, rng)
        if question is None:
            return None
        value: Value | None = question.answer
        if verdict == "refuted":
            value = _another(question, table, rng)
        said = None if value is None or isinstance(value, list) else statement_of(question, value)
        if said is not None:
            shown = plain(value) if isinstance(value, Decimal) else str(value)
            return Statement(said, (*question.needed, shown), verdict)
    return None


def statement_of(question: Question, value: Value) -> str | None:
    """The statement that a question has this answer; None for questions for which there are no words."""
    shown = plain(value) if isinstance(value, Decimal) else f'"{value}"'
    text = question.text.rstrip("?")
    if text.startswith("What is the ") and text.endswith(" Round it to two decimals."):
        text = text.removesuffix(" Round it to two decimals.").rstrip("?") + ", rounded to two decimals,"
    if text.startswith("What is the "):
        return f"The {text.removeprefix('What is the ')} is {shown}."
    if text.startswith("How many rows are there in which "):
        return f"The number of rows in which {text.removeprefix('How many rows are there in which ')} is {shown}."
    if text.startswith("How many different values are there in "):
        where = text.removeprefix("How many different values are there in ")
        return f"The number of different values in {where} is {shown}."
    if question.kind in ("extreme", "group") and (found := re.fullmatch(r"Which (.+?) (has|is in) (the .+)", text)):
        return f"The {found[1]} that {found[2]} {found[3]} is {shown}."
    return None


def _another(question: Question, table: Table, rng: random.Random) -> Value | None:
    """A wrong answer of the same kind; None if there is none."""
    right = question.answer
    if isinstance(right, list):
        return None
    if isinstance(right, Decimal):
        numbers = {exact(c) for row in table.rows for c in row if is_number(c)} if question.kind == "lookup" else set()
        changed = [right + right.scaleb(-1).quantize(Decimal(1)) + 1, right - 1, right + 1, right + 2]
        others = [n for n in (*sorted(numbers), *changed) if n != right and n >= 0]
        return rng.choice(others) if others else None
    columns = [table.column(name) for name in table.columns if right in table.column(name)]
    texts = sorted({cell for cells in columns for cell in cells if isinstance(cell, str) and cell != right})
    return rng.choice(texts) if texts else None


# --- wordings ---

# Words that turn a question round. A wording must have none of a side of which the question has only the other.
_SIDES = tuple(
    (set(first.split()), set(second.split()))
    for first, second in (
        ("highest most largest greatest maximum biggest top", "lowest least smallest minimum fewest bottom"),
        ("more greater higher above larger over exceeds exceeding", "less lower below fewer under smaller"),
    )
)
_NEGATIONS = set("not isn't isn\u2019t doesn't doesn\u2019t except excluding without other no".split())
_LIMITS = ("at least", "at most")


def wording_fault(text: str, plain_text: str, needed: Sequence[str], answer: Value | None) -> str | None:
    """Why a question or statement in other words may not be the same one, in a few words; None if nothing is seen.

    Every column and value must be there, with no other numbers, and no word for the other direction ("lowest" for
    "highest"). The answer must not be there where the question itself does not have it. A change of meaning that uses
    the same columns, numbers and directions is not seen.

    Args:
      text: the wording.
      plain_text: as code says it.
      needed: columns and values to mention.
      answer: that must not be given away; None if there is none.
    """
    lower, before = text.casefold(), plain_text.casefold()
    if any(not _has(lower, one.casefold()) for one in needed):
        return "a column or value is missing"
    if sorted(_numbers(text)) != sorted(_numbers(plain_text)):
        return "other numbers"
    words, old = set(re.findall(r"[\w'\u2019]+", lower)), set(re.findall(r"[\w'\u2019]+", before))
    named = {word for one in needed for word in re.findall(r"\w+", one.casefold())}
    for first, second in (*_SIDES, *((b, a) for a, b in _SIDES)):
        if (words - named) & second and old & first and not old & second:
            return "another direction"
    # Negation must neither come nor go.
    if bool((words - named) & _NEGATIONS) != bool((old - named) & _NEGATIONS):
        return "another direction"
    if any((limit in lower) and limit not in before for limit in _LIMITS):
        return "another direction"
    for one in answer if isinstance(answer, list) else [] if answer is None else [answer]:
        shown = (plain(one) if isinstance(one, Decimal) else one).casefold()
        if _has(lower, shown) and not _has(before, shown):
            return "the answer is given away"
    return None


def _has(text: str, part: str) -> bool:
    """Whether a text has a part that does not stand within a longer word or number."""
    return re.search(rf"(?<![\w.]){re.escape(part)}(?!\w|[.,]\d)", text) is not None


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?(?<!,)", text)]


def sampled_rows(table: Table, rng: random.Random, most: int) -> Table:
    """A table with at most so many neighbouring rows of another."""
    first = rng.randrange(max(1, len(table.rows) - most + 1))
    return Table(table.columns, table.rows[first : first + most])


def describe(question: Question) -> dict[str, Any]:
    """The query of a question, for the record of an example."""
    return {"kind": question.kind, "query": [list(step) for step in question.steps]}
