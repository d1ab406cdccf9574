"""Where the numbers of a run go besides `metrics.jsonl`: TensorBoard, and Weights & Biases when asked for."""

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen_jax.errors import InputError


class Log(Protocol):
    """Takes records: numbers by name, `step` among them."""

    def write(self, record: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Logs:
    """Several logs as one."""

    def __init__(self, *logs: Log):
        self._logs = logs

    def write(self, record: Mapping[str, float]) -> None:
        """Writes to each."""
        for log in self._logs:
            log.write(record)

    def flush(self) -> None:
        """Makes each safe from the end of this process."""
        for log in self._logs:
            log.flush()

    def close(self) -> None:
        """Closes each."""
        for log in self._logs:
            log.close()


def tags(record: Mapping[str, float]) -> dict[str, float]:
    """A record's numbers by the names that they have in TensorBoard and Weights & Biases.

    Those of a step are `train/<name>`, held-out ones `held_out/<name>`, and the time spent on each kind of
    `train.observe.goodput.KINDS` is `goodput/<kind>`, a fraction of the wall time.

    Args:
      record: of `metrics.jsonl`.
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
        elif name != "step":
            named[f"train/{name}"] = value
    return named


class TensorBoardLog:
    """Scalars in an event file of TensorBoard; one file a launch."""

    # Seconds between two writes to the disk.
    _FLUSH = 10.0

    def __init__(self, folder: Path, resume_step: int = 0):
        """Begins a file.

        Args:
          folder: what TensorBoard is pointed at.
          resume_step: steps already taken; TensorBoard forgets later ones of earlier files.
        """
        # tensorboardX's SummaryWriter hands events to a thread and can't say when they are on the disk. A checkpoint
        # must find all events up to its step there: a resumed run doesn't write them again.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        before = len(list(folder.glob("events.*"))) if folder.exists() else 0
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, which tell the second; two launches may share one.
        self._writer = EventsWriter(str(folder / "events"), f".{before:06d}")
        if before:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            # A run that begins anew evaluates before its first step again.
            first = resume_step + 1 if resume_step else 0
            self._writer.write_event(self._event(wall_time=time.time(), step=first, session_log=start))
        self._flushed = 0.0

    def write(self, record: Mapping[str, float]) -> None:
        """Adds a scalar for each number."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in tags(record).items()]
        event = self._event(wall_time=time.time(), step=int(record["step"]), summary=self._summary(value=values))
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > self._FLUSH:
            self.flush()

    def flush(self) -> None:
        """Puts everything on the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def check_wandb() -> None:
    """Finds out whether Weights & Biases can be used, before there is anything to lose.

    Raises:
      InputError: the package is missing, or nobody is logged in.
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
    """A run of Weights & Biases; launches that go on with a run go on with this one, too."""

    def __init__(self, project: str, output: Path, config: Mapping[str, Any]):
        """Begins the run, or goes on with it.

        Args:
          project: of Weights & Biases. Entity, mode and address are as its own environment variables say.
          output: folder of the run.
          config: resolved configuration, as JSON values.

        Raises:
          InputError: Weights & Biases refuses.
        """
        import wandb

        path = output / "wandb_id"
        if not path.exists():
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(secrets.token_hex(4), encoding="utf-8")
            os.replace(temporary, path)
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
                f"Weights & Biases did not begin a run in the project {project!r}: {error}. Look at its message, set "
                "WANDB_MODE=offline, or leave wandb_project out; checkpoints are unharmed."
            ) from error
        # An axis of our own: wandb's only ever grows, and a resumed run goes back to its checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, float]) -> None:
        """Sends a record."""
        self._run.log({"step": int(record["step"]), **tags(record)})

    def flush(self) -> None:
        """Nothing to do: wandb's own process has every record."""

    def close(self) -> None:
        """Ends the run; waits until everything is sent."""
        self._run.finish()
