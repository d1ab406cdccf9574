"""`qwen-jax scaling`: laws fitted to tables of runs, and what they predict. `scaling sweep` is in its own file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import sibling
from qwen_jax.errors import InputError
from qwen_jax.files import to_json

Columns = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=COLUMN")]
Rows = Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN=VALUE")]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Fit a scaling law to a table of runs. Writes law.json and pictures to the output folder, if one is given.

    Example: qwen-jax scaling fit --runs runs.csv --law loss --columns params=N tokens=D*1e9 --output law

    Args:
        runs: CSV or Parquet file with a row for each run. See docs/scaling.md for its columns.
        law: loss is L = E + A / N^a + B / D^b.
        columns: Names of columns in the file, if they are not ours, such as params=N tokens=D*1e9.
        where: Only rows with these values, such as dataset=c4.
        counting: How the file counts parameters: all; those that a token is multiplied with, among them the output
            head; or without embedding and head.
        cells: Of runs with the same size and tokens take the best, or all. By default the best if learning rate or
            batch size vary in a cell, and all if not.
        method: Of the loss law. The other methods are cross-checks.
        drop_highest: Leave out this many runs with the highest losses.
        bootstrap: Draws for the intervals.
        level: Of the intervals.
        seed: Of the draws.
        output: Folder of law.json and the pictures.
        json: Print the law as a JSON object.
    """

    runs: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    law: Literal["loss"] = "loss"
    columns: Columns = ()
    where: Rows = ()
    counting: Literal["total", "with-head", "non-embedding", "unstated"] = "unstated"
    cells: Literal["auto", "best", "all"] = "auto"
    method: Literal["vpnls", "approach3"] = "vpnls"
    drop_highest: int = 0
    bootstrap: int = 200
    level: float = 0.9
    seed: int = 0
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    json: bool = False

    def run(self) -> int:
        value, text, pictures = _FITS[self.law](self)
        if self.output is not None:
            predict = sibling("train.scaling.predict")
            predict.write_law(value, self.output / "law.json")
            for name, draw in pictures.items():
                draw(self.output / name)
        shown = {name: item for name, item in value.items() if name != "draws"}
        print(to_json(shown) if self.json else text)
        return 0


# What a fit gives: the content of law.json, text to print, and functions that draw a picture by the file's name.
Fitted = tuple[dict[str, Any], str, dict[str, Callable[[Path], None]]]


def _fit_loss(options: Fit) -> Fitted:
    runs, predict, text = (sibling(f"train.scaling.{name}") for name in ("runs", "predict", "report"))
    plots = sibling("train.scaling.plots")
    table = runs.read_runs(
        options.runs,
        ("params", "tokens", "loss"),
        ("flops", "learning_rate", "batch_tokens"),
        runs.parse_columns(options.columns),
        runs.parse_columns(options.where, "where"),
    )
    if options.cells == "best" or (options.cells == "auto" and runs.is_tuned(table)):
        table = runs.best_of_cells(table)
    table = runs.drop_highest(table, options.drop_highest)
    fitted = predict.fit_loss(table, options.method, options.counting, options.bootstrap, options.level, options.seed)
    pictures = {
        "fit.png": lambda path: plots.plot_fit(fitted.law, table, path),
        "residuals.png": lambda path: plots.plot_residuals(fitted.law, table, path),
    }
    return fitted.to_json(), text.loss_text(fitted), pictures


_FITS: dict[str, Callable[[Fit], Fitted]] = {"loss": _fit_loss}


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predict the loss of a run by a fitted law, with intervals and warnings where it extrapolates.

    Args:
        law: law.json of `qwen-jax scaling fit`, or its folder.
        params: Model size, counted as the law counts.
        tokens: Training tokens.
        json: Print a JSON object.
    """

    law: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    params: float
    tokens: float
    json: bool = False

    def run(self) -> int:
        predict, text = sibling("train.scaling.predict"), sibling("train.scaling.report")
        value = predict.read_law(self.law)
        found = predict.predict_loss(predict.FittedLoss.from_json(value, str(self.law)), self.params, self.tokens)
        print(to_json(found) if self.json else text.prediction_text(found))
        return 0


@dataclasses.dataclass(frozen=True)
class ComputeOptimal:
    """Size, tokens and loss of the best run with a budget of FLOPs, C = 6 N D, by a fitted loss law.

    Args:
        law: law.json of `qwen-jax scaling fit --law loss`, or its folder.
        flops: The budgets, such as 1e21 1e22.
        json: Print a JSON object for each budget, a line each.
    """

    law: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    flops: Annotated[tuple[float, ...], tyro.conf.arg(metavar="C")]
    json: bool = False

    def run(self) -> int:
        predict, text = sibling("train.scaling.predict"), sibling("train.scaling.report")
        if not self.flops:
            raise InputError("Give the budgets, such as --flops 1e21.")
        fitted = predict.FittedLoss.from_json(predict.read_law(self.law), str(self.law))
        found = [predict.compute_optimal(fitted, flops) for flops in self.flops]
        print("\n".join(map(to_json, found)) if self.json else text.optimum_text(found))
        return 0
