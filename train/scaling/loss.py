"""The loss law L(N, D) = E + A / N^a + B / D^b, and ways to fit it (Hoffmann et al. 2022, arXiv:2203.15556).

- `fit_vpnls` (the default): least squares by variable projection. For given exponents the law is linear in E, A, B,
  which non-negative least squares finds exactly; a search over the two exponents remains. It is well conditioned, where
  a search over all five parameters is not.
- `fit_huber`: the objective of approach 3, the Huber loss of log L, by least squares with weights that are adapted to
  the residuals, each solved by VPNLS. Few runs that went wrong do not decide it.
- `fit_approach3`: Huber loss on log L, the law as a log-sum-exp, BFGS from a grid of starts (the paper has L-BFGS; five
  parameters need no limited memory). The objective is summed: with the mean, the optimiser's tolerance ends it far from
  the minimum (Besiroglu et al. 2024, arXiv:2404.10102).
- `fit_approach2`: parabolas in log N through runs of one budget; their minima give exponents of the optimal N and D. It
  does not need the law, and is biased where grids are not centred on the optimum.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from qwen_jax.errors import InputError
from train.scaling.runs import FLOPS_PER_PARAM, Array, RunTable

Method: TypeAlias = Literal["vpnls", "vpnls-huber", "approach3"]

PARAMETERS = ("E", "A", "B", "a", "b")
# Exponents that the search covers.
LOWEST, HIGHEST = 0.01, 2.0
# E, A and B up to this are zero.
_ZERO = 1e-12
# Points of the grid along an exponent, points on each side of the best that the next, finer grid spans, most grids.
_POINTS, _SPAN, _ROUNDS = 21, 3, 60
# Half the width of a search near a law; most rounds of adapted weights.
_NEAR, _REWEIGHTED = 0.05, 50
# Of approach 3: where the Huber loss turns linear, in log loss.
DELTA = 1e-3
# Starts of approach 3: values of log A, log B, log E, a, b as in the paper; the best this many are optimised.
_STARTS = (
    (0, 5, 10, 15, 20, 25),
    (0, 5, 10, 15, 20, 25),
    (-1, -0.5, 0, 0.5, 1),
    (0, 0.5, 1, 1.5, 2),
    (0, 0.5, 1, 1.5, 2),
)
_BEST_STARTS, _TO_THE_END = 32, 3
# Runs belong to one budget if their FLOPs differ by at most this factor.
_SAME_BUDGET = 1.1
# Distinct (N, D) that five parameters need, and distinct values of each.
_CELLS, _VALUES = 6, 3


@dataclasses.dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N^a + B / D^b, in nats a token.

    Attributes:
      E: loss that neither size nor tokens reduce.
      A: scale of the term in size.
      B: scale of the term in tokens.
      a: exponent of size.
      b: exponent of tokens.
    """

    E: float
    A: float
    B: float
    a: float
    b: float

    def loss(self, params: Any, tokens: Any) -> Any:
        """The loss for sizes and tokens, which are broadcast."""
        return self.E + self.A * np.asarray(params, float) ** -self.a + self.B * np.asarray(tokens, float) ** -self.b

    @property
    def size_exponent(self) -> float | None:
        """b / (a + b): the optimal size grows as this power of compute. None if there is no optimum.

        There is none where a term is zero, or has an exponent at the low edge of the search: it is a constant then.
        """
        if min(self.A, self.B) <= _ZERO or min(self.a, self.b) <= LOWEST * 1.01:
            return None
        return self.b / (self.a + self.b)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Size and tokens of the lowest loss with 6 N D FLOPs.

        From dL/dN = 0 along N D = C / 6: N = (a A / (b B))^(1 / (a + b)) (C / 6)^(b / (a + b)).

        Raises:
          InputError: there is no optimum; see `size_exponent`.
        """
        if self.size_exponent is None:
            raise InputError(
                f"A law without a term in size or in tokens has no optimum: A={self.A:g}, B={self.B:g}, "
                f"a={self.a:.3g}, b={self.b:.3g}. Fit it to runs that vary both."
            )
        product = flops / FLOPS_PER_PARAM
        ratio = math.log(self.a * self.A / (self.b * self.B))
        params = math.exp((ratio + self.b * math.log(product)) / (self.a + self.b))
        return params, product / params

    def values(self) -> Array:
        """E, A, B, a, b."""
        return np.array(dataclasses.astuple(self))


def check_runs(table: RunTable) -> list[str]:
    """Says what is weak about runs for this law.

    Args:
      table: with params, tokens and loss.

    Returns:
      Warnings, a sentence each.

    Raises:
      InputError: the runs cannot determine the five parameters.
    """
    params, tokens = table["params"], table["tokens"]
    cells = len(np.unique(np.stack([params, tokens], 1), axis=0))
    sizes, lengths = _distinct(params), _distinct(tokens)
    found = (
        f"got {len(table)} runs with {cells} cells of size and tokens, {sizes} sizes and {lengths} numbers of tokens"
    )
    if sizes < _VALUES or lengths < _VALUES:
        what = "size" if sizes < _VALUES else "number of tokens"
        raise InputError(
            f"E + A / N^a + B / D^b needs {_VALUES} sizes and {_VALUES} numbers of tokens at least; {found}. Add runs "
            f"with another {what}."
        )
    if cells < _CELLS:
        raise InputError(f"E + A / N^a + B / D^b needs {_CELLS} cells at least, it has five parameters; {found}.")
    if np.ptp(table["loss"]) == 0:
        raise InputError(f"All runs have the same loss, {table['loss'][0]:g}. Is the right column mapped to loss?")
    ratio = np.log(tokens / params)
    if np.ptp(ratio) < 0.1:
        raise InputError(
            f"Tokens per parameter hardly vary ({math.exp(ratio.min()):.4g} to {math.exp(ratio.max()):.4g}), so that "
            "size and tokens cannot be told apart. Add runs of a size with other numbers of tokens."
        )
    warnings = []
    if np.corrcoef(np.log(params), np.log(tokens))[0, 1] > 0.98:
        warnings.append("Size and tokens are nearly proportional: their exponents are poorly determined.")
    if np.ptp(np.log(params)) < math.log(4) or np.ptp(np.log(tokens)) < math.log(4):
        warnings.append("Sizes or tokens span less than a factor of 4: the exponents are poorly determined.")
    if cells < 12:
        warnings.append(f"Only {cells} cells of size and tokens for five parameters.")
    return warnings


def fit(table: RunTable, method: Method = "vpnls", weights: Array | None = None, tolerance: float = 1e-8) -> LossLaw:
    """Fits the law by one of the methods that give all five parameters.

    Args:
      table: with params, tokens and loss; see `check_runs`.
      method: vpnls, vpnls-huber or approach3.
      weights: of the runs; by default all the same.
      tolerance: of the exponents, for the first two.
    """
    if method == "approach3":
        return fit_approach3(table, weights)
    return (fit_huber if method == "vpnls-huber" else fit_vpnls)(table, weights, tolerance)


def fit_vpnls(
    table: RunTable, weights: Array | None = None, tolerance: float = 1e-8, near: LossLaw | None = None
) -> LossLaw:
    """Least squares: a search over both exponents, and non-negative least squares for E, A, B at each point.

    The search is a grid that is refined around its best point, and moves along if that is on its edge.

    Args:
      table: with params, tokens and loss.
      weights: of the runs; by default all the same.
      tolerance: of the exponents.
      near: a law in whose neighbourhood the search begins; by default it begins with all exponents.
    """
    loss = table["loss"]
    weight = np.ones(len(loss)) if weights is None else weights * (len(loss) / weights.sum())
    # Sizes relative to a middle one: the powers are about 1 then.
    logs = [np.log(table[name]) for name in ("params", "tokens")]
    middle = [float(values.mean()) for values in logs]
    n, d = (values - centre for values, centre in zip(logs, middle, strict=True))
    low, high = np.full(2, LOWEST), np.full(2, HIGHEST)
    if near is not None:
        exponents = np.array([near.a, near.b])
        low, high = np.maximum(exponents - _NEAR, LOWEST), np.minimum(exponents + _NEAR, HIGHEST)
    for _ in range(_ROUNDS):
        a_K, b_K = np.linspace(low[0], high[0], _POINTS), np.linspace(low[1], high[1], _POINTS)
        objective = _projected(n, d, loss, weight, a_K, b_K)[0]
        i, j = np.unravel_index(int(objective.argmin()), objective.shape)
        step = (high - low) / (_POINTS - 1)
        best = np.array([a_K[i], b_K[j]])
        edge = (np.array([i, j]) == 0) & (low > LOWEST) | (np.array([i, j]) == _POINTS - 1) & (high < HIGHEST)
        # A valley may be narrow and oblique: stay at this step while the best point is on the edge.
        half = np.where(edge.any(), (high - low) / 2, _SPAN * step)
        low, high = np.maximum(best - half, LOWEST), np.minimum(best + half, HIGHEST)
        if step.max() < tolerance:
            break
    # The linear parameters at the best exponents, in the units of N and D.
    _, (e, a, b) = _projected(n, d, loss, weight, best[:1], best[1:])
    scale = np.exp(best * middle)
    return LossLaw(float(e[0, 0]), float(a[0, 0] * scale[0]), float(b[0, 0] * scale[1]), *map(float, best))


def _projected(
    n: Array, d: Array, loss: Array, weight: Array, a_K: Array, b_M: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Non-negative least squares for E, A, B at all pairs of exponents.

    There are seven sets of parameters that are not zero. The best of those whose solution is not negative is the
    solution, by convexity.

    Returns:
      Sums of squares [K, M]; E, A, B [K, M].
    """
    total = weight.sum()
    x, y = np.exp(-np.outer(n, a_K)), np.exp(-np.outer(d, b_M))
    x_mean, y_mean, mean = weight @ x / total, weight @ y / total, float(weight @ loss / total)
    shape = len(a_K), len(b_M)
    solutions: list[tuple[Array, Array, Array, Array]] = []
    # With E the columns are centred, without it they are not.
    for centred in (True, False):
        p, q, r = (x - x_mean, y - y_mean, loss - mean) if centred else (x, y, loss)
        wp, wq = weight[:, None] * p, weight[:, None] * q
        xx, yy, xy = (wp * p).sum(0)[:, None], (wq * q).sum(0)[None], wp.T @ q
        xr, yr, rr = (wp.T @ r)[:, None], (wq.T @ r)[None], float(weight @ (r * r))
        with np.errstate(divide="ignore", invalid="ignore"):
            determinant = xx * yy - xy * xy
            both = (xr * yy - yr * xy) / determinant, (yr * xx - xr * xy) / determinant
            zero = np.zeros(shape)
            pairs = [both, (xr / xx + zero, zero), (zero, yr / yy + zero)]
        pairs += [(zero, zero)] if centred else []
        for a, b in pairs:
            e = mean - a * x_mean[:, None] - b * y_mean[None] if centred else zero
            squares = rr - a * xr - b * yr
            usable = np.isfinite(squares) & (a >= 0) & (b >= 0) & (e >= 0)
            if not solutions and usable.all():
                # All three are positive everywhere: nothing with a zero can be better.
                return squares, (e, a, b)
            solutions.append((np.where(usable, squares, np.inf), e, a, b))
    stacked = [np.stack([solution[k] for solution in solutions]) for k in range(4)]
    best = stacked[0].argmin(0)[None]
    squares, e, a, b = (np.take_along_axis(values, best, 0)[0] for values in stacked)
    return squares, (e, a, b)


