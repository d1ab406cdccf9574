"""The small sweep from grid to regret, with losses of a formula in place of training."""

import json
import math
import re
import signal
import time
from pathlib import Path

import pytest

from experiments.scaling import small_sweep
from experiments.scaling.minutes import Rates, plan_text
from experiments.scaling.setup import SETUPS
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from tests.helpers.runs import print_seed
from tests.train.scaling.fake_runs import FakeTrainer
from train.config import RunConfig, load
from train.scaling.run_sweep import read_results
from train.scaling.sweep import Run, make_plan


@pytest.mark.parametrize(("size", "least"), [("gpu", 54), ("second", 30)])
def test_the_law_of_a_known_surface_picks_for_a_larger_model(tmp_path: Path, size: str, least: int) -> None:
    """The sizes of the GPU, on a noisy surface whose optimum follows power laws: regret below 0.5%.

    A restart trains nothing and gives the same results.
    """
    rng = print_seed()
    a, b = math.exp(rng.uniform(-0.7, 0.7)), math.exp(rng.uniform(-0.7, 0.7))

    def loss(config: RunConfig) -> float:
        stage, params = config.stages[0], config.model.num_params()["active"]
        tokens = stage.steps * stage.batch_size * stage.length
        rate, batch = a * 1.79 * params**-0.713 * tokens**0.307, b * 0.9 * tokens**0.571
        x = math.log(stage.schedule.learning_rate / rate)
        y = math.log(stage.batch_size * stage.length / batch)
        smooth = 1.7 + 400 * params**-0.34 + 400 * tokens**-0.37
        return smooth * (1 + 0.012 * x * x + 0.008 * y * y - 0.008 * x * y) + float(rng.normal(0, 2e-3))

    (tmp_path / "data.json").write_text("{}")
    setup, trainer = SETUPS[size], FakeTrainer(loss)
    results = small_sweep.experiment(tmp_path, setup, 100, trainer)
    print({key: results[key] for key in ("prediction", "regret", "best")})
    assert len(read_results(tmp_path / "runs")) >= least
    assert results["ratio"] > 4
    assert results["within_half_a_percent"]
    assert results["regret"] < 0.005
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(to_json(results))
    for name in ("law.png", "valleys.png", "regret.png", "target.png", "law.json"):
        assert (tmp_path / name).stat().st_size > 1000
    # The run that was picked is the one that the file trains.
    pick = load(str(tmp_path / "predicted.py"))
    assert pick.stages[0].schedule.learning_rate == results["prediction"]["learning_rate"]
    assert Path(pick.output).name in trainer.trained
    again = small_sweep.experiment(tmp_path, setup, 100, FakeTrainer(stop_after=0))
    changing = {"pilot", "runs", "target"}  # They have seconds.
    for name in results.keys() - changing:
        assert again[name] == json.loads(to_json(results[name])), name


def log(run: Run, falls_at: float) -> None:
    """Writes the log of a run whose loss falls by 0.6 at a share of its steps, besides 0.25 in its second half."""
    steps = run.config.ends[-1]
    records: list[dict[str, float]] = [{"step": 0, "held_out_loss": 7.0, "held_out_text_loss": 7.0}]
    for step in range(1, steps + 1, max(steps // 200, 1)):
        records.append({"step": step, "loss": 2.5 + 0.5 * (1 - step / steps) + 0.6 * (step < falls_at * steps)})
    records.append({"step": steps, "held_out_loss": 2.5, "held_out_text_loss": 2.5})
    folder = Path(run.config.output)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records))


def pilot(folder: Path) -> list[Run]:
    """The runs of the pilot of the second sweep."""
    return list(make_plan(SETUPS["second"].pilot_sweep(folder), folder / "runs", {}).runs)


def test_a_pilot_leaves_out_the_cells_near_the_fall_of_the_loss(tmp_path: Path) -> None:
    """A fall in the last 40% of one seed is enough; where fewer than three cells are left, no more is run."""
    rng = print_seed()
    (tmp_path / "data.json").write_text("{}")
    runs, setup = pilot(tmp_path), SETUPS["second"]
    cells = list(dict.fromkeys((run.cell.name, run.cell.tokens) for run in runs))
    assert len(runs) == 2 * len(cells) == 8
    late = cells[rng.integers(4)]
    for run in runs:
        near = (run.cell.name, run.cell.tokens) == late and run.seed == 1
        log(run, rng.uniform(0.6, 0.85) if near else rng.uniform(0.05, 0.4))
    results = small_sweep.experiment(tmp_path, setup, 100, FakeTrainer())
    assert results["judged"]["left_out"] == [list(late)]
    assert set(results["judged"]["scatter"].values()) == {0.0}
    rows = read_results(tmp_path / "runs")
    for seed in (0, 1):
        assert {(row["size"], row["tokens"]) for row in rows if row["seed"] == seed} == {*cells} - {late}

    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "data.json").write_text("{}")
    for run in pilot(tmp_path / "two"):
        log(run, 0.7 if (run.cell.name, run.cell.tokens) in cells[:2] else 0.2)
    trainer = FakeTrainer()
    with pytest.raises(InputError, match=r"fewer than 3 cells are left for a law. Give these cells more tokens"):
        small_sweep.experiment(tmp_path / "two", setup, 100, trainer)
    assert trainer.trained == []


