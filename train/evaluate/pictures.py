"""Pictures of evaluations: scores over length and depth, and loss over position."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from train.files import write_file

_INK, _GREY = "#222222", "#8a8a8a"
_COLOURS = ("#3b6fb6", "#d1662b", "#3f8f5b", "#8456a8", "#b8902a", "#c2497f", "#4a9aa8", "#7a5c43")


def plot_scores(summary: Mapping[str, Any], path: Path, title: str) -> None:
    """Draws a heat map: for each task with depths its scores over length and depth, and all others over length.

    Args:
      summary: of `train.evaluate.runner.summarise`.
      path: of the PNG file.
      title: above it.
    """
    grids = _grids(summary["cells"])
    rows = max(len(grid) for _, _, grid in grids)
    columns = max(len(lengths) for _, lengths, _ in grids)
    size = len(grids) * max(3.0, 1.6 + 0.7 * columns) + 1.0, max(2.4, 1.6 + 0.42 * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK, weight="bold")
    for axes, (name, lengths, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids, strict=True):
        values = np.array(list(grid.values()), float)
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_title(name, loc="left", fontsize=10, color=_INK)
        axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        axes.set_yticks(range(len(grid)), list(grid))
        axes.set_xlabel("length (tokens)", fontsize=9, color=_GREY)
        axes.tick_params(colors=_GREY, labelsize=8, length=0)
        axes.spines[:].set_visible(False)
        for (y, x), value in np.ndenumerate(values):
            text = "-" if math.isnan(value) else f"{value:.2f}"
            # Low scores are dark.
            axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if value < 0.6 else _INK)
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.9, aspect=30)
    bar.ax.tick_params(colors=_GREY, labelsize=8)
    _write(figure, path)


def _grids(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int], dict[str, list[float]]]]:
    """Panels: a name, lengths, and for each row its name and a score for each length."""

    def grid(chosen: Sequence[Mapping[str, Any]], row: str) -> tuple[list[int], dict[str, list[float]]]:
        lengths = sorted({cell["length"] for cell in chosen})
        known = {(cell[row], cell["length"]): cell["score"] for cell in chosen}
        names = dict.fromkeys(cell[row] for cell in chosen)
        form = (lambda depth: f"{depth:g}%") if row == "depth" else str
        # JSON has null for a score that no sample has.
        none = math.nan
        return lengths, {
            form(name): [none if (x := known.get((name, n))) is None else x for n in lengths] for name in names
        }

    deep = [cell for cell in cells if cell["depth"] is not None]
    panels = [
        (f"{task}: depth", *grid([cell for cell in deep if cell["task"] == task], "depth"))
        for task in dict.fromkeys(cell["task"] for cell in deep)
    ]
    flat = [cell for cell in cells if cell["depth"] is None]
    return panels + ([("without a depth", *grid(flat, "task"))] if flat else [])


def plot_losses(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, title: str) -> None:
    """Draws the loss over the position.

    Args:
      curves: by name: buckets of `train.evaluate.perplexity.summarise`.
      path: of the PNG file.
      title: above it.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK, weight="bold")
    axes: Axes = figure.subplots()
    for i, (name, buckets) in enumerate(curves.items()):
        # A bucket stands at its geometric middle.
        x = [math.sqrt(bucket["from"] * bucket["to"]) for bucket in buckets]
        y = [bucket["loss"] for bucket in buckets]
        axes.plot(x, y, color=_COLOURS[i % len(_COLOURS)], linewidth=1.6, marker="o", markersize=3.5, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(round(value))))
    axes.set_xlabel("position (tokens before)", fontsize=9, color=_GREY)
    axes.set_title("loss (nats per token)", loc="left", fontsize=10, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.grid(color="#eeeeee")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)
    _write(figure, path)


def _short(length: int) -> str:
    """A length for an axis: "512", "32K" for 32,768, "1,000,000"."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"


def _write(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_file(path, content.getvalue())
