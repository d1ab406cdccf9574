"""Learning rate and batch size as joint power laws in model size and tokens.

A cell is the runs with one model size N and one number of tokens D. Near its minimum the log loss of a cell is a
quadratic in u = (log learning rate, log batch size):

    log L(u) = m + (u - u*)ᵀ H (u - u*) / 2                                                                   (1)

The law is u*(N, D) = W x, where x = (1, log N, log D): a power law for each of the two. Two forms find W:

- `cells`: a quadratic in each cell with its own H; W minimises the summed regret of (1) at W x. Cells whose quadratic
  has no minimum inside their grid do not count.
- `pooled`: one H for all cells. Then log L = c + uᵀ H u / 2 - uᵀ G x with G = H W and a constant c for each cell, which
  is linear in (c, H, G): one least-squares problem. Cells with few runs, or with a grid beside the optimum, count too.

A valley is long and flat (learning rate and batch size trade off), so exponents of good laws differ. Laws are compared
by regret: the loss at the predicted pair relative to the best loss of the cell (Li et al. 2025, "Predictable Scale I:
Step Law"). A law with the batch size fixed is another law (Bjorck et al. 2024 find a learning rate that falls with D).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from qwen_jax.errors import InputError
from train.scaling.cells import SAME, Array, Cell

Form: TypeAlias = Literal["cells", "pooled"]
Terms: TypeAlias = Literal["nd", "c", "n", "d"]

# What the two power laws depend on, as directions in (log N, log D): both, compute C = 6 N D, one of the two.
_TERMS: dict[str, Array] = {
    "nd": np.array([[1.0, 0.0], [0.0, 1.0]]),
    "c": np.array([[1.0, 1.0]]),
    "n": np.array([[1.0, 0.0]]),
    "d": np.array([[0.0, 1.0]]),
}

# Runs of a cell that its quadratic of six coefficients needs.
MIN_RUNS = 8
# Log loss above the best of a cell within which runs count.
WINDOW = 0.01
# A cell with runs that count so many windows above the best is named: a quadratic hardly holds there.
_BEYOND = 3.0


@dataclasses.dataclass(frozen=True)
class Valley:
    """The quadratic (1) of one cell.

    Attributes:
      cell: all runs of the cell.
      used: number of runs the quadratic was fitted to.
      minimum: its lowest value, in log loss.
      best: its minimum (log learning rate, log batch size).
      curvature: H.
      noise: standard deviation of the residuals, in log loss.
      problem: why the quadratic gives no optimum; empty where it does.
    """

    cell: Cell
    used: int
    minimum: float
    best: Array
    curvature: Array
    noise: float
    problem: str = ""

    def excess(self, point: Array) -> float:
        """Log loss at a point above the minimum."""
        step = np.asarray(point) - self.best
        return float(step @ self.curvature @ step / 2)


def fit_valley(cell: Cell, window: float = WINDOW) -> Valley:
    """Fits the quadratic (1) to the runs of a cell near its best loss.

    Args:
      cell: its runs.
      window: greatest log loss above the best of a run that counts (0.01: 1% of the loss). Far from the minimum the
        loss rises faster than a quadratic.

    Returns:
      The quadratic. `problem` names a cell that has too few runs or values, no minimum, or one outside its grid.
    """
    near = cell.near(window)
    nothing = Valley(cell, len(near.log_loss), cell.best, np.full(2, np.nan), np.full((2, 2), np.nan), np.nan)
    values = [len(np.unique(near.points[:, axis].round(4))) for axis in range(2)]
    if len(near.log_loss) < MIN_RUNS or min(values) < 3:
        found = f"{len(near.log_loss)} runs with {values[0]} learning rates and {values[1]} batch sizes"
        return dataclasses.replace(
            nothing, problem=f"too few runs: {found}, a quadratic needs {MIN_RUNS} with 3 and 3 at least"
        )
    # Least squares of six coefficients, in coordinates of unit spread.
    centre, spread = near.points.mean(0), near.points.std(0)
    one = (near.points - centre) / spread
    design = np.column_stack([np.ones(len(one)), one, _squares(one)])
    if np.linalg.matrix_rank(design) < 6:
        return dataclasses.replace(nothing, problem="learning rate and batch size do not vary independently")
    coefficients, *_ = np.linalg.lstsq(design, near.log_loss, rcond=None)
    noise = float(np.sqrt(((near.log_loss - design @ coefficients) ** 2).sum() / max(len(one) - 6, 1)))
    curvature = _matrix(coefficients[3:])
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        return dataclasses.replace(nothing, noise=noise, problem="no minimum: the curvature is not positive")
    step = -np.linalg.solve(curvature, coefficients[1:3])
    best = centre + spread * step
    valley = Valley(
        cell,
        len(one),
        float(coefficients[0] + coefficients[1:3] @ step / 2),
        best,
        curvature / np.outer(spread, spread),
        noise,
    )
    outside = (best < cell.points.min(0) - 1e-9) | (best > cell.points.max(0) + 1e-9)
    if outside.any():
        what = " and ".join(np.array(["learning rate", "batch size"])[outside])
        return dataclasses.replace(valley, problem=f"the optimal {what} is outside the grid")
    return valley


def _squares(points: Array) -> Array:
    """Columns whose coefficients are the upper triangle of H in uᵀ H u / 2."""
    return np.column_stack([points[:, 0] ** 2 / 2, points[:, 0] * points[:, 1], points[:, 1] ** 2 / 2])


def _matrix(triangle: Array) -> Array:
    return np.array([[triangle[0], triangle[1]], [triangle[1], triangle[2]]])


@dataclasses.dataclass(frozen=True)
class PairLaw:
    """Learning rate and batch size as power laws: u = W (1, log N, log D), natural logarithms.

    Attributes:
      matrix: W; its rows are learning rate and batch size in tokens.
      name: of the law in tables.
    """

    matrix: Array
    name: str = "fitted"

    def point(self, params: float, tokens: float) -> Array:
        """(log learning rate, log batch size in tokens) for a model size and a number of tokens."""
        return self.matrix @ np.array([1.0, np.log(params), np.log(tokens)])

    def predict(self, params: float, tokens: float) -> tuple[float, float]:
        """Learning rate and batch size in tokens."""
        rate, batch = np.exp(self.point(params, tokens))
        return float(rate), float(batch)


# Li et al. 2025, "Predictable Scale I: Step Law", equation 1: N without embeddings, both in tokens.
STEP_LAW = PairLaw(np.array([[np.log(1.79), -0.713, 0.307], [np.log(0.58), 0.0, 0.571]]), "Step Law")
# DeepSeek-AI 2024, "DeepSeek LLM", equation 1, in compute C, here 6 N D.
DEEPSEEK_LAW = PairLaw(
    np.array(
        [
            [np.log(0.3118) - 0.1250 * np.log(6), -0.1250, -0.1250],
            [np.log(0.2920) + 0.3271 * np.log(6), 0.3271, 0.3271],
        ]
    ),
    "DeepSeek LLM",
)


@dataclasses.dataclass(frozen=True)
class HyperparametersFit:
    """A fitted joint law.

    Attributes:
      law: the estimate.
      form: `cells` or `pooled`.
      terms: what the law depends on.
      valleys: the quadratic of each cell, smallest compute first.
      draws: W of bootstrap samples; none where no bootstrap was asked for.
      curvature: H, shared (`pooled`) or the mean over the cells (`cells`).
      warnings: what a user should know.
    """

    law: PairLaw
    form: Form
    terms: Terms
    valleys: list[Valley]
    draws: Array
    curvature: Array
    warnings: list[str]

    def intervals(self, level: float = 0.9) -> Array:
        """Percentile intervals of W: shape [2, 3, 2], lower and upper ends; NaN without a bootstrap."""
        return _interval(self.draws, level) if len(self.draws) else np.full((2, 3, 2), np.nan)

    def point_intervals(self, params: float, tokens: float, level: float = 0.9) -> Array:
        """Intervals of (log learning rate, log batch size): shape [2, 2], lower and upper ends."""
        x = np.array([1.0, np.log(params), np.log(tokens)])
        return _interval(self.draws @ x, level) if len(self.draws) else np.full((2, 2), np.nan)


def _interval(draws: Array, level: float) -> Array:
    tail = (1 - level) / 2
    return np.moveaxis(np.quantile(draws, [tail, 1 - tail], axis=0), 0, -1)


def fit_hyperparameters(
    cells: Sequence[Cell],
    *,
    form: Form = "cells",
    terms: Terms = "nd",
    window: float = WINDOW,
    samples: int = 200,
    seed: int = 0,
) -> HyperparametersFit:
    """Fits learning rate and batch size as joint power laws.

    Intervals come from a weighted bootstrap: exponential weights of cells times exponential weights of runs, so that
    they hold noise of runs and scatter of cells about the law. Deviations are widened by
    sqrt(cells / (cells - coefficients)). The intervals do not hold the bias of a valley that is not a quadratic.

    Args:
      cells: as `group_cells` gives them.
      form: `cells` (a quadratic in each) or `pooled` (one curvature, one least-squares problem); see the module.
      terms: `nd` for N and D, `c` for compute 6 N D only, `n` or `d` for one of them. `nd` needs cells in which N and D
        vary independently.
      window: log loss above the best of a cell within which its runs count.
      samples: of the bootstrap; 0 for none.
      seed: of the bootstrap.

    Raises:
      InputError: too few cells; one model size, one number of tokens, or N and D in proportion; in `pooled`, a shared
        curvature that is not positive.
    """
    basis = _TERMS[terms]
    valleys = [fit_valley(cell, window) for cell in cells]
    if form == "cells":
        used = [valley for valley in valleys if not valley.problem]
    else:
        used = [valley for valley in valleys if len(valley.cell.log_loss) > 1]
    warnings = [f"Cell {valley.cell.name}: {valley.problem}." for valley in valleys if valley.problem]
    for valley in used:
        counted = valley.cell.near(window)
        above = float(counted.log_loss.max()) - valley.cell.best
        if above > _BEYOND * window:
            inside = int((counted.log_loss <= valley.cell.best + window).sum())
            warnings.append(
                f"Cell {valley.cell.name}: only {inside} of its runs are within the window of {window:g}; the lowest "
                f"{len(counted.log_loss)} count, up to {above:.2g} above the best. Add runs near the best."
            )
    logs = np.log([[valley.cell.params, valley.cell.tokens] for valley in used]).reshape(-1, 2)
    _check_cells(used, valleys, logs, form, terms)
    # Coordinates about the mean of the cells, for a well-conditioned problem.
    centre = logs.mean(0)
    x_CK = np.column_stack([np.ones(len(used)), (logs - centre) @ basis.T])
    near = [valley.cell.near(window) for valley in used]
    middle = np.mean([one.points.mean(0) for one in near], 0)
    runs = [(one.points - middle, one.log_loss - one.best) for one in near]
    solve = _solve_cells if form == "cells" else _solve_pooled
    if form == "pooled":
        warnings += _check_pooled(x_CK, runs)

    def matrix(solution: Array) -> Array:
        full = np.column_stack([solution[:, 0] + middle, solution[:, 1:] @ basis])
        full[:, 0] -= full[:, 1:] @ centre
        return full

    solved = solve(x_CK, runs, [np.ones(len(loss)) for _, loss in runs], np.ones(len(used)))
    if solved is None:
        raise InputError(
            "The curvature that the cells share is not positive: the runs show no minimum in learning rate and batch "
            "size. Widen the grids on both sides of the lowest loss."
        )
    estimate, curvature = solved
    # The weighted bootstrap. No sample is degenerate: every cell and run keeps a positive weight.
    generator = np.random.default_rng(seed)
    widen = np.sqrt(len(used) / max(len(used) - x_CK.shape[1], 1))
    draws = []
    for _ in range(samples):
        weights = [generator.exponential(size=len(loss)) for _, loss in runs]
        drawn = solve(x_CK, runs, weights, generator.exponential(size=len(used)))
        if drawn is not None:
            draws.append(matrix(estimate + widen * (drawn[0] - estimate)))
    if len(draws) < samples:
        warnings.append(f"{samples - len(draws)} of {samples} bootstrap samples have no minimum.")
    if len(used) < x_CK.shape[1] + 3:
        warnings.append(f"{len(used)} cells for {x_CK.shape[1]} coefficients a law: the intervals are rough.")
    return HyperparametersFit(
        PairLaw(matrix(estimate), f"fitted, {form}"),
        form,
        terms,
        valleys,
        np.array(draws).reshape(-1, 2, 3),
        curvature,
        warnings,
    )


def _check_cells(used: list[Valley], valleys: list[Valley], logs: Array, form: Form, terms: Terms) -> None:
    """Raises an InputError where the cells do not determine the law."""
    basis = _TERMS[terms]
    needed = len(basis) + 1
    if len(used) < needed:
        reasons = "".join(f"\n  {one.cell.name}: {one.problem or 'one run'}" for one in valleys if one not in used)
        advice = " The form pooled also uses cells whose own quadratic fails." if form == "cells" else ""
        raise InputError(
            f"Expected at least {needed} cells of model size and tokens for a law in {terms!r}, got {len(used)} of "
            f"{len(valleys)} that can be used.{advice}{reasons}"
        )
    for axis, (name, other) in enumerate([("model size", "d"), ("number of tokens", "n")]):
        if basis[:, axis].any() and terms != "c" and np.ptp(logs[:, axis]) < np.log(SAME):
            raise InputError(
                f"Expected cells of several values of {name}, got {np.exp(logs[0, axis]):.4g} in all {len(used)}. Add "
                f"cells, or fit a law with terms {other!r}."
            )
    directions = (logs - logs.mean(0)) @ basis.T
    spread = np.linalg.svd(directions, compute_uv=False)
    if spread[-1] < 0.05 * np.sqrt(len(used)) or spread[-1] < 0.02 * spread[0]:
        raise InputError(
            f"Model size and tokens do not vary independently in the {len(used)} cells, so their exponents cannot be "
            "told apart. Add cells at other ratios of tokens to parameters, or fit a law with terms 'c'."
            if terms == "nd"
            else f"What a law in {terms!r} depends on hardly varies in the {len(used)} cells. Add cells with other "
            "sizes or tokens, or fit a law with other terms."
        )


_Solution: TypeAlias = tuple[Array, Array]


def _solve_cells(x_CK: Array, runs: list[tuple[Array, Array]], weights: list[Array], cells: Array) -> _Solution | None:
    """W [2, K] from a quadratic in each cell, by least regret, and the mean curvature; None without a minimum."""
    size = x_CK.shape[1]
    left, right, total, count = np.zeros((2 * size, 2 * size)), np.zeros(2 * size), np.zeros((2, 2)), 0
    for x, (points, loss), weight, share in zip(x_CK, runs, weights, cells, strict=True):
        root = np.sqrt(weight)
        design = np.column_stack([np.ones(len(points)), points, _squares(points)])
        coefficients, *_ = np.linalg.lstsq(design * root[:, None], loss * root, rcond=None)
        curvature = _matrix(coefficients[3:])
        if np.linalg.eigvalsh(curvature)[0] <= 0:
            continue
        # Regret (W x - u*)ᵀ H (W x - u*) / 2, with W in row-major order.
        place = np.kron(np.eye(2), x[None])
        left += share * place.T @ curvature @ place
        right -= share * place.T @ coefficients[1:3]
        total, count = total + curvature, count + 1
    if count < size:
        return None
    return np.linalg.lstsq(left, right, rcond=None)[0].reshape(2, size), total / count


def _pooled_columns(points: Array, x: Array) -> Array:
    """Columns of the coefficients that the cells share, H and G, at the runs of a cell."""
    slopes = -np.einsum("na,k->nak", points, x).reshape(len(points), -1)
    return np.column_stack([_squares(points), slopes])


def _check_pooled(x_CK: Array, runs: list[tuple[Array, Array]]) -> list[str]:
    """Warns of few runs. Raises an InputError where the runs do not determine the coefficients that cells share."""
    blocks = [_pooled_columns(points, x) for x, (points, _) in zip(x_CK, runs, strict=True)]
    design = np.concatenate([block - block.mean(0) for block in blocks])
    free, unknown = len(design) - len(blocks), design.shape[1]
    # Relative to the columns before centring: what rounding leaves of a column that does not vary stays small.
    scaled = design / np.maximum(np.linalg.norm(np.concatenate(blocks), axis=0), 1e-300)
    if free < unknown or np.linalg.matrix_rank(scaled, tol=1e-7) < unknown:
        raise InputError(
            f"The {len(design)} runs of {len(blocks)} cells do not determine the {unknown} coefficients that the cells "
            "share. Give cells with three learning rates and three batch sizes that vary independently."
        )
    if free < 2 * unknown:
        return [
            f"{len(design)} runs of {len(blocks)} cells are few for {unknown} coefficients that the cells share, and a "
            "constant for each cell: the law may follow their noise."
        ]
    return []


def _solve_pooled(x_CK: Array, runs: list[tuple[Array, Array]], weights: list[Array], cells: Array) -> _Solution | None:
    """W [2, K] and the curvature from all runs at once; None where the curvature is not positive."""
    size = x_CK.shape[1]
    left, right = np.zeros((3 + 2 * size, 3 + 2 * size)), np.zeros(3 + 2 * size)
    for x, (points, loss), weight, share in zip(x_CK, runs, weights, cells, strict=True):
        design = _pooled_columns(points, x)
        # The constant of the cell goes by subtracting weighted means.
        design = design - np.average(design, 0, weight)
        loss = loss - np.average(loss, weights=weight)
        left += share * design.T @ (weight[:, None] * design)
        right += share * design.T @ (weight * loss)
    coefficients = np.linalg.lstsq(left, right, rcond=None)[0]
    curvature = _matrix(coefficients[:3])
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        return None
    return np.linalg.solve(curvature, coefficients[3:].reshape(2, size)), curvature


def law_parameters(matrix: Array) -> dict[str, Any]:
    """W in words: a coefficient and exponents of `params` and `tokens` for each of the two laws."""
    with np.errstate(over="ignore"):  # Draws of a law that is hardly determined are far off.
        return {
            name: {"coefficient": float(np.exp(row[0])), "params": float(row[1]), "tokens": float(row[2])}
            for name, row in zip(("learning_rate", "batch_tokens"), matrix, strict=True)
        }
