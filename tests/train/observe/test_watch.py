"""What a run shows and writes of itself: where its time went, TensorBoard, traces, what was compiled, the picture."""

import dataclasses
import importlib.util
import io
import json
import math
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from qwen_jax.errors import InputError
from qwen_jax.published import published
from qwen_jax.tokenizer import train_bpe
from tests.helpers.data_sets import make_rows
from tests.helpers.processes import run as run_processes
from tests.helpers.runs import stop_after
from train import launch as launching
from train import run
from train.config import RunConfig, Stage, set_fields
from train.data.batch import Batch
from train.interrupt import Interruption
from train.loop import ByStep, CheckpointConfig, LoopConfig, Monitor, fit
from train.observe import trackers
from train.observe.display import Display, Stretch, duration
from train.observe.goodput import KINDS, Clock, compilation
from train.observe.metrics import MetricsLog, read_log
from train.observe.plots import plot_folder, plot_pretraining
from train.optimizer import Schedule
from train.plan.topology import peak_flops
from train.state import Guard, TrainState
from train.step import StepConfig

MODEL = dataclasses.replace(published("tiny"), vocab_size=1024, num_layers=1, rope_theta=1e4)
STEPS = 10, 3  # Of the two stages.


def configuration(folder: Path, output: Path, **changes) -> RunConfig:
    config = RunConfig(
        output=str(output),
        model=MODEL,
        tokenizer=str(folder / "tokenizer"),
        data={"short": str(folder / "short"), "long": str(folder / "long")},
        held_out={"web": str(folder / "web"), "code": str(folder / "code")},
        stages=(
            Stage(Schedule(STEPS[0], 1e-2, warmup_steps=2), 16, 4, {"short": 1}),
            Stage(Schedule(STEPS[1], 1e-3, schedule="wsd"), 32, 2, {"long": 1}, rope_theta=1e6),
        ),
        step=StepConfig(dtype="float32", remat="none"),
        loop=LoopConfig(evaluate_every=2),
        checkpoints=CheckpointConfig(every=3),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    tokenizer = train_bpe(["some text of no importance " * 9], 300)
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name, length, rows in (("short", 16, 12), ("long", 32, 12), ("web", 16, 3), ("code", 16, 7)):
        make_rows(folder / name, rng, rows, length, tokenizer=tokenizer.fingerprint())
    return folder


@dataclasses.dataclass
class Watched:
    """A run that was killed after step 4, later than its checkpoint of step 3, and then went on."""

    output: Path
    times: tuple[float, float, float]  # When the launches began, and when the second had ended.
    before: list[dict]  # The log that the first launch left.
    text: str  # Of the second launch.
    compiled: list[tuple[int, int, int]]  # step, length, programs compiled by that call of the step.
    programs: dict[int, int]  # Compiled in all, when step n was on its way.


@pytest.fixture(scope="module")
def watched(material, tmp_path_factory) -> Watched:
    output = tmp_path_factory.mktemp("runs") / "watched"
    config = configuration(material, output, profile=(6, 7))
    compiled: list[tuple[int, int, int]] = []
    programs: dict[int, int] = {}
    make_train_step = launching.make_train_step

    def counted(*args):
        step = make_train_step(*args)

        def train_step(state, batch):
            before = compilation().programs
            result = step(state, batch)
            compiled.append((len(compiled) + 1, batch.tokens.shape[1], compilation().programs - before))
            return result

        return train_step

    def note(self, step):
        programs[step] = compilation().programs
        return 0

    with pytest.MonkeyPatch.context() as patch:
        first = time.time()
        stop_after(patch, 4)
        assert run.pretrain(config, Console(file=io.StringIO()))
        # As if it had been killed: nothing of step 4 but its line in the log.
        shutil.rmtree(output / "checkpoints" / "4")
        before = read_log(output / "metrics.jsonl")
        time.sleep(0.5)
        patch.setattr(Interruption, "_asked", note)
        patch.setattr(launching, "make_train_step", counted)
        out, second = io.StringIO(), time.time()
        assert not run.pretrain(config, Console(file=out, width=300))
    return Watched(output, (first, second, time.time()), before, out.getvalue(), compiled, programs)


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
    launches = [json.loads(line) for line in (watched.output / "launches.jsonl").read_text().splitlines()]
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


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_has_what_the_log_has_and_no_step_twice(watched):
    shown = scalars(watched.output / "tensorboard")
    records = read_log(watched.output / "metrics.jsonl")
    for tag, name in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("train/tokens_per_second", "tokens_per_second"),
        ("held_out/loss", "held_out_loss"),
        ("held_out/web_loss", "held_out_web_loss"),
    ):
        expected = [(r["step"], r[name]) for r in records if name in r]
        assert [step for step, _ in shown[tag]] == [step for step, _ in expected]
        np.testing.assert_allclose([v for _, v in shown[tag]], [v for _, v in expected], rtol=1e-6)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, sum(STEPS) + 1))
    assert sum(values[-1][1] for tag, values in shown.items() if tag.startswith("goodput/")) == pytest.approx(1.0)
    assert len(list((watched.output / "tensorboard").iterdir())) == 2


