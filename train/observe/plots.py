"""Plots of a run: losses, learning rate and speed in `loss.png`, loads of experts in `experts.png`.

`python -m train.observe.plots FOLDER` plots a run of `qwen-jax train pretrain`, finished or not.
"""

import argparse
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qwen_jax.errors import InputError
from train.files import read_records, write_file
from train.moe import EXPERTS, read_loads
from train.observe.metrics import read_log

_INK, _GREY, _BLUE, _ORANGE = "#222222", "#8a8a8a", "#3b6fb6", "#d1662b"
# Colours of held-out data sets; training is blue.
_COLOURS = (_ORANGE, "#3f8f5b", "#8456a8", "#b8902a", "#c2497f", "#4a9aa8", "#7a5c43", "#5b6b7a")
# More points in a curve cannot be told apart.
_POINTS = 4000


def plot_run(records: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Plots the training loss and, if there are any, held-out bits per byte.

    Args:
      records: of the log: `step` with `loss`, or with `held_out_bits_per_byte`.
      path: of the PNG file.
      title: above both panels.
    """
    held_out = [(r["step"], r["held_out_bits_per_byte"]) for r in records if "held_out_bits_per_byte" in r]
    figure = _figure(title, 4.2)
    axes = figure.subplots(1, 2 if held_out else 1, squeeze=False)[0]
    _style(axes[0], "training loss (nats per token)")
    _curve(axes[0], *_series(records, "loss"))
    if held_out:
        steps, values = zip(*held_out, strict=True)
        _style(axes[1], "held-out text (bits per byte)")
        axes[1].plot(steps, values, color=_ORANGE, linewidth=1.8, marker="o", markersize=4.5)
        for step, value in held_out:
            axes[1].annotate(
                f"{value:.2f}",
                (step, value),
                xytext=(4, 6),  # Above and right, which a falling curve leaves free.
                textcoords="offset points",
                color=_INK,
                fontsize=9,
            )
        axes[1].set_ylim(0, 1.15 * max(values))
        axes[1].margins(x=0.1)
    _write(figure, path)


def plot_stages(
    records: Sequence[dict[str, float]],
    stages: Mapping[int, str],
    path: Path,
    title: str,
    unit: str = "nats a token",
    curve: str = "loss",
) -> None:
    """Plots a run of several stages: losses or rewards, benchmarks if there are any, learning rate and speed.

    Args:
      records: of the log.
      stages: name of each stage, by the number of its last step.
      path: of the PNG file.
      title: above the panels.
      unit: of the losses.
      curve: the metric on top, "loss" or "reward/mean".

    Raises:
      InputError: the log has no step with a finite loss.
    """
    steps, _ = _series(records, "loss")
    if not len(steps):
        raise InputError("There is nothing to plot: the log has no step with a finite loss yet.")
    tasks = sorted({n for r in records for n in r if n.startswith("task/") and not n.endswith("/items")})
    figure = _figure(title, 10.0 if tasks else 7.2)
    grid = figure.add_gridspec(3 if tasks else 2, 2, height_ratios=(1.7, 1.3, 1) if tasks else (1.7, 1))
    loss, rate, speed = (figure.add_subplot(cell) for cell in (grid[0, :], grid[-1, 0], grid[-1, 1]))
    # Losses, over the whole width.
    _style(loss, f"{curve} ({unit})" if curve == "loss" else curve.replace("/", ", "))
    _curve(loss, *_series(records, curve), "training")
    names = sorted({name for r in records for name in r if name.startswith("held_out_") and name.endswith(f"_{curve}")})
    # With one data set, the mean over all data sets is the same curve.
    names = [name for name in names if name != f"held_out_{curve}"] or [f"held_out_{curve}"]
    for name, colour in zip(names, itertools.cycle(_COLOURS), strict=False):
        where, values = _series(records, name)
        label = name.removeprefix("held_out_").removesuffix(curve).removesuffix("_")
        if len(where):
            loss.plot(where, values, color=colour, linewidth=1.5, marker="o", markersize=3.5, label=f"held-out {label}")
    loss.legend(frameon=False, fontsize=9, labelcolor=_INK)
    # Benchmarks, on the same axis of steps.
    if tasks:
        scores = figure.add_subplot(grid[1, :], sharex=loss)
        _style(scores, "benchmarks")
        for name, colour in zip(tasks, itertools.cycle(_COLOURS), strict=False):
            label = name.removeprefix("task/")
            scores.plot(*_series(records, name), color=colour, linewidth=1.5, marker="o", markersize=3.5, label=label)
        scores.legend(frameon=False, fontsize=9, labelcolor=_INK)
    # Learning rate and speed, below.
    _style(rate, "learning rate")
    rate.plot(*_thinned(*_series(records, "learning_rate")), color=_BLUE, linewidth=1.8)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    _style(speed, "tokens per second, without compilation")
    _curve(speed, *_series(records, "tokens_per_second"))
    speed.set_ylim(bottom=0)
    # Stages begin at dashed lines.
    first = 0
    for number, (end, name) in enumerate(stages.items()):
        shown = first < steps[-1]
        if number and shown:
            for axes in (loss, rate, speed):
                axes.axvline(first, color=_GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        if len(stages) > 1 and shown:
            # Above the curves, where the stage begins.
            place = loss.get_xaxis_transform()
            loss.text(first, 1.0, f" {name}", transform=place, va="bottom", fontsize=8.5, color=_GREY)
        first = end
    if len(stages) > 1:
        loss.set_title(loss.get_title(loc="left"), loc="left", fontsize=10, color=_INK, pad=18)
    _write(figure, path)


def plot_experts(steps: np.ndarray, loads_nLE: np.ndarray, layers: Sequence[int], path: Path, title: str) -> None:
    """Plots the loads of experts: at the last step in every layer, and in the middle layer over the run.

    Args:
      steps: [n], numbers of steps.
      loads_nLE: [n, sparse layers, experts], load of each expert at these steps over the mean.
      layers: indices of the layers that have experts.
      path: of the PNG file.
      title: above the panels.
    """
    middle = len(layers) // 2
    # Sort experts by their last load: a stripe that persists is an expert that stays busy.
    order = np.argsort(loads_nLE[-1, middle])
    figure = _figure(title, 4.8)
    panels = (
        (loads_nLE[-1], f"load over the mean, step {int(steps[-1]):,}", "expert", "layer"),
        (loads_nLE[:, middle][:, order].T, f"layer {layers[middle]} over the run", "step", "expert, by last load"),
    )
    for axes, (values, name, x, y) in zip(figure.subplots(1, 2), panels, strict=True):
        image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        axes.set_title(name, loc="left", fontsize=10, color=_INK)
        axes.set_xlabel(x, fontsize=9, color=_GREY)
        axes.set_ylabel(y, fontsize=9, color=_GREY)
        axes.tick_params(colors=_GREY, labelsize=9)
        for where in (axes.xaxis, axes.yaxis):
            where.set_major_locator(MaxNLocator(integer=True, nbins=7))
    left, right = figure.axes
    left.yaxis.set_major_formatter(lambda value, _: str(layers[int(value)]) if 0 <= value < len(layers) else "")
    right.xaxis.set_major_formatter(lambda value, _: f"{int(steps[int(value)]):,}" if 0 <= value < len(steps) else "")
    bar = figure.colorbar(image, ax=figure.axes, extend="max", shrink=0.9)
    bar.ax.tick_params(colors=_GREY, labelsize=9)
    _write(figure, path)


def plot_folder(folder: Path) -> Path:
    """Plots a run into `loss.png` in its folder and, for MoE models, `experts.png`.

    Args:
      folder: `output` of the run.

    Returns:
      The path of `loss.png`.

    Raises:
      InputError: the folder has no run, or the run has not begun.
    """
    launches, metrics = folder / "launches.jsonl", folder / "metrics.jsonl"
    if not launches.is_file() or not metrics.is_file():
        raise InputError(f"{folder} holds no run of `qwen-jax train`: it has no launches.jsonl, metrics.jsonl.")
    # The stages are those of the last launch whose record is complete.
    records = read_records(launches, "config")
    if not records:
        raise InputError(f"{launches} has no complete record, which would say what the stages of the run are.")
    launch = records[-1]
    # A run of reinforcement learning has no stages.
    learns = "rewards" in launch["config"]
    stages: list[dict[str, Any]] = [{"length": 0}] if learns else launch["config"]["stages"]
    # A record without `ends` is of a version that only pre-trained, whose stages state their steps.
    ends = launch.get("ends") or itertools.accumulate(stage["schedule"]["steps"] for stage in stages)
    names = {
        end: f"stage {number}: {stage['length']:,} tokens"
        for number, (end, stage) in enumerate(zip(ends, stages, strict=True), 1)
    }
    title = f"{folder.name} on {launch['devices']['kind']}"
    curve, unit = "reward/mean" if learns else "loss", launch.get("unit", "nats a token")
    plot_stages(read_log(metrics), names, folder / "loss.png", title, unit, curve)
    if (folder / EXPERTS).is_file():
        steps, loads, layers = read_loads(folder / EXPERTS)
        if len(steps):
            plot_experts(steps, loads, layers, folder / "experts.png", title)
    return folder / "loss.png"


def try_to(do: str, action: Callable[[], object], say: Callable[[str], None]) -> None:
    """Does something that is not worth a run, such as plotting it: a failure is one line and no error.

    Args:
      do: what the action does, such as "draw a plot".
      action: does it.
      say: shows the line.
    """
    try:
        action()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        say(f"could not {do}: {reason}")


def _figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(10, height), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK, weight="bold")
    return figure


def _write(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_file(path, content.getvalue())


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


def _series(records: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which a number has a finite value, and these values."""
    pairs = np.array([(r["step"], r[name]) for r in records if name in r], float).reshape(-1, 2)
    pairs = pairs[np.isfinite(pairs[:, 1])]
    return pairs[:, 0], pairs[:, 1]


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str | None = None) -> None:
    """Plots a noisy series in a pale colour, and its running mean."""
    axes.plot(*_thinned(steps, values), color=_BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(*_thinned(steps, _smooth(values)), color=_BLUE, linewidth=1.8, label=label)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    every = -(-len(steps) // _POINTS) or 1
    return steps[::every], values[::every]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a fortieth of the run, over less near both ends."""
    count = len(values)
    index = np.arange(count)
    reach = np.minimum(max(count // 80, 1), np.minimum(index, count - 1 - index))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    smooth: np.ndarray = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return smooth


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "python -m train.observe.plots", description="Plots a training run into its loss.png."
    )
    parser.add_argument("folder", type=Path, help="folder of the run")
    try:
        print(plot_folder(parser.parse_args().folder))
    except InputError as error:
        parser.error(str(error))
