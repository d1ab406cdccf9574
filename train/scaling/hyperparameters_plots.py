"""Pictures of the law of learning rate and batch size: valleys by cell, the law against cells, regret."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from train.scaling.hyperparameters import PairLaw, Valley
from train.scaling.hyperparameters_law import Fitted

_INK, _GREY, _LAW, _OTHER = "#222222", "#8a8a8a", "#d1662b", "#3b6ea8"
# Files that `pictures` makes.
NAMES = ("valleys.png", "law.png", "regret.png")
# Valleys on one picture; more would be too small to read.
_MOST = 20


def pictures(fitted: Fitted) -> dict[str, bytes]:
    """The pictures of a fit, PNG files by name."""
    return {
        "valleys.png": valleys_png(fitted.fit.valleys, fitted.fit.law),
        "law.png": law_png(fitted.fit.valleys, fitted.fit.law),
        "regret.png": regret_png(fitted),
    }


def valleys_png(valleys: list[Valley], law: PairLaw) -> bytes:
    """Draws runs of each cell, coloured by loss above the best, contours of its quadratic, and the law's choice.

    Of more than 20 cells, 20 evenly spaced in compute are drawn.
    """
    places = np.unique(np.linspace(0, len(valleys) - 1, min(len(valleys), _MOST)).round().astype(int))
    columns = min(len(places), 5)
    rows = -(-len(places) // columns)
    # Margins by hand: a constrained layout of many logarithmic axes takes seconds.
    figure = Figure(figsize=(2.6 * columns + 0.8, 2.4 * rows + 0.6), dpi=110)
    figure.subplots_adjust(0.07, 0.5 / (2.4 * rows), 0.98, 1 - 0.65 / (2.4 * rows), wspace=0.3, hspace=0.35)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel()[len(places) :]:
        axis.set_axis_off()
    for axis, place in zip(axes.ravel(), places, strict=False):
        _valley(axis, valleys[place], law)
    axes[-1, 0].set_xlabel("learning rate", fontsize=8)
    axes[-1, 0].set_ylabel("batch size, tokens", fontsize=8)
    figure.suptitle(
        "loss above the best: contours 0.1, 0.25, 0.5, 1%; + optimum of the cell, x choice of the law", fontsize=9
    )
    return _png(figure)


def _valley(axis: Axes, valley: Valley, law: PairLaw) -> None:
    points, excess = valley.cell.points, 100 * np.expm1(valley.cell.log_loss - valley.cell.best)
    axis.scatter(
        np.exp(points[:, 0]), np.exp(points[:, 1]), c=np.minimum(excess, 2.0), cmap="viridis_r", s=9, vmin=0, vmax=2
    )
    _logarithmic(axis)
    if np.isfinite(valley.curvature).all() and np.linalg.eigvalsh(valley.curvature)[0] > 0:
        low, high = points.min(0) - 0.3, points.max(0) + 0.3
        x, y = np.meshgrid(np.linspace(low[0], high[0], 60), np.linspace(low[1], high[1], 60))
        step = np.stack([x, y], -1) - valley.best
        height = 50 * np.einsum("...i,ij,...j", step, valley.curvature, step)
        axis.contour(np.exp(x), np.exp(y), height, levels=[0.1, 0.25, 0.5, 1.0], colors=_GREY, linewidths=0.7)
        if not valley.problem:
            axis.plot(*np.exp(valley.best), "+", color=_INK, markersize=8)
    axis.plot(*np.exp(law.point(valley.cell.params, valley.cell.tokens)), "x", color=_LAW, markersize=7)
    axis.set_title(valley.cell.name, fontsize=7, color=_GREY if valley.problem else _INK)
    axis.tick_params(labelsize=6)


def law_png(valleys: list[Valley], law: PairLaw) -> bytes:
    """Draws the optimum of each cell against the law, for learning rate and batch size."""
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    for place, (axis, name) in enumerate(
        zip(figure.subplots(1, 2), ("learning rate", "batch size, tokens"), strict=True)
    ):
        good = [valley for valley in valleys if not valley.problem]
        said = np.array([law.point(one.cell.params, one.cell.tokens)[place] for one in valleys])
        ends = np.exp([said.min() - 0.3, said.max() + 0.3])
        axis.plot(ends, ends, color=_GREY, linewidth=1)
        for one in good:
            # How far one can go along this axis, the other at its best, for 0.1% of the loss.
            reach = np.sqrt(2 * 0.001 * np.linalg.inv(one.curvature)[place, place])
            middle = np.exp(law.point(one.cell.params, one.cell.tokens)[place])
            axis.plot([middle] * 2, np.exp(one.best[place] + np.array([-reach, reach])), color=_OTHER, alpha=0.4)
            axis.plot(middle, np.exp(one.best[place]), "o", color=_OTHER, markersize=4)
        _logarithmic(axis)
        axis.set_xlabel(f"{name}, by the law", fontsize=9)
        axis.set_ylabel("optimum of the cell; bars cost 0.1% of the loss", fontsize=8)
    return _png(figure)


def regret_png(fitted: Fitted) -> bytes:
    """Draws the regret of the fitted law and of published laws at each cell, smallest compute first."""
    figure = Figure(figsize=(max(5.0, 1.5 + 0.45 * len(fitted.cells)), 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for place, (name, found) in enumerate(fitted.found.items()):
        colour = (_LAW, _OTHER, _GREY)[place % 3]
        values = 100 * np.maximum([one.value for one in found], 1e-6)
        axis.plot(range(len(found)), values, "o-", color=colour, markersize=4, linewidth=0.8, label=name)
    if fitted.held:
        order = {id(cell): place for place, cell in enumerate(fitted.cells)}
        held = [(order[id(one.cell)], 100 * max(one.value, 1e-6)) for one in fitted.held]
        axis.plot(*zip(*held, strict=True), "s", color=_INK, fillstyle="none", label="largest cells left out")
    axis.set_yscale("log")
    axis.set_ylabel("regret, % of the loss", fontsize=9)
    names = [cell.name.replace(", ", "\n") for cell in fitted.cells]
    axis.set_xticks(range(len(names)), names, fontsize=6, rotation=60)
    axis.legend(frameon=False, fontsize=8, labelcolor=_INK)
    return _png(figure)


def _logarithmic(axis: Axes) -> None:
    """Logarithmic scales with labels at 1, 2 and 5 only."""
    for one, scale in ((axis.xaxis, axis.set_xscale), (axis.yaxis, axis.set_yscale)):
        scale("log")
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")))
        one.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=7)


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()
