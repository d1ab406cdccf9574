"""Sweeps: complete tables, restarts, budgets, diverged runs, the sequential design, and the runs that are written."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.cli import main
from qwen_jax.config import MoE
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.data_sets import make_rows
from tests.helpers.runs import MODEL, make_material, print_seed, without
from tests.train.scaling.fake_runs import SIZES, FakeTrainer, base, loss_of, optimum, sweep
from train.config import CAME_LATER, RunConfig, as_json, load
from train.loop import LoopConfig
from train.observe.goodput import compilation
from train.observe.metrics import flops_per_token, read_log
from train.run import pretrain
from train.scaling.design import next_points, quadratic_optimum
from train.scaling.run_config import configure
from train.scaling.run_sweep import collect, read_results, run_sweep, write_sweep
from train.scaling.runs import COMPUTE
from train.scaling.sweep import load_sweep, make_plan


def table(folder: Path) -> bytes:
    return (folder / "results.parquet").read_bytes()


def test_a_grid_has_every_combination_once_in_the_table(tmp_path: Path) -> None:
    """Columns are those of the models and runs, computed here again."""
    asked, trainer = sweep(seeds=(0, 3)), FakeTrainer()
    outcome = run_sweep(asked, tmp_path, trainer)
    rows = read_results(tmp_path)
    assert outcome.finished
    assert len(rows) == len(trainer.trained) == 2 * 2 * 3 * 3 * 2
    keys = {(r["size"], r["tokens"], r["learning_rate"], r["batch_tokens"], r["seed"]) for r in rows}
    assert len(keys) == len(rows)
    for row in rows:
        model = SIZES[row["size"]]
        steps = round(row["tokens"] / row["batch_tokens"])
        assert row["params"] == row["active_params"] == model.num_params()["active"]
        assert row["total_params"] == model.num_params()["total"]
        assert (row["steps"], row["warmup_steps"], row["length"]) == (steps, round(steps / 10), 16)
        assert row["model_flops"] == flops_per_token(model, 16) * steps * row["batch_tokens"]
        assert row["flops"] == 6 * row["params"] * row["tokens"]
        assert row["status"] == "ok"
        assert row["loss"] == row["loss_held"] > 1.8
    # The same call trains nothing.
    assert run_sweep(asked, tmp_path, FakeTrainer(stop_after=0)).finished


@pytest.mark.parametrize("design", ["grid", "sequential"])
def test_a_sweep_that_is_killed_and_restarted_gives_the_same_table(tmp_path: Path, design: str) -> None:
    rng = print_seed()
    asked = sweep(design=design, learning_rates=(5e-4, 1e-3, 2e-3))
    whole = FakeTrainer()
    run_sweep(asked, tmp_path / "whole", whole)
    trained: list[str] = []
    while len(trained) < len(whole.trained):
        trainer = FakeTrainer(stop_after=int(rng.integers(1, 20)))
        with contextlib.suppress(SystemExit):  # Of a run that a signal has stopped.
            run_sweep(asked, tmp_path / "parts", trainer)
        trained += trainer.trained
    run_sweep(asked, tmp_path / "parts", FakeTrainer(stop_after=0))
    assert trained == whole.trained
    assert table(tmp_path / "parts") == table(tmp_path / "whole")


def test_a_run_that_diverges_is_a_row_without_a_loss_and_not_run_again(tmp_path: Path) -> None:
    def loss(config: RunConfig) -> float:
        rate = config.stages[0].schedule.learning_rate
        return math.inf if rate > 3e-3 else math.nan if rate > 1.5e-3 and config.stages[0].batch_size == 4 else 5.0

    asked = sweep()
    outcome = run_sweep(asked, tmp_path, FakeTrainer(loss))
    rows = read_results(tmp_path)
    bad = [row for row in rows if row["status"] == "diverged"]
    assert len(rows) == 36
    assert len(bad) == 4 * (3 + 1)
    assert all(row["loss"] is None and row["loss_held"] is None for row in bad)
    assert "4 diverged" in outcome.to_text()
    assert run_sweep(asked, tmp_path, FakeTrainer(stop_after=0)).finished


@pytest.mark.parametrize("changed", ["data.a", "held_out.held", "tokenizer"])
def test_a_sweep_is_not_resumed_on_other_data(tmp_path: Path, changed: str) -> None:
    """Data is known by its content: a copy at the same path is the same, another content is an error before training.

    One data set is built, the held-out one is a file of raw documents, one is on another machine.
    """
    make_material(tmp_path)
    raw = tmp_path / "documents.txt"
    raw.write_text("some text")
    run = base(tmp_path)
    run = dataclasses.replace(run, data={**run.data, "b": "elsewhere"}, held_out={"held": str(raw)})
    asked, folder = sweep(base=run, seeds=(0,)), tmp_path / "sweep"
    with contextlib.suppress(SystemExit):
        run_sweep(asked, folder, FakeTrainer(stop_after=3))
    before = table(folder)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "copy").rename(tmp_path / "a")
    with contextlib.suppress(SystemExit):
        run_sweep(asked, folder, FakeTrainer(stop_after=0))
    if changed == "data.a":
        shutil.rmtree(tmp_path / "a")
        tokenizer = load_tokenizer(tmp_path / "tokenizer").fingerprint()
        make_rows(tmp_path / "a", print_seed(), 12, 16, tokenizer=tokenizer)
    elif changed == "tokenizer":
        shutil.rmtree(tmp_path / "tokenizer")
        train_bpe(["other words " * 9], 290).save(tmp_path / "tokenizer")
    else:
        raw.write_text("some text.")
    for call in (lambda: run_sweep(asked, folder, FakeTrainer()), lambda: write_sweep(asked, folder)):
        with pytest.raises(
            InputError, match=rf"made from other data: the content of {re.escape(changed)} has the hash"
        ):
            call()
    assert table(folder) == before


def test_another_error_ends_the_sweep(tmp_path: Path) -> None:
    def refuse(config: RunConfig) -> int:
        raise InputError("The data is missing.")

    with pytest.raises(InputError, match="data is missing"):
        run_sweep(sweep(), tmp_path, refuse)


def test_the_budget_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    needed = sum(run.flops for run in make_plan(sweep(), tmp_path, {}).runs)
    with pytest.raises(InputError, match=r"36 runs of the grid have .* FLOPs, more than the budget"):
        run_sweep(sweep(flops=needed * 0.999), tmp_path / "none", FakeTrainer())
    assert not (tmp_path / "none").exists()
    assert len(run_sweep(sweep(flops=needed * 1.001), tmp_path / "all", FakeTrainer()).plan.runs) == 36
    # A sequential design spends what is left, and never more.
    rates = (2e-4, 4e-4, 8e-4)
    needed = make_plan(sweep(learning_rates=rates, design="sequential"), tmp_path, {}).flops
    outcome = run_sweep(
        sweep(learning_rates=rates, design="sequential", flops=1.1 * needed), tmp_path / "s", FakeTrainer()
    )
    assert needed < outcome.plan.flops <= 1.1 * needed
    assert any("left out" in note for note in outcome.plan.notes)


def test_a_sequential_design_brackets_the_optimum_of_a_known_surface(tmp_path: Path) -> None:
    """From a grid that is off by up to a factor of ten on both axes.

    The best run is within a step of the optimum in each cell, so its loss is within 0.05 x (ln 2 / 2)^2 + ... of it;
    the quadratic through the runs finds the optimum itself, since the surface is one.
    """
    rng = print_seed()
    shift = math.exp(rng.uniform(-2, 2))
    rates = tuple(float(f"{3.2 * 30_000**-0.7 * shift * factor:.4g}") for factor in (0.5, 1, 2))
    smallest = int(2 ** rng.integers(5, 9))
    batches = (smallest, 2 * smallest, 4 * smallest)
    asked = sweep(design="sequential", learning_rates=rates, batches=batches)
    noisy = lambda config: loss_of(config) + float(rng.normal(0, 2e-4))  # noqa: E731
    outcome = run_sweep(asked, tmp_path, FakeTrainer(noisy))
    assert outcome.finished
    print(outcome.to_text())
    assert outcome.to_text().count("bracketed") == 4
    for cell in {run.cell.name: run.cell for run in outcome.plan.runs}.values():
        runs = [run for run in outcome.plan.runs if run.cell == cell]
        assert len(runs) <= asked.most_runs
        rate, batch = optimum(cell.model.num_params()["active"], cell.tokens)
        best = min(runs, key=lambda run: outcome.losses[run.name])
        assert abs(math.log2(best.learning_rate / rate)) < 1
        assert abs(math.log2(best.batch_tokens / batch)) < 1.01
    # No more than a few runs beyond the grid where the grid has the optimum.
    assert len(outcome.plan.runs) < 4 * 24


def test_the_design_stays_within_batches_that_can_be_run_and_follows_the_edge(tmp_path: Path) -> None:
    """A surface that falls towards small batches ends at one row; one that only diverges goes to smaller rates."""
    falls = lambda config: 3.0 + 0.1 * math.log(config.stages[0].batch_size)  # noqa: E731
    asked = sweep(design="sequential", sizes={"one": MODEL}, tokens=(32_000,))
    outcome = run_sweep(asked, tmp_path / "falls", FakeTrainer(falls))
    assert min(run.batch_tokens for run in outcome.plan.runs) == 16
    diverges = lambda config: math.inf if config.stages[0].schedule.learning_rate > 6e-4 else 3.0  # noqa: E731
    outcome = run_sweep(asked, tmp_path / "diverges", FakeTrainer(diverges))
    assert min(outcome.losses.values()) == 3.0
    assert outcome.finished


def test_a_cell_begins_with_the_points_that_are_asked_for(tmp_path: Path) -> None:
    """Points may lie outside the grid; a cell leaves out those with too many steps, and is refused without any."""
    asked = sweep(design="sequential", start=((-1, 0), (1, 2), (0.5, 1)), most_steps=500)
    found: dict[int, set[tuple[float, int]]] = {}
    for run in make_plan(asked, tmp_path, {}).runs:
        found.setdefault(run.cell.tokens, set()).add((run.learning_rate, run.batch_tokens))
    assert found == {32_000: {(5e-4, 64), (2e-3, 256), (1.414e-3, 128)}, 64_000: {(2e-3, 256), (1.414e-3, 128)}}
    outcome = run_sweep(asked, tmp_path / "s", FakeTrainer())
    assert outcome.finished
    assert max(run.config.stages[0].steps for run in outcome.plan.runs) <= 500
    with pytest.raises(InputError, match=r"No point of the cell one, 64,000 tokens, can be run: .* 10 steps to 500"):
        make_plan(dataclasses.replace(asked, start=((0, 0),)), tmp_path, {})
    grid = make_plan(sweep(most_steps=500), tmp_path, {}).runs
    assert {(run.cell.tokens, run.batch_tokens) for run in grid} == {
        *((32_000, batch) for batch in (64, 128, 256)),
        *((64_000, batch) for batch in (128, 256)),
    }


def test_the_quadratic_is_exact_on_a_quadratic() -> None:
    rng = print_seed()
    centre, a = rng.uniform(0, 2, 2), rng.normal(size=(2, 2))
    curvature = a @ a.T + 0.3 * np.eye(2)
    # So flat that all runs are near the best one.
    curvature *= 1e-3 / np.linalg.eigvalsh(curvature)[-1]
    losses = {}
    for rate in (0.0, 0.5, 1.0, 2.0):
        for batch in (0, 1, 2):
            d = np.array([rate, batch]) - centre
            losses[rate, batch] = 3 + float(d @ curvature @ d)
    assert quadratic_optimum(losses) == pytest.approx(tuple(centre), abs=1e-6)
    # Along one axis alone.
    line = {(float(i), 0): 2 + 0.1 * (i - 1.3) ** 2 for i in range(4)}
    assert quadratic_optimum(line) == pytest.approx((1.3, 0.0))
    # A saddle has no minimum: the neighbours of the best are asked for.
    saddle = {(float(i), j): 3 + 0.01 * (i - 1) ** 2 - 0.01 * (j - 1) ** 2 for i in range(3) for j in range(3)}
    assert quadratic_optimum(saddle) is None
    assert next_points(saddle, lambda point: True) == [(1.0, -1)]
    assert next_points({(0.0, 0): math.inf, (1.0, 0): math.inf}, lambda point: True) == [(-1.0, 0)]


def test_moe_shapes_are_runs_of_their_own(tmp_path: Path) -> None:
    shapes = {"dense": None, "e8": MoE(8, 2, 32, 32), "e4": MoE(4, 1, 64, 64)}
    run_sweep(sweep(moe=shapes, sizes={"one": MODEL}, batches=(64,)), tmp_path, FakeTrainer())
    rows = read_results(tmp_path)
    assert {(r["size"], r["experts"], r["experts_per_token"], r["granularity"]) for r in rows} == {
        ("one-dense", 0, 0, None),
        ("one-e8", 8, 2, MODEL.intermediate_size / 32),
        ("one-e4", 4, 1, MODEL.intermediate_size / 64),
    }
    assert all((row["total_params"] > row["active_params"]) == (row["experts"] > 0) for row in rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batches": (64, 100)}, "multiples of 16 tokens"),
        ({"batches": (64, 64)}, "each once"),
        ({"learning_rates": ()}, "one value or more"),
        ({"learning_rates": (1e-3, -1e-3)}, "must be positive"),
        ({"learning_rates": (1e-3, 2e-3, 3e-3), "design": "sequential"}, "geometric progression"),
        ({"batches": (64, 160), "design": "sequential"}, "whole ratio"),
        ({"tokens": (1000,)}, "fewer than 10 steps"),
        ({"cells": (("three", 32_000),)}, "no such size"),
        ({"warmup": 1.0}, "share of the steps"),
        ({"base": base(held_out={})}, "held-out data"),
        ({"design": "random"}, "grid or sequential"),
        ({"most_steps": 9}, "most_steps"),
        ({"start": ((0, 0), (0, 0))}, "each point once"),
        ({"start": ((0, 0),), "learning_rates": (1e-3, 2e-3, 3e-3)}, "geometric progression"),
    ],
)
def test_sweeps_that_cannot_be_run_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        sweep(**changes)


def test_a_folder_takes_more_runs_of_the_same_base_only(tmp_path: Path) -> None:
    run_sweep(sweep(), tmp_path, FakeTrainer())
    # A folder of an earlier version lacks the fields that came later.
    record = json.loads((tmp_path / "sweep.json").read_text())
    for path in CAME_LATER:
        without(record["base"], path)
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    more = FakeTrainer()
    run_sweep(sweep(learning_rates=(1e-3, 2e-3, 4e-3, 8e-3), sizes=SIZES), tmp_path, more)
    assert len(more.trained) == 3 * 2 * 4 * 3 - 36
    with pytest.raises(InputError, match=r"sweep with another base.seed"):
        run_sweep(sweep(base=base(seed=4)), tmp_path, FakeTrainer())
    with pytest.raises(InputError, match=r"another models.one.num_layers"):
        run_sweep(sweep(sizes={"one": SIZES["two"]}), tmp_path, FakeTrainer())


def test_written_runs_are_the_planned_ones_and_are_collected(tmp_path: Path) -> None:
    """Each file loads to the run's own configuration; results that jobs leave bring the next round."""
    asked = sweep(design="sequential", learning_rates=(2e-4, 4e-4, 8e-4), base=base(tmp_path / "material"))
    outcome = write_sweep(asked, tmp_path)
    commands = (tmp_path / "commands.txt").read_text().splitlines()
    assert len(commands) == len(outcome.waiting) == 36
    assert "#SBATCH --array=1-36\n" in (tmp_path / "array.sh").read_text()
    assert subprocess.run(["bash", "-n", tmp_path / "array.sh"], check=False).returncode == 0
    for command, run in zip(commands, outcome.plan.runs, strict=True):
        words = command.split()
        assert words[:4] == ["qwen-jax", "train", "pretrain", "--config"]
        config = load(words[4])
        assert as_json(config) == as_json(run.config)
        FakeTrainer()(config)
    after = write_sweep(asked, tmp_path)
    assert not after.finished
    assert 0 < len(after.waiting) < 36
    assert len((tmp_path / "commands.txt").read_text().splitlines()) == len(after.waiting)
    assert len(read_results(tmp_path)) == 36
    # Trained here from now on, the rest is the same.
    assert run_sweep(asked, tmp_path, FakeTrainer()).finished
    run_sweep(asked, tmp_path / "here", FakeTrainer())
    assert table(tmp_path) == table(tmp_path / "here")


