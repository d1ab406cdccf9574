"""The law of the small sweep, and its pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Picked:
    """A prediction of a law.

    Attributes:
      learning_rate, batch_tokens: what it picks.
      record: the law as JSON values.
    """

    learning_rate: float
    batch_tokens: float
    record: dict[str, Any]


def fit_law(rows: Sequence[Mapping[str, Any]], params: float, tokens: float) -> Picked:
    return Picked(0.005, 256, {"stub": 1})


def plot_law(rows, law, path) -> None: ...


def plot_target(rows, results, path) -> None: ...
