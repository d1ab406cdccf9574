"""A small sweep, and a trainer that takes losses from a formula, for tests that train nothing."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from tests.helpers.runs import MODEL, configuration
from train.config import RunConfig, Stage
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import Schedule
from train.scaling.sweep import Sweep

SIZES = {
    "one": MODEL,
    "two": dataclasses.replace(MODEL, num_layers=2),
    "four": dataclasses.replace(MODEL, num_layers=4),
}


def base(material: Path | str = "material", **changes: Any) -> RunConfig:
    """A run of one stage, whose rows have 16 tokens."""
    stage = Stage(Schedule(100, 1e-2, warmup_steps=10), 16, 4, {"a": 1, "b": 3})
    given = {"loop": LoopConfig(evaluate_every=10**6), "checkpoints": CheckpointConfig(every=0), "stages": (stage,)}
    return configuration(material, "unused", **{**given, **changes})


def sweep(**changes: Any) -> Sweep:
    """Two sizes, two numbers of tokens, three rates, three batches."""
    given: dict[str, Any] = {
        "base": base(),
        "sizes": {name: SIZES[name] for name in ("one", "two")},
        "tokens": (32_000, 64_000),
        "learning_rates": (1e-3, 2e-3, 4e-3),
        "batches": (64, 128, 256),
        "flops": 1e15,
    }
    return Sweep(**{**given, **changes})


def optimum(params: float, tokens: float) -> tuple[float, float]:
    """The best learning rate and batch, in tokens, of the formula."""
    return 3.2 * params**-0.7 * (tokens / 3e4) ** 0.3, 240 * (tokens / 3e4) ** 0.5


def loss_of(config: RunConfig) -> float:
    """A quadratic in (log rate, log batch), tilted, on top of a power law."""
    stage, params = config.stages[0], config.model.num_params()["active"]
    tokens = stage.steps * stage.batch_size * stage.length
    rate, batch = optimum(params, tokens)
    x = math.log(stage.schedule.learning_rate / rate)
    y = math.log(stage.batch_size * stage.length / batch)
    return 1.8 + 20 * params**-0.3 + 50 * tokens**-0.4 + 0.05 * x * x + 0.03 * y * y - 0.03 * x * y


class FakeTrainer:
    """Writes the log of a run with the loss of a formula.

    Attributes:
      trained: names of the runs that were trained, in order.
    """

    def __init__(self, loss: Callable[[RunConfig], float] = loss_of, stop_after: int | None = None):
        """Args:
        loss: of a run; infinite for one that diverges.
        stop_after: how many runs end before a signal comes.
        """
        self.trained: list[str] = []
        self._loss, self._stop_after = loss, stop_after

    def __call__(self, config: RunConfig) -> int:
        if self._stop_after is not None and len(self.trained) >= self._stop_after:
            return 15
        folder, last, loss = Path(config.output), config.ends[-1], self._loss(config)
        self.trained.append(folder.name)
        names = ("held_out_loss", *(f"held_out_{name}_loss" for name in config.held_out))
        records: list[dict[str, Any]] = [{"step": 0, **dict.fromkeys(names, 7.0)}]
        if math.isinf(loss):
            records += [{"step": 1 + i, "loss": None, "skipped": 1.0} for i in range(config.loop.max_skipped)]
        else:
            records.append({"step": last, "loss": loss, "skipped": 0.0})
            records.append({"step": last, **dict.fromkeys(names, loss)})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("".join(to_json(record) + "\n" for record in records))
        if math.isinf(loss):
            raise InputError("The 10 steps up to step 10 were skipped.")
        return 0
