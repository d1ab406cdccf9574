"""A pre-training run from its configuration: stages on their meshes, one log, one number to resume from."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.model import Params
from qwen_jax.multihost import in_step
from qwen_jax.sharding import Sharding, make_mesh
from qwen_jax.tokenizer import load_tokenizer
from train.checkpoint import Checkpoints, read_arrays
from train.config import RunConfig, as_json, load
from train.data.feed import Feed
from train.data.mixture import Mixture
from train.data.rows import PackedRows
from train.data.shards import digest
from train.distributed import HEARTBEAT_SECONDS, check_same, join
from train.inputs import HeldOutBatches, open_data
from train.loop import Display, LoopConfig, fit, held_out_loss
from train.metrics import MetricsLog
from train.pretrain import abstract_state, fresh_state, init_state, make_eval_step, make_train_step
from train.state import TrainState

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# The exit status of a program that SIGTERM has ended.
STOPPED = 128 + signal.SIGTERM
# Writes a Hugging Face folder: weights, their architecture, the folder of a checkpoint with its tokenizer, where to.
Export = Callable[[Params, ModelConfig, Path, Path], None]


def main(argv: Sequence[str], export: Export | None = None) -> int:
    """`qwen-jax train pretrain`.

    Args:
      argv: arguments after the command's name.
      export: see `pretrain`.

    Returns:
      The exit status: 0, or 143 where SIGTERM stopped the run after a checkpoint.

    Raises:
      InputError: a configuration, data or a folder that does not fit.
    """
    parser = argparse.ArgumentParser("qwen-jax train pretrain", description="Pre-train a model, or go on with it.")
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:FUNCTION]", help="function that returns a RunConfig"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=C", help="change fields")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as JSON and stop")
    parser.add_argument(
        "--distributed", action="store_true", help="join the other processes of a SLURM, GKE or TPU job first"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no scheduler says so")
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many, where no scheduler says so")
    parser.add_argument("--process-id", type=int, metavar="I", help="of this process, where no scheduler says so")
    parser.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=HEARTBEAT_SECONDS,
        metavar="SECONDS",
        help="a process that has been silent for so long is taken for dead, and all others end (%(default)s)",
    )
    options = parser.parse_args(list(argv))
    config = load(options.config, options.set)
    if options.print_config:
        print(json.dumps(as_json(config), indent=2))
        return 0
    if options.distributed or options.coordinator:
        join(options.coordinator, options.num_processes, options.process_id, options.heartbeat_timeout)
    return STOPPED if pretrain(config, export=export) else 0


def pretrain(config: RunConfig, console: Console | None = None, export: Export | None = None) -> bool:
    """Trains from the newest checkpoint of the run's folder, or from the beginning, to the end of the last stage.

    Args:
      config: of the run. On resume, stages that were not reached yet may have changed.
      console: for progress; standard error by default. Only process 0 shows any.
      export: writes `config.export`; the command line has one.

    Returns:
      Whether SIGTERM stopped it; everything is saved then.

    Raises:
      InputError: data, tokenizer, model and folder that do not fit each other or the run that the folder holds.
    """
    first_process = jax.process_index() == 0
    console = console or Console(stderr=True, quiet=not first_process)
    check_same("configuration", digest(as_json(config)))
    with in_step("Preparing the run"):
        tokenizer = load_tokenizer(config.tokenizer)
        meshes = [make_mesh(config.mesh_axes(index)) for index in range(len(config.stages))]
        for index, mesh in enumerate(meshes):
            _check_batch(config, index, mesh)
    datasets, held_out_rows = open_data(config, console)
    output = Path(config.output).absolute()
    with in_step("Preparing the run"):
        mixture = Mixture(config.mixture_stages(), datasets, config.seed)
        mixture.check_tokenizer(tokenizer.fingerprint())
        _check_vocabulary(config, datasets)
        if config.initial is not None and not (output / "checkpoints").exists():
            _check_initial(config, Path(config.initial))
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"Cannot make the folder {output}: {error.strerror}. Give another as output.") from None
    check_same("data", mixture.fingerprint())
    held_out = _HeldOut(config, held_out_rows, tokenizer.fingerprint())
    if config.export is not None and export is None:
        raise InputError("Writing config.export needs the function `export`; the command line gives it.")
    run = {"seed": config.seed, "initial": config.initial}
    with (
        _Sigterm() as sigterm,
        Checkpoints(
            output / "checkpoints", config.model, tokenizer, run, config.keep_last, config.keep_every
        ) as checkpoints,
    ):
        state, step = _begin(config, checkpoints, mixture, meshes)
        total = config.ends[-1]
        exported = config.export is not None and _is_taken(Path(config.export))
        if exported and step < total:
            raise InputError(f"{config.export} exists already. Export to a new folder (export), or remove it first.")

        def stop(step: int) -> bool:
            checkpoints.check()
            return sigterm.stop(step)

        _say_beginning(console, config, step)
        with contextlib.ExitStack() as stack:
            log = (
                stack.enter_context(contextlib.closing(MetricsLog(output / "metrics.jsonl", step)))
                if first_process
                else None
            )
            if first_process:
                _record_launch(output, config, step)
            display = stack.enter_context(Display(console, total, step)) if first_process else None
            for index, end in enumerate(config.ends):
                if step >= end:
                    continue
                mesh, stage = meshes[index], config.pretrain(index)
                with jax.set_mesh(mesh):
                    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract_state(stage, mesh)))
                    state = fit(
                        LoopConfig(end, config.evaluate_every, config.checkpoint_every, config.max_skipped),
                        state,
                        make_train_step(stage, mesh),
                        Feed(mixture, step, mesh),
                        mesh=mesh,
                        log=log,
                        evaluate=held_out.evaluation(index, mesh),
                        checkpoints=_OfStage(checkpoints, stage.model, mixture.record()),
                        display=display,
                        stop=stop,
                    )
                    step = int(state.step)
                if sigterm.came:
                    break
        if step == total and config.export is not None and export is not None and not exported:
            checkpoints.finish()
            export(state.params, config.pretrain(-1).model, checkpoints.folder, Path(config.export))
        if step < total:
            console.print(
                f"Stopped by SIGTERM after step {step} of {total}; it is saved; the same command goes on from there.",
                highlight=False,
                soft_wrap=True,
            )
    return step < total


@dataclasses.dataclass(frozen=True)
class _OfStage:
    """Checkpoints that know what a stage is about."""

    checkpoints: Checkpoints
    model: ModelConfig
    data: dict[str, Any]

    def save(self, state: TrainState, step: int) -> None:
        self.checkpoints.save(state, step, self.model, self.data)


def _begin(
    config: RunConfig, checkpoints: Checkpoints, mixture: Mixture, meshes: Sequence[Mesh]
) -> tuple[TrainState, int]:
    """The state to go on from, on the mesh of its stage, and its step."""
    newest = checkpoints.latest_step
    if newest is not None:
        # Which mesh: that of the stage which the newest checkpoint is in, or was the last of.
        index = mixture.stage(min(newest, len(mixture) - 1))
        with jax.set_mesh(meshes[index]):
            state = checkpoints.restore(abstract_state(config.pretrain(index), meshes[index]))
        step = int(state.step)
        with in_step("Resuming"):
            mixture.check_resume(checkpoints.data(step) or {}, step)
        return state, step
    stage, mesh = config.pretrain(0), meshes[0]
    with jax.set_mesh(mesh):
        if config.initial is None:
            return init_state(stage, config.seed, mesh), 0
        like = abstract_state(stage, mesh).params
        with in_step(f"Reading the weights of {config.initial}"):
            weights = _initial_weights(Path(config.initial).absolute() / "params", like)
        return fresh_state(stage, weights, mesh), 0


def _is_taken(folder: Path) -> bool:
    """Whether something is there already."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _initial_weights(folder: Path, like: Any) -> Any:
    try:
        return read_arrays(folder, like)
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # Orbax raises no narrower one for an array that cannot be read.
        reason = str(error).strip().partition("\n")[0][:300]
        raise InputError(f"The weights in {folder} are damaged: {reason}. Copy them again.") from error


