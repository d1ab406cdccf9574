"""Benchmarks while a model trains: its weights answer the first items of tasks every so many steps."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import ContinuousEngine
from qwen_jax.inference.likelihood import LikelihoodScorer
from qwen_jax.lora import merged
from qwen_jax.parallel.broadcast import Exchange
from qwen_jax.parallel.multihost import gather_from_processes
from qwen_jax.parallel.sharding import on_mesh, without_context
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer
from train.evaluate.encoding import RequestEncoder
from train.evaluate.registry import find, locate
from train.evaluate.run import NO_TOOLS, ask, judge, values_of
from train.evaluate.store import Store
from train.evaluate.task import Generate, Item, Task, Verdict
from train.evaluate.token_model import TokenModel
from train.fields import at_least
from train.handover import InferenceLayout, local_meshes, split_mesh
from train.loop import Measurement
from train.state import TrainState
from train.step import StepConfig

PREFIX = "task/"


@dataclasses.dataclass(frozen=True)
class TaskEvaluation:
    """Benchmarks that a run measures while it trains.

    Attributes:
      tasks: their names, as for `qwen-jax eval`.
      every: steps between two measurements; also before the first step, and after the last of each stage.
      limit: the first items of each task; None for all.
      seconds: that one measurement may take. Each task has an equal part of what is left.
      items_at_a_time: items between two looks at the clock. So many are asked of each task in any case.
      data_root: below it the files of tasks lie.
      allow_changed: whether a file may differ from all published versions.
      max_seqs: texts that are generated at the same time.

    Raises:
      InputError: a value out of range.
    """

    tasks: tuple[str, ...]
    every: int
    limit: int | None = 200
    seconds: float = 120.0
    items_at_a_time: int = 32
    data_root: str | None = None
    allow_changed: bool = False
    max_seqs: int = 32

    def __post_init__(self) -> None:
        at_least(self, every=1, limit=1, items_at_a_time=1, max_seqs=1)
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise InputError(f"seconds must be positive, got {self.seconds}.")


class _FreedError(Exception):
    """Ends an update of an engine's weights after the old ones are freed."""


