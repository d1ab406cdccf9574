"""`qwen-jax scaling`: laws fitted to tables of runs, and what they predict. `scaling sweep` is in its own file."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qwen_jax.cli.common import Seed, given, sibling
from qwen_jax.cli.scaling_laws import Fitted, fit_hyperparameters, fit_moe, predict_hyperparameters, predict_moe
from qwen_jax.errors import InputError
from qwen_jax.files import to_json

Columns = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=COLUMN")]
Rows = Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN=VALUE")]

# Options of `fit` that one law alone reads.
_READ_BY = {
    "loss": ("cells", "method"),
    "hyperparameters": ("valleys", "terms", "window"),
    "moe": ("moe_form",),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """Fit a scaling law to a table of runs. Writes law.json and pictures to the output folder, if one is given.

    Example: qwen-jax scaling fit --runs runs.csv --law loss --columns params=N tokens=D*1e9 --output law

    Args:
        runs: CSV or Parquet file with a row for each run. See docs/scaling.md for its columns.
        law: loss is L = E + A / N^a + B / D^b; hyperparameters are learning rate and batch size as power laws of N
            and D; moe is the loss of mixtures of experts and the dense model that one equals.
        columns: Names of columns in the file, if they are not ours, such as params=N tokens=D*1e9.
        where: Only rows with these values, such as dataset=c4.
        counting: How the file counts parameters: all; those that a token is multiplied with, among them the output
            head; or without embedding and head.
        cells: Of runs with the same size and tokens take the best, or all. By default the best if learning rate or
            batch size vary in a cell, and all if not.
        method: Of the loss law; the others are cross-checks. vpnls-huber forgives runs that went wrong.
        valleys: Of hyperparameters: a quadratic in each cell of size and tokens, one curvature for all (pooled), or
            that of the two with the lower regret where each cell is left out (auto).
        terms: Of hyperparameters: they depend on size and tokens (nd), compute (c), size (n) or tokens (d).
        window: Of hyperparameters: runs count up to this log loss above the best of their cell.
        moe_form: Of moe; see docs/scaling.md.
        drop_highest: Leave out this many runs with the highest losses.
        bootstrap: Draws for the intervals.
        level: Of the intervals.
        seed: Of the draws.
        output: Folder of law.json and the pictures.
        json: Print the law as a JSON object.
    """

    runs: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    law: Literal["loss", "hyperparameters", "moe"] = "loss"
    columns: Columns = ()
    where: Rows = ()
    counting: Literal["total", "with-head", "non-embedding", "unstated"] = "unstated"
    cells: Literal["auto", "best", "all"] = "auto"
    method: Literal["vpnls", "vpnls-huber", "approach3"] = "vpnls"
    valleys: Literal["auto", "cells", "pooled"] = "auto"
    terms: Literal["nd", "c", "n", "d"] = "nd"
    window: float = 0.01
    moe_form: Literal["leverage", "bilinear", "saturated", "granularity", "sparsity"] = "leverage"
    drop_highest: int = 0
    bootstrap: int = 200
    level: float = 0.9
    seed: Seed = 0
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    json: bool = False

    def run(self) -> int:
        for law, names in _READ_BY.items():
            unread = given(self, *names)
            if law != self.law and unread:
                raise InputError(
                    f"--law {self.law} does not read {', '.join(unread)}. Leave it out, or give --law {law}."
                )
        value, text, pictures = _FITS[self.law](self)
        if self.output is not None:
            predict = sibling("train.scaling.predict")
            predict.write_law(value, self.output / "law.json")
            for name, draw in pictures.items():
                draw(self.output / name)
        shown = {name: item for name, item in value.items() if name not in ("draws", "loss_draws")}
        print(to_json(shown) if self.json else text)
        return 0


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


_FITS: dict[str, Callable[[Fit], Fitted]] = {
    "loss": _fit_loss,
    "hyperparameters": fit_hyperparameters,
    "moe": fit_moe,
}


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predict a run by a fitted law, with intervals and warnings where it extrapolates.

    A loss law gives the loss; a law of hyperparameters gives learning rate, batch size and loss; a law of MoE models
    gives the loss and the dense model that the MoE equals, or, for --equal-to, the MoE models that equal a dense one.

    Args:
        law: law.json of `qwen-jax scaling fit`, or its folder.
        tokens: Training tokens.
        params: Model size, counted as the law counts; of an MoE, the parameters that a token uses.
        total_params: All parameters of an MoE.
        experts: Of an MoE layer, for the forms bilinear and saturated.
        granularity: Of an MoE: size of the dense feed-forward layer by that of an expert.
        equal_to: Size of a dense model; prints MoE models of its loss.
        ratios: Of total to active parameters of these MoE models, or their numbers of experts.
        config: FILE.py[:FUNCTION] of a run of `qwen-jax train pretrain`, of one stage; with a law of hyperparameters.
            Its model gives --params where that is left out.
        write: File that takes this run with the predicted learning rate and batch, and the tokens.
        json: Print a JSON object.
    """

    law: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    tokens: float
    params: float | None = None
    total_params: float | None = None
    experts: float | None = None
    granularity: float | None = None
    equal_to: float | None = None
    ratios: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE.py")] = None
    write: Annotated[Path | None, tyro.conf.arg(metavar="FILE.py")] = None
    json: bool = False

    def run(self) -> int:
        value = sibling("train.scaling.predict").read_law(self.law)
        if (self.config is None) != (self.write is None):
            raise InputError("Give both: --config with the run to begin from, and --write with the file that takes it.")
        if self.config is not None:
            runs = sibling("train.scaling.run_config")
            run, size = runs.run_of_law(value, self.config, self.params, self.tokens)
            runs.write_run_config(self.write, run, f"A run by the law {self.law}.")
            return dataclasses.replace(self, params=size, config=None, write=None).run()
        of_moe = given(self, "total_params", "experts", "granularity", "equal_to", "ratios")
        if value["law"] != "moe" and of_moe:
            options = ", ".join(of_moe)
            raise InputError(
                f"{self.law} is a {value['law']} law, which does not read {options}. Give a law of MoE models."
            )
        predict = {"hyperparameters": predict_hyperparameters, "moe": predict_moe}.get(value["law"], _predict_loss)
        found, text = predict(value, self)
        print(to_json(found) if self.json else text)
        return 0


def _predict_loss(value: Mapping[str, Any], options: Predict) -> tuple[dict[str, Any], str]:
    predict, text = sibling("train.scaling.predict"), sibling("train.scaling.report")
    if options.params is None:
        raise InputError("A loss law needs the model size: give --params.")
    fitted = predict.FittedLoss.from_json(value, str(options.law))
    found = predict.predict_loss(fitted, options.params, options.tokens)
    return found, text.prediction_text(found)


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
