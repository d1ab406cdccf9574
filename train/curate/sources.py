"""Reads the input of a curation as documents: JSON lines, Parquet, WARC, HTML and plain text, compressed or not.

The input is divided into units of work, which depend on the files and the settings alone. What cannot be used is
counted and named; the rest of a damaged file is kept.
"""

import base64
import dataclasses
import glob
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.tokenizer.text import valid_text
from train.data.archives import UntilDamage
from train.data.documents import (
    Piece,
    Source,
    find_sources,
    library_errors,
    no_field,
    open_source,
    optional_library,
    parse_object,
    read_lines,
    same_file,
    share_out,
)
from train.data.text import find_files

Format = Literal["auto", "jsonl", "parquet", "text", "html", "warc"]
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".warc": "warc",
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".py"), "text"),
}
_COMPRESSIONS = (".gz", ".zst")
_END_OF_RECORD = b"\r\n\r\n"
_HTML_TYPES = ("text/html", "application/xhtml+xml")


@dataclasses.dataclass(frozen=True)
class Input:
    """Files of one domain.

    Attributes:
      name: of the domain: letters, digits, "_" and ".".
      files: files, folders or patterns: .jsonl .parquet .warc .html .txt .md .rst .tex .py, all but Parquet also as .gz
        and .zst.
      text: field or column that holds the text.
      html: field or column that holds a page instead; the text is extracted by an operator.
      id: field or column with a unique id. By default an id is a hash of domain, file and place in the file.
      url: field or column that says where a document was found; records need not have it.
      format: of the files; "auto" decides by their extensions. A text or HTML file is one document.
      max_document_megabytes: a longer line, value, page or file cannot be used, and is not held in memory.
      max_bad: fraction of the records that may be unusable.

    Raises:
      InputError: a name that is not valid, or no files.
    """

    name: str
    files: str | Sequence[str]
    text: str = "text"
    html: str | None = None
    id: str | None = None
    url: str = "url"
    format: Format = "auto"
    max_document_megabytes: float = 8.0
    max_bad: float = 0.5

    def __post_init__(self) -> None:
        given = (self.files,) if isinstance(self.files, (str, os.PathLike)) else self.files
        object.__setattr__(self, "files", tuple(os.fspath(file) for file in given))
        if not self.name or self.name.strip("_.") != self.name or not _is_name(self.name):
            raise InputError(f"The name of an input has letters, digits, '_' and '.', got {self.name!r}.")
        if not self.files:
            raise InputError(f"The input {self.name} has no files. Give files, folders or patterns.")
        if not self.max_document_megabytes > 0 or not 0 <= self.max_bad <= 1:
            raise InputError(
                f"The input {self.name}: max_document_megabytes is above 0 and max_bad in [0, 1], got "
                f"{self.max_document_megabytes} and {self.max_bad}."
            )

    @property
    def max_bytes(self) -> int:
        """`max_document_megabytes` in bytes."""
        return max(int(self.max_document_megabytes * 1e6), 1)

    def settings(self) -> dict[str, Any]:
        """What decides how a file is read."""
        names = ("name", "text", "html", "id", "url", "max_document_megabytes")
        return {name: getattr(self, name) for name in names}


