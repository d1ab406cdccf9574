"""Tuning runs: from a configuration to a job, which `train.launch` takes to its end."""

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qwen_jax.config import ModelConfig
from qwen_jax.parallel.multihost import gather_from_processes, in_step
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer
from train.checkpoint import Checkpoints
from train.data.batch import place_part, row_part
from train.data.example_batches import PackedExamples, PackedPairs, PackedSequences, RowConfig
from train.data.example_mixture import MixedExamples
from train.data.example_store import ExampleStore, open_store
from train.data.feed import Batches, Feed
from train.data.shards import digest
from train.distributed import check_same, from_process_0
from train.dpo import Dpo
from train.evaluate.in_training import OpenedTasks
from train.files import write_file
from train.launch import Export, Job, Phase
from train.loop import ByStep, held_out_sums
from train.observe.report import Report, ReportedStage
from train.reference import reference_log_probs
from train.resume import changed_tuning, check_moments, check_rope
from train.samples import Prompt, write_samples
from train.start import Started, begin, stage_meshes
from train.state import TrainState
from train.step import EvalStep
from train.tune_config import TuneConfig
from train.tuned import Formats, TunedModel, check_beside


def tune(config: TuneConfig, formats: Formats, console: Console | None = None) -> int:
    """Tunes a model from the newest checkpoint of the run's folder, or from the beginning, to the end of the run.

    Args:
      config: of the run.
      formats: reads and writes models.
      console: for progress; standard error by default. Only process 0 shows any.

    Returns:
      The number of the signal that stopped the run early, with everything saved; 0 if it has ended.

    Raises:
      InputError: data, model and folder that do not fit each other or the run in the folder; a folder in use.
    """
    begun = begin(config, console)
    with in_step("Preparing the run"):
        model, tokenizer, origin = formats.describe(config.model)
        meshes = stage_meshes(config, model)
        for field, path in (("reference", config.reference), ("base", config.base)):
            if path is not None:
                check_beside(field, path, config.model, tokenizer, formats)
        tasks = None if config.tasks is None else OpenedTasks(config.tasks, tokenizer)
    opened = model, tokenizer, origin, meshes, tasks, begun
    with contextlib.nullcontext() if tasks is None else contextlib.closing(tasks):
        return begun.launch(config.output, lambda: _Run(config, formats, *opened).job())


