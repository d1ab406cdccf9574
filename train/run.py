"""A pre-training run from its configuration: stages on their meshes, one log, one number to resume from."""

import argparse
import contextlib
import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.parallel.multihost import in_step
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params
from qwen_jax.tokenizer import load_tokenizer
from train.checkpoint import Checkpoints, is_taken, read_arrays
from train.config import RunConfig, as_json, load
from train.data.feed import Feed
from train.data.mixture import Mixture
from train.data.rows import PackedRows
from train.data.shards import digest
from train.distributed import HEARTBEAT_SECONDS, check_same, join
from train.inputs import HeldOutBatches, open_data
from train.loop import LoopConfig, fit, held_out_loss
from train.observe.goodput import Clock
from train.observe.report import Report
from train.observe.trackers import check_wandb
from train.pretrain import abstract_state, fresh_state, init_state, make_eval_step, make_train_step
from train.state import TrainState

# The exit status of a program that SIGTERM has ended.
STOPPED = 128 + signal.SIGTERM
# Writes a Hugging Face folder: weights, their architecture, the folder of a checkpoint with its tokenizer, where to.
Export = Callable[[Params, ModelConfig, Path, Path], None]

_ABOUT = """\
Pre-train a model in stages. The same command goes on from the newest checkpoint,
or does nothing where the run has ended. SIGTERM saves, and ends with status 143."""
_EXAMPLES = """\
a configuration (docs/training.md; the Qwen2.5 report's are in experiments/pretrain):

  from qwen_jax.config import published
  from train.config import RunConfig, Stage
  from train.optimizer import Schedule

  def config():
      return RunConfig(
          output="runs/small",                  # log, checkpoints, curves
          model=published("qwen2.5-0.5b"),
          tokenizer="tokenizer",                # the folder that the data was built with
          data={"web": "data/web-4k"},          # folders of `qwen-jax data build`
          held_out={"web": "data/web-held-out"},
          stages=(Stage(Schedule(20_000, 3e-4, warmup_steps=500), 4096, 256, {"web": 1}),),
          evaluate_every=500,
      )

watch it:  tensorboard --logdir OUTPUT/tensorboard;  python -m train.observe.plots OUTPUT draws OUTPUT/loss.png"""


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
    parser = argparse.ArgumentParser(
        "qwen-jax train pretrain", description=_ABOUT, epilog=_EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:FUNCTION]",
        help="Python function that returns a train.config.RunConfig;\n"
        "by default `config`, or the only function of the file",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH=VALUE",
        help="change fields of it, such as stages.0.schedule.steps=100\nmesh.fsdp=8 data.web=/data/web remat=full",
    )
    parser.add_argument("--print-config", action="store_true", help="print what results as JSON, and stop")
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="trace these steps for xprof, into OUTPUT/profile; 10:13 are four steps",
    )
    parser.add_argument(
        "--distributed", action="store_true", help="first join the other processes of a SLURM, GKE, MPI or TPU job"
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
    if options.profile:
        config = dataclasses.replace(config, profile=_steps(options.profile))
    if options.print_config:
        print(json.dumps(as_json(config), indent=2))
        return 0
    if options.distributed or options.coordinator:
        join(options.coordinator, options.num_processes, options.process_id, options.heartbeat_timeout)
    return STOPPED if pretrain(config, export=export) else 0


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal():
        raise InputError(f"--profile expects the first and the last step to trace, such as 10:13; got {text!r}.")
    return int(first), int(last)


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
    clock = Clock()
    first_process = jax.process_index() == 0
    console = console or Console(stderr=True, quiet=not first_process)
    check_same("configuration", digest(as_json(config)))
    with in_step("Preparing the run"):
        if config.wandb_project and first_process:
            check_wandb()
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
    total = config.ends[-1]
    with contextlib.ExitStack() as stack:
        sigterm = stack.enter_context(_Sigterm())
        with Checkpoints(
            output / "checkpoints", config.model, tokenizer, run, config.keep_last, config.keep_every
        ) as checkpoints:
            state, step = _begin(config, checkpoints, mixture, meshes)
            exported = config.export is not None and is_taken(Path(config.export))
            if exported and step < total:
                raise InputError(
                    f"{config.export} exists already. Export to a new folder (export), or remove it first."
                )

            def stop(step: int) -> bool:
                checkpoints.check()
                return sigterm.stop(step)

            def write_export() -> None:
                if config.export is not None and export is not None and not exported:
                    checkpoints.finish()
                    export(state.params, config.pretrain(-1).model, checkpoints.folder, Path(config.export))

            if step >= total:
                console.print(
                    f"{config.output} has ended: all {total:,} steps are taken", highlight=False, soft_wrap=True
                )
                write_export()
                return False
            report = stack.enter_context(Report(config, meshes, step, console, clock))
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
                        log=report.log,
                        evaluate=held_out.evaluation(index, mesh),
                        checkpoints=_OfStage(checkpoints, stage.model, mixture.record()),
                        display=report.display,
                        stop=stop,
                        clock=clock,
                        mfu=report.mfu(index),
                        profile=report.profile,
                        loads=report.loads,
                    )
                    step = int(state.step)
                if sigterm.came:
                    break
            if step == total:
                write_export()
        report.end(step)
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
    for model in (saved, given):  # What shapes no weight.
        model["moe"] = model["moe"] and {**model["moe"], "router_aux_loss_coef": None}
    different = [name for name in given if name not in free and saved[name] != given[name]]
    if different or not (folder / "params").is_dir():
        why = ", ".join(f"{n} is {saved[n]!r} there and {given[n]!r} here" for n in different) or "it has no params/"
        hint = ""
        if "moe" in different and saved["moe"] is None:
            hint = " `qwen-jax upcycle` makes a mixture of experts of a dense checkpoint."
        raise InputError(f"The weights of {folder} do not fit the model of this run: {why}.{hint}")


def _check_vocabulary(config: RunConfig, datasets: dict[str, PackedRows]) -> None:
    model = config.model
    if beyond := [token for token in model.eos_token_ids if token >= model.vocab_size]:
        ends = sorted({rows.manifest.end_of_text for rows in datasets.values()})
        raise InputError(
            f"The model ends texts with the ids {beyond} (eos_token_ids), and has {model.vocab_size} ids in all. "
            f"Give the end-of-text id of the data's tokenizer, eos_token_ids=({', '.join(map(str, ends))},), or none."
        )
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
            f"{stage.accumulation} accumulated parts over {shards} shards of rows (data x fsdp x expert). "
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
            # Of all data sets together, every token counting the same.
            total, weights = (sum(numbers) for numbers in zip(*sums.values(), strict=True))
            means = {f"{name}_loss": nats / max(weight, 1e-8) for name, (nats, weight) in sums.items()}
            return {"loss": total / max(weights, 1e-8), **means}

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
