"""Processes that answer questions one at a time, can be killed at any time, and are replaced now and then."""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

from qwen_jax.errors import InputError

# How long a process may take to start, on a machine that is busy.
_START_SECONDS = 180.0
_CHUNK = 1 << 16


class WorkerPool:
    """Runs a script in several processes; each takes a JSON value a line and answers with one.

    A script begins with the line `ready`. Its environment holds little but the paths of Python, and what it answers is
    read as JSON only: nothing that it does can make this process run code.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        workers: int,
        seconds: float,
        recycle: int | None = None,
        answer_bytes: int = 1 << 16,
        environment: Mapping[str, str] | None = None,
        ended: Callable[[int], None] | None = None,
    ):
        """
        Args:
          script: a Python file.
          arguments: of the script. One more follows: the number of the process, 0 to `workers` - 1. Of the processes
            that are alive no two have the same.
          workers: processes, which start when they are first needed.
          seconds: for one answer; a process that takes longer is killed.
          recycle: answers after which a process is replaced by a fresh one.
          answer_bytes: the longest answer; a process that writes a longer one is killed.
          environment: further variables of the processes.
          ended: called with the id of each process that has ended, by itself or killed, before it is replaced.
        """
        self._command = [sys.executable, "-P", "-s", str(script), *arguments]
        self._environment, self._ended = dict(environment or {}), ended
        self._seconds, self._recycle, self._answer_bytes = seconds, recycle, answer_bytes
        # The numbers that are free, each with its process where that is alive.
        self._idle: LifoQueue[tuple[int, _Worker | None]] = LifoQueue()
        for number in reversed(range(workers)):
            self._idle.put((number, None))
        self._alive: set[_Worker] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(workers, "reward-worker")
        atexit.register(_close, weakref.ref(self))

    def ask(self, questions: Sequence[Any]) -> list[Any]:
        """Answers questions, in order.

        Returns:
          The JSON value of each answer; None where the process died or was killed for its time.

        Raises:
          InputError: a process does not start.
        """
        return list(self._threads.map(self.ask_one, questions))

    def ask_one(self, question: Any, seconds: float | None = None, contents: Sequence[bytes] = ()) -> Any:
        """The answer to one question, asked from this thread; see `ask`.

        Args:
          question: for any of the processes; waits until one is free.
          seconds: for this answer instead of those of the pool.
          contents: bytes that follow the line of the question; the script must know how many.
        """
        number, worker = self._idle.get()
        try:
            if worker is not None and not worker.is_alive():
                self._end(worker)
                worker = None
            if worker is None:
                worker = self._start(number)
            return worker.ask(question, self._seconds if seconds is None else seconds, contents)
        finally:
            if worker is not None and (worker.failed or worker.answers == self._recycle):
                self._end(worker)
                worker = None
            self._idle.put((number, worker))

    def close(self) -> None:
        """Kills the processes. `ask` may be called again, and starts new ones."""
        idle = []
        with contextlib.suppress(Empty):
            while True:
                idle.append(self._idle.get_nowait())
        for number, worker in idle:
            if worker is not None:
                self._end(worker)
            self._idle.put((number, None))
        # A thread that waits for one sees the end of its output.
        with self._lock:
            busy, self._alive = self._alive, set()
        for worker in busy:
            worker.kill()

    def processes(self) -> list[int]:
        """The ids of the processes that are alive."""
        with self._lock:
            return [worker.process.pid for worker in self._alive if worker.is_alive()]

    def _start(self, number: int) -> "_Worker":
        worker = _Worker([*self._command, str(number)], self._environment, self._answer_bytes)
        with self._lock:
            self._alive.add(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: "_Worker") -> None:
        with self._lock:
            self._alive.discard(worker)
        worker.kill()
        worker.close()
        if self._ended is not None:
            self._ended(worker.process.pid)


class _Worker:
    """One process."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], answer_bytes: int):
        self.answers, self.failed = 0, False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._received, self._answer_bytes = bytearray(), answer_bytes
        environment = {
            "PATH": os.defpath,
            # With those that this process has added. It does not start in this one's folder, which "" stands for.
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            # sympy and numpy start no threads of their own.
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)

    def wait_until_ready(self) -> None:
        """Raises InputError with the last lines of its errors if it does not start."""
        if self._line(time.monotonic() + _START_SECONDS) != b"ready":
            self.kill()
            self._errors.seek(0)
            lines = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
            why = " ".join(lines[-3:]) or "it did not get ready in time"
            raise InputError(f"The process {self.process.args!r} does not start: {why}. Run it by hand to see more.")

    def ask(self, question: Any, seconds: float, contents: Sequence[bytes]) -> Any:
        """The answer; None if there is none, and then the process must not be asked again."""
        self.answers += 1
        # Unless the answer comes: also where an exception, such as Ctrl-C, ends the wait.
        self.failed = True
        deadline = time.monotonic() + seconds
        try:
            self._write(b"".join((json.dumps(question).encode(), b"\n", *contents)), deadline)
            line = self._line(deadline)
            answer = None if line is None else json.loads(line)
            self.failed = line is None
            return answer
        except (OSError, ValueError, RecursionError):
            # It died, or wrote something else than JSON.
            return None

    def is_alive(self) -> bool:
        """Whether the process has not ended. Its id stays taken until `kill`."""
        if self.process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> None:
        """Kills the process and all that it started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """Closes the pipes of a process that has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        for close in (self.process.stdin.close, self.process.stdout.close, self._errors.close):
            # A pipe may hold what was not yet written.
            with contextlib.suppress(OSError):
                close()

    def _write(self, data: bytes, deadline: float) -> None:
        """Raises OSError if not all is taken in time."""
        assert self.process.stdin is not None
        file, rest = self.process.stdin.fileno(), memoryview(data)
        poll = select.poll()
        poll.register(file, select.POLLOUT)
        while rest:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError
            rest = rest[os.write(file, rest) :]

    def _line(self, deadline: float) -> bytes | None:
        """The next line; None at the end of the output, or if it does not come in time or is too long."""
        assert self.process.stdout is not None
        file, searched = self.process.stdout.fileno(), 0
        poll = select.poll()
        poll.register(file, select.POLLIN | select.POLLHUP)
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            left = deadline - time.monotonic()
            if left <= 0 or searched > self._answer_bytes:
                return None
            if poll.poll(left * 1000):
                part = os.read(file, _CHUNK)
                if not part:
                    return None
                self._received += part
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line


def _close(pool: "weakref.ref[WorkerPool]") -> None:
    if (alive := pool()) is not None:
        alive.close()
