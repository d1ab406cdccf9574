"""Calls reward functions, checks what they return, and combines their rewards."""

import contextlib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qwen_jax.errors import InputError

# f(prompts, completions, **columns): a number for each text, or None for no signal. All arguments are passed by name,
# and only those that the function names, unless it takes any (**columns).
RewardFunction = Callable[..., Sequence[float | None]]

# What every function may ask for beside the columns of the prompt file.
_OURS = ("prompts", "completions", "finished", "completion_ids")


_LARGEST = float(np.finfo(np.float32).max)


def score(
    functions: Mapping[str, RewardFunction],
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    completions: Sequence[str],
    finished: Sequence[bool],
    columns: Mapping[str, Sequence[Any]],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """Computes the rewards of texts by several functions.

    Args:
      functions: by name. Each is called once, with those of the names `prompts`, `completions`, `finished`,
        `completion_ids` and of the columns that it has as parameters; with all of them if it takes any.
      prompts: of each completion, a text or a list of messages.
      completions: the generated texts.
      finished: whether each text ended by itself. One that was cut has no answer yet.
      columns: of the prompt file: for each name one value a completion.
      completion_ids: the generated tokens, for functions that count them.

    Returns:
      Float32 [completions, functions], in order. NaN is no signal (the function returned None): leave it out of means
      and of the loss, and count it.

    Raises:
      InputError: a function that raises, asks for a column that is not there, or returns something else than a list
        with a finite number or None for each completion; or arguments of different lengths.
    """
    # What functions may ask for, with one entry for each completion.
    check_columns({}, list(columns))
    given = {"prompts": prompts, "completions": completions, "finished": finished, **columns}
    if completion_ids is not None:
        given["completion_ids"] = completion_ids
    for name, values in given.items():
        if len(values) != len(completions):
            raise InputError(f"{name} has {len(values)} entries; expected {len(completions)}, one a completion.")
    for i, completion in enumerate(completions):
        if not isinstance(completion, str):
            raise InputError(f"Completion {i} is a {type(completion).__name__}; expected a text.")

    scores = np.full((len(completions), len(functions)), np.nan, np.float32)
    for column, (name, function) in enumerate(functions.items()):
        arguments = {key: list(given[key]) for key in _asked(name, function, tuple(given))}
        try:
            found = function(**arguments)
        except InputError as error:
            raise InputError(f"The reward {name}: {error}") from error
        except (Exception, SystemExit) as error:
            raise InputError(
                f"The reward {name} raised {type(error).__name__}{_place(error)}: {error}. Correct it; it may return "
                "None for a text that it cannot judge."
            ) from error
        scores[:, column] = _checked(name, found, len(completions))
    return scores


def check_columns(functions: Mapping[str, RewardFunction], columns: Sequence[str]) -> None:
    """Checks that functions could be called by `score`, without calling them.

    Args:
      functions: by name.
      columns: names of the columns of the prompt file.

    Raises:
      InputError: a column has the name of what rewards get from a run, or a function asks for a column that is not
        there.
    """
    if taken := [name for name in columns if name in _OURS]:
        raise InputError(f"The prompt file has the column {taken[0]}, which rewards get from the run. Rename it.")
    for name, function in functions.items():
        _asked(name, function, (*_OURS, *columns))


def combine(
    functions: Mapping[str, RewardFunction],
    scores: np.ndarray,
    weights: Mapping[str, float] | None = None,
    missing: Literal["mask", "ignore"] = "mask",
) -> np.ndarray:
    """One reward for each text: the weighted sum of the rewards, multiplied by the gates.

    A gate is a function with a true attribute `gate`, with values from 0 to 1. Where it gives 0 the reward is 0,
    whatever the other functions give: a right format opens the way to a reward and is none by itself.

    Args:
      functions: by name, as for `score`.
      scores: float32 [texts, functions], of `score`.
      weights: of the functions that are no gates; 1 where there is none.
      missing: what a text without the signal of a function gets: "mask" gives no reward, "ignore" the sum of what is
        there, for functions that each judge some of the prompts. A gate without signal masks, unless another is 0.

    Returns:
      Float32 [texts]; NaN for no signal. With gates only, their product.

    Raises:
      InputError: a weight for no function or for a gate, a weight that is not finite, or a gate beyond 0 to 1.
    """
    weights, names = dict(weights or {}), list(functions)
    gates = [name for name in names if getattr(functions[name], "gate", False)]
    for name, weight in weights.items():
        if name not in names or name in gates:
            kind = "is a gate, which multiplies" if name in gates else f"is none of the rewards {', '.join(names)}"
            raise InputError(f"There is a weight for {name}, which {kind}. Remove it.")
        if not math.isfinite(weight):
            raise InputError(f"The weight of {name} must be a finite number, got {weight}.")
    columns = dict(zip(names, np.asarray(scores, np.float64).T, strict=True))
    # The gates.
    opened = np.ones(len(scores))
    for name in gates:
        values = columns.pop(name)
        if ((values < 0) | (values > 1)).any():
            raise InputError(f"The gate {name} gave {values[(values < 0) | (values > 1)][0]:g}; expected 0 to 1.")
        # One that is closed is 0 also beside one without signal.
        opened = np.where((opened == 0) | (values == 0), 0.0, opened * values)
    # The sum of the others.
    if columns:
        weighted = np.stack([weights.get(name, 1.0) * values for name, values in columns.items()])
        known = ~np.isnan(weighted)
        has_signal = known.any(0) if missing == "ignore" else known.all(0)
        total = np.where(has_signal, np.where(known, weighted, 0).sum(0), np.nan)
    else:
        total = np.ones(len(scores))
    # A closed gate is 0 also where the others have no signal.
    return np.where(opened == 0, 0.0, opened * total).astype(np.float32)


def _asked(name: str, function: RewardFunction, given: Sequence[str]) -> list[str]:
    """The arguments that a function asks for."""
    # Arguments that functools.partial has bound are settings.
    bound = getattr(function, "keywords", {})
    asked = []
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise InputError(f"The reward {name} is {function!r}; expected a function with named parameters.") from None
    for key, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return [key for key in given if key not in bound]
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise InputError(f"The reward {name} has the unnamed parameter {key}. Its arguments are passed by name.")
        if key in bound:
            continue
        if key in given:
            asked.append(key)
        elif parameter.default is parameter.empty:
            raise InputError(
                f"The reward {name} asks for {key}, which the prompt file does not have. There is: {', '.join(given)}."
            )
    return asked


def _place(error: BaseException) -> str:
    """The file and the line of a function, called from here, at which an error left it; empty where it has no lines."""
    _, *frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""


def _checked(name: str, found: Any, count: int) -> list[float]:
    """The values of a function as floats, NaN for None."""
    if isinstance(found, np.ndarray):
        found = found.tolist()
    if not isinstance(found, (list, tuple)) or len(found) != count:
        what = f"{len(found)} values" if isinstance(found, (list, tuple)) else f"a {type(found).__name__}"
        raise InputError(
            f"The reward {name} returned {what}; expected a list of {count} numbers, one a completion, with None for "
            "no signal."
        )
    values = []
    for i, value in enumerate(found):
        if value is None:
            values.append(math.nan)
            continue
        number = math.nan
        if isinstance(value, (numbers.Real, np.bool_)):
            with contextlib.suppress(OverflowError):  # An integer or a fraction may exceed every float.
                number = float(value)
        if not abs(number) <= _LARGEST:
            raise InputError(
                f"The reward {name} returned {value!r:.200} for completion {i}; expected a finite number, or None for "
                "no signal."
            )
        values.append(number)
    return values