def _is_name(text: str) -> bool:
    return text.isascii() and text.replace("_", "a").replace(".", "a").isalnum()


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a file of an input.

    Attributes:
      piece: what is read.
      format: of the file.
      name: of the file, relative to the folder of the input.
    """

    piece: Piece
    format: Format
    name: str

    def key(self) -> list[Any]:
        """What tells it from other pieces and from a changed file."""
        return [self.name, *same_file(self.piece.source)[1:], self.format, self.piece.start, self.piece.end]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, for a worker."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Part":
        """The part of a JSON object."""
        source = Source(**{**value["piece"]["source"], "groups": tuple(value["piece"]["source"]["groups"])})
        return Part(Piece(**{**value["piece"], "source": source}), value["format"], value["name"])


@dataclasses.dataclass(frozen=True)
class Unit:
    """A unit of work: what one job reads.

    Attributes:
      name: such as "web-00003".
      input: what it is a part of.
      parts: its files.
    """

    name: str
    input: Input
    parts: tuple[Part, ...]

    @property
    def work(self) -> int:
        """Size in bytes."""
        return sum(part.piece.work for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Found:
    """Files of an input.

    Attributes:
      units: of work.
      files: path and size of each file that is read, by its relative name.
      broken: files that cannot be read at all, with the reason.
    """

    units: tuple[Unit, ...]
    files: Mapping[str, tuple[str, int]]
    broken: Mapping[str, str]


def find_units(source: Input, unit_bytes: int, avoid: Path) -> Found:
    """Finds the files of an input and divides them into units.

    Args:
      source: the input.
      unit_bytes: size of a unit to aim for.
      avoid: the output folder, which cannot hold input.

    Raises:
      InputError: no files, a format that is unknown, or a library that is missing.
    """
    files = find_files(source.files, "files, folders or patterns such as 'web/*.jsonl.zst'")
    root = os.path.commonpath([_root(given) for given in source.files])
    sources: list[Source] = []
    formats: dict[str, Format] = {}
    broken: dict[str, str] = {}
    for path in files:
        if avoid.absolute() in path.absolute().parents:
            raise InputError(f"{path} is in the output folder {avoid}. Leave it out of the input {source.name}.")
        kind = _format(path, source)
        if kind == "warc":
            optional_library("fastwarc", "WARC files")
        try:
            # Pages and archives are read here, but found and opened like text.
            plain: Any = kind if kind in ("jsonl", "parquet") else "text"
            found = find_sources([path], plain, source.html or source.text)
        except InputError as error:
            if "pip install" in str(error):
                raise
            # The file is named apart, and what to do is another thing for an input than for other commands.
            why = str(error).removeprefix(f"{path}").lstrip(": ")
            broken[os.path.relpath(path.absolute(), root)] = why.rpartition(". ")[0] or why.rstrip(".")
            continue
        sources += found
        formats[found[0].path] = kind
    units: list[Unit] = []
    for unit in share_out(sources, unit_bytes):
        parts = tuple(Part(p, formats[p.source.path], _relative(p.source, root)) for p in unit)
        units.append(Unit(f"{source.name}-{len(units):05d}", source, parts))
    sizes = {_relative(s, root): (s.path, s.size) for s in sources}
    return Found(tuple(units), sizes, broken)


def _relative(source: Source, root: str) -> str:
    return Path(os.path.relpath(os.path.abspath(source.path), root)).as_posix()


def _root(given: str) -> str:
    """The folder of a file, folder or pattern."""
    path = os.path.abspath(os.path.expanduser(given))
    if os.path.isdir(path):
        return path
    while glob.has_magic(path) and not os.path.exists(path):
        path = os.path.dirname(path)
    return path if os.path.isdir(path) else os.path.dirname(path)


def _format(path: Path, source: Input) -> Format:
    if source.format != "auto":
        return source.format
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    known = _FORMATS.get(suffixes[-1].lower()) if suffixes else None
    if known is None:
        raise InputError(
            f"{path}: expected one of {' '.join(_FORMATS)}, also followed by .gz or .zst. Leave the file out of the "
            f"input {source.name}, or give the format of all its files."
        )
    return known


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that cannot be used, or the place where a damaged file ends.

    Attributes:
      file: relative name.
      place: record or byte in the file.
      reason: why.
      skipped: whether it is expected, such as a picture in an archive of pages.
    """

    file: str
    place: str
    reason: str
    skipped: bool = False


Row = dict[str, Any]


def read_unit(unit: Unit) -> Iterator[Row | Bad]:
    """Reads the documents of a unit, one at a time, as rows of `DOCUMENT`.

    Raises:
      OSError: the system cannot read a file at the moment.
    """
    for part in unit.parts:
        yield from _read(part, unit.input)


