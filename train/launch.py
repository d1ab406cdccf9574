"""Launches a job: from its newest checkpoint to its end, through phases with objectives and meshes of their own.

A job says what is trained; `launch` opens checkpoints, restores or initialises the state, runs the loop of each phase,
answers signals, and exports. It serves any objective.
"""

import contextlib
import dataclasses
import functools
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.parallel.multihost import in_step
from qwen_jax.params import Params
from qwen_jax.tokenizer import Tokenizer
from train.checkpoint import Checkpoints, is_taken
from train.interrupt import Interruption
from train.loop import CheckpointConfig, Data, Diagnosis, LoopConfig, Measurement, Monitor, fit
from train.objective import Objective
from train.optimizer import OptimizerConfig, rate_table
from train.state import TrainState, abstract_state, fresh_state, init_state
from train.step import EvalStep, StepConfig, TrainStep, make_eval_step, make_loss_check, make_train_step

B = TypeVar("B")


@dataclasses.dataclass(frozen=True)
class Phase(Generic[B]):
    """Steps of a job that have the same objective, step configuration and mesh.

    Attributes:
      end: number of the last step, counted from 1.
      objective: what is minimised.
      step: how a step is computed.
      mesh: from `make_mesh`.
      data: the batches from a step on, counted from 0.
      evaluate: held-out metrics of a state, by the jitted evaluation step of the objective.
      measurement: what else is measured of a state.
    """

    end: int
    objective: Objective[B, Any, Any]
    step: StepConfig
    mesh: Mesh
    data: Callable[[int], Data[B]]
    evaluate: Callable[[TrainState, EvalStep[B]], Mapping[str, float]] | None = None
    measurement: Measurement | None = None


class Reporter(Protocol):
    """What a launch writes and shows; a context manager."""

    def __enter__(self) -> "Reporter": ...

    def __exit__(self, *_: object) -> None: ...

    def monitor(self, index: int) -> Monitor:
        """What watches the loop of a phase."""
        ...

    def end(self, step: int, stopped_by: int, saved: int | None) -> None:
        """Reports the end: the last step, the signal that ended the launch or 0, and the newest checkpoint."""
        ...


@dataclasses.dataclass(frozen=True)
class Export:
    """A folder that is written from the weights after the last step.

    Attributes:
      folder: its path.
      write: writes it.
    """

    folder: Path
    write: Callable[[Params], None]


