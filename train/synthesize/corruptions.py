"""Tables and JSON with one fault that code can see, and whether a corrected text is the right one."""

import dataclasses
import random
from decimal import Decimal
from typing import Any, Literal

from train.synthesize.table_formats import json_value, records_of, table_of_csv, table_text, tree_text
from train.synthesize.tables import Cell, Table, exact, is_number, plain

Fault = Literal["quotes", "json", "total", "type"]
FAULTS: tuple[Fault, ...] = ("quotes", "json", "total", "type")
# Letters that are typed, or read by a scanner, in place of digits.
_LOOKALIKES = {"0": "O", "1": "l", "5": "S", "8": "B"}
_TOTAL = "Total"


@dataclasses.dataclass(frozen=True)
class Corrupted:
    """A text with a fault.

    Attributes:
      fault: which.
      text: that has it.
      right: without it.
      form: "csv" or "json".
    """

    fault: Fault
    text: str
    right: str
    form: Literal["csv", "json"]

    def is_corrected(self, text: str) -> bool:
        """Whether a text has the content of the right one, in any layout."""
        return content_of(text, self.form) is not None and content_of(text, self.form) == content_of(
            self.right, self.form
        )


def content_of(text: str, form: str) -> Any:
    """What a text says, for comparison: numbers by value, fields of objects in any order; None if it is broken."""
    if form == "csv":
        table = table_of_csv(text)
        return None if table is None else _comparable(table.to_json())
    found = json_value(text)
    return None if found is None else _comparable(found[0])


def has_fault(text: str, form: str, fault: Fault, columns: dict[str, bool] | None = None) -> bool:
    """Whether a text has a fault, seen by code that does not know the right text.

    Args:
      text: a table or JSON.
      form: "csv" or "json".
      fault: which.
      columns: of a table, whether they should hold numbers.
    """
    if fault == "json":
        return json_value(text) is None
    table = table_of_csv(text)
    if fault == "quotes":
        return table is None
    if table is None:
        return False
    if fault == "type":
        return any(
            not is_number(cell) for name, numeric in (columns or {}).items() if numeric for cell in table.column(name)
        )
    *rows, last = table.rows
    if last[0] != _TOTAL:
        return False
    sums = [sum((exact(row[i]) for row in rows), Decimal(0)) for i in range(len(last)) if is_number(last[i])]
    return sums != [exact(cell) for cell in last if is_number(cell)]


def corrupt(table: Table, fault: Fault, rng: random.Random) -> Corrupted | None:
    """A table with one fault; None if this table cannot have it.

    Args:
      table: any table.
      fault: "quotes", a cell with a comma without its quotes; "json", a sign that is left out; "total", a last row of
        sums of which one is wrong; "type", a number with a letter in place of a digit.
      rng: of the place.
    """
    numbers = [i for i, name in enumerate(table.columns) if table.is_numeric(name)]
    made: Corrupted | None = None
    if fault == "json":
        made = _broken_json(records_of(table), rng)
    elif fault == "quotes":
        made = _broken_quotes(table, rng)
    elif numbers and fault == "total" and not table.is_numeric(table.columns[0]) and len(table.rows) > 1:
        made = _broken_total(table, numbers, rng)
    elif numbers and fault == "type":
        made = _broken_type(table, numbers, rng)
    columns = {name: table.is_numeric(name) for name in table.columns}
    if made is None or not has_fault(made.text, made.form, fault, columns):
        return None
    # A fault that is seen in the right text, too, tells nothing.
    return None if has_fault(made.right, made.form, fault, columns) or not made.is_corrected(made.right) else made


def _broken_json(value: Any, rng: random.Random) -> Corrupted | None:
    right = tree_text(value, "json")
    places = [i for i, sign in enumerate(right) if sign in '{}[],:"']
    for _ in range(20):
        at = rng.choice(places)
        text = right[:at] + right[at + 1 :]
        if json_value(text) is None:
            return Corrupted("json", text, right, "json")
    return None


def _broken_quotes(table: Table, rng: random.Random) -> Corrupted | None:
    texts = [(r, c) for r, row in enumerate(table.rows) for c, cell in enumerate(row) if isinstance(cell, str)]
    if not texts:
        return None
    with_comma = [(r, c) for r, c in texts if "," in str(table.rows[r][c])]
    r, c = rng.choice(with_comma or texts)
    rows = [list(row) for row in table.rows]
    if not with_comma:
        # Cells with a comma are made where there are none.
        rows[r][c] = f"{rows[r][c]}, new"
    whole = Table(table.columns, tuple(map(tuple, rows)))
    right = table_text(whole, "csv")
    quoted = '"' + str(rows[r][c]).replace('"', '""') + '"'
    return Corrupted("quotes", right.replace(quoted, quoted[1:-1], 1), right, "csv")


def _broken_total(table: Table, numbers: list[int], rng: random.Random) -> Corrupted:
    sums: list[Cell] = [_TOTAL, *[None] * (len(table.columns) - 1)]
    for i in numbers:
        total = plain(sum((exact(row[i]) for row in table.rows), Decimal(0)))
        sums[i] = float(total) if "." in total else int(total)
    at = rng.choice(numbers)
    wrong = list(sums)
    wrong[at] = _shifted(sums[at], rng)
    right, text = (table_text(Table(table.columns, (*table.rows, tuple(last))), "csv") for last in (sums, wrong))
    return Corrupted("total", text, right, "csv")


def _shifted(cell: Cell, rng: random.Random) -> Cell:
    changed = plain(exact(cell) + rng.choice((-10, -2, -1, 1, 2, 9, 10, 100)))
    return float(changed) if "." in changed else int(changed)


def _broken_type(table: Table, numbers: list[int], rng: random.Random) -> Corrupted | None:
    places = [
        (r, c, i)
        for c in numbers
        for r, row in enumerate(table.rows)
        for i, digit in enumerate(str(row[c]))
        if digit in _LOOKALIKES
    ]
    if not places:
        return None
    r, c, i = rng.choice(places)
    rows = [list(row) for row in table.rows]
    number = str(rows[r][c])
    rows[r][c] = number[:i] + _LOOKALIKES[number[i]] + number[i + 1 :]
    text = table_text(Table(table.columns, tuple(map(tuple, rows))), "csv")
    return Corrupted("type", text, table_text(table, "csv"), "csv")


def _comparable(value: Any) -> Any:
    """A JSON value in which equal numbers are equal, and true is not 1."""
    if isinstance(value, dict):
        return {name: _comparable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_comparable(part) for part in value]
    return ("number", exact(value)) if is_number(value) else (type(value).__name__, value)
