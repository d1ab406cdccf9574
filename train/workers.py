"""Trains many small runs in this process, or in several that share the devices of this machine."""

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# Share of a GPU's memory that all of its workers together reserve, and the variables that say so: JAX refuses both at
# once. The second one is the older.
_MEMORY = 0.9
_MEMORY_VARIABLES = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Seconds that workers have to save after a signal.
_PATIENCE = 120


class Workers:
    """Trains runs in this process, or in several. Use it in a `with` statement, which ends them.

    Runs with the same shapes share compiled programs, as long as this lives. With several processes, they go to the
    same one, unless it is the last that has work. Several processes on several GPUs have one GPU each, in turn, unless
    a run's mesh has more than one device.
    """

    def __init__(self, folder: Path, count: int = 1, train: Callable[[RunConfig], int] | None = None):
        """Args:
        folder: takes compiled programs and the output of the processes.
        count: processes. With 1, runs are trained in this process, one after another.
        train: runs a configuration to its end and returns the signal that stopped it, or 0; by default
          `train.run.pretrain`. With several processes it must be one that pickle knows.
        """
        self._folder, self._count, self._train = folder, count, train
        self._programs = Programs()
        self._processes: dict[Connection, BaseProcess] = {}
        self._owners: dict[Any, Connection] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for connection, process in self._processes.items():
            if kind is not None:
                process.terminate()  # Training answers by saving.
            else:
                connection.send(None)
        for process in self._processes.values():
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()

    def train(self, configs: Sequence[RunConfig], ended: Callable[[RunConfig], None] = lambda config: None) -> None:
        """Trains the runs that have neither ended nor diverged.

        Args:
          configs: of the runs.
          ended: is told of each run that has ended, in this process.

        Raises:
          InputError: a run that cannot be started.
          SystemExit: a signal has stopped a run.
        """
        if self._count == 1:
            with compiled_once(self._folder):
                train_here(configs, self._train or (lambda config: pretrain(config, programs=self._programs)), ended)
            return
        waiting = [config for config in configs if status(config) == "waiting"]
        several = any(math.prod(config.mesh_axes(0).values()) > 1 for config in waiting)
        self._start(min(self._count, len(waiting)), [] if several else gpus())
        queue, idle = _Queue(waiting, self._owners), list(self._processes)
        busy: dict[Connection, RunConfig] = {}
        while queue or busy:
            for connection in list(idle):
                if config := queue.take(connection):
                    connection.send(config)
                    busy[connection] = config
                    idle.remove(connection)
            for ready in multiprocessing.connection.wait(list(busy)):
                assert isinstance(ready, Connection)
                config = busy.pop(ready)
                self._receive(ready, config)
                idle.append(ready)
                ended(config)

    def _receive(self, connection: Connection, config: RunConfig) -> None:
        """What a process says of a run that has ended in it."""
        try:
            stopped, problem = connection.recv()
        except EOFError:
            log = self._folder / f"worker-{self._processes[connection].name}.txt"
            raise InputError(f"The process that trained {config.output} has died. See {log}.") from None
        if problem is not None and status(config) != "diverged":
            raise InputError(f"{config.output}: {problem}")
        if stopped:
            raise SystemExit(128 + stopped)

    def _start(self, count: int, cards: Sequence[str]) -> None:
        """Starts processes up to a number, each on one of the GPUs; with no or one GPU, on all devices."""
        context = multiprocessing.get_context("spawn")
        self._folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(self._processes), count):
            ours, theirs = context.Pipe()
            arguments = (theirs, self._folder, str(number), self._train)
            process = context.Process(target=_work, args=arguments, name=str(number), daemon=True)
            # The process reads them when it first uses a GPU.
            with _environment(variables(number, self._count, cards)):
                process.start()
            theirs.close()
            self._processes[ours] = process


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. JAX is not started."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def variables(number: int, count: int, cards: Sequence[str]) -> dict[str, str]:
    """The environment of a worker: its GPU, and its share of the memory.

    Args:
      number: of the worker, from 0.
      count: of workers.
      cards: the GPUs that they have in turn.
    """
    # With one GPU, or none, nothing is chosen.
    here = {"CUDA_VISIBLE_DEVICES": cards[number % len(cards)]} if len(cards) > 1 else {}
    newer, older = _MEMORY_VARIABLES
    name = older if older in os.environ else newer
    together = math.ceil(count / max(len(cards), 1))
    return {**here, name: f"{float(os.environ.get(name) or _MEMORY) / together:.3f}"}


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, and restores them at the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class _Queue:
    """Runs that wait, by the shapes that decide what is compiled; the longest come first."""

    def __init__(self, configs: Sequence[RunConfig], owners: dict[Any, Connection]):
        """Args:
        configs: of the runs.
        owners: the worker that has compiled each group of shapes; it is kept up to date.
        """
        self._owners = owners
        self._groups: dict[Any, list[RunConfig]] = {}
        for config in configs:
            stage = config.stages[0]
            self._groups.setdefault((config.model, stage.batch_size, stage.length), []).append(config)
        for group in self._groups.values():
            group.sort(key=_cost)

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


def _work(connection: Connection, folder: Path, name: str, train: Callable[[RunConfig], int] | None) -> None:
    """A worker: trains the runs that it is sent, until it is sent None."""
    programs = Programs()
    with (folder / f"worker-{name}.txt").open("a") as output, compiled_once(folder):
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        console = Console(file=output, width=120)
        train = train or (lambda config: pretrain(config, console, programs=programs))
        while (config := _received(connection)) is not None:
            problem, stopped = None, 0
            try:
                stopped = train(config)
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
