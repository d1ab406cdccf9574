"""The format of a data set of packed rows on disk: its shards, how they are written, and its manifest.

A data set is a folder. Each of its shards is two flat little-endian files without a header:

    shard-00000.tokens    uint32 [rows, length]             token ids; 0 in padding
    shard-00000.starts    uint8  [rows, ceil(length / 8)]   a bit for each token: 1 if it begins a document

The lowest bit of a byte belongs to the first of its eight tokens. Documents are concatenated, so that only the last row
of a shard has padding: row r has min(length, tokens - r * length) tokens. `manifest.json` is written last; it has the
number of rows and tokens of each shard.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import NO_ROOM, InputError
from qwen_jax.files import to_json
from train import files

MANIFEST, QUARANTINE = "manifest.json", "quarantine.jsonl"
VERSION = 1
_FORMAT = "qwen-jax packed rows"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
      name: name of its files, without extension.
      rows: number of rows.
      tokens: number of tokens, without padding.
      documents: number of documents; no document continues in another shard.
      tokens_sha256: sha256 of its `.tokens` file (hex).
      starts_sha256: sha256 of its `.starts` file (hex).
    """

    name: str
    rows: int
    tokens: int
    documents: int
    tokens_sha256: str
    starts_sha256: str

    def files(self, length: int) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
        """(file name, size in bytes, sha256) of the `.tokens` and of the `.starts` file.

        Args:
          length: tokens in a row.
        """
        return (
            (f"{self.name}.tokens", self.rows * length * 4, self.tokens_sha256),
            (f"{self.name}.starts", self.rows * starts_width(length), self.starts_sha256),
        )


@dataclasses.dataclass(frozen=True)
class Input:
    """An input file: its path as it was given, and its size in bytes."""

    path: str
    size: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a data set: what it holds, and from which files it was built.

    Attributes:
      domain: name of the data set.
      length: tokens in a row.
      tokenizer: `Tokenizer.fingerprint()` of its tokenizer.
      vocab_size: size of the vocabulary; every token id is smaller.
      end_of_text: token id that ends each document.
      field: JSON field or Parquet column of the text.
      max_document_bytes: longer documents were left out.
      unit_bytes: size of a unit of work; each became one shard.
      rows: number of rows in all shards.
      tokens: number of tokens, without padding.
      documents: number of documents.
      padding: fraction of all positions that is padding.
      empty: number of documents without text, which were left out.
      bad: number of records that could not be used; `quarantine.jsonl` lists them.
      inputs: input files.
      shards: shards, in order.
    """

    domain: str
    length: int
    tokenizer: str
    vocab_size: int
    end_of_text: int
    field: str
    max_document_bytes: int
    unit_bytes: int
    rows: int
    tokens: int
    documents: int
    padding: float
    empty: int
    bad: int
    inputs: tuple[Input, ...]
    shards: tuple[Shard, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 (hex) of tokenizer, length and all rows in their order; names, paths and settings do not count."""
        rows = [[s.rows, s.tokens, s.tokens_sha256, s.starts_sha256] for s in self.shards]
        return digest([VERSION, self.tokenizer, self.length, rows])

    def to_json(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        return {
            "format": _FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            **json.loads(json.dumps(dataclasses.asdict(self))),
        }

    def summary(self) -> dict[str, Any]:
        """`to_json` with the number of inputs and shards instead of the lists."""
        return {**self.to_json(), "inputs": len(self.inputs), "shards": len(self.shards)}

    def left_out(self, folder: Path) -> str:
        """Says how many records were left out, and where they are listed; "" if none was.

        Args:
          folder: of the data set.
        """
        parts = [f"{self.bad:,} bad record{'s' * (self.bad > 1)} (see {folder / QUARANTINE})"] if self.bad else []
        parts += [f"{self.empty:,} empty document{'s' * (self.empty > 1)}"] if self.empty else []
        return f"left out: {' and '.join(parts)}" if parts else ""


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a data set.

    Raises:
      InputError: the folder is not a finished data set, or the manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise InputError(f"{path} is not the manifest of a data set. Give a folder from `qwen-jax data build`.")
        if value.get("version") != VERSION:
            raise InputError(
                f"{path} has version {value.get('version')!r}, expected {VERSION}. Build the data again with this "
                "version of qwen-jax."
            )
        recorded = value.pop("fingerprint")
        del value["format"], value["version"]
        manifest = Manifest(
            **{
                **value,
                "inputs": tuple(Input(**entry) for entry in value["inputs"]),
                "shards": tuple(Shard(**entry) for entry in value["shards"]),
            }
        )
    except FileNotFoundError:
        raise InputError(
            f"{folder} is no finished data set: it has no {MANIFEST}. "
            "Build it with `qwen-jax data build`; if that was interrupted, run the same command again."
        ) from None
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error}). Copy it again, or build the data again.") from None
    if manifest.fingerprint != recorded or not manifest.shards:
        raise InputError(f"{path} is damaged: its fingerprint does not match. Copy it again, or build the data again.")
    return manifest