def test_a_run_that_begins_anew_is_shown_once(tmp_path):
    for value in (1.0, 2.0, 3.0):
        log = trackers.TensorBoardLog(tmp_path)
        for step in range(3):
            log.write({"step": step, "held_out_loss": value})
        log.close()
    assert scalars(tmp_path)["held_out/loss"] == [(0, 3.0), (1, 3.0), (2, 3.0)]


def test_the_log_has_the_loss_of_each_held_out_data_set_and_of_all_tokens(watched, material):
    held_out = [r for r in read_log(watched.output / "metrics.jsonl") if "held_out_loss" in r]
    assert [r["step"] for r in held_out] == [0, 2, 4, 6, 8, 10, 12, 13]
    # Every token counts the same: code has more than twice the rows of web.
    from train.data.rows import PackedRows

    weights = {}
    for name in ("web", "code"):
        rows = PackedRows(material / name)
        ids = rows.take(range(len(rows))).segment_ids
        weights[name] = int(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)).sum())
    for record in held_out:
        mean = sum(weights[n] * record[f"held_out_{n}_loss"] for n in weights) / sum(weights.values())
        assert record["held_out_loss"] == pytest.approx(mean, rel=1e-5)
    last = held_out[-1]
    line = f"step 13: held-out loss {last['held_out_loss']:.3f} (web {last['held_out_web_loss']:.3f}, code "
    assert line in watched.text


