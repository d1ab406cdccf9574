"""TensorBoard and Weights & Biases show what the log has, also over several launches."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.watched import STEPS, configuration
from train import run
from train.observe import trackers
from train.observe.metrics import read_log


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_has_what_the_log_has_and_no_step_twice(watched):
    shown = scalars(watched.output / "tensorboard")
    records = read_log(watched.output / "metrics.jsonl")
    for tag, name in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("train/tokens_per_second", "tokens_per_second"),
        ("held_out/loss", "held_out_loss"),
        ("held_out/web_loss", "held_out_web_loss"),
    ):
        expected = [(r["step"], r[name]) for r in records if name in r]
        assert [step for step, _ in shown[tag]] == [step for step, _ in expected]
        np.testing.assert_allclose([v for _, v in shown[tag]], [v for _, v in expected], rtol=1e-6)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, sum(STEPS) + 1))
    assert sum(values[-1][1] for tag, values in shown.items() if tag.startswith("goodput/")) == pytest.approx(1.0)
    assert len(list((watched.output / "tensorboard").iterdir())) == 2


def test_a_run_that_begins_anew_is_shown_once(tmp_path):
    for value in (1.0, 2.0, 3.0):
        log = trackers.TensorBoardLog(tmp_path)
        for step in range(3):
            log.write({"step": step, "held_out_loss": value})
        log.close()
    assert scalars(tmp_path)["held_out/loss"] == [(0, 3.0), (1, 3.0), (2, 3.0)]


class FakeWandb(types.ModuleType):
    """What we call of wandb."""

    def __init__(self, mode: str, logged_in: bool):
        super().__init__("wandb")
        self.begun, self.logged, self.metrics, self.finished = [], [], [], 0
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self._mode, self._logged_in = mode, logged_in

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self._mode))

    def login(self, prompt):
        assert not prompt  # Nobody sits in front of a cluster's job.
        return self._logged_in

    def init(self, **arguments):
        self.begun.append(arguments)
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, record):
        self.logged.append(record)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_the_same_run_each_time(tmp_path, monkeypatch):
    fake = FakeWandb("offline", False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers.check_wandb()
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        log = trackers.WandbLog("project", tmp_path / "run", {"seed": 3})
        log.write({"step": step, "loss": 2.5})
        log.write({"step": step, "held_out_web_loss": 2.0})
        log.close()
    first, second = fake.begun
    assert first == second
    assert (first["project"], first["name"], first["resume"], first["config"]) == (
        "project",
        "run",
        "allow",
        {"seed": 3},
    )
    assert fake.logged[:2] == [{"step": 1, "train/loss": 2.5}, {"step": 1, "held_out/web_loss": 2.0}]
    assert ("*", "step") in fake.metrics
    assert fake.finished == 2


def test_weights_and_biases_that_cannot_work_are_told_before_any_work(material, tmp_path, monkeypatch):
    config = configuration(material, tmp_path / "run", wandb_project="p")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("online", False))
    with pytest.raises(InputError, match=r"nobody is logged in to Weights & Biases\. Run `wandb login`"):
        run.pretrain(config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb is not installed: pip install 'qwen-jax\[wandb\]'"):
        run.pretrain(config)
    assert not (tmp_path / "run").exists()
    fake = FakeWandb("online", True)
    monkeypatch.setattr(fake, "init", lambda **_: (_ for _ in ()).throw(fake.errors.Error("no such entity")))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers.check_wandb()
    with pytest.raises(InputError, match="no such entity"):
        trackers.WandbLog("p", tmp_path, {})


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_offline_for_real(tmp_path, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONFIG_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    trackers.check_wandb()
    log = trackers.WandbLog("project", tmp_path, {"seed": 3})
    log.write({"step": 1, "loss": 2.5})
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
