"""Options of a command from the arguments of a Python function that the user names with --config."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.cli.common import sibling
from qwen_jax.errors import InputError


def config_of(argv: Sequence[str]) -> str | None:
    """The value of --config."""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return None


def result_of(function: Callable[..., Any], config: str, options: Any) -> Any:
    """Calls a function with the options that are its arguments.

    Args:
      function: of a user's file.
      config: "FILE.py" or "FILE.py:function".
      options: of a type that `with_arguments` has made.

    Raises:
      InputError: the function fails; the error names the line.
    """
    try:
        return function(**{name: getattr(options, name) for name in inspect.signature(function).parameters})
    except Exception as error:
        raise sibling("train.python_file").failure(Path(config.partition(":")[0]).expanduser(), error) from error


def with_arguments(options: type[Any], function: Callable[..., Any]) -> type[Any]:
    """Options with a field for each argument of a function, documented as the function's docstring does.

    Args:
      options: a frozen dataclass with keyword arguments only.
      function: its arguments are named.

    Raises:
      InputError: an argument has the name of an option, a type that cannot be read, or a default that can be changed.
    """
    fields = []
    general = {field.name for field in dataclasses.fields(options)}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in general:
            raise InputError(
                f"The argument {name} of {function.__name__} is an option of the command already. Give it another name."
            )
        kind = Any if parameter.annotation is parameter.empty else parameter.annotation
        if isinstance(kind, str):
            try:
                kind = inspect.get_annotations(function, eval_str=True)[name]
            except Exception as error:
                raise InputError(
                    f"The type {kind} of the argument {name} of {function.__name__} cannot be read: {error}."
                ) from None
        if isinstance(parameter.default, list | dict | set):
            raise InputError(
                f"The argument {name} of {function.__name__} has a default that can be changed. Give a tuple or None."
            )
        default = {} if parameter.default is parameter.empty else {"default": parameter.default}
        fields.append((name, kind, dataclasses.field(**default)))
    made = dataclasses.make_dataclass("Options", fields, bases=(options,), frozen=True, kw_only=True)
    summary, _, of_function = inspect.cleandoc(function.__doc__ or "").partition("Args:")
    of_function = re.split(r"\n(?=\S)", of_function)[0]
    about, _, of_command = inspect.cleandoc(options.__doc__ or "").partition("Args:")
    # Both lists of arguments, at one indent.
    arguments = inspect.cleandoc("\n" + of_function) + "\n" + inspect.cleandoc("\n" + of_command)
    indented = arguments.strip().replace("\n", "\n    ")
    made.__doc__ = f"{summary.strip() or about.strip()}\n\nArgs:\n    {indented}\n"
    return made
