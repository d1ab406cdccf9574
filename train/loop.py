"""The training loop: feed the device, read its numbers one step late, evaluate, save."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.errors import InputError
from train.data.batch import Batch, place
from train.observe.display import Display
from train.observe.goodput import Clock, compilation
from train.observe.trackers import Log
from train.pretrain import Metrics, TrainStep
from train.state import TrainState

_log = logging.getLogger(__name__)


class Data(Protocol):
    """Batches by the number of their step; a `grain.MapDataset` is one."""

    def __getitem__(self, step: int) -> Any: ...


class Saves(Protocol):
    """Where states are saved; `Checkpoints` is one."""

    def save(self, state: TrainState, step: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When the loop does what. Every interval is in steps; 0 is never.

    Attributes:
      steps: train until this many are taken.
      evaluate_every: also before the first step and after the last, unless 0.
      checkpoint_every: also after the last step, unless 0.
      max_skipped: so many steps skipped in a row, for gradients that were not finite or spiked, end the run; not 0.
    """

    steps: int
    evaluate_every: int = 0
    checkpoint_every: int = 0
    max_skipped: int = 10


class Profile:
    """A trace of some steps for xprof; leave it, and a trace that is not ended yet is."""

    def __init__(self, folder: str | os.PathLike[str], first: int, last: int):
        """Says what to trace.

        Args:
          folder: where to.
          first: step to begin with, counted from 1.
          last: step to end with.
        """
        self.folder, self.first, self.last = Path(folder), first, last
        self._tracing = False

    def begin(self) -> None:
        """Starts to trace."""
        jax.profiler.start_trace(self.folder)
        self._tracing = True

    def end(self) -> bool:
        """Writes the trace; says whether there was one."""
        tracing, self._tracing = self._tracing, False
        if tracing:
            jax.profiler.stop_trace()
        return tracing

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def fit(
    config: LoopConfig,
    state: TrainState,
    train_step: TrainStep,
    data: Data,
    *,
    mesh: Mesh,
    log: Log | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    checkpoints: Saves | None = None,
    display: Display | None = None,
    stop: Callable[[int], bool] | None = None,
    clock: Clock | None = None,
    mfu: Callable[[float], float] | None = None,
    profile: Profile | None = None,
    loads: Callable[[int, np.ndarray], None] | None = None,
) -> TrainState:
    """Trains from the step that the state is at. Call it under `jax.set_mesh(mesh)`.

    The host only enqueues: the numbers of a step are read after the next one was enqueued, so that the device always
    has work.

    Args:
      config: how long, and when to evaluate and save.
      state: fresh or restored; it is donated.
      train_step: as from `make_train_step`.
      data: `data[step]` is the global batch of that step, a pure function of the step: nothing else is needed to
        resume. NumPy arrays, or on the devices already.
      mesh: where batches are placed.
      log: takes one record a step, and one for each evaluation.
      evaluate: held-out numbers of a state.
      checkpoints: where to save.
      display: a progress bar.
      stop: asked after each step, with its number; where it says so, the state is saved and given back.
      clock: of the run; with it, the log gets a record of where the time went every minute, and at each checkpoint.
      mfu: of a rate in tokens per second, for the log.
      profile: steps to trace.
      loads: takes the step and `expert_load` of its metrics, if they have it.

    Returns:
      The state after `config.steps` steps, or where it was stopped.

    Raises:
      InputError: too many steps in a row were skipped; checkpoints taken before stay.
    """
    first = int(state.step)
    waiting: tuple[int, Metrics, int] | None = None
    say = display.say if display else _log.warning if jax.process_index() == 0 else lambda _: None
    of_run, clock = clock is not None, clock or Clock()
    stepping, skipped = clock.stepping, 0
    clock.lap("initialisation")

    def report() -> None:
        nonlocal waiting, stepping, skipped
        if waiting is None:
            return
        step, metrics, tokens = waiting
        waiting = None
        found = jax.device_get(metrics)
        load = found.pop("expert_load", None)
        numbers = {name: float(value) for name, value in found.items()}
        clock.lap("step")
        seconds, stepping = max(clock.stepping - stepping, 1e-9), clock.stepping
        rate = tokens / seconds
        if log:
            speed = {"seconds": seconds, "tokens_per_second": rate} | ({"mfu": mfu(rate)} if mfu else {})
            log.write({"step": step, **numbers, **speed})
            if of_run and clock.due:
                log.write(clock.record(step))
        if loads and load is not None:
            loads(step, load)
        if display:
            display.step(step, numbers["loss"], tokens, seconds)
        skipped = skipped + 1 if numbers.get("skipped") else 0
        if skipped == config.max_skipped:
            raise InputError(
                f"The {skipped} steps up to step {step} were skipped: their gradients were not finite or spiked. The "
                f"loss of the last is {numbers['loss']}, the norm of its gradient {numbers['grad_norm']}. Look at the "
                "data of these steps, use a smaller learning rate, or a larger spike_factor; weights and earlier "
                f"checkpoints are unharmed.{_router(numbers)}"
            )
        if skipped:
            norm = numbers["grad_norm"]
            say(f"step {step} was skipped: loss {numbers['loss']:.3f}, gradient norm {norm:.3g}.{_router(numbers)}")

    def held_out(step: int) -> None:
        if evaluate and config.evaluate_every:
            clock.lap("step")
            before = clock.seconds["evaluation"]
            numbers = {f"held_out_{name}": value for name, value in evaluate(state).items()}
            clock.lap("evaluation")
            if log:
                log.write({"step": step, **numbers})
            if display:
                display.evaluation(step, numbers, clock.seconds["evaluation"] - before)

    if first == 0:
        held_out(0)
    for index in range(first, config.steps):
        step = index + 1
        if profile and step == profile.first:
            report()  # The trace begins with a device that has nothing to do.
            profile.begin()
            clock.lap("profile")
        clock.lap("step")
        batch: Batch = data[index]
        placed = _placed(batch, mesh)
        # While the device is busy with the step before, nobody waits for data.
        clock.lap("step" if waiting and not _ready(waiting[1]) else "input")
        programs = compilation().programs
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = train_step(state, placed)
        if index > first and compilation().programs > programs:
            say(f"step {step} was compiled again: its batch or its state has another shape, type or sharding")
        report()
        waiting = step, metrics, batch.tokens.size
        stopped = stop is not None and stop(step)
        last = stopped or step == config.steps
        if last or _due(step, config.evaluate_every) or _due(step, config.checkpoint_every):
            report()
        if profile and step == profile.last:
            report()
            if profile.end():
                say(f"steps {profile.first} to {step} are traced: pip install xprof; xprof --logdir {profile.folder}")
            clock.lap("profile")
        evaluates = step == config.steps or _due(step, config.evaluate_every)
        if evaluates and not stopped:
            held_out(step)
        if checkpoints and (stopped or config.checkpoint_every) and (last or _due(step, config.checkpoint_every)):
            clock.lap("step")
            if log:
                log.flush()  # Who goes on from this checkpoint doesn't write again what came before it.
            checkpoints.save(state, step)
            clock.lap("checkpoint")
            if log and of_run:
                log.write(clock.record(step))
        if evaluates and stopped:
            held_out(step)  # There may be no time for it: saving comes first.
        if stopped:
            break
    return state