def test_a_file_gives_a_sweep_and_fields_can_be_changed(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    file = tmp_path / "file.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(root)!r})\nfrom tests.train.scaling import fake_runs\n"
        "def config():\n    return fake_runs.sweep()\ndef other():\n    return 3\n"
    )
    assert load_sweep(str(file), ["flops=5e12", "base.seed=7"]) == sweep(flops=5e12, base=base(seed=7))
    with pytest.raises(InputError, match=r"must return a train.scaling.sweep.Sweep"):
        load_sweep(f"{file}:other")


def test_a_predicted_run_has_whole_rows_and_keeps_its_shares() -> None:
    run = configure(base(), learning_rate=3e-4, batch_tokens=777, tokens=1e5, model=SIZES["two"], output="there")
    stage = run.stages[0]
    assert (stage.batch_size, stage.steps, stage.schedule.warmup_steps) == (49, 128, 13)
    assert (stage.schedule.learning_rate, run.model, run.output) == (3e-4, SIZES["two"], "there")
    with pytest.raises(InputError, match="positive"):
        configure(base(), learning_rate=0, batch_tokens=777, tokens=1e5)


def test_a_predicted_run_needs_a_batch_of_tokens_and_no_held_out_data() -> None:
    """Fewer tokens than one batch would be a run of more tokens than asked for."""
    alone = base(held_out={}, loop=LoopConfig(evaluate_every=0))
    assert configure(alone, learning_rate=1e-3, batch_tokens=64, tokens=640).stages[0].steps == 10
    with pytest.raises(InputError, match="less than a batch of 64"):
        configure(alone, learning_rate=1e-3, batch_tokens=64, tokens=63)


