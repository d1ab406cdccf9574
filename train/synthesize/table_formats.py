"""Tables and trees as text: Markdown, CSV, JSON, YAML, HTML and an indented outline; and CSV and JSON read back."""

import csv
import html
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from qwen_jax.files import to_json
from train.synthesize.tables import Cell, Table, typed

TABLE_FORMATS = ("markdown", "csv", "json", "yaml", "html", "outline")
TREE_FORMATS = ("json", "yaml", "outline")


def table_text(table: Table, form: str) -> str:
    """A table as text.

    Args:
      table: any table.
      form: one of `TABLE_FORMATS`.
    """
    if form == "markdown":
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        return "\n".join("| " + " | ".join(_in_markdown(cell) for cell in line) + " |" for line in lines)
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows([_shown(cell) for cell in row] for row in table.rows)
        return out.getvalue().rstrip("\n")
    if form == "html":
        head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
        rows = ["".join(f"<td>{html.escape(_shown(cell))}</td>" for cell in row) for row in table.rows]
        body = "\n".join(f"  <tr>{row}</tr>" for row in (head, *rows))
        return f"<table>\n{body}\n</table>"
    return tree_text(records_of(table), form)


def tree_text(tree: Any, form: str) -> str:
    """A JSON value as text.

    Args:
      tree: objects and lists of texts, numbers, booleans and None.
      form: one of `TREE_FORMATS`.
    """
    if form == "json":
        return to_json(tree, indent=2)
    if form == "yaml":
        return "\n".join(_yaml(tree, ""))
    if form == "outline":
        return "\n".join(_outline(tree, 0))
    raise ValueError(f"there is no form {form}")


def records_of(table: Table) -> list[dict[str, Cell]]:
    """A table as a list of objects."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def table_of_csv(text: str, delimiter: str = ",") -> Table | None:
    """The table of a CSV text; None if it is not one, such as rows of different lengths."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True) if row]
    except csv.Error:
        return None
    if not rows:
        return None
    columns = tuple(name.strip() for name in rows[0])
    if len(set(columns)) < len(columns) or not all(columns) or any(len(row) != len(columns) for row in rows):
        return None
    return Table(columns, tuple(tuple(typed(cell) for cell in row) for row in rows[1:]))


def table_of_records(value: Any) -> Table | None:
    """The table of a list of flat objects with the same fields in the same order; None for another JSON value."""
    if not isinstance(value, list) or not value or not all(isinstance(record, dict) and record for record in value):
        return None
    columns = tuple(value[0])
    for record in value:
        if tuple(record) != columns or not all(_is_cell(cell) for cell in record.values()):
            return None
    return Table(columns, tuple(tuple(record.values()) for record in value))


def json_value(text: str) -> tuple[Any] | None:
    """The JSON value of a text, in a tuple; None if it is no JSON, has a field twice, or NaN or an infinity."""
    try:
        return (json.loads(text, parse_constant=_refuse, object_pairs_hook=_object),)
    except (ValueError, RecursionError):
        return None


def _is_cell(value: object) -> bool:
    return value is None or (isinstance(value, str | int | float) and not isinstance(value, bool))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is there twice")
    return found


def _shown(cell: Cell) -> str:
    return "" if cell is None else str(cell)


def _in_markdown(cell: Cell) -> str:
    return _shown(cell).replace("|", r"\|").replace("\n", " ")


def _scalar(value: object) -> str:
    """A scalar of YAML 1.2: as JSON, which quotes all texts."""
    return to_json(value)


def _yaml(tree: Any, indent: str) -> Iterator[str]:
    """The lines of a block of YAML."""
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            if isinstance(value, Mapping | list) and value:
                yield f"{indent}{_scalar(name)}:"
                yield from _yaml(value, indent + "  ")
            else:
                yield f"{indent}{_scalar(name)}: {_scalar(value)}"
    elif isinstance(tree, list) and tree:
        for value in tree:
            first, *rest = _yaml(value, indent + "  ")
            yield f"{indent}- {first.lstrip()}"
            yield from rest
    else:
        yield f"{indent}{_scalar(tree)}"


def _outline(tree: Any, depth: int) -> Iterator[str]:
    """The lines of an indented tree. Places in lists are numbered from 1."""
    pairs = tree.items() if isinstance(tree, Mapping) else ((f"{i}.", value) for i, value in enumerate(tree, 1))
    for name, value in pairs:
        if isinstance(value, Mapping | list):
            yield f"{'  ' * depth}{name}" + (":" if not str(name).endswith(".") else "")
            yield from _outline(value, depth + 1)
        else:
            shown = (
                {None: "-", True: "yes", False: "no"}[value]
                if value is None or value is True or value is False
                else value
            )
            yield f"{'  ' * depth}{name}{'' if str(name).endswith('.') else ':'} {shown}"
