"""What a plan needs of each stage of a run, of pre-training and of tuning alike."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, abstract_params, param_specs
from train.config import RunConfig, Stage
from train.config import set_fields as set_run_fields
from train.data.batch import Batch
from train.data.pairs import PairBatch
from train.fields import call, set_fields
from train.objective import Objective
from train.optimizer import OptimizerConfig
from train.step import StepConfig
from train.tune_config import TuneConfig, TuneStage

# Steps of a stage of tuning, which follow from data that a plan does not read. They change only the learning rate.
_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class RunStage:
    """A stage of a run.

    Attributes:
      number: of the stage, from 1.
      batch_size: rows in the global batch of a step.
      length: tokens in a row.
      pairs: a batch is a `PairBatch`, and otherwise a `Batch`.
      objective: what is minimised.
      step: how a step is computed.
      optimizer: of the run.
      axes: sizes of the mesh axes; empty if the run does not say.
      whole: with LoRA, the parts outside of the layers that are trained whole.
    """

    number: int
    batch_size: int
    length: int
    pairs: bool
    objective: Objective[Any, Any, Any]
    step: StepConfig
    optimizer: OptimizerConfig
    axes: Mapping[str, int]
    whole: tuple[str, ...] = ()

    def batch(self, mesh: Mesh) -> Batch | PairBatch:
        """The global batch as `jax.ShapeDtypeStruct`s, placed as `train.data.batch.place` does."""
        tokens, shape = NamedSharding(mesh, Sharding.tokens), (self.batch_size, self.length)
        ints, floats = (jax.ShapeDtypeStruct(shape, dtype, sharding=tokens) for dtype in (jnp.int32, jnp.float32))
        rows = Batch(ints, ints, ints, floats)
        return PairBatch(rows, floats, floats) if self.pairs else rows

    def frozen(self, mesh: Mesh) -> Params | None:
        """With LoRA, the weights that are not trained as `jax.ShapeDtypeStruct`s, in the compute dtype and layout."""
        if self.step.lora is None:
            return None
        model, options = self.objective.model, Options(stacked=self.step.scan_layers)
        sharding = Sharding.for_training(model, mesh)
        everything = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            abstract_params(model, sharding, options, self.step.dtype),
            param_specs(model, sharding, options),
        )
        return {name: value for name, value in everything.items() if name not in self.whole}


def load(path: str, changes: Sequence[str] = ()) -> RunConfig | TuneConfig:
    """Calls a configuration's function and applies changes; see `train.config.load`.

    Raises:
      InputError: no such file, function or field, or a value that is not of the field's type.
    """
    config = call(path)
    if isinstance(config, RunConfig):
        return set_run_fields(config, *changes)
    if isinstance(config, TuneConfig):
        return set_fields(config, *changes)
    raise InputError(
        f"{path} must return a train.config.RunConfig or a train.tune_config.TuneConfig, got {type(config).__name__}."
    )


def stages_of(config: RunConfig | TuneConfig, model: ModelConfig | None = None) -> tuple[RunStage, ...]:
    """The stages of a run.

    Args:
      config: of the run.
      model: of tuning: the architecture of the checkpoint that it begins with. A run of pre-training has its own.

    Raises:
      InputError: a reward model as the checkpoint of another kind of run.
      ValueError: tuning without an architecture.
    """
    stages: Sequence[Stage | TuneStage] = config.stages
    indices = range(len(stages))
    if isinstance(config, RunConfig):
        objectives: list[Objective[Any, Any, Any]] = [config.next_token(index) for index in indices]
        optimizer, pairs, whole = config.optimizer_config(), False, ()
    else:
        if model is None:
            raise ValueError("A plan of tuning needs the architecture of its checkpoint.")
        trained, lora = config.trained_model(model), config.step.lora
        objectives = [config.objective_of(index, trained) for index in indices]
        optimizer, pairs = config.optimizer_config([_STEPS] * len(config.stages)), config.kind == "pairs"
        # A new head is trained in any case.
        new_head = ("score",) if trained.score != model.score else ()
        whole = () if lora is None else (*lora.whole, *new_head)
    return tuple(
        RunStage(
            *(index + 1, stage.batch_size, stage.length, pairs, objectives[index]),
            *(config.step_config(index), optimizer, config.mesh_axes(index), whole),
        )
        for index, stage in enumerate(stages)
    )
