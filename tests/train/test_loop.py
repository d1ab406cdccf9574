"""The loop around a scripted step: what it saves after skipped steps, and what it says when it gives up."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.runs import print_seed
from train.data.batch import Batch
from train.loop import ByStep, Diagnosis, LoopConfig, Monitor, failing_together, fit
from train.state import Guard, TrainState

# What a step may do: be accepted, be skipped because it is not finite, or because its gradient spikes.
GOOD, NAN, SPIKE = (1.0, 1.0, 0.0), (math.nan, math.nan, 1.0), (1.0, 99.0, 1.0)
ROWS = Batch(*(np.ones((2, 4), np.int32) for _ in range(3)), np.ones((2, 4), np.float32))


class Checkpoints:
    """Notes what is saved, and what is rejected."""

    def __init__(self, every: int) -> None:
        self.every, self.saved, self.rejected = every, list[int](), list[int]()

    def save(self, state: TrainState, step: int) -> None:
        assert state.step == step  # type: ignore[comparison-overlap]
        self.saved.append(step)

    def reject(self, step: int) -> str:
        self.rejected.append(step)
        return "The checkpoints are sound."


def loop(
    script: list[tuple[float, float, float]],
    every: int,
    ruined: bool | None = None,
    first: int = 0,
    stop: int = 0,
    max_skipped: int = 10,
) -> tuple[Checkpoints, str]:
    """Runs steps as a script says.

    Args:
      script: loss, gradient norm and whether it is skipped, of each step.
      every: steps between checkpoints.
      ruined: whether the weights have no finite loss any more, when the loop asks; None if it cannot ask.
      first: steps taken before.
      stop: after which step it is asked to stop.
      max_skipped: skipped steps after which it gives up.

    Returns:
      The checkpoints, and the error, if it ends with one.
    """
    checkpoints, mesh = Checkpoints(every), make_mesh({}, jax.devices()[:1])

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, float]]:
        loss, norm, skipped = script[int(state.step) - first]
        metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped}
        return dataclasses.replace(state, step=state.step + 1), metrics

    state = TrainState(step=first, params={}, opt_state=(), guard=Guard(0.0, 0, 0))  # type: ignore[arg-type]
    steps, diagnosis = first + len(script), Diagnosis[Batch]()
    if ruined is not None:
        diagnosis = Diagnosis(finite_loss=lambda state, batch: not ruined)
    try:
        with jax.set_mesh(mesh):
            fit(
                steps, state, step, ByStep([ROWS] * steps), mesh=mesh, config=LoopConfig(max_skipped=max_skipped),
                checkpoints=checkpoints, stop=lambda step: step == stop, diagnosis=diagnosis,
            )  # type: ignore[arg-type]  # fmt: skip
    except InputError as error:
        return checkpoints, str(error)
    return checkpoints, ""


def test_without_skipped_steps_it_saves_when_it_is_due_and_at_the_end() -> None:
    assert loop([GOOD] * 7, every=3)[0].saved == [3, 6, 7]
    assert loop([GOOD] * 7, every=0)[0].saved == []
    assert loop([GOOD] * 7, every=0, stop=5)[0].saved == [5]


@pytest.mark.parametrize("bad", [NAN, SPIKE])
def test_a_checkpoint_waits_for_a_step_that_is_accepted(bad: tuple[float, float, float]) -> None:
    """Once: the next one is due as always."""
    script = [GOOD, GOOD, bad, bad, GOOD, GOOD, GOOD, GOOD, GOOD]
    assert loop(script, every=3)[0].saved == [5, 6, 9]


def test_weights_that_are_known_to_be_ruined_are_neither_saved_nor_left_without_a_word() -> None:
    for script, options in (([GOOD] * 4 + [NAN] * 3, {}), ([GOOD] * 4 + [NAN] * 3 + [GOOD] * 9, {"max_skipped": 3})):
        checkpoints, told = loop(script, every=2, ruined=True, **options)  # type: ignore[arg-type]
        assert checkpoints.saved == [2, 4]
        assert checkpoints.rejected == [4]
        assert "3 steps up to step 7 were skipped" in told
        assert "Step 4 ruined the weights" in told
        assert told.endswith("The checkpoints are sound.")
    # Where it is stopped there is nothing to complain of, and nothing to save.
    checkpoints, told = loop([GOOD] * 4 + [NAN] * 5, every=2, ruined=True, stop=7)
    assert (checkpoints.saved, told) == ([2, 4], "")


@pytest.mark.parametrize(("bad", "ruined"), [(NAN, False), (NAN, None), (SPIKE, True), (SPIKE, None)])
def test_a_run_whose_last_batches_are_bad_ends_with_its_last_state(
    bad: tuple[float, float, float], ruined: bool | None
) -> None:
    """A spiking gradient is finite, so the weights are sound whatever anybody says."""
    checkpoints, told = loop([GOOD] * 4 + [bad] * 3, every=4, ruined=ruined)
    assert (checkpoints.saved, told) == ([4, 7], "")
    assert loop([GOOD] * 4 + [bad] * 3, every=4, ruined=ruined, stop=6)[0].saved == [4, 6]


def test_it_says_whether_data_or_weights_are_to_blame() -> None:
    checkpoints, told = loop([GOOD] * 2 + [NAN] * 4, every=1, ruined=False, max_skipped=4)
    assert "Look at the data of these steps" in told
    assert "ruined" not in told
    assert checkpoints.rejected == []
    _, told = loop([NAN] * 4, every=1, ruined=True, first=5, max_skipped=4)
    assert "4 steps up to step 9" in told
    assert "No step of this launch was accepted" in told
    assert "ruined" not in told


def test_metrics_that_are_arrays_go_to_their_hook() -> None:
    mesh, seen = make_mesh({}, jax.devices()[:1]), []

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, object]]:
        return dataclasses.replace(state, step=state.step + 1), {"loss": 1.0, "load": np.arange(3) + state.step}

    state = TrainState(step=0, params={}, opt_state=(), guard=Guard(0.0, 0, 0))  # type: ignore[arg-type]
    monitor = Monitor(arrays=lambda step, name, value: seen.append((step, name, value.tolist())))
    with jax.set_mesh(mesh):
        fit(2, state, step, ByStep([ROWS] * 2), mesh=mesh, monitor=monitor)  # type: ignore[arg-type]
    assert seen == [(1, "load", [0, 1, 2]), (2, "load", [1, 2, 3])]


def test_a_hook_that_fails_in_all_processes_loses_no_step() -> None:
    """Metrics are read a step late: that step is saved too, and logged, though the hook fails again."""
    rng = print_seed()
    steps, every = int(rng.integers(2, 9)), int(rng.integers(1, 5))
    bad = int(rng.integers(1, steps + 1))
    mesh, checkpoints, logged = make_mesh({}, jax.devices()[:1]), Checkpoints(every), list[float]()

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, object]]:
        return dataclasses.replace(state, step=state.step + 1), {"loss": 1.0, "load": np.arange(3)}

    def hook(step: int, name: str, value: np.ndarray) -> None:
        if step >= bad:
            with failing_together():
                raise OSError(f"no room at step {step}")

    class Log:
        def write(self, record: Mapping[str, float]) -> None:
            logged.append(record["step"])

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    state = TrainState(step=0, params={}, opt_state=(), guard=Guard(0.0, 0, 0))  # type: ignore[arg-type]
    with jax.set_mesh(mesh), pytest.raises(OSError, match=f"no room at step {bad}$"):
        fit(
            steps, state, step, ByStep([ROWS] * steps), mesh=mesh, checkpoints=checkpoints,
            monitor=Monitor(log=Log(), arrays=hook),
        )  # type: ignore[arg-type]  # fmt: skip
    # Where a checkpoint is due, and at the end, the loop reads the metrics of a step before it goes on.
    last = bad if bad % every == 0 or bad == steps else bad + 1
    assert checkpoints.saved[-1] == last
    assert logged == list(range(1, last + 1))
