"""A trace of some steps of training, for xprof."""

import os
from pathlib import Path

import jax


class Profile:
    """A trace of some steps for xprof. Use it in a `with` statement, which ends a trace that is still going on."""

    def __init__(self, folder: str | os.PathLike[str], first: int, last: int):
        """Args:
        folder: where the trace is written.
        first: step to begin with, counted from 1.
        last: step to end with.
        """
        self.folder, self.first, self.last = Path(folder), first, last
        self._tracing = False

    def begin(self) -> None:
        """Starts to trace."""
        jax.profiler.start_trace(self.folder)
        self._tracing = True

    def end(self) -> bool:
        """Writes the trace; returns whether there was one."""
        tracing, self._tracing = self._tracing, False
        if tracing:
            jax.profiler.stop_trace()
        return tracing

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
