"""A GRPO run as a configuration: from a checkpoint, prompts and rewards."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from train.evaluate.in_training import TaskEvaluation
from train.fields import at_least, call_for, check_axes
from train.grpo import Grpo
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import AdamW, OptimizerConfig, Schedule
from train.policy import GrpoConfig
from train.sampler import SamplingConfig
from train.step import StepConfig


@dataclasses.dataclass(frozen=True)
class RewardUse:
    """A reward function of a run.

    Attributes:
      spec: name of a built-in one, or FILE.py:function; see docs/rewards.md.
      weight: in the sum of rewards; of a gate it must be 1.
      settings: arguments of the built-in reward or of the function.
    """

    spec: str
    weight: float = 1.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name in logs: that of the built-in reward, or of the function."""
        return self.spec.rpartition(":")[2]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The engines that sample rollouts.

    Attributes:
      max_seqs: rollouts that an engine runs at the same time.
      max_batched_tokens: prompt tokens that one of its steps reads.
      page_size: tokens in a page of the cache.
      num_pages: of the cache; by default there are as many as `max_seqs` rollouts of the largest length need.
      tensor, expert: devices of one engine. The trainer's devices hold as many engines as fit.
      devices: how many of the last devices only sample, while the others train. Rollouts are then one step older than
        the weights that learn from them. 0 samples and trains on all devices in turn.
      dtype: of weights and cache; by default the compute dtype of the step.
      compile_first: compile all programs before the first rollout, in parallel, and not each at its first use.

    Raises:
      InputError: a value out of range.
    """

    max_seqs: int = 256
    max_batched_tokens: int = 4096
    page_size: int = 32
    num_pages: int | None = None
    tensor: int = 1
    expert: int = 1
    devices: int = 0
    dtype: str | None = None
    compile_first: bool = True

    def __post_init__(self) -> None:
        at_least(self, max_seqs=1, max_batched_tokens=1, page_size=16, num_pages=1, tensor=1, expert=1, devices=0)


@dataclasses.dataclass(frozen=True)
class GrpoRunConfig:
    """A GRPO run. An episode samples a group of responses for each of `queries` prompts, and takes `updates` steps.

    Attributes:
      output: folder of the run: log, checkpoints, rollouts, and the tuned model.
      model: checkpoint to begin with: a folder or a Hub id. Its tokenizer and chat template are used.
      prompts: files with a column `prompt`, and those that rewards ask for, by name.
      rewards: what responses are scored by.
      objective: the loss and the advantages.
      sampling: of rollouts.
      engine: that samples.
      tools: that the policy may call in several turns: "python" runs programs in the sandbox, "search:FOLDER" finds
        paragraphs in text files.
      environment: instead of tools, FILE.py:function, which returns a `train.environments.Environment`. The file is run
        as a part of this program.
      held_out: prompts to evaluate on, by name.
      order: a file of scores by which prompts are ordered, highest variance first; see `train.data.prompts`. By default
        each epoch has a random order.
      queries: prompts of an episode.
      updates: steps of an episode; each has an equal share of the rollouts.
      epochs: how often the prompts are used; it need not be whole.
      episodes: how many, instead of epochs.
      resample: how many times the prompts whose responses all have the same reward are replaced by others (DAPO's
        dynamic sampling). Those that are left after the last time are used as they are.
      prompt_length: tokens of a prompt; longer ones are left out and counted.
      row_length: tokens in a packed row; by default a prompt and a response of the largest lengths.
      reference: of the KL term: a checkpoint; by default `model`.
      learning_rate: the peak.
      schedule: after the warm-up; "constant" stays.
      warmup_fraction: of the steps.
      seed: of the order of prompts. `sampling.seed` is that of rollouts.
      mesh: sizes of the axes that are not 1.
      optimizer: AdamW.
      step: how a step is computed; with `step.lora`, only an adapter is trained.
      loop: evaluation, and when to give up.
      checkpoints: how often to save, and what to keep.
      tasks: benchmarks that are measured while it trains.
      keep_rollouts: files of rollouts that are kept, of the newest episodes.
      export: Hugging Face folder to write after the last step; by default `model` in the output. "" writes none.
      profile: first and last step to trace for xprof; by default nothing is traced.
      wandb_project: project of Weights & Biases to log to, besides TensorBoard; by default none.

    Raises:
      InputError: a value out of range, or values that do not fit together.
    """

    output: str
    model: str
    prompts: Mapping[str, str]
    rewards: tuple[RewardUse, ...]
    objective: GrpoConfig = GrpoConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    tools: tuple[str, ...] = ()
    environment: str | None = None
    held_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    order: str | None = None
    queries: int = 256
    updates: int = 1
    epochs: float = 1.0
    episodes: int | None = None
    resample: int = 0
    prompt_length: int = 1024
    row_length: int | None = None
    reference: str | None = None
    learning_rate: float = 1e-6
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_fraction: float = 0.0
    seed: int = 0
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    optimizer: AdamW = AdamW(beta2=0.999, weight_decay=0.0)
    step: StepConfig = StepConfig()
    loop: LoopConfig = LoopConfig()
    checkpoints: CheckpointConfig = CheckpointConfig(every=50)
    tasks: TaskEvaluation | None = None
    keep_rollouts: int = 50
    export: str | None = None
    profile: tuple[int, int] | None = None
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        at_least(self, queries=1, updates=1, episodes=1, resample=0, prompt_length=1, keep_rollouts=2)
        for name in ("output", "model"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty. Give the path of a folder.")
        if not self.prompts:
            raise InputError("A GRPO run needs prompts, got none. Give files (--prompts).")
        if self.step.lora is not None and self.step.lora.dropout:
            raise InputError(
                f"LoRA has a dropout of {self.step.lora.dropout}, and rollouts are sampled without it: the sampler's "
                "log-probabilities would not be the trainer's. Make step.lora.dropout 0."
            )
        if not self.rewards:
            raise InputError("A GRPO run needs a reward, got none. Give a name or FILE.py:function (--reward).")
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise InputError(f"Rewards need different names, got {', '.join(names)}.")
        if self.sampling.group_size < 2:
            raise InputError(
                f"sampling.group_size must be at least 2, got {self.sampling.group_size}: an advantage is the "
                "difference to the mean of a group."
            )
        if self.sampling.temperature != self.objective.temperature:
            raise InputError(
                "The temperature must be the same in sampling and in the loss; got sampling.temperature="
                f"{self.sampling.temperature} and objective.temperature={self.objective.temperature}."
            )
        if self.tools and self.environment is not None:
            raise InputError("tools and environment are two ways to answer the policy. Give one of them.")
        for tool in self.tools:
            if tool != "python" and not tool.startswith("search:"):
                raise InputError(f"A tool is 'python' or 'search:FOLDER', got {tool!r}.")
        if self.queries % self.updates:
            raise InputError(f"queries ({self.queries}) must be a multiple of updates ({self.updates}).")
        if self.updates > 1 and self.objective.old == "current":
            raise InputError(
                "With several updates an episode, the policy moves away from the one that sampled: set "
                "objective.old=trainer (or sampler)."
            )
        if self.engine.devices and self.objective.old == "current" and not self.objective.corrected:
            raise InputError(
                f"With engine.devices={self.engine.devices} rollouts are older than the weights that learn from them. "
                "The loss must correct for it: set objective.importance_cap=2.0, or objective.old=sampler."
            )
        pages, size = self.engine.num_pages, self.engine.page_size
        if pages is not None and pages * size < self.longest:
            raise InputError(
                f"engine.num_pages={pages} pages of {size} tokens hold {pages * size} tokens, but a rollout has up to "
                f"{self.longest} (prompt_length {self.prompt_length} and sampling.max_new_tokens "
                f"{self.sampling.max_new_tokens}). Set engine.num_pages to at least {-(-self.longest // size)}, or "
                "leave it out."
            )
        if self.row_length is not None and self.row_length < self.longest:
            raise InputError(
                f"row_length must hold a prompt of {self.prompt_length} and a response of "
                f"{self.sampling.max_new_tokens} tokens, {self.longest} together; got {self.row_length}."
            )
        if self.objective.overlong_tokens > self.sampling.max_new_tokens:
            raise InputError(
                f"objective.overlong_tokens ({self.objective.overlong_tokens}) exceeds sampling.max_new_tokens "
                f"({self.sampling.max_new_tokens})."
            )
        if self.reference is not None and not self.objective.needs_reference:
            raise InputError("A reference belongs to a KL term: set objective.kl_weight, or leave reference out.")
        if not (self.epochs > 0 and math.isfinite(self.epochs)) or not 0 <= self.warmup_fraction < 1:
            raise InputError(
                "epochs must be positive, and warmup_fraction at least 0 and below 1; got "
                f"{self.epochs} and {self.warmup_fraction}."
            )
        check_axes(self.mesh)
        self.optimizer_config(1)

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its response, at most."""
        return self.prompt_length + self.sampling.max_new_tokens

    @property
    def samples(self) -> int:
        """Rollouts that a step learns from."""
        return self.queries * self.sampling.group_size // self.updates

    @property
    def export_folder(self) -> Path | None:
        """Where the tuned model is written; None for nowhere."""
        if self.export == "":
            return None
        return Path(self.output, "model") if self.export is None else Path(self.export)

    def objective_of(self, model: ModelConfig) -> Grpo:
        """The objective of the run for an architecture."""
        return Grpo(model, self.objective, self.samples)

    def optimizer_config(self, steps: int) -> OptimizerConfig:
        """The optimiser with its learning rate over a number of steps."""
        warmup = min(round(self.warmup_fraction * steps), steps - 1)
        constant = self.schedule == "constant"
        schedule = Schedule(
            steps,
            self.learning_rate,
            warmup,
            "wsd" if self.schedule == "constant" else self.schedule,
            final_fraction=1.0 if constant else 0.1,
        )
        return OptimizerConfig(schedule, self.optimizer)


def load(path: str, changes: Sequence[str] = ()) -> GrpoRunConfig:
    """Calls a configuration's function and applies changes; see `train.config.load`.

    Args:
      path: "FILE.py" or "FILE.py:function".
      changes: each "path.to.field=value".

    Raises:
      InputError: no such file, function or field, or a value that is not of the field's type.
    """
    return call_for(GrpoRunConfig, path, changes)
