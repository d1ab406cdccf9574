"""Many small runs of one kind: what has become of each, training them here, and handing them to a scheduler."""

import dataclasses
import functools
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax

from qwen_jax.errors import InputError
from train.config import RunConfig
from train.files import write_file
from train.observe.metrics import read_log

COMMANDS = "commands.txt"
ARRAY = "array.sh"

Status = Literal["ok", "diverged", "waiting"]


def final_losses(config: RunConfig, whole: bool = False) -> dict[str, float] | None:
    """The held-out losses after the last step of a run, by data set; None if it has not come so far.

    A loss that is not finite is NaN.

    Args:
      config: of the run.
      whole: the loss over all tokens of all data sets instead, under the name "".
    """
    return _losses(config, config.ends[-1], whole)


def status(config: RunConfig) -> Status:
    """What has become of a run, by its log alone: so it is the same wherever the run was trained.

    It has diverged if it gave up after skipped steps, or if its final held-out losses are not finite, or all are more
    than a tenth above those before the first step.
    """
    final = final_losses(config)
    if final is not None:
        first = _losses(config, 0) or {}
        worse = all(final[name] > 1.1 * first.get(name, math.inf) for name in final)
        return "diverged" if worse or not all(map(math.isfinite, final.values())) else "ok"
    # Where a run gives up, its last record of a step is that of a skipped one; see `train.loop.fit`.
    found = _summary(config)
    gave_up = found.skipped >= config.loop.max_skipped or (found.skipped and found.last == config.ends[-1])
    return "diverged" if gave_up else "waiting"


def check_small_run(config: RunConfig) -> None:
    """Checks that small runs can be made of a configuration.

    Raises:
      InputError: it has several stages, no held-out loss at the end, or an export, which all runs would write.
    """
    if config.export is not None:
        raise InputError(
            f"All small runs would write their weights to {config.export}, one over another. Leave out `export`."
        )
    if len(config.stages) != 1:
        raise InputError(f"Small runs have one stage, the configuration has {len(config.stages)}.")
    if not config.held_out or not config.loop.evaluate_every:
        raise InputError("Small runs need held-out data and loop.evaluate_every above 0: their losses are compared.")


def train_here(
    configs: Iterable[RunConfig],
    train: Callable[[RunConfig], int],
    ended: Callable[[RunConfig], None] = lambda config: None,
) -> None:
    """Trains the runs that have neither ended nor diverged, one after another, in this process.

    Args:
      configs: of the runs.
      train: runs a configuration to its end, `train.run.pretrain`; returns the signal that stopped it, or 0.
      ended: is told of each run that has ended.

    Raises:
      InputError: a run that cannot be started.
      SystemExit: a signal has stopped a run.
    """
    for config in configs:
        if status(config) != "waiting":
            continue
        try:
            stopped = train(config)
        except InputError:
            if status(config) != "diverged":
                raise
            stopped = 0
        if stopped:
            raise SystemExit(128 + stopped)
        ended(config)


@contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Lets runs in several processes, or after a restart, share what is compiled.

    Args:
      folder: where it is kept, unless JAX has such a folder already.
    """
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if before is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def command_line(*words: str) -> str:
    """A `qwen-jax` command, as a line for a shell."""
    return " ".join(map(shlex.quote, ["qwen-jax", *words])) + "\n"


def write_commands(folder: Path, lines: Sequence[str]) -> None:
    """Writes commands.txt, and array.sh, a SLURM job array that runs line N in its element N.

    Args:
      folder: of the runs.
      lines: of `command_line`, one a run.

    Raises:
      InputError: the folder cannot be written.
    """
    commands = folder.absolute() / COMMANDS
    script = (
        "#!/bin/bash\n"
        f"# Lines 1 to {len(lines)} of {COMMANDS}. Add what your cluster needs, such as --partition.\n"
        "# --array=1-N%M runs M at a time. An element that is started again resumes its run.\n"
        f"#SBATCH --array=1-{max(len(lines), 1)}\n#SBATCH --gpus=1\n"
        f'#SBATCH --output="{folder.absolute()}/slurm-%a.txt"\n#SBATCH --signal=TERM@120\n'
        f'exec bash -c "exec $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(commands))})"\n'
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / COMMANDS, "".join(lines).encode())
        write_file(folder / ARRAY, script.encode())
    except OSError as error:
        raise InputError(f"Cannot write {commands}: {error.strerror}. Give another folder.") from None


@dataclasses.dataclass(frozen=True)
class _Summary:
    """What is read of a log.

    Attributes:
      held_out: the last record of an evaluation at each step that has one.
      last: number of the last step.
      skipped: how many steps at the end were skipped in a row.
    """

    held_out: Mapping[int, Mapping[str, float]]
    last: int
    skipped: int


def _summary(config: RunConfig) -> _Summary:
    path = Path(config.output) / "metrics.jsonl"
    try:
        about = path.stat()
    except OSError:
        return _Summary({}, 0, 0)
    return _summarised(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _summarised(path: Path, size: int, time: int) -> _Summary:
    """Reads a log, once for each size and time of change of the file: logs are long, and asked for often."""
    records = read_log(path, warn=False)
    held_out = {int(r["step"]): r for r in records if any(name.startswith("held_out_") for name in r)}
    steps = [record for record in records if "skipped" in record]
    skipped = 0
    while skipped < len(steps) and steps[-1 - skipped]["skipped"]:
        skipped += 1
    return _Summary(held_out, int(steps[-1]["step"]) if steps else 0, skipped)


def _losses(config: RunConfig, step: int, whole: bool = False) -> dict[str, float] | None:
    """The held-out losses at a step; see `final_losses`."""
    record = _summary(config).held_out.get(step)
    if record is None:
        return None
    if whole:
        return {"": record.get("held_out_loss", math.nan)}
    return {name: record.get(f"held_out_{name}_loss", math.nan) for name in config.held_out}
