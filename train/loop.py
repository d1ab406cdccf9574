"""The training loop: feeds the device, reads its metrics one step late, evaluates, saves. It knows no objective."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from qwen_jax.params import Params
from train.data.batch import place
from train.fields import at_least
from train.objective import Metrics, Sums, join_statistics
from train.observe.display import Display
from train.observe.goodput import Clock, compilation
from train.observe.profile import Profile
from train.observe.trackers import Log
from train.state import TrainState
from train.step import EvalStep, TrainStep

_log = logging.getLogger(__name__)

B = TypeVar("B")
Produced = TypeVar("Produced", covariant=True)


class SharedError(Exception):
    """All processes of the run fail together, at the same place: the loop saves its state, and raises the cause.

    Where one process fails with an error of any kind, the others have to raise this too: they save together.
    """


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A block that fails in all processes where it fails in one; an error of any kind becomes a `SharedError`."""
    try:
        yield
    except Exception as error:
        raise SharedError(str(error)) from error


class Data(Protocol[Produced]):
    """Where the loop gets its batches."""

    def batch(self, step: int, state: TrainState) -> Produced:
        """The global batch of a step.

        In pre-training it is a function of the step alone, so that nothing else is needed to resume. Reinforcement
        learning generates it with the weights of the state.

        Args:
          step: counted from 0; the loop asks for one after the other.
          state: before the step. Its buffers are donated to the step: do not keep them.

        Returns:
          NumPy arrays, the same in every process, or arrays on the devices already.

        Raises:
          SharedError: in every process, from the error of this one; for example, a reward function has failed.
        """
        ...


class Indexed(Protocol[Produced]):
    """A sequence of batches by the number of their step; a `grain.MapDataset` is one."""

    def __getitem__(self, step: int, /) -> Produced: ...


class ByStep(Generic[B]):
    """`Data` whose batch is a pure function of the step."""

    def __init__(self, batches: Indexed[B]):
        """Args:
        batches: `batches[step]` is the global batch of a step.
        """
        self._batches = batches

    def batch(self, step: int, state: TrainState) -> B:
        """The batch of a step, whatever the state."""
        return self._batches[step]


