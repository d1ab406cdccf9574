"""Goodput: the wall time of a run, over all its launches, by what it was spent on."""

import threading
import time
from pathlib import Path

import jax

from train.observe.metrics import read_log

# Every moment since the first launch belongs to exactly one of these.
KINDS = {
    "step": "training steps",
    "compile": "tracing and compiling",
    "input": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "waiting for checkpoints to be saved",
    "profile": "writing a profile",
    "initialisation": "opening data, and reading weights or a checkpoint",
    "lost": "steps that were run again after a restart",
    "down": "not running, between launches",
}
# Seconds between two records of the time in the log.
_EVERY = 60.0


class _Compilation:
    """Compilation in one thread.

    Attributes:
      seconds: spent in tracing, lowering and compiling.
      programs: number of programs compiled.
    """

    _EVENTS = "/jax/core/compile/"
    _BACKEND = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self.seconds, self.programs = 0.0, 0

    def add(self, event: str, duration: float) -> None:
        """Adds an event of `jax.monitoring` that has just ended.

        Args:
          event: its name.
          duration: in seconds.
        """
        now = time.perf_counter()
        self.programs += event == self._BACKEND
        # Tracing a function traces the functions it calls, whose events come first. Subtract events that this one
        # contains, so that their time counts once. The margin allows for clocks that are read one after the other.
        while self._spans and self._spans[-1][0] >= now - duration - 1e-4:
            begin, end = self._spans.pop()
            self.seconds -= end - begin
        self._spans.append((now - duration, now))
        self.seconds += duration


_compilations: dict[int, _Compilation] = {}


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(_Compilation._EVENTS) and threading.get_ident() in _compilations:
        _compilations[threading.get_ident()].add(event, duration_secs)


def compilation() -> _Compilation:
    """Compilation in this thread since its first call of this function."""
    if not _compilations:
        jax.monitoring.register_event_duration_secs_listener(_listen)
    return _compilations.setdefault(threading.get_ident(), _Compilation())


class Clock:
    """Divides the wall time of a launch completely into the kinds of `KINDS`.

    Attributes:
      seconds: time of each kind, over all launches.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._compilation = compilation()
        self._compiled = self._compilation.seconds
        self._last = self._recorded = time.perf_counter()
        self._begin = time.time()

    def carry_over(self, metrics: Path, step: int) -> None:
        """Adds the time of earlier launches.

        Args:
          metrics: log of the run as the last launch left it.
          step: the step that this launch resumes from.
        """
        for kind, seconds in _before(metrics, step, self._begin).items():
            self.seconds[kind] += seconds

    def lap(self, kind: str) -> None:
        """Assigns the time since the last lap to a kind, and compilation in it to "compile".

        Args:
          kind: one of `KINDS`.
        """
        now, compiled = time.perf_counter(), self._compilation.seconds
        of_compile = min(max(compiled - self._compiled, 0.0), now - self._last)
        self.seconds["compile"] += of_compile
        self.seconds[kind] += now - self._last - of_compile
        self._last, self._compiled = now, compiled

    @property
    def stepping(self) -> float:
        """Seconds of steps, including the waiting for data."""
        return self.seconds["step"] + self.seconds["input"]

    @property
    def due(self) -> bool:
        """Whether a minute has passed since the last record."""
        return time.perf_counter() - self._recorded >= _EVERY

    def record(self, step: int) -> dict[str, float]:
        """The record of the time for the log, up to the last lap.

        Args:
          step: number of the last step that was logged.
        """
        self._recorded = time.perf_counter()
        total = sum(self.seconds.values())
        seconds = {f"seconds_{kind}": value for kind, value in self.seconds.items()}
        now = time.time() - (time.perf_counter() - self._last)
        return {"step": step, "time": now, "goodput": self.seconds["step"] / max(total, 1e-9), **seconds}


def _before(metrics: Path, step: int, now: float) -> dict[str, float]:
    """Seconds of each kind from the first launch until `now`, for a launch that resumes from `step`."""
    records = read_log(metrics, warn=False) if metrics.exists() else []  # `MetricsLog` will warn.
    newest = max((i for i, r in enumerate(records) if "seconds_step" in r), default=None)
    if newest is None:
        return {}
    seconds = {kind: records[newest].get(f"seconds_{kind}", 0.0) for kind in KINDS}
    # Steps after the last record of the time have their own records.
    after = [r for r in records[newest:] if "seconds" in r]
    seconds["step"] += sum(r["seconds"] for r in after)
    seconds["down"] += max(now - records[newest]["time"] - sum(r["seconds"] for r in after), 0.0)
    lost = sum(r["seconds"] for r in records if "seconds" in r and r["step"] > step)
    seconds["lost"] += lost
    # The lost steps include some waiting for data, which is not recorded separately.
    of_steps = min(lost, seconds["step"])
    seconds["step"] -= of_steps
    seconds["input"] = max(seconds["input"] - (lost - of_steps), 0.0)
    return seconds
