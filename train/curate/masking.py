"""Takes spans out of a text, or out of a string in a line of JSON; every other byte stays as it is."""

import json
import json.scanner
import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.data.words import texts_of

# One character of a JSON string, with its escape.
_CHARACTER = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL
)

Span = tuple[int, int]


class _Located(str):
    """A string of a JSON document that knows where it stands, without its quotes."""

    span: Span


def row_texts(row: Mapping[str, Any], field: str | None) -> list[str]:
    """The texts of a row in which test items are looked for.

    Args:
      row: a record.
      field: the only column that counts. By default "text" where that is a string, else all columns but messages of
        role system.

    Raises:
      KeyError: the row has no such column.
    """
    if field is not None:
        return list(texts_of(row[field]))
    text = row.get("text")
    return [text] if isinstance(text, str) else list(texts_of(row))


def without_spans(text: str, spans: Sequence[Span], placeholder: str) -> str:
    """The text with each span replaced; spans that overlap or touch are one.

    Args:
      text: any.
      spans: begin and end, in characters.
      placeholder: stands for each of them; "" cuts them out.
    """
    for begin, end in reversed(_merged(spans)):
        text = text[:begin] + placeholder + text[end:]
    return text


def line_without_spans(line: str, field: str | None, spans: Mapping[int, Sequence[Span]], placeholder: str) -> str:
    """A line of JSON with spans of its texts replaced; escapes, spaces and the order of its fields stay.

    Args:
      line: a JSON object.
      field: as for `row_texts`.
      spans: by the number of the text in `row_texts`.
      placeholder: stands for each of them.
    """
    texts = row_texts(_parsed(line), field)
    edits: list[Span] = []
    for number, found in spans.items():
        text = texts[number]
        if not isinstance(text, _Located):
            continue  # A number.
        first, last = text.span
        starts = [first + match.start() for match in _CHARACTER.finditer(line[first:last])] + [last]
        edits += ((starts[begin], starts[end]) for begin, end in _merged(found))
    return without_spans(line, edits, json.dumps(placeholder)[1:-1])


def row_without_spans(row: Any, field: str | None, spans: Mapping[int, Sequence[Span]], placeholder: str) -> Any:
    """A row with spans of its texts replaced; see `line_without_spans`."""
    numbered = iter(range(10**9))

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return without_spans(value, spans.get(next(numbered), ()), placeholder)
        if isinstance(value, Mapping):
            if value.get("role") == "system":
                return value
            return {k: part if k == "role" and isinstance(part, str) else replaced(part) for k, part in value.items()}
        if isinstance(value, list | tuple):
            return [replaced(part) for part in value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            next(numbered)
        return value

    if field is None and not isinstance(row.get("text"), str):
        return replaced(row)
    name = "text" if field is None else field
    return {**row, name: replaced(row[name])}


def _merged(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _parsed(line: str) -> Any:
    """The JSON value of a line, whose strings are `_Located`."""

    def parse_string(text: str, begin: int, strict: bool) -> tuple[_Located, int]:
        value, end = json.decoder.scanstring(text, begin, strict)  # type: ignore[attr-defined]
        located = _Located(value)
        located.span = (begin, end - 1)
        return located, end

    decoder: Any = json.JSONDecoder()
    decoder.parse_string = parse_string
    # The scanner in C would not call it.
    decoder.scan_once = json.scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
    return decoder.decode(line)
