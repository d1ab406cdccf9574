"""Resuming with another configuration: what is an error, what is told and recorded, and what is compiled once."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qwen_jax.errors import InputError
from tests.helpers.runs import MODEL, configuration, final_weights, launches, losses, numbers, saved_steps, stop_after
from train import launch as launching
from train import run
from train.config import Stage, set_fields
from train.observe.goodput import compilation
from train.optimizer import Schedule


@pytest.fixture(scope="module")
def stopped(material: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of a run that was stopped in the middle of its first stage, at its end, and in its second one."""
    folders = {}
    for at in (4, 6, 8):
        folders[at] = tmp_path_factory.mktemp("runs") / f"stopped-{at}"
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, at)
            assert run.pretrain(configuration(material, folders[at]))
    return folders


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (4, "stages.0.rope_theta=5e4", "stage 1, which has begun, had rope_theta 10000 and now has 50000"),
        (6, "stages.0.rope_theta=5e4", "stage 1, which has begun, had rope_theta 10000 and now has 50000"),
        (8, "stages.1.rope_theta=2e6", r"stage 2, which has begun, had rope_theta 1e\+06 and now has 2e\+06"),
        (8, "stages.1.rope_theta=null", r"stage 2, which has begun, had rope_theta 1e\+06 and now has 10000"),
        (8, "stages.0.rope_theta=5e4", "stage 1, which has begun, had rope_theta 10000 and now has 50000"),
        (4, "model.rope_theta=5e4", "another model: rope_theta was 10000.0 and is now 50000.0"),
        (4, "stages.0.batch_size=8", "stage 1: batch_size was 4 and is now 8"),
        (4, "seed=1", "seed was 0 and is now 1"),
    ],
)
def test_what_the_steps_taken_depend_on_may_not_change(
    material: Path, stopped: dict[int, Path], at: int, change: str, message: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped[at].rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        run.pretrain(set_fields(configuration(material, stopped[at]), change))
    assert {path: path.stat().st_mtime_ns for path in stopped[at].rglob("*") if path.is_file()} == before


def test_a_base_of_a_stage_that_has_not_begun_may_change(
    material: Path, stopped: dict[int, Path], tmp_path: Path
) -> None:
    shutil.copytree(stopped[6], tmp_path / "run")
    out = io.StringIO()
    run.pretrain(set_fields(configuration(material, tmp_path / "run"), "stages.1.rope_theta=2e6"), Console(file=out))
    assert launches(tmp_path / "run")[-1]["changed"] == {"stages.1.rope_theta": [1e6, 2e6]}


def test_all_else_may_change_and_is_told_and_recorded(material: Path, stopped: dict[int, Path], tmp_path: Path) -> None:
    """Learning rate, schedule, betas, decay, dtype: in the middle of a stage."""
    shutil.copytree(stopped[4], tmp_path / "run")
    # A record that was cut when the disk was full does not hide the last whole one.
    with (tmp_path / "run" / "launches.jsonl").open("a") as file:
        file.write('{"time": "2026\n')
    changes = {
        "stages.0.schedule.steps": (6, 7),
        "stages.0.schedule.learning_rate": (0.01, 0.02),
        "optimizer.beta2": (0.95, 0.99),
        "optimizer.weight_decay": (0.1, 0.2),
        "step.dtype": ("float32", "bfloat16"),
    }
    config = configuration(material, tmp_path / "run")
    config = set_fields(config, *(f"{path}={new}" for path, (_, new) in changes.items()))
    out = io.StringIO()
    assert not run.pretrain(config, Console(file=out, width=200))
    told = [line for line in out.getvalue().splitlines() if line.startswith("changed since the last launch: ")]
    assert sorted(line.removeprefix("changed since the last launch: ") for line in told) == sorted(
        f"{path} {old} -> {new}" for path, (old, new) in changes.items()
    )
    import json

    last = json.loads((tmp_path / "run" / "launches.jsonl").read_text().splitlines()[-1])
    assert last["changed"] == {path: list(values) for path, values in changes.items()}
    assert len(losses(tmp_path / "run")) == 11
    # The same again has changed nothing.
    out = io.StringIO()
    assert not run.pretrain(config, Console(file=out, width=200))
    assert "changed" not in out.getvalue()


def test_files_among_the_checkpoints_are_ignored(material: Path, stopped: dict[int, Path], tmp_path: Path) -> None:
    for name in ("run", "plain"):
        shutil.copytree(stopped[4], tmp_path / name)
    folder = tmp_path / "run" / "checkpoints"
    for name in ("2", "5", "9", "99", "notes.txt", "-1", "x"):
        (folder / name).write_text("mine")
    for name in ("run", "plain"):
        assert not run.pretrain(configuration(material, tmp_path / name))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "plain")
    kept = [path for path in folder.iterdir() if path.is_dir()]
    assert sorted(path.name for path in kept) == sorted(map(str, saved_steps(tmp_path / "plain")))
    # All are there still; the one in the way of a checkpoint has another name. Nothing is copied into checkpoints.
    names = {path.name for path in folder.iterdir() if path.is_file() and path.read_text() == "mine"}
    assert names == {"2", "5", "9.file", "99", "notes.txt", "-1", "x"}
    plain = {path.name for path in (tmp_path / "plain" / "checkpoints" / "10").iterdir()}
    assert {path.name for path in (folder / "10").iterdir()} == plain


def test_a_learning_rate_that_ruins_the_weights_leaves_no_ruined_checkpoint(
    material: Path, stopped: dict[int, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(stopped[4], output)
    config = set_fields(configuration(material, output), "stages.0.schedule.steps=40", "checkpoints.every=1")
    with pytest.raises(InputError) as caught:
        run.pretrain(set_fields(config, "stages.0.schedule.learning_rate=1e30", "loop.max_skipped=4"))
    told = str(caught.value)
    assert "4 steps up to step 9 were skipped" in told
    assert "Step 5 ruined the weights" in told
    assert "that of step 5" in told or "step 5 has these weights and is kept as ruined-5" in told
    assert "unharmed" not in told
    # What is left is sound, and the run goes on from it.
    assert saved_steps(output) == [3, 4]
    for step in saved_steps(output):
        for weights in final_weights(output, step)["layers"]["attention"]["q"].values():
            assert np.abs(weights).max() < 10
    config = set_fields(config, "stages.0.schedule.steps=7")
    assert not run.pretrain(config)
    assert all(np.isfinite(losses(output)))
    assert len(losses(output)) == 11


@pytest.mark.parametrize("like", [True, False])
def test_stages_that_are_alike_compile_once(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, like: bool
) -> None:
    """Another mixture and schedule need no other program; another RoPE base does."""
    stages = (
        Stage(Schedule(3, 1e-2), 16, 4, {"a": 1}),
        Stage(Schedule(3, 1e-3, schedule="wsd"), 16, 4, {"a": 1, "b": 3}, rope_theta=None if like else 1e6),
    )
    made, compiled = [], []
    make_train_step = launching.make_train_step

    def noted(*args):
        made.append(args)
        step = make_train_step(*args)

        def train_step(state, batch):
            before = compilation().programs
            result = step(state, batch)
            compiled.append(compilation().programs - before)
            return result

        return train_step

    monkeypatch.setattr(launching, "make_train_step", noted)
    config = dataclasses.replace(configuration(material, tmp_path / "run"), stages=stages, model=MODEL)
    assert not run.pretrain(config)
    assert len(losses(tmp_path / "run")) == 6
    assert len(made) == (1 if like else 2)
    assert [count > 0 for count in compiled] == [True, False, False, not like, False, False]
