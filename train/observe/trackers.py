"""Logs of metrics besides `metrics.jsonl`: TensorBoard and, if configured, Weights & Biases."""

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from qwen_jax.errors import InputError
from train.files import write_file


class Log(Protocol):
    """Where records of metrics are written."""

    def write(self, record: Mapping[str, float]) -> None:
        """Writes a record: numbers by name; `step` is one of them."""

    def flush(self) -> None:
        """Makes all records safe from the end of this process."""

    def close(self) -> None:
        """Closes the log."""


class Logs:
    """Several logs as one."""

    def __init__(self, *logs: Log):
        self._logs = logs

    def write(self, record: Mapping[str, float]) -> None:
        """Writes a record to each log."""
        for log in self._logs:
            log.write(record)

    def flush(self) -> None:
        """Flushes each log."""
        for log in self._logs:
            log.flush()

    def close(self) -> None:
        """Closes each log."""
        for log in self._logs:
            log.close()


def tags(record: Mapping[str, float]) -> dict[str, float]:
    """Renames the numbers of a record for TensorBoard and Weights & Biases.

    Numbers of a step become `train/<name>`, held-out numbers `held_out/<name>`, `task/...` stays as it is, and the time
    spent on each kind of `train.observe.goodput.KINDS` becomes `goodput/<kind>`, a fraction of the wall time.

    Args:
      record: a record of the log.
    """
    total = sum(value for name, value in record.items() if name.startswith("seconds_"))
    if total:
        return {
            f"goodput/{name.removeprefix('seconds_')}": value / total
            for name, value in record.items()
            if name.startswith("seconds_")
        }
    named = {}
    for name, value in record.items():
        if name.startswith("held_out_"):
            named[f"held_out/{name.removeprefix('held_out_')}"] = value
        elif name.startswith("task/"):
            named[name] = value
        elif name != "step":
            named[f"train/{name}"] = value
    return named


class TensorBoardLog:
    """Scalars in an event file of TensorBoard, one file for each launch."""

    # Seconds between two flushes.
    _FLUSH = 10.0

    def __init__(self, folder: Path, resume_step: int = 0):
        """Creates the file of this launch.

        Args:
          folder: the log directory to give to TensorBoard.
          resume_step: number of steps already taken; TensorBoard drops later steps of earlier files.
        """
        # All events up to a checkpoint must be on disk when it is saved, because a resumed run does not write them
        # again. The SummaryWriter of tensorboardX writes in a thread and cannot tell when that is so.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        before = len(list(folder.glob("events.*"))) if folder.exists() else 0
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names. These have the time in seconds, which two launches may
        # share: number the launches too.
        self._writer = EventsWriter(str(folder / "events"), f".{before:06d}")
        if before:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            # A run that begins again also evaluates before its first step again.
            first = resume_step + 1 if resume_step else 0
            self._writer.write_event(self._event(wall_time=time.time(), step=first, session_log=start))
        self._flushed = 0.0

    def write(self, record: Mapping[str, float]) -> None:
        """Adds a scalar for each number of the record."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in tags(record).items()]
        event = self._event(wall_time=time.time(), step=int(record["step"]), summary=self._summary(value=values))
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > self._FLUSH:
            self.flush()

    def flush(self) -> None:
        """Writes all events to the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def check_wandb() -> None:
    """Checks that Weights & Biases can be used, before a run begins.

    Raises:
      InputError: the package is not installed, or nobody is logged in.
    """
    try:
        import wandb
    except ImportError:
        raise InputError(
            "wandb_project is set and the package wandb is not installed: pip install 'qwen-jax[wandb]', or leave "
            "wandb_project out."
        ) from None
    # Offline and disabled modes need no login.
    if wandb.setup().settings.mode in ("online", "shared") and not wandb.login(prompt=False):
        raise InputError(
            "wandb_project is set and nobody is logged in to Weights & Biases. Run `wandb login`, set WANDB_API_KEY, "
            "or set WANDB_MODE=offline and `wandb sync` later."
        )


class WandbLog:
    """A run of Weights & Biases; all launches of a training run log to the same one."""

    def __init__(self, project: str, output: Path, config: Mapping[str, object]):
        """Creates or resumes the run of Weights & Biases.

        Args:
          project: its project. Entity, mode and address come from the environment variables of Weights & Biases.
          output: folder of the training run.
          config: resolved configuration, as JSON values.

        Raises:
          InputError: Weights & Biases refuses the run.
        """
        import wandb

        path = output / "wandb_id"
        if not path.exists():
            write_file(path, secrets.token_hex(4).encode())
        try:
            self._run = wandb.init(
                project=project,
                name=output.name,
                id=path.read_text(encoding="utf-8"),
                resume="allow",
                dir=output,
                config=dict(config),
            )
        except wandb.errors.Error as error:
            raise InputError(
                f"Weights & Biases refused a run in the project {project!r}: {error}. Do what its message says, set "
                "WANDB_MODE=offline, or leave wandb_project out; checkpoints are not affected."
            ) from error
        # wandb's own step can only grow, but a resumed run goes back to its checkpoint. Use an axis of our own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, float]) -> None:
        """Logs a record."""
        self._run.log({"step": int(record["step"]), **tags(record)})

    def flush(self) -> None:
        """Does nothing: the process of wandb has every record already."""

    def close(self) -> None:
        """Ends the run, after everything is sent."""
        self._run.finish()
