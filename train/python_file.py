"""Functions of Python files that users give, such as rewards and pipelines."""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError


def failure(file: Path, error: Exception) -> InputError:
    """What to raise for an error that a user's Python file, or a function of it, has raised.

    Args:
      file: its path.
      error: what it has raised.

    Returns:
      The error itself if it is an InputError, else one that names the file, its line and the error.
    """
    if isinstance(error, InputError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == file.absolute()]
    where = f"line {lines[-1]}: " if lines else ""
    return InputError(f"The file {file} cannot be run: {where}{type(error).__name__}: {str(error).rstrip('.')}.")


def function_of_file(file: Path, name: str, what: str) -> Callable[..., Any]:
    """A function of a Python file. The file is run as a part of this program: give only files that you trust.

    Args:
      file: its path.
      name: of the function.
      what: the function is, such as "reward", for messages.

    Raises:
      InputError: no such file or function, or the file fails when it is run.
    """
    if not file.is_file():
        raise InputError(f"The file {file} of the {what} {name} does not exist. Give FILE.py:function.")
    # A name of its own for each file; pickle and dataclasses look a module up by its name.
    module_name = f"{what}_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(module_name, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise failure(file, error) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise InputError(f"{file} has no function {name}. It has: {', '.join(names) or 'none'}.")
    made: Callable[..., Any] = function
    return made
