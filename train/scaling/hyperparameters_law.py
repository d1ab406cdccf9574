"""`scaling fit` and `scaling predict` of the law of learning rate and batch size: from a table to law.json and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from qwen_jax.errors import InputError
from train.scaling import loss as loss_law
from train.scaling.cells import Array, Cell, group_cells
from train.scaling.hyperparameters import (
    DEEPSEEK_LAW,
    STEP_LAW,
    WINDOW,
    HyperparametersFit,
    PairLaw,
    Terms,
    fit_hyperparameters,
    law_parameters,
)
from train.scaling.regret import Regret, choose_form, largest, leave_out, regrets, summary
from train.scaling.runs import COMPUTE, UNSTATED, RunTable, check_compute, compute

COLUMNS = ("params", "tokens", "learning_rate", "batch_tokens", "loss")
FormChoice: TypeAlias = Literal["auto", "cells", "pooled"]
# Share of intervals where nothing is said.
LEVEL = 0.9
_LOSS_SAMPLES = 40


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fit with all that is written and drawn of it.

    Attributes:
      law: the content of law.json.
      fit: the fit itself.
      cells: of the table.
      found: regret at each cell of the fitted law and of published ones, by name.
      held: regret at the cells of largest compute of the law without them; empty where too few cells are left.
    """

    law: dict[str, Any]
    fit: HyperparametersFit
    cells: list[Cell]
    found: dict[str, list[Regret]]
    held: list[Regret]


def fit_table(
    table: RunTable,
    *,
    form: FormChoice = "auto",
    terms: Terms = "nd",
    window: float = WINDOW,
    samples: int = 200,
    seed: int = 0,
    level: float = LEVEL,
    counting: str = "unstated",
) -> Fitted:
    """Fits the joint law to a table of runs, and measures its regret.

    Args:
      table: with `COLUMNS`.
      form: `auto` takes the form with the lower regret where each cell is left out in turn.
      terms: what the law depends on; see `fit_hyperparameters`.
      window: log loss above the best of a cell within which its runs count.
      samples: of the bootstrap.
      seed: of the bootstrap.
      level: of the intervals, between 0 and 1.
      counting: how the table counts parameters, as law.json says it.

    Raises:
      InputError: the runs do not determine the law; see `fit_hyperparameters`; an argument is outside its range.
    """
    if not 0 < level < 1 or samples < 0 or not window > 0:
        raise InputError(
            "Expected a level between 0 and 1, samples of at least 0 and a positive window, got "
            f"{level}, {samples} and {window}."
        )
    cells, warnings = group_cells(*(table[name] for name in COLUMNS))
    judged: dict[str, Any] = {}
    if form == "auto":
        form, judged = choose_form(cells, terms=terms, window=window)
    fit = fit_hyperparameters(cells, form=form, terms=terms, window=window, samples=samples, seed=seed)
    warnings = [*table.warnings, *warnings, *fit.warnings]
    if counting == "unstated":
        warnings.append(UNSTATED)
    found = {law.name: regrets(law, cells, window) for law in (fit.law, STEP_LAW, DEEPSEEK_LAW)}
    # The law without the largest cells, at those.
    held: list[Regret] = []
    try:
        held = leave_out(cells, largest(cells), form=form, terms=terms, window=window)
    except InputError as error:
        warnings.append(f"The largest cells cannot be left out: {error}".splitlines()[0])
    minima, minima_draws = _minima(fit, window, seed, warnings)
    intervals = fit.intervals(level)
    law = {
        "law": "hyperparameters",
        "version": 1,
        "compute": COMPUTE,
        "form": form,
        "terms": terms,
        "parameters": law_parameters(fit.law.matrix),
        "intervals": _parameter_intervals(intervals) if len(fit.draws) else {},
        "level": level,
        "draws": fit.draws.round(6).tolist(),
        "loss": minima,
        "loss_draws": minima_draws,
        "counting": counting,
        "range": {
            "params": _ends([cell.params for cell in cells]),
            "tokens": _ends([cell.tokens for cell in cells]),
            "flops": _ends([compute(cell.params, cell.tokens) for cell in cells]),
        },
        "cells": len(cells),
        "regret": {name: summary(some) for name, some in found.items()}
        | ({"largest cells left out": summary(held)} if held else {}),
        "forms": judged,
        "data": dict(table.source),
        "warnings": warnings,
    }
    return Fitted(law, fit, cells, found, held)


def _ends(values: Sequence[float]) -> list[float]:
    return [float(min(values)), float(max(values))]


def _parameter_intervals(intervals: Array) -> dict[str, Any]:
    """Ends of intervals by the names of `law_parameters`."""
    low, high = law_parameters(intervals[..., 0]), law_parameters(intervals[..., 1])
    return {name: {key: [low[name][key], high[name][key]] for key in low[name]} for name in low}


def _minima(
    fit: HyperparametersFit, window: float, seed: int, warnings: list[str]
) -> tuple[dict[str, float] | None, list[list[float]]]:
    """The loss law of the cells' minima, and its parameters in bootstrap samples; None where the cells are too few."""
    lowest = [valley.cell.best if valley.problem else valley.minimum for valley in fit.valleys]
    columns = {
        "params": np.array([valley.cell.params for valley in fit.valleys]),
        "tokens": np.array([valley.cell.tokens for valley in fit.valleys]),
        "loss": np.exp(lowest),
    }
    table = RunTable(columns, np.arange(len(lowest)) + 1, {})
    try:
        loss_law.check_runs(table)
        found = loss_law.fit_vpnls(table)
    except InputError as error:
        warnings.append(f"The law predicts no loss: {error}")
        return None, []
    generator = np.random.default_rng(seed)
    draws = [
        loss_law.fit_vpnls(table, generator.exponential(size=len(lowest))).values().tolist()
        for _ in range(_LOSS_SAMPLES if len(fit.draws) else 0)
    ]
    return dict(zip(loss_law.PARAMETERS, found.values().tolist(), strict=True)), draws


