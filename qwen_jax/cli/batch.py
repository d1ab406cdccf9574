"""Many requests from a file of JSON lines, answered through the scheduler: `qwen-jax generate --input --output`.

A line is a request in the format of OpenAI's batch API, or a plain prompt. Results are appended as they come. A run
that was interrupted goes on where it stopped: it keeps the results that the output has, and repeats what failed. The
id of a result begins with a hash of its request and of what else decides it, so that a result of another one is never
kept.
"""

import codecs
import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from qwen_jax.cli.common import utf8
from qwen_jax.cli.failures import complain
from qwen_jax.errors import InputError
from qwen_jax.files import to_json, why_unusable

if TYPE_CHECKING:
    from rich.progress import Progress

    from qwen_jax.inference import SamplingParams
    from qwen_jax.inference.outputs import Finished, Step
    from qwen_jax.inference.request import Request
    from qwen_jax.tokenizer import Tokenizer

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]
"""(url such as /v1/chat/completions, body of the request) -> body of the response. Blocks; called by many threads.

An exception with `status` (of HTTP) and a method `body`, such as serving's ApiError, is an answer, too.
"""
Complete = Callable[[int, dict[str, Any]], dict[str, Any]]
"""(number of the line from 0, record with a plain prompt) -> result. Blocks; called by many threads."""

_PLAIN = ("prompt", "messages", "prompt_token_ids")
_REQUEST = ("method", "url", "body")
_ID = re.compile(r"batch_req_([0-9a-f]{16})[0-9a-f]{16}")
# Requests in a row that fail by a fault of the program: then the engine is gone.
_FAULTS = 10


class Engine(Protocol):
    """What a plain prompt needs of an engine. `ContinuousEngine` is one."""

    @property
    def tokenizer(self) -> "Tokenizer | None": ...

    def submit(self, request: "Request") -> "Iterable[Step]": ...


@dataclasses.dataclass(frozen=True)
class PlainPrompts:
    """Completes plain prompts.

    Args:
      engine: completes them.
      sampling: how tokens are sampled; the seed of the first line. Line i has `seed + i`, whichever run completes it.
      eos_token_ids: ids that end a text.
      stop: strings that end a text.
      new_tokens: from the length of a prompt to how many tokens it may get; raises InputError if it is too long.
      limit: ids must be below it.
      logprobs: whether results have the log-probability of each token.
    """

    engine: Engine
    sampling: "SamplingParams"
    eos_token_ids: frozenset[int]
    stop: tuple[str, ...]
    new_tokens: Callable[[int], int]
    limit: int
    logprobs: bool = False

    def __call__(self, i: int, record: dict[str, Any]) -> dict[str, Any]:
        """Completes the prompt of line i. Raises InputError for one that cannot be used."""
        from qwen_jax.inference.completion import Ending
        from qwen_jax.inference.request import Request

        prompt = tuple(self._encode(record))
        ending = Ending(self.eos_token_ids, self.stop, self.new_tokens(len(prompt)))
        sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + i) % 2**32)
        finished = _last(self.engine.submit(Request(prompt, ending, sampling)))
        result: dict[str, Any] = {
            "prompt_token_ids": list(prompt),
            "token_ids": finished.token_ids,
            "text": finished.text,
            "finish_reason": finished.finish_reason,
        }
        if self.logprobs:
            result["logprobs"] = [token.logprob for token in finished.tokens]
        problem = finished.error or ("The request was cancelled." if finished.finish_reason == "abort" else None)
        return {**result, "error": None if problem is None else {"code": "generation_failed", "message": problem}}

    def _encode(self, record: dict[str, Any]) -> list[int]:
        from qwen_jax.inference.prompts import encode
        from qwen_jax.tokenizer import parse_tool_arguments

        tokenizer = self.engine.tokenizer
        if "messages" not in record:
            (key,) = (key for key in _PLAIN if key in record)
            value = record[key]
            if isinstance(value, str) != (key == "prompt"):
                raise InputError(f"{key} must be {'a text' if key == 'prompt' else 'a list of token ids'}.")
            return encode(value, i=0, tokenizer=tokenizer, limit=self.limit)
        if tokenizer is None:
            raise InputError("Messages need a tokenizer, and the model has none. Give prompt_token_ids.")
        return tokenizer.encode_chat(parse_tool_arguments(record["messages"]), record.get("tools"))


