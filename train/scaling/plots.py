"""Pictures of a loss law: the runs of each budget with the law and their parabola, and residuals."""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qwen_jax.errors import InputError
from train.files import write_file
from train.scaling.loss import LossLaw, budgets, fit_approach2, log_residuals
from train.scaling.runs import FLOPS_PER_PARAM, RunTable

_INK, _GREY = "#222222", "#8a8a8a"
_MAP = "viridis"


def plot_fit(law: LossLaw, table: RunTable, path: Path) -> None:
    """Draws the loss over size, a colour for each budget: runs, the law, and parabolas where approach 2 has them.

    Args:
      law: fitted to the runs.
      table: the runs.
      path: of the PNG file.
    """
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes: Axes = figure.subplots()
    groups = budgets(table["flops"])
    parabolas = {}
    # Approach 2 refuses tables without minima; then only the law is drawn.
    if len(groups) > 1:
        try:
            parabolas = {one.rows[0]: one.coefficients for one in fit_approach2(table).budgets if not one.problem}
        except InputError:
            parabolas = {}
    for colour, rows in zip(_colours(len(groups)), groups, strict=True):
        flops, params = float(np.exp(np.log(table["flops"][rows]).mean())), table["params"][rows]
        label = f"{flops:.1e}"
        axes.plot(params, table["loss"][rows], "o", color=colour, markersize=3.5, label=label)
        if len(rows) > 1:
            x = np.geomspace(params.min(), params.max(), 80)
            axes.plot(x, law.loss(x, flops / (FLOPS_PER_PARAM * x)), color=colour, linewidth=1.2)
            if rows[0] in parabolas:
                axes.plot(x, np.polyval(parabolas[rows[0]], np.log(x)), color=colour, linewidth=0.8, linestyle=":")
    # The path of the optimum.
    span = np.geomspace(table["flops"].min(), table["flops"].max(), 40)
    if law.size_exponent is not None:
        best = np.array([law.optimum(value) for value in span])
        axes.plot(best[:, 0], law.loss(best[:, 0], best[:, 1]), color=_INK, linewidth=1.0, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("params", fontsize=9, color=_GREY)
    _finish(axes, "loss (nats per token): runs, law (lines), parabolas (dots), optimum (dashes)")
    if len(groups) <= 16:
        axes.legend(frameon=False, fontsize=7, title="FLOPs", title_fontsize=7)
    _write(figure, path)


def plot_residuals(law: LossLaw, table: RunTable, path: Path) -> None:
    """Draws the loss of each run relative to the law, over compute, size and tokens per parameter.

    Args:
      law: fitted to the runs.
      table: the runs.
      path: of the PNG file.
    """
    residual = 100 * np.expm1(log_residuals(law, table))
    figure = Figure(figsize=(11, 3.6), dpi=150, layout="constrained")
    panels = {"FLOPs": table["flops"], "params": table["params"], "tokens per param": table["tokens"] / table["params"]}
    for axes, (name, values) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        axes.scatter(values, residual, s=9, c=np.log(table["flops"]), cmap=_MAP)
        axes.axhline(0, color=_INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel(name, fontsize=9, color=_GREY)
        _finish(axes, "loss above the law (%)" if name == "FLOPs" else "")
    _write(figure, path)


def _colours(count: int) -> list[tuple[float, ...]]:
    import matplotlib

    colours = matplotlib.colormaps[_MAP](np.linspace(0, 0.9, count))
    return [tuple(colour) for colour in colours]


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=8)
    axes.grid(color="#eeeeee")


def _write(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_file(path, content.getvalue())
