"""Reads files of records with columns: JSON lines, JSON, Parquet, and folders and files of the `datasets` library."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, why_unusable
from qwen_jax.tokenizer.text import valid_text
from train.data.documents import Source, open_source, optional_library, reading_errors
from train.data.text import find_files

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".zst")


@dataclasses.dataclass(frozen=True)
class Row:
    """A record of a file.

    Attributes:
      path: the file.
      number: its line in a file of JSON lines, else its number in the file, counted from 1.
      values: by column.
    """

    path: Path
    number: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The file and the record, for messages."""
        return where(self.path, self.number)


def where(path: Path | str, number: int) -> str:
    """Names a record for messages."""
    return f"{path}, {'line' if _suffix(Path(path)) in ('.jsonl', '.ndjson') else 'record'} {number}"


def find_tables(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Expands files, patterns and folders; a folder that `datasets` saved stands for its Arrow files.

    Args:
      paths: as for `train.data.text.find_files`.

    Raises:
      InputError: nothing is found, also in one of the folders; a file has another format, or a folder has several
        splits.
    """
    found: dict[Path, None] = {}
    for given in paths:
        folder = Path(given).expanduser()
        if (folder / "dataset_dict.json").is_file():
            splits = read_json(folder / "dataset_dict.json").get("splits") or []
            raise InputError(
                f"{folder} has the splits {', '.join(map(str, splits)) or 'none'}. Give the folder of one, such as "
                f"{folder / str(splits[0]) if splits else folder / 'train'}."
            )
        if (folder / "state.json").is_file():
            files = [
                folder / str(entry.get("filename")) for entry in read_json(folder / "state.json").get("_data_files", [])
            ]
            if not files:
                raise InputError(f"{folder} has no examples: its state.json lists no files. Give another data set.")
        else:
            expected = "files of examples (JSONL, Parquet), folders or patterns such as 'chats/*.jsonl'"
            files = find_files([given], expected)
            if not files:
                raise InputError(f"{given} has no files that are not hidden. Give {expected}.")
        found.update(dict.fromkeys(files))
    for path in found:
        problem = why_unusable(path)
        if problem:
            raise InputError(problem)
        if _suffix(path) not in _SUFFIXES:
            raise InputError(
                f"{path}: expected one of {' '.join(_SUFFIXES)}, those of JSON also followed by .gz or .zst. Leave the "
                "file out, for example with a pattern such as 'data/*.parquet'."
            )
    return list(found)


def _suffix(path: Path) -> str:
    """The extension that tells the format of a file."""
    inner = path.with_suffix("").suffix.lower()
    compressed = path.suffix.lower() in _COMPRESSED and inner in (".jsonl", ".ndjson", ".json")
    return inner if compressed else path.suffix.lower()


def read_rows(path: Path, advance: Callable[[int], None] = lambda count: None) -> Iterator[Row]:
    """Reads the records of a file, in order. Empty lines are left out.

    Objects in Parquet and Arrow have the keys of the column, in its order, with nulls where a record lacks one; nulls
    are left out.

    Args:
      path: from `find_tables`.
      advance: is called with the bytes that were read since its last call.

    Raises:
      InputError: the file cannot be read, or a record is not a JSON object.
    """
    suffix = _suffix(path)
    read = {".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}.get(suffix, _read_lines)
    number = 0
    try:
        for number, values in read(path, advance):
            yield Row(path, number, values)
    except reading_errors() as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error).strip().partition("\n")[0]
        raise InputError(
            f"{path} cannot be read beyond record {number}: {why.rstrip('.')}. Fetch it again, or leave it out."
        ) from None


def _source(path: Path) -> Source:
    compression = path.suffix.lower() if path.suffix.lower() in _COMPRESSED else ""
    if compression == ".zst":
        optional_library("zstandard", ".zst files")
    stat = path.stat()
    return Source(str(path), "jsonl", compression, stat.st_size, stat.st_mtime_ns)


def _read_lines(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_source(_source(path), advance) as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(b"\xef\xbb\xbf").strip()
            if content:
                yield number, _object(_parse(content, where(path, number)), where(path, number))


def _read_json(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A list of objects; or objects one a line, since many such files are called .json."""
    with open_source(_source(path), advance) as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf").strip()
    if content.startswith(b"["):
        values = _parse(content, str(path))
    else:
        lines = enumerate(content.split(b"\n"), 1)
        values = [_parse(line, where(path, number)) for number, line in lines if line.strip()]
    for number, value in enumerate(values, 1):
        yield number, _object(value, where(path, number))


def _parse(content: bytes, place: str) -> Any:
    try:
        return json.loads(valid_text(content))
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits.
        raise InputError(f"{place}: not JSON: {error}. Correct it, or leave it out.") from None


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(
            f"{place}: expected a JSON object with columns, got {type(value).__name__}. Give an object for each "
            "example."
        )
    return value


def _read_parquet(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    parquet = optional_library("pyarrow.parquet", "Parquet files")
    with parquet.ParquetFile(path) as file:
        yield from _table(path, file.iter_batches(256), file.metadata.num_rows, advance)


def _read_arrow(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A stream, as `datasets` writes it, or a file in Arrow's IPC format (Feather)."""
    pyarrow = optional_library("pyarrow", "Arrow files")
    ipc = optional_library("pyarrow.ipc", "Arrow files")
    with pyarrow.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = ipc.open_file(file)
            batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(ipc.open_stream(file))
        yield from _table(path, (part for batch in batches for part in _slices(batch)), 0, advance)
    advance(path.stat().st_size)


def _slices(batch: Any) -> Iterator[Any]:
    return (batch.slice(i, 256) for i in range(0, batch.num_rows, 256))


def _table(
    path: Path, batches: Iterator[Any], num_rows: int, advance: Callable[[int], None]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    size = path.stat().st_size
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield number, {name: _without_nulls(value) for name, value in values.items() if value is not None}
        if num_rows:
            advance(size * number // num_rows - size * (number - batch.num_rows) // num_rows)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
