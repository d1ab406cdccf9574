"""SIGTERM and Ctrl-C: the run saves after the step in progress and ends; a second Ctrl-C ends it at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_SAVING = b"\nCtrl-C: saving after the step in progress. Press it again to end at once, without saving.\n"


class EndNow(KeyboardInterrupt):
    """A second Ctrl-C: nothing is to be waited for."""


class Interruption:
    """Whether a signal asks the run to end. Use it in a `with` statement, which restores the handlers before it.

    With several processes, a signal to any of them ends all after the same step: JAX does that for SIGTERM, and a
    Ctrl-C is passed on to it.

    Attributes:
      signal: the one that ends the run; 0 as long as there is none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._noted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._noted == signal.SIGINT:
                raise EndNow
            os.write(2, _SAVING)  # Not by a console, which may be in the middle of writing.
        self._noted = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's handler of it stops all processes.

    def stop(self, step: int) -> bool:
        """Whether to end after a step. With several processes, all of them ask after each step.

        Args:
          step: its number.
        """
        self.signal = self._asked(step)
        return self.signal != 0

    def _asked(self, step: int) -> int:
        """The signal that asks to end after a step, or 0."""
        if jax.process_count() == 1:
            return self._noted
        # The same answer for one and the same step in all processes.
        return (self._noted or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0
