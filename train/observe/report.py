"""The report of a training run: its launches, metrics and progress, and a summary at the end."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qwen_jax.config import ModelConfig
from train.fields import as_json
from train.files import append_record
from train.loop import LoopConfig, Monitor
from train.moe import EXPERTS, LoadLog
from train.observe.display import Display, Stretch, duration
from train.observe.goodput import Clock
from train.observe.metrics import MetricsLog, flops_per_token, mfu, read_log
from train.observe.plots import plot_folder, try_to
from train.observe.profile import Profile
from train.observe.trackers import Log, Logs, TensorBoardLog, WandbLog
from train.plan.topology import peak_flops
from train.resume import describe

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# The first and last losses of the summary are means over at most this many steps.
_WINDOW = 20


@dataclasses.dataclass(frozen=True)
class ReportedStage:
    """What a report says of a part of a run.

    Attributes:
      end: number of its last step, counted from 1.
      batch_size: rows in the global batch of a step.
      length: tokens in a row.
      learning_rate: the peak.
      model: the architecture.
      mesh: from `make_mesh`.
    """

    end: int
    batch_size: int
    length: int
    learning_rate: float
    model: ModelConfig
    mesh: Mesh


class ReportedRun(Protocol):
    """The fields of a run's configuration, a dataclass, that a report reads; see `train.config.RunConfig`."""

    @property
    def output(self) -> str: ...
    @property
    def held_out(self) -> Mapping[str, str]: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def profile(self) -> tuple[int, int] | None: ...
    @property
    def wandb_project(self) -> str | None: ...


