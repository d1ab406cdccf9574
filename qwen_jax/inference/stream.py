"""The caller's end of a request: steps of its text, as they come, for threads and for asyncio."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from qwen_jax.errors import InputError
from qwen_jax.inference.outputs import Finished, Step


class Stream:
    """A text that grows. Iterate over it, with `for` or `async for`, but only once; the last step has `finished`.

    The engine writes from its own thread and never waits for the reader: what a slow reader has not taken is one step.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        """
        Args:
          cancel: called at most once, if the reader wants no more.
        """
        self._step: Step | None = None
        self._ready = threading.Condition()
        self._cancel: Callable[[], None] | None = cancel
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._failure: BaseException | None = None
        self._ended = False

    # --- the reader's side ---

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        with self._ready:
            while (step := self._take()) is None:
                self._check_open(StopIteration)
                self._ready.wait()
            return step

    def __aiter__(self) -> AsyncIterator[Step]:
        return self

    async def __anext__(self) -> Step:
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with self._ready:
                if (step := self._take()) is not None:
                    return step
                self._check_open(StopAsyncIteration)
                if self._waiter is not None:
                    raise RuntimeError("Another task waits for this stream already; a stream has one reader.")
                event.clear()
                self._waiter = loop, event
            try:
                await event.wait()
            finally:
                with self._ready:
                    if self._waiter == (loop, event):
                        self._waiter = None

    def result(self) -> Finished:
        """Waits for the end of the text. Raises what the engine failed with, if it did."""
        for step in self:
            if step.finished is not None:
                return step.finished
        raise RuntimeError("The stream has been read before.")

    def cancel(self) -> None:
        """Ends the request, unless it has ended. Its pages are free at once; the last step says "abort"."""
        with self._ready:
            cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def _check_open(self, end: type[Exception]) -> None:
        """Raises at the end of the text. Called with the lock held."""
        if isinstance(self._failure, InputError):
            raise self._failure
        if self._failure is not None:
            raise RuntimeError(f"The engine has stopped: {self._failure}") from self._failure
        if self._ended:
            raise end

    def _take(self) -> Step | None:
        """The step that waits for the reader. Called with the lock held."""
        step, self._step = self._step, None
        self._ended |= step is not None and step.finished is not None
        return step

    # --- the engine's side ---

    def put(self, step: Step) -> None:
        """Gives the reader a step, joined to one that it has not taken. The last one has `finished`."""
        with self._ready:
            if self._step is not None:
                step = Step(self._step.text + step.text, self._step.tokens + step.tokens, step.finished)
            self._step = step
            if step.finished is not None:
                self._cancel = None
            self._wake()

    def fail(self, error: BaseException) -> None:
        """Ends the stream with an error, which the reader gets after the steps before it."""
        with self._ready:
            self._failure, self._cancel = error, None
            self._wake()

    def _wake(self) -> None:
        self._ready.notify_all()
        if self._waiter is not None:
            (loop, event), self._waiter = self._waiter, None
            with contextlib.suppress(RuntimeError):  # The reader's event loop is closed; nobody waits.
                loop.call_soon_threadsafe(event.set)
