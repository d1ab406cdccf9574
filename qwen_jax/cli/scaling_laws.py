"""Parts of `qwen-jax scaling fit` and `predict` for the laws of learning rate and batch size, and of MoE models."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qwen_jax.cli.common import given, sibling
from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from qwen_jax.cli.scaling import Fit, Predict

# What a fit gives: the content of law.json, text to print, and functions that write a picture by the file's name.
Fitted: TypeAlias = tuple[dict[str, Any], str, dict[str, Callable[[Path], None]]]


def fit_hyperparameters(options: "Fit") -> Fitted:
    """Fits the law of learning rate and batch size. Raises InputError where the runs do not determine it."""
    runs, law, plots = (
        sibling(f"train.scaling.{name}") for name in ("runs", "hyperparameters_law", "hyperparameters_plots")
    )
    table = runs.read_runs(
        options.runs,
        law.COLUMNS,
        (),
        runs.parse_columns(options.columns),
        runs.parse_columns(options.where, "where"),
    )
    fitted = law.fit_table(
        runs.drop_highest(table, options.drop_highest),
        form=options.valleys,
        terms=options.terms,
        window=options.window,
        samples=options.bootstrap,
        seed=options.seed,
        level=options.level,
        counting=options.counting,
    )
    return fitted.law, law.fit_text(fitted), _pictures(lambda: plots.pictures(fitted), plots.NAMES)


def fit_moe(options: "Fit") -> Fitted:
    """Fits an MoE law. Raises InputError where the runs do not determine it."""
    runs, law = sibling("train.scaling.runs"), sibling("train.scaling.moe_law")
    table = runs.read_runs(
        options.runs,
        law.COLUMNS,
        law.OPTIONAL,
        runs.parse_columns(options.columns),
        runs.parse_columns(options.where, "where"),
    )
    content, fitted, used = law.fit_table(
        runs.drop_highest(table, options.drop_highest),
        options.moe_form,
        samples=options.bootstrap,
        seed=options.seed,
        level=options.level,
        counting=options.counting,
    )
    text = law.fit_text(fitted, used, options.level)
    return content, text, _pictures(lambda: {"moe.png": law.picture(fitted, used)}, ("moe.png",))


def _pictures(draw: Callable[[], dict[str, bytes]], names: tuple[str, ...]) -> dict[str, Callable[[Path], None]]:
    """Functions that write pictures, which are drawn when the first is written."""
    drawn: dict[str, bytes] = {}

    def write(path: Path) -> None:
        drawn.update(drawn or draw())
        sibling("train.files").write_file(path, drawn[path.name])

    return dict.fromkeys(names, write)


def predict_hyperparameters(law: Mapping[str, Any], options: "Predict") -> tuple[dict[str, Any], str]:
    """Learning rate, batch size and loss: what `--json` prints, and the text."""
    module = sibling("train.scaling.hyperparameters_law")
    if options.params is None:
        raise InputError("A law of learning rate and batch size needs the model size: give --params.")
    found = module.predict(law, options.params, options.tokens)
    return dataclasses.asdict(found), module.predict_text(found)


def predict_moe(law: Mapping[str, Any], options: "Predict") -> tuple[dict[str, Any], str]:
    """Loss and dense equivalent of an MoE, or the MoE models that equal a dense one: for `--json`, and the text."""
    module = sibling("train.scaling.moe_law")
    if (options.params is None) == (options.equal_to is None):
        raise InputError(
            "An MoE law needs either --params (active parameters, with --total-params or --experts) or --equal-to "
            "(size of a dense model)."
        )
    # Options that the form, or the question, does not read.
    form = str(law.get("form"))
    unread = {"total_params", "experts"} if options.equal_to is not None else {"ratios"}
    unread |= {"total_params"} if form in ("bilinear", "saturated") else {"experts"}
    unread |= set() if form in ("leverage", "granularity") else {"granularity"}
    if names := given(options, *sorted(unread)):
        what = "--equal-to" if options.equal_to is not None else "--params"
        raise InputError(f"A law of the form {form} does not read {', '.join(names)} with {what}. Leave it out.")
    if options.equal_to is not None:
        rows = module.equivalents(law, options.equal_to, options.tokens, options.ratios, options.granularity)
    else:
        one = module.predict(
            law,
            options.params,
            options.tokens,
            total=options.total_params,
            experts=options.experts,
            granularity=options.granularity,
        )
        rows = [one]
    return {"models": rows}, module.predict_text(rows)
