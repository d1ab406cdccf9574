"""Files that training writes: whole or not at all, in strict JSON, readable after a crash.

Records are JSON objects, one a line. A process that is killed, or a machine that loses power, may leave a line that is
cut or padded with zero bytes; readers skip such lines.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.files import to_json

_log = logging.getLogger(__name__)

# Bytes of a file's name that its temporary name repeats: file systems allow 255 in all.
_NAME_BYTES = 200


def temporary_name(path: Path) -> Path:
    """The hidden name next to `path` under which this process writes it first; never too long for the file system."""
    name = os.fsencode(path.name)[:_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The temporary name of a file, for the time that it is written.

    Then it is flushed to the disk and gets its own name. A reader sees the old content or the new one, never a part.

    Raises:
      OSError: the file cannot be written; an existing one is unchanged.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, flushed to the disk, with the old content or the new one at any time.

    Raises:
      OSError: the file cannot be written; an existing one is unchanged.
    """
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


class AtomicFile:
    """A file that gets its name when it is complete, as a context manager.

    Attributes:
      path: its name.
      file: to write to, from its beginning to its end.
    """

    def __init__(self, path: Path):
        """
        Args:
          path: its name, in a folder that exists.

        Raises:
          OSError: the file cannot be written.
        """
        self.path, self._temporary = path, temporary_name(path)
        self.file = HashedFile(self._temporary)

    def finish(self) -> tuple[int, str]:
        """Flushes it to the disk and gives it its name.

        Returns:
          Its bytes and its sha256.

        Raises:
          OSError: the file cannot be written.
        """
        os.fsync(self.file.fileno())
        size, sha256 = self.file.tell(), self.file.sha256.hexdigest()
        self.file.close()
        os.replace(self._temporary, self.path)
        return size, sha256

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self._temporary.unlink(missing_ok=True)


class HashedFile(io.FileIO):
    """A file that is written from its beginning to its end, and hashed."""

    def __init__(self, path: Path):
        super().__init__(path, "wb")
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Writes and hashes all bytes of a buffer."""
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        done = 0
        while done < len(view):  # A raw file may write less than it is given.
            done += super().write(view[done:]) or 0
        return done


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record on a line of its own, also where the last line was cut.

    Args:
      path: of a file of records, which is created if need be.
      record: as `to_json` takes it.
    """
    with path.open("ab+") as file:
        cut = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut = file.read(1) != b"\n"
        file.write(b"\n" * cut + to_json(record).encode() + b"\n")


def read_records(path: Path, key: str, warn: bool = True) -> list[dict[str, Any]]:
    """Reads a file of records; lines that hold none are skipped.

    Args:
      path: of the file.
      key: that each record must have.
      warn: log one sentence on the lines that were skipped.

    Raises:
      OSError: the file cannot be read.
    """
    records, skipped = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.strip(b"\0").decode())
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and key in record:
            records.append(record)
        else:
            skipped.append(number)
    if skipped and warn:
        shown = ", ".join(map(str, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
        count = "a damaged line" if len(skipped) == 1 else f"{len(skipped)} damaged lines"
        _log.warning("%s: skipped %s (%s). A crash may leave such lines.", path, count, shown)
    return records
