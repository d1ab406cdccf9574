"""A tuning run as a configuration: supervised fine-tuning, a reward model or DPO, from a checkpoint and examples."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from train.data.example_store import TooLong
from train.data.examples import ExampleOptions, Kind
from train.data.mixture import Weight, exact_shares
from train.dpo import Dpo, DpoConfig
from train.evaluate.in_training import TaskEvaluation
from train.fields import at_least, call_for, check_axes, near
from train.loop import CheckpointConfig, LoopConfig
from train.merging import Merging
from train.objective import Objective
from train.optimizer import AdamW, OptimizerConfig, Schedule
from train.pretrain import PretrainConfig
from train.reward import Reward, RewardConfig
from train.sft import Sft
from train.step import StepConfig

Method = Literal["sft", "reward", "dpo"]

ObjectiveConfig = PretrainConfig | RewardConfig | DpoConfig


@dataclasses.dataclass(frozen=True)
class TuneStage:
    """A part of a tuning run: some epochs over some of the data, with one row length. Its steps follow from the data.

    Attributes:
      length: tokens in a row.
      batch_size: rows in the global batch of a step.
      epochs: how often the examples are read; it need not be whole.
      data: names in `TuneConfig.data`; by default all. Their examples share rows, and each comes once in an epoch.
      learning_rate: the peak.
      schedule: after the warm-up, see `train.optimizer.Schedule`.
      final_fraction: final learning rate as a fraction of the peak.
      warmup_fraction: of the steps, in which the learning rate rises.
      rope_theta: base of the rotary embedding; by default the model's.
      accumulation: micro-batches per step; by default the run's `step.accumulation`.
      mesh: by default the run's.
      mixture: instead of `data`, weights of names in `TuneConfig.data`: the share of the rows is the weight over
        the sum of all, and an epoch has as many rows as all of them fill; see `train.data.example_mixture`.

    Raises:
      InputError: a value out of range.
    """

    length: int = 4096
    batch_size: int = 8
    epochs: float = 2.0
    data: tuple[str, ...] = ()
    learning_rate: float = 7e-6
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    final_fraction: float = 0.1
    warmup_fraction: float = 0.03
    rope_theta: float | None = None
    accumulation: int | None = None
    mesh: Mapping[str, int] | None = None
    mixture: Mapping[str, Weight] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, length=2, batch_size=1, accumulation=1)
        if not (self.epochs > 0 and math.isfinite(self.epochs)) or not 0 <= self.warmup_fraction < 1:
            raise InputError(
                "epochs must be positive, and warmup_fraction at least 0 and below 1; got "
                f"{self.epochs} and {self.warmup_fraction}."
            )
        if self.mixture:
            exact_shares(self.mixture)
            if self.data:
                raise InputError(f"A stage has data or a mixture; got data={self.data} and mixture={self.mixture}.")
        self.schedule_of(1)

    def schedule_of(self, steps: int) -> Schedule:
        """The learning rate over a number of steps."""
        warmup = min(round(self.warmup_fraction * steps), steps - 1)
        return Schedule(steps, self.learning_rate, warmup, self.schedule, final_fraction=self.final_fraction)


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """A tuning run.

    Attributes:
      output: folder of the run: log, checkpoints, tokenized examples, and the tuned model.
      model: checkpoint to begin with: a folder or a Hub id. Its tokenizer and chat template are used.
      data: examples to train on, by name: files, folders or patterns; see docs/post_training.md.
      objective: what is minimised, and its settings: `PretrainConfig` is supervised fine-tuning.
      stages: in order.
      held_out: examples to evaluate on, by name; given as in `data`.
      reference: of DPO: the checkpoint that the policy is bound to; by default `model`.
      examples: how they are tokenized, and what is trained.
      too_long: what becomes of examples that are longer than a row.
      seed: of the data order, and of a new score head.
      mesh: sizes of the axes that are not 1.
      optimizer: AdamW; its learning rate is in the stages.
      merging: merge each update with that of the model's own tuning, counted from `base`; see `train.merging`.
      base: with `merging`: the checkpoint that `model` was tuned from.
      step: how a step is computed; with `step.lora`, only an adapter is trained.
      loop: evaluation, and when to give up.
      checkpoints: how often to save, and what to keep.
      tasks: benchmarks that are measured while it trains; not of reward models.
      samples: held-out prompts that are completed at each evaluation, into `samples.jsonl`; not by reward models.
      sample_tokens: of such a text, at most.
      export: Hugging Face folder to write after the last step; by default `model` in the output. "" writes none.
      profile: first and last step to trace for xprof; by default nothing is traced.
      wandb_project: project of Weights & Biases to log to, besides TensorBoard; by default none.

    Raises:
      InputError: a value out of range, or values that do not fit together.
    """

    output: str
    model: str
    data: Mapping[str, str]
    objective: ObjectiveConfig
    stages: tuple[TuneStage, ...] = (TuneStage(),)
    held_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reference: str | None = None
    examples: ExampleOptions = ExampleOptions()
    too_long: TooLong = "drop"
    seed: int = 0
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    optimizer: AdamW = AdamW()
    merging: Merging | None = None
    base: str | None = None
    step: StepConfig = StepConfig()
    loop: LoopConfig = LoopConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    tasks: TaskEvaluation | None = None
    samples: int = 4
    sample_tokens: int = 128
    export: str | None = None
    profile: tuple[int, int] | None = None
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        at_least(self, samples=0, sample_tokens=1)
        for name in ("output", "model"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty. Give the path of a folder.")
        if not self.data:
            raise InputError("A tuning run needs data, got none. Give files of examples (--data).")
        if not self.stages:
            raise InputError("A tuning run needs at least one stage, got none.")
        for index, stage in enumerate(self.stages):
            for field, names in (("data", stage.data), ("mixture", tuple(stage.mixture))):
                for name in names:
                    if name not in self.data:
                        raise InputError(f"stages.{index}.{field} names {name!r}; {near(name, self.data)}")
            check_axes(self.mesh_axes(index))
        if self.reference is not None and not isinstance(self.objective, DpoConfig):
            raise InputError("A reference belongs to DPO. Leave reference out.")
        if self.tasks is not None and isinstance(self.objective, RewardConfig):
            raise InputError("A reward model has no output head, so that it answers no tasks. Leave tasks out.")
        if (self.merging is None) != (self.base is None):
            raise InputError(
                "Online merging needs both: its settings (merging), and the checkpoint that the model was tuned from "
                f"(base). Got merging={self.merging} and base={self.base!r}."
            )
        if self.merging is not None and self.step.lora is not None:
            raise InputError("Online merging is of whole weights, and LoRA trains none of them. Leave one of them out.")

    @property
    def method(self) -> Method:
        """What kind of run it is."""
        if isinstance(self.objective, DpoConfig):
            return "dpo"
        return "reward" if isinstance(self.objective, RewardConfig) else "sft"

    @property
    def kind(self) -> Kind:
        """The kind of its examples."""
        return "sft" if self.method == "sft" else "pairs"

    @property
    def max_segments(self) -> int | None:
        """Most segments of a row, two for each pair; None for examples that are no pairs."""
        return None if isinstance(self.objective, PretrainConfig) else self.objective.max_segments

    @property
    def export_folder(self) -> Path | None:
        """Where the tuned model is written; None for nowhere."""
        if self.export == "":
            return None
        return Path(self.output, "model") if self.export is None else Path(self.export)

    def data_of(self, index: int) -> dict[str, str]:
        """The data of a stage by name."""
        stage = self.stages[index]
        names = exact_shares(stage.mixture) if stage.mixture else stage.data or tuple(self.data)
        return {name: self.data[name] for name in names}

    def objective_of(self, index: int, model: ModelConfig, max_segments: int | None = None) -> Objective[Any, Any, Any]:
        """The objective of a stage.

        Args:
          index: of the stage, from 0.
          model: the architecture.
          max_segments: most segments that a row of pairs has; by default the most that it may have.
        """
        stage, config = self.stages[index], self.objective
        if max_segments is not None and not isinstance(config, PretrainConfig):
            config = dataclasses.replace(config, max_segments=max_segments)
        model = dataclasses.replace(
            model,
            rope_theta=model.rope_theta if stage.rope_theta is None else stage.rope_theta,
            max_position_embeddings=max(model.max_position_embeddings, stage.length),
        )
        if isinstance(config, PretrainConfig):
            return Sft(model, dataclasses.replace(config, compact_loss=True))
        if isinstance(config, DpoConfig):
            return Dpo(model, config)
        return Reward(model, config)

    def trained_model(self, model: ModelConfig) -> ModelConfig:
        """The architecture that is trained: that of the checkpoint, with a score head if it is a reward model.

        Raises:
          InputError: a reward model as the checkpoint of another kind of run.
        """
        if isinstance(self.objective, RewardConfig) and model.score is None:
            return dataclasses.replace(model, score=self.objective.head)
        if self.method != "reward" and model.score is not None:
            raise InputError(f"{self.model} is a reward model, which has no output head. Give a language model.")
        return model

    def optimizer_config(self, steps: Sequence[int]) -> OptimizerConfig:
        """The optimiser with the schedules of all stages.

        Args:
          steps: of each stage.
        """
        rates = tuple(stage.schedule_of(n) for stage, n in zip(self.stages, steps, strict=True))
        return OptimizerConfig(rates, self.optimizer, self.merging)

    def step_config(self, index: int) -> StepConfig:
        """How the steps of a stage are computed."""
        accumulation = self.stages[index].accumulation
        return self.step if accumulation is None else dataclasses.replace(self.step, accumulation=accumulation)

    def mesh_axes(self, index: int) -> Mapping[str, int]:
        """The mesh of a stage."""
        mesh = self.stages[index].mesh
        return self.mesh if mesh is None else mesh


def load(path: str, changes: Sequence[str] = ()) -> TuneConfig:
    """Calls a configuration's function and applies changes; see `train.config.load`.

    Args:
      path: "FILE.py" or "FILE.py:function".
      changes: each "path.to.field=value".

    Raises:
      InputError: no such file, function or field, or a value that is not of the field's type.
    """
    return call_for(TuneConfig, path, changes)
