"""Tasks about tables and nested data, made by code with the right answer, and the comparison of answers with it."""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json, why_unusable
from train.data.text import find_files
from train.rewards.text import last_code_block
from train.synthesize.corruptions import FAULTS, content_of, corrupt
from train.synthesize.grounding import numbers_of
from train.synthesize.item import Item, make_item
from train.synthesize.made_tables import make_table, make_tree
from train.synthesize.puzzles import is_right
from train.synthesize.reasoning import answer_line
from train.synthesize.table_formats import (
    TREE_FORMATS,
    json_value,
    table_of_csv,
    table_of_records,
    table_text,
    tree_text,
)
from train.synthesize.table_questions import VERDICTS, describe, draw_question, draw_statement, sampled_rows
from train.synthesize.tables import Table, Value, exact, is_number, plain
from train.synthesize.trees import draw_tree_query, tree_question

TASKS = ("question", "verification", "correction", "understanding", "tree")
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
_MOST_BYTES, _MOST_CHARACTERS, _MOST_COLUMNS = 1 << 24, 6000, 12

_HOW = {
    "number": "a number in digits, without a unit",
    "text": "a name or value as it is written in the data, and nothing else",
    "set": "a list of names separated by commas, and nothing else",
    "verdict": "supported, refuted or not enough information",
}
_FAULTS = {
    "quotes": "A cell of this CSV file has lost its quotes, so that one line has too many fields.",
    "json": "This JSON has one error of syntax.",
    "total": "One number in the last line of this CSV file, the sums of the columns, is wrong. All others are right.",
    "type": "In this CSV file, one digit was typed or read as a letter that looks like it.",
}


def tasks_of(
    files: Sequence[str], tables: int, each: int, tasks: Sequence[str], forms: Sequence[str], most_rows: int, seed: int
) -> Callable[[], Iterator[Item]]:
    """A source of tasks about the tables and trees of files, and about made ones.

    Args:
      files: CSV, TSV, JSON or JSON lines; paths, patterns or folders.
      tables: how many tables and trees code makes.
      each: tasks for each of them, at most: no task is made twice.
      tasks: some of `TASKS`.
      forms: some of `TABLE_FORMATS`.
      most_rows: of a table; of longer ones, neighbouring rows are taken.
      seed: of all random numbers.

    Raises:
      InputError: a file that cannot be read as a table or a tree.
    """
    given = [(path, hashlib.sha256(path.read_bytes()).hexdigest()[:16], _read(path)) for path in _found(files)]

    def source() -> Iterator[Item]:
        # Tasks of a file are drawn by its content, so that it may be moved.
        for path, content, data in given:
            for number in range(each):
                yield from _items(data, f"{path}", content, number, tasks, forms, most_rows, seed)
        for table in range(tables):
            rng = random.Random(f"{seed} table {table}")
            trees = "tree" in tasks and (len(tasks) == 1 or rng.random() < 1 / len(tasks))
            data = make_tree(rng) if trees else make_table(rng)
            for number in range(each):
                name = f"table {table} of seed {seed}"
                yield from _items(data, name, name, number, tasks, forms, most_rows, seed)

    def once() -> Iterator[Item]:
        last, seen = "", set[str]()
        for item in source():
            if item.sources[0] != last:
                last, seen = item.sources[0], set()
            if item.id not in seen:
                seen.add(item.id)
                yield item

    return once


def is_right_answer(answer: str, compare: str, text: str) -> bool:
    """Whether a response ends in the right answer.

    Args:
      answer: the right one.
      compare: "number", "text", "set" or "verdict", in a last line "Answer: ..."; "csv" or "json", in the last code
        block, with the same content in any layout.
      text: the response.
    """
    if compare in ("csv", "json"):
        block = last_code_block(text)
        found = None if block is None else content_of(block[1], compare)
        return found is not None and found == content_of(answer, compare)
    given = answer_line(text)
    if given is None:
        return False
    if compare in ("number", "set"):
        return is_right(answer, given, "number" if compare == "number" else "set")
    return _stripped(given) == _stripped(answer)


def _stripped(text: str) -> str:
    """Without quotes and the full stop of a sentence around it."""
    return re.sub(r"\s+", " ", text.strip().rstrip(".").strip("\"'`* \u201c\u201d")).casefold()


