"""Curations of Python files."""

import inspect
from collections.abc import Callable
from pathlib import Path

from qwen_jax.errors import InputError
from train.curate.curation import Curation
from train.python_file import function_of_file


def load_curation(spec: str) -> Callable[..., Curation]:
    """The function that makes a curation.

    Args:
      spec: FILE.py or FILE.py:function; the function is called `curation` by default.

    Raises:
      InputError: no such file or function.
    """
    file, _, name = spec.partition(":")
    if not file.endswith(".py"):
        raise InputError(f"Expected FILE.py or FILE.py:function with a function that returns a Curation, got {spec}.")
    found = function_of_file(Path(file).expanduser(), name or "curation", "curation")
    parameters = inspect.signature(found).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters):
        raise InputError(f"The function of {spec} must have named arguments only: each becomes an option.")
    return found
