"""LiveBench's tables: reads tables in the formats of the benchmark, and compares them; compares joins of columns."""

import ast
import contextlib
import csv
import html.parser
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.rewards.text import code_blocks, last_box

FORMATS = ("json", "jsonl", "html", "csv", "tsv", "markdown")
"""The formats of tables that can be read."""

Table = list[dict[str, Any]]
"""The rows of a table: values by column."""

_TOLERANCE = 1e-6
_EMPTY = ("", "nan", "null", "none", "n/a", "na")


def target_format(question: str) -> str | None:
    """The format that a question asks for, in lower case; None if it names none."""
    found = re.search(r"Please convert the Input Table from .*? format to (.*?) format", question, re.DOTALL)
    lines = re.findall(r"Target Format: *(.*)", question)
    name = found[1] if found else lines[-1] if lines else None
    return None if name is None else name.strip().lower()


def read_table(text: str, form: str) -> Table | None:
    """Reads a table.

    Args:
      text: the table alone.
      form: one of `FORMATS`.

    Returns:
      Its rows, without a column `index`; None if the text is no table in this format.
    """
    read = {"json": _json, "jsonl": _json_lines, "html": _html, "markdown": _markdown}.get(form)
    try:
        table = read(text) if read else _separated(text, "," if form == "csv" else "\t")
    except (ValueError, TypeError, AttributeError, RecursionError, csv.Error):
        return None
    rows = [{str(name).strip(): value for name, value in row.items()} for row in table]
    return [{name: value for name, value in row.items() if name != "index"} for row in rows] or None


def is_same_table(found: Table, expected: Table) -> bool:
    """Whether two tables have the same columns in any order, and the same rows in the same order.

    Values are equal as numbers to 1e-6, or as texts without white space around; all forms of no value are equal.
    """
    return len(found) == len(expected) and all(
        set(row) == set(right) and all(_same_value(row[name], right[name]) for name in right)
        for row, right in zip(found, expected, strict=True)
    )


def has_table(answer: str, expected: Table, form: str) -> bool:
    """Whether an answer gives a table: inside solution tags, in its last code block, or among other text.

    Args:
      answer: of a model.
      expected: the right table.
      form: one of `FORMATS`.
    """
    tagged = re.findall(r"<solution>(.*?)</solution>", answer, re.DOTALL)
    text = (tagged[-1] if tagged else answer).strip()
    blocks, _ = code_blocks(text)
    plain = text.replace("```", "").replace("&amp;", "&").strip()
    texts = [blocks[-1][1].strip()] if blocks else []
    texts += [re.sub(r"^\s*(Here|Input)\b.*?\b(format|table)\s*[:)]\s*", "", plain, flags=re.IGNORECASE)]
    for one in list(texts):
        lines = one.split("\n")
        if form in ("csv", "tsv"):
            # Other text before the header, and after as many lines as the table has.
            mark = "," if form == "csv" else "\t"
            for i, line in enumerate(lines):
                if {name.strip().strip('"') for name in line.split(mark)} >= set(expected[0]):
                    texts.append("\n".join(lines[i : i + 1 + len(expected)]))
        elif form == "jsonl":
            texts.append("\n".join(line for line in lines if line.startswith("{") and line.endswith("}")))
    tables = [read_table(one, form) for one in texts]
    return any(table is not None and is_same_table(table, expected) for table in tables)


def joined_columns(text: str) -> dict[Any, Any]:
    """The map of columns in an answer: a Python dictionary in its last code block, its last box, or all of it.

    Returns:
      The map; {} if there is none. Literals are read, and nothing is run.
    """
    flat = text.replace("\n", "")
    blocks = re.findall(r"```python(.*?)```", flat) or re.findall(r"```(.*?)```", flat)
    box = last_box(flat)
    if not blocks and box is not None:
        blocks = [re.sub(r"\\text{['|\"](.*?)['|\"]}", r"'\1'", box[1]).replace("\\", "")]
    found = None
    with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        found = ast.literal_eval((blocks or [text])[-1].strip())
    return found if isinstance(found, dict) else {}


def join_score(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> float:
    """F1 of a map of columns, rounded to two digits as in the benchmark.

    A pair that is right is a hit. A wrong target of a column is a false pair and a missed one.
    """
    if not found:
        return 0.0
    hits = sum(bool(expected.get(key)) and expected[key] == value for key, value in found.items())
    missed = sum(not found.get(key) for key in expected)
    missed += sum(bool(expected.get(key)) and expected[key] != value for key, value in found.items())
    return round(2 * hits / (2 * hits + len(found) - hits + missed), 2)


def _json(text: str) -> Table:
    value = json.loads(text)
    if isinstance(value, dict) and isinstance(value.get("data"), list) and "schema" in value:
        value = value["data"]
    if isinstance(value, dict):
        value = list(value.values())
    return _rows(value)


def _json_lines(text: str) -> Table:
    return _rows([json.loads(line) for line in text.split("\n") if line.strip()])


def _rows(value: Any) -> Table:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("expected rows")
    # A value that a row does not name is empty.
    names = dict.fromkeys(name for row in value for name in row)
    return [{name: row.get(name) for name in names} for row in value]


def _separated(text: str, mark: str) -> Table:
    return _of_cells([row for row in csv.reader(io.StringIO(text), delimiter=mark, strict=True) if row])


def _markdown(text: str) -> Table:
    lines = [line.strip() for line in text.split("\n") if line.strip().startswith("|")]
    cells = [[cell.strip() for cell in line[1:].removesuffix("|").split("|")] for line in lines]
    if len(cells) > 1 and all(re.fullmatch(r":?-+:?", cell) for cell in cells[1]):
        del cells[1]
    return _of_cells(cells)


def _html(text: str) -> Table:
    reader = _Cells()
    reader.feed(text)
    reader.close()
    return _of_cells(reader.rows)


def _of_cells(rows: Sequence[Sequence[str]]) -> Table:
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("expected a header, and rows as long as it")
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


class _Cells(html.parser.HTMLParser):
    """The texts of the cells of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data.strip()


def _same_value(found: Any, expected: Any) -> bool:
    left, right = (_plain(value) for value in (found, expected))
    if isinstance(left, float) and isinstance(right, float):
        return left == right or abs(left - right) < _TOLERANCE
    return bool(left == right)


def _plain(value: Any) -> Any:
    """A value as a number where it is one, None where it is empty, else as a text without white space around."""
    if isinstance(value, (bool, list, dict)):
        return str(value)
    text = "" if value is None else str(value).strip()
    if text.lower() in _EMPTY:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return None if math.isnan(number) else number