class Report:
    """Everything that a launch writes and shows, as a context manager. Only process 0 writes or shows anything.

    Attributes:
      log: gets the metrics; None in other processes.
      display: shows progress; None in other processes.
      profile: steps to trace; None without any, and in other processes.
      clock: clock of the run.
    """

    def __init__(
        self,
        config: ReportedRun,
        stages: Sequence[ReportedStage],
        step: int,
        console: Console,
        clock: Clock,
        data: str = "",
        changes: Mapping[str, tuple[Any, Any]] | None = None,
        exported: Path | None = None,
        adapter: bool = False,
        unit: str = "nats a token",
    ):
        """Opens the logs, records the launch, and shows what begins.

        Args:
          config: of the run.
          stages: in order.
          step: the step that the launch resumes from.
          console: where progress is shown.
          clock: clock that was started when the launch began.
          data: what to show of the data, such as `Mixture.describe_epochs()`.
          changes: fields of the configuration that differ from those of the last launch; see `train.resume`.
          exported: folder that is written after the last step, if there is one.
          adapter: it is an adapter, and checkpoints are no whole models.
          unit: of the loss.

        Raises:
          InputError: Weights & Biases refuses the run.
        """
        self._exported, self._adapter, self._unit = exported, adapter, unit
        self._config, self._stages, self._first, self._console, self.clock = config, stages, step, console, clock
        self._output, self._data, self._changes = Path(config.output).absolute(), data, changes or {}
        self._peak = peak_flops(jax.devices())
        if self._peak is not None:
            self._peak /= jax.device_count()  # FLOP/s of one device.
        self.log: Log | None = None
        self.display: Display | None = None
        self.profile: Profile | None = None
        self.arrays: Callable[[int, str, np.ndarray], None] | None = None
        if jax.process_index():
            return
        # Logs.
        metrics = self._output / "metrics.jsonl"
        clock.carry_over(metrics, step)
        self._metrics = MetricsLog(metrics, step)
        logs: list[Log] = [self._metrics, TensorBoardLog(self._output / "tensorboard", step)]
        if config.wandb_project:
            logs.append(WandbLog(config.wandb_project, self._output, as_json(config)))
        self.log = Logs(*logs)
        model, last = stages[-1].model, stages[-1].end
        if model.moe is not None:
            self.arrays = LoadLog(self._output / EXPERTS, model.sparse_layers, last, step).write
        self._record_launch()
        # The time of earlier launches stays in the log, even if this launch fails.
        clock.lap("initialisation")
        self._metrics.write(clock.record(step))
        self._say_beginning()
        # Progress.
        stretches = []
        for stage in stages:
            tokens = stage.batch_size * stage.length
            flops = tokens * flops_per_token(stage.model, stage.length)
            stretches.append(Stretch(stage.end, tokens, flops / stage.mesh.size))
        self.display = Display(
            *(console, last, step),
            stretches=stretches,
            peak_flops=self._peak,
            evaluate_every=config.loop.evaluate_every if config.held_out else 0,
        )
        if config.profile and config.profile[0] > step:
            self.profile = Profile(self._output / "profile", *config.profile)

    def __enter__(self) -> "Report":
        for part in (self.display, self.profile):
            if part is not None:
                part.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.profile:
            self.profile.end()
        if self.display:
            self.display.close()
        if self.log:
            self.log.close()

    def monitor(self, index: int) -> Monitor:
        """What watches the loop of a stage.

        Args:
          index: of the stage, from 0.
        """
        return Monitor(self.log, self.display, self.clock, self.mfu(index), self.profile, self.arrays)

    def mfu(self, index: int) -> Callable[[float], float] | None:
        """A function from tokens per second to the MFU of a stage; None if the peak of the devices is not known.

        Args:
          index: index of the stage, from 0.
        """
        if self._peak is None:
            return None
        stage = self._stages[index]
        peak = self._peak * stage.mesh.size
        return functools.partial(mfu, config=stage.model, length=stage.length, peak_flops=peak)

    def end(self, step: int, stopped_by: int = 0, saved: int | None = None) -> None:
        """Closes the bar, logs where the time went, plots `loss.png`, and prints a summary.

        Args:
          step: number of the last step.
          stopped_by: number of the signal that stopped the run before its end; 0 for none.
          saved: step of the newest checkpoint, if there is one.
        """
        self.clock.lap("checkpoint")  # Until here, the run has waited for the last save.
        if self.log is None:
            return
        if self.display:
            self.display.close()
        self._metrics.write(self.clock.record(step))
        try_to("draw the plots", lambda: plot_folder(self._output), self._say)
        try_to("finish the summary", lambda: self._say_all(self._summary(step, stopped_by, saved)), self._say)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _say_all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._say(line)

    def _say_beginning(self) -> None:
        config, step = self._config, self._first
        device, count, processes = jax.devices()[0], jax.device_count(), jax.process_count()
        used = max(stage.mesh.size for stage in self._stages)
        total = self._stages[-1].model.num_params()["total"]
        self._say(
            f"{f'{total / 1e6:,.1f}M' if total >= 1e6 else f'{total:,}'} parameters on {used} x {device.device_kind}"
            + (f"; the mesh leaves {count - used} more unused" if used < count else "")
            + (f" in {processes} processes" if processes > 1 else "")
        )
        self._say(f"run folder: {config.output}")
        for number, stage in enumerate(self._stages, 1):
            self._say(
                f"stage {number}: to step {stage.end:,}, {stage.batch_size} rows of {stage.length:,} tokens, "
                f"rope_theta {stage.model.rope_theta:,.0f}, learning rate {stage.learning_rate:g}"
            )
        if self._data:
            self._say(self._data)
        if self._peak is None:
            self._say(f"no MFU is shown: the peak of {device.device_kind!r} is not known")
        if step:
            lost, down = self.clock.seconds["lost"], self.clock.seconds["down"]
            self._say(
                f"resuming after step {step:,}; so far {duration(lost)} of steps were lost and {duration(down)} passed "
                "between launches"
            )
        for line in describe(self._changes):
            self._say(f"changed since the last launch: {line}")
        if config.profile and config.profile[0] <= step:
            self._say(f"nothing is traced: steps {config.profile[0]} to {config.profile[1]} were taken already")

    def _summary(self, step: int, stopped_by: int, saved: int | None) -> Iterator[str]:
        """The lines of the summary."""
        config, total, output = self._config, self._stages[-1].end, Path(self._config.output)
        seconds = self.clock.seconds
        wall = sum(seconds.values())
        # How it ended.
        if step < total:
            name = "Ctrl-C" if stopped_by == signal.SIGINT else "SIGTERM"
            where = "saved: the same command resumes from there"
            if saved != step:
                where = "not saved, because the last steps were skipped: the same command resumes from " + (
                    "the beginning" if saved is None else f"step {saved:,}"
                )
            yield f"stopped by {name} after step {step:,} of {total:,}; {where}"
        else:
            yield f"finished: {step:,} steps in {duration(wall)}"
        # Losses.
        records = read_log(self._output / "metrics.jsonl")
        losses = [r["loss"] for r in records if "loss" in r]
        if losses and step == total:
            window = min(_WINDOW, -(-len(losses) // 4))
            first, last = losses[:window], losses[-window:]
            yield f"  loss         {sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f} {self._unit}"
        held_out = [r for r in records if "held_out_loss" in r]
        if held_out and step == total:
            for name in (name for name in held_out[-1] if name.startswith("held_out_")):
                label = name.removeprefix("held_out_").removesuffix("loss").removesuffix("_") or "all"
                if label != "all" or len(config.held_out) > 1:
                    first_value = next(r[name] for r in held_out if name in r)
                    yield f"  held-out     {label} {first_value:.3f} -> {held_out[-1][name]:.3f}"
        # Speed, and where the time went.
        speeds = [(r["seconds"], r["tokens_per_second"], r.get("mfu")) for r in records if "seconds" in r]
        if speeds:
            stepping = sum(s for s, _, _ in speeds)
            rate = sum(s * r for s, r, _ in speeds) / stepping
            known = [(s, m) for s, _, m in speeds if m is not None]
            share = f", MFU {sum(s * m for s, m in known) / sum(s for s, _ in known):.1%}" if known else ""
            yield f"  speed        {rate:,.0f} tokens/s in steps{share}"
        parts = [f"{kind} {value / wall:.1%}" for kind, value in seconds.items() if value / wall >= 0.0005]
        yield f"  wall time    {', '.join(parts)}"
        # What to look at next.
        yield f"  curves       {output / 'loss.png'}; tensorboard --logdir {output / 'tensorboard'}"
        loads = [r for r in records if "load_entropy" in r]
        if loads:
            now = loads[-1]
            yield (
                f"  experts      load entropy {now['load_entropy']:.1%} of the maximum, busiest expert "
                f"{now['load_max']:.2f}x the mean load, {now['dropped']:.2%} dropped; {output / 'experts.png'}"
            )
        scores = self._stages[-1].model.score is not None
        whole = "score" if scores else "generate --model"
        if saved is not None:
            use = "" if self._adapter else f"; to use with qwen-jax {whole}"
            yield f"  checkpoint   {output / 'checkpoints' / str(saved)}{use}"
        if self._exported is not None and step == total:
            adapter = "convert --merge-adapter" if scores else "generate --adapter"
            yield f"  result       {self._exported}; to use with qwen-jax {adapter if self._adapter else whole}"

    def _record_launch(self) -> None:
        """Appends a record of this launch to `launches.jsonl`: time, command, versions, devices, configuration."""
        launch = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": self._first,
            "seconds_before": {kind: round(value, 3) for kind, value in self.clock.seconds.items() if value},
            "command": sys.argv,
            "git": _git_revision(),
            "versions": {"python": platform.python_version()} | dict(_versions()),
            "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
            "processes": jax.process_count(),
            "config": as_json(self._config),
            "ends": [stage.end for stage in self._stages],
            "unit": self._unit,
            "changed": self._changes,
        }
        append_record(self._output / "launches.jsonl", launch)


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _git_revision() -> str | None:
    """The git commit of this code, with "+changes" if files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
