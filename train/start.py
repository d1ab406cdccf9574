"""How any run starts: what needs no folder is checked, the folder is locked, and the job is launched."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from rich.console import Console

from qwen_jax.attention.sequence import check_length
from qwen_jax.config import ModelConfig
from qwen_jax.parallel.multihost import in_step
from qwen_jax.parallel.sharding import Sharding, make_mesh
from train.data.shards import digest
from train.distributed import check_same
from train.fields import as_json
from train.launch import Job, Programs, launch
from train.lock import lock
from train.observe.goodput import Clock
from train.observe.trackers import check_wandb
from train.step import StepConfig, check_divides


class StartedRun(Protocol):
    """The fields of a run's configuration, a dataclass, that are read here; see `train.config.RunConfig`."""

    @property
    def wandb_project(self) -> str | None: ...


class StagedRun(Protocol):
    """What a configuration says of the meshes and batches of its stages."""

    @property
    def stages(self) -> Sequence[Any]: ...
    def mesh_axes(self, index: int) -> Mapping[str, int]:
        """The mesh of a stage."""
        ...

    def step_config(self, index: int) -> StepConfig:
        """How the steps of a stage are computed."""
        ...


@dataclasses.dataclass(frozen=True)
class Started:
    """A run that has started.

    Attributes:
      clock: that runs since.
      console: for progress. Only process 0 shows any.
    """

    clock: Clock
    console: Console

    def say(self, line: str) -> None:
        """Shows a line."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def launch(self, output: str, job: Callable[[], Job[Any]], programs: Programs | None = None) -> int:
        """Locks the folder of the run, so that no other run may write into it, and launches a job.

        Args:
          output: the folder.
          job: opens the data and says what to train; it may write into the folder.
          programs: see `train.launch.launch`.

        Returns:
          The number of the signal that stopped the run early; 0 if it has ended.

        Raises:
          InputError: the folder is in use, or the job does not fit the run in it.
        """

        folder = Path(output).absolute()
        with contextlib.ExitStack() as stack:
            with in_step(f"Locking {folder}"):
                if jax.process_index() == 0:
                    stack.enter_context(lock(folder, self.say))
            return launch(dataclasses.replace(job(), say=self.say), programs).signal


def begin(config: StartedRun, console: Console | None = None) -> Started:
    """Checks that all processes have the same configuration, and that trackers can be used.

    Args:
      config: of the run.
      console: for progress; standard error by default.

    Raises:
      InputError: they differ, or Weights & Biases is asked for and not installed.
    """
    clock, first_process = Clock(), jax.process_index() == 0
    console = console or Console(stderr=True, quiet=not first_process)
    check_same("configuration", digest(as_json(config)))
    with in_step("Preparing the run"):
        if config.wandb_project and first_process:
            check_wandb()
    return Started(clock, console)


def stage_meshes(config: StagedRun, model: ModelConfig) -> list[Mesh]:
    """The mesh of each stage, which must divide its batch and its rows.

    Args:
      config: of the run.
      model: the architecture.

    Raises:
      InputError: too few devices, or a dimension, batch or row that a mesh does not divide.
    """
    meshes = [make_mesh(config.mesh_axes(index)) for index in range(len(config.stages))]
    for index, (stage, mesh) in enumerate(zip(config.stages, meshes, strict=True)):
        shards = Sharding.for_training(model, mesh).batch_shards
        check_divides(stage.batch_size, config.step_config(index).accumulation, shards, where=f"Stage {index + 1}: ")
        check_length(stage.length, mesh.shape["context"], where=f"Stage {index + 1}: ")
    return meshes
