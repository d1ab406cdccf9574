"""Runs for the tests of `train.observe`: a small configuration, its data, and a run that was killed and resumed."""

import dataclasses
import io
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from tests.helpers.data_sets import make_rows
from tests.helpers.runs import stop_after
from train import launch as launching
from train import run
from train.config import RunConfig, Stage
from train.interrupt import Interruption
from train.loop import CheckpointConfig, LoopConfig
from train.observe.goodput import compilation
from train.observe.metrics import read_log
from train.optimizer import Schedule
from train.step import StepConfig

MODEL = dataclasses.replace(published("tiny"), vocab_size=1024, num_layers=1, rope_theta=1e4)
STEPS = 10, 3  # Of the two stages.


def configuration(folder: Path, output: Path, **changes) -> RunConfig:
    config = RunConfig(
        output=str(output),
        model=MODEL,
        tokenizer=str(folder / "tokenizer"),
        data={"short": str(folder / "short"), "long": str(folder / "long")},
        held_out={"web": str(folder / "web"), "code": str(folder / "code")},
        stages=(
            Stage(Schedule(STEPS[0], 1e-2, warmup_steps=2), 16, 4, {"short": 1}),
            Stage(Schedule(STEPS[1], 1e-3, schedule="wsd"), 32, 2, {"long": 1}, rope_theta=1e6),
        ),
        step=StepConfig(dtype="float32", remat="none"),
        loop=LoopConfig(evaluate_every=2),
        checkpoints=CheckpointConfig(every=3),
    )
    return dataclasses.replace(config, **changes)


def make_material(folder: Path) -> None:
    """Writes a tokenizer, and data sets of two lengths."""
    tokenizer = train_bpe(["some text of no importance " * 9], 300)
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name, length, rows in (("short", 16, 12), ("long", 32, 12), ("web", 16, 3), ("code", 16, 7)):
        make_rows(folder / name, rng, rows, length, tokenizer=tokenizer.fingerprint())


@dataclasses.dataclass
class Watched:
    """A run that was killed after step 4, with its last checkpoint at step 3, and then resumed."""

    output: Path
    times: tuple[float, float, float]  # When the launches began, and when the second had ended.
    before: list[dict]  # The log that the first launch left.
    text: str  # What the second launch showed.
    compiled: list[tuple[int, int, int]]  # step, length, programs compiled by that call of the step.
    programs: dict[int, int]  # Compiled in all, when step n was on its way.


def watch(material: Path, output: Path) -> Watched:
    """Trains the run, kills it and resumes it."""
    config = configuration(material, output, profile=(6, 7))
    compiled: list[tuple[int, int, int]] = []
    programs: dict[int, int] = {}
    make_train_step = launching.make_train_step

    def counted(*args):
        step = make_train_step(*args)

        def train_step(state, batch):
            before = compilation().programs
            result = step(state, batch)
            compiled.append((len(compiled) + 1, batch.tokens.shape[1], compilation().programs - before))
            return result

        return train_step

    def note(self, step):
        programs[step] = compilation().programs
        return 0

    with pytest.MonkeyPatch.context() as patch:
        first = time.time()
        stop_after(patch, 4)
        assert run.pretrain(config, Console(file=io.StringIO()))
        # As if it had been killed: of step 4, only its record in the log; and lines that are cut or full of zero bytes.
        shutil.rmtree(output / "checkpoints" / "4")
        before = read_log(output / "metrics.jsonl")
        for name, damage in (("metrics.jsonl", b'{"step": 4, "lo'), ("launches.jsonl", b'{"time": "20' + bytes(99))):
            with (output / name).open("ab") as file:
                file.write(damage)
        time.sleep(0.5)
        patch.setattr(Interruption, "_asked", note)
        patch.setattr(launching, "make_train_step", counted)
        out, second = io.StringIO(), time.time()
        assert not run.pretrain(config, Console(file=out, width=300))
    return Watched(output, (first, second, time.time()), before, out.getvalue(), compiled, programs)
