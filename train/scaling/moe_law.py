"""`scaling fit` and `scaling predict` of MoE laws: from a table to law.json and back, and a picture."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qwen_jax.errors import InputError
from train.scaling.moe import FORMS, MoeForm, MoeLaw, MoeRuns, fit_moe, moe_runs
from train.scaling.moe_equivalent import (
    Equivalent,
    counts_experts,
    dense_equivalent,
    equal_to_dense,
    equivalent_interval,
)
from train.scaling.runs import COMPUTE, UNSTATED, RunTable, check_compute

COLUMNS = ("active_params", "total_params", "tokens", "loss")
OPTIONAL = ("experts", "granularity")
# Share of intervals where nothing is said.
LEVEL = 0.9


def table_runs(table: RunTable) -> MoeRuns:
    """The runs of a table with `COLUMNS` and perhaps `OPTIONAL`.

    Experts and granularity of a dense run may be missing; a dense run has 1 of each.

    Raises:
      InputError: an MoE run without a value in a column that the table has.
    """
    dense = table["total_params"] <= table["active_params"] * 1.001
    extra: dict[str, np.ndarray | None] = {}
    for name in OPTIONAL:
        extra[name] = None
        if name in table:
            values = np.where(dense & ~(table[name] > 0), 1.0, table[name])
            bad = ~(np.isfinite(values) & (values > 0))
            if bad.any():
                raise InputError(f"Row {table.rows[bad][0]} is an MoE and has no {name}. Fill in the column.")
            extra[name] = values
    active, total, tokens, loss = (table[name] for name in COLUMNS)
    return moe_runs(active, total, tokens, loss, extra["experts"], extra["granularity"])


def fit_table(
    table: RunTable,
    form: MoeForm = "leverage",
    *,
    samples: int = 100,
    seed: int = 0,
    level: float = LEVEL,
    counting: str = "unstated",
) -> tuple[dict[str, Any], MoeLaw, MoeRuns]:
    """Fits an MoE law to a table of runs.

    Args:
      table: see `table_runs`; the forms `bilinear` and `saturated` need experts.
      form: see `train.scaling.moe`.
      samples: of the bootstrap.
      seed: of the search and the bootstrap.
      level: of the intervals, between 0 and 1.
      counting: how the table counts parameters, as law.json says it.

    Returns:
      The content of law.json, the law, and the runs it was fitted to.

    Raises:
      InputError: the runs do not determine the form; see `fit_moe`; an argument is outside its range.
    """
    if not 0 < level < 1 or samples < 0:
        raise InputError(f"Expected a level between 0 and 1 and samples of at least 0, got {level} and {samples}.")
    if form in ("bilinear", "saturated") and "experts" not in table:
        raise InputError(f"The form {form} needs a column of experts. Map it, such as --columns experts=num_experts.")
    if form == "granularity" and "granularity" not in table:
        raise InputError("The form granularity needs a column of granularity. Map it, such as --columns granularity=G.")
    runs = table_runs(table)
    law = fit_moe(runs, form, samples=samples, seed=seed)
    unstated = [UNSTATED] if counting == "unstated" else []
    law = dataclasses.replace(law, warnings=[*table.warnings, *law.warnings, *unstated])
    content = {
        "law": "moe",
        "version": 1,
        "compute": COMPUTE,
        "form": form,
        "parameters": law.parameters,
        "intervals": {name: list(ends) for name, ends in law.intervals(level).items()},
        "level": level,
        "draws": law.draws,
        "error": law.error,
        "counting": counting,
        "range": {name: list(ends) for name, ends in law.ranges.items()},
        "data": dict(table.source),
        "warnings": law.warnings,
    }
    return content, law, runs


def read_law(content: Mapping[str, Any]) -> MoeLaw:
    """The law of a law.json. Raises InputError for a file of another kind."""
    try:
        if content["law"] != "moe" or content["form"] not in FORMS:
            raise KeyError
        check_compute(content, "The MoE law")
        return MoeLaw(
            content["form"],
            {name: float(value) for name, value in content["parameters"].items()},
            [{name: float(value) for name, value in one.items()} for one in content["draws"]],
            float(content["error"]),
            {name: (float(low), float(high)) for name, (low, high) in content["range"].items()},
            list(content["warnings"]),
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            "Expected an MoE law, as `scaling fit --law moe` writes it, got a law of kind "
            f"{content.get('law')!r}, form {content.get('form')!r}."
        ) from None


def fit_text(law: MoeLaw, runs: MoeRuns, level: float = LEVEL) -> str:
    """The fit as a user reads it: parameters, error, efficiency leverage of the largest runs, warnings."""
    ends = law.intervals(level)
    lines = [f"form {law.form}, {len(runs)} runs, {int(runs.dense.sum())} of them dense, error {100 * law.error:.2f}%"]
    for name, value in law.parameters.items():
        span = f"   {100 * level:.0f}%: {ends[name][0]:.4g} to {ends[name][1]:.4g}" if name in ends else ""
        lines.append(f"{name:12}{value:<12.5g}{span}")
    return "\n".join(lines + [f"warning: {one}" for one in law.warnings])


def predict(
    content: Mapping[str, Any],
    active: float,
    tokens: float,
    *,
    total: float | None = None,
    experts: float | None = None,
    granularity: float | None = None,
) -> dict[str, Any]:
    """Loss, dense equivalent and efficiency leverage of an MoE, with an interval of the dense equivalent."""
    law = read_law(content)
    one = dense_equivalent(law, active, tokens, total=total, experts=experts, granularity=granularity)
    return _row(law, one, granularity, float(content["level"]))


def equivalents(
    content: Mapping[str, Any],
    dense: float,
    tokens: float,
    ratios: Sequence[float] = (2, 4, 8, 16, 32),
    granularity: float | None = None,
) -> list[dict[str, Any]]:
    """The MoE models that equal a dense one, a row for each ratio of total to active parameters (or experts).

    Raises:
      InputError: no ratio has an equivalent.
    """
    law = read_law(content)
    found = [
        _row(law, one, granularity, float(content["level"]))
        for one in equal_to_dense(law, dense, tokens, ratios, granularity)
    ]
    if not found:
        raise InputError(
            f"By this law no MoE of the ratios {', '.join(f'{one:g}' for one in ratios)} equals a dense model of "
            f"{dense:.4g} parameters after {tokens:.4g} tokens. It is too far outside the range of the fit."
        )
    return found


def _row(law: MoeLaw, one: Equivalent, granularity: float | None, level: float) -> dict[str, Any]:
    low, high = equivalent_interval(law, one, granularity, level)
    by_experts = counts_experts(law)
    return {
        "active_params": one.active,
        "total_params": None if by_experts else one.total,
        "experts": one.experts if by_experts else None,
        "tokens": one.tokens,
        "loss": one.loss,
        "dense_params": one.dense,
        "dense_interval": [low, high] if np.isfinite([low, high]).all() else None,
        "level": level,
        "leverage": one.leverage,
        "warnings": one.warnings,
    }


def predict_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Equivalents as a table, and their warnings, once for each quantity."""
    experts = rows[0]["experts"] is not None
    interval = f"{100 * rows[0]['level']:.0f}% interval"
    lines = [f"{'active':>10}{'experts' if experts else 'total':>10}{'loss':>9}{'dense':>10}{interval:>24}{'EL':>7}"]
    for row in rows:
        second = f"{row['experts']:.0f}" if experts else _size(row["total_params"])
        ends = row["dense_interval"]
        span = f"{_size(ends[0])} to {_size(ends[1])}" if ends else "-"
        lines.append(
            f"{_size(row['active_params']):>10}{second:>10}{row['loss']:9.4f}{_size(row['dense_params']):>10}"
            f"{span:>24}{row['leverage']:7.2f}"
        )
    # The first warning of each quantity, which is its first word, and the number of models it holds for.
    warnings: dict[str, list[str]] = {}
    for row in rows:
        for text in row["warnings"]:
            warnings.setdefault(text.split()[0], []).append(text)
    for texts in warnings.values():
        more = f", and so in {len(texts) - 1} more rows" if len(texts) > 1 else ""
        lines.append(f"warning: {texts[0]}{more}")
    return "\n".join(lines)


