"""Parts of `qwen-jax scaling fit` and `predict` for the laws of learning rate and batch size, and of MoE models."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qwen_jax.errors import InputError

HyperparametersForm: TypeAlias = Literal["auto", "cells", "pooled"]
MoeForm: TypeAlias = Literal["leverage", "bilinear", "saturated", "granularity", "sparsity"]


@dataclasses.dataclass(frozen=True)
class HyperparametersOptions:
    """Of `--law hyperparameters`.

    Args:
        form: A quadratic in each cell of size and tokens, one curvature for all (pooled), or the better of both.
        terms: What the law depends on: size and tokens, compute, size, or tokens.
        window: Runs count whose log loss is at most this far above the best of their cell.
    """

    form: HyperparametersForm = "auto"
    terms: Literal["nd", "c", "n", "d"] = "nd"
    window: float = 0.01


@dataclasses.dataclass(frozen=True)
class MoeOptions:
    """Of `--law moe`.

    Args:
        form: Of the law; see docs/scaling.md.
    """

    form: MoeForm = "leverage"


@dataclasses.dataclass(frozen=True)
class Table:
    """What all fits read: the file, its columns, and the bootstrap."""

    runs: Path
    columns: Mapping[str, str]
    where: Mapping[str, str]
    counting: str
    samples: int
    level: float
    seed: int


def fit_hyperparameters(table: Table, options: HyperparametersOptions) -> tuple[dict[str, Any], str, dict[str, bytes]]:
    """Fits the law of learning rate and batch size.

    Returns:
      The content of law.json, what to print, and pictures by file name.

    Raises:
      InputError: the table cannot be read, or its runs do not determine the law.
    """
    from train.scaling import hyperparameters_law, hyperparameters_plots
    from train.scaling.runs import read_runs

    runs = read_runs(table.runs, hyperparameters_law.COLUMNS, columns=table.columns, where=table.where)
    fitted = hyperparameters_law.fit_table(
        runs,
        form=options.form,
        terms=options.terms,
        window=options.window,
        samples=table.samples,
        seed=table.seed,
        level=table.level,
        counting=table.counting,
    )
    return fitted.law, hyperparameters_law.fit_text(fitted), hyperparameters_plots.pictures(fitted)


def fit_moe(table: Table, options: MoeOptions) -> tuple[dict[str, Any], str, dict[str, bytes]]:
    """Fits an MoE law; see `fit_hyperparameters`."""
    from train.scaling import moe_law
    from train.scaling.runs import read_runs

    runs = read_runs(table.runs, moe_law.COLUMNS, moe_law.OPTIONAL, columns=table.columns, where=table.where)
    content, law, used = moe_law.fit_table(
        runs, options.form, samples=table.samples, seed=table.seed, level=table.level, counting=table.counting
    )
    return content, moe_law.fit_text(law, used, table.level), {"moe.png": moe_law.picture(law, used)}


def predict_hyperparameters(law: Mapping[str, Any], params: float | None, tokens: float) -> tuple[dict[str, Any], str]:
    """Learning rate, batch size and loss: what `--json` prints, and the text."""
    from train.scaling import hyperparameters_law

    if params is None:
        raise InputError("A law of learning rate and batch size needs the model size: give --params.")
    found = hyperparameters_law.predict(law, params, tokens)
    return dataclasses.asdict(found), hyperparameters_law.predict_text(found)


def predict_moe(
    law: Mapping[str, Any],
    params: float | None,
    tokens: float,
    *,
    total_params: float | None = None,
    experts: float | None = None,
    granularity: float | None = None,
    equal_to: float | None = None,
    ratios: tuple[float, ...] = (2, 4, 8, 16, 32),
) -> tuple[dict[str, Any], str]:
    """Loss and dense equivalent of an MoE, or the MoE models that equal a dense one: for `--json`, and the text.

    Args:
      law: the content of law.json.
      params: active parameters of the MoE; None where `equal_to` is given.
      tokens: training tokens.
      total_params: all parameters of the MoE.
      experts: of a layer.
      granularity: size of the dense feed-forward layer / size of an expert.
      equal_to: size of a dense model.
      ratios: of total to active parameters, or numbers of experts, of the answers to `equal_to`.
    """
    from train.scaling import moe_law

    if (params is None) == (equal_to is None):
        raise InputError(
            "An MoE law needs either --params (active parameters, with --total-params or --experts) or --equal-to "
            "(size of a dense model)."
        )
    if equal_to is not None:
        rows = moe_law.equivalents(law, equal_to, tokens, ratios, granularity)
    else:
        assert params is not None
        rows = [moe_law.predict(law, params, tokens, total=total_params, experts=experts, granularity=granularity)]
    return {"models": rows}, moe_law.predict_text(rows)
