"""Ends the jobs of an engine early: after Ctrl-C and SIGTERM, and where others have failed.

Running jobs have some seconds to finish: workers look for a file, and start no further job once it exists. Threads of
Daft wait for worker processes, and Python cannot exit while they do, so all of these processes are awaited.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# How long a job that is being done may take to its end.
_GRACE_SECONDS = 20.0
_SAID = b"\nEnding after the shards that are being done. Press Ctrl-C again to end at once.\n"


class Ending:
    """Whether jobs are to end early. Use it in a `with` statement, which raises the signal's own exception at its end.

    Attributes:
      file: exists once jobs are to end; workers look for it.
      signal: the one that asked jobs to end; 0 if there was none.
    """

    def __init__(self, file: Path):
        """
        Args:
          file: in a folder that all workers see.
        """
        self.file, self.signal = file, 0
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def ask(self) -> None:
        """Asks workers to end. Those whose jobs take too long are killed."""
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
        if self._timer is None:
            self._timer = threading.Timer(_GRACE_SECONDS, _kill_workers)
            self._timer.daemon = True
            self._timer.start()

    def take_signals(self) -> None:
        """Handles Ctrl-C and SIGTERM. Call it again after a Daft query has begun, which takes over Ctrl-C."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            known = signal.getsignal(number)
            if number not in self._before:
                self._before[number] = known
            if self._before[number] in (None, signal.SIG_IGN):
                signal.signal(number, signal.SIG_IGN)
            else:
                signal.signal(number, self._note)

    def __enter__(self) -> "Ending":
        self.file.unlink(missing_ok=True)
        self.take_signals()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        while self._timer is not None and worker_processes():
            time.sleep(0.05)
        if self._timer is not None:
            self._timer.cancel()
        self.file.unlink(missing_ok=True)
        for number, handler in self._before.items():
            if handler is not None:
                signal.signal(number, handler)
        if self.signal:
            # The handler before decides what the signal does: KeyboardInterrupt, SystemExit, or the end.
            signal.raise_signal(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            os._exit(130)
        self.signal = number
        os.write(2, _SAID)
        self.ask()


def worker_processes() -> list[int]:
    """The processes that Daft's native runner has started in this one and that have not ended."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return [child for child in found if b"daft.execution.udf_worker" in _command(child)]


def _kill_workers() -> None:
    for process in worker_processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _command(process: int) -> bytes:
    """Its command; empty for a process that has ended, also if nobody has asked for its status."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
