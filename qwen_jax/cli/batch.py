"""Many requests from a file of JSON lines, answered through the scheduler: `qwen-jax generate --input --output`.

A line is a request in the format of OpenAI's batch API, or a plain prompt. Results are appended as they come. A run
that was interrupted goes on where it stopped: it keeps the results that the output has, and repeats what failed. The
id of a result begins with a hash of its request and of what else decides it, so that a result of another one is never
kept.
"""

import dataclasses
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwen_jax.cli.batch_files import (
    PLAIN,
    Line,
    append,
    check_files,
    keys_of,
    open_output,
    problem_of,
    read_requests,
    repair,
)
from qwen_jax.cli.failures import complain
from qwen_jax.errors import InputError

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
            (key,) = (key for key in PLAIN if key in record)
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
        complain(f"{summary.first_problem.removesuffix('.')}. The same command tries the failed requests again.")
    return int(bool(summary.failed))


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
    keys = keys_of(source, settings)
    with open_output(target) as file:
        known = repair(file, keys, source, target)
    with open_output(target) as file:
        summary = Summary(total=len(keys), before=len(known))
        start = time.perf_counter()
        waiting = (line for line in read_requests(source) if line.key not in known)
        faults = 0
        with _Bar(summary, enabled=progress) as bar:
            for line, result, fault in _answers(waiting, answer, complete, in_flight):
                result["id"] = f"batch_req_{keys[line.key]}{uuid.uuid4().hex[:16]}"
                faults = 0 if fault is None else faults + 1
                if fault is not None and faults == _FAULTS:
                    raise fault
                append(file, result)
                summary.seconds = time.perf_counter() - start
                summary.tokens += _new_tokens(result)
                if problem := problem_of(result):
                    summary.failed += 1
                    summary.first_problem = summary.first_problem or f"{source}, line {line.index + 1}: {problem}"
                bar.advance()
        os.fsync(file.fileno())
    return summary


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
