"""Generators behind a URL: any server of OpenAI's chat completions, asked politely until it answers."""

import asyncio
import concurrent.futures
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from qwen_jax.errors import InputError
from train.synthesize.generator import Answer, GeneratorDownError, Request
from train.synthesize.openai_protocol import (
    FaultError,
    answer_of,
    chat_body,
    message_of,
    models_of,
    retry_after,
    shortened,
    vector_of,
)
from train.synthesize.tally import Tally

try:
    import httpx
except ImportError:
    raise InputError("Models at a URL need the package httpx: pip install 'qwen-jax[post]'.") from None

_Read = TypeVar("_Read")
_KEY_VARIABLE = "OPENAI_API_KEY"
_EXAMPLE = "http://127.0.0.1:8000/v1"
# Statuses of faults that pass, beside 5xx.
_PASSING = (408, 409, 425, 429)
# Faults of a server that has too much to do. They say nothing of the request.
_OVERLOADED = ("429", "503")
# What must change before any request is answered.
_TO_DO = {
    401: f"Give the right key: set {_KEY_VARIABLE}.",
    402: "Fill up the account, or ask another server.",
    403: f"Give a key that may use the model: set {_KEY_VARIABLE}.",
    404: f"Give the name of a model that the server has, and a URL such as {_EXAMPLE}.",
    405: f"Give a URL such as {_EXAMPLE}.",
    407: "Set HTTPS_PROXY or HTTP_PROXY to a proxy that lets this through.",
}
# Seconds of the first pause and of the longest, without what the server asks for.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
_CONNECT_SECONDS = 30.0
# Seconds without an answer after which a line on standard error says what the requests wait for.
_SAY_SECONDS = 20.0
_LARGEST_REPLY = 64 * 2**20
_MODEL_TRIES = 4
# Fields that an `extra_body` must leave alone: they are the request, or change what a reply looks like.
_OWN_FIELDS = ("model", "messages", "n", "stream", "seed")


class _RefusedError(Exception):
    """The server says that the request is wrong."""