class _Run:
    """A run whose data is open."""

    def __init__(
        self,
        config: TuneConfig,
        formats: Formats,
        model: ModelConfig,
        tokenizer: Tokenizer,
        origin: Path,
        meshes: Sequence[Mesh],
        tasks: OpenedTasks | None,
        begun: Started,
    ):
        self.config, self.formats, self.tokenizer = config, formats, tokenizer
        self.meshes, self.console, self.clock = meshes, begun.console, begun.clock
        self.output = Path(config.output).absolute()
        with in_step("Preparing the run"):
            self.changes = changed_tuning(config)
        # A reward model begins with a new head, unless the checkpoint has one.
        new_head = config.method == "reward" and model.score is None
        self.model = config.trained_model(model)
        self.tuned = TunedModel(config, formats, self.model, tokenizer, origin, new_head)
        # Examples of the stages, one after the other, and the steps that they make.
        self.packed = [self._pack(index) for index in range(len(config.stages))]
        self.steps = [
            max(1, round(stage.epochs * packed.rows_per_epoch / stage.batch_size))
            for stage, packed in zip(config.stages, self.packed, strict=True)
        ]
        self.ends = np.cumsum(self.steps).tolist()
        check_same("data", digest([packed.record() for packed in self.packed]))
        # Those to evaluate on, in rows like the first stage's.
        self.held_out = {
            name: self._open({name: path}, 0, epochs=1, what="held_out") for name, path in config.held_out.items()
        }
        pairs = [p.max_segments for p in (*self.packed, *self.held_out.values())]
        self.max_segments = max(pairs) if config.kind == "pairs" else 2
        count = range(len(config.stages))
        self.objectives = [config.objective_of(index, self.model, self.max_segments) for index in count]
        self.measurements = [
            None
            if tasks is None
            else self.tuned.measurement(tasks, objective.model, config.step_config(index), mesh, begun.say)
            for index, (objective, mesh) in enumerate(zip(self.objectives, meshes, strict=True))
        ]

    def _pack(self, index: int) -> PackedExamples[Any] | MixedExamples[Any]:
        sources, mixture = self.config.data_of(index), self.config.stages[index].mixture
        if not mixture:
            return self._open(sources, index, epochs=None, what="data")
        opened = {name: self._open({name: path}, index, None, "data") for name, path in sources.items()}
        return MixedExamples(opened, {name: mixture[name] for name in opened})

    def _open(self, sources: Mapping[str, str], index: int, epochs: int | None, what: str) -> PackedExamples[Any]:
        """Tokenizes examples, unless that was done before, and packs them into the rows of a stage."""
        config, stage = self.config, self.config.stages[index]

        def opened() -> ExampleStore:
            return open_store(
                list(sources.values()),
                self.tokenizer,
                self.output / "examples",
                kind=config.kind,
                options=config.examples,
                progress=self.console,
            )

        # Process 0 tokenizes, and the others find its work.
        store: ExampleStore | None = None
        with in_step(f"Tokenizing {what} {', '.join(sources)}"):
            if jax.process_index() == 0:
                store = opened()
        with in_step(f"Opening {what} {', '.join(sources)}"):
            if store is None:
                store = opened()
            if config.method == "reward":
                self._tell_padding(store)
            rows = RowConfig(stage.length, stage.batch_size, config.seed, epochs, config.too_long, config.max_segments)
            return (PackedPairs if config.kind == "pairs" else PackedSequences)(store, rows)

    def _tell_padding(self, store: ExampleStore) -> None:
        """Says which pairs transformers would score at another token: it looks for the last that is no padding."""
        found = store.ending_with(self.tokenizer.pad_id)
        if len(found):
            text = (
                f"{len(found):,} of {len(store):,} pairs end with the token that is also padding "
                f"({store.where(int(found[0]))}): the score is trained at this token, where `qwen-jax score` reads it, "
                "and transformers would read it one token earlier. To use transformers, give messages, or a tokenizer "
                "with another pad_token."
            )
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def job(self) -> Job[Any]:
        """What `launch` takes to its end."""
        config, output = self.config, self.output
        # Log-probabilities of the reference, of all pairs, before the weights of the policy are read.
        if config.method == "dpo":
            self._fill_references()
        records = [packed.record() for packed in self.packed]
        folder = config.export_folder
        return Job(
            folder=output / "checkpoints",
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=config.optimizer_config(self.steps),
            phases=tuple(self._phase(index) for index in range(len(config.stages))),
            report=self._report,
            seed=config.seed,
            identity={"seed": config.seed, "method": config.method, "model": config.model},
            data_record={"stages": records},
            loop=config.loop,
            checkpoints=config.checkpoints,
            initial=self.tuned.initial,
            base=None if config.base is None else lambda like: self.tuned.whole(str(config.base), like),
            frozen=None if config.step.lora is None else self.tuned.frozen,
            check_resume=self._check_resume,
            export=None
            if folder is None
            else Export(folder, lambda params: self.tuned.export(params, self.objectives[-1].model)),
            nothing_left=f"{config.output} has ended: all {self.ends[-1]:,} steps are taken",
        )

    def _phase(self, index: int) -> Phase[Any]:
        config, mesh, packed = self.config, self.meshes[index], self.packed[index]
        first = self.ends[index] - self.steps[index]
        return Phase(
            end=self.ends[index],
            objective=self.objectives[index],
            step=config.step_config(index),
            mesh=mesh,
            data=lambda step: ByStep(Feed(_From(packed, first), step, mesh)),
            evaluate=self._evaluation(index),
            measurement=self.measurements[index],
        )

    def _evaluation(self, index: int) -> Callable[[TrainState, EvalStep[Any]], Mapping[str, float]] | None:
        """The objective's metrics on each held-out data set, and the mean loss of all; None without data."""
        if not self.held_out:
            return None
        objective, mesh = self.objectives[index].for_evaluation(), self.meshes[index]
        prompts = self._prompts(index)

        def evaluate(state: TrainState, eval_step: EvalStep[Any]) -> dict[str, float]:
            totals, metrics = [], {}
            for name, packed in self.held_out.items():
                total, statistics = held_out_sums(state.params, eval_step, _placed(packed, mesh), mesh)
                totals.append(total)
                metrics[f"{name}_loss"] = total.mean_loss()
                for key, value in objective.metrics(statistics, jnp.maximum(total.weight, 1e-8)).items():
                    if jnp.ndim(value) == 0:
                        metrics[f"{name}_{key}"] = float(value)
            if prompts:
                self._sample(index, state, prompts)
            return {"loss": jax.tree.map(lambda *x: sum(x), *totals).mean_loss(), **metrics}

        return evaluate

    def _prompts(self, index: int) -> list[Prompt]:
        """Held-out prompts to complete in a stage: of every file in turn; none where they cannot be completed."""
        config = self.config
        if config.method == "reward" or not config.samples:
            return []
        if self.model.quantization is not None:
            # The engine takes no update beside codes.
            self.console.print("no samples are written beside quantised weights", highlight=False, markup=False)
            return []
        stores = [(packed.store, packed.selection.units.tolist()) for packed in self.held_out.values()]
        turns = itertools.zip_longest(*([(store, unit) for unit in units] for store, units in stores))
        found = [Prompt.of(one[0].answers(one[1])[0]) for turn in turns for one in turn if one is not None]
        return found[: config.samples]

    def _sample(self, index: int, state: TrainState, prompts: Sequence[Prompt]) -> None:
        step, lora = self.config.step_config(index), self.config.step.lora
        params = self.tuned.with_frozen(state.params, self.meshes[index])
        texts = write_samples(
            *(self.output, int(state.step), self.objectives[index].model, params, lora, self.meshes[index]),
            *(step.dtype, self.tokenizer, prompts, self.tuned.end_ids(), self.config.sample_tokens),
        )
        self.console.print(f"sample: {texts[0]!r:.200}", highlight=False, markup=False, soft_wrap=True)

    def _fill_references(self) -> None:
        """Computes the reference's log-probabilities of each pair, or reads those of an earlier launch."""
        config = self.config
        path = config.reference or config.model
        model, _, _ = self.formats.describe(path)
        with in_step(f"Hashing the weights of {path}"):
            digest_here = self.formats.fingerprint(path) if jax.process_index() == 0 else ""
        source = from_process_0(digest_here)
        # Weights that were read serve all examples on their mesh.
        loaded: tuple[Mesh, Params] | None = None
        everything = [(p, 0) for p in self.held_out.values()]
        for i, whole in enumerate(self.packed):
            parts = whole.sources.values() if isinstance(whole, MixedExamples) else [whole]
            everything += [(part, i) for part in parts]
        for packed, index in everything:
            assert isinstance(packed, PackedPairs)
            # The reference has no adapter.
            mesh, step = self.meshes[index], dataclasses.replace(config.step_config(index), lora=None)
            record = {k: v for k, v in packed.record().items() if k not in ("seed", "batch_size", "epochs")}
            # Left out where they are of the compute dtype, as in runs that began before there were others.
            products = [] if step.products == "bfloat16" else [step.products]
            key = digest([source, dataclasses.asdict(model), record, step.dtype, *products])
            file = self.output / "reference" / f"{key[:32]}.npy"
            # Every process takes part, if one of them does not see the file.
            if not gather_from_processes(int(file.exists())).all():
                objective = config.objective_of(index, model, packed.max_segments)
                assert isinstance(objective, Dpo)
                with jax.set_mesh(mesh):
                    if loaded is None or loaded[0] != mesh:
                        loaded = None
                        loaded = mesh, self.formats.load(path, model, mesh, step.dtype)
                    values = reference_log_probs(objective, step, mesh, loaded[1], packed, self.console)
                with in_step(f"Writing {file}"):
                    if jax.process_index() == 0:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        write_file(file, _npy(values))
            with in_step(f"Reading {file}"):
                packed.references = np.load(file, allow_pickle=False)

    def _check_resume(self, checkpoints: Checkpoints, step: int) -> None:
        """Checks that the steps taken had the same examples and RoPE base, and moments the same unit."""
        check_moments(self.config, self.changes)
        check_rope(self.ends, [objective.model for objective in self.objectives], step, checkpoints.model(step))
        saved = (checkpoints.data(step) or {}).get("stages", [])
        for index, (packed, end) in enumerate(zip(self.packed, self.ends, strict=True)):
            taken = min(max(step - (end - self.steps[index]), 0), self.steps[index])
            if taken:
                packed.check_resume(saved[index] if index < len(saved) else {}, taken)

    def _report(self, step: int) -> Report:
        stages = [
            ReportedStage(end, stage.batch_size, stage.length, stage.learning_rate, objective.model, mesh)
            for end, stage, objective, mesh in zip(
                self.ends, self.config.stages, self.objectives, self.meshes, strict=True
            )
        ]
        shown = [f"stage {i}: {packed.describe()}" for i, packed in enumerate(self.packed, 1)]
        shown += [f"held out, {name}: {packed.describe()}" for name, packed in self.held_out.items()]
        changes = self.changes if step else {}
        of_launch = self.config, stages, step, self.console, self.clock, "\n".join(shown), changes
        unit = "nats a token" if self.config.kind == "sft" else "a pair"
        adapter = self.config.step.lora is not None
        return Report(*of_launch, exported=self.config.export_folder, adapter=adapter, unit=unit)


class _From(Batches[Any]):
    """Examples whose first batch is that of a later step of the run."""

    def __init__(self, packed: PackedExamples[Any] | MixedExamples[Any], first: int):
        self._packed, self._first = packed, first

    @property
    def end(self) -> int:
        return self._first + self._packed.end

    def batch_size(self, step: int) -> int:
        return self._packed.batch_size(step - self._first)

    def part_size(self, step: int, process_count: int) -> int:
        return self._packed.part_size(step - self._first, process_count)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Any:
        return self._packed.batch(step - self._first, process_index, process_count)


def _placed(packed: PackedExamples[Any], mesh: Mesh) -> Iterable[Any]:
    """All batches of an epoch, on the devices."""
    size = packed.config.batch_size
    part = row_part(mesh, size)
    for step in range(len(packed)):
        yield place_part(packed.batch(step, *part), size, mesh)


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()