def _size(value: float) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def picture(law: MoeLaw, runs: MoeRuns) -> bytes:
    """Draws predicted against measured loss, and efficiency leverage of the MoE runs against their sparsity.

    Returns:
      A PNG file.
    """
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    said = law.loss(runs)
    for mask, name, colour in ((runs.dense, "dense", "#8a8a8a"), (~runs.dense, "MoE", "#d1662b")):
        left.plot(
            runs.loss[mask], 100 * np.log(said[mask] / runs.loss[mask]), "o", color=colour, markersize=3, label=name
        )
    left.axhline(0, color="#222222", linewidth=0.8)
    left.set_xlabel("loss")
    left.set_ylabel("predicted above measured, %")
    left.legend(frameon=False, fontsize=8)
    by_experts = counts_experts(law)
    x, y = [], []
    for place in np.flatnonzero(~runs.dense):
        try:
            one = dense_equivalent(
                law,
                float(runs.active[place]),
                float(runs.tokens[place]),
                total=None if by_experts else float(runs.total[place]),
                experts=float(runs.experts[place]) if by_experts else None,
                granularity=float(runs.granularity[place]),
            )
        except InputError:
            continue
        x.append(float(runs.experts[place]) if by_experts else one.total / one.active)
        y.append(one.leverage)
    right.plot(x, y, "o", color="#3b6ea8", markersize=3)
    # Runs of which no dense model has the loss have no point; axes without points have no logarithms.
    if x:
        right.set_xscale("log")
        right.set_yscale("log")
    right.set_xlabel("experts" if by_experts else "total / active parameters")
    right.set_ylabel("efficiency leverage, dense equivalent / active")
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()
