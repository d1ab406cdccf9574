"""Runs the choices of one HTTP request on the engine, and answers as a stream of server-sent events."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen_jax.errors import InputError
from qwen_jax.inference.outputs import Finished, Step
from qwen_jax.inference.request import Request
from qwen_jax.serving.context import (
    Context,
    client_has_gone,
    disconnected,
    ended_by_server,
    sentence,
    to_json,
    too_long,
)
from qwen_jax.serving.engine_protocol import Stream
from qwen_jax.serving.errors import ApiError

T = TypeVar("T")
_DONE = b"data: [DONE]\n\n"


class Run:
    """The choices of one HTTP request, which run on the engine from the start.

    Iterating gives (choice, step) as they come, and ends when all choices have ended. `close` must be called at last.

    Args:
      context: the server.
      requests: one for each choice.
      param: the field of the HTTP request that the prompts came from, for errors.
      arrival: when the HTTP request came, in seconds of `time.monotonic`.
      incremental: whether steps come as tokens come; otherwise each choice has one step, the last. Times to the first
        token are those to the end then.

    Raises:
      ApiError: the engine refuses a request, or the server takes none now.
    """

    def __init__(
        self, context: Context, requests: Sequence[Request], param: str, arrival: float, incremental: bool = True
    ) -> None:
        context.admit(len(requests))
        self._context, self._requests = context, requests
        self._start = arrival
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._unfinished = set(range(len(requests)))
        try:
            for request in requests:
                self._streams.append(context.engine.submit(request, incremental=incremental))
        except InputError as error:
            self.close()
            raise ApiError(sentence(error), param=param) from None
        except BaseException:
            self.close()
            raise
        context.active.update(self._streams)

    def close(self) -> None:
        """Cancels what still runs."""
        for task in self._tasks:
            task.cancel()
        for i, stream in enumerate(self._streams):
            self._context.active.discard(stream)
            if i in self._unfinished:
                stream.cancel()
                self._context.metrics.finished["abort"] += 1
        self._unfinished.clear()

    def stop(self, choice: int) -> None:
        """Ends a choice whose further tokens nobody needs. Its steps end without `finished`."""
        if choice in self._unfinished:
            self._unfinished.discard(choice)
            self._context.metrics.finished["stop"] += 1
            self._streams[choice].cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Step]]:
        source = self._one() if len(self._streams) == 1 else self._several()
        try:
            if not self._context.settings.request_timeout:
                async for item in source:
                    yield item
                return
            while True:
                async with time_limit(self._context, self._start):
                    timed = await anext(source, None)
                if timed is None:
                    return
                yield timed
        finally:
            await source.aclose()

    async def _one(self) -> AsyncGenerator[tuple[int, Step], None]:
        async for step in self._observed(0):
            yield 0, step

    async def _several(self) -> AsyncGenerator[tuple[int, Step], None]:
        # A reader that is slow fills the queue, and then the engine's streams hold what comes.
        queue: asyncio.Queue[tuple[int, Step | BaseException | None]] = asyncio.Queue(2 * len(self._streams))

        async def read(choice: int) -> None:
            try:
                async for step in self._observed(choice):
                    await queue.put((choice, step))
                await queue.put((choice, None))
            except Exception as error:
                await queue.put((choice, error))

        self._tasks = [asyncio.ensure_future(read(i)) for i in range(len(self._streams))]
        left = len(self._tasks)
        while left:
            choice, item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield choice, item

    async def _observed(self, choice: int) -> AsyncIterator[Step]:
        """The steps of a choice, counted. Raises ApiError where the engine gave up."""
        metrics, last, count = self._context.metrics, 0.0, 0
        async for step in self._streams[choice]:
            now = time.monotonic()
            tokens = len(step.tokens)
            if tokens:
                if count:
                    metrics.inter_token.observe((now - last) / tokens, tokens)
                else:
                    metrics.time_to_first_token.observe(now - self._start)
                last, count = now, count + tokens
            if step.finished is not None:
                self._end(choice, step.finished, now)
                if choice not in self._unfinished:
                    return  # `stop` was called: this is the end of a text that was cut on purpose.
                self._unfinished.discard(choice)
                _check(step.finished)
            yield step
        if choice in self._unfinished:
            raise ended_by_server()

    def _end(self, choice: int, finished: Finished, now: float) -> None:
        if choice not in self._unfinished:
            return
        metrics, request = self._context.metrics, self._requests[choice]
        metrics.finished[finished.finish_reason] += 1
        metrics.end_to_end.observe(now - self._start)
        metrics.prompt_tokens.observe(len(request.prompt))
        metrics.generated_tokens.observe(len(finished.token_ids))
        metrics.max_tokens.observe(request.ending.max_new_tokens)
        if finished.token_ids:
            metrics.per_output_token.observe((now - self._start) / len(finished.token_ids))

    async def results(self) -> list[Finished]:
        """Waits for all choices. Raises ApiError if one of them fails."""
        found: dict[int, Finished] = {}
        try:
            async for choice, step in self:
                if step.finished is not None:
                    found[choice] = step.finished
        finally:
            self.close()
        return [found[i] for i in range(len(self._streams))]


def _check(finished: Finished) -> None:
    """Raises ApiError for a text that ended because something went wrong."""
    if finished.finish_reason == "error":
        raise ApiError(finished.error or "The model failed.", 500, code="model_error")
    if finished.finish_reason == "abort":
        raise ended_by_server()


@contextlib.asynccontextmanager
async def time_limit(context: Context, arrival: float) -> AsyncIterator[None]:
    """Cuts what takes longer than a request may. Raises ApiError then."""
    limit = context.settings.request_timeout
    if not limit:
        yield
        return
    try:
        async with asyncio.timeout(max(arrival + limit - time.monotonic(), 0)):
            yield
    except TimeoutError:
        raise too_long(limit) from None


async def while_connected(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Awaits work, and cancels it when the client goes. Raises ApiError then, which nobody reads."""
    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request.receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise client_has_gone()
    finally:
        await _end(tasks)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """An answer of server-sent events: JSON objects, then [DONE]. An error in between is an event, too.

    Args:
      run: is closed when the client goes, or when it does not read for `send_timeout` seconds.
      chunks: JSON objects, made from the run.
      send_timeout: in seconds.
    """

    def __init__(self, run: Run, chunks: AsyncGenerator[dict[str, Any], None], send_timeout: float) -> None:
        # Proxies such as nginx would collect the events otherwise.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self._run, self._chunks, self._send_timeout = run, chunks, send_timeout
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks: list[asyncio.Task[Any]] = [
            asyncio.ensure_future(self._write(send)),
            asyncio.ensure_future(disconnected(receive)),
        ]
        try:
            # A timer for each piece would cost more than the piece itself, so a look now and then must do.
            while not any(task.done() for task in tasks) and not self._is_stuck():
                await asyncio.wait(tasks, timeout=self._send_timeout / 4, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            # First the engine's pages are freed.
            self._run.close()
            await _end(tasks)
            await self._chunks.aclose()

    def _is_stuck(self) -> bool:
        """Whether the client has read nothing for too long."""
        if self._sending_since is None or time.monotonic() - self._sending_since < self._send_timeout:
            return False
        logging.getLogger("qwen_jax").warning(
            f"A client read nothing of its stream for {self._send_timeout:g} s; the request was ended."
        )
        return True

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events():
            self._sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sending_since = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield event(chunk)
        except ApiError as error:
            yield event(error.body())
        except Exception:
            logging.getLogger("qwen_jax").exception("A stream failed.")
            yield event(ApiError("The server failed; its log says why.", 500, code="internal_error").body())
        yield _DONE


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {to_json(value)}\n\n".encode()