def check_files(folder: Path, shards: Sequence[Shard], length: int, contents: bool = False) -> None:
    """Checks that the files of shards exist and have the expected sizes.

    Args:
      folder: of the data set.
      shards: shards to check.
      length: tokens in a row.
      contents: also compare the sha256 of each file, which reads all of it.

    Raises:
      InputError: a file is missing, truncated or changed.
    """
    for name, size, sha256 in (file for shard in shards for file in shard.files(length)):
        path = folder / name
        try:
            found = path.stat().st_size
            same = found == size and (not contents or _sha256(path) == sha256)
        except OSError as error:
            raise InputError(f"Cannot read {path}: {error.strerror}. {_REPAIR}") from None
        if found != size:
            raise InputError(f"{path} has {found} bytes, expected {size}. {_REPAIR}")
        if not same:
            raise InputError(f"{path} is not what was built: its sha256 is not {sha256}. {_REPAIR}")


_REPAIR = "Copy the shard again from an intact data set, or build the data again in a new folder."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """A sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def starts_width(length: int) -> int:
    """Bytes of a row in a `.starts` file.

    Args:
      length: tokens in a row.
    """
    return -(-length // 8)


class ShardWriter:
    """Packs a stream of documents into the rows of one shard; about one row is in memory.

    Documents are concatenated, as `pack` does. The files have temporary names until `finish`; as a context manager, it
    removes them if anything fails before.
    """

    def __init__(self, folder: Path, name: str, length: int):
        """Opens the files.

        Args:
          folder: of the data set.
          name: name of the shard.
          length: tokens in a row.

        Raises:
          InputError: a file cannot be written.
        """
        self._folder, self._name, self._length = folder, name, length
        self._tokens, self._starts = np.zeros(0, "<u4"), np.zeros(0, bool)
        self._rows = self._num_tokens = self._documents = 0
        self._files: list[files.AtomicFile] = []
        for path in (folder / f"{name}.{extension}" for extension in ("tokens", "starts")):
            with writing(path):
                self._files.append(files.AtomicFile(path))

    def add(self, documents: Sequence[Sequence[int]]) -> None:
        """Appends documents.

        Args:
          documents: token ids of each, at least one.

        Raises:
          InputError: the files cannot be written, for example because the disk is full.
        """
        arrays = [np.asarray(document, "<u4") for document in documents]
        starts = [np.zeros(len(array), bool) for array in arrays]
        for start in starts:
            start[0] = True
        self._num_tokens += sum(map(len, arrays))
        self._documents += len(arrays)
        self._tokens = np.concatenate([self._tokens, *arrays])
        self._starts = np.concatenate([self._starts, *starts])
        self._write(len(self._tokens) // self._length)

    def _write(self, rows: int) -> None:
        if not rows:
            return
        cut = rows * self._length
        bits = np.packbits(self._starts[:cut].reshape(rows, self._length), axis=1, bitorder="little")
        for atomic, array in zip(self._files, (self._tokens[:cut], bits), strict=True):
            with writing(atomic.path):
                atomic.file.write(array)
        self._tokens, self._starts = self._tokens[cut:], self._starts[cut:]
        self._rows += rows

    def finish(self) -> Shard | None:
        """Pads the last row and renames the files. Returns None, and leaves no file, if no document was added."""
        if len(self._tokens):
            padding = -len(self._tokens) % self._length
            self._tokens, self._starts = (np.pad(array, (0, padding)) for array in (self._tokens, self._starts))
            self._write(1)
        if not self._rows:
            return None
        hashes = []
        for atomic in self._files:
            with writing(atomic.path):
                hashes.append(atomic.finish()[1])
        return Shard(self._name, self._rows, self._num_tokens, self._documents, *hashes)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for atomic in self._files:
            atomic.__exit__()


def write_file(path: Path, content: bytes) -> None:
    """Writes a file of a data set; a reader sees all of it or none.

    Raises:
      InputError: the file cannot be written.
    """
    with writing(path):
        files.write_file(path, content)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file of a data set; see `write_file`."""
    write_file(path, (to_json(value, indent=1) + "\n").encode())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of the system, while a file is written, into an InputError that says what to do.

    Args:
      path: of the file.
    """
    try:
        yield
    except OSError as error:
        remedy = "make room (rows take 4 bytes a token)" if error.errno in NO_ROOM else "solve this problem"
        raise InputError(
            f"Cannot write {path}: {error.strerror}. Finished units of work are kept: {remedy}, then run the same "
            "command again."
        ) from None
