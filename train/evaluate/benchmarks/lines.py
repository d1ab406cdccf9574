"""Reads the records of a benchmark's file, and names the line where one has not the form that it should have."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError

Kinds = Mapping[str, type | tuple[type, ...]]

_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bool: "true or false",
}


def read_records(path: Path, kinds: Kinds, least: int = 1) -> list[tuple[str, dict[str, Any]]]:
    """Reads JSON lines, or one JSON array; either may be compressed by gzip.

    Args:
      path: of the file.
      kinds: the type or the types of each field that a record must have.
      least: records that the file must have.

    Returns:
      Where each record is, for messages, such as "test.jsonl, line 3", and the record.

    Raises:
      InputError: the file cannot be read, is no JSON, or has a record without these fields; names the line.
    """
    found = []
    for where, record in _records(path):
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object, found {record!r:.80}.")
        for name, kind in kinds.items():
            check(where, record, name, kind)
        found.append((where, record))
    if len(found) < least:
        raise InputError(f"{path}: expected at least {least} records, found {len(found)}. Is the file cut?")
    return found


def check(where: str, record: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> None:
    """Checks a field of a record. Raises InputError, with `where`, if it is missing or of another type."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(_WORDS.get(each, each.__name__) for each in kinds)
    if name not in record:
        raise InputError(f"{where}: expected the field {name}, {wanted}; the record has {', '.join(sorted(record))}.")
    value = record[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise InputError(f"{where}: the field {name} must be {wanted}, found {value!r:.80}.")


def texts(where: str, record: Mapping[str, Any], name: str) -> list[str]:
    """A field that is a list of texts. Raises InputError, with `where`, if it is none."""
    check(where, record, name, list)
    if not all(isinstance(text, str) for text in record[name]):
        raise InputError(f"{where}: the field {name} must be a list of texts, found {record[name]!r:.80}.")
    return list(record[name])


class Ids:
    """The ids of a file's items, each of which may occur once."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def new(self, where: str, name: str) -> str:
        """The id, if no earlier record has it. Raises InputError otherwise."""
        if name in self._seen:
            raise InputError(f"{where}: the id {name} is that of {self._seen[name]} already. Remove one of them.")
        self._seen[name] = where
        return name


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if it is compressed by gzip. Raises InputError if it cannot be read."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: the file cannot be read: {error}.") from None


def read_text(path: Path) -> str:
    """As `read_bytes`, as text in UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the file is no text in UTF-8: {error.reason} at byte {error.start}.") from None


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        for number, record in enumerate(_parsed(str(path), text), 1):
            yield f"{path}, entry {number}", record
        return
    # Not `splitlines`: texts in JSON may hold other line separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(where, line)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"{error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{where}: expected JSON: {place}.") from None
