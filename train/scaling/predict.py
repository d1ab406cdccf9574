"""Fitted loss laws as files, and what they predict: the loss of a run, and the best run for a budget."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from train.files import write_file
from train.scaling.bootstrap import LeftOut, draw_laws, interval, scatter, sensitivity
from train.scaling.loss import (
    PARAMETERS,
    Approach2,
    LossLaw,
    Method,
    check_runs,
    fit,
    fit_approach2,
    fit_warnings,
    law_of,
    undetermined,
)
from train.scaling.runs import COMPUTE, UNSTATED, Array, RunTable, check_compute, compute

# How parameters are counted: all; those that a token is multiplied with, with the output head and without the
# embedding; without both.
Counting: TypeAlias = Literal["total", "with-head", "non-embedding", "unstated"]
FORM, VERSION = "L = E + A / N^a + B / D^b", 1
# Beyond the runs by more than this factor of compute is far.
_FAR = 100.0
# Difference of an exponent between least squares and Huber loss that is named.
_DECIDED = 0.03
# Smallest difference of an exponent that is shown.
_SHOWN = 0.001


@dataclasses.dataclass(frozen=True)
class FittedLoss:
    """A loss law with everything that says how it was made and how far it reaches.

    Attributes:
      law: the parameters.
      method: of the fit.
      draws: of the bootstrap.
      level: of intervals.
      counting: how parameters are counted.
      range: lowest and highest params, tokens, flops and tokens_per_param of the runs.
      runs: number of runs.
      scatter: standard deviation of log loss about the law.
      data: path, sha256, columns and selection of the table.
      checks: parameters of the other methods by name, or a `problem`.
      left_out: fits without some runs, as `LeftOut.to_json` writes them.
      warnings: a sentence each.
    """

    law: LossLaw
    method: Method
    draws: Sequence[LossLaw]
    level: float
    counting: Counting
    range: Mapping[str, tuple[float, float]]
    runs: int
    scatter: float
    data: Mapping[str, Any]
    checks: Mapping[str, Mapping[str, Any]]
    left_out: Sequence[Mapping[str, Any]]
    warnings: tuple[str, ...]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Intervals of E, A, B, a, b, and of the exponent of the optimal size, b / (a + b), where there is one."""
        if not self.draws:
            return {}
        values = np.stack([draw.values() for draw in self.draws])
        found = {name: interval(values[:, i], self.level) for i, name in enumerate(PARAMETERS)}
        share = [draw.size_exponent for draw in self.draws if draw.size_exponent is not None]
        if self.law.size_exponent is None or not share:
            return found
        return {**found, "size_exponent": interval(np.array(share), self.level)}

    def to_json(self) -> dict[str, Any]:
        """What law.json holds."""
        return {
            "law": "loss",
            "version": VERSION,
            "form": FORM,
            "compute": COMPUTE,
            "method": self.method,
            "parameters": dataclasses.asdict(self.law),
            "size_exponent": self.law.size_exponent,
            "level": self.level,
            "intervals": {name: list(ends) for name, ends in self.intervals().items()},
            "counting": self.counting,
            "range": {name: list(ends) for name, ends in self.range.items()},
            "runs": self.runs,
            "scatter": self.scatter,
            "data": dict(self.data),
            "checks": {name: dict(check) for name, check in self.checks.items()},
            "left_out": [dict(one) for one in self.left_out],
            "warnings": list(self.warnings),
            "draws": [draw.values().tolist() for draw in self.draws],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], name: str = "The law") -> "FittedLoss":
        """The inverse of `to_json`. Raises InputError if something is missing or of another kind."""
        try:
            if value["law"] != "loss" or value["version"] != VERSION:
                raise InputError(
                    f"{name} is a {value['law']!r} law of version {value['version']}; expected a loss law of version "
                    f"{VERSION}. Fit it with `qwen-jax scaling fit --law loss`."
                )
            check_compute(value, name)
            found = cls(
                law_of(value["parameters"]),
                value["method"],
                [law_of(draw) for draw in value["draws"]],
                float(value["level"]),
                value["counting"],
                {key: (float(low), float(high)) for key, (low, high) in value["range"].items()},
                int(value["runs"]),
                float(value["scatter"]),
                value["data"],
                value["checks"],
                value["left_out"],
                tuple(value["warnings"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{name} is not a fitted law: {error!r}. Fit it again.") from None
        numbers = np.stack([law.values() for law in (found.law, *found.draws)])
        if found.counting not in get_args(Counting) or not np.isfinite(numbers).all() or numbers[:, :3].min() < 0:
            raise InputError(f"{name} has parameters or a counting that cannot be used. Fit it again.")
        return found


def fit_loss(
    table: RunTable,
    method: Method = "vpnls",
    counting: Counting = "unstated",
    bootstrap: int = 200,
    level: float = 0.9,
    seed: int = 0,
    checks: bool = True,
) -> FittedLoss:
    """Fits the loss law with intervals, cross-checks by the other methods, and the sensitivity to leaving runs out.

    Args:
      table: with params, tokens, flops and loss.
      method: of the law; the others are checks.
      counting: how params are counted, as stated by the user.
      bootstrap: number of draws; 0 leaves out the intervals.
      level: of the intervals, between 0 and 1.
      seed: of the draws.
      checks: fit by the other methods too.

    Raises:
      InputError: the runs cannot determine the law, or an argument is outside its range.
    """
    if not 0 < level < 1 or bootstrap < 0:
        raise InputError(f"level must be between 0 and 1 and bootstrap at least 0, got {level} and {bootstrap}.")
    warnings = [*table.warnings, *check_runs(table)]
    law = fit(table, method)
    warnings += fit_warnings(law, table)
    if counting == "unstated":
        warnings.append(UNSTATED)
    found = _checks(table, method) if checks else {}
    warnings += _compare(law, method, found)
    draws = draw_laws(table, law, method, bootstrap, seed)
    left_out = sensitivity(table, method)
    warnings += _moved(law, draws, left_out, level)
    ratio = table["tokens"] / table["params"]
    spans = {name: table[name] for name in ("params", "tokens", "flops")} | {"tokens_per_param": ratio}
    return FittedLoss(
        law,
        method,
        draws,
        level,
        counting,
        {name: (float(values.min()), float(values.max())) for name, values in spans.items()},
        len(table),
        scatter(law, table),
        table.source,
        found,
        [one.to_json() for one in left_out],
        tuple(dict.fromkeys(warnings)),
    )


def _checks(table: RunTable, method: Method) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for other in get_args(Method):
        if other != method:
            law = fit(table, other)
            found[other] = dataclasses.asdict(law)
            if law.size_exponent is not None:
                found[other]["size_exponent"] = law.size_exponent
    try:
        second: Approach2 = fit_approach2(table)
    except InputError as error:
        return {**found, "approach2": {"problem": str(error)}}
    budgets = [
        {"flops": one.flops, "runs": len(one.rows), "params": one.params, "loss": one.loss, "problem": one.problem}
        for one in second.budgets
    ]
    found["approach2"] = {"size_exponent": second.size, "scale": second.scale, "budgets": budgets}
    return found


def _compare(law: LossLaw, method: Method, checks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names other methods that disagree on how the optimal size grows."""
    size = law.size_exponent
    robust = checks.get("vpnls-huber")
    warnings = []
    if method == "vpnls" and robust and max(abs(robust[name] - getattr(law, name)) for name in ("a", "b")) > _DECIDED:
        warnings.append(
            f"A few runs decide the least squares: with the Huber loss a is {robust['a']:.3f} instead of {law.a:.3f} "
            f"and b is {robust['b']:.3f} instead of {law.b:.3f}. Prefer --method vpnls-huber, or drop these runs."
        )
    return warnings + [
        f"{name} says that the optimal size grows as C^{check['size_exponent']:.3f}, {method} as C^{size:.3f}."
        for name, check in checks.items()
        if size is not None and "size_exponent" in check and abs(check["size_exponent"] - size) > 0.05
    ]


def _moved(law: LossLaw, draws: Sequence[LossLaw], left_out: Sequence[LeftOut], level: float) -> list[str]:
    """Names runs without which an exponent leaves its interval."""
    if not draws:
        return []
    values = np.stack([draw.values() for draw in draws])
    ends = {name: interval(values[:, PARAMETERS.index(name)], level) for name in ("a", "b")}
    warnings = []
    for one in left_out:
        if one.law is None:
            continue
        moved = [
            f"{name} is {getattr(one.law, name):.3f} instead of {getattr(law, name):.3f}"
            for name, (low, high) in ends.items()
            # Runs without noise have intervals without a width.
            if not low - _SHOWN <= getattr(one.law, name) <= high + _SHOWN
        ]
        if moved:
            warnings.append(f"Without {one.what} {' and '.join(moved)}, outside the interval.")
    return warnings


def write_law(fitted: Mapping[str, Any], path: Path) -> None:
    """Writes a fitted law of any kind. Raises InputError if the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (to_json(dict(fitted), indent=None) + "\n").encode())
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Give another folder.") from None


def read_law(path: Path) -> dict[str, Any]:
    """Reads a fitted law of any kind: law.json, or the folder that has it.

    Raises:
      InputError: no such file, or it holds no law.
    """
    path = path / "law.json" if path.is_dir() else path
    value = read_json(path)
    if not isinstance(value.get("law"), str) or "parameters" not in value:
        raise InputError(f"{path} is not a fitted law. Make one with `qwen-jax scaling fit --output DIR`.")
    if value.get("version") != VERSION:
        raise InputError(
            f"{path} is a law of version {value.get('version')!r}; expected version {VERSION}. Fit it again with this "
            "`qwen-jax scaling fit`."
        )
    check_compute(value, str(path))
    return value


def predict_loss(fitted: FittedLoss, params: float, tokens: float) -> dict[str, Any]:
    """The loss of a run.

    Args:
      fitted: the law.
      params: N, counted as the law counts.
      tokens: D.

    Returns:
      params, tokens, flops, loss; `interval` of the law's loss; `run_interval` of the loss of a single run, with the
      scatter of runs about the law; warnings. Intervals are null without a bootstrap.

    Raises:
      InputError: a number is not positive.
    """
    _positive(params=params, tokens=tokens)
    flops = compute(params, tokens)
    found: dict[str, Any] = {"params": params, "tokens": tokens, "flops": flops, "counting": fitted.counting}
    found["loss"] = float(fitted.law.loss(params, tokens))
    losses = np.array([float(draw.loss(params, tokens)) for draw in fitted.draws])
    found |= _intervals(fitted, losses)
    outside = _outside(fitted, params=params, tokens=tokens, flops=flops, tokens_per_param=tokens / params)
    found["warnings"] = undetermined(fitted.law) + outside
    return found


def compute_optimal(fitted: FittedLoss, flops: float) -> dict[str, Any]:
    """Size, tokens and loss of the best run with a budget, where C = 6 N D.

    Args:
      fitted: the law.
      flops: C.

    Returns:
      flops, params, tokens, tokens_per_param and loss, each but the first with an interval in `intervals`; warnings.

    Raises:
      InputError: flops is not positive, or the law has no optimum.
    """
    _positive(flops=flops)
    params, tokens = fitted.law.optimum(flops)
    found: dict[str, Any] = {"flops": flops, "params": params, "tokens": tokens, "tokens_per_param": tokens / params}
    found |= {"loss": float(fitted.law.loss(params, tokens)), "counting": fitted.counting}
    usable = [draw for draw in fitted.draws if draw.size_exponent is not None]
    optima = np.array([[*draw.optimum(flops)] for draw in usable]).reshape(-1, 2)
    warnings = undetermined(fitted.law)
    warnings += _outside(fitted, params=params, tokens=tokens, flops=flops, tokens_per_param=tokens / params)
    if len(usable) < len(fitted.draws):
        warnings.append(f"{len(fitted.draws) - len(usable)} of {len(fitted.draws)} draws have no optimum.")
    if len(usable):
        losses = np.array([float(draw.loss(*pair)) for draw, pair in zip(usable, optima, strict=True)])
        columns = {"params": optima[:, 0], "tokens": optima[:, 1], "tokens_per_param": optima[:, 1] / optima[:, 0]}
        found["intervals"] = {
            name: list(interval(values, fitted.level)) for name, values in (columns | {"loss": losses}).items()
        }
    else:
        found["intervals"] = None
    found["warnings"] = warnings
    return found


def _intervals(fitted: FittedLoss, losses: Array) -> dict[str, Any]:
    if not len(losses):
        return {"interval": None, "run_interval": None}
    # Ten runs about each draw.
    noise = np.random.default_rng(0).normal(0.0, fitted.scatter, (10, len(losses)))
    runs = (losses * np.exp(noise)).ravel()
    return {"interval": list(interval(losses, fitted.level)), "run_interval": list(interval(runs, fitted.level))}


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (number > 0 and math.isfinite(number)):
            raise InputError(f"{name} must be a positive number, got {number}.")


def _outside(fitted: FittedLoss, **numbers: float) -> list[str]:
    """Names what lies beyond the runs of the fit."""
    warnings = []
    for name, number in numbers.items():
        low, high = fitted.range[name]
        # The numbers of a run that is in the table may differ from it in the last digits.
        if not low * 0.999 <= number <= high * 1.001:
            side, end = ("above the highest", high) if number > high else ("below the lowest", low)
            factor = max(number / end, end / number)
            warnings.append(f"{name} = {number:.4g} is {side} of the fit, {end:.4g}, by a factor of {factor:.3g}.")
            if name == "flops" and number > high * _FAR:
                warnings.append("The extrapolation is far; the intervals know nothing of laws of another form.")
    return warnings
