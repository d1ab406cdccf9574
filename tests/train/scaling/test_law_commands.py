"""`qwen-jax scaling fit` and `predict` for laws of hyper-parameters and of MoE models."""

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.cli import main
from tests.helpers.runs import print_seed
from tests.train.scaling.sweeps import sweep
from tests.train.scaling.test_hyperparameters import a_law
from tests.train.scaling.test_moe import measured
from train.scaling.runs import COMPUTE


def write_table(path: Path, columns: dict[str, np.ndarray], more: str = "") -> None:
    rows = np.stack(list(columns.values()), 1).tolist()
    path.write_text("\n".join([",".join(columns), *(",".join(map(repr, row)) for row in rows)]) + "\n" + more)


def test_hyperparameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a table with other column names, a diverged run and a copy, to the pair that the true law gives."""
    generator = print_seed()
    law = a_law(generator)
    cells = [(size, tokens) for size in (2e6, 5e6, 12e6) for tokens in (1e8, 3e8, 9e8)]
    table = sweep(generator, law, cells, noise=1e-4, off_centre=0.3)
    columns = {"N": table.params, "D": table.tokens, "lr": table.learning_rate, "bs": table.batch_tokens / 2048}
    path = tmp_path / "runs.csv"
    copy = ",".join(repr(float(one[0])) for one in (*columns.values(), table.loss))
    write_table(path, {**columns, "smooth loss": table.loss}, f"2e6,1e8,0.5,64,nan\n{copy}\n")
    names = ["params=N", "tokens=D", "learning_rate=lr", "batch_tokens=bs*2048", "loss=smooth loss"]
    folder = tmp_path / "law"
    arguments = ["scaling", "fit", "--runs", str(path), "--law", "hyperparameters", "--columns", *names]
    assert main([*arguments, "--bootstrap", "20", "--output", str(folder), "--counting", "non-embedding"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate = " in said
    assert "Step Law" in said
    assert "largest cells left out" in said
    assert "1 run without a finite loss left out" in said
    assert "1 copy of other runs left out" in said
    for name in ("valleys.png", "law.png", "regret.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    value = json.loads((folder / "law.json").read_text())
    assert value["law"] == "hyperparameters"
    assert value["counting"] == "non-embedding"
    assert value["regret"]["largest cells left out"]["max"] < 0.005
    # Four times the largest model, with the intervals.
    assert main(["scaling", "predict", "--law", str(folder), "--params", "48e6", "--tokens", "9e8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rate, batch = law.predict(48e6, 9e8)
    assert found["learning_rate"] == pytest.approx(rate, rel=0.15)
    assert found["batch_tokens"] == pytest.approx(batch, rel=0.15)
    assert found["counting"] == "non-embedding"
    low, high = found["learning_rate_interval"]
    assert low < found["learning_rate"] < high
    low, high = found["loss_interval"]
    assert low <= found["loss"] <= high
    assert "params 4.8e+07 is a factor 4 outside" in found["warnings"][0]
    # A law that the runs do not determine, and options of another law.
    assert main([*arguments, "--where", "N=2000000.0"]) == 1
    assert "several values of model size, got 2e+06" in capsys.readouterr().err
    assert main(["scaling", "predict", "--law", str(folder), "--tokens", "1e9"]) == 1
    assert "give --params" in capsys.readouterr().err
    assert main(["scaling", "predict", "--law", str(folder), "--tokens", "1e9", "--experts", "8"]) == 1
    assert "does not read --experts" in capsys.readouterr().err


def test_moe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a table whose dense runs have no granularity to the MoE models that equal a dense one, and back."""
    generator = print_seed()
    runs, _ = measured("leverage", generator, 1e-3)
    path = tmp_path / "runs.csv"
    columns = {"active_params": runs.active, "total_params": runs.total, "tokens": runs.tokens, "loss": runs.loss}
    write_table(path, {**columns, "granularity": np.where(runs.dense, np.nan, runs.granularity)}, "1e8,2e8,1e9,nan,4\n")
    folder = tmp_path / "law"
    arguments = ["scaling", "fit", "--runs", str(path), "--law", "moe", "--output", str(folder)]
    assert main([*arguments, "--bootstrap", "5"]) == 0
    said = capsys.readouterr().out
    assert "234 runs, 18 of them dense" in said
    assert "1 run without a finite loss left out" in said
    assert "give --counting" in said
    assert (folder / "moe.png").read_bytes().startswith(b"\x89PNG")
    predict = ["scaling", "predict", "--law", str(folder), "--tokens", "8e9", "--granularity", "4", "--json"]
    assert main([*predict, "--equal-to", "3e8", "--ratios", "4", "8"]) == 0
    four, eight = json.loads(capsys.readouterr().out)["models"]
    assert eight["active_params"] < four["active_params"] < 3e8
    assert eight["total_params"] == pytest.approx(8 * eight["active_params"])
    sizes = ["--params", str(eight["active_params"]), "--total-params", str(eight["total_params"])]
    assert main([*predict, *sizes]) == 0
    (back,) = json.loads(capsys.readouterr().out)["models"]
    assert back["dense_params"] == pytest.approx(3e8, rel=1e-6)
    assert main([*predict, *sizes, "--granularity", "-4"]) == 1
    assert "positive number for granularity" in capsys.readouterr().err
    assert main(predict) == 1
    assert "either --params" in capsys.readouterr().err
    for more, words in (
        ([*sizes, "--experts", "8"], "does not read --experts with --params"),
        ([*sizes, "--ratios", "4"], "does not read --ratios with --params"),
        (["--equal-to", "3e8", "--total-params", "9e8"], "does not read --total-params with --equal-to"),
    ):
        assert main([*predict, *more]) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    assert main([*arguments, "--moe-form", "bilinear"]) == 1
    assert "needs a column of experts" in capsys.readouterr().err


