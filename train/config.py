"""A pre-training run as a configuration: nested frozen dataclasses that a Python function returns."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.remat import Remat
from train.data.mixture import MixtureStage, Weight
from train.evaluate.in_training import TaskEvaluation
from train.fields import as_json as as_json
from train.fields import at_least, call, check_axes
from train.fields import set_fields as _set_fields
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import AdamW, OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.step import StepConfig

# Fields of `RunConfig` that were flat once, and their paths now. Records of old launches have the old names.
MOVED = {
    **{name: f"step.{name}" for name in ("dtype", "remat", "scan_layers", "attention", "ring", "spike_factor")},
    **{name: f"objective.{name}" for name in ("loss_chunk", "z_loss", "moe")},
    **{name: f"optimizer.{name}" for name in ("beta1", "beta2", "eps", "weight_decay", "clip_norm")},
    **{name: f"loop.{name}" for name in ("evaluate_every", "max_skipped")},
    **{name: f"checkpoints.{name}" for name in ("keep_last", "keep_every")},
    "checkpoint_every": "checkpoints.every",
}
# Fields that records of earlier versions lack, and what they stand for there.
CAME_LATER = {"step.products": "bfloat16", "objective.compact_loss": False, "optimizer.moments": "float32"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run: some steps on one mixture of data, with one row length.

    Attributes:
      schedule: its steps and their learning rate.
      length: tokens in a row; the data sets must have been built with it.
      batch_size: rows in the global batch of a step.
      mixture: weight of each data set, by its name in `RunConfig.data`; exact, see `MixtureStage`.
      rope_theta: base of the rotary embedding; by default the model's.
      accumulation: micro-batches per step; by default the run's `step.accumulation`.
      remat: by default the run's `step.remat`.
      mesh: by default the run's.

    Raises:
      InputError: a value out of range.
    """

    schedule: Schedule
    length: int
    batch_size: int
    mixture: Mapping[str, Weight]
    rope_theta: float | None = None
    accumulation: int | None = None
    remat: Remat | None = None
    mesh: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        at_least(self, length=2, batch_size=1, accumulation=1)
        if self.rope_theta is not None and not (self.rope_theta > 0 and math.isfinite(self.rope_theta)):
            raise InputError(f"rope_theta must be positive, got {self.rope_theta}.")

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.schedule.steps


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A pre-training run.

    Attributes:
      output: folder of the run: log, checkpoints, and what it was started with.
      model: the architecture. Stages may change its `rope_theta`.
      tokenizer: folder of the tokenizer that the data was built with.
      data: folders of `qwen-jax data build`, each under the name that mixtures give it. For small work also raw
        documents: a file, a folder or a pattern. They are built when the run starts, into its own folder.
      stages: in order.
      held_out: data sets to evaluate on, by name; given as in `data`.
      initial: folder of an Orbax checkpoint whose weights to begin with; by default they are initialised at random.
      seed: of weights and data order.
      mesh: sizes of the axes that are not 1.
      objective: what is minimised.
      optimizer: AdamW; its learning rate is in the stages.
      step: how a step is computed.
      loop: evaluation, and when to give up.
      tasks: benchmarks to measure while training; by default none.
      checkpoints: how often to save, and what to keep.
      export: Hugging Face folder to write after the last step; by default none.
      verify_data: before training, compare the sha256 of all data with what was built. It reads all data.
      max_raw_megabytes: raw documents whose files are larger than this in all must be built ahead.
      profile: first and last step to trace for xprof; by default nothing is traced.
      wandb_project: project of Weights & Biases to log to, besides TensorBoard; by default none.

    Raises:
      InputError: a value out of range, or values that do not fit together.
    """

    output: str
    model: ModelConfig
    tokenizer: str
    data: Mapping[str, str]
    stages: tuple[Stage, ...]
    held_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    initial: str | None = None
    seed: int = 0
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    objective: PretrainConfig = PretrainConfig()
    optimizer: AdamW = AdamW()
    step: StepConfig = StepConfig()
    loop: LoopConfig = LoopConfig()
    tasks: TaskEvaluation | None = None
    checkpoints: CheckpointConfig = CheckpointConfig()
    export: str | None = None
    verify_data: bool = False
    max_raw_megabytes: float = 64.0
    profile: tuple[int, int] | None = None
    wandb_project: str | None = None

    def __new__(cls, *args: object, **fields: object) -> "RunConfig":
        """Names the new path of a field that was flat once."""
        for name in fields:
            if name in MOVED:
                group, field = MOVED[name].split(".")
                raise InputError(
                    f"RunConfig has no field {name!r} any more: it is {MOVED[name]}, a field {field!r} of {group!r}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # Fields of their own.
        for name in ("output", "tokenizer"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty. Give the path of a folder.")
        for name in ("export", "initial", "wandb_project"):
            if getattr(self, name) == "":
                raise InputError(f"{name} is empty. Give a value, or null for none.")
        if not self.max_raw_megabytes >= 0:
            raise InputError(f"max_raw_megabytes must be at least 0, got {self.max_raw_megabytes}.")
        # Stages, with all that they share.
        if not self.stages:
            raise InputError("A run needs at least one stage, got none.")
        for index in range(len(self.stages)):
            self.next_token(index)
            self.step_config(index)
            check_axes(self.mesh_axes(index))
        self.mixture_stages()
        # The trace, which must be within the run.
        if self.profile is not None and (
            len(self.profile) != 2 or not 1 <= self.profile[0] <= self.profile[1] <= self.ends[-1]
        ):
            raise InputError(
                f"profile must be the first and the last step to trace, from 1 to {self.ends[-1]}, the last of the "
                f"run; got {self.profile}."
            )

    @property
    def ends(self) -> list[int]:
        """The number of the last step of each stage, counted from 1."""
        return list(itertools.accumulate(stage.steps for stage in self.stages))

    def mixture_stages(self) -> list[MixtureStage]:
        """The stages, as `Mixture` expects them."""
        return [MixtureStage(s.steps, s.batch_size, s.length, s.mixture) for s in self.stages]

    def next_token(self, index: int) -> NextToken:
        """The objective of a stage.

        Args:
          index: of the stage, from 0.
        """
        stage, model = self.stages[index], self.model
        model = dataclasses.replace(
            model,
            rope_theta=model.rope_theta if stage.rope_theta is None else stage.rope_theta,
            max_position_embeddings=max(model.max_position_embeddings, stage.length),
        )
        return NextToken(model, self.objective)

    def step_config(self, index: int) -> StepConfig:
        """How the steps of a stage are computed.

        Args:
          index: of the stage, from 0.
        """
        stage = self.stages[index]
        accumulation = self.step.accumulation if stage.accumulation is None else stage.accumulation
        return dataclasses.replace(self.step, accumulation=accumulation, remat=stage.remat or self.step.remat)

    def optimizer_config(self) -> OptimizerConfig:
        """The optimiser with the schedules of all stages."""
        return OptimizerConfig(tuple(stage.schedule for stage in self.stages), self.optimizer)

    def mesh_axes(self, index: int) -> Mapping[str, int]:
        """The mesh of a stage.

        Args:
          index: of the stage, from 0.
        """
        mesh = self.stages[index].mesh
        return self.mesh if mesh is None else mesh


def set_fields(config: RunConfig, *changes: str) -> RunConfig:
    """`train.fields.set_fields` for a run; a flat name of the past is an error that gives the new path."""
    return _set_fields(config, *changes, moved=MOVED)


def load(path: str, changes: Sequence[str] = ()) -> RunConfig:
    """Calls a configuration's function and applies changes.

    Args:
      path: "FILE.py" or "FILE.py:function"; by default the function is `config`, or the only public one of the file.
      changes: each "path.to.field=value", such as "stages.0.schedule.steps=100" or "mesh.fsdp=8".

    Raises:
      InputError: no such file, function or field, or a value that is not of the field's type.
    """
    config = call(path)
    if not isinstance(config, RunConfig):
        raise InputError(f"{path} must return a train.config.RunConfig, got {type(config).__name__}.")
    return set_fields(config, *changes)


def with_new_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a launch, with fields that were flat when it was recorded at their paths of today.

    Args:
      record: `as_json` of a `RunConfig`, of this version or an older one.
    """
    result: dict[str, Any] = {name: value for name, value in record.items() if name not in MOVED}
    if "step" not in record:
        result["step"] = {"accumulation": 1}  # Only stages had it.
    for name, path in MOVED.items():
        if name in record:
            group, field = path.split(".")
            result[group] = {**result.get(group, {}), field: record[name]}
    return result
