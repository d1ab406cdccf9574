"""The model that a tuning run begins with, and the folder that it ends with."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.lora import LoRA, check_whole
from qwen_jax.parallel.multihost import in_step
from qwen_jax.params import Params, init_params, union, with_fresh_score_head
from qwen_jax.stack import unstack
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.control import TURN_END
from train.evaluate.in_training import OpenedTasks
from train.files import write_file
from train.loop import Measurement
from train.step import StepConfig


class Formats(Protocol):
    """How checkpoints are read and written; the command line gives those of `convert`."""

    def describe(self, path: str) -> tuple[ModelConfig, Tokenizer, Path]:
        """The architecture of a checkpoint, its tokenizer, and its local folder."""
        ...

    def load(self, path: str, config: ModelConfig, mesh: Mesh, dtype: str, stacked: bool = True) -> Params:
        """The weights of a checkpoint on a mesh."""
        ...

    def fingerprint(self, path: str) -> str:
        """A hash of the content of the weights' files."""
        ...

    def write(self, params: Params, config: ModelConfig, origin: Path, folder: Path) -> None:
        """Writes a Hugging Face folder, with the tokenizer and the generation defaults of `origin`."""
        ...

    def write_adapter(
        self, params: Params, config: ModelConfig, lora: LoRA, base: str, end_ids: Sequence[int], folder: Path
    ) -> None:
        """Writes a PEFT folder of trained parameters, with the ids that end a text."""
        ...


def check_beside(field: str, path: str, model: str, tokenizer: Tokenizer, formats: Formats) -> None:
    """Checks that another checkpoint of a run is a language model with the tokenizer of the model that is tuned.

    Args:
      field: of the configuration that names it, such as "reference".
      path, model: checkpoints.
      tokenizer: of the model.
      formats: reads the other's.

    Raises:
      InputError: it is a reward model, or has another tokenizer.
    """
    config, theirs, _ = formats.describe(path)
    if config.score is not None:
        raise InputError(f"The {field} {path} is a reward model, which has no output head. Give a language model.")
    if theirs.fingerprint() != tokenizer.fingerprint():
        raise InputError(
            f"The {field} {path} has another tokenizer than the model {model}, so that the same token ids mean other "
            f"texts to it. Give a {field} with the same tokenizer."
        )


