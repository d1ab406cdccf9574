"""How far a fitted loss law can be trusted: bootstrap draws, runs left out, budgets predicted from smaller ones."""

import dataclasses
import math
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from train.scaling.loss import LossLaw, Method, budgets, check_runs, fit, log_residuals
from train.scaling.runs import Array, RunTable

# Of exponents of draws: far below their spread.
_TOLERANCE = 1e-5
_BUDGET_RUNS = 3


def draw_laws(
    table: RunTable, law: LossLaw, method: Method = "vpnls", count: int = 200, seed: int = 0
) -> list[LossLaw]:
    """Laws of a bootstrap with exponential weights of the runs (Rubin 1981), fitted by the same method.

    With weights every run remains in every draw, so that small tables do not lose a size. The deviations of E, log A,
    log B, a and b from the fit are widened by n / (n - 5): residuals of a law with five parameters are smaller than the
    noise by 1 - h, where the leverage h of a run is 5 / n on average (as in the HC3 estimate of MacKinnon & White
    1985). The runs count as independent.

    Args:
      table: the runs.
      law: fitted to all of them.
      method: of the fit.
      count: number of draws.
      seed: of the weights.
    """
    generator = np.random.default_rng(seed)
    length = len(table)
    widening = length / max(length - 5, 1)
    drawn = []
    for _ in range(count):
        one = fit(table, method, generator.exponential(size=length), _TOLERANCE)
        if min(one.A, one.B, law.A, law.B) > 0:
            values, middle = (_free(item) for item in (one, law))
            moved = middle + widening * (values - middle)
            # Neither a negative loss nor a negative exponent is meant.
            e, log_a, log_b, a, b = moved
            one = LossLaw(max(e, 0.0), math.exp(log_a), math.exp(log_b), max(a, 0.0), max(b, 0.0))
        drawn.append(one)
    return drawn


def _free(law: LossLaw) -> Array:
    return np.array([law.E, math.log(law.A), math.log(law.B), law.a, law.b])


def interval(values: Array, level: float) -> tuple[float, float]:
    """The central interval that holds this share of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def scatter(law: LossLaw, table: RunTable) -> float:
    """Standard deviation of the log loss of a run about the law."""
    residuals = log_residuals(law, table)
    return math.sqrt(float(residuals @ residuals) / max(len(table) - 5, 1))


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A fit without some runs.

    Attributes:
      what: was left out.
      runs: that are left.
      law: fitted to these; None if they do not determine it.
      errors: relative errors of its losses for the runs that were left out.
      problem: why there is no law, or "".
    """

    what: str
    runs: int
    law: LossLaw | None
    errors: Array
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        size = np.abs(self.errors)
        return {
            "without": self.what,
            "runs": self.runs,
            "parameters": None if self.law is None else dataclasses.asdict(self.law),
            "error_mean": float(size.mean()) if len(size) else None,
            "error_max": float(size.max()) if len(size) else None,
            "problem": self.problem,
        }


def leave_out(table: RunTable, mask: Array, what: str, method: Method = "vpnls") -> LeftOut:
    """Fits without the runs of a mask, and predicts these."""
    rest, out = table.select(~mask), table.select(mask)
    try:
        if not len(rest):
            raise InputError("No run is left.")
        check_runs(rest)
    except InputError as error:
        return LeftOut(what, len(rest), None, np.zeros(0), str(error))
    law = fit(rest, method)
    return LeftOut(what, len(rest), law, np.expm1(-log_residuals(law, out)))


def sensitivity(table: RunTable, method: Method = "vpnls") -> list[LeftOut]:
    """Fits without the largest budgets, without the highest losses, and without the smallest and largest sizes."""
    length = len(table)

    def chosen(rows: Array) -> Array:
        mask = np.zeros(length, bool)
        mask[rows] = True
        return mask

    groups, by_loss = budgets(table["flops"]), np.argsort(-table["loss"], kind="stable")
    log_params = np.log(table["params"])
    cases = []
    for count, what in ((1, "the largest budget"), (2, "the two largest budgets")):
        if len(groups) > count:
            # Of fewer runs than these a group is not a budget, and belongs to the next smaller one.
            full = [i for i, group in enumerate(groups) if len(group) >= _BUDGET_RUNS]
            first = full[-count] if len(full) > count else len(groups) - count
            cases.append((chosen(np.concatenate(groups[first:])), what))
    cases.append((chosen(by_loss[:1]), "the highest loss"))
    if length >= 20:
        cases.append((chosen(by_loss[:5]), "the 5 highest losses"))
    cases.append((log_params < log_params.min() + 0.01, "the smallest size"))
    cases.append((log_params > log_params.max() - 0.01, "the largest size"))
    return [leave_out(table, mask, what, method) for mask, what in cases]
