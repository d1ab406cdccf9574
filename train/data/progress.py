"""Progress of work on files: a bar on a terminal, about twenty lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINES = 20


class BuildProgress:
    """Shows how much input is processed, the speed, and the time left. Rich respects NO_COLOR."""

    def __init__(
        self, console: Console, units: int, done: int, total_bytes: int, done_bytes: int, label: str = "building"
    ):
        """Args:
        console: where progress is shown, usually standard error.
        units: number of units of work.
        done: units that an earlier process finished.
        total_bytes: bytes of input.
        done_bytes: bytes of input in the finished units.
        label: says what is done.
        """
        self._console, self._units, self._done = console, units, done
        self._bytes, self._first, self._total = done_bytes, done_bytes, total_bytes
        self._begin, self._printed = time.perf_counter(), done_bytes
        self._progress = Progress(
            TextColumn(label),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TextColumn("{task.fields[rate]:.1f} MB/s"),
            TextColumn("{task.fields[units]}/" + f"{units} units"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "BuildProgress":
        if self._done:
            self._print(f"resuming: {self._done} of {self._units} units are finished")
        if self._console.is_terminal:
            self._progress.start()
            self._task = self._progress.add_task(
                "", total=self._total, completed=self._bytes, rate=0.0, units=self._done
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, count: int) -> None:
        """Adds to what is processed.

        Args:
          count: bytes of input that were processed since the last call.
        """
        self._bytes += count
        elapsed = max(time.perf_counter() - self._begin, 1e-9)
        rate = (self._bytes - self._first) / elapsed / 1e6
        if self._task is not None:
            self._progress.update(self._task, completed=self._bytes, rate=rate)
        elif self._bytes - self._printed >= self._total / _LINES:
            self._printed = self._bytes
            left = (self._total - self._bytes) / max(rate * 1e6, 1e-9)
            self._print(f"{self._bytes / 1e6:.1f}/{self._total / 1e6:.1f} MB  {rate:.1f} MB/s  {left:.0f} s left")

    def unit(self) -> None:
        """Counts a finished unit."""
        self._done += 1
        if self._task is not None:
            self._progress.update(self._task, units=self._done)
