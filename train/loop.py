"""The training loop: feed the device, read its numbers one step late, evaluate, save."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qwen_jax.errors import InputError
from train.data.batch import Batch, place
from train.metrics import MetricsLog
from train.pretrain import Metrics, TrainStep
from train.state import TrainState


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


def fit(
    config: LoopConfig,
    state: TrainState,
    train_step: TrainStep,
    data: Data,
    *,
    mesh: Mesh,
    log: MetricsLog | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    checkpoints: Saves | None = None,
    display: "Display | None" = None,
    stop: Callable[[int], bool] | None = None,
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

    Returns:
      The state after `config.steps` steps, or where it was stopped.

    Raises:
      InputError: too many steps in a row were skipped; checkpoints taken before stay.
    """
    first = int(state.step)
    waiting: tuple[int, Metrics, int] | None = None
    begin = time.perf_counter()
    skipped = 0

    def report() -> None:
        nonlocal begin, skipped
        if waiting is None:
            return
        step, metrics, tokens = waiting
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        begin, rate = time.perf_counter(), tokens / max(time.perf_counter() - begin, 1e-9)
        if log:
            log.write({"step": step, **numbers, "tokens_per_second": rate})
        if display:
            display.step(step, numbers["loss"], tokens)
        skipped = skipped + 1 if numbers.get("skipped") else 0
        if skipped == config.max_skipped:
            raise InputError(
                f"The {skipped} steps up to step {step} were skipped: their gradients were not finite or spiked. The "
                f"loss of the last is {numbers['loss']}, the norm of its gradient {numbers['grad_norm']}. Look at the "
                "data of these steps, use a smaller learning rate, or a larger spike_factor; weights and earlier "
                "checkpoints are unharmed."
            )

    def held_out(step: int) -> None:
        if evaluate and config.evaluate_every:
            numbers = {f"held_out_{name}": value for name, value in evaluate(state).items()}
            if log:
                log.write({"step": step, **numbers})
            if display:
                display.evaluation(step, numbers)

    if first == 0:
        held_out(0)
    for index in range(first, config.steps):
        batch: Batch = data[index]
        placed = batch if isinstance(batch.tokens, jax.Array) else place(batch, mesh)
        state, metrics = train_step(state, placed)
        report()
        step = index + 1
        waiting = step, metrics, batch.tokens.size
        stopped = stop is not None and stop(step)
        last = stopped or step == config.steps
        if last or _due(step, config.evaluate_every) or _due(step, config.checkpoint_every):
            report()
            waiting = None
        evaluates = step == config.steps or _due(step, config.evaluate_every)
        if evaluates and not stopped:
            held_out(step)
        if checkpoints and (stopped or config.checkpoint_every) and (last or _due(step, config.checkpoint_every)):
            checkpoints.save(state, step)
        if evaluates and stopped:
            held_out(step)  # There may be no time for it: saving comes first.
        if waiting is None:
            begin = time.perf_counter()  # What stood between two steps is no part of the next one's time.
        if stopped:
            break
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Display:
    """Loss, tokens per second and time left, on a console: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, steps: int, first: int = 0, lines: int = 20):
        """Makes a display; use it in a `with` statement.

        Args:
          console: on standard error, by custom. Rich respects NO_COLOR.
          steps: of the run.
          first: steps taken before.
          lines: how many where there is no terminal.
        """
        self._console, self._steps, self._first = console, steps, first
        self._every = max((steps - first) // lines, 1)
        self._begin, self._tokens, self._timed = time.perf_counter(), 0, 0
        self._recent: list[float] = []
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss [bold]{task.fields[loss]}[/bold]"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._progress.start()
            self._task = self._progress.add_task("", total=self._steps, completed=self._first, loss="-", rate="-")
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def step(self, step: int, loss: float, tokens: int) -> None:
        """Shows one step. The loss shown is a mean over the last steps, for a single one jumps about."""
        self._recent = [*self._recent[-19:], loss]
        mean = sum(self._recent) / len(self._recent)
        if self._timed == 0:
            self._begin = time.perf_counter()  # The first step compiles; speed is that of the others.
        else:
            self._tokens += tokens
        elapsed = time.perf_counter() - self._begin
        rate = self._tokens / elapsed if self._timed else 0.0
        left = elapsed / self._timed * (self._steps - step) if self._timed else 0.0
        self._timed += 1
        if self._task is not None:
            self._progress.update(self._task, completed=step, loss=f"{mean:.3f}", rate=f"{rate:,.0f}")
        elif step % self._every == 0 or step == self._steps:
            speed = f"  {rate:,.0f} tokens/s  {left:.0f} s left" if rate else ""
            self._console.print(f"step {step}/{self._steps}  loss {mean:.3f}{speed}", highlight=False, soft_wrap=True)

    def evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Prints held-out numbers above the bar."""
        text = "  ".join(
            f"{name.replace('_', ' ').replace('held out', 'held-out')} {value:.3f}" for name, value in numbers.items()
        )
        self._console.print(f"step {step}: {text}", highlight=False, soft_wrap=True)


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
        sums.append(eval_step(params, batch if isinstance(batch.tokens, jax.Array) else place(batch, mesh)))
        jax.block_until_ready(sums[-4:-3])  # So that no more than a few batches wait on the devices.
    totals = jax.device_get(sums)
    return float(sum(s.loss for s in totals)), float(sum(s.weight for s in totals))
