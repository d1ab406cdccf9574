"""Where the engine's thread spends its time, measured by wrapping methods from outside."""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qwen_jax.inference.active import Active
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.runner import Sampled, SampledMany

PARTS = {
    "wait_for_work": "no request is there",
    "plan": "the scheduler chooses the next step",
    "prefill": "chunks of prompts are packed, sent and started",
    "decode": "a decode or verify step is packed, sent and started",
    "sample": "sampling is packed, sent and started",
    "wait": "the device has not finished the step before",
    "read": "tokens are given to their requests and to the scheduler, with `take` and `give` unless those are apart",
    "take": "a request gets its new tokens",
    "give": "its reader gets them",
    "end": "a request ends",
    "masks": "masks are made, where a text has a grammar in a second thread, while the first one starts the model",
    "join": "the engine's thread waits for the second one",
    "rest": "what the runner needs to know of each row is put together, and the loop of a step",
}
"""What the parts of the thread's time are. Each is without the parts that it calls."""
WAITING = ("wait_for_work", "wait", "join")


class HostTimes:
    """Seconds of the engine's threads by part, and counts of decode steps and their rows.

    Attributes:
      seconds: by the names of `PARTS`.
      calls: how often each part ran.
      decode_rows, decode_steps: rows of decode steps in all, and their number.
      prefill_tokens: that prefill steps have read.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
          clock: in seconds; `time.thread_time` does not count what other threads and processes take.
        """
        self._clock = clock
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.calls = dict.fromkeys(PARTS, 0)
        self.decode_rows = self.decode_steps = self.prefill_tokens = 0
        self._of_thread = threading.local()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts for a part, without the time of other parts that it calls."""
        seconds, calls, of_thread, clock = self.seconds, self.calls, self._of_thread, self._clock

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            open_parts: list[float] = of_thread.__dict__.setdefault("open", [])
            begin = clock()
            open_parts.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = clock() - begin
                seconds[part] += took - open_parts.pop()
                calls[part] += 1
                if open_parts:
                    open_parts[-1] += took

        return run

    def _counted_decode(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(rows: Any, *args: Any, **kwargs: Any) -> Any:
            self.decode_rows += len(rows)
            self.decode_steps += 1
            return function(rows, *args, **kwargs)

        return run

    def _counted_prefill(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(rows: Any) -> Any:
            self.prefill_tokens += sum(len(row.tokens) for row in rows)
            return function(rows)

        return run

    @contextmanager
    def of(self, engine: ContinuousEngine, detail: bool = False) -> Iterator["HostTimes"]:
        """Measures an engine inside a `with` statement.

        Args:
          engine: no other engine of this process may run meanwhile.
          detail: whether `take` and `give` are parts of their own. Timing each row costs about 1 us a row itself.
        """
        steps, runner, scheduler = engine._steps, engine._runner, engine._scheduler
        wrapped: list[tuple[Any, str, Any]] = []

        def wrap(owner: Any, name: str, part: str, inner: Callable[[Any], Any] = lambda f: f) -> None:
            wrapped.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, self.timed(part, inner(getattr(owner, name))))

        def install() -> None:
            wrap(engine, "_wait", "wait_for_work")
            wrap(steps, "run", "rest")
            wrap(steps, "_read", "read")
            wrap(steps, "_end", "end")
            wrap(steps, "_next_masks", "masks")
            wrap(steps, "_join", "join")
            wrap(scheduler, "plan", "plan")
            wrap(runner, "prefill", "prefill", self._counted_prefill)
            for name in ("decode_slots", "verify"):
                wrap(runner, name, "decode", self._counted_decode)
            for name in ("sample_slots", "sample_verified"):
                wrap(runner, name, "sample")
            for kind in (Sampled, SampledMany):
                wrap(kind, "read", "wait")
            if detail:
                wrap(Active, "take", "take")
                wrap(Active, "give", "give")

        def remove() -> None:
            for owner, name, before in reversed(wrapped):
                # A method of an instance was its class's; a method of a class was its own.
                if before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

        engine.call(install)
        try:
            yield self
        finally:
            engine.call(remove)

    @property
    def steps(self) -> int:
        """Steps of the model: prefill and decode."""
        return self.calls["prefill"] + self.decode_steps

    @property
    def mean_rows(self) -> float:
        """Rows of a decode step on average."""
        return self.decode_rows / max(self.decode_steps, 1)

    def record(self) -> dict[str, Any]:
        """For a line of JSON. `host_ms`: of a step, without waiting; `wait_ms`: for the device. All in ms a step.

        With grammars, two threads work, and their times are added.

        The host hides behind the device while `wait_ms` is well above 0: a step that the host is late for waits for
        nothing.
        """
        steps = max(self.steps, 1)
        parts = {name: 1e3 * seconds / steps for name, seconds in self.seconds.items() if self.calls[name]}
        host = sum(ms for name, ms in parts.items() if name not in WAITING)
        return {
            "host_ms": host,
            "wait_ms": parts.get("wait", 0.0),
            "host_share": host / max(host + parts.get("wait", 0.0), 1e-12),
            "model_steps": self.steps,
            "decode_steps": self.decode_steps,
            "mean_decode_rows": self.mean_rows,
            "parts_ms": {name: float(f"{ms:.4g}") for name, ms in parts.items()},
        }