def test_the_law_of_the_second_sweep_waits_for_all_of_its_runs(tmp_path: Path) -> None:
    """Time that is up leaves a sweep that goes on, and no prediction from a part of the runs."""
    (tmp_path / "data.json").write_text("{}")
    stopped = small_sweep.experiment(tmp_path, SETUPS["second"], 0, FakeTrainer())
    assert "prediction" not in stopped
    assert not (tmp_path / "law.json").exists()
    again = small_sweep.experiment(tmp_path, SETUPS["second"], 100, FakeTrainer())
    assert again["prediction"]["tokens"] == 32_000_000


def test_the_plan_of_the_second_sweep(tmp_path: Path) -> None:
    """Twice the tokens of the first sweep's cells or more, batches from 1,024, two seeds first, under half an hour."""
    first, setup = SETUPS["gpu"], SETUPS["second"]
    sweep = setup.sweep(tmp_path)
    runs = make_plan(sweep, tmp_path, {}).runs
    assert min(run.cell.tokens for run in runs) == 2 * max(tokens for _, tokens in first.cells) == 32_000_000
    assert sorted({(run.cell.name, run.cell.tokens) for run in runs}) == sorted(sweep.pairs())
    assert len({run.cell.model for run in runs}) < len(first.shapes)
    assert min(run.batch_tokens for run in runs) == 1024
    assert max(run.config.stages[0].steps for run in runs) <= 32_000
    # The first seed of the pilot is a run of the sweep.
    names = {run.name for run in runs}
    assert all((run.name in names) == (run.seed == 0) for run in pilot(tmp_path))
    assert sorted({run.seed for run in pilot(tmp_path)}) == [0, 1]
    assert setup.model(*setup.target).num_params()["active"] > 4 * max(
        run.cell.model.num_params()["active"] for run in runs
    )
    text = plan_text(setup, tmp_path)
    print(text)
    assert text.count("32,000,000 tokens: 5 runs with batches of 1,024 to 16,384") == 2
    assert text.count("64,000,000 tokens: 4 runs with batches of 8,192 to 16,384") == 2
    minutes = int(re.search(r"all: up to (\d+) minutes", text)[1])  # type: ignore[index]
    assert 15 < minutes < 30
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_gives_the_times_that_it_is_made_of() -> None:
    """Of the recorded runs themselves, by steps and FLOPs, the rates give the recorded seconds."""
    record = json.loads(Path(small_sweep.__file__).with_name("small_sweep.json").read_text())
    rates = Rates.of(record)
    assert rates.seconds_per_step > 0
    assert rates.seconds_per_flop > 0
    for phase in ("runs", "target"):
        steps = sum(row["steps"] for row in record["rows"][phase])
        seconds = steps * rates.seconds_per_step + record[phase]["flops"] * rates.seconds_per_flop
        assert math.isclose(seconds, record[phase]["seconds"], rel_tol=1e-9)


@pytest.mark.parametrize(("name", "regret"), [("small_sweep", 0.0276), ("small_sweep_second", 0.0042)])
def test_recorded_regrets_are_those_of_the_recorded_losses(name: str, regret: float) -> None:
    """What small_sweep.md says of each pick follows from the runs in its record."""
    record = json.loads(Path(small_sweep.__file__).with_name(f"{name}.json").read_text())
    runs, said = record["rows"]["target"], record["prediction"]
    (pick,) = (r for r in runs if all(r[key] == said[key] for key in ("learning_rate", "batch_tokens")))
    found = pick["loss"] / min(r["loss"] for r in runs if r["status"] == "ok") - 1
    assert math.isclose(found, record["regret"], rel_tol=1e-9)
    assert abs(found - regret) < 5e-5


def test_time_that_is_up_ends_what_is_done_inside_and_no_more() -> None:
    begin = time.perf_counter()
    with small_sweep.within(0.05):
        while True:
            time.sleep(0.01)
    with small_sweep.within(60):
        pass
    assert time.perf_counter() - begin < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
