"""Shared by the subcommands: types of options, parsing, printing sizes, and importing `train` and `convert`."""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from qwen_jax.errors import InputError

DType = Literal["bfloat16", "float32", "float16"]
# Options with the name of their value in `--help`.
Number = Annotated[float | None, tyro.conf.arg(metavar="X")]
Count = Annotated[int | None, tyro.conf.arg(metavar="N")]
# Of random numbers: at least 0.
Seed = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N",
        instance_from_str=lambda texts: _seed(texts[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
# A model is the first argument without a name, or an option.
ModelPosition = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
ModelOption = Annotated[str | None, tyro.conf.arg(metavar="DIR")]

_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def given(options: Any, *names: str) -> list[str]:
    """Which options are not as by default, such as --dtype.

    Args:
      options: a dataclass of options.
      names: of fields to look at, in this order; by default all.
    """
    names = names or tuple(field.name for field in dataclasses.fields(options))
    default = type(options)
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != getattr(default, name)]


def parse(options: type[Any], name: str, argv: Sequence[str]) -> Any:
    """Parses a subcommand's options into a dataclass. Ends the process with status 2 if they are invalid."""
    return tyro.cli(options, prog=f"qwen-jax {name}", args=list(argv), config=_CONFIG)


def model_name(position: str | None, option: str | None) -> str:
    """Returns the model that a command was given. Raises InputError unless it was given exactly once."""
    if (position is None) == (option is None):
        raise InputError("Give the model once: a checkpoint folder or a Hub id such as Qwen/Qwen2.5-0.5B-Instruct.")
    return position if position is not None else str(option)


def sibling(name: str) -> ModuleType:
    """Imports `train`, `convert` or a module in them from beside this package, whatever is in the working directory.

    Args:
      name: such as "convert.verify".
    """
    package = name.partition(".")[0]
    if package not in sys.modules:
        init = Path(__file__).resolve().parents[2] / package / "__init__.py"
        spec = importlib.util.spec_from_file_location(package, init, submodule_search_locations=[str(init.parent)])
        if spec is None or spec.loader is None or not init.is_file():
            raise ImportError(f"{init} is missing: qwen_jax, train and convert are installed together.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
    return importlib.import_module(name)


def utf8(line: bytes, where: str) -> str:
    """Decodes a line of input. Raises an InputError with the position if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start}. Convert it first.") from None


def check_apart(output: Path, folder: Path) -> None:
    """Checks that results do not go into the folder of a model, whose files are hashed.

    Args:
      output: of the results.
      folder: of the model.

    Raises:
      InputError: they do.
    """
    if output.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"--output {output} lies in the folder of the model. Give another folder.")
