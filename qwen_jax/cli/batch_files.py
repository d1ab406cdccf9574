"""The files of a batch: requests to read, and results to append (`qwen_jax.cli.batch`)."""

import codecs
import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qwen_jax.cli.common import utf8
from qwen_jax.errors import InputError
from qwen_jax.files import to_json, why_unusable

PLAIN = ("prompt", "messages", "prompt_token_ids")
"""Keys of which a plain prompt has one."""
_REQUEST = ("method", "url", "body")
_ID = re.compile(r"batch_req_([0-9a-f]{16})[0-9a-f]{16}")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
      index: its number, from 0.
      custom_id: the user's name for it, if it has one.
      record: its object, or None.
      problem: why it is no request, or None.
    """

    index: int
    custom_id: str | None
    record: dict[str, Any] | None
    problem: str | None

    @property
    def key(self) -> str | int:
        """What its result is known by: the custom id, otherwise the number from 1."""
        return self.index + 1 if self.custom_id is None else self.custom_id

    @property
    def is_plain(self) -> bool:
        return self.record is not None and not any(key in self.record for key in _REQUEST)


def check_files(source: Path, target: Path) -> None:
    """Makes the folder of the results, and looks whether both files can be used.

    Args:
      source, target: of `batch.answer_file`.

    Raises:
      InputError: an input that cannot be read, or an output that cannot be written or that another run is writing.
    """
    if problem := why_unusable(source):
        raise InputError(problem)
    if target.exists() and not target.is_file():
        raise InputError(f"{target} is not a file. Give another output.")
    if target.exists() and source.samefile(target):
        raise InputError(f"{source} is both the input and the output. Give another output.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make {target.parent}: {error.strerror}. Give another output.") from None
    if target.exists():
        with open_output(target):
            pass
    elif not os.access(target.parent, os.W_OK):
        raise InputError(f"Cannot write into {target.parent}. Give another output.")


def read_requests(source: Path) -> Iterator[Line]:
    """The lines that are not blank."""
    with source.open("rb") as file:
        for index, raw in enumerate(file):
            try:
                text = utf8(raw.removeprefix(codecs.BOM_UTF8) if index == 0 else raw, "The line")
            except InputError as error:
                yield Line(index, None, None, str(error))
                continue
            if text.strip():
                yield _line(index, text)


def _line(index: int, text: str) -> Line:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(index, None, None, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Line(index, None, None, f"expected a JSON object, got {type(record).__name__}")
    custom_id = record.get("custom_id")
    if custom_id is not None and not isinstance(custom_id, str):
        return Line(index, None, None, f"custom_id must be a text, got {custom_id!r:.80}")
    line = Line(index, custom_id, record, None)
    return dataclasses.replace(line, problem=_why_no_request(line, record))


def _why_no_request(line: Line, record: Mapping[str, Any]) -> str | None:
    if line.is_plain:
        found = [key for key in PLAIN if key in record]
        allowed = {"custom_id", *found, *(["tools"] if "messages" in record else [])}
        if len(found) != 1:
            return (
                f"expected {', '.join(_REQUEST)}, or one of {', '.join(PLAIN)}; found {', '.join(record) or 'nothing'}"
            )
        unknown = sorted(record.keys() - allowed)
        return f"unknown keys beside {found[0]}: {', '.join(unknown)}" if unknown else None
    if line.custom_id is None:
        return "custom_id is missing"
    if missing := [key for key in _REQUEST if key not in record]:
        return f"{missing[0]} is missing"
    if unknown := sorted(record.keys() - {"custom_id", *_REQUEST}):
        return f"unknown keys: {', '.join(unknown)}"
    if record["method"] != "POST":
        return f"method must be POST, got {record['method']!r:.80}"
    if not isinstance(record["url"], str):
        return f"url must be a text, got {record['url']!r:.80}"
    if not isinstance(record["body"], dict):
        return f"body must be a JSON object, got {type(record['body']).__name__}"
    return "stream must be false: a batch has no streams" if record["body"].get("stream") else None


def keys_of(source: Path, settings: str) -> dict[str | int, str]:
    """What the results of a file will be known by, each with a hash of the request and the settings.

    Raises:
      InputError: two lines have one custom id, or the file is empty.
    """
    first: dict[str | int, int] = {}
    keys: dict[str | int, str] = {}
    for line in read_requests(source):
        if line.key in first:
            raise InputError(
                f"{source}: lines {first[line.key]} and {line.index + 1} both have the custom_id {line.key!r}. "
                "Give each request its own."
            )
        first[line.key] = line.index + 1
        keys[line.key] = hashlib.sha256(to_json([line.record, settings]).encode()).hexdigest()[:16]
    if not first:
        raise InputError(f"{source} is empty. Expected a JSON object on each line.")
    return keys


@contextlib.contextmanager
def open_output(target: Path) -> Iterator[BinaryIO]:
    """Opens the results for reading and appending, without a buffer, for one process at a time."""
    import fcntl

    try:
        file = target.open("ab+", buffering=0)
    except OSError as error:
        raise InputError(f"Cannot write {target}: {error.strerror}. Give another output.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another run is writing {target}. Wait for it, or give another output.") from None
        except OSError:
            pass  # The file system has no locks.
        yield file


def repair(file: BinaryIO, keys: Mapping[str | int, str], source: Path, target: Path) -> set[str | int]:
    """Leaves only whole results that are no failures. Returns what they are known by.

    Raises:
      InputError: a result of no request of the input, or of one that was another then.
    """
    known: set[str | int] = set()
    kept: list[tuple[int, int]] = []
    end = 0
    with target.open("rb") as lines:
        for raw in lines:
            start, end = end, end + len(raw)
            try:
                result = json.loads(raw)
            except (ValueError, RecursionError):
                continue  # A line that was being written when a run ended.
            key = _key(result)
            if key is None or key not in keys:
                raise InputError(
                    f"{target} has a line that is no result of {source}: {raw[:80]!r}. Give another output."
                )
            if raw.endswith(b"\n") and key not in known and problem_of(result) is None:
                made = _ID.fullmatch(str(result.get("id")))
                if made is not None and made[1] != keys[key]:
                    raise InputError(
                        f"{target} has a result for {key!r} that was made with another request, model or options than "
                        "now. Give another output."
                    )
                known.add(key)
                kept.append((start, end))
        size = sum(stop - start for start, stop in kept)
        if not kept or kept[-1][1] == size:
            file.truncate(size)  # Only the end is to be dropped, if anything.
        else:
            # Written whole, then renamed.
            temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}.tmp")
            try:
                with temporary.open("wb") as copy:
                    for start, stop in kept:
                        lines.seek(start)
                        copy.write(lines.read(stop - start))
                    copy.flush()
                    os.fsync(copy.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    return known


def _key(result: Any) -> str | int | None:
    """What a result is known by; None for an object that is none."""
    if not isinstance(result, dict):
        return None
    custom_id = result.get("custom_id")
    key = result.get("line") if custom_id is None else custom_id
    return key if isinstance(key, (str, int)) else None


def append(file: BinaryIO, result: Mapping[str, Any]) -> None:
    """Writes a result, all of it even where the system writes it in parts."""
    data = memoryview(to_json(result).encode() + b"\n")
    while data:
        data = data[file.write(data) :]


def problem_of(result: Mapping[str, Any]) -> str | None:
    """Why a request failed, or None."""
    error, response = result.get("error"), result.get("response")
    if error is None and isinstance(response, dict) and response.get("status_code") != 200:
        error = response.get("body", {}).get("error", {})
    return None if error is None else str(error.get("message") or "it failed.")