def _router(numbers: Mapping[str, float]) -> str:
    """Says which router went wrong, if one did."""
    layer = int(numbers.get("router_not_finite", 0))
    if not layer:
        return ""
    return (
        f" The router of layer {layer} (counted from 1) gives logits that are not finite: its input or its weight is "
        "not. A router_z_loss keeps logits small."
    )


def _placed(batch: Batch, mesh: Mesh) -> Batch:
    """A batch on the devices, where it may be already."""
    return batch if isinstance(batch.tokens, jax.Array) else place(batch, mesh)


def _ready(metrics: Metrics) -> bool:
    """Whether the step is done."""
    return all(value.is_ready() for value in metrics.values() if isinstance(value, jax.Array))  # type: ignore[attr-defined]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def held_out_loss(
    params: Any, eval_step: Callable[[Any, Batch], Any], batches: Sequence[Batch], mesh: Mesh
) -> tuple[float, float]:
    """Runs an evaluation over all batches.

    Args:
      params: of the model.
      eval_step: as from `make_eval_step`.
      batches: on the host, or on the devices already.
      mesh: where they are placed.

    Returns:
      Summed loss in nats, and summed weight.
    """
    sums: list[Any] = []
    for batch in batches:
        sums.append(eval_step(params, _placed(batch, mesh)))
        jax.block_until_ready(sums[-4:-3])  # So that no more than a few batches wait on the devices.
    totals = jax.device_get(sums)
    return float(sum(s.loss for s in totals)), float(sum(s.weight for s in totals))
