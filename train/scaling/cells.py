"""Cells of a sweep over learning rate and batch size: the runs with one model size and one number of tokens."""

import dataclasses
from typing import TypeAlias

import numpy as np

from qwen_jax.errors import InputError

Array: TypeAlias = np.ndarray

# Cells hold runs whose sizes, and tokens, differ by at most this factor: the last step rarely ends at exactly D.
SAME = 1.02
# Runs that `Cell.near` keeps where fewer are near the best.
_TAKE = 9


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs with one model size and one number of tokens.

    Attributes:
      params: model size N, as the table counts it.
      tokens: training tokens D of a run.
      points: (log learning rate, log batch size in tokens) of each run.
      log_loss: log of each run's final loss.
    """

    params: float
    tokens: float
    points: Array
    log_loss: Array

    @property
    def name(self) -> str:
        return f"N={self.params:.4g}, D={self.tokens:.4g}"

    @property
    def best(self) -> float:
        """The lowest log loss of a run."""
        return float(self.log_loss.min())

    def near(self, window: float) -> "Cell":
        """The runs whose log loss is within `window` of the best; the lowest 9 where those are fewer."""
        order = np.argsort(self.log_loss, kind="stable")
        count = max(int((self.log_loss <= self.best + window).sum()), _TAKE)
        keep = np.sort(order[:count])
        return dataclasses.replace(self, points=self.points[keep], log_loss=self.log_loss[keep])


def group_cells(
    params: Array, tokens: Array, learning_rate: Array, batch_tokens: Array, loss: Array
) -> tuple[list[Cell], list[str]]:
    """Sorts runs into cells by model size and tokens, smallest compute first.

    Runs that agree in every value are copies: one of them stays. Runs that agree in all but the loss are repeats with
    other seeds: all stay.

    Args:
      params: model size of each run.
      tokens: training tokens of each run.
      learning_rate: peak learning rate of each run.
      batch_tokens: batch size of each run in tokens.
      loss: final loss of each run in nats per token.

    Returns:
      The cells, and warnings about copies.

    Raises:
      InputError: no run; arrays of different lengths; a value that is not a positive finite number.
    """
    names = ("params", "tokens", "learning_rate", "batch_tokens", "loss")
    columns = [np.asarray(one, np.float64).ravel() for one in (params, tokens, learning_rate, batch_tokens, loss)]
    if len({len(one) for one in columns}) != 1:
        found = ", ".join(f"{name} {len(one)}" for name, one in zip(names, columns, strict=True))
        raise InputError(f"Expected one value a run in each column, got lengths {found}.")
    for name, one in zip(names, columns, strict=True):
        bad = ~(np.isfinite(one) & (one > 0))
        if bad.any():
            raise InputError(
                f"Expected positive finite numbers in {name}, got {one[bad][0]} in run {int(np.argmax(bad))} "
                f"({int(bad.sum())} such runs). Remove diverged and unfinished runs first."
            )
    if not len(columns[0]):
        raise InputError("Expected runs, got none. Were all of them diverged?")
    unique = np.unique(np.stack(columns), axis=1)
    copies = len(columns[0]) - unique.shape[1]
    warnings = [f"{copies} runs are copies of others and do not count."] if copies else []
    columns = list(unique)
    sizes, tokens_of = _levels(columns[0]), np.empty(len(columns[0]), np.int64)
    for size in np.unique(sizes):
        tokens_of[sizes == size] = _levels(columns[1][sizes == size])
    cells = []
    for size, some in sorted(set(zip(sizes.tolist(), tokens_of.tolist(), strict=True))):
        here = (sizes == size) & (tokens_of == some)
        cells.append(
            Cell(
                float(np.median(columns[0][here])),
                float(np.median(columns[1][here])),
                np.log(np.stack([columns[2][here], columns[3][here]], 1)),
                np.log(columns[4][here]),
            )
        )
    return sorted(cells, key=lambda cell: (cell.params * cell.tokens, cell.params)), warnings


def _levels(values: Array) -> Array:
    """Numbers groups of values that are within a factor `SAME` of the smallest of the group."""
    level, first = -1, 0.0
    numbers = np.empty(len(values), np.int64)
    for place in np.argsort(values, kind="stable"):
        if level < 0 or values[place] > first * SAME:
            level, first = level + 1, values[place]
        numbers[place] = level
    return numbers
