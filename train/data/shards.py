"""Packed rows on disk: what a shard is, how it is written, and the manifest of a data set.

A data set is a folder. Each of its shards is two flat little-endian files without a header:

    shard-00000.tokens    uint32 [rows, length]             token ids; 0 where a row is padded
    shard-00000.starts    uint8  [rows, ceil(length / 8)]   a bit for each token: does it begin a document

The lowest bit of a byte is its first token's. Documents lie end to end, so only the end of the last row of a shard is
padding: row r has min(length, tokens - r * length) tokens. `manifest.json`, written last, says how many rows and tokens
each shard has.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen_jax.errors import InputError

MANIFEST = "manifest.json"
VERSION = 1
_FORMAT = "qwen-jax packed rows"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
      name: of its files, without extension.
      rows: how many.
      tokens: without padding.
      documents: that begin in it; none goes on in another shard.
      tokens_sha256: of its `.tokens` file (hex).
      starts_sha256: of its `.starts` file (hex).
    """

    name: str
    rows: int
    tokens: int
    documents: int
    tokens_sha256: str
    starts_sha256: str

    def files(self, length: int) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
        """(file name, bytes, sha256) of the tokens and of the starts."""
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
    """What a data set holds, and from where.

    Attributes:
      domain: its name.
      length: tokens in a row.
      tokenizer: `Tokenizer.fingerprint()`.
      vocab_size: every token id is smaller.
      end_of_text: the id that ends each document.
      field: JSON field or Parquet column of the text.
      max_document_bytes: longer documents were left out.
      unit_bytes: size of a unit of work; each became one shard.
      rows: in all shards.
      tokens: without padding.
      documents: how many.
      padding: fraction of all positions.
      empty: documents without text, which were passed over.
      bad: records that could not be read; `quarantine.jsonl` lists them.
      inputs: files.
      shards: in order.
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
        """A sha256 (hex) of tokenizer, length and every row in its place; not of names, paths and settings."""
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
        """The same with numbers of inputs and shards instead of the lists."""
        return {**self.to_json(), "inputs": len(self.inputs), "shards": len(self.shards)}


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a data set.

    Raises:
      InputError: the folder is no finished data set, or the manifest is damaged or of another version.
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
            "Build it with `qwen-jax data build`; where that was interrupted, run the same command again."
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
    """Compares the files of shards with what is known of them.

    Args:
      folder: of the data set.
      shards: to look at.
      length: tokens in a row.
      contents: also compare the sha256 of each file, which reads all of it.

    Raises:
      InputError: a file is missing, cut or changed.
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


_REPAIR = "Copy the shard again from where it is intact, or build the data again in a new folder."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """A sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def starts_width(length: int) -> int:
    """Bytes of a row of `.starts`."""
    return -(-length // 8)


class ShardWriter:
    """Packs documents into the rows of one shard as they come; a row or so is in memory.

    It lays documents end to end, as `pack` does. The files have temporary names until `finish`; used as a context
    manager, it removes them if anything fails before.
    """

    def __init__(self, folder: Path, name: str, length: int):
        """Opens the files.

        Args:
          folder: of the data set.
          name: of the shard.
          length: tokens in a row.

        Raises:
          InputError: a file cannot be written.
        """
        self._folder, self._name, self._length = folder, name, length
        self._tokens, self._starts = np.zeros(0, "<u4"), np.zeros(0, bool)
        self._rows = self._num_tokens = self._documents = 0
        self._files = [_HashedFile(folder / f"{name}.{extension}") for extension in ("tokens", "starts")]

    def add(self, documents: Sequence[Sequence[int]]) -> None:
        """Appends documents of at least one token each.

        Raises:
          InputError: the files cannot be written, as on a full disk.
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
        cut = rows * self._length
        self._files[0].write(self._tokens[:cut])
        self._files[1].write(np.packbits(self._starts[:cut].reshape(rows, self._length), axis=1, bitorder="little"))
        self._tokens, self._starts = self._tokens[cut:], self._starts[cut:]
        self._rows += rows

    def finish(self) -> Shard | None:
        """Pads the last row and puts the files in place. Returns None, and leaves no file, where nothing was added."""
        if len(self._tokens):
            padding = -len(self._tokens) % self._length
            self._tokens, self._starts = (np.pad(array, (0, padding)) for array in (self._tokens, self._starts))
            self._write(1)
        if not self._rows:
            return None
        hashes = [file.finish() for file in self._files]
        return Shard(self._name, self._rows, self._num_tokens, self._documents, *hashes)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.discard()


class _HashedFile:
    """A file that appears whole or not at all, and its sha256."""

    def __init__(self, path: Path):
        self._path, self._temporary = path, temporary_name(path)
        self._hash = hashlib.sha256()
        with _writing(path):
            self._file: BinaryIO = self._temporary.open("wb")

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).data.cast("B") if array.size else b""
        self._hash.update(data)
        with _writing(self._path):
            self._file.write(data)

    def finish(self) -> str:
        with _writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
        return self._hash.hexdigest()

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # It could not be written, which was said already.
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file through to the disk; a reader sees all of it or none.

    Raises:
      InputError: it cannot be written.
    """
    temporary = temporary_name(path)
    with _writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_file` of a JSON value."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def temporary_name(path: Path) -> Path:
    """The name beside its place under which this process writes a file."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"Cannot write {path}: {error.strerror}. What is finished is kept: make room (rows take 4 bytes a token), "
            "then run the same command again."
        ) from None
