"""Pre-training runs: from a configuration to a job, which `train.launch` takes to its end; the command line of it."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from qwen_jax.attention.sequence import check_length
from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from qwen_jax.parallel.multihost import in_step
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from train.checkpoint import Checkpoints, read_arrays
from train.command import add_run_arguments, join_if_asked, steps_to_trace
from train.config import RunConfig, as_json, load
from train.data.batch import Batch
from train.data.feed import Feed
from train.data.mixture import Mixture
from train.data.rows import PackedRows
from train.distributed import check_same
from train.evaluate.in_training import OpenedTasks
from train.inputs import HeldOutBatches, open_data
from train.launch import Export, Job, Phase, Programs
from train.loop import ByStep, Measurement, held_out_sums
from train.observe.goodput import Clock
from train.observe.report import Report, ReportedStage
from train.resume import changed_since_last_launch, check_moments, check_stages_taken
from train.start import begin, stage_meshes
from train.state import TrainState
from train.step import EvalStep

# Writes a Hugging Face folder: weights, their architecture, the folder of a checkpoint with its tokenizer, where to.
WriteExport = Callable[[Params, ModelConfig, Path, Path], None]

_ABOUT = """\
Pre-train a model in stages. The same command resumes from the newest checkpoint,
or does nothing if the run has ended. SIGTERM and Ctrl-C save after the step in
progress, and end with status 143 and 130; a second Ctrl-C ends at once."""
_EXAMPLES = """\
a configuration (docs/training.md; the Qwen2.5 report's are in experiments/pretrain):

  from qwen_jax.published import published
  from train.config import RunConfig, Stage
  from train.loop import LoopConfig
  from train.optimizer import Schedule

  def config():
      return RunConfig(
          output="runs/small",                  # log, checkpoints, curves
          model=published("qwen2.5-0.5b"),
          tokenizer="tokenizer",                # the folder that the data was built with
          data={"web": "data/web-4k"},          # folders of `qwen-jax data build`
          held_out={"web": "data/web-held-out"},
          stages=(Stage(Schedule(20_000, 3e-4, warmup_steps=500), 4096, 256, {"web": 1}),),
          loop=LoopConfig(evaluate_every=500),
      )

watch it:  tensorboard --logdir OUTPUT/tensorboard;  python -m train.observe.plots OUTPUT draws OUTPUT/loss.png"""


def main(argv: Sequence[str], export: WriteExport | None = None) -> int:
    """`qwen-jax train pretrain`.

    Args:
      argv: arguments after the command's name.
      export: see `pretrain`.

    Returns:
      The exit status: 0, or 128 and the number of the signal that stopped the run after a checkpoint.

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
    add_run_arguments(
        parser,
        "change fields of it, such as stages.0.schedule.steps=100\nmesh.fsdp=8 data.web=/data/web step.remat=full",
    )
    options = parser.parse_args(list(argv))
    config = load(options.config, options.set)
    if options.profile:
        config = dataclasses.replace(config, profile=steps_to_trace(options.profile))
    if options.print_config:
        print(to_json(as_json(config), indent=2))
        return 0
    join_if_asked(options)
    stopped_by = pretrain(config, export=export)
    return 128 + stopped_by if stopped_by else 0


def pretrain(
    config: RunConfig,
    console: Console | None = None,
    export: WriteExport | None = None,
    programs: Programs | None = None,
) -> int:
    """Trains from the newest checkpoint of the run's folder, or from the beginning, to the end of the last stage.

    Args:
      config: of the run. On resume, stages that have not begun may have changed.
      console: for progress; standard error by default. Only process 0 shows any.
      export: writes `config.export`; the command line has one.
      programs: compiled steps that this run shares with others in the same process; by default it has its own.

    Returns:
      The number of the signal that stopped the run early, with everything saved; 0 if it has ended.

    Raises:
      InputError: data, tokenizer, model and folder that do not fit each other or the run in the folder; a folder that
        another run is using.
    """
    begun = begin(config, console)
    with in_step("Preparing the run"):
        tokenizer = load_tokenizer(config.tokenizer)
        meshes = stage_meshes(config, config.model)
        if config.export is not None and export is None:
            raise InputError("Writing config.export needs the function `export`; the command line gives it.")
        tasks = None if config.tasks is None else OpenedTasks(config.tasks, tokenizer)
        measurements = _measurements(config, tasks, meshes, begun.say)
    opened = tokenizer, meshes, measurements, begun.console, begun.clock
    with contextlib.nullcontext() if tasks is None else contextlib.closing(tasks):
        return begun.launch(config.output, lambda: _job(config, *opened, export), programs)


def _measurements(
    config: RunConfig, tasks: OpenedTasks | None, meshes: Sequence[Mesh], say: Callable[[str], None]
) -> list[Measurement | None]:
    """How the benchmarks of a run are measured in each stage."""
    if tasks is None:
        return [None] * len(meshes)
    return [
        tasks.measurement(config.next_token(index).model, config.step_config(index), mesh, say)
        for index, mesh in enumerate(meshes)
    ]


def _job(
    config: RunConfig,
    tokenizer: Tokenizer,
    meshes: Sequence[Mesh],
    measurements: Sequence[Measurement | None],
    console: Console,
    clock: Clock,
    export: WriteExport | None,
) -> Job[Batch]:
    """Opens the data of a run, checks that all fits, and says what to train."""
    output = Path(config.output).absolute()
    datasets, held_out_rows = open_data(config, console)
    with in_step("Preparing the run"):
        mixture = Mixture(config.mixture_stages(), datasets, config.seed)
        mixture.check_tokenizer(tokenizer.fingerprint())
        _check_vocabulary(config, datasets)
        if config.initial is not None and not (output / "checkpoints").exists():
            _check_initial(config, Path(config.initial))
        changes = changed_since_last_launch(config)
    check_same("data", mixture.fingerprint())
    held_out = _HeldOut(config, held_out_rows, tokenizer.fingerprint())

    def phase(index: int) -> Phase[Batch]:
        mesh = meshes[index]
        return Phase(
            end=config.ends[index],
            objective=config.next_token(index),
            step=config.step_config(index),
            mesh=mesh,
            data=lambda step: ByStep(Feed(mixture, step, mesh)),
            evaluate=held_out.evaluation(index, mesh),
            measurement=measurements[index],
        )

    def check_resume(checkpoints: Checkpoints, step: int) -> None:
        mixture.check_resume(checkpoints.data(step) or {}, step)
        check_stages_taken(config, step, checkpoints.model(step), changes)
        check_moments(config, changes)

    def report(step: int) -> Report:
        shown = mixture.describe_epochs()
        return Report(config, reported_stages(config, meshes), step, console, clock, shown, changes if step else {})

    def initial(like: Params) -> Params:
        with in_step(f"Reading the weights of {config.initial}"):
            return _initial_weights(Path(str(config.initial)).absolute() / "params", like)

    def write_export(params: Params) -> None:
        assert config.export is not None
        assert export is not None
        export(params, config.next_token(-1).model, output / "checkpoints", Path(config.export))

    return Job(
        folder=output / "checkpoints",
        model=config.model,
        tokenizer=tokenizer,
        optimizer=config.optimizer_config(),
        phases=tuple(phase(index) for index in range(len(config.stages))),
        report=report,
        seed=config.seed,
        identity={"seed": config.seed, "initial": config.initial},
        data_record=mixture.record(),
        loop=config.loop,
        checkpoints=config.checkpoints,
        initial=None if config.initial is None else initial,
        check_resume=check_resume,
        export=None if config.export is None else Export(Path(config.export), write_export),
        nothing_left=f"{config.output} has ended: all {config.ends[-1]:,} steps are taken",
    )


def reported_stages(config: RunConfig, meshes: Sequence[Mesh]) -> list[ReportedStage]:
    """The stages for a report.

    Args:
      config: of the run.
      meshes: of each stage.
    """
    return [
        ReportedStage(end, s.batch_size, s.length, s.schedule.learning_rate, config.next_token(i).model, mesh)
        for i, (s, end, mesh) in enumerate(zip(config.stages, config.ends, meshes, strict=True))
    ]


def _initial_weights(folder: Path, like: Params) -> Params:
    try:
        return read_arrays(folder, like)
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # Orbax has no narrower type for an array that cannot be read.
        reason = str(error).strip().partition("\n")[0][:300]
        raise InputError(f"The weights in {folder} are damaged: {reason}. Copy them again.") from error


def _check_initial(config: RunConfig, folder: Path) -> None:
    saved = dataclasses.asdict(load_config(folder))
    given = dataclasses.asdict(config.model)
    free = ("rope_theta", "max_position_embeddings", "dtype", "yarn", "dual_chunk")
    for model in (saved, given):  # It changes no weight's shape.
        model["moe"] = model["moe"] and {**model["moe"], "router_aux_loss_coef": None}
    different = [name for name in given if name not in free and saved[name] != given[name]]
    if different or not (folder / "params").is_dir():
        why = ", ".join(f"{n} is {saved[n]!r} there and {given[n]!r} here" for n in different) or "it has no params/"
        hint = ""
        if "moe" in different and saved["moe"] is None:
            hint = " `qwen-jax upcycle` makes an MoE model of a dense checkpoint."
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


class _HeldOut:
    """Mean loss on each held-out data set."""

    def __init__(self, config: RunConfig, rows: Mapping[str, PackedRows], tokenizer: str):
        self._config, self._rows = config, rows
        for name, data in rows.items():
            if data.manifest.tokenizer != tokenizer:
                raise InputError(f"The held-out data set {name!r} was built with another tokenizer. Build it again.")

    def evaluation(self, index: int, mesh: Mesh) -> Callable[[TrainState, EvalStep[Batch]], Mapping[str, float]] | None:
        """The evaluation of a stage, for `Phase`; None without data."""
        if not self._rows:
            return None
        for name, rows in self._rows.items():
            where = f"Stage {index + 1}, the held-out data set {name!r}: "
            check_length(rows.length, mesh.shape["context"], where=where)
        # As many rows at a time as a micro-batch has.
        size = self._config.stages[index].batch_size // self._config.step_config(index).accumulation
        batches = {name: HeldOutBatches(rows, size, mesh) for name, rows in self._rows.items()}

        def evaluate(state: TrainState, eval_step: EvalStep[Batch]) -> dict[str, float]:
            sums = {name: held_out_sums(state.params, eval_step, parts, mesh) for name, parts in batches.items()}
            # Over all data sets together, every token counts the same.
            total = jax.tree.map(lambda *x: sum(x), *(of_set for of_set, _ in sums.values()))
            means = {f"{name}_loss": of_set.mean_loss() for name, (of_set, _) in sums.items()}
            return {"loss": total.mean_loss(), **means}

        return evaluate
