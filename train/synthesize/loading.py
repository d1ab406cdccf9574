"""Pipelines by name: the recipes that come with the package, and functions of Python files."""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from qwen_jax.errors import InputError
from train.python_file import function_of_file
from train.synthesize.pipeline import Pipeline

RECIPES = {
    name: f"train.synthesize.recipes.{name}"
    for name in (
        "long_responses",
        "mathematics",
        "code",
        "instructions",
        "structured_data",
        "logic",
        "cross_lingual",
        "system_prompts",
        "knowledge",
        "filtering",
        "preferences",
    )
}
"""Modules of ready-made recipes by name; each has a function `pipeline`."""


def load_recipe(spec: str) -> Callable[..., Pipeline]:
    """The function that makes a pipeline.

    Args:
      spec: name of a recipe, or FILE.py or FILE.py:function; the function is called `pipeline` by default.

    Raises:
      InputError: no such recipe, file or function.
    """
    if spec in RECIPES:
        made: Callable[..., Pipeline] = import_module(RECIPES[spec]).pipeline
        return made
    file, _, name = spec.partition(":")
    if not file.endswith(".py"):
        raise InputError(
            f"There is no recipe {spec}. There are: {', '.join(RECIPES)}; or give FILE.py or FILE.py:function."
        )
    found = function_of_file(Path(file).expanduser(), name or "pipeline", "recipe")
    parameters = inspect.signature(found).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters):
        raise InputError(f"The function of {spec} must have named arguments only: each becomes an option.")
    return found