@dataclasses.dataclass(frozen=True)
class Job(Generic[B]):
    """What to train, from what, and where it is saved.

    Attributes:
      folder: of the checkpoints.
      model: the architecture that checkpoints are compared with; phases may change its `rope_theta`.
      tokenizer: of the data.
      optimizer: AdamW, with the learning rate of all phases.
      phases: in order.
      say: shows a line.
      report: opens what a launch writes and shows, given the step that it begins from.
      seed: of random weights.
      identity: what else must not change on resume, as JSON values; see `Checkpoints`.
      data_record: what decides the batches, as JSON values; it is saved with each checkpoint.
      loop: when to evaluate, and when to give up.
      checkpoints: when to save.
      initial: reads the weights to begin with, given their shapes and shardings; by default they are random.
      base: for online merging, reads the weights that tau is counted from, as `initial` does.
      frozen: the parameters that are not trained, on a mesh; see `train.step.train_step`. They are read again for a
        phase on another mesh, and not saved. With LoRA they are all but its own and `LoRA.whole`.
      check_resume: raises if the job does not fit the steps taken: it is given the checkpoints and the step.
      export: after the last step.
      nothing_left: what to say if all steps are taken already.
      save_on_signals: SIGTERM and Ctrl-C save and end the run.
    """

    folder: Path
    model: ModelConfig
    tokenizer: Tokenizer
    optimizer: OptimizerConfig
    phases: tuple[Phase[B], ...]
    report: Callable[[int], Reporter]
    say: Callable[[str], None] = lambda _: None
    seed: int = 0
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_record: Mapping[str, Any] | None = None
    loop: LoopConfig = LoopConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    initial: Callable[[Params], Params] | None = None
    base: Callable[[Params], Params] | None = None
    frozen: Callable[[Mesh], Params] | None = None
    check_resume: Callable[[Checkpoints, int], None] | None = None
    export: Export | None = None
    nothing_left: str = "All steps are taken."
    save_on_signals: bool = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes:
      state: after the last step that was taken.
      step: its number.
      signal: the number of the signal that ended the launch early; 0 for none.
      steps_taken: in this launch.
    """

    state: TrainState
    step: int
    signal: int
    steps_taken: int


def launch(job: Job[B], programs: "Programs | None" = None) -> Outcome:
    """Trains from the newest checkpoint, or from the beginning, to the end of the last phase.

    Args:
      job: what to train.
      programs: compiled steps that this launch shares with others in the same process; by default it has its own.

    Raises:
      InputError: a folder, weights or data that do not fit; no room for a checkpoint; too many skipped steps.
    """
    total, frozen = job.phases[-1].end, _Frozen(job)
    steps = _Steps(job.optimizer, frozen, programs)
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption()) if job.save_on_signals else None
        with Checkpoints(job.folder, job.model, job.tokenizer, _identity(job), job.checkpoints) as checkpoints:
            # Where to begin.
            state, first = _begin(job, checkpoints, frozen, steps)
            exported = job.export is not None and is_taken(job.export.folder)
            if job.export is not None and exported and first < total:
                raise InputError(
                    f"{job.export.folder} exists already. Export to a new folder (export), or remove it first."
                )

            def stop(step: int) -> bool:
                checkpoints.check()
                return interruption is not None and interruption.stop(step)

            # The phases that are left.
            step, report = first, None
            if first >= total:
                job.say(job.nothing_left)
            else:
                report = stack.enter_context(job.report(first))
                for index, phase in enumerate(job.phases):
                    if step >= phase.end:
                        continue
                    with jax.set_mesh(phase.mesh):
                        like = _abstract_state(job, phase, frozen)
                        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, like))
                        state = fit(
                            phase.end,
                            state,
                            steps.train_step(phase),
                            phase.data(step),
                            mesh=phase.mesh,
                            config=job.loop,
                            evaluate=_evaluation(phase, steps),
                            measurement=phase.measurement,
                            checkpoints=_PhaseCheckpoints(checkpoints, phase.objective.model, job.data_record),
                            stop=stop,
                            monitor=report.monitor(index),
                            diagnosis=steps.diagnosis(phase),
                        )
                        step = int(state.step)
                    if interruption is not None and interruption.signal:
                        break
            # What follows the last step.
            stopped_by = interruption.signal if interruption is not None and step < total else 0
            if job.export is not None and not exported and step == total:
                checkpoints.finish()
                job.export.write(state.params)
        # Closing the checkpoints has waited for the last save.
        if report is not None:
            report.end(step, stopped_by, checkpoints.latest_step)
    return Outcome(state, step, stopped_by, step - first)


class _Frozen:
    """The frozen parameters on the mesh that was asked for last; those on another mesh are let go first."""

    def __init__(self, job: Job[Any]):
        self._read, self._lora = job.frozen, job.phases[0].step.lora
        self._mesh, self._params = cast("Mesh | None", None), cast("Params | None", None)

    def on(self, mesh: Mesh) -> Params | None:
        """The parameters; None if all are trained."""
        if self._read is not None and self._mesh != mesh:
            self._params = None
            with jax.set_mesh(mesh):
                self._mesh, self._params = mesh, self._read(mesh)
            both = self._params.keys() & set(self._lora.whole if self._lora else ())
            if both:
                raise ValueError(f"LoRA trains {', '.join(sorted(both))} whole, so Job.frozen must not have it.")
        return self._params


class Programs:
    """Jitted steps by what they are made of, so that each compiles once.

    Give one to several launches in a process, such as the small runs of a sweep. Runs whose model, batch and settings
    of AdamW are the same then share a training step, also with other learning rates and numbers of steps: the learning
    rate is an argument of it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Any] = {}

    def once(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call with a key.

        Args:
          key: all that decides what is made.
          make: makes it.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class _Steps:
    """The jitted steps of a job. Phases with the same objective, configuration and mesh share them."""

    def __init__(self, optimizer: OptimizerConfig, frozen: "_Frozen", programs: Programs | None):
        self._optimizer, self._frozen, self._shared = optimizer, frozen, programs is not None
        self._programs = programs or Programs()

    def _once(self, kind: str, phase: Phase[B], make: Callable[[], Any]) -> Any:
        return self._programs.once((kind, phase.objective, phase.step, phase.mesh), make)

    def _with_frozen(self, step: Callable[..., Any], phase: Phase[B]) -> Callable[..., Any]:
        frozen = self._frozen.on(phase.mesh)
        return step if frozen is None else functools.partial(step, frozen=frozen)

    def initial_state(self, phase: Phase[B], seed: int) -> TrainState:
        """Random weights and zero moments; see `init_state`. Call it under `jax.set_mesh(phase.mesh)`."""
        model, optimizer, mesh = phase.objective.model, self._optimizer, phase.mesh
        some = phase.step.lora, self._frozen.on(mesh)
        if not self._shared or some != (None, None) or not 0 <= seed < 1 << 31:
            return init_state(model, optimizer, seed, mesh, *some)
        key = ("init", model, optimizer.adamw, optimizer.merging, mesh)
        make = lambda: jax.jit(lambda seed: init_state(model, optimizer, seed, mesh))  # noqa: E731
        state: TrainState = self._programs.once(key, make)(np.int32(seed))
        return state

    def train_step(self, phase: Phase[B]) -> TrainStep[B]:
        """The training step of a phase."""
        optimizer, mesh = self._optimizer, phase.mesh
        make = lambda: make_train_step(phase.objective, optimizer, phase.step, mesh)  # noqa: E731
        if not self._shared:
            return self._with_frozen(self._once("train", phase, make), phase)
        # All but the schedule decides the program.
        key = ("train", phase.objective, phase.step, mesh, optimizer.adamw, optimizer.merging)
        rates = jax.device_put(rate_table(optimizer), NamedSharding(mesh, P()))
        return functools.partial(self._with_frozen(self._programs.once(key, make), phase), rates=rates)

    def eval_step(self, phase: Phase[B]) -> EvalStep[B]:
        """The evaluation step of a phase."""
        make = lambda: make_eval_step(phase.objective, phase.step, phase.mesh)  # noqa: E731
        return self._with_frozen(self._once("eval", phase, make), phase)

    def diagnosis(self, phase: Phase[B]) -> Diagnosis[B]:
        """How to find out why steps of a phase are skipped."""

        def finite_loss(state: TrainState, batch: B) -> bool:
            make = lambda: make_loss_check(phase.objective, phase.step, phase.mesh)  # noqa: E731
            return bool(self._once("check", phase, make)(state.params, batch, self._frozen.on(phase.mesh)))

        return Diagnosis(phase.objective.explain, finite_loss)


def _evaluation(phase: Phase[B], steps: _Steps) -> Callable[[TrainState], Mapping[str, float]] | None:
    evaluate = phase.evaluate
    if evaluate is None:
        return None
    return lambda state: evaluate(state, steps.eval_step(phase))


@dataclasses.dataclass(frozen=True)
class _PhaseCheckpoints:
    """Checkpoints that are saved with the model of a phase and the record of the data."""

    checkpoints: Checkpoints
    model: ModelConfig
    data: Mapping[str, Any] | None

    @property
    def every(self) -> int:
        return self.checkpoints.every

    def save(self, state: TrainState, step: int) -> None:
        self.checkpoints.save(state, step, self.model, self.data)

    def reject(self, step: int) -> str:
        return self.checkpoints.reject(step)


def _identity(job: Job[B]) -> Mapping[str, Any]:
    """What must not change on resume: what the job says, and what decides the arrays of the state.

    These are LoRA, for the tree of the weights, and the dtype of the moments. It is left out where it is float32, as in
    runs that began before there was another.
    """
    lora = {phase.step.lora for phase in job.phases}
    if len(lora) > 1:
        raise ValueError(f"All phases of a job must train the same parameters; their LoRA is {lora}.")
    only = next(iter(lora))
    if only is not None and job.frozen is None:
        raise InputError(
            "LoRA trains beside frozen weights, and this run has none. Leave out step.lora; qwen-jax train sft --lora "
            "tunes a model that exists. In Python, give Job.frozen."
        )
    identity, moments = job.identity, job.optimizer.adamw.moments
    if moments != "float32":
        identity = {**identity, "moments": moments}
    if only is None:
        return identity
    # Dropout that is off is left out, as in runs that began before there was any.
    off = () if only.dropout else ("dropout", "dropout_seed")
    return {**identity, "lora": {k: v for k, v in dataclasses.asdict(only).items() if k not in off}}


def _abstract_state(job: Job[B], phase: Phase[B], frozen: _Frozen) -> TrainState:
    """The state as shapes on the mesh of a phase."""
    return abstract_state(phase.objective.model, job.optimizer, phase.mesh, phase.step.lora, frozen.on(phase.mesh))


def _begin(job: Job[B], checkpoints: Checkpoints, frozen: _Frozen, steps: _Steps) -> tuple[TrainState, int]:
    """The state to begin with, on the mesh of its phase, and its step."""
    newest = checkpoints.latest_step
    if newest is not None:
        # The phase of the checkpoint's own step; any would do, for the state has one tree in all of them.
        ends = [phase.end for phase in job.phases]
        phase = job.phases[min(bisect_left(ends, newest + 1), len(ends) - 1)]
        with jax.set_mesh(phase.mesh):
            state = checkpoints.restore(_abstract_state(job, phase, frozen))
        step = int(state.step)
        if job.check_resume is not None:
            with in_step("Resuming"):
                job.check_resume(checkpoints, step)
        return state, step
    phase = job.phases[0]
    with jax.set_mesh(phase.mesh):
        if job.initial is None:
            return steps.initial_state(phase, job.seed), 0
        like = _abstract_state(job, phase, frozen).params
        base = None if job.base is None else job.base(like)
        return fresh_state(job.optimizer, job.initial(like), phase.mesh, base), 0