def _check_initial(config: RunConfig, folder: Path) -> None:
    saved = dataclasses.asdict(load_config(folder))
    given = dataclasses.asdict(config.model)
    free = ("rope_theta", "max_position_embeddings", "dtype", "yarn", "dual_chunk")
    different = [name for name in given if name not in free and saved[name] != given[name]]
    if different or not (folder / "params").is_dir():
        why = ", ".join(f"{n} is {saved[n]!r} there and {given[n]!r} here" for n in different) or "it has no params/"
        raise InputError(f"The weights of {folder} do not fit the model of this run: {why}.")


def _check_vocabulary(config: RunConfig, datasets: dict[str, PackedRows]) -> None:
    for name, rows in datasets.items():
        if rows.manifest.vocab_size > config.model.vocab_size:
            raise InputError(
                f"The data set {name!r} has token ids up to {rows.manifest.vocab_size - 1}, and the model has "
                f"{config.model.vocab_size} of them. Make the model's vocab_size larger, or use its own tokenizer."
            )


def _check_batch(config: RunConfig, index: int, mesh: Mesh) -> None:
    stage, shards = config.stages[index], Sharding.for_model(config.model, mesh, split_rows=True).batch_shards
    if stage.batch_size % (stage.accumulation * shards):
        raise InputError(
            f"Stage {index + 1} has a batch of {stage.batch_size} rows, which does not divide into "
            f"{stage.accumulation} accumulated parts over {shards} shards of rows (data x fsdp). "
            f"Choose a multiple of {stage.accumulation * shards}."
        )


