"""The law of the small sweep by `train.scaling`, and the picture of the larger model's runs."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.files import write_file
from train.scaling.hyperparameters_law import COLUMNS, Fitted, Prediction, fit_table, predict
from train.scaling.hyperparameters_plots import pictures
from train.scaling.runs import read_runs

# The smallest models are far from a quadratic beyond this, in log loss above the best of a cell.
_WINDOW = 0.03


def fit_law(table: Path, params: float, tokens: float) -> tuple[Fitted, Prediction]:
    """The joint law of learning rate and batch, and what it says of a larger model.

    Args:
      table: results.parquet of the sweep.
      params: weights that a token of the larger model is multiplied with, the output head among them.
      tokens: of its run.

    Raises:
      InputError: the runs do not determine a law.
    """
    # Pooled: grids of 9 runs and some more are few for six coefficients a cell.
    fitted = fit_table(read_runs(table, COLUMNS), form="pooled", window=_WINDOW, counting="with-head")
    return fitted, predict(fitted.law, params, tokens)


def plot_law(fitted: Fitted, folder: Path) -> None:
    """Writes the pictures of the fit."""
    for name, content in pictures(fitted).items():
        write_file(folder / name, content)


def plot_target(rows: Sequence[Mapping[str, Any]], prediction: Mapping[str, Any], path: Path) -> None:
    """Draws the loss of the larger model over the learning rate, a line for each batch, and the pick."""
    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    good = [row for row in rows if row["status"] == "ok"]
    best = min(row["loss"] for row in good)
    for batch in sorted({row["batch_tokens"] for row in good}):
        line = sorted((r["learning_rate"], r["loss"]) for r in good if r["batch_tokens"] == batch)
        axis.plot(*zip(*line, strict=True), "o-", markersize=4, linewidth=1, label=f"{batch:,} tokens")
    axis.axhspan(best, 1.005 * best, color="#8a8a8a", alpha=0.2, linewidth=0)
    for row in good:
        if math.isclose(row["learning_rate"], prediction["learning_rate"], rel_tol=1e-6) and (
            row["batch_tokens"] == prediction["batch_tokens"]
        ):
            axis.plot(row["learning_rate"], row["loss"], "o", markersize=12, fillstyle="none", color="#d1662b")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("held-out loss, nats a token")
    axis.legend(title="batch", frameon=False, fontsize=8)
    axis.set_title("larger model; circle: the run that the law picked; band: 0.5% above the best", fontsize=9)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_file(path, content.getvalue())
