"""Reads files of documents as a stream: JSON lines, Parquet and plain text, compressed or not."""

import bisect
import dataclasses
import importlib
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from qwen_jax.errors import InputError
from qwen_jax.tokenizer.text import valid_text
from train.data.archives import Archive, frame_starts

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Kind = Literal["jsonl", "parquet", "text"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".py"), "text"),
}
_COMPRESSIONS = (".gz", ".zst")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Bytes that are read ahead. Progress counts what is read, and is to be close to what is processed.
_READ_AHEAD = 1 << 17


class DamagedInputError(InputError):
    """An input file cannot be read to its end; the others may be intact."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
      path: its path.
      kind: its format.
      compression: "", ".gz" or ".zst".
      size: size on disk in bytes.
      modified_ns: time of its last change in nanoseconds; with the size, it tells whether the file has changed.
      groups: Parquet only: decompressed bytes of the text column in each row group.
    """

    path: str
    kind: Kind
    compression: str
    size: int
    modified_ns: int
    groups: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a file that can be read without the other parts.

    Attributes:
      source: the file.
      start: the first byte or, of Parquet, the first row group; see `read_lines` for where lines belong.
      end: start of the next piece.
      work: size in bytes, for equal units and for progress.
    """

    source: Source
    start: int
    end: int
    work: int


@dataclasses.dataclass(frozen=True)
class Record:
    """A document, or the reason why a record is bad.

    Attributes:
      line: line (of Parquet: row) in the piece, counted from 1.
      text: text of the document; "" if it is empty or bad.
      reason: what is wrong with the record; None if nothing is.
    """

    line: int
    text: str
    reason: str | None = None


def find_sources(
    files: Iterable[Path],
    kind: Kind | Literal["auto"],
    field: str,
    advice: str = "Leave the file out, or give it the extension of its format.",
) -> list[Source]:
    """Determines the format and size of each file, and checks that it can be read.

    Args:
      files: as from `find_files`.
      kind: format of all files; "auto" decides by their extensions.
      field: Parquet column that holds the text.
      advice: what to do about an unknown extension.

    Raises:
      InputError: an unknown extension, a file that cannot be opened, or Parquet without that column.
    """
    sources = []
    for path in files:
        suffixes = path.suffixes
        compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
        known = _KINDS.get(suffixes[-1].lower()) if suffixes else None
        this = known if kind == "auto" else kind
        if this is None:
            raise InputError(f"{path}: expected one of {' '.join(_KINDS)}, also followed by .gz or .zst. {advice}")
        if this == "parquet" and compression:
            raise InputError(f"{path}: Parquet compresses inside the file. Decompress it, and give the .parquet file.")
        if compression == ".zst":
            optional_library("zstandard", ".zst files")
        try:
            stat = path.stat()
            path.open("rb").close()
        except OSError as error:
            raise InputError(f"Cannot read {path}: {error.strerror}.") from None
        groups = _row_groups(path, field) if this == "parquet" else ()
        sources.append(Source(str(path), this, compression, stat.st_size, stat.st_mtime_ns, groups))
    return sources


def share_out(sources: Sequence[Source], unit_bytes: int) -> list[tuple[Piece, ...]]:
    """Divides files into units of work of about equal size; a pure function of its arguments and of the files.

    JSON lines and Parquet files that are larger than a unit are cut into pieces; smaller files are grouped. JSON lines
    in Zstandard are cut where frames begin. Other compressed files are never cut, because they can only be read from
    their beginning.

    Args:
      sources: input files.
      unit_bytes: size of a unit to aim for.

    Returns:
      The pieces of each unit.
    """
    units: list[tuple[Piece, ...]] = []
    small: list[Piece] = []
    for source in sources:
        cuttable = source.kind == "parquet" or (source.kind == "jsonl" and source.compression != ".gz")
        pieces = _cut(source, unit_bytes) if cuttable else [Piece(source, 0, source.size, source.size)]
        if len(pieces) > 1 or sum(piece.work for piece in pieces) >= unit_bytes:
            units += [(piece,) for piece in pieces]
            continue
        if small and sum(piece.work for piece in [*small, *pieces]) > unit_bytes:
            units.append(tuple(small))
            small = []
        small += pieces
    return [*units, tuple(small)] if small else units


def _cut(source: Source, unit_bytes: int) -> list[Piece]:
    if source.kind == "jsonl":
        count = max(-(-source.size // unit_bytes), 1)
        edges = [source.size * i // count for i in range(count + 1)]
        if source.compression and count > 1:
            starts = frame_starts(Path(source.path), optional_library("zstandard", ".zst files"))
            places = {bisect.bisect_left(starts, edge) for edge in edges[1:-1]}
            edges = [0, *(starts[place] for place in sorted(places) if 0 < place < len(starts)), source.size]
        return [Piece(source, a, b, b - a) for a, b in itertools.pairwise(edges)]
    pieces: list[Piece] = []
    for i, work in enumerate(source.groups):
        if pieces and pieces[-1].work + work <= unit_bytes:
            pieces[-1] = dataclasses.replace(pieces[-1], end=i + 1, work=pieces[-1].work + work)
        else:
            pieces.append(Piece(source, i, i + 1, work))
    return pieces


def read_records(
    piece: Piece, field: str, max_bytes: int, advance: Callable[[int], None] = lambda count: None
) -> Iterator[Record]:
    """Reads the documents of a piece, one at a time.

    Args:
      piece: from `share_out`.
      field: JSON field or Parquet column that holds the text.
      max_bytes: a longer line, value or file is a bad record, and is not held in memory.
      advance: is called with the bytes of `piece.work` that were read since its last call.

    Raises:
      DamagedInputError: the file ends too early, or its compression or structure is damaged.
    """
    left = piece.work

    def count(size: int) -> None:
        nonlocal left
        size = min(size, left)
        left -= size
        advance(size)

    read = {"jsonl": _read_lines, "parquet": _read_parquet, "text": _read_text}[piece.source.kind]
    number = 0
    try:
        for record in read(piece, field, max_bytes, count):
            number += 1
            yield record
    except reading_errors() as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error).strip().partition("\n")[0]
        raise DamagedInputError(
            f"{piece.source.path} cannot be read beyond document {number} of this part: {why}"
        ) from None
    count(left)


class _File(io.FileIO):
    """A file that reports how many bytes were read."""

    def __init__(self, path: str, count: Callable[[int], None]):
        super().__init__(path)
        self._count = count

    def readinto(self, buffer: "WriteableBuffer") -> int:
        size = super().readinto(buffer)
        self._count(size)
        return size


def open_source(
    source: Source, count: Callable[[int], None], start: int = 0, end: int | None = None
) -> io.BufferedReader:
    """Opens a file, decompressed.

    Args:
      source: the file.
      count: is called with the bytes of the file that were read since its last call.
      start: of a compressed file, where a frame begins.
      end: of a compressed file, where a later piece begins.
    """
    file: io.BufferedReader = io.BufferedReader(_File(source.path, count), _READ_AHEAD)
    if not source.compression:
        return file
    library = optional_library("zstandard", ".zst files") if source.compression == ".zst" else None
    return io.BufferedReader(Archive(file, library, start, end), _READ_AHEAD)


def _read_lines(piece: Piece, field: str, max_bytes: int, count: Callable[[int], None]) -> Iterator[Record]:
    for line in read_lines(piece, max_bytes, count):
        if line.whole is None:
            yield Record(line.number, "", _too_long("line", max_bytes))
        elif line.content:
            yield _parse(line.number, line.content, field)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a file.

    Attributes:
      number: in the piece, counted from 1.
      place: its first byte in the decompressed file or, behind the first Zstandard frame, in its frame.
      whole: with its end; None if it is too long.
      content: without line end and byte order mark; empty for a blank line.
    """

    number: int
    place: str
    whole: bytes | None
    content: bytes


