"""Worker processes that do jobs in parallel and end with the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from typing import Any, Generic, ParamSpec, TypeVar

from qwen_jax.errors import InputError

J = ParamSpec("J")
R = TypeVar("R")

_POLL_SECONDS = 0.3


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_call: Callable[..., Any]  # Does a job in a worker process; set by `_start`.


def _start(
    line: Connection,
    counter: "Synchronized[int]",
    threads: int,
    make: Callable[[Callable[[int], None]], Callable[..., Any]],
) -> None:
    """Initialises a worker process."""
    global _call
    # Ctrl-C signals the whole process group; the parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The tokenizers library would use all cores in each process.
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"

    def end_with_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            line.recv()  # Nothing is ever sent. This returns when the parent closes its end or dies.
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    def advance(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    _call = make(advance)


def _work(*arguments: object) -> Any:
    return _call(*arguments)


class Workers(Generic[J, R]):
    """A pool of spawned processes, as a context manager. An exception in the `with` block ends them at once."""

    def __init__(self, count: int, threads: int, make: Callable[[Callable[[int], None]], Callable[J, R]]):
        """Spawns the processes.

        Args:
          count: number of processes.
          threads: number of threads for the tokenizer of each process.
          make: is called once in each process with `advance`, a function for the bytes of progress since its last
            call, and returns the function that does a job.
        """
        context = multiprocessing.get_context("spawn")
        theirs, self._line = context.Pipe(duplex=False)
        self._counter = context.Value("q", 0)
        self._count = count
        self._pool = ProcessPoolExecutor(count, context, _start, (theirs, self._counter, threads, make))

    def run(
        self, jobs: Iterable[tuple[Any, ...]], advance: Callable[[int], None]
    ) -> Iterator[tuple[tuple[Any, ...], R]]:
        """Does jobs in parallel.

        Args:
          jobs: the arguments of each job.
          advance: is called with the bytes of progress since its last call.

        Yields:
          A job and its result, in the order in which jobs end.

        Raises:
          InputError: a job raised it, or a process was killed.
        """
        waiting = iter(jobs)
        running: dict[Future[R], tuple[Any, ...]] = {}
        seen = 0
        try:
            while True:
                # Submit a few jobs ahead, so that no worker waits for this process.
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

    def __enter__(self) -> "Workers[J, R]":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._pool.shutdown()
        self._line.close()
        self._pool.shutdown(cancel_futures=True)
