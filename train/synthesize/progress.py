"""What is shown while a pipeline runs."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from train.synthesize.generator import Answer
from train.synthesize.parts import Counts
from train.synthesize.pipeline import Stage, Together

Retries = Callable[[], Mapping[str, Mapping[str, int]]]


class SynthesisProgress:
    """A line for the stages that run: items that ended, how many went on, what is written a second, and retries."""

    def __init__(self, console: Console | None, segments: int, retries: Retries):
        """
        Args:
          console: None shows nothing.
          segments: groups of stages that run one after the other.
          retries: gives the requests that were sent again, by model and reason.
        """
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            _RetriesColumn(retries),
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


class _RetriesColumn(ProgressColumn):
    """Requests that were sent again. It is drawn anew while nothing is answered: a server that is down shows."""

    def __init__(self, retries: Retries):
        self._retries = retries
        super().__init__()

    def render(self, task: Task) -> Text:
        """The column."""
        return Text(", ".join(retries_text(self._retries())))


def retries_text(retries: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What to say of each model whose requests were sent again.

    Args:
      retries: requests by model and reason: a status, connection, timeout or reply (one that is no answer).
    """
    return [
        f"{model}: {sum(reasons.values()):,} requests sent again ("
        + ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        + ")"
        for model, reasons in retries.items()
    ]