class _HeldOut:
    """Mean loss on each held-out data set."""

    def __init__(self, config: RunConfig, rows: dict[str, PackedRows], tokenizer: str):
        self._config, self._rows = config, rows
        for name, data in rows.items():
            if data.manifest.tokenizer != tokenizer:
                raise InputError(f"The held-out data set {name!r} was built with another tokenizer. Build it again.")

    def evaluation(self, index: int, mesh: Mesh) -> Any:
        """A function of the state, for `fit`, with the configuration of a stage; None without data."""
        if not self._rows:
            return None
        stage = self._config.stages[index]
        eval_step, size = make_eval_step(self._config.pretrain(index), mesh), stage.batch_size // stage.accumulation
        batches = {name: HeldOutBatches(rows, size, mesh) for name, rows in self._rows.items()}

        def evaluate(state: TrainState) -> dict[str, float]:
            sums = {name: held_out_loss(state.params, eval_step, parts, mesh) for name, parts in batches.items()}
            return {f"{name}_loss": nats / max(weight, 1e-8) for name, (nats, weight) in sums.items()}

        return evaluate


class _Sigterm:
    """Whether a SIGTERM has come to any process of the job; the handler before it comes back at the end.

    Attributes:
      came: what `stop` said last.
    """

    def __init__(self) -> None:
        self.came = False
        self._noted = False
        self._before: Any = None

    def __enter__(self) -> "_Sigterm":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: object) -> None:
        self._noted = True

    def stop(self, step: int) -> bool:
        """Asked after each step, by all processes."""
        self.came = self._asked(step)
        return self.came

    def _asked(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._noted
        # JAX's own handler tells all processes to stop at one and the same step.
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _say_beginning(console: Console, config: RunConfig, step: int) -> None:
    model = config.model
    lines = [
        f"{model.num_params()['total'] / 1e6:,.1f}M parameters on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind} in {jax.process_count()} processes; {config.output}"
    ]
    if step:
        lines.append(f"going on after step {step}")
    for number, (stage, end) in enumerate(zip(config.stages, config.ends, strict=True), 1):
        theta = config.pretrain(number - 1).model.rope_theta
        lines.append(
            f"stage {number}: to step {end}, {stage.batch_size} rows of {stage.length} tokens, rope_theta {theta:g}, "
            f"learning rate {stage.schedule.learning_rate:g}"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _record_launch(output: Path, config: RunConfig, step: int) -> None:
    """Appends what this process was started with to `launches.jsonl`, one object a launch."""
    launch = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "command": sys.argv,
        "git": _git_revision(),
        "versions": {"python": platform.python_version()} | dict(_versions()),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "processes": jax.process_count(),
        "config": as_json(config),
    }
    with (output / "launches.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(launch) + "\n")


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _git_revision() -> str | None:
    """The commit of this code, with "+changes" where files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
