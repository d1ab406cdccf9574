"""Where to run next: a sequential design over learning rate and batch size, on a lattice of their logarithms.

A point is (learning rate, batch) in units of the ratio between neighbours of the coarse grid, so that (0, 0) is its
first point and a step to the right is the next larger learning rate. Learning rates also have half steps.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

Point = tuple[float, int]

# Runs whose loss is further above the best, as a fraction, are not in the quadratic: it holds near the optimum.
_NEAR = 0.06
# A quadratic has 6 coefficients.
_LEAST = 7


def next_points(losses: Mapping[Point, float], allowed: Callable[[Point], bool]) -> list[Point]:
    """The points to run next; none once the optimum is bracketed.

    First the optimum of a quadratic through the runs near the best, or one step past the edge of what was run in its
    direction. Once that was run, the neighbours of the best run that are missing. The best run is bracketed when a run
    lies within a step on each of its four sides, or none is allowed there.

    Args:
      losses: of the points that were run; infinite where a run diverged.
      allowed: whether a point can be run.

    Returns:
      At most four points, none of which was run. None if all runs diverged and there are no smaller rates to try.
    """
    finite = {point: loss for point, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        # Smaller rates, at the largest batch.
        point = (min(rate for rate, _ in losses) - 1, max(batch for _, batch in losses))
        return [point] if allowed(point) else []
    best = min(finite, key=lambda point: (finite[point], point))
    optimum = quadratic_optimum(finite)
    if optimum is not None:
        target = _onto_lattice(optimum, losses)
        if target not in losses and allowed(target):
            return [target]
    return [
        (best[0] + rate, best[1] + batch)
        for rate, batch in ((-1, 0), (1, 0), (0, -1), (0, 1))
        if not _covered(best, rate, batch, losses) and allowed((best[0] + rate, best[1] + batch))
    ]


def quadratic_optimum(losses: Mapping[Point, float]) -> tuple[float, float] | None:
    """The minimum of a quadratic, by least squares over the runs near the best.

    Args:
      losses: finite, of the points that were run.

    Returns:
      (learning rate, batch); along an axis with fewer than 3 values, the best run's. None if there are too few runs, or
      the quadratic has no minimum.
    """
    best = min(losses, key=lambda point: (losses[point], point))
    ordered = sorted(losses, key=lambda point: (losses[point], point))
    near = [point for point in ordered if losses[point] <= losses[best] * (1 + _NEAR)]
    used = near if len(near) >= _LEAST else ordered[:_LEAST]
    points, values = np.array(used, float), np.array([losses[point] for point in used])
    x, y = (points - best).T
    flat = [len(np.unique(axis)) < 3 for axis in (x, y)]
    if all(flat) or len(used) < (3 if any(flat) else 6):
        return None
    if any(flat):
        # One axis alone, at the value of the other that the best run has.
        axis = 1 if flat[0] else 0
        row = points[:, 1 - axis] == best[1 - axis]
        along = (points - best)[row, axis]
        if len(np.unique(along)) < 3:
            return None
        a, b, _ = np.polyfit(along, values[row], 2)
        if a <= 0:
            return None
        found = [float(best[0]), float(best[1])]
        found[axis] += float(-b / (2 * a))
        return found[0], found[1]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    coefficients, _, rank, _ = np.linalg.lstsq(terms, values, rcond=None)
    _, bx, by, cxx, cxy, cyy = coefficients
    hessian = np.array([[2 * cxx, cxy], [cxy, 2 * cyy]])
    if rank < 6 or np.linalg.eigvalsh(hessian)[0] <= 0:
        return None
    step = np.linalg.solve(hessian, [-bx, -by])
    return float(best[0] + step[0]), float(best[1] + step[1])


def _onto_lattice(optimum: tuple[float, float], losses: Mapping[Point, float]) -> Point:
    """The nearest point of the lattice, at most one step past what was run."""
    rates, batches = [rate for rate, _ in losses], [batch for _, batch in losses]
    rate = min(max(round(2 * optimum[0]) / 2, min(rates) - 1), max(rates) + 1)
    batch = min(max(round(optimum[1]), min(batches) - 1), max(batches) + 1)
    return rate, batch


def _covered(best: Point, rate: int, batch: int, losses: Mapping[Point, float]) -> bool:
    """Whether a run lies within a step of the best on one side."""
    if rate:
        return any(b == best[1] and 0 < (r - best[0]) * rate <= 1 for r, b in losses)
    return any(abs(r - best[0]) <= 0.5 and (b - best[1]) * batch == 1 for r, b in losses)