def _read(part: Part, source: Input) -> Iterator[Row | Bad]:
    read = {"jsonl": _jsonl, "parquet": _parquet, "text": _file, "html": _file, "warc": _warc}[part.format]
    last = "the beginning"
    try:
        for row in read(part, source):
            last = row.place if isinstance(row, Bad) else row["source"].rpartition(":")[2]
            yield row
    except _errors() as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The system's, not the file's: it may go well next time.
        why = str(error).strip().partition("\n")[0]
        yield Bad(part.name, last, f"the file is damaged behind this place: {why}")


def _errors() -> tuple[type[Exception], ...]:
    return (OSError, EOFError, zlib.error, *library_errors())


def _row(part: Part, source: Input, place: str, fields: Mapping[str, Any]) -> Row | Bad:
    """A document of a record's fields, or why it is none."""
    row: Row = {"domain": source.name, "source": f"{part.name}:{place}", "html": None, "text": None}
    content = source.html or source.text
    if content not in fields:
        return Bad(part.name, place, no_field(content, fields))
    value = fields[content]
    if not isinstance(value, (str, bytes)):
        kind = "null" if value is None else type(value).__name__
        return Bad(part.name, place, f"{content!r} must be a string, got {kind}")
    if source.html is not None:
        row["html"] = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    else:
        try:
            row["text"] = valid_text(value)
        except InputError as error:
            return Bad(part.name, place, str(error).partition(". ")[0])
    if not (row["html"] or row["text"] or "").strip():
        return Bad(part.name, place, "the document is empty")
    size = len(row["html"] if row["html"] is not None else row["text"].encode())
    if size > source.max_bytes:
        return Bad(part.name, place, _too_long("document", source))
    row["id"] = _id(part, source, place, fields)
    if row["id"] is None:
        return Bad(part.name, place, f"no id: {source.id!r} must be a string or an integer")
    url = fields.get(source.url)
    row["url"] = _clean(url) if isinstance(url, str) else None
    used = {content, source.id, *([source.url] if row["url"] is not None else [])}
    rest = {name: value for name, value in fields.items() if name not in used}
    row["metadata"] = to_json(rest, default=_jsonable) if rest else None
    return row


def _id(part: Part, source: Input, place: str, fields: Mapping[str, Any]) -> str | None:
    if source.id is None:
        return hashlib.blake2b(
            f"{source.name}\0{part.name}\0{place}".encode("utf-8", "surrogateescape"), digest_size=16
        ).hexdigest()
    value = fields.get(source.id)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        return None
    return _clean(str(value))


def _clean(text: str) -> str:
    """Text that can be written: half surrogate pairs, which JSON may hold, become "?"."""
    return text.encode("utf-8", "replace").decode()


def _jsonable(value: object) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _too_long(what: str, source: Input) -> str:
    return f"the {what} is longer than {source.max_document_megabytes:g} MB (max_document_megabytes of the input)"


def _jsonl(part: Part, source: Input) -> Iterator[Row | Bad]:
    # The line of a document is longer than the document: escapes, and other fields.
    for line in read_lines(part.piece, 3 * source.max_bytes + (1 << 20)):
        place = line.place
        if line.whole is None:
            yield Bad(part.name, place, _too_long("line", source))
            continue
        if not line.content:
            continue
        value = parse_object(line.content)
        yield Bad(part.name, place, value) if isinstance(value, str) else _row(part, source, place, value)


def _parquet(part: Part, source: Input) -> Iterator[Row | Bad]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    piece, content = part.piece, source.html or source.text
    with pq.ParquetFile(piece.source.path, buffer_size=1 << 20, pre_buffer=False) as file:
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        row, num_rows = sum(counts[: piece.start]), sum(counts[piece.start : piece.end])
        batch_size = min(max(int(4e6 * num_rows / max(piece.work, 1)), 1), 4096)
        groups = list(range(piece.start, piece.end))
        for batch in file.iter_batches(batch_size, row_groups=groups, use_threads=False):
            columns = {}
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    # As bytes, because Parquet does not guarantee that strings are UTF-8.
                    column = column.cast(pa.large_binary())
                    columns[name] = (column, name != content)
                else:
                    columns[name] = (column, False)
            for i in range(batch.num_rows):
                place = f"row {row}"
                row += 1
                value = columns[content][0][i]
                if value.is_valid and value.as_buffer().size > source.max_bytes:
                    yield Bad(part.name, place, _too_long("value", source))
                    continue
                try:
                    fields = {name: _python(column[i].as_py(), text) for name, (column, text) in columns.items()}
                except (UnicodeDecodeError, ValueError, OverflowError) as error:
                    yield Bad(part.name, place, f"a value cannot be read: {error}")
                    continue
                yield _row(part, source, place, fields)


