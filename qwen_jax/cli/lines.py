"""Text input of the commands: UTF-8, with any of the usual line ends, with or without a byte order mark."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from qwen_jax.cli.common import utf8
from qwen_jax.errors import InputError


def check_file(path: Path, what: str) -> None:
    """Raises InputError if there is no such file; `what` it is, such as "prompt"."""
    if not path.is_file():
        raise InputError(f"The {what} file {path} {'is a folder' if path.is_dir() else 'does not exist'}.")


def read_lines(lines: Iterable[bytes], name: str) -> Iterator[str]:
    r"""Yields the lines of a file or of standard input without their ends, "\n" or "\r\n".

    Args:
      lines: from a binary file.
      name: of the file, for errors.

    Raises:
      InputError: a line is not UTF-8; the error gives its number.
    """
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield utf8(line.removesuffix(b"\n").removesuffix(b"\r"), f"{name}, line {number}")


def read_text(data: bytes, name: str) -> str:
    r"""Returns a whole file as one text, with "\n" between its lines and without the end of the last line.

    Args:
      data: the file's bytes.
      name: of the file, for errors.

    Raises:
      InputError: it is not UTF-8.
    """
    return utf8(data.removeprefix(codecs.BOM_UTF8), name).replace("\r\n", "\n").removesuffix("\n")