def law_file(folder: Path, counting: str = "with-head") -> Path:
    """A law of the formula of `fake_runs`."""
    law = {
        "law": "hyperparameters",
        "version": 1,
        "compute": COMPUTE,
        "parameters": {
            "learning_rate": {"coefficient": 3.2 / 3e4**0.3, "params": -0.7, "tokens": 0.3},
            "batch_tokens": {"coefficient": 240 / 3e4**0.5, "params": 0.0, "tokens": 0.5},
        },
        "counting": counting,
        "level": 0.9,
        "range": {"params": [1e4, 1e6], "tokens": [1e4, 1e6], "flops": [1e9, 1e13]},
    }
    (folder / "law.json").write_text(json.dumps(law))
    return folder / "law.json"


def config_file(folder: Path, function: str) -> Path:
    """A file for `--config` with what a function of `fake_runs` returns."""
    file = folder / f"{function}.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        f"from tests.train.scaling import fake_runs\ndef config():\n    return fake_runs.{function}()\n"
    )
    return file


def test_predict_writes_a_run_that_pretrain_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--law", str(law_file(tmp_path)), "--tokens", "48000", "--config", str(config_file(tmp_path, "base"))]
    command = ["scaling", "predict", *options, "--write", str(tmp_path / "run.py")]
    assert main(command) == 0
    rate, batch = optimum(MODEL.num_params()["active"], 48_000)
    stage = load(str(tmp_path / "run.py")).stages[0]
    assert stage.schedule.learning_rate == pytest.approx(rate)
    assert abs(stage.batch_size * 16 - batch) <= 8
    assert abs(stage.steps * stage.batch_size * 16 - 48_000) <= stage.batch_size * 8
    assert f"{rate:.4g}" in capsys.readouterr().out
    assert main([*command, "--params", "5e6"]) == 1
    assert "not 5,000,000" in capsys.readouterr().err
    assert main(["scaling", "predict", *options]) == 1


