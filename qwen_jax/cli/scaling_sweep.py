"""`qwen-jax scaling sweep`: runs over size, tokens, learning rate, batch and MoE shape, into one table."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from qwen_jax.cli.common import sibling
from qwen_jax.errors import InputError
from qwen_jax.files import to_json


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train small runs over size, tokens, learning rate, batch and MoE shape, for `qwen-jax scaling fit`.

    Runs are trained on this machine, into OUTPUT/runs, and OUTPUT/results.parquet has a row for each that has ended.
    The same command goes on after an interruption. With --write they are written for a scheduler instead: a
    configuration each, OUTPUT/commands.txt and OUTPUT/array.sh, a SLURM job array.

    Args:
        config: FILE.py[:FUNCTION] that returns a train.scaling.sweep.Sweep.
        output: Folder of the sweep.
        set: Fields of it to change, such as flops=1e18 or base.step.remat=none.
        write: Write the runs that have not ended for a scheduler, and train nothing. Of a sequential design that is
            the next round.
        collect: Write the table of what has ended, and train nothing.
        workers: Processes that train at the same time and share the devices of this machine. Small runs leave a GPU
            idle; each worker reserves an equal part of its memory.
        json: Print a JSON object.
    """

    config: Annotated[str, tyro.conf.arg(metavar="FILE.py")]
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE")] = ()
    write: bool = False
    collect: bool = False
    workers: int = 1
    json: bool = False

    def run(self) -> int:
        if self.write and self.collect:
            raise InputError("Give --write or --collect, not both: --write also writes the table of what has ended.")
        if self.workers < 1:
            raise InputError(f"--workers must be at least 1, got {self.workers}.")
        runs = sibling("train.scaling.run_sweep")
        sweep = sibling("train.scaling.sweep").load_sweep(self.config, self.set)
        if self.write:
            outcome = runs.write_sweep(sweep, self.output)
        elif self.collect:
            outcome = runs.collect(sweep, self.output)
            runs.write_table(outcome, self.output)
        else:
            say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
            outcome = runs.run_sweep(sweep, self.output, workers=self.workers, say=say)
        table = self.output / runs.RESULTS
        if self.json:
            ended, waiting = len(outcome.losses), len(outcome.waiting)
            record = {"ended": ended, "waiting": waiting, "finished": outcome.finished, "flops": outcome.plan.flops}
            print(to_json({**record, "table": str(table)}))
            return 0
        print(outcome.to_text())
        if self.write and outcome.waiting:
            script = shlex.quote(str(self.output / "array.sh"))
            print(f"A job array runs them: sbatch {script}; then give this command again")
        print(table)
        return 0
