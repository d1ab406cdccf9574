"""Small files: reading JSON, saying why a file cannot be used, and writing strict JSON and whole files."""

import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError

# The first line of a pointer that Git LFS leaves in place of a large file (github.com/git-lfs/git-lfs, docs/spec.md).
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ENCODER = json.JSONEncoder(allow_nan=False)


def why_unusable(path: Path) -> str | None:
    """The reason why a path is not a readable file of its own content, with advice; None if it is one.

    Recognised are missing files, symbolic links whose target is gone (a cleaned Hugging Face cache, a folder copied
    without its blobs), folders, and pointers that `git clone` leaves where Git LFS is not installed.
    """
    if path.is_symlink() and not path.exists():
        return (
            f"{path} is a symbolic link to {os.readlink(path)}, which does not exist. Fetch the file again, or copy "
            "the folder with its links followed (cp -rL)."
        )
    if not path.exists():
        return f"{path} does not exist. Check the path."
    if not path.is_file():
        return f"{path} is not a file. Check the path."
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}. Check its permissions and its disk."
    if start == _LFS_POINTER:
        return (
            f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its repository, or download the "
            "checkpoint with `hf download`."
        )
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      InputError: no such file, not JSON, or not an object.
    """
    problem = why_unusable(path)
    if problem is not None:
        raise InputError(problem)
    try:
        # utf-8-sig: some editors write a byte order mark, which JSON does not have.
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError also covers UnicodeDecodeError and huge integers.
        raise InputError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, it holds a {type(value).__name__}.")
    return value


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside its place, then renames it. Raises InputError where it cannot."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def to_json(
    value: object, indent: int | None = None, default: Callable[[Any], object] | None = None, ascii: bool = True
) -> str:
    """Strict JSON: NaN and infinities, which JSON does not have, become null.

    Args:
      value: what to write.
      indent: spaces of each level; by default everything is on one line.
      default: converts objects that `json` does not support; by default they raise TypeError.
      ascii: escape all other characters, so that half surrogate pairs can be encoded too.
    """
    try:
        if indent is None and default is None and ascii:
            return _ENCODER.encode(value)
        return json.dumps(value, indent=indent, default=default, ensure_ascii=ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, default=default, ensure_ascii=ascii, allow_nan=False)


def _finite(value: object) -> object:
    """The same value with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
