"""Does a law that is fitted to small runs pick the learning rate and batch of a model four times larger?

    python -m experiments.scaling.small_sweep --folder small-sweep --limit 500             # one GPU
    python -m experiments.scaling.small_sweep --folder small-sweep-cpu --size cpu          # the same path on a CPU
    python -m experiments.scaling.small_sweep --folder second-sweep --size second --limit 560   # small_sweep.md
    python -m experiments.scaling.small_sweep --size second --plan                # what it runs, and for how long

1. Rows of the text of this Python installation, by `experiments.learning.data`.
2. `train.scaling`: a sweep of learning rate and batch in cells of size and tokens, a coarse grid first and then runs
   near the optimum and past the edge; the joint law in (N, D) is fitted to its table.
3. The larger model is trained at the predicted pair, at half and twice of both, and past the edge where the best of
   these is at the edge. The pick's regret is its loss relative to the best of them.

The sweep takes at most two thirds of the limit; the law is then fitted to what has ended. With `--size second` the law
waits for the whole sweep: the same command goes on until it prints a regret. Leaves `results.json`,
`runs/results.parquet`, `target/results.parquet`, `law.json` and plots. What has been done is not done again.

A pilot (`Setup.pilot`) runs one point of each cell with two seeds first. Cells where the training loss still falls by
half a nat in the second half of such a run are left out; where fewer than three are left, nothing else is run.
"""

import argparse
import dataclasses
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.learning import data
from experiments.scaling.law import fit_law, plot_law, plot_target
from experiments.scaling.minutes import plan_text
from experiments.scaling.setup import SETUPS, Setup
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.config import RunConfig
from train.files import write_file
from train.observe.metrics import read_log
from train.scaling.hyperparameters_law import fit_text
from train.scaling.run_config import write_run_config
from train.scaling.run_sweep import RESULTS, Outcome, collect, read_results, run_sweep, write_table
from train.scaling.sweep import Run, Sweep, make_plan

_SWEEP_SHARE = 0.65
# Nats by which the loss of the first sweep fell at once. A law in size and tokens has three unknowns for each choice.
_FALL, _LEAST_CELLS = 0.5, 3


