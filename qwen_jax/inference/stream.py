"""The caller's end of a request: steps of its text, as they come, for threads and for asyncio."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from qwen_jax.errors import InputError
from qwen_jax.inference.outputs import Finished, Step, TokenInfos


class Readers:
    """Readers on event loops that wait and have got something: each loop is woken once for all of its readers."""

    def __init__(self) -> None:
        self._waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}

    def add(self, waiter: "asyncio.Future[None]") -> None:
        """Adds a reader."""
        self._waiters.setdefault(waiter.get_loop(), []).append(waiter)

    def wake(self) -> None:
        """Wakes all that were added."""
        if not self._waiters:
            return
        waiters, self._waiters = self._waiters, {}
        for loop, some in waiters.items():
            with contextlib.suppress(RuntimeError):  # The readers' event loop is closed; nobody waits.
                loop.call_soon_threadsafe(_wake, some)


def _wake(waiters: "list[asyncio.Future[None]]") -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


class Stream:
    """A text that grows. Iterate over it, with `for` or `async for`, but only once; the last step has `finished`.

    The engine writes from its own thread and never waits for the reader: what a slow reader has not taken is one step.
    """

    def __init__(self, cancel: Callable[[], None], readers: Readers) -> None:
        """
        Args:
          cancel: called at most once, if the reader wants no more.
          readers: where a reader on an event loop is added when there is a step for it. The engine wakes it.
        """
        self._step: Step | None = None
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._threads_wait = 0
        self._cancel: Callable[[], None] | None = cancel
        self._readers = readers
        self._waiter: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self._ended = False
        self._on_end: Callable[[], None] | None = None

    # --- the reader's side ---

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        with self._ready:
            while (step := self._take()) is None:
                self._check_open(StopIteration)
                self._threads_wait += 1
                try:
                    self._ready.wait()
                finally:
                    self._threads_wait -= 1
            return step

    def __aiter__(self) -> AsyncIterator[Step]:
        return self

    async def __anext__(self) -> Step:
        while True:
            with self._lock:
                if (step := self._take()) is not None:
                    return step
                self._check_open(StopAsyncIteration)
                if self._waiter is not None:
                    raise RuntimeError("Another task waits for this stream already; a stream has one reader.")
                waiter = self._waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                with self._lock:
                    if self._waiter is waiter:
                        self._waiter = None

    def result(self) -> Finished:
        """Waits for the end of the text. Raises what the engine failed with, if it did."""
        for step in self:
            if step.finished is not None:
                return step.finished
        raise RuntimeError("The stream has been read before.")

    def when_ended(self, function: Callable[[], None]) -> None:
        """Has a function called once when the text has ended or failed: at once, or later in the engine's thread.

        `result` does not wait then. So one reader can wait for many texts.

        Args:
          function: must return soon and raise nothing: the engine waits for it.
        """
        with self._ready:
            ended = self._ended or self._failure is not None
            ended |= self._step is not None and self._step.finished is not None
            if not ended:
                self._on_end = function
        if ended:
            function()

    def cancel(self) -> None:
        """Ends the request, unless it has ended. Its pages are free at once; the last step says "abort"."""
        with self._lock:
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
        with self._lock:
            before = self._step
            self._step = step if before is None else _joined(before, step)
            if step.finished is not None:
                self._cancel = None
            self._wake()
        if step.finished is not None:
            self._tell()

    def fail(self, error: BaseException) -> None:
        """Ends the stream with an error, which the reader gets after the steps before it."""
        with self._lock:
            self._failure, self._cancel = error, None
            self._wake()
        self._tell()

    def _tell(self) -> None:
        """Tells the reader of the end, without the lock: it may read at once."""
        with self._ready:
            function, self._on_end = self._on_end, None
        if function is not None:
            function()

    def _wake(self) -> None:
        """Wakes a reader in a thread, and adds one on an event loop to those that are woken later."""
        if self._threads_wait:
            self._ready.notify_all()
        if self._waiter is not None:
            self._readers.add(self._waiter)
            self._waiter = None


def _joined(first: Step, then: Step) -> Step:
    """Two steps as one."""
    assert isinstance(first.tokens, TokenInfos), first
    assert isinstance(then.tokens, TokenInfos), then
    return Step(first.text + then.text, first.tokens.until(then.tokens), then.finished)
