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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import Any

from qwen_jax.errors import InputError

# The longest answer of a process, and how long one may take to start, on a machine that is busy.
_ANSWER_BYTES = 1 << 16
_START_SECONDS = 180.0


class WorkerPool:
    """Runs a script in several processes; each takes a JSON object a line and answers with one.

    A script begins with the line `ready`. Its environment holds nothing but the paths of Python, and what it answers is
    read as JSON only: nothing that it does can make this process run code.
    """

    def __init__(self, script: Path, arguments: Sequence[str], workers: int, seconds: float, recycle: int):
        """
        Args:
          script: a Python file.
          arguments: of the script.
          workers: processes, which start when they are first needed.
          seconds: for one answer; a process that takes longer is killed.
          recycle: answers after which a process is replaced by a fresh one.
        """
        self._command = [sys.executable, "-P", "-s", str(script), *arguments]
        self._seconds, self._recycle = seconds, recycle
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._alive: set[_Worker] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(workers, "reward-worker")
        atexit.register(_close, weakref.ref(self))

    def ask(self, questions: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Answers questions, in order.

        Returns:
          The JSON value of each answer; None where the process died or was killed for its time.

        Raises:
          InputError: a process does not start.
        """
        return list(self._threads.map(self._answer, questions))

    def close(self) -> None:
        """Kills the processes. `ask` may be called again, and starts new ones."""
        with self._lock:
            alive, self._alive = self._alive, set()
        # A thread that waits for one sees the end of its output.
        for worker in alive:
            worker.kill()

    def processes(self) -> list[int]:
        """The ids of the processes that are alive."""
        with self._lock:
            return [worker.process.pid for worker in self._alive if worker.is_alive()]

    def _answer(self, question: Mapping[str, Any]) -> Any:
        worker = self._idle.get()
        try:
            if worker is not None and not worker.is_alive():
                self._end(worker)
                worker = None
            if worker is None:
                worker = self._start()
            answer = worker.ask(question, self._seconds)
            if worker.failed or worker.answers >= self._recycle:
                self._end(worker)
                worker = None
            return answer
        finally:
            self._idle.put(worker)

    def _start(self) -> "_Worker":
        worker = _Worker(self._command)
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


class _Worker:
    """One process."""

    def __init__(self, command: Sequence[str]):
        self.answers, self.failed = 0, False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._received = b""
        environment = {
            "PATH": os.defpath,
            # With those that this process has added.
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            # sympy and numpy start no threads of their own.
            "OMP_NUM_THREADS": "1",
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

    def wait_until_ready(self) -> None:
        """Raises InputError with the last lines of its errors if it does not start."""
        if self._line(_START_SECONDS) != b"ready":
            self.kill()
            self._errors.seek(0)
            lines = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
            why = " ".join(lines[-3:]) or "it did not get ready in time"
            raise InputError(f"The process {self.process.args!r} does not start: {why}. Run it by hand to see more.")

    def ask(self, question: Mapping[str, Any], seconds: float) -> Any:
        """The answer; None if there is none, and then the process must not be asked again."""
        assert self.process.stdin is not None
        self.answers += 1
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
            line = self._line(seconds)
            if line is not None:
                return json.loads(line)
        except (OSError, ValueError, RecursionError):
            # It died, or wrote something else than JSON.
            pass
        self.failed = True
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

    def _line(self, seconds: float) -> bytes | None:
        """The next line; None at the end of the output, or if it does not come in time or is too long."""
        assert self.process.stdout is not None
        file, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        poll = select.poll()
        poll.register(file, select.POLLIN | select.POLLHUP)
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or len(self._received) > _ANSWER_BYTES:
                return None
            if poll.poll(left * 1000):
                part = os.read(file, 4096)
                if not part:
                    return None
                self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return line


def _close(pool: "weakref.ref[WorkerPool]") -> None:
    if (alive := pool()) is not None:
        alive.close()
