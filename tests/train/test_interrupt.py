"""Signals and lost processes: Ctrl-C saves as SIGTERM does, a second one ends at once; a lost process is named."""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import pytest

from qwen_jax.cli import failures
from tests.helpers.processes import Job, train
from tests.helpers.runs import config_file, losses, saved_steps
from train.interrupt import EndNow, Interruption

LONG = ("stages.0.schedule.steps=1000000", "loop.evaluate_every=0", "checkpoints.every=0")


def running(job: Job, output: Path) -> None:
    """Waits until steps are taken."""
    deadline = time.monotonic() + 200
    while not (output / "metrics.jsonl").exists() or (output / "metrics.jsonl").read_bytes().count(b"\n") < 20:
        assert [process.poll() for process in job.started] == [None] * len(job.started), job
        assert time.monotonic() < deadline, job
        time.sleep(0.005)


@pytest.mark.draw(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_saves_the_step_in_progress(
    material: Path, tmp_path: Path, number: int, name: str, status: int
) -> None:
    file, output = config_file(tmp_path / "config.py", material, tmp_path / "run"), tmp_path / "run"
    with train(file, *LONG) as job:
        running(job, output)
        job.started[0].send_signal(number)
        assert job.wait(120) == [status], job
        told = job.output(0)
    (step,) = saved_steps(output)
    assert len(losses(output)) == step
    assert f"stopped by {name} after step {step:,} of" in told
    assert "saved: the same command resumes from there" in told
    assert "Traceback" not in told
    assert not (output / "lock.json").exists()


@pytest.mark.slow
def test_ctrl_c_to_one_of_two_processes_saves_one_step_in_both(material: Path, tmp_path: Path) -> None:
    file, output = config_file(tmp_path / "config.py", material, tmp_path / "run"), tmp_path / "run"
    changes = (*LONG, "mesh.data=2", "stages.1.accumulation=1")
    with train(file, *changes, processes=2) as job:
        running(job, output)
        job.started[1].send_signal(signal.SIGINT)
        assert job.wait(120) == [143, 130], job
    (step,) = saved_steps(output)
    assert len(losses(output)) == step


def test_a_second_ctrl_c_ends_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert not interruption.stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.stop(2)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(EndNow):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_is_noted_and_a_ctrl_c_after_it_is_the_first() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.stop(1)
        assert interruption.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.stop(2)


TWICE = """\
import os, signal, sys
from qwen_jax.cli import common, main
from train.interrupt import Interruption

def run(argv, export):
    with Interruption():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            import threading
            threading.Thread(target=lambda: __import__("time").sleep(600)).start()  # A save in the background.

from train import run as module
module.main = run
sys.exit(main(["train", "pretrain"]))
"""


def test_the_command_does_not_wait_for_a_save_after_a_second_ctrl_c() -> None:
    import subprocess

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "Press it again to end at once" in done.stderr
    assert "ended without saving" in done.stderr
    assert "Traceback" not in done.stderr


GLOO = "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Connection reset by peer"


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError(GLOO),
        ValueError(GLOO),
        RuntimeError("DEADLINE_EXCEEDED: Barrier timed out: the coordination service has no word of task 1"),
        TimeoutError("waited 60 s"),
        chained(RuntimeError("Saving failed."), ValueError(GLOO)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_process_is_told_whatever_the_exception(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "several_processes", lambda: True)
    told = failures.explain(error)
    assert told is not None
    assert told.startswith("Another process of the job has ended or cannot be reached")
    assert "Start all of them again with the same command" in told


@pytest.mark.parametrize("error", [ValueError("no connection between these layers"), KeyError("barrier")])
def test_other_errors_stay_what_they_are(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "several_processes", lambda: True)
    assert failures.explain(error) is None
    monkeypatch.setattr(failures, "several_processes", lambda: False)
    assert failures.explain(ValueError(GLOO)) is None
