"""What may change when a run is resumed, and what has changed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from train.config import CAME_LATER, RunConfig, as_json, with_new_names
from train.fields import differences
from train.files import read_records
from train.grpo_config import GrpoRunConfig
from train.tune_config import TuneConfig

# What a stage has where it says nothing.
_STAGE_DEFAULTS = {"accumulation": "step.accumulation", "remat": "step.remat", "rope_theta": "model.rope_theta"}
# Where a run is and what it shows, which changes nothing that it learns.
_NO_CHANGE = ("output", "profile", "wandb_project", "verify_data", "max_raw_megabytes", "export", "tasks")


def changed_since_last_launch(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The fields that differ from those of the last launch in the run's folder.

    Args:
      config: of this launch.

    Returns:
      (value before, value now) by path; empty if no launch is recorded.
    """
    before = _last_launch(Path(config.output) / "launches.jsonl")
    if before is None:
        return {}
    before, now = with_new_names(before), as_json(config)
    found = _differences(before, now)
    # A stage that states what it would have by default is no change.
    for index, stages in enumerate(zip(before["stages"], now["stages"], strict=False)):
        for name, default in _STAGE_DEFAULTS.items():
            a, b = (
                _at(record, default) if stage[name] is None else stage[name]
                for record, stage in zip((before, now), stages, strict=True)
            )
            if a == b:
                found.pop(f"stages.{index}.{name}", None)
    return found


def changed_tuning(config: TuneConfig | GrpoRunConfig) -> dict[str, tuple[Any, Any]]:
    """The same for a tuning run."""
    before = _last_launch(Path(config.output) / "launches.jsonl")
    return {} if before is None else _differences(before, as_json(config))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that differ and that change what is learned."""
    found = differences(before, now, CAME_LATER)
    return {path: values for path, values in found.items() if path.partition(".")[0] not in _NO_CHANGE}


def _at(record: Mapping[str, Any], path: str) -> Any:
    """The value at a path of one point."""
    group, name = path.split(".")
    return record[group][name]


def _last_launch(path: Path) -> Mapping[str, Any] | None:
    """The configuration of the last launch whose record can be read."""
    records = read_records(path, "config", warn=False) if path.is_file() else []
    return next((r["config"] for r in reversed(records) if isinstance(r["config"], dict)), None)


def check_moments(config: RunConfig | TuneConfig | GrpoRunConfig, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Checks that moments in 8 bits, which are stored in units of `clip_norm`, still have their unit.

    Args:
      config: of this launch, which resumes from a checkpoint.
      changes: as from `changed_since_last_launch` or `changed_tuning`.

    Raises:
      InputError: `clip_norm` has changed, so that all moments would be scaled with it.
    """
    path = "optimizer.clip_norm"
    if config.optimizer.moments == "8bit" and path in changes:
        before, now = changes[path]
        raise InputError(
            f"moments='8bit' are stored in units of clip_norm, which was {before:g} and is now {now:g}: all of them "
            f"would be scaled by {now / before:g}. Set {path}={before:g}, or begin in a new folder."
        )


def check_stages_taken(
    config: RunConfig, step: int, saved: ModelConfig, changes: Mapping[str, tuple[Any, Any]]
) -> None:
    """Checks that the RoPE base of the steps that a run has taken is still the same.

    Args:
      config: of this launch.
      step: how many steps are taken.
      saved: the model as the checkpoint of that step has it.
      changes: as from `changed_since_last_launch`.

    Raises:
      InputError: a stage that has begun has another RoPE base than it had.
    """
    # The checkpoint tells for the stage of its own step.
    current = check_rope(config.ends, [config.next_token(i).model for i in range(len(config.ends))], step, saved)
    # The last launch tells for those before it.
    for index in range(current):
        values = changes.get(f"stages.{index}.rope_theta", (None, None))
        before, now = (config.model.rope_theta if value is None else value for value in values)
        if before != now:
            raise InputError(_rope(index, step, before, now))


def check_rope(ends: Sequence[int], models: Sequence[ModelConfig], step: int, saved: ModelConfig) -> int:
    """Checks that the stage of a checkpoint still has its RoPE base.

    Args:
      ends: the last step of each stage.
      models: the architecture of each stage.
      step: of the checkpoint.
      saved: the model as the checkpoint has it.

    Returns:
      The index of the stage.

    Raises:
      InputError: it has another base than it had.
    """
    current = next(index for index, end in enumerate(ends) if step <= end or index == len(ends) - 1)
    if models[current].rope_theta != saved.rope_theta:
        raise InputError(_rope(current, step, saved.rope_theta, models[current].rope_theta))
    return current


def _rope(index: int, step: int, before: float, now: float) -> str:
    return (
        f"The run has taken {step} steps, and stage {index + 1}, which has begun, had rope_theta {before:g} and now "
        f"has {now:g}. Set stages.{index}.rope_theta back, or change the base in a stage that has not begun."
    )


def describe(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """The changes as text, such as "optimizer.beta2 0.95 -> 0.99"."""
    return [f"{path} {_text(before)} -> {_text(now)}" for path, (before, now) in changes.items()]


def _text(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
