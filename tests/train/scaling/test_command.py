"""`qwen-jax scaling fit`, `predict` and `compute-optimal`: files, JSON, and errors in words."""

import csv
import json
from pathlib import Path

import pytest

from qwen_jax.cli import main
from tests.helpers.runs import print_seed
from tests.helpers.scaling import CHINCHILLA, draw_runs
from train.scaling.runs import COMPUTE


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fitted law, and the table it was fitted to."""
    folder = tmp_path_factory.mktemp("law")
    table = draw_runs(print_seed(), sizes=6, noise=0.001)
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "N", "D", "final"])
        writer.writerows(zip(["web"] * len(table), table["params"], table["tokens"] / 1e9, table["loss"], strict=True))
        writer.writerow(["code", 1, 1, 1])
    arguments = ["--runs", str(folder / "runs.csv"), "--columns", "params=N", "tokens=D*1e9", "loss=final"]
    arguments += ["--where", "data=web", "--counting", "total", "--bootstrap", "20", "--output", str(folder)]
    assert main(["scaling", "fit", *arguments]) == 0
    return folder


def test_fit_writes_a_law_and_pictures(law: Path) -> None:
    """law.json holds the parameters with intervals, the range, the data's hash, checks and sensitivity."""
    value = json.loads((law / "law.json").read_text())
    assert abs(value["parameters"]["a"] - CHINCHILLA.a) < 0.03
    assert value["intervals"]["a"][0] < value["parameters"]["a"] < value["intervals"]["a"][1]
    assert (value["counting"], value["compute"]) == ("total", COMPUTE)
    assert value["runs"] == 48
    assert len(value["data"]["sha256"]) == 64
    assert abs(value["checks"]["approach3"]["a"] - CHINCHILLA.a) < 0.03
    assert abs(value["checks"]["approach2"]["size_exponent"] - value["size_exponent"]) < 0.02
    assert {one["without"] for one in value["left_out"]} >= {"the two largest budgets", "the 5 highest losses"}
    for name in ("fit.png", "residuals.png"):
        assert (law / name).read_bytes().startswith(b"\x89PNG")


def test_predictions_as_text_and_json(law: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder stands for its law.json; text and JSON say the same."""
    assert main(["scaling", "predict", "--law", str(law), "--params", "1e9", "--tokens", "1e10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert abs(found["loss"] / CHINCHILLA.loss(1e9, 1e10) - 1) < 0.005
    assert main(["scaling", "predict", "--law", str(law / "law.json"), "--params", "1e9", "--tokens", "1e10"]) == 0
    assert f"loss {found['loss']:.4f}" in capsys.readouterr().out
    assert main(["scaling", "compute-optimal", "--law", str(law), "--flops", "1e20", "1e25", "--json"]) == 0
    near, far = map(json.loads, capsys.readouterr().out.splitlines())
    assert abs(near["params"] / CHINCHILLA.optimum(1e20)[0] - 1) < 0.1
    assert far["warnings"]
    assert main(["scaling", "compute-optimal", "--law", str(law), "--flops", "1e20"]) == 0
    assert "tokens_per_param" in capsys.readouterr().out


def test_unusable_input_is_said(law: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1 and a sentence, without a traceback."""
    (tmp_path / "law.json").write_text(json.dumps({"law": "loss", "version": 1, "compute": COMPUTE, "parameters": {}}))
    (tmp_path / "other.json").write_text("{}")
    for law_path, text in (("law.json", "not a fitted law"), ("other.json", "not a fitted law"), ("no", "exist")):
        assert main(["scaling", "compute-optimal", "--law", str(tmp_path / law_path), "--flops", "1e20"]) == 1
        assert text in capsys.readouterr().err
    assert main(["scaling", "compute-optimal", "--law", str(law), "--flops", "-1"]) == 1
    assert "flops must be a positive number" in capsys.readouterr().err
    assert main(["scaling", "fit", "--runs", str(law / "runs.csv")]) == 1
    assert "no column for params (model size N)" in capsys.readouterr().err
