"""How long a sweep takes on the GPU that the first small sweep ran on, by its recorded times."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scaling.setup import Setup
from train.observe.metrics import flops_per_token
from train.scaling.sweep import Run, make_plan

_RECORD = Path(__file__).with_name("small_sweep.json")


@dataclasses.dataclass(frozen=True)
class Rates:
    """What all workers together take for a step and for model FLOPs, with compilation and evaluations in it."""

    seconds_per_step: float
    seconds_per_flop: float

    @staticmethod
    def of(record: Mapping[str, Any]) -> "Rates":
        """The rates that explain both phases of an earlier experiment: many small steps, and fewer larger ones.

        Args:
          record: its `results.json`, with the rows of its runs.
        """
        steps = [sum(row["steps"] for row in record["rows"][phase]) for phase in ("runs", "target")]
        flops = [record[phase]["flops"] for phase in ("runs", "target")]
        seconds = [record[phase]["seconds"] for phase in ("runs", "target")]
        a, b = np.linalg.solve(np.stack([steps, flops], 1), seconds)
        return Rates(float(a), float(b))

    def minutes(self, runs: Iterable[Run]) -> float:
        """Minutes that some runs take together."""
        all_runs = list(runs)
        steps = sum(run.config.stages[0].steps for run in all_runs)
        return (steps * self.seconds_per_step + sum(run.flops for run in all_runs) * self.seconds_per_flop) / 60


def plan_text(setup: Setup, folder: Path) -> str:
    """The runs of an experiment before any of them has been made: cells, tokens and estimated minutes.

    Args:
      setup: its sizes.
      folder: of the experiment; nothing is written there.
    """
    rates = Rates.of(json.loads(_RECORD.read_text()))
    sweep = setup.sweep(folder)
    first = make_plan(sweep, folder / "runs", {}).runs
    lines, total = [], 0.0
    for cell in dict.fromkeys(run.cell for run in first):
        runs = [run for run in first if run.cell == cell]
        middle = sorted(runs, key=lambda run: run.batch_tokens)[len(runs) // 2]
        more = max(setup.most_runs - len(runs), 0)
        begin, then = rates.minutes(runs), more * rates.minutes([middle])
        total += begin + then
        params = cell.model.num_params()["active"]
        lines.append(
            f"{cell.name}, {params:,} parameters, {cell.tokens:,} tokens: {len(runs)} runs with batches of "
            f"{min(run.batch_tokens for run in runs):,} to {max(run.batch_tokens for run in runs):,} tokens, "
            f"{begin:.1f} minutes; then up to {more}, {then:.1f} minutes"
        )
    if setup.pilot is not None:
        seconds = [run for run in make_plan(setup.pilot_sweep(folder), folder / "runs", {}).runs if run.seed]
        total += rates.minutes(seconds)
        lines.append(f"second seeds: {len(seconds)} runs, {rates.minutes(seconds):.1f} minutes")
    model, batch = setup.model(*setup.target), sorted(setup.batches)[len(setup.batches) // 2]
    flops = flops_per_token(model, setup.length) * setup.target_tokens
    one = (setup.target_tokens / batch * rates.seconds_per_step + flops * rates.seconds_per_flop) / 60
    lines.append(
        f"target, {model.num_params()['active']:,} parameters, {setup.target_tokens:,} tokens: 9 to {setup.most_runs} "
        f"runs, {9 * one:.1f} to {setup.most_runs * one:.1f} minutes"
    )
    total += setup.most_runs * one
    lines.append(f"all: up to {total:.0f} minutes on one H200 with 6 workers, by the times of the first sweep")
    return "\n".join(lines)
