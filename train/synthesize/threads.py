"""Threads that checks run in. One that never ends does not keep the process from ending."""

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any

_Work = tuple["concurrent.futures.Future[Any]", Callable[[], Any]]


class DaemonThreads(concurrent.futures.Executor):
    """An executor whose threads end with the process.

    Those of `ThreadPoolExecutor` are awaited at exit: after a second Ctrl-C a hanging check would keep it alive.
    """

    def __init__(self, workers: int, name: str):
        """
        Args:
          workers: calls that run at the same time.
          name: of the threads.
        """
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "concurrent.futures.Future[Any]":
        """See `Executor.submit`. A SystemExit of the call is given as a RuntimeError: it would end the event loop."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._queue.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """The threads end after what was submitted; nothing waits for them unless `wait`."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            future, call = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
            else:
                future.set_result(result)
