"""Trains many small runs in this process, or in several that share the devices of this machine."""

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console

from qwen_jax.errors import InputError
from train.config import RunConfig
from train.launch import Programs
from train.run import pretrain
from train.small_runs import compiled_once, status, train_here

# Share of a GPU's memory that all workers together reserve.
_MEMORY = 0.9
_MEMORY_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Seconds that workers have to save after a signal.
_PATIENCE = 120


def train_in_workers(
    configs: Sequence[RunConfig],
    folder: Path,
    workers: int = 1,
    ended: Callable[[RunConfig], None] = lambda config: None,
) -> None:
    """Trains the runs that have neither ended nor diverged.

    Runs with the same shapes share compiled programs: with several workers, they go to the same one as long as it is
    not the last to finish.

    Args:
      configs: of the runs.
      folder: takes compiled programs and the output of workers.
      workers: processes. With 1, runs are trained in this process, one after another.
      ended: is told of each run that has ended, in this process.

    Raises:
      InputError: a run that cannot be started.
      SystemExit: a signal has stopped a run.
    """
    waiting = [config for config in configs if status(config) == "waiting"]
    if workers <= 1 or len(waiting) <= 1:
        programs = Programs()
        with compiled_once(folder):
            train_here(waiting, lambda config: pretrain(config, programs=programs), ended)
        return
    count = min(workers, len(waiting))
    with _started(count, folder) as processes:
        queue, idle = _Queue(waiting), dict(processes)
        busy: dict[Connection, RunConfig] = {}
        while queue or busy:
            for connection in list(idle):
                if config := queue.take(connection):
                    connection.send(config)
                    busy[connection] = config
                    del idle[connection]
            for ready in multiprocessing.connection.wait(list(busy)):
                assert isinstance(ready, Connection)
                config = busy.pop(ready)
                try:
                    stopped, problem = ready.recv()
                except EOFError:
                    log = folder / f"worker-{processes[ready].name}.txt"
                    raise InputError(f"The process that trained {config.output} has died. See {log}.") from None
                if problem is not None and status(config) != "diverged":
                    raise InputError(f"{config.output}: {problem}")
                if stopped:
                    raise SystemExit(128 + stopped)
                idle[ready] = processes[ready]
                ended(config)


class _Queue:
    """Runs that wait, by the shapes that decide what is compiled; the longest come first."""

    def __init__(self, configs: Sequence[RunConfig]):
        self._groups: dict[Any, list[RunConfig]] = {}
        for config in configs:
            stage = config.stages[0]
            self._groups.setdefault((config.model, stage.batch_size, stage.length), []).append(config)
        for group in self._groups.values():
            group.sort(key=_cost)
        self._owners: dict[Any, Connection] = {}

    def __bool__(self) -> bool:
        return any(self._groups.values())

    def take(self, worker: Connection) -> RunConfig | None:
        """The next run of a worker: of shapes that it has compiled, else of such that none has, else of any."""
        left = {key: group for key, group in self._groups.items() if group}
        if not left:
            return None
        mine = [key for key in left if self._owners.get(key) is worker]
        free = [key for key in left if key not in self._owners]
        key = max(mine or free or left, key=lambda key: sum(map(_cost, left[key])))
        self._owners.setdefault(key, worker)
        return left[key].pop()


def _cost(config: RunConfig) -> float:
    """About how long a run takes, to compare runs."""
    stage = config.stages[0]
    # A step has a cost of its own, that of some 4,000 tokens of a million parameters.
    return stage.steps * (4e9 + stage.batch_size * stage.length * config.model.num_params()["active"])


@contextmanager
def _started(count: int, folder: Path) -> Iterator[dict[Connection, BaseProcess]]:
    """Worker processes by the connections to them. They are stopped in the end; what they train is saved."""
    context = multiprocessing.get_context("spawn")
    before = os.environ.get(_MEMORY_VARIABLE)
    share = float(before or _MEMORY) / count
    processes: dict[Connection, BaseProcess] = {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.environ[_MEMORY_VARIABLE] = f"{share:.3f}"
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, folder, str(number)), name=str(number), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
    finally:
        os.environ.pop(_MEMORY_VARIABLE)
        if before is not None:
            os.environ[_MEMORY_VARIABLE] = before
    try:
        yield processes
        for connection in processes:
            connection.send(None)
    except BaseException:
        for process in processes.values():
            process.terminate()  # Training answers by saving.
        raise
    finally:
        for process in processes.values():
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()


def _work(connection: Connection, folder: Path, name: str) -> None:
    """A worker: trains the runs that it is sent, until it is sent None."""
    programs = Programs()
    with (folder / f"worker-{name}.txt").open("a") as output, compiled_once(folder):
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        console = Console(file=output, width=120)
        while (config := _received(connection)) is not None:
            problem, stopped = None, 0
            try:
                stopped = pretrain(config, console, programs=programs)
            except InputError as error:
                problem = str(error)
            connection.send((stopped, problem))
            if stopped:
                return


def _received(connection: Connection) -> RunConfig | None:
    """A run, or None at the end, also if the parent has died."""
    try:
        config: RunConfig | None = connection.recv()
    except (EOFError, KeyboardInterrupt):
        return None
    return config