# --- tasks ---


def _items(
    data: Any,
    where: str,
    name: str,
    number: int,
    tasks: Sequence[str],
    forms: Sequence[str],
    most_rows: int,
    seed: int,
) -> Iterator[Item]:
    """A task about a table or tree, if it has one of these kinds. Random numbers are drawn by the name."""
    rng = random.Random(f"{seed} task {number} {name}")
    made: dict[str, Any] | None
    if isinstance(data, Table):
        kinds = [kind for kind in tasks if kind != "tree"]
        if not kinds:
            return
        table = sampled_rows(data, rng, most_rows)
        made = _MAKERS[rng.choice(kinds)](table, rng, forms)
    else:
        made = _tree(data, rng, forms) if "tree" in tasks else None
    if made is not None and len(made["text"]) <= _MOST_CHARACTERS:
        yield make_item(made, [where])


def _question(table: Table, rng: random.Random, forms: Sequence[str]) -> dict[str, Any] | None:
    found = draw_question(table, rng)
    if found is None:
        return None
    made = _task("question", table, rng.choice(forms), found.text, found.answer, rng)
    return {**made, **describe(found), "needed": list(found.needed)}


def _verification(table: Table, rng: random.Random, forms: Sequence[str]) -> dict[str, Any] | None:
    found = draw_statement(table, rng)
    if found is None:
        return None
    made = _task("verification", table, rng.choice(forms), found.text, found.verdict, rng)
    wrong = rng.choice([verdict for verdict in VERDICTS if verdict != found.verdict])
    return {**made, "kind": found.verdict, "needed": list(found.needed), "compare": "verdict", "wrong": wrong}


def _correction(table: Table, rng: random.Random, forms: Sequence[str]) -> dict[str, Any] | None:
    found = corrupt(table, rng.choice(FAULTS), rng)
    if found is None:
        return None
    question = f"{_FAULTS[found.fault]} Correct it."
    return _whole("correction", found.fault, found.text, question, found.right, found.form, found.text)


def _understanding(table: Table, rng: random.Random, forms: Sequence[str]) -> dict[str, Any] | None:
    form = rng.choice(forms)
    kind = rng.choice(("rows", "columns", "position", "cell", "convert"))
    if kind == "convert":
        to = rng.choice([one for one in ("csv", "json") if one != form])
        wrong = table_text(Table(table.columns, table.rows[1:]), to)
        # An outline and a file without types do not tell texts from numbers.
        plain_cells = all(
            is_number(cell) or (isinstance(cell, str) and _is_plain(cell)) for row in table.rows for cell in row
        )
        if not plain_cells or len(table.rows) < 2:
            return None
        names = {"csv": "CSV with a line of column names", "json": "JSON: a list of objects, one for each row"}
        question = f"Write this table as {names[to]}. Numbers stay numbers, and nothing is left out."
        return _whole("understanding", kind, table_text(table, form), question, table_text(table, to), to, wrong)
    value: Value
    if kind == "rows":
        question, value = "How many rows does the table have, without the column names?", Decimal(len(table.rows))
    elif kind == "columns":
        question, value = "How many columns does the table have?", Decimal(len(table.columns))
    elif kind == "position":
        place = rng.randrange(len(table.columns))
        question, value = (
            f"What is the name of column {place + 1}, counted from the left or the top?",
            table.columns[place],
        )
    else:
        row, column = rng.randrange(len(table.rows)), rng.choice(table.columns)
        cell = table.rows[row][table.columns.index(column)]
        if cell is None or cell == "":
            return None
        question = f"What is the {column} in row {row + 1}, counted from the first one below the column names?"
        value = exact(cell) if is_number(cell) else str(cell)
    return {**_task("understanding", table, form, question, value, rng), "kind": kind}


def _tree(data: Any, rng: random.Random, forms: Sequence[str]) -> dict[str, Any] | None:
    found = draw_tree_query(data, rng)
    if found is None:
        return None
    query, value = found
    form = rng.choice([form for form in forms if form in TREE_FORMATS] or ["json"])
    text = tree_text(data, form)
    made = _answered("tree", text, form, tree_question(query), value, rng)
    return {**made, "kind": query[0], "query": query, "known": _known(text), "counts": text.count("\n") + 1}


