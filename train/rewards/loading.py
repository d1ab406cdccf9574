"""Makes reward functions from names of built-in ones and from functions in Python files."""

import functools
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.python_file import function_of_file
from train.rewards.functions import RewardFunction

# Module and class of each built-in reward; the settings of a reward are the arguments of its class.
BUILT_IN = {
    "math": ("train.rewards.math", "MathReward"),
    "code": ("train.rewards.code", "CodeReward"),
    "instructions": ("train.rewards.instructions", "InstructionReward"),
    "verification": ("train.rewards.verification", "VerificationReward"),
    "json_schema": ("train.rewards.json_schema", "JsonSchemaReward"),
    "format": ("train.rewards.formats", "FormatGate"),
    "length": ("train.rewards.length", "LengthReward"),
    "reward_model": ("train.rewards.reward_model", "RewardModelReward"),
}


def load_reward(spec: str, **settings: Any) -> RewardFunction:
    """Makes a reward function.

    Args:
      spec: the name of a built-in reward, or `FILE.py:function`. The file is run as a part of this program: give only
        files that you trust.
      settings: of a built-in reward, the arguments of its class; of a function in a file, arguments of that function.

    Returns:
      The function. Built-in ones that hold processes have a method `close`; see `close_rewards`.

    Raises:
      InputError: no such reward, file or function; an unknown or missing setting, or one out of range; or a package
        that is not installed.
    """
    if spec in BUILT_IN:
        module, name = BUILT_IN[spec]
        made = getattr(importlib.import_module(module), name)
        _check_settings(spec, made, settings)
        reward: RewardFunction = made(**settings)
        return reward
    file, colon, name = spec.rpartition(":")
    if not (colon and file.endswith(".py") and name):
        raise InputError(f"There is no reward {spec!r}. Expected {', '.join(BUILT_IN)}, or FILE.py:function.")
    function: RewardFunction = function_of_file(Path(file), name, "reward")
    if not settings:
        return function
    _check_settings(spec, function, settings)
    bound = functools.partial(function, **settings)
    # A mark of the function that partial does not carry over.
    if getattr(function, "gate", False):
        bound.gate = True  # type: ignore[attr-defined]
    return bound


def close_rewards(functions: Iterable[RewardFunction]) -> None:
    """Ends the processes that reward functions hold."""
    for function in functions:
        if close := getattr(function, "close", None):
            close()


def _check_settings(spec: str, made: Any, settings: dict[str, Any]) -> None:
    parameters = inspect.signature(made).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := sorted(set(settings) - set(parameters)):
        raise InputError(f"The reward {spec} has no setting {unknown[0]}. It has: {', '.join(parameters) or 'none'}.")
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in settings]
    if missing and spec in BUILT_IN:
        raise InputError(f"The reward {spec} needs the setting {missing[0]}.")
