"""What is shown while a pipeline runs."""

import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from train.synthesize.generator import Answer
from train.synthesize.parts import Counts
from train.synthesize.pipeline import Stage, Together


class SynthesisProgress:
    """A line for the stages that run: items that ended, how many went on, and what is written a second."""

    def __init__(self, console: Console | None, segments: int):
        """
        Args:
          console: None shows nothing.
          segments: groups of stages that run one after the other.
        """
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=console is None,
        )
        self._console, self._segments, self._segment = console, segments, 0
        self._task = self._bar.add_task("")
        self._names, self._ended, self._kept, self._tokens, self._began = "", 0, 0, 0, time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, stages: Sequence[Stage | Together]) -> None:
        """The next stages begin."""
        self._segment += 1
        self._names, self._ended, self._kept = " > ".join(stage.name for stage in stages), 0, 0
        self._show()

    def part(self, counts: Counts, last: str) -> None:
        """A part is done: what happened in it, and the name of its last stage."""
        self._kept += counts.left[last]
        self._ended += counts.left[last] + sum(sum(reasons.values()) for reasons in counts.rejected.values())
        self._show()

    def answer(self, answer: Answer) -> None:
        """A model has answered."""
        self._tokens += answer.tokens
        self._show()

    def say(self, text: str) -> None:
        """Shows a line above."""
        if self._console is not None:
            self._console.print(text)

    def _show(self) -> None:
        rate = self._tokens / max(1e-3, time.monotonic() - self._began)
        self._bar.update(
            self._task,
            description=f"[{self._segment}/{self._segments}] {self._names}: {self._kept:,} of {self._ended:,} kept, "
            f"{rate:,.0f} tokens/s",
        )
