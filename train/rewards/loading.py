"""Makes reward functions from names of built-in ones and from functions in Python files."""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.rewards.functions import RewardFunction

# Module and class of each built-in reward; the settings of a reward are the arguments of its class.
BUILT_IN = {
    "math": ("train.rewards.math", "MathReward"),
    "code": ("train.rewards.code", "CodeReward"),
    "instructions": ("train.rewards.instructions", "InstructionReward"),
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
    function = _from_file(Path(file), name)
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


def _from_file(file: Path, name: str) -> RewardFunction:
    """A function of a Python file, which is run."""
    if not file.is_file():
        raise InputError(f"The file {file} of the reward {name} does not exist. Give FILE.py:function.")
    # A name of its own for each file; pickle and dataclasses look a module up by its name.
    module_name = f"reward_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(module_name, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise InputError(f"The file {file} cannot be run: {type(error).__name__}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise InputError(f"{file} has no function {name}. It has: {', '.join(names) or 'none'}.")
    made: RewardFunction = function
    return made


def _check_settings(spec: str, made: Any, settings: dict[str, Any]) -> None:
    parameters = inspect.signature(made).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := sorted(set(settings) - set(parameters)):
        raise InputError(f"The reward {spec} has no setting {unknown[0]}. It has: {', '.join(parameters) or 'none'}.")
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in settings]
    if missing and spec in BUILT_IN:
        raise InputError(f"The reward {spec} needs the setting {missing[0]}.")
