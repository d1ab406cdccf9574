"""Processes that do units of work and end with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from qwen_jax.errors import InputError

_POLL_SECONDS = 0.3

_call: Callable[..., Any]  # What a worker process calls; set by `_start`.


def _start(
    line: Connection, counter: Any, threads: int, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]
) -> None:
    """Runs once in each worker."""
    global _call
    # Ctrl-C goes to the whole group of processes; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Of the tokenizers library, which otherwise takes all cores in each process.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"

    def end_with_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            line.recv()  # Nothing is ever sent: it ends when the parent closes its end, or dies.
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def advance(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    _call = make(*arguments, advance)


def _work(*arguments: Any) -> Any:
    return _call(*arguments)


class Workers:
    """A pool of spawned processes. Leaving the `with` statement ends them, at once if by an exception."""

    def __init__(self, count: int, threads: int, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]):
        """Args:
        count: of processes.
        threads: that the tokenizer of each process may use.
        make: called once in each process with `arguments` and `advance`, which takes bytes of progress; it returns
          what does a unit of work.
        arguments: of `make`.
        """
        context = multiprocessing.get_context("spawn")
        theirs, self._line = context.Pipe(duplex=False)
        self._counter = context.Value("q", 0)
        self._count = count
        self._pool = ProcessPoolExecutor(count, context, _start, (theirs, self._counter, threads, make, arguments))

    def run(self, jobs: Iterable[tuple[Any, ...]], advance: Callable[[int], None]) -> Iterator[tuple[Any, Any]]:
        """Does jobs in parallel.

        Args:
          jobs: arguments of one call each.
          advance: takes the bytes of progress since its last call.

        Yields:
          A job and its result, in the order in which they end.

        Raises:
          InputError: from a job; or a process was killed.
        """
        waiting = iter(jobs)
        running: dict[Future[Any], Any] = {}
        seen = 0
        try:
            while True:
                # A few ahead, so that no worker waits for this process.
                while len(running) < 2 * self._count and (job := next(waiting, None)):
                    running[self._pool.submit(_work, *job)] = job
                if not running:
                    return
                done, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
                now = self._counter.value
                advance(now - seen)
                seen = now
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise InputError(
                "A worker process ended, most likely because memory ran out. Finished units of work are kept: run "
                "the same command again with fewer --workers or a smaller --max-document-megabytes."
            ) from None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._pool.shutdown()
        self._line.close()
        self._pool.shutdown(cancel_futures=True)
