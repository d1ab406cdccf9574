"""Where the items of pipelines come from: files of records, and documents of a corpus."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_jax.errors import InputError
from train.data.documents import Kind, find_sources, read_records, share_out
from train.data.tables import Row, find_tables, read_rows
from train.data.text import find_files
from train.synthesize.item import Item, make_item

# Larger documents are left out, so that a file without line ends does not fill the memory.
_MOST_BYTES = 1 << 24


def records(
    files: Sequence[str | os.PathLike[str]], columns: Mapping[str, type | tuple[type, ...]]
) -> Callable[[], Iterator[Item]]:
    """A source of items from files of records: JSON lines, JSON, Parquet or Arrow.

    Items have all columns of their record; columns beginning with an underscore and "provenance" are left out.

    Args:
      files: paths, patterns or folders.
      columns: that each record must have, with the type of their values.

    Returns:
      A `Pipeline.source`. It raises `InputError` at a record that lacks a column or has another type there.

    Raises:
      InputError: no such file, or one of another format.
    """
    found = find_tables(files)

    def source() -> Iterator[Item]:
        for path in found:
            for row in read_rows(path):
                _check(row, columns)
                values = {k: v for k, v in row.values.items() if k != "provenance" and not k.startswith("_")}
                yield make_item(values, [row.where])

    return source


def checked(source: Callable[[], Iterator[Item]]) -> Callable[[], Iterator[Item]]:
    """The same source, after it was read once: what is wrong with its records is said before a model is asked.

    Raises:
      InputError: a record is not as expected, or there is none.
    """
    if not sum(1 for _ in source()):
        raise InputError("The files have no records. Give files with at least one.")
    return source


def texts(
    files: Sequence[str | os.PathLike[str]],
    kind: Kind | str = "auto",
    field: str = "text",
    least: int = 1,
    most: int | None = None,
) -> Callable[[], Iterator[Item]]:
    """A source of items from the documents of a corpus, as `qwen-jax data build` reads them; the field is "text".

    Args:
      files: paths, patterns or folders of text, JSON lines or Parquet.
      kind: format of all files; "auto" decides by their extensions.
      field: JSON field or Parquet column that holds the text.
      least, most: characters; other documents are left out, as are empty and bad ones.

    Returns:
      A `Pipeline.source`.

    Raises:
      InputError: no such file, one of another format, or no document at all.
    """
    found = find_sources(find_files(files), kind, field)  # type: ignore[arg-type]

    def source() -> Iterator[Item]:
        count = 0
        for unit in share_out(found, 1 << 26):
            for piece in unit:
                for record in read_records(piece, field, _MOST_BYTES):
                    if record.reason is None and max(least, 1) <= len(record.text) <= (most or len(record.text)):
                        count += 1
                        yield make_item({"text": record.text}, [f"{piece.source.path}, {piece.start}+{record.line}"])
        if not count:
            raise InputError(
                f"None of {len(found)} files has a document of {max(least, 1):,} to "
                f"{'any number of' if most is None else f'{most:,}'} characters. Give other files, or other limits."
            )

    return source


def _check(row: Row, columns: Mapping[str, Any]) -> None:
    for name, kind in columns.items():
        if name not in row.values or not isinstance(row.values[name], kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            came = f"a {type(row.values[name]).__name__}" if name in row.values else "none"
            expected = " or ".join(one.__name__ for one in kinds)
            raise InputError(
                f"{row.where}: expected the column {name} with a {expected}, got {came}. The record has: "
                f"{', '.join(row.values) or 'no column'}."
            )
