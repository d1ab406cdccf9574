"""Tables and a small query language: filter, sort, take, and one result at the end, computed exactly."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

Cell = str | int | float | None
Step = Sequence[Any]
Value = Decimal | str | list[str]

_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,14})(?:\.\d{1,9})?")
_MOST_DECIMALS = 2
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}
ORDERS = (">", "<", ">=", "<=")
RESULTS = ("count", "value", "values", "distinct", "sum", "mean", "max", "min", "range", "most", "top")
"""The operators that end a query."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
      columns: different names.
      rows: cells in the order of the columns: text, integers, floats (which stand for the decimal that they are written
        as), or None for an empty cell.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def column(self, name: str) -> list[Cell]:
        """The cells of a column."""
        at = self.columns.index(name)
        return [row[at] for row in self.rows]

    def is_numeric(self, name: str) -> bool:
        """Whether all cells of a column are numbers."""
        cells = self.column(name)
        return bool(cells) and all(is_number(cell) for cell in cells)

    def is_key(self, name: str) -> bool:
        """Whether a column names rows: different texts in all of them."""
        cells = self.column(name)
        return all(isinstance(cell, str) and cell for cell in cells) and len(set(cells)) == len(cells)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; `Table.from_json` is the table again."""
        return {"columns": list(self.columns), "rows": [list(row) for row in self.rows]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Table":
        """A table from the object of `to_json`."""
        return cls(tuple(value["columns"]), tuple(tuple(row) for row in value["rows"]))


def is_number(cell: object) -> bool:
    """Whether a cell is a number; true and false are none."""
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def exact(cell: Cell) -> Decimal:
    """The number of a cell, as it is written: 0.1 is a tenth."""
    return Decimal(str(cell))


def typed(text: str) -> Cell:
    """A cell of a text file: a number where it is written as one in the only possible way, None where it is empty."""
    text = text.strip()
    if not text:
        return None
    if not _NUMBER.fullmatch(text) or text == "-0":
        return text
    number = float(text) if "." in text else int(text)
    # A float with more digits than it can hold would be another number.
    return number if Decimal(str(number)) == Decimal(text) else text


def plain(number: Decimal) -> str:
    """A number without exponent and without zeros at its end."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def answer(table: Table, steps: Sequence[Step]) -> Value | None:
    """The result of a query; None where it has no single one.

    That is so with no rows, with ties where one row or an order is asked for, with empty cells or texts among numbers,
    and with a mean that two decimals cannot give without a doubt.

    Args:
      table: that is asked.
      steps: ["filter", column, comparison, value] (=, !=, >, <, >=, <=, or "in" with a list of texts),
        ["sort", column, "ascending" or "descending"] and ["take", count],
        in any number and order, and then one result: ["count"], ["value", column], ["values", column],
        ["distinct", column], ["sum"|"mean"|"max"|"min"|"range", column], ["most", column] (its most frequent text), or
        ["top", column, by] (the text of the column whose rows have the largest sum of `by`).

    Raises:
      ValueError: these are not steps of a query.
    """
    rows = list(table.rows)
    for step in steps[:-1]:
        found = _step(table, rows, step)
        if not found:
            return None
        rows = found
    name, *arguments = steps[-1]
    if name not in RESULTS:
        raise ValueError(f"{name} ends no query")
    if not rows:
        return None
    if name == "count":
        return Decimal(len(rows))
    cells = [row[table.columns.index(arguments[0])] for row in rows]
    if any(cell is None for cell in cells):
        return None
    if name == "value":
        return _as_value(cells[0]) if len(cells) == 1 else None
    if name == "values":
        texts = [str(cell) for cell in cells]
        return texts if len(set(texts)) == len(texts) else None
    if name == "distinct":
        return Decimal(len({_as_value(cell) if is_number(cell) else cell for cell in cells}))
    if name == "most":
        return _only_most({cell: Decimal(cells.count(cell)) for cell in cells})
    if name == "top":
        return _top(cells, [row[table.columns.index(arguments[1])] for row in rows])
    return _reduced(name, cells)


def _step(table: Table, rows: list[tuple[Cell, ...]], step: Step) -> list[tuple[Cell, ...]] | None:
    """The rows after a step; None where it is not clear which."""
    name, *arguments = step
    if name == "filter":
        column, comparison, value = arguments
        at = table.columns.index(column)
        if comparison == "in":
            return [row for row in rows if row[at] in value]
        compare = _COMPARE[comparison]
        # An empty cell meets no condition, and neither does a text where a number is asked for.
        alike = [row for row in rows if row[at] is not None and is_number(row[at]) == is_number(value)]
        key = exact if is_number(value) else str
        return [row for row in alike if compare(key(row[at]), key(value))]
    if name == "sort":
        column, direction = arguments
        at = table.columns.index(column)
        if not all(is_number(row[at]) for row in rows) or len({exact(row[at]) for row in rows}) < len(rows):
            return None
        return sorted(rows, key=lambda row: exact(row[at]) * (-1 if direction == "descending" else 1))
    if name == "take":
        (count,) = arguments
        return rows[:count] if len(rows) >= count else None
    raise ValueError(f"there is no step {name}")


def _reduced(name: str, cells: Sequence[Cell]) -> Decimal | None:
    """A number made of numbers."""
    if not all(is_number(cell) for cell in cells):
        return None
    numbers = [exact(cell) for cell in cells]
    if name == "sum":
        return sum(numbers, Decimal(0))
    if name == "range" and len(numbers) < 2:
        return None
    if name in ("max", "min", "range"):
        most, least = max(numbers), min(numbers)
        return most if name == "max" else least if name == "min" else most - least
    return _mean(numbers)


def _mean(numbers: Sequence[Decimal]) -> Decimal | None:
    """The mean, rounded to two decimals; None where it lies in the middle of two of them."""
    total, count = sum(numbers, Decimal(0)), len(numbers)
    unit = Decimal(1).scaleb(-_MOST_DECIMALS)
    rounded = (total / count).quantize(unit, ROUND_HALF_UP)
    # In whole numbers: no division rounds here.
    if abs(total - rounded * count) * 2 == unit * count:
        return None
    return rounded


def _only_most(numbers: Mapping[Any, Decimal]) -> Value | None:
    """The name with the largest number; None if there are several."""
    most = max(numbers.values())
    names = [name for name, number in numbers.items() if number == most]
    return _as_value(names[0]) if len(names) == 1 else None


def _top(groups: Sequence[Cell], cells: Sequence[Cell]) -> Value | None:
    if not all(is_number(cell) for cell in cells) or len(set(groups)) < 2:
        return None
    sums: dict[Cell, Decimal] = {}
    for group, cell in zip(groups, cells, strict=True):
        sums[group] = sums.get(group, Decimal(0)) + exact(cell)
    return _only_most(sums)


def _as_value(cell: Cell) -> Value:
    return exact(cell) if is_number(cell) else str(cell)
