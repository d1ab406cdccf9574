"""The picture of a run."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_INK, _GREY, _BLUE, _ORANGE = "#222222", "#8a8a8a", "#3b6fb6", "#d1662b"


def plot_run(records: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Draws the training loss, and held-out bits per byte where there are any, into a PNG.

    Args:
      records: lines of a metrics log: `step` with `loss`, or with `held_out_bits_per_byte`.
      path: of the file.
      title: above both panels.
    """
    losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["held_out_bits_per_byte"]) for r in records if "held_out_bits_per_byte" in r]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2 if held_out else 1, squeeze=False)[0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK, weight="bold")
    steps, values = zip(*losses, strict=True)
    _style(axes[0], "training loss (nats per token)")
    axes[0].plot(steps, values, color=_BLUE, alpha=0.25, linewidth=0.8)
    axes[0].plot(steps, _smooth(values), color=_BLUE, linewidth=1.8)
    if held_out:
        steps, values = zip(*held_out, strict=True)
        _style(axes[1], "held-out text (bits per byte)")
        axes[1].plot(steps, values, color=_ORANGE, linewidth=1.8, marker="o", markersize=4.5)
        for step, value in held_out:
            axes[1].annotate(
                f"{value:.2f}",
                (step, value),
                xytext=(4, 6),  # Above and right: a falling curve leaves that side free.
                textcoords="offset points",
                color=_INK,
                fontsize=9,
            )
        axes[1].set_ylim(0, 1.15 * max(values))
        axes[1].margins(x=0.1)
    temporary = path.with_name(path.name + ".tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("step", fontsize=9, color=_GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cccccc")
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about a fortieth of the run, narrower towards both ends."""
    half = max(len(values) // 80, 1)
    result = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        result.append(sum(window) / len(window))
    return result
