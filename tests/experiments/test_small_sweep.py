"""The small sweep from grid to regret, with losses of a formula in place of training."""

import json
import math
import signal
import time
from pathlib import Path

from experiments.scaling import small_sweep
from experiments.scaling.setup import SETUPS
from qwen_jax.files import to_json
from tests.helpers.runs import print_seed
from tests.train.scaling.fake_runs import FakeTrainer
from train.config import RunConfig, load
from train.scaling.run_sweep import read_results


def test_the_law_of_a_known_surface_picks_for_a_larger_model(tmp_path: Path) -> None:
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
    setup, trainer = SETUPS["gpu"], FakeTrainer(loss)
    results = small_sweep.experiment(tmp_path, setup, 100, trainer)
    print({key: results[key] for key in ("prediction", "regret", "best")})
    assert len(read_results(tmp_path / "runs")) >= 54
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
    changing = ("runs", "target")  # They have seconds.
    for name in results.keys() - changing:
        assert again[name] == json.loads(to_json(results[name])), name


def test_time_that_is_up_ends_what_is_done_inside_and_no_more() -> None:
    begin = time.perf_counter()
    with small_sweep.within(0.05):
        while True:
            time.sleep(0.01)
    with small_sweep.within(60):
        pass
    assert time.perf_counter() - begin < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