class TunedRun(Protocol):
    """The fields of a run's configuration that are read here; see `train.tune_config.TuneConfig`."""

    @property
    def output(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def step(self) -> StepConfig: ...
    @property
    def export_folder(self) -> Path | None: ...


class TunedModel:
    """Reads the weights that a run begins with, and writes the model that it has tuned.

    Attributes:
      model: the architecture that is trained.
      tokenizer: of the checkpoint.
    """

    def __init__(
        self,
        config: TunedRun,
        formats: Formats,
        model: ModelConfig,
        tokenizer: Tokenizer,
        origin: Path,
        new_head: bool = False,
    ):
        """
        Args:
          config: of the run.
          formats: reads and writes models.
          model: the architecture that is trained.
          tokenizer: of the checkpoint.
          origin: its local folder.
          new_head: whether the score head of `model` is a new one, which the checkpoint does not have.

        Raises:
          InputError: quantised weights without LoRA, or LoRA with a whole part that the model lacks.
        """
        if model.quantization is not None and config.step.lora is None:
            raise InputError(
                f"{config.model} has quantised weights, which are not trained. Train an adapter beside them (--lora), "
                "or convert the model first: qwen-jax convert --to hf --dtype bfloat16."
            )
        if config.step.lora is not None:
            check_whole(config.step.lora, model)
        self._config, self._formats, self._origin, self._new_head = config, formats, origin, new_head
        self.model, self.tokenizer = model, tokenizer
        self._frozen_on: tuple[Mesh, Params] | None = None

    def initial(self, like: Params) -> Params:
        """The weights to begin with, on the mesh of `like`."""
        lora, mesh = self._config.step.lora, jax.tree.leaves(like)[0].sharding.mesh
        if lora is None:
            return self.whole(self._config.model, like)
        # LoRA's matrices are initialised. Modules that are trained in full begin with the weights of the checkpoint.
        key = jax.random.key(self._config.seed)
        params = init_params(self.model, key, mesh, lora=lora, frozen=self.frozen(mesh))
        names = [name for name in lora.whole if name in params and not (name == "score" and self._new_head)]
        if names:
            stored = self.load(self._config.model, mesh, "float32")
            params = {**params, **{name: stored[name] for name in names}}
        return params

    def whole(self, path: str, like: Params) -> Params:
        """All weights of a checkpoint in float32, on the mesh of `like`; with a new score head if there is one."""
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        params = self.load(path, mesh, "float32")
        if not self._new_head:
            return params
        assert self.model.score is not None
        return with_fresh_score_head(params, self.model, jax.random.key(self._config.seed), self.model.score)[1]

    def load(self, path: str, mesh: Mesh, dtype: str, stacked: bool = True) -> Params:
        """The weights of a checkpoint on a mesh, without a new score head."""
        with in_step(f"Reading the weights of {path}"):
            model = dataclasses.replace(self.model, score=None) if self._new_head else self.model
            return self._formats.load(path, model, mesh, dtype, stacked)

    def frozen(self, mesh: Mesh) -> Params:
        """With LoRA: the weights that are not trained, in the compute dtype and layout."""
        if self._frozen_on is None or self._frozen_on[0] != mesh:
            self._frozen_on = None
            step, lora = self._config.step, self._config.step.lora
            assert lora is not None
            params = self.load(self._config.model, mesh, step.dtype, stacked=step.scan_layers)
            unused = {"lm_head"} if self.model.score is not None else set()
            kept = {name: value for name, value in params.items() if name not in {*lora.whole, *unused}}
            self._frozen_on = mesh, kept
        return self._frozen_on[1]

    def with_frozen(self, params: Params, mesh: Mesh) -> Params:
        """All weights of the model: what is trained, and with LoRA, in the same layout, what is not.

        Args:
          params: of the state.
          mesh: of the state.
        """
        step = self._config.step
        if step.lora is None:
            return params
        if not step.scan_layers:
            params = {**params, "layers": unstack(params["layers"], "float32", self.model.sparse_layers)}
        return union(params, self.frozen(mesh))

    def export(self, params: Params, model: ModelConfig) -> None:
        """Writes the tuned model, which ends texts where its turns end.

        Args:
          params: that were trained.
          model: the architecture of the last stage.
        """
        folder, lora = self._config.export_folder, self._config.step.lora
        assert folder is not None
        if lora is not None:
            # A reward model writes no texts.
            ends = [] if model.score is not None else self.end_ids()
            self._formats.write_adapter(params, model, lora, self._config.model, ends, folder)
            return
        origin = Path(self._config.output).absolute() / "export"
        with in_step(f"Writing {origin}"):
            if jax.process_index() == 0:
                origin.mkdir(parents=True, exist_ok=True)
                self.tokenizer.save(origin)
                if model.score is None:
                    write_file(origin / "generation_config.json", self._generation_config())
        self._formats.write(params, model, origin, folder)

    def _generation_config(self) -> bytes:
        """The generation defaults of the checkpoint, with the ends of turns and of texts as end ids."""
        path = self._origin / "generation_config.json"
        defaults = json.loads(path.read_bytes()) if path.is_file() else {}
        return (to_json({**defaults, "eos_token_id": self.end_ids()}, indent=2) + "\n").encode()

    def end_ids(self) -> list[int]:
        """The ids that end a turn or a text."""
        ids = self.tokenizer.control_ids.get(TURN_END), self.tokenizer.eos_id, *self.model.eos_token_ids
        return list(dict.fromkeys(i for i in ids if i is not None))

    def measurement(
        self, tasks: OpenedTasks, model: ModelConfig, step: StepConfig, mesh: Mesh, say: Callable[[str], None]
    ) -> Measurement:
        """How benchmarks measure the weights of a stage, as `qwen-jax eval` measures the exported model.

        Args:
          tasks: the benchmarks.
          model: the architecture of the stage.
          step: of the stage.
          mesh: of the stage.
          say: shows a line.

        Raises:
          InputError: a model or a mesh that tasks are not measured on.
        """
        return tasks.measurement(model, step, mesh, say, lambda params: self.with_frozen(params, mesh), self.end_ids())