def _last(steps: "Iterable[Step]") -> "Finished":
    for step in steps:
        if step.finished is not None:
            return step.finished
    raise RuntimeError("The engine ended a text without its last step.")


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


@dataclasses.dataclass
class Summary:
    """Counts of a run: requests in the file, those that had a result before, those that failed, new tokens, seconds."""

    total: int
    before: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_problem: str = ""

    def __str__(self) -> str:
        done = self.total - self.before - self.failed
        known = f" ({self.before:,} had a result before)" if self.before else ""
        rate = f"{self.tokens / self.seconds:,.0f} tokens/s" if self.seconds else "-"
        return (
            f"{self.total:,} requests{known}: {done:,} answered, {self.failed:,} failed; {self.tokens:,} new tokens in "
            f"{self.seconds:,.1f} s ({rate})."
        )


def report(summary: Summary, target: Path) -> int:
    """Prints a summary of `answer_file`. Returns the exit status: 1 if a request failed."""
    print(f"{summary} Results: {target}")
    if summary.failed:
        complain(f"{summary.first_problem} The same command tries the failed requests again.")
    return int(bool(summary.failed))


def check_files(source: Path, target: Path) -> None:
    """Makes the folder of the results, and looks whether both files can be used.

    Args:
      source, target: as for `answer_file`.

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
        with _open_output(target):
            pass
    elif not os.access(target.parent, os.W_OK):
        raise InputError(f"Cannot write into {target.parent}. Give another output.")


def answer_file(
    source: Path,
    target: Path,
    answer: Answer,
    complete: Complete,
    *,
    settings: str = "",
    in_flight: int = 256,
    progress: bool = True,
) -> Summary:
    """Answers the requests of a file that have no result yet, and appends their results to another.

    Args:
      source: JSON lines, each a request of OpenAI's batch API or a plain prompt.
      target: of results, in the order in which they come. Made if need be.
      answer: of requests.
      complete: of plain prompts.
      settings: what decides the results beside the requests, such as the model: with others the output is refused.
      in_flight: requests that run at a time.
      progress: whether to show a progress bar on standard error.

    Raises:
      InputError: no such input, a custom id that occurs twice, results of other requests or settings in the output, or
        an output that cannot be written or that another run is writing.
    """
    if in_flight < 1:
        raise InputError(f"The number of requests in flight must be at least 1, got {in_flight}.")
    check_files(source, target)
    keys = _check_keys(source, settings)
    with _open_output(target) as file:
        known = _repair(file, keys, source, target)
    with _open_output(target) as file:
        summary = Summary(total=len(keys), before=len(known))
        start = time.perf_counter()
        waiting = (line for line in _lines(source) if line.key not in known)
        faults = 0
        with _Bar(summary, enabled=progress) as bar:
            for line, result, fault in _answers(waiting, answer, complete, in_flight):
                result["id"] = f"batch_req_{keys[line.key]}{uuid.uuid4().hex[:16]}"
                faults = 0 if fault is None else faults + 1
                if fault is not None and faults == _FAULTS:
                    raise fault
                _append(file, result)
                summary.seconds = time.perf_counter() - start
                summary.tokens += _new_tokens(result)
                if problem := _problem(result):
                    summary.failed += 1
                    summary.first_problem = summary.first_problem or f"{source}, line {line.index + 1}: {problem}"
                bar.advance()
        os.fsync(file.fileno())
    return summary


# --- the input ---


def _lines(source: Path) -> Iterator[Line]:
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
        found = [key for key in _PLAIN if key in record]
        allowed = {"custom_id", *found, *(["tools"] if "messages" in record else [])}
        if len(found) != 1:
            return (
                f"expected {', '.join(_REQUEST)}, or one of {', '.join(_PLAIN)}; found {', '.join(record) or 'nothing'}"
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


def _check_keys(source: Path, settings: str) -> dict[str | int, str]:
    """What the results of a file will be known by, each with a hash of the request and the settings.

    Raises:
      InputError: two lines have one custom id, or the file is empty.
    """
    first: dict[str | int, int] = {}
    keys: dict[str | int, str] = {}
    for line in _lines(source):
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


# --- the output ---


@contextlib.contextmanager
def _open_output(target: Path) -> Iterator[BinaryIO]:
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


def _repair(file: BinaryIO, keys: Mapping[str | int, str], source: Path, target: Path) -> set[str | int]:
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
            if raw.endswith(b"\n") and key not in known and _problem(result) is None:
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


def _append(file: BinaryIO, result: Mapping[str, Any]) -> None:
    data = memoryview(to_json(result).encode() + b"\n")
    while data:
        data = data[file.write(data) :]


def _problem(result: Mapping[str, Any]) -> str | None:
    """Why a request failed, or None."""
    error, response = result.get("error"), result.get("response")
    if error is None and isinstance(response, dict) and response.get("status_code") != 200:
        error = response.get("body", {}).get("error", {})
    return None if error is None else str(error.get("message") or "it failed.")


def _new_tokens(result: Mapping[str, Any]) -> int:
    response = result.get("response")
    if isinstance(response, dict):
        usage = response["body"].get("usage") or {}
        return int(usage.get("completion_tokens") or 0)
    return len(result.get("token_ids") or ())


# --- answers ---


def _answers(
    lines: Iterator[Line], answer: Answer, complete: Complete, in_flight: int
) -> Iterator[tuple[Line, dict[str, Any], Exception | None]]:
    """Yields each line with its result as it comes, and the fault of the program that it is owed to, if any."""
    jobs: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Line, dict[str, Any], Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        while (line := jobs.get()) is not None:
            results.put((line, *_result(line, answer, complete)))

    # Threads that do not keep the process alive: after Ctrl-C nobody waits for the texts that run.
    threads: list[threading.Thread] = []
    running = 0
    try:
        for line in lines:
            if running == in_flight:
                yield results.get()
                running -= 1
            if running == len(threads):
                threads.append(threading.Thread(target=work, daemon=True))
                threads[-1].start()
            jobs.put(line)
            running += 1
        for _ in range(running):
            yield results.get()
    finally:
        for _ in threads:
            jobs.put(None)


def _result(line: Line, answer: Answer, complete: Complete) -> tuple[dict[str, Any], Exception | None]:
    """The line of the output for a line of the input, and the fault of the program, if there was one."""
    head: dict[str, Any] = {"id": "", "custom_id": line.custom_id}
    if line.custom_id is None:
        head["line"] = line.index + 1
    empty = {} if line.is_plain else {"response": None}
    if line.problem is not None or line.record is None:
        return {**head, **empty, "error": {"code": "invalid_request", "message": str(line.problem)}}, None
    try:
        if line.is_plain:
            return {**head, **complete(line.index, line.record)}, None
        return {**head, **_response(200, answer(line.record["url"], line.record["body"]))}, None
    except InputError as error:
        if line.is_plain:
            return {**head, "error": {"code": "invalid_request", "message": str(error)}}, None
        body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
        return {**head, **_response(400, {"error": body})}, None
    except Exception as error:
        status, body_of = getattr(error, "status", None), getattr(error, "body", None)
        if isinstance(status, int) and callable(body_of):
            return {**head, **_response(status, body_of())}, None
        problem = {"code": "server_error", "message": f"{type(error).__name__}: {error}"}
        return {**head, **empty, "error": problem}, error


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    return {"response": response, "error": None}


class _Bar:
    """A progress bar on standard error: requests, failures, tokens/s and time left."""

    def __init__(self, summary: Summary, enabled: bool) -> None:
        self._summary, self._enabled = summary, enabled
        self._bar: Progress | None = None

    def __enter__(self) -> "_Bar":
        if self._enabled:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
            self._bar = Progress(TextColumn("requests"), *columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=self._summary.total, completed=self._summary.before)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        if self._bar is not None:
            failed = f", {self._summary.failed:,} failed" if self._summary.failed else ""
            rate = f"{self._summary.tokens / max(self._summary.seconds, 1e-9):,.0f} tokens/s{failed}"
            self._bar.update(self._bar.task_ids[0], advance=1, description=rate)
