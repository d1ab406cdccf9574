"""Where the wall time of a run goes, over all its launches."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

# Every moment from the first launch on belongs to exactly one of these.
KINDS = {
    "step": "training steps",
    "compile": "tracing and compiling",
    "input": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "saving, as far as training waited for it",
    "profile": "writing a profile",
    "initialisation": "opening data, weights or a checkpoint",
    "lost": "steps that had to be run again",
    "down": "not running, between launches",
}
# Seconds between two records in the log.
_EVERY = 60.0


class _Compilation:
    """Seconds that a thread has spent in tracing, lowering and compiling, and programs that it has compiled."""

    _EVENTS = "/jax/core/compile/"
    _BACKEND = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self.seconds, self.programs = 0.0, 0

    def add(self, event: str, duration: float) -> None:
        now = time.perf_counter()
        self.programs += event == self._BACKEND
        # Tracing a function traces those inside it, and their events come first: what a span contains is no time of
        # its own. The margin is for the clocks, which are read one after the other.
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
    """What this thread has compiled since the first call in it: `seconds`, and how many `programs`."""
    if not _compilations:
        jax.monitoring.register_event_duration_secs_listener(_listen)
    return _compilations.setdefault(threading.get_ident(), _Compilation())


class Clock:
    """Divides the time of a launch into kinds of `KINDS`; all of it, so that they add up to the wall time.

    Attributes:
      seconds: of each kind, over all launches.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._compilation = compilation()
        self._compiled = self._compilation.seconds
        self._last = self._recorded = time.perf_counter()
        self._begin = time.time()

    def carry_over(self, metrics: Path, step: int) -> None:
        """Adds the launches before this one.

        Args:
          metrics: log of the run as the launch before left it.
          step: that this launch goes on from.
        """
        for kind, seconds in _before(metrics, step, self._begin).items():
            self.seconds[kind] += seconds

    def lap(self, kind: str) -> None:
        """Says what the time since the last lap was spent on; compilation in it is taken out."""
        now, compiled = time.perf_counter(), self._compilation.seconds
        of_compile = min(max(compiled - self._compiled, 0.0), now - self._last)
        self.seconds["compile"] += of_compile
        self.seconds[kind] += now - self._last - of_compile
        self._last, self._compiled = now, compiled

    @property
    def stepping(self) -> float:
        """Seconds of steps, with their waiting for data."""
        return self.seconds["step"] + self.seconds["input"]

    @property
    def due(self) -> bool:
        """Whether the last record is a minute old."""
        return time.perf_counter() - self._recorded >= _EVERY

    def record(self, step: int) -> dict[str, float]:
        """A record for the log, up to the last lap.

        Args:
          step: the last one that was reported.
        """
        self._recorded = time.perf_counter()
        total = sum(self.seconds.values())
        seconds = {f"seconds_{kind}": value for kind, value in self.seconds.items()}
        now = time.time() - (time.perf_counter() - self._last)
        return {"step": step, "time": now, "goodput": self.seconds["step"] / max(total, 1e-9), **seconds}


def _before(metrics: Path, step: int, now: float) -> dict[str, float]:
    """Seconds of each kind from the first launch until `now`, seen from a launch that goes on from `step`."""
    records = list(_records(metrics))
    newest = max((i for i, r in enumerate(records) if "seconds_step" in r), default=None)
    if newest is None:
        return {}
    seconds = {kind: records[newest].get(f"seconds_{kind}", 0.0) for kind in KINDS}
    # Steps that were taken after the last record of the time are known by their own.
    after = [r for r in records[newest:] if "seconds" in r]
    seconds["step"] += sum(r["seconds"] for r in after)
    seconds["down"] += max(now - records[newest]["time"] - sum(r["seconds"] for r in after), 0.0)
    lost = sum(r["seconds"] for r in records if "seconds" in r and r["step"] > step)
    seconds["lost"] += lost
    # The waiting for data in those steps is not known apart; there is hardly any.
    of_steps = min(lost, seconds["step"])
    seconds["step"] -= of_steps
    seconds["input"] = max(seconds["input"] - (lost - of_steps), 0.0)
    return seconds


def _records(metrics: Path) -> Iterator[Mapping[str, float]]:
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # A killed process may leave half of a last line.
        if isinstance(record, dict) and "step" in record:
            yield record
