"""A run as a Python function that returns its configuration, and changes to it by the path of a field."""

import copy
import dataclasses
import difflib
import inspect
import itertools
import json
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels import Implementation
from qwen_jax.parallel.sharding import AXES
from qwen_jax.remat import Remat
from train.data.mixture import MixtureStage, Weight
from train.moe import MoETraining
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import PretrainConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of a run.

    Attributes:
      schedule: its steps and their learning rate.
      length: tokens in a row; the data sets must have been built with it.
      batch_size: rows in the global batch of a step.
      mixture: weight of each data set, by its name in `RunConfig.data`; exact, see `MixtureStage`.
      rope_theta: base of the rotary embedding; by default the model's.
      accumulation: parts that a batch is worked off in.
      remat: by default the run's.
      mesh: by default the run's.
    """

    schedule: Schedule
    length: int
    batch_size: int
    mixture: Mapping[str, Weight]
    rope_theta: float | None = None
    accumulation: int = 1
    remat: Remat | None = None
    mesh: Mapping[str, int] | None = None

    @property
    def steps(self) -> int:
        """How many."""
        return self.schedule.steps


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A pre-training run.

    Attributes:
      output: folder of the run: log, checkpoints, and what it was started with.
      model: the architecture. Stages may change its `rope_theta`.
      tokenizer: folder of the tokenizer that the data was built with.
      data: folders of `qwen-jax data build`, each under the name that mixtures give it. For small work also raw
        documents, a file, a folder or a pattern: they are built when the run starts, into its own folder.
      stages: in order.
      held_out: data sets to evaluate on, by name; given as in `data`.
      initial: folder of an Orbax checkpoint whose weights to begin with; by default they are drawn.
      seed: of weights and data order.
      mesh: sizes of the axes that are not 1.
      dtype, remat, scan_layers, attention, ring, loss_chunk, z_loss, spike_factor, moe: see `PretrainConfig`.
      beta1, beta2, eps, weight_decay, clip_norm: see `OptimizerConfig`.
      evaluate_every, checkpoint_every, max_skipped: see `LoopConfig`; the end of a stage counts as the end of a run.
      keep_last: how many of the newest checkpoints stay.
      keep_every: checkpoints of steps that are a multiple of it stay too; 0 is none.
      export: Hugging Face folder to write after the last step; by default none.
      verify_data: compare the sha256 of all data with what was built before training, which reads all of it.
      max_raw_megabytes: more raw documents than this, in the size of their files, must be built ahead.
      profile: first and last step to trace for xprof; None traces nothing.
      wandb_project: project of Weights & Biases that the run is logged to besides TensorBoard; None is none.
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
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    remat: Remat = "dots"
    scan_layers: bool = True
    attention: Implementation = "auto"
    ring: bool = False
    loss_chunk: int = 2048
    z_loss: float = 0.0
    spike_factor: float = 0.0
    moe: MoETraining = MoETraining()
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    evaluate_every: int = 0
    checkpoint_every: int = 1000
    max_skipped: int = 10
    keep_last: int = 2
    keep_every: int = 0
    export: str | None = None
    verify_data: bool = False
    max_raw_megabytes: float = 64.0
    profile: tuple[int, int] | None = None
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("A run needs at least one stage, got none.")
        for name in ("evaluate_every", "checkpoint_every", "keep_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("keep_last", "max_skipped"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for index in range(len(self.stages)):
            self.pretrain(index)
            for axis in self.mesh_axes(index):
                if axis not in AXES:
                    raise InputError(f"A mesh has no axis {axis!r}; {_near(axis, AXES)}")
        if self.profile is not None and (
            len(self.profile) != 2 or not 1 <= self.profile[0] <= self.profile[1] <= self.ends[-1]
        ):
            raise InputError(
                f"profile must be the first and the last step to trace, from 1 to {self.ends[-1]}, the last of the "
                f"run; got {self.profile}."
            )
        self.mixture_stages()

    @property
    def ends(self) -> list[int]:
        """The step after the last of each stage."""
        return list(itertools.accumulate(stage.steps for stage in self.stages))

    def mixture_stages(self) -> list[MixtureStage]:
        """The stages as `Mixture` takes them."""
        return [MixtureStage(s.steps, s.batch_size, s.length, s.mixture) for s in self.stages]

    def pretrain(self, index: int) -> PretrainConfig:
        """What the step of a stage is made from.

        Args:
          index: of the stage, from 0.
        """
        stage, model = self.stages[index], self.model
        model = dataclasses.replace(
            model,
            rope_theta=model.rope_theta if stage.rope_theta is None else stage.rope_theta,
            max_position_embeddings=max(model.max_position_embeddings, stage.length),
        )
        schedules = tuple(stage.schedule for stage in self.stages)
        optimizer = OptimizerConfig(schedules, self.beta1, self.beta2, self.eps, self.weight_decay, self.clip_norm)
        return PretrainConfig(
            model,
            optimizer,
            self.dtype,
            stage.remat or self.remat,
            stage.accumulation,
            self.loss_chunk,
            self.z_loss,
            self.spike_factor,
            self.scan_layers,
            self.attention,
            self.ring,
            self.moe,
        )

    def mesh_axes(self, index: int) -> Mapping[str, int]:
        """The mesh of a stage.

        Args:
          index: of the stage, from 0.
        """
        mesh = self.stages[index].mesh
        return self.mesh if mesh is None else mesh


def load(path: str, changes: Sequence[str] = ()) -> RunConfig:
    """Calls a configuration's function and applies changes.

    Args:
      path: "FILE.py" or "FILE.py:function"; by default the function is `config`, or the only public one of the file.
      changes: each "path.to.field=value", such as "stages.0.schedule.steps=100" or "mesh.fsdp=8".

    Raises:
      InputError: no such file, function or field, or a value that is not of the field's type.
    """
    name, _, function_name = path.partition(":") if not Path(path).is_file() else (path, "", "")
    file = Path(name)
    if file.suffix != ".py" or not file.is_file():
        raise InputError(f"No Python file {name!r}. Give FILE.py or FILE.py:function.")
    names = runpy.run_path(str(file), run_name="config")
    functions = {
        key: value
        for key, value in names.items()
        if inspect.isfunction(value) and value.__module__ == "config" and not key.startswith("_")
    }
    if not function_name:
        function_name = next(iter(functions)) if len(functions) == 1 else "config"
    if function_name not in functions:
        raise InputError(f"{file} has no function {function_name!r}; {_near(function_name, functions)}")
    config = functions[function_name]()
    if not isinstance(config, RunConfig):
        raise InputError(
            f"{function_name} of {file} must return a train.config.RunConfig, got {type(config).__name__}."
        )
    return set_fields(config, *changes)


def set_fields(config: Any, *changes: str) -> Any:
    """A copy of a configuration with fields changed. What they must be to each other is looked at when all are.

    Args:
      config: a frozen dataclass.
      changes: each "path.to.field=value". Elements of a tuple have their index as name, and entries of a mapping their
        key, which may be new. A value is JSON, or plain text where a text is wanted.

    Raises:
      InputError: no such field, a value that is not of its type, or values that do not go together.
    """
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise InputError(f"Expected path.to.field=value, got {change!r}.")
        config = _replaced(config, type(config), path.split("."), text, change)
    return _checked(config)


def _checked(value: Any) -> Any:
    """The same, with all dataclasses in it made anew, the inner ones first."""
    if isinstance(value, tuple):
        return tuple(map(_checked, value))
    if not dataclasses.is_dataclass(value):
        return value
    return dataclasses.replace(value, **{f.name: _checked(getattr(value, f.name)) for f in dataclasses.fields(value)})  # type: ignore[type-var]


def _replaced(value: Any, kind: Any, path: Sequence[str], text: str, change: str) -> Any:
    if not path:
        return _parsed(text, kind, change)
    name, rest = path[0], path[1:]
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        if name not in fields:
            raise InputError(f"{change!r}: {type(value).__name__} has no field {name!r}; {_near(name, fields)}")
        hint = typing.get_type_hints(type(value))[name]
        new = copy.copy(value)
        object.__setattr__(new, name, _replaced(getattr(value, name), hint, rest, text, change))
        return new
    if isinstance(value, tuple):
        if not name.isdecimal() or int(name) >= len(value):
            raise InputError(f"{change!r}: expected an index from 0 to {len(value) - 1}, got {name!r}.")
        index, arguments = int(name), typing.get_args(kind)
        new = _replaced(value[index], arguments[0] if arguments else Any, rest, text, change)
        return (*value[:index], new, *value[index + 1 :])
    if isinstance(value, Mapping) or (value is None and _mapping(kind)):
        if rest and name not in (value or {}):
            raise InputError(f"{change!r}: no entry {name!r}; {_near(name, value or {})}")
        entry = typing.get_args(_mapping(kind))[1] if _mapping(kind) else Any
        return {**(value or {}), name: _replaced((value or {}).get(name), entry, rest, text, change)}
    raise InputError(f"{change!r}: a {type(value).__name__} has no field {name!r}.")


def _mapping(kind: Any) -> Any:
    """The mapping among the alternatives of a type, if any."""
    return next((k for k in _alternatives(kind) if typing.get_origin(k) in (Mapping, dict)), None)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def _parsed(text: str, kind: Any, change: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    for kind_ in _alternatives(kind):
        # A text that happens to be JSON, such as a folder named 7, is a text where one is wanted.
        for candidate in (value, text):
            fits, result = _fit(candidate, kind_)
            if fits:
                return result
    wanted = " or ".join(getattr(k, "__name__", str(k)) for k in _alternatives(kind))
    raise InputError(f"{change!r}: expected {wanted.replace('NoneType', 'null')}, got {text!r}.")


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a JSON value is of a type, and the value in that type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True, value
    if origin is Literal:
        return value in arguments, value
    if origin in (Mapping, dict, tuple) or origin in (list, Sequence):
        if not isinstance(value, dict if origin in (Mapping, dict) else list):
            return False, None
        inner = arguments[1] if isinstance(value, dict) else arguments[0]
        items = [_fit(v, inner) for v in (value.values() if isinstance(value, dict) else value)]
        results = [result for _, result in items]
        made = dict(zip(value, results, strict=True)) if isinstance(value, dict) else tuple(results)
        return all(fits for fits, _ in items), made
    if origin in (Union, types.UnionType):
        return next((fit for k in arguments if (fit := _fit(value, k))[0]), (False, None))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool), (
            float(value) if isinstance(value, (int, float)) else None
        )
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(kind, type) and isinstance(value, kind), value


def _near(name: str, names: Any) -> str:
    """Which names may have been meant."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there are {', '.join(map(repr, names)) or 'none'}."


def as_json(config: Any) -> dict[str, Any]:
    """A configuration as JSON values; a `Fraction` is its text.

    Args:
      config: a dataclass.
    """
    value: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return value
