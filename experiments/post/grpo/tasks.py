"""Tasks of the learning experiment: problems with one answer to learn from, and a reward that judges any answer."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.post.grpo import rewards
from experiments.post.tasks import Item
from train.grpo_config import RewardUse


@dataclasses.dataclass(frozen=True)
class Problem(Item):
    """A prompt, an answer that is right, and the columns that rewards read."""

    columns: Mapping[str, Any]


class Sizes(Protocol):
    """How hard problems are; see `experiments.post.grpo.learning.Setup`."""

    @property
    def largest(self) -> int: ...

    @property
    def operations(self) -> int: ...

    @property
    def constants(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of problems.

    Attributes:
      make: draws a problem.
      true: reward of right answers.
      random: its control.
      sandbox: whether the rewards run code.
    """

    make: Callable[[np.random.Generator, Sizes], Problem]
    true: RewardUse
    random: RewardUse
    sandbox: bool = False


def _arithmetic(rng: np.random.Generator, sizes: Sizes) -> Problem:
    """A sum or a difference of two numbers from 0 to `sizes.largest`."""
    a, b = (int(x) for x in rng.integers(0, sizes.largest + 1, 2))
    plus = bool(rng.integers(2))
    answer = str(a + b if plus else a - b)
    return Problem(f"What is {a} {'+' if plus else '-'} {b}?", answer, {"answer": answer})


# What is said, what is written, and what it does.
_OPERATIONS: tuple[tuple[str, str, Callable[[int, int], int]], ...] = (
    ("add {k}", "x + {k}", lambda x, k: x + k),
    ("subtract {k}", "x - {k}", lambda x, k: x - k),
    ("multiply by {k}", "x * {k}", lambda x, k: x * k),
    ("take it from {k}", "{k} - x", lambda x, k: k - x),
    ("take the remainder by {k}", "x % {k}", lambda x, k: x % k),
    ("take the larger of it and {k}", "max(x, {k})", lambda x, k: max(x, k)),
)


def _code(rng: np.random.Generator, sizes: Sizes) -> Problem:
    """A Python function of some operations, one after the other, and assertions about its values."""
    inputs = [int(x) for x in rng.integers(-50, 51, 5)]
    values, said, lines = list(inputs), [], ["def f(x):"]
    for which in rng.integers(0, len(_OPERATIONS), sizes.operations):
        say, write, apply = _OPERATIONS[which]
        k = int(rng.integers(2, sizes.constants + 1))
        said.append(say.format(k=k))
        lines.append(f"    x = {write.format(k=k)}")
        values = [apply(value, k) for value in values]
    code = "\n".join([*lines, "    return x"])
    checks = "\n".join(f"assert f({x}) == {value}" for x, value in zip(inputs, values, strict=True))
    prompt = f"Write f(x): {', then '.join(said)}."
    return Problem(prompt, f"```python\n{code}\n```", {"tests": [{"code": checks}]})


def _ours(name: str) -> RewardUse:
    return RewardUse(f"{Path(rewards.__file__).resolve()}:{name}")


TASKS: dict[str, Task] = {
    "arithmetic": Task(_arithmetic, _ours("exact"), _ours("exact_shuffled")),
    "code": Task(_code, RewardUse("code"), _ours("code_shuffled"), sandbox=True),
}