def read_lines(piece: Piece, max_bytes: int, count: Callable[[int], None] = lambda size: None) -> Iterator[Line]:
    """Reads the lines of a piece of JSON lines, one at a time.

    A line of an uncompressed file belongs to the piece that it begins in. Of a Zstandard file, the line that begins
    with a piece belongs to the piece before: whether a line begins there, only its last byte tells.

    Args:
      piece: from `share_out`.
      max_bytes: the content of a longer line is not held in memory.
      count: is called with the bytes that were read since its last call.
    """
    with open_source(piece.source, count, piece.start, piece.end) as file:
        archive = file.raw if isinstance(file.raw, Archive) else None

        def skip_line() -> int:
            size = 0
            while part := file.readline(1 << 20):
                size += len(part)
                if part.endswith(b"\n"):
                    break
            return size

        position = file.seek(piece.start - 1) if piece.start and archive is None else 0
        position += skip_line() if piece.start else 0
        number = 0

        def is_ours() -> bool:
            if archive is None:
                return position < piece.end
            return archive.boundary is None or position <= archive.boundary

        # Two bytes more than allowed: "\r\n" is no part of a line.
        while is_ours() and (line := file.readline(max_bytes + 2)):
            number += 1
            place = f"byte {position}" if archive is None else archive.place(position)
            position += len(line)
            content = line.removesuffix(b"\n").removesuffix(b"\r").removeprefix(_BYTE_ORDER_MARK)
            if len(content) > max_bytes:
                if not line.endswith(b"\n"):
                    position += skip_line()
                yield Line(number, place, None, b"")
            else:
                yield Line(number, place, line, content if content.strip() else b"")


