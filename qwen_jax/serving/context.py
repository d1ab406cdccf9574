"""What the endpoints share: the model, its limits, metrics, and the requests that run."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from typing import Any, TypeVar, cast

import pydantic
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from qwen_jax.errors import InputError
from qwen_jax.serving.engine_protocol import EngineLike, ScorerLike, Stream
from qwen_jax.serving.errors import ApiError, from_validation, overloaded
from qwen_jax.serving.metrics import Metrics
from qwen_jax.serving.protocol import Body
from qwen_jax.serving.settings import ServerSettings, Service
from qwen_jax.tokenizer import Tokenizer

# Bodies are parsed in one go, in which nothing else runs: half a second for so many objects and lists.
_MOST_PARTS = 200_000
# Everything up to the next bracket outside strings, or up to the end. The pattern never backtracks, so that its time
# grows linearly with the length, also where a string does not end.
_TO_BRACKET = re.compile(rb'(?:[^"\[{]++|"(?:[^"\\]++|\\.?)*+(?:"|\Z))*+(?:([\[{])|\Z)', re.DOTALL)
B = TypeVar("B", bound=Body)
T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class _Job:
    """Work of a request for the device. `stopped` tells its thread to end, and `ended` its client that it was ended."""

    loop: asyncio.AbstractEventLoop
    ended: asyncio.Future[None]
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)


class Context:
    """A server's state.

    Args:
      service: the model.
      settings: limits.

    Attributes:
      active: streams of the engine that are being read.
      jobs: embeddings and scores that run or wait for the device.
      draining: whether the server is shutting down.
      device_thread: for embeddings and scores, one at a time.
      grammar_threads: for grammars; apart from other work, so that one that takes long delays grammars only.
    """

    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self.service, self.settings = service, settings
        self.metrics = Metrics(settings.served_names[0], service.engine)
        if service.engine is not None:
            service.engine.on_finished = self.metrics.observe_times
        self.active: set[Stream] = set()
        self.jobs: set[_Job] = set()
        self.draining = False
        self.device_thread = ThreadPoolExecutor(1, "qwen_jax-device")
        self.grammar_threads = ThreadPoolExecutor(2, "qwen_jax-grammar")
        clash = set(settings.served_names) & set(self.adapters)
        if clash:
            raise InputError(f"{min(clash)!r} is the name of the model and of an adapter. Give them different names.")

    @property
    def adapters(self) -> list[str]:
        """Names of the LoRA adapters."""
        return [] if self.service.engine is None else sorted(self.service.engine.adapters)

    @property
    def engine(self) -> EngineLike:
        """Raises ApiError for a reward model."""
        if self.service.engine is None:
            raise ApiError("This server has a reward model, which generates no text. It answers /v1/score.", 404)
        return self.service.engine

    @property
    def scorer(self) -> ScorerLike:
        """Raises ApiError for a language model."""
        if self.service.scorer is None:
            raise ApiError("This server has a language model. /v1/score needs a reward model.", 404)
        return self.service.scorer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ApiError for a model without a tokenizer."""
        if self.service.tokenizer is None:
            raise ApiError("The model has no tokenizer, so there is no text. Send and read token ids.")
        return self.service.tokenizer

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request's model name stands for; None for the model itself. Raises ApiError."""
        if model is None or model in self.settings.served_names:
            return None
        if model in self.adapters:
            return model
        known = ", ".join([*self.settings.served_names, *self.adapters])
        raise ApiError(
            f"The model {model!r:.200} does not exist here. Known: {known}.", 404, param="model", code="model_not_found"
        )

    def name(self, model: str | None) -> str:
        """The model's name in an answer."""
        return self.settings.served_names[0] if model is None else model

    def check_open(self) -> None:
        """Raises ApiError if the server is shutting down."""
        if self.draining:
            raise overloaded("The server is shutting down. Try again elsewhere, or later.")

    def admit(self, count: int) -> None:
        """Raises ApiError if the server cannot take so many further requests to the engine now.

        Those that would start at once take no place in the queue.
        """
        self.check_open()
        stats, most = self.engine.stats(), self.settings.max_waiting
        if stats.waiting + count - stats.free <= most:
            return
        if not stats.waiting and not stats.running:
            raise ApiError(
                f"The request asks for {count} texts. This server takes {stats.free + most} at a time: ask for fewer."
            )
        raise overloaded(f"{stats.waiting} requests are waiting, and the queue takes {most}. Try again later.")

    async def on_device(self, work: Callable[[Callable[[], bool]], T], param: str) -> T:
        """Runs embeddings or scores beside the event loop, one request at a time.

        The work ends early when the client goes, at the limit of time, and when the server ends.

        Args:
          work: is given a function that says whether to stop; raises CancelledError then.
          param: the field of the request, for errors.

        Raises:
          ApiError: the queue is full, the work was ended, or it raised InputError.
        """
        self.check_open()
        # One runs, the others wait.
        if len(self.jobs) > self.settings.max_waiting:
            raise overloaded(f"{len(self.jobs)} requests wait for the device. Try again later.")
        loop, limit = asyncio.get_running_loop(), self.settings.request_timeout
        job = _Job(loop, loop.create_future())

        def run() -> T | None:
            with contextlib.suppress(CancelledError):
                if not job.stopped.is_set():
                    return work(job.stopped.is_set)
            return None

        self.jobs.add(job)
        running = asyncio.ensure_future(in_thread(run, param, self.device_thread))
        try:
            either: list[asyncio.Future[Any]] = [running, job.ended]
            await asyncio.wait(either, timeout=limit or None, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return cast(T, running.result())
            raise ended_by_server() if job.ended.done() else too_long(limit)
        finally:
            job.stopped.set()
            running.cancel()
            self.jobs.discard(job)

    def close(self) -> None:
        """Ends the threads. Work that has not begun is dropped."""
        for job in list(self.jobs):
            job.stopped.set()
        for threads in (self.device_thread, self.grammar_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def abort(self) -> None:
        """Ends all running requests: their clients are told that the server is shutting down."""
        self.draining = True
        for stream in list(self.active):
            stream.cancel()
        for job in list(self.jobs):
            job.stopped.set()
            with contextlib.suppress(RuntimeError):  # The event loop is closed; nobody waits.
                job.loop.call_soon_threadsafe(_set, job.ended)


def _parts(data: bytes) -> int:
    """How many objects and lists a JSON text has, at most one more than are allowed."""
    count = data.count(b"[") + data.count(b"{")
    if count <= _MOST_PARTS:
        return count
    # Brackets in strings, such as those of a program, are text.
    found = itertools.islice(_TO_BRACKET.finditer(data), _MOST_PARTS + 1)
    return sum(match.lastindex or 0 for match in found)


async def read_body(request: HttpRequest, model: type[B], settings: ServerSettings) -> B:
    """Reads and checks the body of a request. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page of another origin may send other types without asking the server first.
        raise ApiError(f"Expected Content-Type: application/json, got {kind or 'none'}.", 415)
    try:
        async with asyncio.timeout(settings.body_timeout):
            data = await request.body()
    except TimeoutError:
        raise ApiError(f"The body did not arrive within {settings.body_timeout:g} s.", 408) from None
    except ClientDisconnect:
        raise client_has_gone() from None
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(f"The body is not UTF-8: {error.reason} at byte {error.start}.", code="invalid_json") from None
    if _parts(data) > _MOST_PARTS:
        raise ApiError(f"The body has more than {_MOST_PARTS:,} objects and lists.")
    try:
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise from_validation(error) from None


def client_has_gone() -> ApiError:
    """Ends the handling of a request; nobody reads it. The status is nginx's, and is counted."""
    return ApiError("The client has gone.", 499)


async def disconnected(receive: Callable[[], Any]) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def ended_by_server() -> ApiError:
    """Tells a client that its request was ended at the end of the server."""
    return overloaded("The request was ended by the server, which is shutting down. Try again elsewhere, or later.")


def too_long(limit: float) -> ApiError:
    """Tells a client that its request took longer than the limit, in seconds."""
    return ApiError(
        f"The request took longer than {limit:g} s, which is this server's limit. Ask for less.", 504, code="timeout"
    )


async def in_thread(function: Callable[[], T], param: str | None = None, threads: Executor | None = None) -> T:
    """Runs blocking work beside the event loop. An InputError becomes an ApiError for a field.

    Args:
      function: the work.
      param: the field.
      threads: of the context; by default those for short work, such as tokenisation.
    """
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, function)
    except InputError as error:
        raise ApiError(sentence(error), param=param) from None


def sentence(error: InputError) -> str:
    """The message of an error, as a sentence."""
    text = str(error)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


# Made once: `json.dumps` with options would make one for each piece.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def to_json(value: Any) -> str:
    """A value as JSON, without spaces."""
    return _ENCODER.encode(value)


def in_pieces(value: Any, depth: int = 4) -> str:
    """A large value as JSON, made of small pieces. Other threads wait while one is made, and run between them.

    Args:
      depth: of objects and lists of such whose items are pieces of their own.
    """
    if depth and isinstance(value, dict):
        return "{" + ",".join(f"{to_json(key)}:{in_pieces(item, depth - 1)}" for key, item in value.items()) + "}"
    if depth and isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return "[" + ",".join([in_pieces(item, depth - 1) for item in value]) + "]"
    return to_json(value)


def usage(prompt: int, completion: int | None = None, cached: int | None = None) -> dict[str, Any]:
    """The object "usage" of an answer, from numbers of tokens."""
    counts: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + (completion or 0)}
    if completion is not None:
        counts["completion_tokens"] = completion
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return counts


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the keys whose value is None."""
    return {key: value for key, value in values.items() if value is not None}
