"""Plots of a run, also of one whose files are damaged."""

import math
import shutil
import time

import numpy as np
import pytest

from qwen_jax.errors import InputError
from train.moe import LoadLog, read_loads
from train.observe.plots import plot_experts, plot_folder, plot_stages, try_to


def test_the_picture_of_a_run(watched, tmp_path):
    shutil.copytree(watched.output, tmp_path / "run", ignore=shutil.ignore_patterns("loss.png", "checkpoints"))
    assert plot_folder(tmp_path / "run") == tmp_path / "run" / "loss.png"
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="holds no run"):
        plot_folder(tmp_path)
    with pytest.raises(InputError, match="no step with a finite loss yet"):
        plot_stages([{"step": 0, "held_out_loss": 1.0}], {}, tmp_path / "x.png", "x")
    # Long runs, and numbers that are none.
    rng = np.random.default_rng(0)
    records = [
        {
            "step": i,
            "loss": math.nan if i % 100 == 0 else float(rng.random()),
            "learning_rate": 0.1,
            "tokens_per_second": 5.0,
        }
        for i in range(1, 50_000)
    ]
    begin = time.perf_counter()
    plot_stages(records, {50_000: "only"}, tmp_path / "long.png", "x")
    assert time.perf_counter() - begin < 30
    assert (tmp_path / "long.png").is_file()


@pytest.mark.parametrize("damage", [b'{"time": "2026', b"\0" * 700, b"\n\0\n[]\n", b"\xff"])
def test_a_damaged_line_does_not_stop_a_plot(watched, tmp_path, damage):
    shutil.copytree(watched.output, tmp_path / "run", ignore=shutil.ignore_patterns("loss.png", "checkpoints"))
    for name in ("launches.jsonl", "metrics.jsonl"):
        with (tmp_path / "run" / name).open("ab") as file:
            file.write(damage)
    assert plot_folder(tmp_path / "run").stat().st_size > 10_000
    (tmp_path / "run" / "launches.jsonl").write_bytes(damage)
    with pytest.raises(InputError, match=r"launches.jsonl has no complete record"):
        plot_folder(tmp_path / "run")


def test_loads_that_are_not_finite_are_null_and_are_plotted(tmp_path):
    log = LoadLog(tmp_path / "experts.jsonl", [1, 3], steps=3)
    for step, load in enumerate((np.ones((2, 4)), np.full((2, 4), np.nan), np.array([[1, np.inf, 0, 3]] * 2)), 1):
        log.write(step, "expert_load", load)
    with (tmp_path / "experts.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo' + bytes(40))
    assert "NaN" not in (tmp_path / "experts.jsonl").read_text()
    steps, loads, layers = read_loads(tmp_path / "experts.jsonl")
    assert steps.tolist() == [1, 2, 3]
    assert np.isnan(loads).sum(axis=(1, 2)).tolist() == [0, 8, 2]
    plot_experts(steps, loads, layers, tmp_path / "experts.png", "x")
    assert (tmp_path / "experts.png").is_file()


def test_what_fails_is_one_line():
    said: list[str] = []

    def plot() -> None:
        raise MemoryError("no room for the figure\nand more")

    try_to("draw it", plot, said.append)
    try_to("do nothing", lambda: 1, said.append)
    try_to("divide", lambda: {}[()], said.append)
    assert said == ["could not draw it: no room for the figure", "could not divide: ()"]