def parse_object(content: bytes) -> dict[str, Any] | str:
    """The JSON object of a line, or the reason why it is none."""
    try:
        value = json.loads(valid_text(content))
    except InputError as error:
        return str(error).partition(". ")[0]
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits.
        return f"not JSON: {error}"
    return value if isinstance(value, dict) else f"expected a JSON object, got {type(value).__name__}"


def _parse(number: int, line: bytes, field: str) -> Record:
    value = parse_object(line)
    if isinstance(value, str):
        return Record(number, "", value)
    if field not in value:
        return Record(number, "", no_field(field, value))
    return _checked(number, value[field], field)


def no_field(field: str, value: Iterable[str]) -> str:
    """The reason of a record that lacks a field.

    Args:
      field: its name.
      value: names of the fields that it has.
    """
    return f"no field {field!r}, it has {', '.join(map(repr, sorted(value)[:8])) or 'none'}"


def _checked(number: int, value: object, field: str) -> Record:
    if not isinstance(value, (str, bytes)):
        return Record(
            number, "", f"{field!r} must be a string, got {'null' if value is None else type(value).__name__}"
        )
    try:
        text = valid_text(value)
    except InputError as error:
        return Record(number, "", str(error).partition(". ")[0])
    return Record(number, text if text.strip() else "")


def _read_text(piece: Piece, field: str, max_bytes: int, count: Callable[[int], None]) -> Iterator[Record]:
    with open_source(piece.source, count) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        yield Record(1, "", _too_long("file", max_bytes))
    elif b"\0" in content:  # Valid UTF-8, but not in a text file.
        yield Record(1, "", "not a text file: it has a zero byte")
    else:
        # The same text has the same tokens, whichever system wrote the file.
        yield _checked(1, content.removeprefix(_BYTE_ORDER_MARK).replace(b"\r\n", b"\n"), field)


def _too_long(what: str, max_bytes: int) -> str:
    return f"the {what} is longer than {max_bytes / 1e6:g} MB, see --max-document-megabytes"


def _row_groups(path: Path, field: str) -> tuple[int, ...]:
    pyarrow = optional_library("pyarrow", "Parquet files")
    parquet = optional_library("pyarrow.parquet", "Parquet files")
    try:
        with parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            if field not in schema.names:
                raise InputError(
                    f"{path} has no column {field!r}, it has {', '.join(schema.names)}. Name it with --field."
                )
            kind = schema.field(field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
            if str(kind) not in names:
                raise InputError(f"{path}: column {field!r} must hold strings, it holds {kind}. Name it with --field.")
            column = [metadata.schema.column(i).path for i in range(len(metadata.schema))].index(field)
            groups = (metadata.row_group(i).column(column) for i in range(metadata.num_row_groups))
            return tuple(group.total_uncompressed_size for group in groups)
    except (OSError, pyarrow.ArrowException) as error:
        why = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{path} is not an intact Parquet file: {why.rstrip('.')}. Download it again, or leave it out."
        ) from None


def _read_parquet(piece: Piece, field: str, max_bytes: int, count: Callable[[int], None]) -> Iterator[Record]:
    pyarrow = optional_library("pyarrow", "Parquet files")
    parquet = optional_library("pyarrow.parquet", "Parquet files")
    # With a buffer, one page at a time is in memory rather than a whole row group.
    with parquet.ParquetFile(piece.source.path, buffer_size=1 << 20, pre_buffer=False) as file:
        groups = range(piece.start, piece.end)
        num_rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        batch_size = min(max(int(4e6 * num_rows / max(piece.work, 1)), 1), 4096)
        number = 0
        for batch in file.iter_batches(batch_size, row_groups=list(groups), columns=[field], use_threads=False):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes, because Parquet does not guarantee that strings are UTF-8.
            for value in column.cast(pyarrow.large_binary()):
                number += 1
                size = value.as_buffer().size if value.is_valid else 0
                if size > max_bytes:
                    yield Record(number, "", _too_long("value", max_bytes))
                else:
                    yield _checked(number, value.as_py(), field)
            count(int(column.nbytes))


def optional_library(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(f"{what} need {package}, which is not installed: pip install 'qwen-jax[data]'") from None


def library_errors() -> tuple[type[Exception], ...]:
    """The exceptions of the optional libraries that are imported."""
    found = ((sys.modules.get("zstandard"), "ZstdError"), (sys.modules.get("pyarrow"), "ArrowException"))
    return tuple(getattr(module, name) for module, name in found if module)


def reading_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged file may raise; to be asked for when an error has come, as libraries are imported late."""
    return OSError, EOFError, zlib.error, *library_errors()


def same_file(source: Source) -> list[str | int]:
    """Path, size and time of a file, which tell it from a later one of the same name."""
    return [source.path, source.size, source.modified_ns]