def test_the_console_tells_what_began_and_what_came_of_it(watched):
    text = watched.text
    assert "resuming after step 3; so far" in text
    assert text.count("no MFU is shown: the peak of 'cpu' is not known") == 1
    assert "finished: 13 steps in" in text
    for word in ("wall time", "compile", "lost", "tokens/s in steps", "held-out     web", "generate --model"):
        assert word in text
    assert (watched.output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_has_the_steps_asked_for_by_the_names_of_the_model(watched):
    assert "steps 6 to 7 are traced: pip install xprof; xprof --logdir" in watched.text
    (trace,) = (watched.output / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for scope in (b"attention", b"mlp", b"cross_entropy", b"optimizer"):
        assert scope in content
    names = {
        (event.name, dict(event.stats).get("step_num"))
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert names == {("train", 6), ("train", 7)}


def test_steps_to_trace_must_be_steps_of_the_run(material, tmp_path, capsys):
    config = configuration(material, tmp_path)
    for wrong in ("[0, 2]", "[3, 2]", "[1, 14]", "[1]"):
        with pytest.raises(InputError, match="first and the last step to trace, from 1 to 13"):
            set_fields(config, f"profile={wrong}")
    assert set_fields(config, "profile=[2, 3]").profile == (2, 3)
    file = tmp_path / "c.py"
    file.write_text(
        f"import sys, pathlib\nsys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        "from tests.train.observe import test_watch\n"
        f"def config():\n    return test_watch.configuration(pathlib.Path({str(material)!r}), pathlib.Path('out'))\n"
    )
    arguments = ["--config", str(file), "--print-config"]
    assert run.main([*arguments, "--profile", "3:5"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"] == [3, 5]
    for wrong in ("3", "a:b", "3:", "-1:2"):
        with pytest.raises(InputError, match=r"such as 10:13; got"):
            run.main([*arguments, f"--profile={wrong}"])


def test_the_picture_of_a_run(watched, tmp_path):
    shutil.copytree(watched.output, tmp_path / "run", ignore=shutil.ignore_patterns("loss.png", "checkpoints"))
    assert plot_folder(tmp_path / "run") == tmp_path / "run" / "loss.png"
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000
    with pytest.raises(InputError, match="holds no run"):
        plot_folder(tmp_path)
    with pytest.raises(InputError, match="no step yet"):
        plot_pretraining([{"step": 0, "held_out_loss": 1.0}], {}, tmp_path / "x.png", "x")
    # Long runs, and numbers that are none.
    rng = np.random.default_rng(0)
    records = [
        {
            "step": i,
            "loss": math.nan if i % 100 == 0 else float(rng.random()),
            "learning_rate": 0.1,
            "tokens_per_second": 5.0,
        }
        for i in range(1, 50_000)
    ]
    begin = time.perf_counter()
    plot_pretraining(records, {50_000: "only"}, tmp_path / "long.png", "x")
    assert time.perf_counter() - begin < 30
    assert (tmp_path / "long.png").is_file()


def test_time_left_and_mfu_follow_what_a_stage_costs():
    """At a constant speed in FLOP/s, time left is FLOPs left over that speed, also for stages not reached."""
    stretches = [Stretch(10, 100, 1e6), Stretch(14, 300, 30e6)]
    for evaluation in (0.0, 100.0):
        out = io.StringIO()
        with Display(Console(file=out, width=200), 14, 0, 14, stretches, 1e6, evaluate_every=4) as display:
            for step in range(1, 15):
                seconds = 2.0 if step <= 10 else 60.0  # Both are half of the peak.
                display.step(step, 3.0, stretches[step > 10].tokens, seconds)
                if evaluation and (step % 4 == 0 or step in (10, 14)):
                    display.evaluation(step, {"held_out_loss": 1.0}, evaluation)
        lines = [line for line in out.getvalue().splitlines() if "held-out" not in line]
        assert all("MFU 50.0%" in line for line in lines)
        assert "50 tokens/s" in lines[8]
        # Of the evaluations at 4, 8, 10, 12 and 14 the first tells how long one takes.
        assert f"{duration(5 * 2 + 4 * 60 + 4 * evaluation)} left" in lines[4]
        assert f"{duration(2 * 60 + 2 * evaluation)} left" in lines[11]
        assert "left" not in lines[-1]
    assert [duration(s) for s in (9.4, 61, 3720, 200_000)] == ["9 s", "1 min 01 s", "1 h 02 min", "2 d 7 h"]


def test_lines_come_at_least_every_five_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("train.observe.display.time.perf_counter", lambda: clock[0])
    out = io.StringIO()
    with Display(Console(file=out, width=200), 100_000) as display:
        for step in range(1, 101):
            clock[0] += 20.0
            display.step(step, 3.0, 10, 20.0)
    assert 5 <= len(out.getvalue().splitlines()) <= 7


def test_a_loss_that_is_not_finite_leaves_the_mean_and_is_told():
    out = io.StringIO()
    with Display(Console(file=out, width=200), 4, lines=4) as display:
        for step, loss in enumerate((2.0, math.nan, 4.0, math.inf), 1):
            display.step(step, loss, 10, 1.0)
    assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == ["loss 2.000"] * 2 + ["loss 3.000"] * 2


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str
    coords: tuple[int, ...] = (0, 0, 0)
    slice_index: int = 0


def test_the_peak_of_devices_is_that_of_their_chips():
    assert peak_flops([Device("NVIDIA H100 80GB HBM3")] * 8) == 8 * 989e12
    assert peak_flops([Device("TPU v5 lite", (i, 0, 0)) for i in range(4)]) == 4 * 197e12
    assert peak_flops([Device("TPU v5", (i, 0, 0)) for i in range(4)]) == 4 * 459e12
    # Two devices are one chip; the same place in another slice is another.
    halves = [Device("TPU7x", (i // 2, 0, 0), s) for s in range(2) for i in range(4)]
    assert peak_flops(halves) == 4 * 2307e12
    assert peak_flops(jax.devices("cpu")) is None


class FakeWandb(types.ModuleType):
    """What we call of wandb."""

    def __init__(self, mode: str, logged_in: bool):
        super().__init__("wandb")
        self.begun, self.logged, self.metrics, self.finished = [], [], [], 0
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self._mode, self._logged_in = mode, logged_in

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self._mode))

    def login(self, prompt):
        assert not prompt  # Nobody sits in front of a cluster's job.
        return self._logged_in

    def init(self, **arguments):
        self.begun.append(arguments)
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, record):
        self.logged.append(record)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_the_same_run_each_time(tmp_path, monkeypatch):
    fake = FakeWandb("offline", False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers.check_wandb()
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        log = trackers.WandbLog("project", tmp_path / "run", {"seed": 3})
        log.write({"step": step, "loss": 2.5})
        log.write({"step": step, "held_out_web_loss": 2.0})
        log.close()
    first, second = fake.begun
    assert first == second
    assert (first["project"], first["name"], first["resume"], first["config"]) == (
        "project",
        "run",
        "allow",
        {"seed": 3},
    )
    assert fake.logged[:2] == [{"step": 1, "train/loss": 2.5}, {"step": 1, "held_out/web_loss": 2.0}]
    assert ("*", "step") in fake.metrics
    assert fake.finished == 2


def test_weights_and_biases_that_cannot_work_are_told_before_any_work(material, tmp_path, monkeypatch):
    config = configuration(material, tmp_path / "run", wandb_project="p")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("online", False))
    with pytest.raises(InputError, match=r"nobody is logged in to Weights & Biases\. Run `wandb login`"):
        run.pretrain(config)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb is not installed: pip install 'qwen-jax\[wandb\]'"):
        run.pretrain(config)
    assert not (tmp_path / "run").exists()
    fake = FakeWandb("online", True)
    monkeypatch.setattr(fake, "init", lambda **_: (_ for _ in ()).throw(fake.errors.Error("no such entity")))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers.check_wandb()
    with pytest.raises(InputError, match="no such entity"):
        trackers.WandbLog("p", tmp_path, {})


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_offline_for_real(tmp_path, monkeypatch):
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CONFIG_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    trackers.check_wandb()
    log = trackers.WandbLog("project", tmp_path, {"seed": 3})
    log.write({"step": 1, "loss": 2.5})
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def broken(material: str, output: str) -> str:
    """In each of several processes: a run whose weights are not numbers."""
    init = launching.init_state
    launching.init_state = lambda *args: dataclasses.replace(
        init(*args), params=jax.tree.map(lambda x: x * jnp.nan, init(*args).params)
    )
    config = configuration(Path(material), Path(output), mesh={"data": 2}, loop=LoopConfig(max_skipped=3), held_out={})
    try:
        run.pretrain(config)
    except InputError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_all_processes_with_the_step(material, tmp_path):
    messages = run_processes(broken, str(material), str(tmp_path / "run"), processes=2, devices=1)
    assert len(messages) == 2
    for message in messages:
        assert "3 steps up to step 3 were skipped" in message
        assert "loss of the last is nan" in message


def test_mfu_is_of_the_devices_that_a_mesh_has(material, tmp_path, monkeypatch):
    """Those that the mesh leaves unused have no part in the peak, and each stage has its own mesh."""
    from train.observe.metrics import flops_per_token
    from train.observe.report import Report

    monkeypatch.setattr("train.observe.report.peak_flops", lambda devices: 1e9 * len(devices))
    config = set_fields(configuration(material, tmp_path, mesh={"data": 2}), "stages.1.mesh.data=1")
    out = io.StringIO()
    meshes = [run.make_mesh(config.mesh_axes(index)) for index in range(2)]
    with Report(config, meshes, 0, Console(file=out, width=200), Clock()) as report:
        for index, (size, length) in enumerate(((2, 16), (1, 32))):
            of_stage = report.mfu(index)
            assert of_stage is not None
            assert of_stage(1000.0) == pytest.approx(1000 * flops_per_token(MODEL, length) / (size * 1e9))
        assert report.display is not None
        report.display.step(10, 3.0, 64, 0.5)
        report.display.step(13, 3.0, 64, 0.5)
    shown = [line.split("MFU ")[1].split("%")[0] for line in out.getvalue().splitlines() if line.startswith("step")]
    expected = [128 * flops_per_token(MODEL, n) / (size * 1e9) for size, n in ((2, 16), (1, 32))]
    assert [float(x) for x in shown] == pytest.approx([100 * x for x in expected], abs=0.06)
    assert f"on 2 x cpu; the mesh leaves {jax.device_count() - 2} more unused" in out.getvalue()
    assert "no MFU" not in out.getvalue()