class OpenedTasks:
    """The tasks of a run with their items, read once. Close it at the end of the run.

    Attributes:
      generates: whether a task asks for texts.
    """

    def __init__(self, config: TaskEvaluation, tokenizer: Tokenizer):
        """
        Args:
          config: which tasks.
          tokenizer: of the model.

        Raises:
          InputError: an unknown task, missing or changed data, or a task that needs a judge or a sandbox.
        """
        self.config, self._tokenizer = config, tokenizer
        self._engine: ContinuousEngine | None = None
        self._work: list[tuple[Task, Sequence[Item]]] = []
        root = None if config.data_root is None else Path(config.data_root)
        for task in find(config.tasks):
            if task.needs_judge or task.needs_sandbox:
                what = "a judge" if task.needs_judge else "a sandbox"
                raise InputError(
                    f"The task {task.name} needs {what}, which a training run has not. Evaluate checkpoints by "
                    "qwen-jax eval."
                )
            files = locate(task, root, config.allow_changed)
            items = list(task.items({one.file.path: one.path for one in files}))[: config.limit]
            if not items:
                raise InputError(f"The task {task.name} has no items in its files.")
            self._work.append((task, items))
        self.generates = any(isinstance(r, Generate) for t, items in self._work for r in t.requests(items[0], []))
        self._exchange = Exchange()

    def measurement(
        self,
        model: ModelConfig,
        step: StepConfig,
        mesh: Mesh,
        say: Callable[[str], None],
        whole: Callable[[Params], Params] = lambda params: params,
        end_ids: Sequence[int] | None = None,
    ) -> Measurement:
        """How the weights of a stage are measured, for `train.loop.fit`; the arguments are those of `measure_on`.

        Args:
          whole: gives all weights of the model from those that are trained.
        """
        measure = self.measure_on(model, step, mesh, say, end_ids)

        def of_state(state: TrainState) -> dict[str, float]:
            return measure(whole(state.params))

        return Measurement(self.config.every, of_state)

    def measure_on(
        self,
        model: ModelConfig,
        step: StepConfig,
        mesh: Mesh,
        say: Callable[[str], None],
        end_ids: Sequence[int] | None = None,
    ) -> Callable[[Params], dict[str, float]]:
        """How the weights of a stage are measured.

        Log-likelihoods read the trained weights where they lie, and a context axis shards texts. With LoRA they read a
        copy in the compute dtype, in which the adapter is merged as `qwen-jax eval --adapter` merges it. Texts are
        generated by an engine on the first devices of the mesh, as many as its tensor and expert axes have, or with
        several processes by one on the first such devices of each: it has a copy of the weights in the compute dtype
        and in the inference layout. Copies are freed after each measurement. The engine's programs and pages are kept.

        Args:
          model: the architecture.
          step: of the training.
          mesh: of the training.
          say: shows a line.
          end_ids: ids that end a text; by default those of the model and of the tokenizer.

        Returns:
          A function of all parameters, LoRA's among them. It returns for each task `task/NAME/METRIC`, in the metric's
          own unit, and `task/NAME/items`, how many were scored in time. A measurement that fails shows why, and returns
          what it has.

        Raises:
          InputError: LoRA beside quantised weights, or a tensor or expert axis that spans processes with tasks that
            generate.
        """
        if model.quantization is not None:
            raise InputError(
                "An adapter cannot be merged into quantised weights, so that tasks are not measured in training. Leave "
                "`tasks` out; serve the checkpoint with its adapter, and evaluate it by qwen-jax eval --base-url."
            )
        mesh = without_context(mesh)
        encoder = RequestEncoder(self._tokenizer, model.context_length)
        lora, plain = step.lora, dataclasses.replace(step, lora=None)
        layout: InferenceLayout | None = None
        if self.generates:
            target = local_meshes(split_mesh(mesh, mesh.shape["tensor"], mesh.shape["expert"]))[0]
            layout = InferenceLayout(model, plain, mesh, [target], step.dtype)
        merge = None if lora is None else jax.jit(functools.partial(merged, lora=lora))

        @contextlib.contextmanager
        def ready(params: Params) -> Iterator[TokenModel]:
            params = on_mesh(params, mesh)
            if merge is not None:
                with jax.set_mesh(mesh):
                    params = merge(params)
            scorer = LikelihoodScorer(model, params, mesh, dtype=step.dtype, attention=step.attention)
            if layout is None:
                yield TokenModel("training", encoder, scorer, None)
                return
            engine = self._engine
            if engine is not None and (engine.config, engine.mesh) == (model, target):
                engine.update_weights(lambda: layout(params)[0])
            else:
                self.close()
                engine = self._engine = ContinuousEngine(
                    *(model, layout(params)[0], target),
                    tokenizer=self._tokenizer,
                    dtype=step.dtype,
                    max_seqs=self.config.max_seqs,
                    num_pages=_pages(self.config.max_seqs, model.context_length),
                    eos_token_ids=end_ids,
                )
            try:
                yield TokenModel("training", encoder, scorer, engine, exchange=self._exchange)
            finally:
                with contextlib.suppress(_FreedError):
                    engine.update_weights(_no_weights)

        def measure(params: Params) -> dict[str, float]:
            end = time.monotonic() + self.config.seconds
            numbers: dict[str, float] = {}
            try:
                with ready(params) as answers:
                    for i, (task, items) in enumerate(self._work):
                        now = time.monotonic()
                        numbers |= self._numbers(answers, task, items, now + (end - now) / (len(self._work) - i), say)
            except InputError as error:
                say(f"tasks were not measured: {error}")
            return numbers

        return measure

    def close(self) -> None:
        """Ends the engine, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _numbers(
        self, model: TokenModel, task: Task, items: Sequence[Item], end: float, say: Callable[[str], None]
    ) -> dict[str, float]:
        """The metrics of a task on as many items as there is time for."""
        store, size = Store(model, None), self.config.items_at_a_time
        verdicts: list[Verdict] = []
        longest = 0.0
        while len(verdicts) < len(items):
            begin = time.monotonic()
            # All processes ask the same. What follows must end in time if it takes no longer than what was.
            if verdicts and not gather_from_processes(int(begin + longest <= end)).all():
                break
            part = items[len(verdicts) : len(verdicts) + size]
            verdicts += judge(task, part, ask(store, task, part, quiet=True), NO_TOOLS)
            longest = max(longest, time.monotonic() - begin)
        found: dict[str, float] = {}
        for metric in task.metrics:
            if values := values_of(metric, verdicts):
                found[f"{PREFIX}{task.name}/{metric.name}"] = float(metric.aggregate(values))
        problems = [verdict.problem for verdict in verdicts if verdict.problem is not None]
        if problems:
            say(f"{task.name}: {len(problems)} of {len(verdicts)} items have no score, such as: {problems[0]:.200}")
        return {**found, f"{PREFIX}{task.name}/items": float(len(verdicts) - len(problems))}


def _no_weights() -> Params:
    raise _FreedError


def _pages(max_seqs: int, context: int, size: int = 32) -> int:
    """Pages for as many texts of 2048 tokens, and at least one of the whole context: training has the other memory."""
    return max(max_seqs * -(-min(context, 2048) // size), -(-context // size)) + 1
