"""A small run with two stages, its data, and what it leaves behind: for tests that interrupt it or do it otherwise."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from tests.helpers.data_sets import make_rows
from train.config import RunConfig, Stage
from train.interrupt import Interruption
from train.loop import CheckpointConfig, LoopConfig
from train.observe.metrics import read_log
from train.optimizer import Schedule
from train.step import StepConfig

MODEL = dataclasses.replace(published("tiny"), vocab_size=1024, num_layers=1, rope_theta=1e4)


def make_material(folder: Path) -> Path:
    """A tokenizer, and data sets of two lengths."""
    tokenizer = train_bpe(["some text of no importance " * 9], 300)
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name, length in (("a", 16), ("b", 16), ("long", 32), ("held", 16)):
        make_rows(folder / name, rng, 12, length, tokenizer=tokenizer.fingerprint())
    return folder


def configuration(material: Path | str, output: Path | str, **changes: Any) -> RunConfig:
    """Two stages of 6 and 4 steps, in float32 on one device."""
    material = Path(material)
    config = RunConfig(
        output=str(output),
        model=MODEL,
        tokenizer=str(material / "tokenizer"),
        data={name: str(material / name) for name in ("a", "b", "long")},
        held_out={"held": str(material / "held")},
        stages=(
            Stage(Schedule(6, 1e-2, warmup_steps=2), 16, 4, {"a": 1, "b": 3}),
            Stage(Schedule(4, 1e-3, schedule="wsd"), 32, 2, {"long": 1}, rope_theta=1e6, accumulation=2),
        ),
        step=StepConfig(dtype="float32", remat="none"),
        loop=LoopConfig(evaluate_every=5),
        checkpoints=CheckpointConfig(every=3, keep_last=3),
    )
    return dataclasses.replace(config, **changes)


def config_file(path: Path, material: Path, output: Path) -> Path:
    """Writes a file for `--config` that gives `configuration(material, output)`."""
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[2])!r})\nfrom tests.helpers import runs\n"
        f"def config():\n    return runs.configuration({str(material)!r}, {str(output)!r})\n"
    )
    return path


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Runs see a SIGTERM after this step."""
    patch.setattr(Interruption, "_asked", lambda self, now: signal.SIGTERM if now == step else 0)


def numbers(output: Path | str) -> list[tuple[Any, ...]]:
    """The log without times: it must not depend on how a run was interrupted."""
    keys = "step", "loss", "grad_norm", "learning_rate", "weight", "skipped", "held_out_held_loss"
    records = [tuple(r.get(key) for key in keys) for r in read_log(Path(output) / "metrics.jsonl")]
    return [record for record in records if record[1] is not None or record[6] is not None]


def losses(output: Path | str) -> list[float]:
    """The loss of each step."""
    return [r["loss"] for r in read_log(Path(output) / "metrics.jsonl") if "loss" in r]


def saved_steps(output: Path | str) -> list[int]:
    """The complete checkpoints."""
    return sorted(int(p.name) for p in (Path(output) / "checkpoints").iterdir() if p.name.isdecimal())


def final_weights(output: Path | str, step: int = 10) -> Any:
    """The weights of a checkpoint, on the host."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(output) / "checkpoints" / str(step) / "params")


def assert_same_weights(a: Path | str, b: Path | str, step: int = 10) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, final_weights(a, step), final_weights(b, step))


def launches(output: Path | str) -> list[dict[str, Any]]:
    """What the run was started with, each time."""
    return [json.loads(line) for line in (Path(output) / "launches.jsonl").read_text().splitlines()]


def without(record: dict[str, Any], path: str) -> None:
    """Deletes a field of a record by its path, such as "step.remat": a record of before there was one."""
    *groups, field = path.split(".")
    for group in groups:
        record = record[group]
    del record[field]


def print_seed() -> np.random.Generator:
    """A random generator with a fresh seed, which is printed so that a failure can be repeated."""
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)
