"""Regret of a law of learning rate and batch size: what its choice costs, cell by cell.

The regret at a cell is the loss at the predicted pair relative to the cell's best loss. The loss at a pair that was not
run comes from the quadratic of the cell, or from its runs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy.interpolate import LinearNDInterpolator
from scipy.spatial import QhullError

from qwen_jax.errors import InputError
from train.scaling.cells import Array, Cell
from train.scaling.hyperparameters import (
    WINDOW,
    Form,
    PairLaw,
    Terms,
    fit_hyperparameters,
    fit_valley,
)

How: TypeAlias = Literal["quadratic", "interpolated", "nearest"]


@dataclasses.dataclass(frozen=True)
class Regret:
    """What a law's choice costs in one cell.

    Attributes:
      cell: the cell.
      learning_rate: predicted by the law.
      batch_tokens: predicted by the law.
      value: loss at the prediction / best loss - 1, where the best is the lower of the best run and the minimum of the
        quadratic.
      how: the loss comes from the `quadratic` of the cell, is `interpolated` linearly between runs, or is that of the
        `nearest` run, because the prediction is outside the grid; the last may be too low.
    """

    cell: Cell
    learning_rate: float
    batch_tokens: float
    value: float
    how: How


def cell_regret(law: PairLaw, cell: Cell, window: float = WINDOW) -> Regret:
    """The regret of a law at a cell.

    The quadratic counts where it has a minimum in the grid and the prediction is among the runs it was fitted to;
    elsewhere log loss is interpolated linearly between the runs of the cell.
    """
    point = law.point(cell.params, cell.tokens)
    valley = fit_valley(cell, window)
    near = cell.near(window).points
    base, how = cell.best, "interpolated"
    if not valley.problem:
        base = min(base, valley.minimum)
    loss: float | None = None
    if not valley.problem and (point >= near.min(0)).all() and (point <= near.max(0)).all():
        loss, how = valley.minimum + valley.excess(point), "quadratic"
    if loss is None:
        loss = _interpolate(cell, point)
    if loss is None:
        spread = np.maximum(cell.points.std(0), 1e-9)
        nearest = int(np.argmin((((cell.points - point) / spread) ** 2).sum(1)))
        loss, how = float(cell.log_loss[nearest]), "nearest"
    rate, batch = np.exp(point)
    return Regret(cell, float(rate), float(batch), float(np.expm1(loss - base)), how)  # type: ignore[arg-type]


def _interpolate(cell: Cell, point: Array) -> float | None:
    """Log loss between runs; None outside them, or where they do not span an area."""
    try:
        value = float(LinearNDInterpolator(cell.points, cell.log_loss, rescale=True)(point[None])[0])
    except (QhullError, ValueError):
        return None
    return value if np.isfinite(value) else None


def regrets(law: PairLaw, cells: Sequence[Cell], window: float = WINDOW) -> list[Regret]:
    """The regret of a law at each cell."""
    return [cell_regret(law, cell, window) for cell in cells]


def summary(found: Sequence[Regret]) -> dict[str, Any]:
    """Median, mean and greatest regret, and the number of predictions outside their grids."""
    values = np.array([one.value for one in found])
    return {
        "cells": len(found),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": float(values.max()),
        "outside_grid": sum(one.how == "nearest" for one in found),
    }


def largest(cells: Sequence[Cell], fraction: float = 0.25) -> list[int]:
    """Places of the cells of largest compute: a fraction of them, at least one."""
    order = np.argsort([cell.params * cell.tokens for cell in cells], kind="stable")
    return sorted(order[-max(round(fraction * len(cells)), 1) :].tolist())


def leave_out(
    cells: Sequence[Cell], held: Sequence[int], *, form: Form = "cells", terms: Terms = "nd", window: float = WINDOW
) -> list[Regret]:
    """Fits the law to all cells but some, and gives its regret at those.

    Args:
      cells: all of them.
      held: places of the cells left out.

    Raises:
      InputError: too few cells are left; see `fit_hyperparameters`.
    """
    rest = [cell for place, cell in enumerate(cells) if place not in set(held)]
    law = fit_hyperparameters(rest, form=form, terms=terms, window=window, samples=0).law
    return regrets(law, [cells[place] for place in held], window)


def leave_largest_out(
    cells: Sequence[Cell], fraction: float = 0.25, *, form: Form = "cells", terms: Terms = "nd", window: float = WINDOW
) -> list[Regret]:
    """The regret at the cells of largest compute of a law fitted to the others: how well the law extrapolates."""
    return leave_out(cells, largest(cells, fraction), form=form, terms=terms, window=window)


def leave_each_out(
    cells: Sequence[Cell], *, form: Form = "cells", terms: Terms = "nd", window: float = WINDOW
) -> list[Regret]:
    """The regret at each cell of a law fitted to the others."""
    found: list[Regret] = []
    for place in range(len(cells)):
        found += leave_out(cells, [place], form=form, terms=terms, window=window)
    return found


def choose_form(cells: Sequence[Cell], *, terms: Terms = "nd", window: float = WINDOW) -> tuple[Form, dict[str, Any]]:
    """The form with the lower mean regret where each cell is left out in turn.

    Returns:
      The form, and for each form its `summary` over the cells that both could leave out, or the reason why it leaves
      none out. Where neither does, because there are too few cells, the form is `pooled`, which asks for less.
    """
    forms: tuple[Form, ...] = ("cells", "pooled")
    found: dict[str, dict[int, Regret]] = {form: {} for form in forms}
    table: dict[str, Any] = {}
    for form in forms:
        for place in range(len(cells)):
            try:
                found[form][place] = leave_out(cells, [place], form=form, terms=terms, window=window)[0]
            except InputError as error:
                table[form] = str(error)
    judged = [form for form in forms if found[form]]
    common = set.intersection(*(set(found[form]) for form in judged)) if judged else set()
    if not common:
        return "pooled", table
    for form in judged:
        table[form] = summary([found[form][place] for place in sorted(common)])
    return min(judged, key=lambda form: table[form]["mean"]), table
