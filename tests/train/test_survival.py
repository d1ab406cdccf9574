"""Runs that are killed, change hosts, find no room on the disk, or have a checkpoint that one host finds damaged."""

import dataclasses
import hashlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import load_tokenizer
from tests.helpers.processes import Job, run, train
from tests.helpers.runs import (
    assert_same_weights,
    config_file,
    configuration,
    final_weights,
    launches,
    losses,
    numbers,
    print_seed,
    saved_steps,
    stop_after,
)
from train import checkpoint
from train import run as run_module
from train.checkpoint import Checkpoints
from train.config import RunConfig, Stage, set_fields
from train.data.batch import Batch
from train.data.feed import Feed
from train.loop import CheckpointConfig, LoopConfig
from train.optimizer import OptimizerConfig, Schedule
from train.state import abstract_state, init_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert not run_module.pretrain(configuration(material, output))
    return output


def wait_for(job: Job, what: Any, seconds: float = 200.0) -> bool:
    """Waits for a condition; returns whether it held before a process ended."""
    deadline = time.monotonic() + seconds
    while all(process.poll() is None for process in job.started):
        if what():
            return True
        assert time.monotonic() < deadline, job
        time.sleep(0.0005)
    return False


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def unfinished(output: Path) -> list[Path]:
    """Folders of saves in progress."""
    return list((output / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


# Killed


def test_killed_many_times_a_run_ends_as_if_it_had_not_been(
    material: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By SIGKILL at random moments, every other time in the middle of a save."""
    rng, times = print_seed(), 10 if request.config.getoption("--all-cases") else 4
    changes = (
        "stages.0.schedule.steps=300",
        "stages.1.schedule.steps=20",
        "loop.evaluate_every=0",
        "checkpoints.keep_last=2",
    )
    expected, output = tmp_path / "straight", tmp_path / "run"
    config = configuration(material, expected, checkpoints=CheckpointConfig(every=1000))
    config = set_fields(config, *changes)
    run_module.pretrain(config)
    file = config_file(tmp_path / "config.py", material, output)
    during_saves = 0

    def kill(job: Job, save: bool) -> None:
        """After one to three new checkpoints; in the middle of the next save, or at any moment."""
        steps = saved_steps(output) if (output / "checkpoints").exists() else [0]
        newest = steps[-1] + 2 * int(rng.integers(1, 4)) if steps else 2
        assert wait_for(job, lambda: unfinished(output) and max(saved_steps(output), default=0) >= newest), job
        moment = time.monotonic() + rng.random() * 0.1
        assert wait_for(job, lambda: unfinished(output) if save else time.monotonic() > moment), job
        job.started[0].send_signal(signal.SIGKILL)

    for i in range(times):
        with train(file, *changes, "checkpoints.every=2") as job:
            kill(job, save=i % 2 == 0)
            assert job.wait() == [-signal.SIGKILL], job
        during_saves += bool(unfinished(output))
    with train(file, *changes, "checkpoints.every=2") as job:
        assert job.wait() == [0], job
    begins = [launch["step"] for launch in launches(output)]
    print(f"killed {times} times, {during_saves} of them during a save; begun at the steps {begins}")
    assert during_saves >= 1
    # Each resumed from what the one before had saved.
    assert len(set(begins)) == times + 1
    assert len(losses(output)) == 320
    assert numbers(output) == numbers(expected)
    assert_same_weights(output, expected, step=320)
    assert not unfinished(output)


# Hosts


def recorded(config: RunConfig, until: int | None = None) -> tuple[list[str], list[float]]:
    """Trains; returns hashes of the global batches that were on the devices, and the losses in the log.

    Args:
      config: of the run.
      until: stop after this step, as after a SIGTERM.
    """
    hashes: list[str] = []

    class Recording(Feed):
        def __getitem__(self, step: int) -> Batch:
            batch = super().__getitem__(step)
            whole = batch if jax.process_count() == 1 else multihost_utils.process_allgather(batch, tiled=True)
            content = b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(whole)))
            hashes.append(hashlib.sha256(content).hexdigest())
            return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "Feed", Recording)
        if until is not None:
            stop_after(patch, until)
        assert bool(run_module.pretrain(config)) == (until is not None)
    return hashes, losses(config.output)


def on_four_devices(material: str, output: str) -> RunConfig:
    config = configuration(material, output, mesh={"data": 4})
    later = dataclasses.replace(config.stages[1], batch_size=4, accumulation=1)
    return dataclasses.replace(config, stages=(config.stages[0], later))


def on_hosts(material: str, alone: str, shared: str, until: int) -> list[tuple[list[str], list[float]]]:
    """In each of several processes: a run of their own, and a part of a run that others continue."""
    return [recorded(on_four_devices(material, alone)), recorded(on_four_devices(material, shared), until)]


def test_one_two_and_four_hosts_see_the_same_batches_and_go_on_for_one_another(material: Path, tmp_path: Path) -> None:
    expected_hashes, expected = recorded(on_four_devices(str(material), str(tmp_path / "one")))
    assert len(set(expected_hashes)) == 10
    shared, pieces = str(tmp_path / "shared"), []
    for hosts, until in ((4, 3), (2, 7)):
        alone = str(tmp_path / f"hosts-{hosts}")
        results = run(on_hosts, str(material), alone, shared, until, processes=hosts, devices=4 // hosts, timeout=400)
        for (hashes, got), (part, _) in results:
            assert hashes == expected_hashes
            # float32 sums in another order.
            np.testing.assert_allclose(got, expected, rtol=1e-5)
            assert part == results[0][1][0]
        pieces += results[0][1][0]
        # Process 0 alone writes.
        assert len(launches(alone)) == 1
        assert len(losses(alone)) == 10
    last, got = recorded(on_four_devices(str(material), shared))
    assert pieces + last == expected_hashes
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert [x["processes"] for x in launches(shared)] == [4, 2, 1]


def test_another_mixture_from_a_step_on_changes_nothing_before_it(material: Path, tmp_path: Path) -> None:
    config = configuration(material, tmp_path / "x")
    later = Stage(Schedule(4, 1e-3), 16, 4, {"a": 1, "b": 1})
    config = dataclasses.replace(config, stages=(config.stages[0], later))
    hashes, expected = recorded(dataclasses.replace(config, output=str(tmp_path / "one")))
    changed = set_fields(config, "stages.1.mixture.b=7")
    other_hashes, other = recorded(dataclasses.replace(changed, output=str(tmp_path / "other")))
    assert (other_hashes[:6], other[:6]) == (hashes[:6], expected[:6])
    assert other_hashes[6:] != hashes[6:]
    assert other[6:] != expected[6:]
    # The same for a run that is stopped where the two differ, and resumed with the other.
    begun = dataclasses.replace(config, output=str(tmp_path / "middle"))
    first, _ = recorded(begun, until=6)
    second, got = recorded(dataclasses.replace(changed, output=begun.output))
    assert (first + second, got) == (other_hashes, other)


# Signals and lost processes


def running(job: Job, output: Path) -> None:
    """Waits until a job takes steps."""
    assert wait_for(job, lambda: lines(output / "metrics.jsonl") > 20), job


LONG = ("stages.0.schedule.steps=1000000", "stages.1.accumulation=1", "mesh.data=2", "loop.evaluate_every=0")


@pytest.mark.draw(1)
@pytest.mark.parametrize("index", [0, 1])
def test_sigterm_to_any_process_saves_one_step_in_all(material: Path, tmp_path: Path, index: int) -> None:
    file, output = config_file(tmp_path / "config.py", material, tmp_path / "run"), tmp_path / "run"
    with train(file, *LONG, "checkpoints.every=0", processes=2) as job:
        running(job, output)
        job.started[index].send_signal(signal.SIGTERM)
        assert job.wait(120) == [143, 143], job
    (step,) = saved_steps(output)
    # The log ends with the saved step, and the checkpoint can be resumed, here by one process.
    assert len(losses(output)) == step
    config = configuration(material, output, loop=LoopConfig())
    config = set_fields(config, *LONG[1:], f"stages.0.schedule.steps={step + 2}", "stages.0.schedule.warmup_steps=2")
    run_module.pretrain(config)
    assert len(losses(output)) == step + 6


@pytest.mark.draw(1)
@pytest.mark.parametrize(("how", "index"), [("SIGKILL", 1), ("SIGKILL", 0), ("SIGSTOP", 1)])
def test_a_lost_process_ends_the_others_with_a_message(material: Path, tmp_path: Path, how: str, index: int) -> None:
    """A killed process closes its connections; a stopped one, like a lost machine, is only silent."""
    file, output = config_file(tmp_path / "config.py", material, tmp_path / "run"), tmp_path / "run"
    options = ("--heartbeat-timeout", "10")
    with train(file, *LONG, "checkpoints.every=10", processes=2, options=options) as job:
        running(job, output)
        wait_for(job, lambda: saved_steps(output))
        job.started[index].send_signal(getattr(signal, how))
        survivor, deadline = job.started[1 - index], time.monotonic() + 60
        while survivor.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert survivor.poll() not in (None, 0, 143), job
        told = job.output(1 - index)
        assert "Another process of the job has ended" in told or "another task died" in told, job
        assert "Traceback" not in told, job
    assert saved_steps(output)


@pytest.mark.parametrize("what", ["MetricsLog", "TensorBoardLog"])
@pytest.mark.draw(1)
def test_a_log_that_process_0_cannot_write_ends_all_with_a_message(material: Path, tmp_path: Path, what: str) -> None:
    """The others wait for it in a collective, until it has ended."""
    file, output = config_file(tmp_path / "config.py", material, tmp_path / "run"), tmp_path / "run"
    with file.open("a") as added:
        added.write(
            f"import errno, pathlib\nfrom train.observe import report\nwrite = report.{what}.write\n"
            "def full(log, record):\n    if record['step'] > 20:\n"
            f"        pathlib.Path({str(tmp_path)!r}, 'failed').touch()\n"
            "        raise OSError(errno.ENOSPC, 'No space left on device', 'a log')\n"
            f"    write(log, record)\nreport.{what}.write = full\n"
        )
    with train(file, *LONG, "checkpoints.every=10", processes=2) as job:
        assert wait_for(job, (tmp_path / "failed").exists) or (tmp_path / "failed").exists(), job
        statuses = job.wait(30)
        assert statuses[0] == 1, job
        assert statuses[1] not in (0, 143), job
        assert "No space left on device for a log. Make room" in job.output(0), job
        told = job.output(1)
        assert "Another process of the job has ended" in told or "another task died" in told, job
        assert all("Traceback" not in job.output(i) for i in range(2)), job
    assert 20 in saved_steps(output)


# Damage


def see_damage(material: str, output: str, what: str) -> tuple[int, str, list[int]]:
    """In each of two processes: process 1 alone finds the newest checkpoint damaged."""
    model, optimizer = configuration(material, output).model, OptimizerConfig(Schedule(5, 1e-2))
    mesh, tokenizer = make_mesh({"fsdp": 2}), load_tokenizer(Path(material) / "tokenizer")
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(checkpoint._log, "warning", lambda text, *args: warnings.append(text % args))
        state = init_state(model, optimizer, 0, mesh)
        with Checkpoints(output, model, tokenizer) as checkpoints:
            for step in (1, 2):
                checkpoints.save(dataclasses.replace(state, step=state.step + step), step)
        if jax.process_index() == 1:
            read, steps = checkpoint.read_arrays, Checkpoints._steps

            def broken(folder: Path, like: Any) -> Any:
                if folder.parent.name == "2" and what == "unreadable":
                    raise ValueError("a bit has flipped")
                if folder.parent.name == "2" and what == "no memory":
                    raise MemoryError("no memory")
                value = read(folder, like)
                if folder.parent.name == "2" and what == "changed" and folder.name == "params":
                    return jax.tree.map(lambda x: x + 1, value)
                return value

            patch.setattr(checkpoint, "read_arrays", broken)
            if what == "missing":
                patch.setattr(Checkpoints, "_steps", lambda self: [s for s in steps(self) if s != 2])
                patch.setattr(Checkpoints, "_about", lambda self, step: {} if step == 2 else {"checksums": about(step)})
                about = lambda step: checkpoint.read_json(Path(output) / str(step) / "about" / "metadata")["checksums"]  # noqa: E731
        with Checkpoints(output, model, tokenizer) as checkpoints:
            assert checkpoints.latest_step == 2
            try:
                restored = int(checkpoints.restore(abstract_state(model, optimizer, mesh)).step)
            except (MemoryError, ValueError) as error:
                return -1, f"{type(error).__name__}: {error}", saved_steps(Path(output).parent)
    return restored, " ".join(warnings), saved_steps(Path(output).parent)


@pytest.mark.draw(2)
@pytest.mark.parametrize("what", ["unreadable", "changed", "missing", "no memory"])
def test_damage_that_one_process_sees_is_damage_for_all(material: Path, tmp_path: Path, what: str) -> None:
    first, second = run(see_damage, str(material), str(tmp_path / "checkpoints"), what, processes=2)
    if what == "no memory":
        # That says nothing about the checkpoint: both processes end, and it is kept.
        assert "Process 1 could not load the checkpoint of step 2" in first[1]
        assert second[1] == "MemoryError: no memory"
        assert first[2] == [1, 2]
        return
    for step, told, left in (first, second):
        assert step == 1
        assert "checkpoint of step 2" in told
        assert "is damaged" in told
        assert left == [1]
    assert (tmp_path / "checkpoints" / "damaged-2" / "params").is_dir()
    if what == "unreadable":
        assert "process 1 cannot read it" in first[1]
        assert "a bit has flipped" in second[1]


# No room

LIMIT = (
    "import os, resource, sys;"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2);"
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


@pytest.mark.draw(1)
@pytest.mark.parametrize("processes", [1, 2])
def test_no_room_for_a_checkpoint_is_an_error_that_costs_nothing(
    material: Path, tmp_path: Path, straight: Path, processes: int
) -> None:
    """The last process may not write files as large as a checkpoint's: the system refuses, as on a full disk."""
    file, output = config_file(tmp_path / "config.py", material, tmp_path / "run"), tmp_path / "run"
    changes = ("mesh.data=2", "stages.1.accumulation=1") if processes == 2 else ()
    config = configuration(material, output)
    config = set_fields(config, *changes, "stages.0.schedule.steps=6")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        assert run_module.pretrain(config)
    assert saved_steps(output) == [3, 4]
    launcher = (sys.executable, "-c", LIMIT, "100000")
    # Without the compilation cache, whose files are too large as well.
    with train(file, *changes, processes=processes, launcher=launcher) as job:
        statuses = job.wait(300)
        assert 0 not in statuses, job
        told = job.output(processes - 1)
        assert statuses[-1] == 1, job
        assert "Traceback" not in told, job
        assert "Cannot save the checkpoint of step 6" in told, job
        assert "File too large" in told
        assert "MiB" in told
        assert "The checkpoints of steps [3, 4] are unharmed" in told
    assert not unfinished(output) or processes == 2  # Process 0 removes it when the run goes on.
    run_module.pretrain(config)
    assert not unfinished(output)
    if processes == 1:
        assert numbers(output) == numbers(straight)
        assert_same_weights(output, straight)
    else:
        np.testing.assert_allclose(losses(output), losses(straight), rtol=1e-4)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk; the test above needs no mount")
def test_a_full_disk(material: Path, tmp_path: Path, straight: Path) -> None:
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    try:
        output = disk / "run"
        config = configuration(material, output)
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 4)
            assert run_module.pretrain(config)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - 60_000))
        with pytest.raises(Exception, match="No space left on device") as caught:
            run_module.pretrain(config)
        assert "The checkpoints of steps [3, 4] are unharmed" in str(caught.value)
        assert saved_steps(output) == [3, 4]
        (disk / "filler").unlink()
        run_module.pretrain(config)
        assert numbers(output) == numbers(straight)
        assert jax.tree.structure(final_weights(output)) == jax.tree.structure(final_weights(straight))
        assert_same_weights(output, straight)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
