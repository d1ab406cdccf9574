"""Lists of records that cannot be used: JSON lines, written as they are found."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from qwen_jax.files import to_json
from train.data.shards import writing
from train.files import temporary_name

# Entries that an error message shows.
_SHOWN = 3


class BadRecords:
    """A list that gets its name when it is complete, as a context manager. An empty one leaves no file.

    Attributes:
      count: entries so far.
      size: bytes so far.
    """

    def __init__(self, path: Path):
        """
        Args:
          path: of the file.
        """
        self.count = self.size = 0
        self._path, self._temporary = path, temporary_name(path)
        self._hash = hashlib.sha256()
        self._file: BinaryIO | None = None

    @property
    def sha256(self) -> str:
        """Of what was written (hex)."""
        return self._hash.hexdigest()

    def add(self, entry: object) -> None:
        """Writes a JSON value.

        Raises:
          InputError: the file cannot be written.
        """
        line = to_json(entry).encode() + b"\n"
        with writing(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._temporary.open("wb")
            self._file.write(line)
        self._hash.update(line)
        self.count += 1
        self.size += len(line)

    def finish(self) -> None:
        """Gives the file its name; removes an earlier one if there is no entry."""
        with writing(self._path):
            if self._file is None:
                self._path.unlink(missing_ok=True)
                return
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)

    def __enter__(self) -> "BadRecords":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # A write has failed, and raised then.
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def join(path: Path, parts: Iterable[tuple[Path, Callable[[Any], object]]]) -> list[Any]:
    """Joins the lists of units of work into one; a list that does not exist is empty.

    Args:
      path: of the whole list.
      parts: the list of each unit, and what makes an entry of the whole list of one of its entries.

    Returns:
      The first entries.

    Raises:
      InputError: the file cannot be written.
    """
    first: list[Any] = []
    with BadRecords(path) as whole:
        for part, entry_of in parts:
            if not part.exists():
                continue
            with part.open("rb") as lines:
                for line in lines:
                    entry = entry_of(json.loads(line))
                    whole.add(entry)
                    if whole.count <= _SHOWN:
                        first.append(entry)
        whole.finish()
    return first
