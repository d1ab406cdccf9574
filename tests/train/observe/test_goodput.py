"""Goodput: every moment of a run belongs to one kind of time; compilations are counted; the host does not wait."""

import dataclasses
import io
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.helpers.watched import STEPS
from train.data.batch import Batch
from train.files import read_records
from train.loop import ByStep, Monitor, fit
from train.observe.display import Display
from train.observe.goodput import KINDS, Clock, compilation
from train.observe.metrics import MetricsLog, read_log
from train.state import Guard, TrainState


def test_the_kinds_of_time_add_up_to_the_wall_time_over_all_launches(watched):
    *_, last = [r for r in read_log(watched.output / "metrics.jsonl") if "seconds_step" in r]
    seconds = {kind: last[f"seconds_{kind}"] for kind in KINDS}
    first, second, end = watched.times
    # Each lap is timed by one clock, and the whole by another.
    assert sum(seconds.values()) == pytest.approx(last["time"] - first, rel=0.01, abs=0.1)
    assert last["time"] <= end
    assert last["goodput"] == pytest.approx(seconds["step"] / sum(seconds.values()))
    (again,) = [r for r in watched.before if r["step"] == 4 and "loss" in r]
    assert seconds["lost"] == pytest.approx(again["seconds"])
    assert seconds["down"] == pytest.approx(second - watched.before[-1]["time"], abs=0.1)
    # Two launches compile three programs of the step and evaluations; nothing else here takes half as long.
    assert max(seconds, key=seconds.__getitem__) == "compile"
    assert all(seconds[kind] > 0 for kind in KINDS)
    launches = read_records(watched.output / "launches.jsonl", "step")
    assert [launch["step"] for launch in launches] == [0, 3]
    assert launches[1]["seconds_before"]["lost"] == pytest.approx(seconds["lost"], abs=1e-3)


def time_record(step, now, seconds):
    return {"step": step, "time": now, **{f"seconds_{kind}": value for kind, value in seconds.items()}}


def test_time_carried_over_is_that_from_the_first_launch_to_now(tmp_path):
    """Whatever a launch leaves, and wherever the next one begins; and a second restart counts nothing twice."""
    rng = np.random.default_rng()
    for case in range(50):
        path, first = tmp_path / f"{case}.jsonl", 1000.0
        now, spent, productive, lost = first, dict.fromkeys(KINDS, 0.0), {}, 0.0
        for launch in range(3):
            resume = int(rng.integers(0, max(productive, default=0) + 1))
            now += float(rng.exponential(5.0))
            clock = Clock()
            clock._begin = now
            clock.carry_over(path, resume)
            if launch:
                lost += sum(s for step, s in productive.items() if step > resume)
                assert sum(clock.seconds.values()) == pytest.approx(now - first)
                assert clock.seconds["lost"] == pytest.approx(lost)
            else:
                first, resume = now, 0
            productive = {step: s for step, s in productive.items() if step <= resume}
            spent = dict(clock.seconds)
            log = MetricsLog(path, resume)

            log.write(time_record(resume, now, spent))
            for step in range(resume + 1, resume + int(rng.integers(2, 9))):
                productive[step] = float(rng.exponential(1.0))
                now += productive[step]
                spent["step"] += productive[step]
                log.write({"step": step, "loss": 1.0, "seconds": productive[step]})
                if rng.random() < 0.3:
                    now, spent["evaluation"] = now + 1.0, spent["evaluation"] + 1.0
                    log.write(time_record(step, now, spent))
            log.close()
            with path.open("a") as file:
                file.write('{"step": 5, "lo')  # Killed.
        path.unlink()


def test_compilation_is_told_from_other_time_and_counted_once(mesh):
    counter, before = compilation(), compilation().programs
    begin, seconds = time.perf_counter(), compilation().seconds

    @jax.jit
    def inner(x):
        return jnp.sin(x) @ x

    @jax.jit
    def outer(x):
        for _ in range(20):
            x = inner(x) + jax.jit(lambda y: jnp.tanh(y) @ y)(x)
        return x

    outer(jnp.ones((4, 4))).block_until_ready()
    wall = time.perf_counter() - begin
    # Traced inside one another: each moment counts once.
    assert 0.3 * wall < counter.seconds - seconds <= wall + 1e-3
    assert counter.programs > before
    programs = counter.programs
    outer(jnp.ones((4, 4)))
    assert counter.programs == programs
    # Another thread's compilations are its own.
    thread = threading.Thread(target=lambda: jax.jit(lambda x: x * 3)(jnp.ones(3)))
    thread.start()
    thread.join()
    assert counter.programs == programs


def test_nothing_is_compiled_after_the_warm_up(watched):
    first = {length: next(step for step, n, _ in watched.compiled if n == length) for length in (16, 32)}
    assert [(step, count) for step, _, count in watched.compiled if count and step not in first.values()] == []
    assert all(count >= 1 for step, _, count in watched.compiled if step in first.values())
    # Evaluation and save have been there once by step 7; not one program is made from there to the end of the stage.
    assert len({watched.programs[step] for step in range(7, STEPS[0] + 1)}) == 1
    assert "compiled again" not in watched.text


def test_a_batch_of_another_shape_is_told(mesh):
    @jax.jit
    def step(state, batch):
        return dataclasses.replace(state, step=state.step + 1), {"loss": batch.tokens.sum() * 1.0}

    def rows(length):
        return Batch(*(np.ones((2, length), np.int32) for _ in range(3)), np.ones((2, length), np.float32))

    out = io.StringIO()
    state = TrainState(jnp.zeros((), jnp.int32), {}, (), Guard(jnp.zeros(()), jnp.zeros((), int), jnp.zeros((), int)))
    with jax.set_mesh(mesh), Display(Console(file=out, width=200), 5) as display:
        state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
        data = ByStep([rows(8)] * 3 + [rows(12)] * 2)
        fit(5, state, step, data, mesh=mesh, monitor=Monitor(display=display))
    told = [line for line in out.getvalue().splitlines() if "compiled again" in line]
    assert [line.split(" was")[0] for line in told] == ["step 4"]


def test_the_host_never_waits_for_the_step_that_it_has_just_enqueued(mesh):
    """When the host comes with the next step, the device is still at the one before, each time."""

    @jax.jit
    def compiled(state, batch):
        # Long enough, some tenths of a second, that a host that comes at once finds it unfinished.
        result = jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), jnp.full((256, 256), 1e-2) + state.step)
        return dataclasses.replace(state, step=state.step + 1), {"loss": result.mean(), "skipped": jnp.zeros(())}

    metrics: list[dict] = []
    busy, done = [], []

    def step(state, batch):
        if len(metrics) > 1:  # The first call compiles.
            busy.append(not metrics[-1]["loss"].is_ready())
            done.append(metrics[-2]["loss"].is_ready())
        state, numbers = compiled(state, batch)
        metrics.append(numbers)
        return state, numbers

    rows = Batch(*(np.ones((2, 8), np.int32) for _ in range(3)), np.ones((2, 8), np.float32))
    with jax.set_mesh(mesh):
        zero = jnp.zeros(())
        state = TrainState(jnp.zeros((), jnp.int32), {}, (), Guard(zero, zero, zero))
        fit(6, state, step, ByStep([rows] * 6), mesh=mesh)
    assert busy == [True] * 4
    assert done == [True] * 4  # And no more than one step ahead.