_MAKERS: dict[str, Callable[[Table, random.Random, Sequence[str]], dict[str, Any] | None]] = {
    "question": _question,
    "verification": _verification,
    "correction": _correction,
    "understanding": _understanding,
}


def _task(task: str, table: Table, form: str, question: str, value: Value, rng: random.Random) -> dict[str, Any]:
    text = table_text(table, form)
    made = _answered(task, text, form, question, value, rng)
    # Numbers of cells: an outline has others, too.
    return {**made, "known": _known(table_text(table, "csv")), "counts": max(len(table.rows), len(table.columns))}


def _answered(task: str, text: str, form: str, question: str, value: Value, rng: random.Random) -> dict[str, Any]:
    """A task whose answer stands in the last line."""
    if isinstance(value, Decimal):
        compare, answer, wrong = "number", plain(value), plain(value + rng.choice((1, 2, 10)))
    elif isinstance(value, list):
        compare, answer = "set", ", ".join(value)
        # A name with a comma or "and" in it is several words: one that is left out may still be there.
        wrongs = (", ".join(value[1:]), ", ".join(value[:-1]), *(f"{answer}, {value[0]} {i}" for i in range(2, 99)))
        wrong = next(one for one in wrongs if not is_right(answer, one, "set"))
    else:
        compare, answer, wrong = "text", value, f"{value} 2"
    fields = {"task": task, "text": text, "form": form, "question": question, "needed": []}
    return {**fields, "answer": answer, "compare": compare, "wrong": wrong}


def _whole(task: str, kind: str, text: str, question: str, right: str, compare: str, wrong: str) -> dict[str, Any]:
    """A task whose answer is a whole text, in a code block."""
    fields = {"task": task, "kind": kind, "text": text, "form": compare, "question": question, "needed": []}
    return {**fields, "answer": right, "compare": compare, "wrong": wrong, "known": [], "counts": 0}


def _known(text: str) -> list[str]:
    return sorted({plain(number) for number in numbers_of(text)})


def _is_plain(cell: str) -> bool:
    """Whether a text is the same one in all formats."""
    return bool(re.fullmatch(r"[^\W\d_](?:[^\n\r|\\<>&]*[^\s|\\<>&])?", cell)) and cell.casefold() not in _NOT_PLAIN


_NOT_PLAIN = frozenset(("null", "true", "false", "none", "nan", "infinity"))


def how_to_end(compare: str) -> str:
    """How a response has to end for `is_right_answer`."""
    if compare in _HOW:
        return f"Reason step by step, and end with one line: Answer: X, where X is {_HOW[compare]}."
    return f"Say briefly what you do, and then give the whole of it in one code block of {compare.upper()}."


# --- files ---


def _found(files: Sequence[str]) -> list[Path]:
    found = find_files(files, "files of tables (CSV, TSV, JSON, JSON lines)") if files else []
    for path in found:
        if path.suffix.lower() not in _SUFFIXES:
            raise InputError(f"{path}: expected a file of {', '.join(_SUFFIXES)}. Give other files.")
        if problem := why_unusable(path):
            raise InputError(problem)
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path} has more than {_MOST_BYTES:,} bytes. Split it.")
    return found


def _read(path: Path) -> Any:
    """The table or tree of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8. Convert it.") from None
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        table = table_of_csv(text, "\t" if suffix == ".tsv" else ",")
        what = "a table with a line of different column names, and as many fields in each line"
    else:
        lines = [line for line in text.splitlines() if line.strip()] if suffix == ".jsonl" else [text]
        values = [json_value(line) for line in lines]
        if not values or any(value is None for value in values):
            raise InputError(f"{path} is not valid JSON{' in each line' if suffix == '.jsonl' else ''}. Correct it.")
        value = [one[0] for one in values if one is not None] if suffix == ".jsonl" else values[0][0]  # type: ignore[index]
        table = table_of_records(value)
        if table is None:
            if not isinstance(value, Mapping | list) or not value:
                raise InputError(
                    f"{path}: expected a JSON object or list with something in it, got {to_json(value):.80}."
                )
            return value
        what = "a list of objects"
    if table is None or not table.rows or len(table.columns) > _MOST_COLUMNS:
        raise InputError(f"{path}: expected {what}, at least one row and at most {_MOST_COLUMNS} columns. Correct it.")
    return table