class _TimeIsUp(BaseException):
    """The part of the time that a phase may take is over."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what is done inside after some seconds, by an exception that is caught here."""

    def ring(*_: object) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    except _TimeIsUp:
        print("time is up", file=sys.stderr, flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def late_fall(run: Run) -> float:
    """How far the training loss of a run that has ended fell in its second half, in nats; 0 where its log has no steps.

    Args:
      run: of a sweep.
    """
    records = read_log(Path(run.config.output) / "metrics.jsonl", warn=False)
    steps = run.config.ends[-1]
    losses = [(one["step"] / steps, one["loss"]) for one in records if "loss" in one]
    half = [loss for share, loss in losses if 0.45 < share <= 0.55]
    end = [loss for share, loss in losses if share > 0.9]
    return statistics.median(half) - statistics.median(end) if half and end else 0.0


def judged(pilot: Outcome) -> dict[str, Any]:
    """What the pilot says of each cell: the scatter of its seeds, and whether it is near the fall of the loss.

    Args:
      pilot: all of its runs have ended.

    Returns:
      `scatter` (standard deviation of the log loss between seeds), `fall` (nats) and `left_out` by cell.
    """
    found: dict[str, Any] = {"scatter": {}, "fall": {}, "left_out": []}
    for cell in dict.fromkeys(run.cell for run in pilot.plan.runs):
        runs, name = [run for run in pilot.plan.runs if run.cell == cell], f"{cell.name}, {cell.tokens:,} tokens"
        losses = [pilot.losses[run.name] for run in runs]
        ended = all(map(math.isfinite, losses))  # None diverged.
        found["scatter"][name] = statistics.stdev(map(math.log, losses)) if ended else None
        found["fall"][name] = max(map(late_fall, runs)) if ended else None
        if not ended or not found["fall"][name] < _FALL:
            found["left_out"].append([cell.name, cell.tokens])
    return found


def experiment(
    folder: Path,
    setup: Setup,
    limit: float,
    train: Callable[[RunConfig], int] | None = None,
    text: list[str] | None = None,
) -> dict[str, Any]:
    """All three parts, as far as the time allows.

    Args:
      folder: of the experiment.
      setup: sizes.
      limit: seconds from now.
      train: in place of our trainer, for tests.
      text: folders of the text; see `experiments.learning.data.find_text`.

    Returns:
      The content of results.json. Without a `prediction` the time was up before all runs of a sweep had ended that the
      law waits for.

    Raises:
      InputError: the pilot leaves too few cells.
    """
    begin, folder = time.perf_counter(), folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    results_file = folder / "results.json"
    results: dict[str, Any] = json.loads(results_file.read_text()) if results_file.exists() else {}

    def note(**found: Any) -> None:
        results.update(found)
        write_file(results_file, (to_json(results, indent=2) + "\n").encode())

    def say(line: str) -> None:
        print(f"{time.perf_counter() - begin:6.1f} s  {line}", file=sys.stderr, flush=True)

    def run(sweep: Sweep, name: str, until: float, where: str = "") -> Outcome:
        """Runs a sweep as far as it comes, in a folder that has its name by default, and reports on it."""
        started = time.perf_counter()
        with within(begin + until - started):
            run_sweep(sweep, folder / (where or name), train, 1 if train else setup.workers, say)
        outcome = collect(sweep, folder / (where or name))
        seconds = results.get(name, {}).get("seconds", 0) + time.perf_counter() - started
        trained = [run for run in outcome.plan.runs if run.name in outcome.losses]
        flops, tokens = sum(run.flops for run in trained), sum(run.cell.tokens for run in trained)
        about = {"runs": len(trained), "left": len(outcome.waiting), "flops": flops, "tokens": tokens}
        note(**{name: {**about, "seconds": round(seconds, 1), "cells": outcome.to_text().splitlines()}})
        say(outcome.to_text())
        return outcome

    # 1. Rows.
    if not (folder / "data.json").exists():
        arguments = (setup.megabytes, text, None, setup.vocab_size, setup.length, setup.held_out_megabytes)
        note(data=data.make(folder, *arguments), data_seconds=round(time.perf_counter() - begin, 1))
        say("the rows are there")
    # 2. The sweep, and the law.
    pilot, left_out = None, []
    if setup.pilot is not None:
        pilot = run(setup.pilot_sweep(folder), "pilot", limit, "runs")
        if pilot.waiting:
            say("the pilot has not ended: the same command goes on")
            return results
        note(judged=judged(pilot))
        left_out = [tuple(cell) for cell in results["judged"]["left_out"]]
        say(to_json(results["judged"]))
        if len(setup.cells) - len(left_out) < _LEAST_CELLS:
            raise InputError(
                f"The loss falls late in {left_out}: fewer than {_LEAST_CELLS} cells are left for a law. Give these "
                "cells more tokens in experiments/scaling/setup.py."
            )
    sweep = run(setup.sweep(folder, left_out), "runs", limit * (1 if setup.whole else _SWEEP_SHARE))
    if setup.whole and not sweep.finished and "prediction" not in results:
        say("the sweep has not ended: the same command goes on")
        return results
    if pilot is not None:  # The law reads both seeds.
        kept = {run.cell for run in sweep.plan.runs}
        both = {run.name: run for run in (*sweep.plan.runs, *pilot.plan.runs) if run.cell in kept}
        plan = dataclasses.replace(sweep.plan, runs=tuple(both.values()))
        write_table(Outcome(plan, {**pilot.losses, **sweep.losses}), folder / "runs")
    rows = read_results(folder / "runs")
    params = setup.model(*setup.target).num_params()["active"]
    if "prediction" not in results:  # A resumed target must keep its grid.
        fitted, said = fit_law(folder / "runs" / RESULTS, params, setup.target_tokens)
        unit = 2 * setup.length
        batch = max(round(said.batch_tokens / unit), 1) * unit
        picked = {"learning_rate": float(f"{said.learning_rate:.3g}"), "batch_tokens": batch}
        note(prediction={**picked, "params": params, "tokens": setup.target_tokens, "by_law": dataclasses.asdict(said)})
        write_file(folder / "law.json", (to_json(fitted.law, indent=2) + "\n").encode())
        plot_law(fitted, folder)
        say(fit_text(fitted))
    rate, batch = results["prediction"]["learning_rate"], results["prediction"]["batch_tokens"]
    say(f"predicted for {params:,} parameters: learning rate {rate:.3g}, batch {batch:,}")
    # 3. The larger model. The pick itself comes first.
    asked = setup.target_sweep(folder, rate, batch)
    pick = next(r for r in make_plan(asked, folder / "target", {}).runs if r.point == (1, 1))
    write_run_config(folder / "predicted.py", pick.config, "The run that the law predicts for the larger model.")
    outcome = run(asked, "target", limit)
    if pick.name in outcome.losses:
        best = min(outcome.losses, key=lambda name: outcome.losses[name])
        regret = outcome.losses[pick.name] / outcome.losses[best] - 1
        note(pick_loss=outcome.losses[pick.name], best_loss=outcome.losses[best], best=best, regret=regret)
        note(within_half_a_percent=regret <= 0.005, smallest_params=min(row["params"] for row in rows))
        note(ratio=params / max(row["params"] for row in rows))
        plot_target(read_results(folder / "target"), results["prediction"], folder / "target.png")
        say(f"regret of the pick: {regret:.3%}; best is {best}")
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("small-sweep"))
    parser.add_argument("--limit", type=float, default=540, help="seconds that all may take")
    parser.add_argument("--size", choices=list(SETUPS), default="gpu")
    parser.add_argument("--workers", type=int, help="processes that train at the same time")
    parser.add_argument("--plan", action="store_true", help="run nothing; show cells, runs and estimated minutes")
    args = parser.parse_args()
    setup = SETUPS[args.size]
    if args.workers:
        setup = dataclasses.replace(setup, workers=args.workers)
    if args.plan:
        print(plan_text(setup, args.folder))
        return
    # A scheduler's SIGTERM ends the workers, which save.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = experiment(args.folder, setup, args.limit)
    print(to_json({key: value for key, value in results.items() if key not in ("law", "data")}, indent=2))


if __name__ == "__main__":
    main()