class OpenAIGenerator:
    """A `Generator` that is a server of OpenAI's API. Use it in one event loop.

    A request is sent again after faults that pass, with pauses that grow at random (exponential backoff with full
    jitter) and that are never shorter than Retry-After asks for. It has the same Idempotency-Key each time, so that a
    service that knows the header does not charge twice.

    A request on which the server fails for `give_up_after` seconds while it answers others is refused; otherwise one
    text that the server cannot digest would end every run.

    Attributes:
      url: as given, without a slash at its end.
      model: the served model, and a hash of `extra_body` if there is one. It names answers that are kept, and may be
        changed before the first request; the server is asked by its own name.
      concurrency, prices: as given.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        key: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        give_up_after: float = 600.0,
        prices: tuple[float, float] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        """
        Args:
          url: of the API, such as http://127.0.0.1:8000/v1. Redirects are not followed.
          model: the name in requests; by default the only model that the server has, which is asked for now.
          key: sent as a bearer token; by default the variable OPENAI_API_KEY, if it is set.
          concurrency: requests that are open at the same time.
          timeout: seconds that the server may take for an answer.
          give_up_after: seconds without an answer to any request after which the server counts as down.
          prices: of a million prompt tokens and of a million generated ones.
          extra_body: further fields of all requests, such as top_k; None leaves a field out.
          clock: gives seconds.
          sleep: waits for seconds of that clock.

        Raises:
          InputError: a wrong argument, or a server that cannot say which model it has.
        """
        self.url = _checked_url(url)
        self._key = _checked_key(os.environ.get(_KEY_VARIABLE) if key is None else key)
        for name, value in (("concurrency", concurrency), ("timeout", timeout), ("give_up_after", give_up_after)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be above 0, got {value}.")
        if prices is not None and not (len(prices) == 2 and all(0 <= price < math.inf for price in prices)):
            raise InputError(f"prices must be two numbers that are not negative, got {prices}.")
        self._extra = dict(extra_body or {})
        try:
            extra = json.dumps(self._extra, sort_keys=True)
        except (TypeError, ValueError):
            raise InputError(f"extra_body must have JSON values, got {self._extra!r:.200}.") from None
        if taken := [name for name in _OWN_FIELDS if name in self._extra]:
            raise InputError(f"extra_body must not have {taken[0]}: the request has it.")
        self.concurrency, self.prices = concurrency, prices
        self._timeout, self._give_up_after = timeout, give_up_after
        self._clock, self._sleep = clock, sleep

        # A connection pool of httpx looks at all of its connections for each request, so each slot has its own.
        self._slots, self._idle = asyncio.Semaphore(concurrency), list[httpx.AsyncClient]()
        self._certificates = httpx.create_ssl_context()
        self._open, self._alive_at, self._said_at = 0, clock(), -math.inf
        self._tally = Tally(prices)
        self._served = self._only_model() if model is None else model
        self.model = self._served
        # Other fields give other answers: those of one are never taken for those of the other.
        if extra != "{}":
            self.model += f"+{hashlib.sha256(extra.encode()).hexdigest()[:12]}"

    def __repr__(self) -> str:
        return f"OpenAIGenerator({self.url!r}, {self.model!r})"

    async def ask(self, request: Request) -> Answer:
        """See `Generator.ask`.

        Raises:
          GeneratorDownError: the server has answered nothing for `give_up_after` seconds.
          InputError: the server knows the key, the model or the path not, or redirects.
        """
        answer = await self._in_slot("/chat/completions", self._body(request), request.key(self.model), answer_of)
        if isinstance(answer, str):
            answer = Answer("", refused=answer)
        self._tally.add(answer)
        return answer

    async def embed(self, text: str) -> list[float] | None:
        """See `train.synthesize.embedder.Embedder.embed`. Raises as `ask` does."""
        content = json.dumps({"model": self._served, "input": text, "encoding_format": "float"}).encode()
        key = hashlib.sha256(content).hexdigest()
        vector = await self._in_slot("/embeddings", content, key, vector_of)
        return None if isinstance(vector, str) else vector

    async def post(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], _Read]) -> _Read | str:
        """Sends a request to another path of the API, with the retries of `ask`.

        Args:
          path: such as "/completions".
          body: JSON values; None leaves a field out. The model is added.
          read: makes a result of the reply's body; raises FaultError for a reply that is none.

        Returns:
          The result, or a text that says why the request is never answered. Raises as `ask` does.
        """
        fields = {"model": self._served, **body, **self._extra}
        content = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        return await self._in_slot(path, content, hashlib.sha256(path.encode() + content).hexdigest(), read)

    def counts(self) -> dict[str, Any]:
        """What was done; see `Tally`. Reasons of retries are statuses, "connection", "timeout" and "reply"."""
        return self._tally.to_json()

    async def close(self) -> None:
        """Closes the connections."""
        while self._idle:
            await self._idle.pop().aclose()

    # --- requests and retries ---

    async def _in_slot(self, path: str, content: bytes, key: str, read: Callable[[bytes], _Read]) -> _Read | str:
        """What `read` makes of the reply to a request; a text says why it is never answered."""
        # Time in which nothing was asked is not the server's.
        if not self._open:
            self._alive_at = self._clock()
        self._open += 1
        try:
            async with self._slots:
                client = self._idle.pop() if self._idle else self._new_client()
                try:
                    return await self._ask(client, path, content, key, read)
                finally:
                    self._idle.append(client)
        finally:
            self._open -= 1

    async def _ask(
        self, client: httpx.AsyncClient, path: str, content: bytes, key: str, read: Callable[[bytes], _Read]
    ) -> _Read | str:
        headers = {"Idempotency-Key": key}
        answer: _Read | str
        failing_since: float | None = None
        attempt = 0
        while True:
            try:
                answer = read(await self._exchange(client, "POST", path, content, headers))
            except _RefusedError as refused:
                answer = str(refused)
            except FaultError as fault:
                self._tally.retries[fault.reason] += 1
                failing_since = self._clock() if failing_since is None else failing_since
                await self._pause(attempt, fault)
                attempt += 1
                failing_for = self._clock() - failing_since
                if failing_for < self._give_up_after or fault.reason in _OVERLOADED:
                    continue
                # Others were answered meanwhile, so that the fault is the request's.
                return f"the server failed on it for {failing_for:.0f} s: {self._public(fault)}"
            self._alive_at = self._clock()
            return answer

    async def _pause(self, attempt: int, fault: FaultError) -> None:
        """Waits before a further attempt. Raises GeneratorDownError once the server has not answered for too long."""
        # The jitter keeps those that were told the same time apart.
        longest = min(_FIRST_PAUSE * 2 ** min(attempt, 20), _LONGEST_PAUSE)
        until = self._clock() + fault.retry_after + random.uniform(0, longest)
        while True:
            now = self._clock()
            left = self._alive_at + self._give_up_after - now
            if left <= 0:
                what = f"{self.url} has not answered for {self._give_up_after:g} s"
                # A traceback that showed the fault would show what the server said of the key.
                raise GeneratorDownError(f"{what}. Its last fault: {self._public(fault)}.") from None
            # Once in each silence, where it is long by the end of the pause.
            if until - self._alive_at >= _SAY_SECONDS and self._said_at < self._alive_at:
                self._said_at = now
                what = f"{self.url} does not answer ({self._public(fault)})"
                print(f"{what}; it is asked again for up to {left:.0f} s", file=sys.stderr, flush=True)
            if now >= until:
                return
            await self._sleep(min(until - now, left))

    def _body(self, request: Request) -> bytes:
        """The body of a request, as JSON."""
        fields = {"model": self._served, **chat_body(request), **self._extra}
        return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()

    # --- HTTP ---

    def _new_client(self) -> httpx.AsyncClient:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            return httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(self._timeout, connect=min(_CONNECT_SECONDS, self._timeout), pool=None),
                follow_redirects=False,
                verify=self._certificates,
            )
        except (ValueError, ImportError) as error:
            raise InputError(f"A proxy of the environment (HTTP_PROXY, ...) cannot be used: {error}") from None

    async def _exchange(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """Sends a request, and returns the body of the answer.

        Raises:
          FaultError: it may be answered another time.
          _RefusedError: it never is.
          InputError: none is, until something is changed.
        """
        self._tally.requests += 1
        try:
            # The limits of httpx are for each piece of a reply; this one is for all of it.
            async with (
                asyncio.timeout(self._timeout),
                client.stream(method, self.url + path, content=content, headers=headers) as response,
            ):
                data = bytearray()
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > _LARGEST_REPLY:
                        raise FaultError("reply", f"its reply has more than {_LARGEST_REPLY:,} bytes")
        except (httpx.ConnectTimeout, httpx.ConnectError) as error:
            raise FaultError("connection", f"no connection ({_named(error)})") from None
        except (httpx.TimeoutException, TimeoutError):
            raise FaultError("timeout", f"no answer within {self._timeout:g} s") from None
        except httpx.RequestError as error:
            raise FaultError("connection", f"the connection broke ({_named(error)})") from None
        status = response.status_code
        if 200 <= status < 300:
            return bytes(data)
        message = f"{status}: {message_of(bytes(data))}"
        if status >= 500 or status in _PASSING:
            raise FaultError(str(status), message, retry_after(response.headers))
        if status < 400:
            where = self._public(response.headers.get("location", "nowhere"))
            raise InputError(f"{self.url} redirects ({status}) to {where}. Give the URL that it really has.")
        if status in _TO_DO:
            model = getattr(self, "_served", "not known yet")
            raise InputError(
                f"{self.url} (model {model}) answered {self._public(message).rstrip('.')}. {_TO_DO[status]}"
            )
        raise _RefusedError(self._public(message))

    def _public(self, text: object) -> str:
        """A message, shortened, and without the key, which servers repeat in their errors."""
        return shortened(str(text).replace(self._key, "[key]") if self._key else str(text))

    # --- the name of the model ---

    def _only_model(self) -> str:
        """The only model of the server, which is asked now, whether an event loop runs here or not."""
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            names = thread.submit(asyncio.run, self._models()).result()
        if not names:
            raise InputError(f"{self.url} has no model. Give it one.")
        if len(names) > 1:
            raise InputError(f"{self.url} has the models {shortened(', '.join(names))}. Name one of them.")
        return names[0]

    async def _models(self) -> list[str]:
        async with self._new_client() as client:
            for attempt in range(_MODEL_TRIES):
                try:
                    return models_of(await self._exchange(client, "GET", "/models"))
                except FaultError as fault:
                    last = self._public(fault)
                    pause = max(fault.retry_after, random.uniform(0, _FIRST_PAUSE * 2**attempt))
                    if attempt + 1 < _MODEL_TRIES:
                        await self._sleep(min(pause, _LONGEST_PAUSE))
                except _RefusedError as refused:
                    last = str(refused)
                    break
        raise InputError(f"{self.url} does not say which model it has: {last}. Start it, or name the model.")


def _named(error: Exception) -> str:
    """An error of a connection as a short text."""
    return shortened(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _checked_url(text: str) -> str:
    """The URL of an API without a slash at its end. Raises InputError, which does not repeat passwords."""
    try:
        url = httpx.URL(text.strip())
    except (httpx.InvalidURL, UnicodeError):
        raise InputError(f"The URL of a model cannot be read. Give one such as {_EXAMPLE}.") from None
    if url.userinfo or url.query or url.fragment:
        raise InputError(f"The URL of a model must have no password, '?' or '#'. Give one such as {_EXAMPLE}.")
    if url.scheme not in ("http", "https") or not url.host or not 0 < (url.port or 80) < 65_536:
        raise InputError(f"Expected the URL of a model such as {_EXAMPLE}, got {text!r:.200}.")
    return str(url).rstrip("/")


def _checked_key(key: str | None) -> str:
    """A key that can stand in a header; "" is none. Raises InputError, which does not repeat it."""
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"The key of the model's server has signs that no key has. Set {_KEY_VARIABLE}.")
    return key
