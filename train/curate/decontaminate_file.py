"""Decontaminates one file: JSON lines, Parquet or plain text, into a file of the same kind."""

import collections
import contextlib
import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypedDict

from qwen_jax.errors import NO_ROOM, InputError
from qwen_jax.tokenizer.text import valid_text
from train.curate.contamination import Finder
from train.curate.decontaminate_parts import codec_of
from train.curate.masking import Span, line_without_spans, row_texts, row_without_spans, without_spans
from train.data.bad_records import BadRecords
from train.data.documents import (
    DamagedInputError,
    Piece,
    Source,
    library_errors,
    open_source,
    optional_library,
    read_lines,
)
from train.data.shards import write_json
from train.data.words import Split
from train.files import temporary_name

# Characters and rows that are searched together.
_BATCH_CHARACTERS, _BATCH_ROWS = 1 << 18, 1024
# Examples that a file keeps of each set, and characters around a span that they show.
_EXAMPLES, _AROUND = 5, 300
# A masked text may join to a new match; after so many times the row is dropped.
_MOST_MASKS = 8


class FileRecord(TypedDict):
    """The JSON record of a finished piece of a file.

    Attributes:
      key: digest of the file's path, size and time, of the name of its output, and of the piece.
      output: path of the output in its folder; None if nothing was written.
      size: bytes of the output.
      lines: lines or rows of the piece.
      records: number of all records.
      kept: records as they were.
      dropped: records with a test item that are left out.
      masked: records that are kept without the spans of test items.
      empty: records without words, which are kept.
      bad: records that cannot be read, which are left out; `bad_of` lists them.
      items: in how many records each test item was found, by its number.
      sets: in how many records each evaluation set was found, by its number.
      examples: of records with a test item, some for each set.
    """

    key: str
    output: str | None
    size: int
    lines: int
    records: int
    kept: int
    dropped: int
    masked: int
    empty: int
    bad: int
    items: dict[str, int]
    sets: dict[str, int]
    examples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a `Cleaner` needs beside the finder; fields as in `DecontaminateConfig`."""

    output: Path
    work: Path
    action: Literal["drop", "mask"]
    placeholder: str
    field: str | None
    max_bytes: int
    max_bad: float
    max_bad_lines: int


@dataclasses.dataclass
class _Row:
    """A record: what is written if it is kept, and its texts.

    Attributes:
      number: line or row in the piece, counted from 1.
      content: the line with its end, the columns of a Parquet row, or the text of a file.
      texts: of the record.
      bad: why it cannot be read.
      blank: an empty line, which is no record.
    """

    number: int
    content: Any
    texts: list[str]
    bad: str | None = None
    blank: bool = False


def bad_of(work: Path, index: int) -> Path:
    """The list of bad records of a piece: line in it, and reason."""
    return work / f"{index:05d}.bad.jsonl"


class Cleaner:
    """Decontaminates pieces of files. Each worker process has one."""

    def __init__(self, settings: Settings, finder: Finder, owner: Sequence[int], advance: Callable[[int], None]):
        """
        Args:
          settings: of the run.
          finder: of the evaluation sets.
          owner: number of the set of each item.
          advance: is called with the bytes of input that were processed since its last call.
        """
        self._settings, self._finder, self._owner, self._advance = settings, finder, owner, advance
        self._unreported = 0

    def __call__(self, index: int, piece: Piece, name: str, key: str) -> FileRecord | DamagedInputError:
        """Does one piece of a file.

        Args:
          index: its number.
          piece: of a file.
          name: path of the output in its folder.
          key: digest of the input.

        Returns:
          The record of the piece, which is also written, or the error of a damaged input file.

        Raises:
          InputError: most records are bad, or the output cannot be written.
        """
        record: FileRecord = {
            "key": key,
            "output": name,
            "size": 0,
            "lines": 0,
            "records": 0,
            "kept": 0,
            "dropped": 0,
            "masked": 0,
            "empty": 0,
            "bad": 0,
            "items": {},
            "sets": {},
            "examples": [],
        }
        source, path = piece.source, self._settings.output / name
        temporary = temporary_name(path)
        clean = {"jsonl": self._lines, "parquet": self._parquet, "text": self._text}[source.kind]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with BadRecords(bad_of(self._settings.work, index)) as self._bad:
                    clean(piece, temporary, record)
                    self._bad.finish()
            except Exception as error:
                if not _is_damage(error, source):
                    raise
                why = (error.strerror if isinstance(error, OSError) else None) or str(error).strip()
                place = f"{source.path} cannot be read beyond record {record['records']}"
                return DamagedInputError(f"{place}: {why.splitlines()[0].rstrip('.') if why else type(error).__name__}")
            if record["output"] is not None:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                record["size"] = temporary.stat().st_size
                os.replace(temporary, path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            remedy = "make room" if error.errno in NO_ROOM else "solve this problem"
            raise InputError(
                f"Cannot write {path}: {error.strerror}. Finished files are kept: {remedy}, then run the same command "
                "again."
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        self._report()
        # The record comes last: it says that the output is complete.
        write_json(self._settings.work / f"{index:05d}.json", record)
        return record

    def _read(self, num_bytes: int) -> None:
        """Counts input that was read; it is reported once it is searched."""
        self._unreported += num_bytes

    def _report(self) -> None:
        self._advance(self._unreported)
        self._unreported = 0

    def _lines(self, piece: Piece, temporary: Path, record: FileRecord) -> None:
        with _open_output(temporary, piece.source.compression) as output:
            for batch in self._batches(self._read_lines(piece, record)):
                for row in self._clean(piece.source, batch, record, self._mask_line):
                    output.write(row.content)

    def _read_lines(self, piece: Piece, record: FileRecord) -> Iterator[_Row]:
        for line in read_lines(piece, self._settings.max_bytes, self._read):
            number = record["lines"] = line.number
            if line.whole is None:
                yield _Row(number, b"", [], _too_long("line", self._settings.max_bytes))
                continue
            content = line.content.strip()
            if not content:
                yield _Row(number, line.whole, [], blank=True)
                continue
            try:
                texts = row_texts(_object(json.loads(valid_text(content))), self._settings.field)
                yield _Row(number, line.whole, texts)
            except InputError as error:
                yield _Row(number, b"", [], str(error).partition(". ")[0])
            except KeyError as error:
                yield _Row(number, b"", [], f"no field {error}")
            except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits.
                yield _Row(number, b"", [], f"not JSON: {error}")

    def _mask_line(self, row: _Row, spans: Mapping[int, Sequence[Span]]) -> _Row:
        text = row.content.decode()
        start = len(text) - len(text.lstrip("\ufeff \t\r\n\v\f"))
        body = text[start:].rstrip("\r\n \t\v\f")
        masked = line_without_spans(body, self._settings.field, spans, self._settings.placeholder)
        content = text[:start] + masked + text[start + len(body) :]
        return _Row(row.number, content.encode(), row_texts(json.loads(masked), self._settings.field))

    def _text(self, piece: Piece, temporary: Path, record: FileRecord) -> None:
        """A file of plain text is one document."""
        source, record["lines"] = piece.source, 1
        with open_source(source, self._read) as file:
            content = file.read(self._settings.max_bytes + 1)
        row = _Row(1, "", [])
        if len(content) > self._settings.max_bytes:
            row.bad = _too_long("file", self._settings.max_bytes)
        elif b"\0" in content:  # Valid UTF-8, but not in a text file.
            row.bad = "not a text file: it has a zero byte"
        else:
            try:
                row.content = valid_text(content)
                row.texts = [row.content]
            except InputError as error:
                row.bad = str(error).partition(". ")[0]

        def mask(row: _Row, spans: Mapping[int, Sequence[Span]]) -> _Row:
            text = without_spans(row.content, spans[0], self._settings.placeholder)
            return _Row(1, text, [text])

        kept = list(self._clean(source, [row], record, mask))
        if not kept:
            record["output"] = None
        for one in kept:
            with _open_output(temporary, source.compression) as output:
                output.write(one.content.encode())

    def _parquet(self, piece: Piece, temporary: Path, record: FileRecord) -> None:
        source = piece.source
        pa = optional_library("pyarrow", "Parquet files")
        parquet = optional_library("pyarrow.parquet", "Parquet files")
        with parquet.ParquetFile(source.path) as file:
            schema, field = file.schema_arrow, self._settings.field
            if field is not None and field not in schema.names:
                raise InputError(
                    f"{source.path} has no column {field!r}, it has {', '.join(schema.names)}. Name it with --field."
                )
            groups = range(piece.start, piece.end) if source.groups else range(file.metadata.num_row_groups)
            columns = [field] if field is not None else (["text"] if "text" in schema.names else schema.names)
            with parquet.ParquetWriter(temporary, schema, compression=codec_of(file)) as writer:
                number = 0
                for group in groups:
                    kept: list[Any] = []
                    for batch in file.iter_batches(256, row_groups=[group]):
                        values = _values(batch.select(columns))
                        rows = []
                        for at, value in enumerate(values):
                            if isinstance(value, str):
                                rows.append(_Row(number + at + 1, None, [], value))
                                continue
                            value = {k: v for k, v in value.items() if v is not None}
                            texts = row_texts({field: None, **value}, field) if field else row_texts(value, None)
                            rows.append(_Row(number + at + 1, (number + at, value), texts))
                        left = list(self._clean(source, rows, record, self._mask_values))
                        taken = batch.take(pa.array([row.content[0] - number for row in left], pa.int64()))
                        changed = {row.content[0]: row.content[1] for row in left if len(row.content) == 3}
                        kept.append(_replaced(pa, taken, columns, [row.content[0] for row in left], changed))
                        number += len(values)
                    writer.write_table(pa.Table.from_batches(kept, schema))
                    self._read(source.groups[group] if source.groups else 0)
                    self._report()
                record["lines"] = number

    def _mask_values(self, row: _Row, spans: Mapping[int, Sequence[Span]]) -> _Row:
        number, value, *_ = row.content
        masked = row_without_spans(value, self._settings.field, spans, self._settings.placeholder)
        return _Row(row.number, (number, masked, True), row_texts(masked, self._settings.field))

    def _batches(self, rows: Iterator[_Row]) -> Iterator[list[_Row]]:
        batch: list[_Row] = []
        size = 0
        for row in rows:
            batch.append(row)
            size += sum(map(len, row.texts))
            if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_ROWS:
                yield batch
                self._report()
                batch, size = [], 0
        yield batch

    def _clean(
        self,
        source: Source,
        rows: Sequence[_Row],
        record: FileRecord,
        mask: Callable[[_Row, Mapping[int, Sequence[Span]]], _Row],
    ) -> Iterator[_Row]:
        """The rows that are kept, masked where that is asked for; counts them in the record."""
        texts = [text for row in rows for text in row.texts]
        owners = [number for number, row in enumerate(rows) for _ in row.texts]
        names = [f"{source.path}, record {row.number}," for row in rows for _ in row.texts]
        words, matches = self._finder.find(texts, owners, names)
        by_row = collections.defaultdict(list)
        for match in matches:
            by_row[owners[match.text]].append(match)
        first = 0
        for number, row in enumerate(rows):
            if row.blank:
                yield row
                continue
            record["records"] += 1
            begin, first = first, first + len(row.texts)
            if row.bad is not None:
                record["bad"] += 1
                self._bad.add([row.number, row.bad])
                self._check_bad(source, record, row)
            elif number not in by_row:
                record["kept"] += 1
                record["empty"] += bool(words.bounds[begin] == words.bounds[first])
                yield row
            else:
                found = by_row[number]
                self._count(record, row, found, words, begin)
                spans = _spans(words, found, begin, row.texts)
                kept = self._masked(row, spans, mask) if self._settings.action == "mask" else None
                record["dropped" if kept is None else "masked"] += 1
                if kept is not None:
                    yield kept

    def _masked(
        self, row: _Row, spans: Mapping[int, Sequence[Span]], mask: Callable[[_Row, Mapping[int, Any]], _Row]
    ) -> _Row | None:
        """The row without test items; None if new ones appear again and again, as spans are taken out."""
        for _ in range(_MOST_MASKS):
            row = mask(row, spans)
            words, matches = self._finder.find(row.texts, [0] * len(row.texts))
            if not matches:
                return row
            spans = _spans(words, matches, 0, row.texts)
        return None

    def _count(self, record: FileRecord, row: _Row, matches: Sequence[Any], words: Split, begin: int) -> None:
        """Counts a record with test items, and keeps some as examples."""
        seen = {match.item: match for match in reversed(matches)}
        for item in sorted(seen):
            record["items"][str(item)] = record["items"].get(str(item), 0) + 1
        for owner in sorted({self._owner[item] for item in seen}):
            shown = record["sets"].get(str(owner), 0)
            record["sets"][str(owner)] = shown + 1
            if shown < _EXAMPLES:
                match = max((m for m in matches if self._owner[m.item] == owner), key=lambda m: m.common / m.words)
                text = row.texts[match.text - begin]
                first, last = words.place(match.text, text, match.begin, match.end)
                record["examples"].append(
                    {
                        "record": row.number,
                        "item": match.item,
                        "common": match.common,
                        "words": match.words,
                        "span": [first, last],
                        "before": text[max(first - _AROUND, 0) : first],
                        "match": text[first:last],
                        "after": text[last : last + _AROUND],
                    }
                )

    def _check_bad(self, source: Source, record: FileRecord, last: _Row) -> None:
        bad, records = record["bad"], record["records"]
        if source.kind != "text" and bad > max(
            self._settings.max_bad_lines, max(self._settings.max_bad, 0.5) * records
        ):
            raise InputError(
                f"{bad} of {records} records in a row are bad; the last, {source.path}, line {last.number}: "
                f"{last.bad}. Give the name of the field with --field, give other files, or accept bad records with a "
                "larger --max-bad."
            )


def _spans(words: Split, matches: Sequence[Any], begin: int, texts: Sequence[str]) -> dict[int, list[Span]]:
    """Spans of matches in characters, by the number of the text in its row."""
    spans = collections.defaultdict(list)
    for match in matches:
        text = match.text - begin
        spans[text].append(words.place(match.text, texts[text], match.begin, match.end))
    return spans


def _values(batch: Any) -> list[Any]:
    """The rows of a batch, or why they cannot be read: Parquet does not guarantee that its strings are UTF-8."""
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [f"not UTF-8: {error.reason}"]
        return [row for at in range(batch.num_rows) for row in _values(batch.slice(at, 1))]
    return rows


def _object(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, got {type(value).__name__}. Correct it.")
    return value


def _replaced(pa: Any, batch: Any, columns: Sequence[str], rows: Sequence[int], changed: Mapping[int, Any]) -> Any:
    """A batch with the values of changed rows."""
    if not changed:
        return batch
    arrays = []
    for name in batch.schema.names:
        array = batch.column(name)
        if name in columns:
            values = array.to_pylist()
            for at, row in enumerate(rows):
                if row in changed:
                    values[at] = changed[row].get(name)
            array = pa.array(values, array.type)
        arrays.append(array)
    return pa.record_batch(arrays, schema=batch.schema)


@contextlib.contextmanager
def _open_output(path: Path, compression: str) -> Iterator[IO[bytes]]:
    """A file to write, compressed as the input was; the same content makes the same bytes."""
    with path.open("wb") as file:
        if compression == ".gz":
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        elif compression == ".zst":
            library = optional_library("zstandard", ".zst files")
            with library.ZstdCompressor(level=3).stream_writer(file, closefd=False) as packed:
                yield packed
        else:
            yield file


def _is_damage(error: Exception, source: Source) -> bool:
    """Whether an error says that the input is damaged, rather than that the output cannot be written."""
    if isinstance(error, OSError):
        # Errors of archives are OSErrors without a number; those of the output are not about the input.
        return error.errno is None or error.filename == source.path
    # The libraries are imported by now.
    return isinstance(error, (EOFError, zlib.error, *library_errors()))


def _too_long(what: str, max_bytes: int) -> str:
    return f"the {what} is longer than {max_bytes / 1e6:g} MB, see --max-document-megabytes"