def test_options_of_another_law_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that the law does not read is an error before the table is read."""
    fit = ["scaling", "fit", "--runs", str(tmp_path / "none.csv"), "--law"]
    for law, option, other in (
        ("loss", ["--window", "0.03"], "hyperparameters"),
        ("hyperparameters", ["--method", "approach3"], "loss"),
        ("moe", ["--terms", "c"], "hyperparameters"),
    ):
        assert main([*fit, law, *option]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert f"--law {law} does not read {option[0]}" in said
        assert f"give --law {other}" in said


@pytest.mark.parametrize("change", [{"version": 2}, {"range": None}, {"level": "high"}])
def test_a_law_that_is_not_whole_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object]
) -> None:
    pair = {"coefficient": 1.0, "params": -0.5, "tokens": 0.3}
    law = {"law": "hyperparameters", "version": 1, "parameters": {"learning_rate": pair, "batch_tokens": pair}}
    law |= {"compute": COMPUTE, "level": 0.9, "range": {name: [1e6, 1e9] for name in ("params", "tokens", "flops")}}
    path = tmp_path / "law.json"
    command = ["scaling", "predict", "--law", str(path), "--params", "1e8", "--tokens", "1e9"]
    path.write_text(json.dumps(law))
    assert main(command) == 0
    assert "params 1e+08 (counted: unstated)" in capsys.readouterr().out
    path.write_text(json.dumps({**law, **change}))
    assert main(command) == 1
    assert "Fit it again" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["loss", "hyperparameters", "moe"])
@pytest.mark.parametrize("stated", ["C = 3 N D", None])
def test_a_law_with_another_definition_of_compute_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, stated: str | None
) -> None:
    """Also a law that states none, whatever its kind; the error says what was expected and what to do."""
    law = {"law": kind, "version": 1, "parameters": {}} | ({} if stated is None else {"compute": stated})
    (tmp_path / "law.json").write_text(json.dumps(law))
    assert main(["scaling", "predict", "--law", str(tmp_path), "--params", "1e8", "--tokens", "1e9"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert ("does not state how compute is defined" if stated is None else repr(stated)) in said
    assert "expected 'C = 6 N D, N as counted" in said
    assert "Fit it again to its table of runs" in said
