"""The compiled programs of a runner: all of them ahead of time, or each when it is first run."""

import concurrent.futures
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from qwen_jax.inference import exported
from qwen_jax.inference.buckets import Buckets
from qwen_jax.inference.runner_lowering import Program, all_programs, caller, prepare
from qwen_jax.inference.runner_programs import StaticArgs
from qwen_jax.params import Params

Report = Callable[[str, float, int, int], None]
"""Called after each program that was compiled, with its name, the seconds it took, its number and that of all."""

_log = logging.getLogger(__name__)


class Programs:
    """The programs of a runner. Call it from one thread."""

    def __init__(self, static: StaticArgs, buckets: Buckets, mesh: Mesh):
        """
        Args:
          static: the settings that are compiled in.
          buckets: the sizes of the programs.
          mesh: of the parameters.
        """
        self._static, self._mesh = static, mesh
        self._all, self._folder = all_programs(static.settings, buckets), exported.folder(mesh)
        self._compiled: dict[Program, Callable[..., Any]] = {}

    @property
    def names(self) -> list[str]:
        """The names of all programs."""
        return [program.name for program in self._all]

    def compile(self, params: Params, report: Report | None = None) -> None:
        """Compiles all programs; nothing is compiled afterwards.

        Args:
          params: arrays, or their shapes and shardings.
          report: called in this thread after each program.
        """
        missing = [program for program in self._all if program not in self._compiled]

        def finish(
            program: Program, jitted: Callable[..., Any], lowered: jax.stages.Lowered, seconds: float
        ) -> tuple[Any, float]:
            begun = time.perf_counter()
            compiled = caller(jitted, lowered.compile(), self._mesh, params)
            return compiled, seconds + time.perf_counter() - begun

        waiting: dict[concurrent.futures.Future[tuple[Any, float]], Program] = {}
        finished: list[Program] = []

        def collect(done: Iterable[concurrent.futures.Future[tuple[Any, float]]]) -> None:
            for future in done:
                program, (compiled, seconds) = waiting.pop(future), future.result()
                self._compiled[program] = compiled
                finished.append(program)
                _log.info("compiled %s, %d of %d, %.1f s", program.name, len(finished), len(missing), seconds)
                if report is not None:
                    report(program.name, seconds, len(finished), len(missing))

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for program in missing:
                # Tracing and lowering are Python, so they are done in this thread; compiling is not.
                begun = time.perf_counter()
                parts = prepare(program, self._static, self._mesh, params, self._folder)
                waiting[pool.submit(finish, program, *parts, time.perf_counter() - begun)] = program
                collect([future for future in waiting if future.done()])
            collect(concurrent.futures.as_completed(list(waiting)))

    def get(self, program: Program, params: Params) -> Callable[..., Any]:
        """A program, compiled now if it was not before; called with arrays in the order of its function's arguments.

        Args:
          program: which one.
          params: arrays, or their shapes and shardings.
        """
        compiled = self._compiled.get(program)
        if compiled is None:
            jitted, lowered = prepare(program, self._static, self._mesh, params, self._folder)
            compiled = self._compiled[program] = caller(jitted, lowered.compile(), self._mesh, params)
        return compiled
