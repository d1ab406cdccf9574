"""Laws of published runs, where the tables are: QWEN_JAX_RUN_TABLES names a folder with the files by their own names.

The tables have no licence that allows copies here. docs/scaling.md says where they come from.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from train.scaling.bootstrap import leave_out
from train.scaling.loss import budgets, fit
from train.scaling.runs import RunTable, drop_highest, read_runs

FOLDER = os.environ.get("QWEN_JAX_RUN_TABLES")
NEEDED = ("params", "tokens", "loss")


def read(name: str, columns: dict[str, str], where: dict[str, str] | None = None) -> RunTable:
    """A table of the folder; the test is skipped without it."""
    if FOLDER is None or not (Path(FOLDER) / name).is_file():
        pytest.skip(f"QWEN_JAX_RUN_TABLES names no folder with {name}")
    return read_runs(Path(FOLDER) / name, NEEDED, ("flops",), columns, where)


def test_chinchilla_runs_of_the_replication() -> None:
    """245 runs read from the paper's figure: without the 5 highest losses the published replication.

    Besiroglu et al. 2024: E 1.8172, A 482, B 2085, a 0.3478, b 0.3658; exponents within half of their intervals.
    """
    columns = {"params": "Model Size", "flops": "Training FLOP"}
    table = drop_highest(read("svg_extracted_data.csv", columns), 5)
    for method in ("vpnls-huber", "approach3"):
        law = fit(table, method)  # type: ignore[arg-type]
        assert abs(law.E - 1.8172) < 0.01
        assert abs(law.a - 0.3478) < 0.01
        assert abs(law.b - 0.3658) < 0.01


def test_chinchilla_runs_of_another_reading() -> None:
    """234 of these runs with C, N, D: the same law within the published standard errors (0.02 for exponents)."""
    table = read("df.csv", {"params": "N", "tokens": "D", "flops": "C"})
    for method in ("vpnls", "vpnls-huber"):
        law = fit(table, method)  # type: ignore[arg-type]
        assert abs(law.E - 1.8172) < 0.04
        assert abs(law.a - 0.3478) < 0.02
        assert abs(law.b - 0.3658) < 0.03


def test_two_largest_budgets_of_llama_3() -> None:
    """Losses of the budgets 3e21 and 1e22 from those to 1e21, with a mean error below 0.6%."""
    condition = {"dataset": "llama_3", "condition": "exp_loss"}
    table = read("isoflops.csv", {"flops": "budget"}, condition)
    largest = np.zeros(len(table), bool)
    largest[np.concatenate(budgets(table["flops"])[-2:])] = True
    found = leave_out(table, largest, "the two largest budgets", "vpnls-huber")
    assert found.law is not None
    assert np.abs(found.errors).mean() < 0.006