def fit_text(fitted: Fitted) -> str:
    """The fit as a user reads it: the two laws, regret of it and of published laws, warnings."""
    law = fitted.law
    lines = [f"form {law['form']}, {law['cells']} cells of size and tokens"]
    for name in ("learning_rate", "batch_tokens"):
        one, ends = law["parameters"][name], law["intervals"].get(name)
        lines.append(f"{name} = {one['coefficient']:.4g} N^{one['params']:.3f} D^{one['tokens']:.3f}")
        if ends:
            spans = ", ".join(f"{key} {ends[key][0]:.3g} to {ends[key][1]:.3g}" for key in ends)
            lines.append(f"  {100 * law['level']:.0f}% intervals: {spans}")
    lines += ["", f"{'regret, % of the loss':32}{'median':>9}{'greatest':>9}{'cells':>7}{'outside the grid':>18}"]
    for name, one in law["regret"].items():
        lines.append(
            f"{name:32}{100 * one['median']:9.3f}{100 * one['max']:9.3f}{one['cells']:7d}{one['outside_grid']:18d}"
        )
    lines += [f"warning: {one}" for one in law["warnings"]]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Learning rate and batch size for a model, with intervals.

    Attributes:
      params: model size N.
      tokens: training tokens D.
      learning_rate: peak learning rate.
      learning_rate_interval: its interval; None without a bootstrap.
      batch_tokens: batch size in tokens.
      batch_interval: its interval.
      loss: expected final loss; None where the cells were too few for a law of it.
      loss_interval: its interval.
      level: of the intervals.
      warnings: quantities outside the range of the fit.
      counting: how `params` counts parameters.
    """

    params: float
    tokens: float
    learning_rate: float
    learning_rate_interval: tuple[float, float] | None
    batch_tokens: float
    batch_interval: tuple[float, float] | None
    loss: float | None
    loss_interval: tuple[float, float] | None
    level: float
    warnings: list[str]
    counting: str


def predict(law: Mapping[str, Any], params: float, tokens: float) -> Prediction:
    """What a law.json of this kind says for a model size and a number of tokens.

    Raises:
      InputError: sizes that are not positive, or a file of another kind.
    """
    if not (np.isfinite(params) and np.isfinite(tokens) and params > 0 and tokens > 0):
        raise InputError(f"Expected a positive model size and number of tokens, got {params:g} and {tokens:g}.")
    pair = read_pair(law)
    check_compute(law)
    try:
        level, ranges = (
            float(law["level"]),
            {name: tuple(map(float, law["range"][name])) for name in ("params", "tokens", "flops")},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"The law is not whole: {error!r} in its level or range. Fit it again.") from None
    rate, batch = pair.predict(params, tokens)
    x = np.array([1.0, np.log(params), np.log(tokens)])
    draws = np.array(law.get("draws") or np.zeros((0, 2, 3)), np.float64).reshape(-1, 2, 3) @ x
    warnings = []
    for name, value in (("params", params), ("tokens", tokens), ("flops", compute(params, tokens))):
        low, high = ranges[name]
        if not low * 0.98 <= value <= high * 1.02:
            factor = value / high if value > high else low / value
            warnings.append(f"{name} {value:.4g} is a factor {factor:.3g} outside the fit's {low:.4g} to {high:.4g}.")
    loss, losses = None, np.zeros(0)
    if law.get("loss"):
        loss = float(loss_law.LossLaw(**law["loss"]).loss(params, tokens))
        losses = np.array([float(loss_law.LossLaw(*one).loss(params, tokens)) for one in law.get("loss_draws") or []])
    with np.errstate(over="ignore"):  # Draws of a law that is hardly determined are far off.
        rates, batches = np.exp(draws).T
    return Prediction(
        params,
        tokens,
        rate,
        _percentiles(rates, level),
        batch,
        _percentiles(batches, level),
        loss,
        _percentiles(losses, level),
        level,
        warnings,
        str(law.get("counting", "unstated")),
    )


def read_pair(law: Mapping[str, Any]) -> PairLaw:
    """The two power laws of a law.json. Raises InputError for a file of another kind."""
    try:
        rows = [law["parameters"][name] for name in ("learning_rate", "batch_tokens")]
        matrix = np.array([[np.log(row["coefficient"]), row["params"], row["tokens"]] for row in rows], np.float64)
    except (KeyError, TypeError):
        raise InputError(
            "Expected a law of learning rate and batch size, which `scaling fit --law hyperparameters` writes, "
            f"got a law of kind {law.get('law')!r}."
        ) from None
    return PairLaw(matrix)


def _percentiles(values: Array, level: float) -> tuple[float, float] | None:
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def predict_text(one: Prediction) -> str:
    """A prediction as a user reads it."""

    def line(name: str, value: float, ends: tuple[float, float] | None) -> str:
        return f"{name:14}{value:.4g}" + (f"   {100 * one.level:.0f}%: {ends[0]:.4g} to {ends[1]:.4g}" if ends else "")

    lines = [
        f"params {one.params:.4g} (counted: {one.counting}), tokens {one.tokens:.4g}",
        line("learning rate", one.learning_rate, one.learning_rate_interval),
        line("batch tokens", one.batch_tokens, one.batch_interval),
    ]
    if one.loss is not None:
        lines.append(line("loss", one.loss, one.loss_interval))
    return "\n".join(lines + [f"warning: {text}" for text in one.warnings])