def fit_huber(table: RunTable, weights: Array | None = None, tolerance: float = 1e-8) -> LossLaw:
    """Minimises the summed Huber loss of log L by iteratively reweighted VPNLS.

    A run with log residual r has the weight min(1, DELTA / |r|) / L^2, where L is the loss of the law: near the law a
    squared error of the loss with this weight is the Huber loss of log L, up to a constant.

    Args:
      table: with params, tokens and loss.
      weights: of the runs; by default all the same.
      tolerance: of the exponents.
    """
    weight = np.ones(len(table)) if weights is None else weights
    tolerance = max(tolerance, 1e-6)
    law = fit_vpnls(table, weight / table["loss"] ** 2, tolerance)
    for _ in range(_REWEIGHTED):
        predicted = law.loss(table["params"], table["tokens"])
        size = np.abs(np.log(table["loss"] / predicted))
        adapted = weight / predicted**2 * np.minimum(1.0, DELTA / np.maximum(size, 1e-300))
        before, law = law, fit_vpnls(table, adapted, tolerance, law)
        if max(abs(law.a - before.a), abs(law.b - before.b)) < 10 * tolerance:
            break
    return law


def fit_approach3(table: RunTable, weights: Array | None = None) -> LossLaw:
    """Minimises the summed Huber loss of log L by BFGS from a grid of starts.

    All 4,500 starts of the paper's grid are evaluated, and the best are optimised. The parameters log A and log B stand
    for a middle size during the search, which conditions it better and leaves the objective as it is.
    """
    import scipy.optimize

    n, d = (np.log(table[name]) for name in ("params", "tokens"))
    centre = np.array([n.mean(), d.mean()])
    n, d, target = n - centre[0], d - centre[1], np.log(table["loss"])
    weight = np.ones(len(target)) if weights is None else weights * (len(target) / weights.sum())

    def objective(theta: Array) -> tuple[float, Array]:
        terms = np.stack([theta[0] - theta[3] * n, theta[1] - theta[4] * d, np.full_like(n, theta[2])])
        top = terms.max(0)
        share = np.exp(terms - top)
        residual = top + np.log(share.sum(0)) - target
        share /= share.sum(0)
        small = np.abs(residual) <= DELTA
        value = np.where(small, residual**2 / 2, DELTA * (np.abs(residual) - DELTA / 2))
        slope = weight * np.clip(residual, -DELTA, DELTA)
        by_term = share @ slope
        gradient = [by_term[0], by_term[1], by_term[2], -(share[0] * n) @ slope, -(share[1] * d) @ slope]
        # The summed loss of good fits is about 1e-4; the optimiser's tolerances are made for values about 1.
        return float(weight @ value) / DELTA**2, np.array(gradient) / DELTA**2

    grid = np.stack(np.meshgrid(*_STARTS, indexing="ij"), -1).reshape(-1, 5).astype(float)
    grid[:, :2] -= grid[:, 3:] * centre
    values = np.concatenate([_values(part, n, d, target, weight) for part in np.array_split(grid, 20)])
    starts = grid[np.argsort(values, kind="stable")[:_BEST_STARTS]]

    def optimise(start: Array, iterations: int) -> tuple[float, Array]:
        options = {"maxiter": iterations, "gtol": 1e-7}
        found = scipy.optimize.minimize(objective, start, jac=True, method="BFGS", options=options)
        return float(found.fun), found.x

    # Most starts lead to the same minimum: all go a part of the way, the best to the end.
    tried = sorted((optimise(start, 60) for start in starts), key=lambda pair: pair[0])[:_TO_THE_END]
    best = min((optimise(start, 3000) for _, start in tried), key=lambda pair: pair[0])[1]
    log_scale = np.minimum(best[:2] + best[3:] * centre, 700.0)
    return law_of([math.exp(best[2]), *np.exp(log_scale), best[3], best[4]])


