"""The progress of a run on the console: loss, speed and time left."""

import collections
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# Losses and speeds are shown as means over this many steps, because single steps are noisy.
_WINDOW = 20
# Without a terminal, seconds between two lines at most.
_PATIENCE = 300.0


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive steps of equal cost, such as those of a stage.

    Attributes:
      end: number of the last step.
      tokens: number of tokens in a step.
      flops: model FLOPs of a step on one device; see `flops_per_token`.
    """

    end: int
    tokens: int
    flops: float


class Display:
    """Shows loss, speed and time left: a bar on a terminal, about twenty lines elsewhere."""

    def __init__(
        self,
        console: Console,
        steps: int,
        first: int = 0,
        lines: int = 20,
        stretches: Sequence[Stretch] = (),
        peak_flops: float | None = None,
        evaluate_every: int = 0,
    ):
        """Creates a display, which is a context manager.

        Args:
          console: where to show it, usually standard error. Rich respects NO_COLOR.
          steps: number of steps of the run.
          first: number of steps taken already.
          lines: approximate number of lines without a terminal; more if a line would take more than five minutes.
          stretches: steps of equal cost; by default all steps. The time left is computed from the FLOPs that are left
            at the speed of the current stretch so far, and from the evaluations that are left.
          peak_flops: peak FLOP/s of one device, for the MFU; None shows no MFU.
          evaluate_every: steps between two evaluations, as in `LoopConfig`; 0 for none.
        """
        self._console, self._steps, self._first, self._peak = console, steps, first, peak_flops
        self._stretches = list(stretches) or [Stretch(steps, 0, 1.0)]
        self._every = max((steps - first) // lines, 1)
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._speeds: collections.deque[tuple[int, float]] = collections.deque(maxlen=_WINDOW)
        self._evaluations: list[float] = []
        self._evaluate_every = evaluate_every
        self._stretch: Stretch | None = None
        self._seconds, self._begin = 0.0, first
        self._printed = time.perf_counter()
        mfu = [TextColumn("MFU {task.fields[mfu]}")] if peak_flops else []
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss [bold]{task.fields[loss]}[/bold]"),
            TextColumn("{task.fields[rate]} tokens/s"),
            *mfu,
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._progress.start()
            fields: dict[str, Any] = dict.fromkeys(("loss", "rate", "mfu", "left"), "-")
            self._task = self._progress.add_task(
                self._name(self._first + 1), total=self._steps, completed=self._first, **fields
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar."""
        if self._task is not None:
            self._progress.stop()
            self._task = None

    def _index(self, step: int) -> int:
        last = len(self._stretches) - 1
        return next((i for i, stretch in enumerate(self._stretches) if step <= stretch.end), last)

    def _name(self, step: int) -> str:
        count = len(self._stretches)
        return "training" if count == 1 else f"stage {self._index(step) + 1}/{count}"

    def _flops(self, begin: int, end: int) -> float:
        """FLOPs of the steps after `begin` up to `end`."""
        total, before = 0.0, 0
        for stretch in self._stretches:
            total += stretch.flops * max(min(end, stretch.end) - max(begin, before), 0)
            before = stretch.end
        return total

    def _left(self, step: int) -> float:
        """Seconds to the end of the run."""
        steps = self._seconds * self._flops(step, self._steps) / self._flops(self._begin, step)
        if not self._evaluations or not self._evaluate_every:
            return steps
        # There is an evaluation at multiples of the interval and at the end of each stretch, after this step too.
        ends = [s.end for s in self._stretches if s.end >= step and s.end % self._evaluate_every]
        left = self._steps // self._evaluate_every - (step - 1) // self._evaluate_every + len(ends)
        return steps + left * sum(self._evaluations) / len(self._evaluations)

    def step(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Shows a step.

        Args:
          step: its number.
          loss: mean loss in nats.
          tokens: number of tokens.
          seconds: duration, without compilation.
        """
        stretch = self._stretches[self._index(step)]
        if math.isfinite(loss):
            self._losses.append(loss)
        if stretch is not self._stretch:
            self._stretch, self._begin, self._seconds = stretch, step - 1, 0.0
            self._speeds.clear()
        self._speeds.append((tokens, seconds))
        self._seconds += seconds
        rate = sum(n for n, _ in self._speeds) / max(sum(s for _, s in self._speeds), 1e-9)
        fields: dict[str, Any] = {"loss": f"{_mean(self._losses):.3f}", "rate": f"{rate:,.0f}", "mfu": "-", "left": "-"}
        if self._peak and stretch.tokens:
            fields["mfu"] = f"{rate * stretch.flops / stretch.tokens / self._peak:.1%}"
        if step > self._begin + 1:  # The first step is not representative.
            fields["left"] = duration(self._left(step))
        if self._task is not None:
            self._progress.update(self._task, description=self._name(step), completed=step, **fields)
        elif step % self._every == 0 or step == self._steps or time.perf_counter() - self._printed > _PATIENCE:
            self._printed = time.perf_counter()
            parts = [f"step {step}/{self._steps}", f"loss {fields['loss']}", f"{fields['rate']} tokens/s"]
            parts += [f"MFU {fields['mfu']}"] if self._peak else []
            parts += [f"{fields['left']} left"] if fields["left"] != "-" and step < self._steps else []
            self.say("  ".join(parts))

    def evaluation(self, step: int, numbers: Mapping[str, float], seconds: float) -> None:
        """Prints held-out metrics above the bar.

        Args:
          step: number of the last step.
          numbers: metrics by name.
          seconds: duration of the evaluation, without compilation.
        """
        self._evaluations.append(seconds)
        texts, parts = [], []
        for name, value in numbers.items():
            shown = name.removeprefix("held_out_").replace("_", " ")
            if name.endswith("_loss") and name != "held_out_loss":
                parts.append(f"{shown.removesuffix(' loss')} {value:.3f}")
            else:
                texts.append(f"{shown} {value:.3f}")
        self.say(f"step {step}: held-out {'  '.join(texts)}" + (f" ({', '.join(parts)})" if parts else ""))

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _mean(values: Sequence[float] | collections.deque[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def duration(seconds: float) -> str:
    """Formats seconds, such as "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