class Saves(Protocol):
    """Where states are saved, and how often; `train.checkpoint.Checkpoints` is one."""

    @property
    def every(self) -> int:
        """Steps between two saves; 0 saves only where the run is stopped."""
        ...

    def save(self, state: TrainState, step: int) -> None:
        """Saves the state after a step."""
        ...

    def reject(self, step: int) -> str:
        """Hears that the weights after a step are ruined; says what that means for the checkpoints."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When the loop evaluates, and when it gives up.

    Attributes:
      evaluate_every: steps between two evaluations; also before the first step and after the last. 0 is never.
      max_skipped: end the run after this many skipped steps in a row.

    Raises:
      InputError: a value out of range.
    """

    evaluate_every: int = 0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        at_least(self, evaluate_every=0, max_skipped=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, and which checkpoints it keeps.

    Attributes:
      every: steps between two saves; also after the last step. 0 saves only where the run is stopped.
      keep_last: how many of the newest checkpoints are kept.
      keep_every: checkpoints of steps that are a multiple of it are kept too; 0 is none.

    Raises:
      InputError: a value out of range.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        at_least(self, every=0, keep_last=1, keep_every=0)


@dataclasses.dataclass
class Monitor:
    """What watches a run. Everything may be left out.

    Attributes:
      log: gets a record for each step and each evaluation.
      display: shows progress.
      clock: of the run; with it, the log gets a record of where the time went every minute and at each checkpoint.
      mfu: model FLOPs utilisation at a rate in tokens per second, for the log.
      profile: steps to trace.
      arrays: gets the metrics that are arrays rather than scalars: step, name and value; may raise `SharedError`.
    """

    log: Log | None = None
    display: Display | None = None
    clock: Clock | None = None
    mfu: Callable[[float], float] | None = None
    profile: Profile | None = None
    arrays: Callable[[int, str, np.ndarray], None] | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured of the weights besides held-out metrics, such as benchmarks.

    Attributes:
      every: steps between two measurements; also before the first step and after the last.
      measure: metrics of a state, by their names in the log.
    """

    every: int
    measure: Callable[[TrainState], Mapping[str, float]]


def _no_explanation(numbers: Mapping[str, float]) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Diagnosis(Generic[B]):
    """How to find out why steps are skipped.

    Attributes:
      explain: a sentence on a step's metrics, or ""; see `Objective.explain`.
      finite_loss: whether a state's loss on a batch is finite. It is called only when the run is about to end after
        skipped steps. None leaves the question open.
    """

    explain: Callable[[Mapping[str, float]], str] = _no_explanation
    finite_loss: Callable[[TrainState, B], bool] | None = None


def fit(
    steps: int,
    state: TrainState,
    train_step: TrainStep[B],
    data: Data[B],
    *,
    mesh: Mesh,
    config: LoopConfig = LoopConfig(),
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    measurement: Measurement | None = None,
    checkpoints: Saves | None = None,
    stop: Callable[[int], bool] | None = None,
    monitor: Monitor | None = None,
    diagnosis: Diagnosis[B] | None = None,
) -> TrainState:
    """Trains from the step that the state is at. Call it under `jax.set_mesh(mesh)`.

    The host only enqueues work: the metrics of a step are read after the next step was enqueued, so that the device
    always has work.

    No state is saved after skipped steps: the save is postponed to the next accepted step.

    Args:
      steps: train until this many are taken.
      state: fresh or restored; it is donated.
      train_step: as from `make_train_step`.
      data: the batches.
      mesh: where batches are placed.
      config: when to evaluate, and when to give up.
      evaluate: held-out metrics of a state; may raise `SharedError`, as `Data.batch` may.
      measurement: what else is measured of a state.
      checkpoints: where to save.
      stop: asked after each step, with its number; if it says yes, the state is saved and returned.
      monitor: what watches the run.
      diagnosis: how to find out why steps are skipped.

    Returns:
      The state after `steps` steps, or where it was stopped.

    Raises:
      InputError: too many steps in a row were skipped, or the last steps were and the weights are ruined. Complete
        checkpoints are kept.
      Exception: the cause of a `SharedError` of the data, the evaluation or the monitor, once the state is saved.
    """
    first = saved = int(state.step)
    reader = _Reader(monitor or Monitor(), diagnosis or Diagnosis())
    monitor, clock = reader.monitor, reader.clock
    save_every = checkpoints.every if checkpoints else 0
    postponed = False  # A checkpoint is due, and waits for a step that is accepted.
    clock.lap("initialisation")

    def report(step: int, following: tuple[int, Metrics, B] | None = None) -> None:
        with saving(step):
            reader.read(following)
        if reader.skipped == config.max_skipped:
            raise InputError(reader.why_to_give_up(state, checkpoints))

    def held_out(step: int, all_of_it: bool) -> None:
        if evaluate and config.evaluate_every and (all_of_it or _due(step, config.evaluate_every)):
            clock.lap("step")
            before = clock.seconds["evaluation"]
            with saving(step):
                numbers = {f"held_out_{name}": value for name, value in evaluate(state).items()}
            clock.lap("evaluation")
            reader.evaluated(step, numbers, clock.seconds["evaluation"] - before)
        if measurement and (all_of_it or _due(step, measurement.every)):
            clock.lap("step")
            measured = measurement.measure(state)
            clock.lap("evaluation")
            reader.measured(step, measured)

    def save(step: int, final: bool) -> None:
        nonlocal postponed, saved
        assert checkpoints is not None
        if reader.skipped and (not final or reader.ruined(state)):
            if not postponed or final:
                when = "nothing is saved" if final else "the checkpoint waits for a step that is accepted"
                reader.say(f"step {step}: {when}, because the last {reader.skipped} steps were skipped")
            postponed = True
            return
        postponed = False
        clock.lap("step")
        if monitor.log:
            monitor.log.flush()  # A run that resumes from this checkpoint does not write earlier records again.
        checkpoints.save(state, step)
        saved = step
        clock.lap("checkpoint")
        reader.record_time(step)

    @contextlib.contextmanager
    def saving(step: int) -> Iterator[None]:
        """Saves the state, which is that after a step, where all processes fail together."""
        cause: BaseException | None = None
        try:
            yield
        except SharedError as error:
            cause = error.__cause__ or error
        if cause is not None:
            with contextlib.suppress(SharedError):  # The first failure is the one to report.
                reader.read()
            if checkpoints is not None and saved < step:
                save(step, final=True)
            raise cause

    if first == 0:
        held_out(0, True)
    for index in range(first, steps):
        step = index + 1
        # A trace begins with an idle device.
        if monitor.profile and step == monitor.profile.first:
            report(index)
            monitor.profile.begin()
            clock.lap("profile")
        # Input. Time counts as waiting for data only if the device has finished the step before.
        clock.lap("step")
        with saving(index):
            batch = _placed(data.batch(index, state), mesh)
        clock.lap("step" if reader.busy() else "input")
        # Enqueue the step, then read the metrics of the one before.
        programs = compilation().programs
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = train_step(state, batch)
        if index > first and compilation().programs > programs:
            reader.say(f"step {step} was compiled again: its batch or its state has another shape, type or sharding")
        report(step, following=(step, metrics, batch))
        # Where something else follows, read the metrics of this step at once.
        stopped = stop is not None and stop(step)
        last = stopped or step == steps
        save_due = checkpoints is not None and (
            stopped or (save_every > 0 and (last or postponed or _due(step, save_every)))
        )
        evaluates = _due(step, config.evaluate_every) or (measurement is not None and _due(step, measurement.every))
        if last or save_due or evaluates:
            report(step)
        if monitor.profile and step == monitor.profile.last:
            report(step)
            if monitor.profile.end():
                trace = f"steps {monitor.profile.first} to {step} are traced"
                reader.say(f"{trace}: pip install xprof; xprof --logdir {monitor.profile.folder}")
            clock.lap("profile")
        if step == steps and not stopped and reader.ruined(state):
            raise InputError(reader.why_to_give_up(state, checkpoints))
        # Evaluate and save. After a stop there may be no time for an evaluation: saving comes first.
        if not stopped:
            held_out(step, step == steps)
        if save_due:
            save(step, last)
        if stopped:
            held_out(step, step == steps)
            break
    return state


class _Reader(Generic[B]):
    """Reads metrics one step late, passes them to the monitor, and keeps count of skipped steps.

    Attributes:
      monitor: what watches the run.
      clock: the monitor's, or one of its own.
      skipped: steps skipped in a row, up to the last one that was read.
    """

    def __init__(self, monitor: Monitor, diagnosis: Diagnosis[B]):
        self.monitor, self.clock, self.skipped = monitor, monitor.clock or Clock(), 0
        self._diagnosis = diagnosis
        self._stepping = self.clock.stepping
        # Enqueued and not read yet; and the last one that was accepted.
        self._waiting: tuple[int, Metrics, B] | None = None
        self._accepted: tuple[int, B] | None = None
        self._numbers: dict[str, float] = {}
        self._step = 0

    def say(self, text: str) -> None:
        """Shows a line; only process 0 does."""
        if self.monitor.display:
            self.monitor.display.say(text)
        elif jax.process_index() == 0:
            _log.warning("%s", text)

    def busy(self) -> bool:
        """Whether the device is still computing the step that was enqueued last."""
        if self._waiting is None:
            return False
        arrays = [value for value in self._waiting[1].values() if isinstance(value, jax.Array)]
        return not all(array.is_ready() for array in arrays)  # type: ignore[attr-defined]

    def read(self, following: tuple[int, Metrics, B] | None = None) -> None:
        """Waits for the step that was enqueued last and reports it, unless that was done already.

        Args:
          following: number, metrics and batch of a step that was enqueued after it, for the next call.
        """
        waiting, self._waiting = self._waiting, following
        if waiting is None:
            return
        step, metrics, batch = waiting
        found = jax.device_get(metrics)
        arrays = {name: value for name, value in found.items() if np.ndim(value)}
        numbers = {name: float(value) for name, value in found.items() if name not in arrays}
        # Time and speed.
        self.clock.lap("step")
        seconds, self._stepping = max(self.clock.stepping - self._stepping, 1e-9), self.clock.stepping
        tokens = jax.tree.leaves(batch)[0].size
        rate = tokens / seconds
        # Log and display.
        monitor = self.monitor
        if monitor.log:
            speed = {"seconds": seconds, "tokens_per_second": rate}
            if monitor.mfu:
                speed["mfu"] = monitor.mfu(rate)
            monitor.log.write({"step": step, **numbers, **speed})
            if monitor.clock and self.clock.due:
                monitor.log.write(self.clock.record(step))
        if monitor.display:
            monitor.display.step(step, numbers["loss"], tokens, seconds)
        # Skipped steps.
        self._step, self._numbers = step, numbers
        if numbers.get("skipped"):
            self.skipped += 1
            loss, norm = numbers["loss"], numbers["grad_norm"]
            self.say(f"step {step} was skipped: loss {loss:.3f}, gradient norm {norm:.3g}.{self._explanation()}")
        else:
            self.skipped, self._accepted = 0, (step, batch)
        # Last, because a hook may raise.
        if monitor.arrays:
            for name, value in arrays.items():
                monitor.arrays(step, name, value)

    def evaluated(self, step: int, numbers: Mapping[str, float], seconds: float) -> None:
        """Passes held-out metrics on."""
        if self.monitor.log:
            self.monitor.log.write({"step": step, **numbers})
        if self.monitor.display:
            self.monitor.display.evaluation(step, numbers, seconds)

    def measured(self, step: int, numbers: Mapping[str, float]) -> None:
        """Passes other metrics on."""
        if self.monitor.log:
            self.monitor.log.write({"step": step, **numbers})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self.monitor.display:
            self.monitor.display.say(f"step {step}: {shown or 'nothing was measured'}")

    def record_time(self, step: int) -> None:
        """Logs where the time of the run went."""
        if self.monitor.log and self.monitor.clock:
            self.monitor.log.write(self.clock.record(step))

    def _explanation(self) -> str:
        text = self._diagnosis.explain(self._numbers)
        return f" {text}" if text else ""

    def ruined(self, state: TrainState) -> bool:
        """Whether skipped steps are known to be the weights' fault.

        If so, the loss is not finite even on the batch that was accepted last, where it was finite before that step
        changed the weights. A spiking gradient is finite, so the weights are sound.
        """
        finite = all(math.isfinite(self._numbers.get(name, 0.0)) for name in ("loss", "grad_norm"))
        if not self.skipped or finite or self._accepted is None or self._diagnosis.finite_loss is None:
            return False
        return not self._diagnosis.finite_loss(state, self._accepted[1])

    def why_to_give_up(self, state: TrainState, checkpoints: Saves | None) -> str:
        """Says why the run ends after skipped steps, and what became of weights and checkpoints."""
        numbers = self._numbers
        text = (
            f"The {self.skipped} steps up to step {self._step} were skipped: their losses or gradients were not "
            f"finite, or their gradients spiked. The loss of the last is {numbers['loss']}, the norm of its gradient "
            f"{numbers['grad_norm']}.{self._explanation()} "
        )
        if self._accepted is not None and self.ruined(state):
            step = self._accepted[0]
            outcome = checkpoints.reject(step) if checkpoints else ""
            return (
                f"{text}Step {step} ruined the weights: with them, not even the loss of its own batch is finite any "
                f"more. Use a smaller learning rate. {outcome}".rstrip()
            )
        if self._accepted is None:
            text += "No step of this launch was accepted, so the weights are those that it began with. "
        return (
            f"{text}Look at the data of these steps, use a smaller learning rate, or a larger spike_factor. The "
            "checkpoints are those from before these steps."
        )


def _placed(batch: B, mesh: Mesh) -> B:
    """A batch on the devices, where it may be already."""
    if isinstance(jax.tree.leaves(batch)[0], jax.Array):
        return batch
    return place(batch, mesh)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def held_out_sums(params: Params, eval_step: EvalStep[B], batches: Iterable[B], mesh: Mesh) -> tuple[Sums, Any]:
    """Runs an evaluation over all batches, of which there is at least one.

    Args:
      params: of the model.
      eval_step: as from `make_eval_step`.
      batches: on the host, or on the devices already.
      mesh: where they are placed.

    Returns:
      The objective's sums and its statistics over all batches, in float64 on the host.
    """
    found = []
    for batch in batches:
        found.append(eval_step(params, _placed(batch, mesh)))
        jax.block_until_ready(found[-4:-3])  # Only a few batches wait on the devices.
    in_float64: list[tuple[Sums, Any]] = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(found))
    return join_statistics(*in_float64)
