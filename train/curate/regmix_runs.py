"""The small runs of a regression on mixtures: their configurations, running them here or elsewhere, their losses."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from train.config import RunConfig, load
from train.curate.regmix import Trials, make_trials
from train.files import write_file
from train.small_runs import COMMANDS as COMMANDS
from train.small_runs import (
    check_small_run,
    command_line,
    compiled_once,
    final_losses,
    status,
    train_here,
    write_commands,
)

TRIALS = "trials.json"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A small run.

    Attributes:
      name: of the run, and of its folder.
      shares: its mixture.
    """

    name: str
    shares: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Collected:
    """What is known of the runs of a folder.

    Attributes:
      finished: names, shares and final held-out losses; NaN where a loss is not finite.
      unfinished: names of the others.
    """

    finished: tuple[tuple[str, Mapping[str, float], Mapping[str, float]], ...]
    unfinished: tuple[str, ...]

    def trials(self, where: str) -> Trials:
        """The finished runs as a table; see `make_trials`."""
        return make_trials(self.finished, where)


def write_trials(
    config: str,
    folder: Path,
    mixtures: Sequence[Mapping[str, float]],
    prior: Mapping[str, float],
    changes: Sequence[str] = (),
) -> list[Trial]:
    """Writes the runs of a regression: trials.json, and commands.txt with a command for each, for a scheduler.

    Line N of commands.txt is the job of element N of a SLURM array. Runs may be started in any order and resumed.

    Args:
      config: "FILE.py[:function]" that returns a `RunConfig` of one stage, whose data sets are the domains, each with
        a held-out data set or more; the mixture of its stage is replaced.
      folder: of the regression; the same call again changes nothing, and one with further mixtures adds these.
      mixtures: of the runs.
      prior: that they were drawn around, for the record.
      changes: of fields of the configuration, as of `--set`.

    Raises:
      InputError: a configuration that cannot be used, or the folder has other runs.
    """
    base = load(config, changes)
    _check_base(base, prior)
    folder = folder.absolute()
    trials = [Trial(f"{number:03d}", dict(shares)) for number, shares in enumerate(mixtures)]
    # The configuration may be given as a relative path, and a job may start anywhere.
    file, colon, function = config.partition(":")
    config = f"{Path(file).expanduser().resolve()}{colon}{function}"
    record: dict[str, Any] = {
        "config": config,
        "changes": list(changes),
        "prior": dict(prior),
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }
    path = folder / TRIALS
    if path.exists():
        before = read_json(path)
        if before == record:
            return trials
        # More of the same runs may follow.
        if {**before, "trials": record["trials"][: len(before["trials"])]} != {**record, "trials": before["trials"]}:
            raise InputError(
                f"{path} has other runs. Give another folder, or the same arguments as before, or more runs."
            )
    lines = []
    for trial in trials:
        sets = [*changes, f"output={_output(folder, trial)}", f"stages.0.mixture={to_json(dict(trial.shares))}"]
        lines.append(command_line("train", "pretrain", "--config", config, "--set", *sets))
    write_commands(folder, lines)
    try:
        write_file(path, (to_json(record, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Give another folder.") from None
    return trials


def trial_configs(folder: Path) -> Iterator[tuple[Trial, RunConfig]]:
    """The runs that `write_trials` wrote, with their configurations.

    Raises:
      InputError: the folder has none, or their configuration cannot be used any more.
    """
    record = _record(folder)
    base = load(record["config"], record["changes"])
    for value in record["trials"]:
        trial = Trial(**value)
        stage = dataclasses.replace(base.stages[0], mixture=trial.shares)
        yield trial, dataclasses.replace(base, output=str(_output(folder.absolute(), trial)), stages=(stage,))


def run_trials(
    folder: Path, train: Callable[[RunConfig], int], say: Callable[[str], None] = lambda line: None
) -> Collected:
    """Trains the runs that have not ended, one after another, in this process.

    Args:
      folder: of `write_trials`.
      train: runs a configuration to its end, `train.run.pretrain`; returns the signal that stopped it, or 0.
      say: is told of each run that has ended.

    Raises:
      InputError: a run that cannot be started.
    """

    def ended(config: RunConfig) -> None:
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in (final_losses(config) or {}).items())
        say(f"{Path(config.output).name}: {shown or 'no held-out loss'}")

    # They differ in their data alone, so that they share what is compiled.
    with compiled_once(folder):
        train_here((config for _, config in trial_configs(folder)), train, ended)
    return collect(folder)


def collect(folder: Path) -> Collected:
    """The final held-out losses of all runs of a folder.

    Raises:
      InputError: the folder has no runs.
    """
    finished, unfinished = [], []
    for trial, config in trial_configs(folder):
        losses = final_losses(config)
        if losses is None and status(config) == "diverged":
            losses = dict.fromkeys(config.held_out, math.nan)
        if losses is None:
            unfinished.append(trial.name)
        else:
            finished.append((trial.name, dict(trial.shares), losses))
    return Collected(tuple(finished), tuple(unfinished))


def _check_base(base: RunConfig, prior: Mapping[str, float]) -> None:
    check_small_run(base)
    if set(prior) != set(base.data):
        raise InputError(f"The prior has shares of {sorted(prior)}, the configuration has data of {sorted(base.data)}.")


def _output(folder: Path, trial: Trial) -> Path:
    return folder / "runs" / trial.name


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / TRIALS).is_file():
        raise InputError(f"{folder} has no {TRIALS}. Draw mixtures first, or give the folder where they are.")
    return read_json(folder / TRIALS)