def test_the_command_writes_collects_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["scaling", "sweep", "--config", str(config_file(tmp_path, "sweep")), "--output", str(tmp_path / "out")]
    assert main([*command, "--write"]) == 0
    assert "sbatch" in capsys.readouterr().out
    for line in (tmp_path / "out" / "commands.txt").read_text().splitlines()[:5]:
        FakeTrainer()(load(line.split()[-1]))
    assert main([*command, "--collect", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ended"], said["waiting"], said["finished"]) == (5, 31, False)
    assert len(read_results(tmp_path / "out")) == 5
    assert main([*command, "--collect", "--write"]) == 1
    assert main([*command, "--collect", "--set", "flops=1"]) == 1
    assert "more than the budget" in capsys.readouterr().err


def test_learning_rates_and_lengths_share_programs_and_train_as_a_run_alone(tmp_path: Path) -> None:
    """The first run of a shape compiles, the others compile nothing; losses are those of `pretrain` by itself.

    The learning rate is read from a table rather than computed in the step, which rounds it otherwise: 1e-5 relative.
    """
    make_material(tmp_path / "m")
    asked = sweep(
        base=base(tmp_path / "m"), sizes={"one": MODEL}, tokens=(640, 1280), learning_rates=(1e-3, 4e-3), batches=(64,)
    )
    compiled = []
    lines = []
    compilation()

    def say(line: str) -> None:
        compiled.append(compilation().programs)
        lines.append(line)

    before = compilation().programs
    outcome = run_sweep(asked, tmp_path / "sweep", say=say)
    assert compiled[0] > before
    assert compiled == [compiled[0]] * 4
    # Each line says how far the sweep is, by runs and by work: the shorter runs are a third of it.
    shares = [re.search(r"\((\d) of 4 runs, (\d+)% of their FLOPs\)", line) for line in lines]
    assert [one and one.groups() for one in shares] == [("1", "17"), ("2", "33"), ("3", "67"), ("4", "100")]
    run = outcome.plan.runs[-1]
    pretrain(dataclasses.replace(run.config, output=str(tmp_path / "alone")))
    alone, shared = (
        [
            (r["step"], r.get("loss"), r.get("learning_rate"), r.get("held_out_loss"))
            for r in read_log(path / "metrics.jsonl")
        ]
        for path in (tmp_path / "alone", Path(run.config.output))
    )
    one, other = (np.array([[math.nan if x is None else x for x in r] for r in log]) for log in (alone, shared))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert collect(asked, tmp_path / "sweep").losses == outcome.losses
    assert len({*outcome.losses.values()}) == 4
    assert re.search(r"4 of 4|2 of 2", outcome.to_text())


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    """A folder with runs of one seed gives no results for another seed, and keeps them when seeds are added."""
    first, other, both = FakeTrainer(), FakeTrainer(), FakeTrainer()
    run_sweep(sweep(seeds=(0,)), tmp_path, first)
    run_sweep(sweep(seeds=(7,)), tmp_path, other)
    assert len(other.trained) == len(first.trained)
    assert not set(other.trained) & set(first.trained)
    assert run_sweep(sweep(seeds=(0, 7)), tmp_path, both).finished
    assert not both.trained


def test_runs_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    """Names that join to one, rates that agree in what a name shows, and cells that are given twice."""
    moe = MoE(num_experts=4, num_experts_per_tok=2, intermediate_size=16, shared_intermediate_size=16)
    joined = sweep(sizes={"one": SIZES["one"], "one-e4": SIZES["two"]}, moe={"e4": moe, "": None})
    for asked in (joined, sweep(learning_rates=(1e-3, 1.00001e-3))):
        with pytest.raises(InputError, match="Two runs of the sweep have the name"):
            make_plan(asked, tmp_path, {})
    with pytest.raises(InputError, match="one over another"):
        sweep(base=base(export=str(tmp_path / "weights")))
    for cells in ((), (("one", 32_000), ("one", 32_000))):
        with pytest.raises(InputError, match="cells must have one"):
            sweep(cells=cells)


def test_a_law_without_a_stated_counting_writes_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--law", str(law_file(tmp_path, "unstated")), "--config", str(config_file(tmp_path, "base"))]
    assert main(["scaling", "predict", *options, "--tokens", "48000", "--write", str(tmp_path / "run.py")]) == 1
    assert "--counting" in capsys.readouterr().err
    assert not (tmp_path / "run.py").exists()
