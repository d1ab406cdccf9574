"""Progress of a curation: a bar for the stage that runs on a terminal, a few lines for each stage elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Lines of a stage where there is no terminal, and seconds between two at least.
_LINES, _SECONDS = 20, 10.0


class CurationProgress:
    """Shows the stage that runs: documents and bytes a second, and the time left."""

    def __init__(self, console: Console | None, stages: int):
        """
        Args:
          console: where it is shown; None shows nothing.
          stages: how many there are, reading and writing among them.
        """
        self._console, self._stages, self._number = console, stages, 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TextColumn("{task.fields[rates]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=console is None or not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._name, self._documents, self._bytes, self._began = "", 0, 0, time.monotonic()
        self._total, self._said_bytes, self._said = 1, 0, self._began

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str, total_bytes: int, shards: int, done: int) -> None:
        """A stage begins.

        Args:
          name: of it.
          total_bytes: of the shards that it still has to do.
          shards: that it has in all.
          done: shards that an earlier run finished.
        """
        self._number += 1
        self._name, self._documents, self._bytes, self._began = name, 0, 0, time.monotonic()
        self._total, self._said_bytes, self._said = max(total_bytes, 1), 0, self._began
        if done:
            self.say(f"{name}: {done} of {shards} shards are finished already")
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(
            f"[{self._number}/{self._stages}] {name}", total=self._total, rates="", visible=done < shards
        )

    def advance(self, documents: int, size: int) -> None:
        """A shard is done: its documents and bytes."""
        self._documents += documents
        self._bytes += size
        assert self._task is not None
        self._bar.update(self._task, advance=size, rates=self._rates())
        now = time.monotonic()
        far = self._bytes - self._said_bytes >= self._total / _LINES and now - self._said >= _SECONDS
        if far and self._console is not None and not self._console.is_terminal:
            left = (self._total - self._bytes) * (now - self._began) / max(self._bytes, 1)
            self.say(f"{self._name}: {self._bytes / self._total:.0%}, {self._rates()}, {left:,.0f} s left")
            self._said_bytes, self._said = self._bytes, now

    def end(self, kept: int, came: int) -> float:
        """The stage is done.

        Args:
          kept: documents that it leaves.
          came: documents that it was given.

        Returns:
          How many seconds it took.
        """
        seconds = time.monotonic() - self._began
        rates = f", {self._rates()}" if self._bytes else ""
        self.say(f"{self._name}: {kept:,} of {came:,} documents{rates}")
        return seconds

    def say(self, text: str) -> None:
        """Shows a line."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-3)
        return f"{self._documents / seconds:,.0f} documents/s, {self._bytes / seconds / 1e6:,.1f} MB/s"
