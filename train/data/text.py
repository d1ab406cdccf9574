"""Finds text files, reads them as documents, and splits documents into a training and a held-out part."""

import codecs
import dataclasses
import glob
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from qwen_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents that were read.

    Attributes:
      texts: text of each file.
      skipped: files that are not UTF-8 text.
    """

    texts: tuple[str, ...]
    skipped: tuple[Path, ...]


def find_files(
    paths: Sequence[str | os.PathLike[str]], expected: str = "text files, folders or patterns such as 'docs/*.md'"
) -> list[Path]:
    """Expands files, folders and glob patterns.

    Args:
      paths: a folder stands for all files below it, without hidden ones.
      expected: what a message asks for where nothing is found.

    Returns:
      The files in the order of `paths`, those of a folder or pattern sorted by name; each once.

    Raises:
      InputError: a path that does not exist, or a pattern that matches nothing.
    """
    found: dict[Path, None] = {}
    for given in paths:
        name = os.fspath(given)
        try:
            path = Path(name).expanduser()
            matches = [path] if path.exists() else [Path(m) for m in sorted(glob.glob(str(path), recursive=True))]
        except (OSError, RuntimeError) as error:  # A name that is too long, a home folder that does not exist.
            raise InputError(f"Cannot look for {name}: {error}. Give another path.") from None
        if not matches:
            raise InputError(f"No such file or folder: {name}. Give {expected}.")
        for match in matches:
            found.update(dict.fromkeys(_walk(match) if match.is_dir() else [match]))
    return list(found)


def _walk(folder: Path) -> Iterable[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(root) / name for name in sorted(files) if not name.startswith("."))


def standard_library() -> list[Path]:
    """The `.py` files of Python's standard library, sorted, without installed packages, tests and data tables."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "_bundled"}
    folder = Path(sysconfig.get_path("stdlib"))
    files = [
        path for path in _walk(folder) if path.suffix == ".py" and left_out.isdisjoint(path.relative_to(folder).parts)
    ]
    if not files:
        raise InputError(f"{folder} has no Python sources. Give your own text with --text.")
    return files


def read_documents(files: Iterable[Path], max_bytes: int) -> Documents:
    """Reads each file as one document, up to a total size. "\\r\\n" becomes "\\n"; a byte order mark is ignored.

    Args:
      files: files, in the order in which they are read. Empty ones are left out.
      max_bytes: reading stops before the file that exceeds this total; if that is the first file, it is cut.

    Raises:
      InputError: a file cannot be read, or no file has text.
    """
    texts: list[str] = []
    skipped: list[Path] = []
    left = max_bytes
    for path in files:
        try:
            with path.open("rb") as file:
                content = file.read(left + 1)
        except OSError as error:
            raise InputError(f"Cannot read {path}: {error.strerror}.") from None
        too_long = len(content) > left
        if too_long and texts:
            break
        try:
            # A character that was cut is dropped; anything else that is not UTF-8 raises.
            text = codecs.getincrementaldecoder("utf-8-sig")().decode(content[:left], final=not too_long)
        except UnicodeDecodeError:
            skipped.append(path)
            continue
        if "\0" in text:  # Valid UTF-8, but not in a text file.
            skipped.append(path)
        elif text.strip():
            texts.append(text.replace("\r\n", "\n"))
            left -= min(len(content), left)
    if not texts:
        raise InputError(
            f"Found no text: {len(skipped)} files are not UTF-8 text, the others are empty. Give files with UTF-8 text."
        )
    return Documents(tuple(texts), tuple(skipped))


def split_documents(texts: Sequence[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """Splits documents into a training and a held-out part; a single document is cut at a line end.

    Args:
      texts: documents.
      held_out: fraction of all characters to hold out, approximately; at least one document.
      seed: seed of the choice.

    Returns:
      Training documents and held-out documents, each in the given order.

    Raises:
      InputError: there is one document, and it has fewer than two lines.
    """
    if len(texts) == 1:
        text = texts[0].rstrip("\n")
        cut = text.rfind("\n", 0, max(int(len(text) * (1 - held_out)), 1)) + 1 or text.find("\n") + 1
        if not cut:
            raise InputError(
                "One document of one line cannot be split into training and held-out text. Give more text."
            )
        return [text[:cut]], [text[cut:]]
    budget = held_out * sum(map(len, texts))
    chosen: set[int] = set()
    for i in np.random.default_rng(seed).permutation(len(texts)).tolist():
        if len(texts[i]) <= budget:
            chosen.add(i)
            budget -= len(texts[i])
    if not chosen:
        chosen = {min(range(len(texts)), key=lambda i: len(texts[i]))}
    return [t for i, t in enumerate(texts) if i not in chosen], [t for i, t in enumerate(texts) if i in chosen]