def _values(grid: Array, n: Array, d: Array, target: Array, weight: Array) -> Array:
    """The objective of approach 3 at many points, up to a factor."""
    terms = np.stack([grid[:, :1] - grid[:, 3:4] * n, grid[:, 1:2] - grid[:, 4:] * d])
    predicted = np.logaddexp(np.logaddexp(terms[0], terms[1]), grid[:, 2:3])
    size = np.abs(predicted - target)
    # Not by BLAS: its threads cost more than they give at this size.
    values: Array = (np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2)) * weight).sum(1)
    return values


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Runs of one budget and the parabola of their loss in log N.

    Attributes:
      flops: geometric mean of the budget.
      rows: of the table.
      coefficients: of the loss in log N, highest power first; empty if there is no minimum.
      params: size of the minimum; NaN without one.
      loss: at the minimum; NaN without one.
      problem: why it does not count, or "".
    """

    flops: float
    rows: Array
    coefficients: tuple[float, ...] = ()
    params: float = math.nan
    loss: float = math.nan
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Approach2:
    """Exponents of the compute-optimal size and tokens: N ∝ C^size, D ∝ C^(1 - size).

    Attributes:
      size: exponent of N, which the loss law says is b / (a + b).
      scale: N = scale * C^size.
      budgets: the parabolas, those that do not count among them.
    """

    size: float
    scale: float
    budgets: tuple[IsoFlop, ...]


def budgets(flops: Array) -> list[Array]:
    """Groups runs by compute, the smallest first: within a factor of 1.1, or of 2 if groups are small then."""
    order = np.argsort(flops, kind="stable")
    groups: list[list[int]] = []
    for factor in (_SAME_BUDGET, 2.0):
        groups = []
        for row in order:
            if groups and flops[row] <= factor * flops[groups[-1][0]]:
                groups[-1].append(int(row))
            else:
                groups.append([int(row)])
        if len(flops) >= 3 * len(groups):
            break
    return [np.array(group) for group in groups]


def fit_approach2(table: RunTable) -> Approach2:
    """Fits a parabola in log N to the losses of each budget, and a power law to the minima.

    Raises:
      InputError: fewer than two budgets have a minimum inside their sizes.
    """
    found = [_parabola(table, rows) for rows in budgets(table["flops"])]
    good = [one for one in found if not one.problem]
    if len(good) < 2:
        problems = "; ".join(f"{one.flops:.3g} FLOPs: {one.problem}" for one in found if one.problem)
        raise InputError(f"Approach 2 needs two budgets with a minimum, got {len(good)} ({problems}).")
    slope, intercept = np.polyfit([math.log(one.flops) for one in good], [math.log(one.params) for one in good], 1)
    return Approach2(float(slope), math.exp(intercept), tuple(found))


def _parabola(table: RunTable, rows: Array) -> IsoFlop:
    flops = math.exp(float(np.log(table["flops"][rows]).mean()))
    x, y = np.log(table["params"][rows]), table["loss"][rows]
    # Four sizes at least: a parabola through three has no residual.
    if (sizes := _distinct(table["params"][rows])) < 4:
        return IsoFlop(flops, rows, problem=f"{sizes} sizes, 4 are needed")
    centre = x.mean()
    curve, slope, level = np.polyfit(x - centre, y, 2)
    if curve <= 0:
        return IsoFlop(flops, rows, problem="no minimum")
    at = centre - slope / (2 * curve)
    coefficients = float(curve), float(slope - 2 * curve * centre), float(level - slope * centre + curve * centre**2)
    if not x.min() <= at <= x.max():
        return IsoFlop(flops, rows, coefficients, problem="minimum outside the sizes")
    return IsoFlop(flops, rows, coefficients, math.exp(at), float(level - slope**2 / (4 * curve)))


def _distinct(values: Array) -> int:
    """Distinct values up to 1%."""
    logs = np.sort(np.log(values))
    return 1 + int((np.diff(logs) > 0.01).sum())


def undetermined(law: LossLaw) -> list[str]:
    """Says what the runs did not determine: terms of zero, exponents at the edge of the search."""
    warnings = []
    zero = [name for name in ("E", "A", "B") if getattr(law, name) <= _ZERO]
    if zero:
        warnings.append(f"The fit has {' and '.join(zero)} = 0: the runs do not determine the law.")
    for name in ("a", "b"):
        if not LOWEST * 1.01 < getattr(law, name) < HIGHEST * 0.99:
            warnings.append(f"The exponent {name} = {getattr(law, name):.3g} is at the edge of what is searched.")
    return warnings


def fit_warnings(law: LossLaw, table: RunTable) -> list[str]:
    """Says what is odd about a fitted law: what the runs did not determine, and outliers."""
    warnings = undetermined(law)
    residual = log_residuals(law, table)
    spread = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    far = np.flatnonzero(np.abs(residual - np.median(residual)) > max(6 * spread, 1e-6))
    if len(far):
        shown = ", ".join(
            f"row {table.rows[i]} ({np.expm1(residual[i]):+.1%})" for i in far[np.argsort(-abs(residual[far]))][:5]
        )
        warnings.append(
            f"{len(far)} of {len(table)} runs are far from the law, by six robust deviations or more, and may decide "
            f"it: {shown}. Diverged or unfinished? See the sensitivity, and drop them with --drop-highest or --where."
        )
    return warnings


def log_residuals(law: LossLaw, table: RunTable) -> Array:
    """log of the loss of each run, minus that of the law."""
    residuals: Array = np.log(table["loss"]) - np.log(law.loss(table["params"], table["tokens"]))
    return residuals


def law_of(parameters: Mapping[str, float] | Sequence[float]) -> LossLaw:
    """The law with parameters by name, or in the order E, A, B, a, b."""
    values = [parameters[name] for name in PARAMETERS] if isinstance(parameters, Mapping) else list(parameters)
    return LossLaw(*map(float, values))
