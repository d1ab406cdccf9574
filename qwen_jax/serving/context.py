"""What the endpoints share: the model, its limits, metrics, and the requests that run."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

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

B = TypeVar("B", bound=Body)
T = TypeVar("T")


class Context:
    """A server's state.

    Args:
      service: the model.
      settings: limits.

    Attributes:
      active: streams of the engine that are being read.
      draining: whether the server is shutting down.
      device_thread: for embeddings and scores, one at a time.
      grammar_threads: for grammars; apart from other work, so that one that takes long delays grammars only.
    """

    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self.service, self.settings = service, settings
        self.metrics = Metrics(settings.served_names[0], service.engine)
        self.active: set[Stream] = set()
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

    def admit(self, count: int) -> None:
        """Raises ApiError if the server cannot take further requests now."""
        if self.draining:
            raise overloaded("The server is shutting down. Try again elsewhere, or later.")
        waiting = self.engine.stats().waiting
        if waiting + count > self.settings.max_waiting:
            raise overloaded(
                f"{waiting} requests are waiting, and the queue takes {self.settings.max_waiting}. Try again later."
            )

    def close(self) -> None:
        """Ends the threads. Work that has not begun is dropped."""
        for threads in (self.device_thread, self.grammar_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def abort(self) -> None:
        """Ends all running requests: their clients are told that the server is shutting down."""
        self.draining = True
        for stream in list(self.active):
            stream.cancel()


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