def _python(value: Any, is_text: bool) -> Any:
    return value.decode("utf-8", "replace") if is_text and value is not None else value


def _file(part: Part, source: Input) -> Iterator[Row | Bad]:
    with open_source(part.piece.source, lambda size: None) as file:
        content = file.read(source.max_bytes + 1)
    if len(content) > source.max_bytes:
        yield Bad(part.name, "0", _too_long("file", source))
    elif part.format == "html":
        page = dataclasses.replace(source, html="page", id=None)
        yield _row(part, page, "0", {"page": content})
    elif b"\0" in content:  # Valid UTF-8, but not in a text file.
        yield Bad(part.name, "0", "not a text file: it has a zero byte")
    else:
        # The same text is the same document, whichever system wrote the file.
        text = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
        yield _row(part, dataclasses.replace(source, text="text", html=None, id=None), "0", {"text": text})


def _warc(part: Part, source: Input) -> Iterator[Row | Bad]:
    with open_source(part.piece.source, lambda size: None) as file:
        archive = UntilDamage(file)
        try:
            yield from _pages(part, source, archive)
        except _errors() as error:
            raise archive.damage_behind() or error from None
        if damage := archive.damage_behind():
            raise damage
        if archive.tell() and archive.end != _END_OF_RECORD:
            raise EOFError("it ends in the middle of a record")


def _pages(part: Part, source: Input, archive: "UntilDamage") -> Iterator[Row | Bad]:
    warc = optional_library("fastwarc.warc", "WARC files")
    page = dataclasses.replace(source, html="page", id=None, url="url")
    records = warc.ArchiveIterator(
        archive, record_types=warc.WarcRecordType.response, parse_http=True, auto_decode="all"
    )
    for number, record in enumerate(records):
        place = f"record {number}"
        length = record.headers.get("Content-Length")
        if length is None or not length.isdigit():
            raise EOFError("it ends in the middle of a record")
        headers = record.http_headers
        if 0 < int(length) == record.content_length and not record.reader.read(1):  # Nothing behind its own header.
            raise EOFError("it ends in the middle of a record")
        if headers is None or headers.status_code != 200:
            yield Bad(part.name, place, "a response with an error status", skipped=True)
            continue
        if (record.http_content_type or "").lower() not in _HTML_TYPES:
            yield Bad(part.name, place, "a response that is not HTML", skipped=True)
            continue
        content = record.reader.read(source.max_bytes + 1)
        if len(content) > source.max_bytes:
            yield Bad(part.name, place, _too_long("page", source))
            continue
        encoded = headers.get("Content-Encoding") or headers.get("Transfer-Encoding")
        # Of an encoded page nothing tells whether its end is there: behind the beginning of damage it is not taken.
        if len(content) < record.content_length if not encoded else archive.damage:
            raise EOFError("it ends in the middle of a record")
        yield _row(
            part,
            page,
            place,
            {
                "page": content,
                "url": record.headers.get("WARC-Target-URI"),
                "charset": record.http_charset,
                "date": record.headers.get("WARC-Date"),
                "record": record.headers.get("WARC-Record-ID"),
            },
        )


def sha256_of(files: Iterable[Part]) -> dict[str, str]:
    """sha256 (hex) of the files that parts begin, by relative name.

    Args:
      files: parts of a unit. The part that a file begins with stands for the whole file, so that each is hashed once.
    """
    found = {}
    for part in files:
        if part.piece.start == 0:
            with open(part.piece.source.path, "rb") as file:
                found[part.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
