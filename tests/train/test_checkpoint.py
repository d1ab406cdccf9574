"""Checkpoints: an interrupted run equals an uninterrupted one, and another model, tokenizer or data is refused."""

import asyncio
import contextlib
import dataclasses
import gc
import json
import threading

import jax
import numpy as np
import psutil
import pytest

from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.processes import run
from train.checkpoint import Checkpoints
from train.data.loader import batches, fingerprint
from train.data.packing import pack
from train.loop import ByStep, CheckpointConfig, Monitor, fit
from train.observe.metrics import MetricsLog, read_log
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import abstract_state, init_state
from train.step import StepConfig, make_train_step

TEXTS = ["def f(x):\n    return x + 1\n" * 30, "import os\nprint(os.getcwd())\n" * 20]
MODEL = dataclasses.replace(published("tiny"), vocab_size=384, num_layers=1)
OPTIMIZER = OptimizerConfig(Schedule(20, 1e-2, warmup_steps=4))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return pack([[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(TEXTS)], 16)


@pytest.fixture(scope="module")
def fresh():
    """Copies of a fresh state of each seed, compiled once."""
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        states = {seed: init_state(MODEL, OPTIMIZER, seed, mesh) for seed in (0, 1)}
    return lambda seed: jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), states[seed])


@pytest.fixture(scope="module")
def step():
    """One compiled step for all tests, as one process has."""
    objective, config = NextToken(MODEL, PretrainConfig(loss_chunk=16)), StepConfig(dtype="float32", remat="none")
    return make_train_step(objective, OPTIMIZER, config, make_mesh({}, jax.devices()[:1]))


def train(folder, mesh, tokenizer, rows, step, fresh, steps, resume=False):
    """Trains up to `steps` as a new process would; returns the final state on the host."""
    run, schedule = {"data": fingerprint(rows), "seed": 5}, CheckpointConfig(every=10)
    with jax.set_mesh(mesh), Checkpoints(folder / "checkpoints", MODEL, tokenizer, run, schedule) as checkpoints:
        # Another seed: nothing of the fresh state may survive a restore.
        state = fresh(1 if resume else 0)
        if resume:
            state = checkpoints.restore(state)
        with contextlib.closing(MetricsLog(folder / "metrics.jsonl", int(state.step))) as log:
            data = ByStep(batches(rows, 4, seed=5))
            state = fit(steps, state, step, data, mesh=mesh, checkpoints=checkpoints, monitor=Monitor(log=log))
        return jax.device_get(state)


def losses(folder):
    return [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in read_log(folder / "metrics.jsonl")]


def test_ten_steps_save_restore_and_ten_more_are_twenty_steps(mesh, tmp_path, tokenizer, rows, step, fresh):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    expected = train(straight, mesh, tokenizer, rows, step, fresh, 20)
    train(broken, mesh, tokenizer, rows, step, fresh, 10)
    got = train(broken, mesh, tokenizer, rows, step, fresh, 20, resume=True)
    assert len(losses(straight)) == 20
    assert losses(broken) == losses(straight)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)


def test_saving_in_the_background_survives_donation(mesh, tmp_path, tokenizer, rows, step, fresh):
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
        state = fresh(0)
        before = jax.tree.map(np.array, jax.device_get(state))
        checkpoints.save(state, 0)
        # The step overwrites the buffers that are being saved.
        fit(3, state, step, ByStep(batches(rows, 4, seed=0)), mesh=mesh)
        checkpoints._manager.wait_until_finished()
        restored = jax.device_get(checkpoints.restore(fresh(1), 0))
    jax.tree.map(np.testing.assert_array_equal, restored, before)


def test_the_newest_are_kept_and_each_is_a_model_folder(mesh, tmp_path, tokenizer, fresh):
    with (
        jax.set_mesh(mesh),
        Checkpoints(tmp_path / "run", MODEL, tokenizer, schedule=CheckpointConfig(keep_last=2)) as checkpoints,
    ):
        state = fresh(0)
        for number in (1, 2, 3):
            checkpoints.save(dataclasses.replace(state, step=state.step + number), number)
            checkpoints.save(state, number)  # Saved already: nothing happens.
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["2", "3"]
    for number in ("2", "3"):
        folder = tmp_path / "run" / number
        assert load_config(folder) == MODEL
        assert load_tokenizer(folder).fingerprint() == tokenizer.fingerprint()
        assert (folder / "params").is_dir()
        assert not list(folder.glob("*.tmp"))
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
        assert checkpoints.latest_step == 3
        assert int(checkpoints.restore(state).step) == 3
        with pytest.raises(InputError, match=r"no checkpoint of step 1; it has \[2, 3\]"):
            checkpoints.restore(state, 1)


def test_resuming_with_something_else_is_refused_and_touches_nothing(tmp_path, tokenizer):
    folder = tmp_path / "run"
    Checkpoints(folder, MODEL, tokenizer, {"seed": 1}).close()
    content = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    wider = dataclasses.replace(MODEL, hidden_size=128)
    with pytest.raises(InputError, match="another model: hidden_size was 64 and is now 128"):
        Checkpoints(folder, wider, tokenizer, {"seed": 1})
    with pytest.raises(InputError, match="another run: tokenizer was"):
        Checkpoints(folder, MODEL, train_bpe(TEXTS, 290), {"seed": 1})
    with pytest.raises(InputError, match="another run: seed was 1 and is now 2"):
        Checkpoints(folder, MODEL, tokenizer, {"seed": 2})
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == content
    Checkpoints(folder, MODEL, tokenizer, {"seed": 1}).close()


def peak_of_saves(folder):
    """Bytes of a state, and the largest growth of the process while the state was saved three times."""
    model = dataclasses.replace(published("qwen2.5-0.5b"), vocab_size=8192, num_layers=2)
    mesh = make_mesh({})
    tokenizer, process = train_bpe(TEXTS, 300), psutil.Process()
    with jax.set_mesh(mesh), Checkpoints(folder, model, tokenizer) as checkpoints:
        state = init_state(model, OPTIMIZER, 0, mesh)
        state = dataclasses.replace(state, opt_state=jax.tree.map(noise, state.opt_state))
        checkpoints.save(state, 0)  # Imports and compilation of the first save do not count.
        checkpoints.finish()
        before, peak, done = process.memory_info().rss, 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, process.memory_info().rss)

        watching = threading.Thread(target=watch)
        watching.start()
        for step in (1, 2, 3):
            checkpoints.save(state, step)
        checkpoints.finish()
        done.set()
        watching.join()
        return sum(x.nbytes for x in jax.tree.leaves(state)), peak - before


@pytest.mark.slow
def test_saving_takes_no_more_memory_of_the_host_than_the_state(tmp_path):
    """On the CPU the state itself is in the host's memory already; the growth is the copy that is written.

    Orbax's store has a cache of up to 100 MB besides, whatever the size of the state.
    """
    ((size, grown),) = run(peak_of_saves, str(tmp_path / "run"), processes=1)
    print(f"state {size / 2**20:.0f} MiB, grown by {grown / 2**20:.0f} MiB")
    assert size > 300 * 2**20
    assert 0.5 * size < grown < size + 160 * 2**20


def test_nothing_to_restore_and_a_foreign_folder_are_clear_errors(mesh, tmp_path, tokenizer, fresh):
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(InputError, match="has no checkpoint"):
            checkpoints.restore(fresh(0))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no run"):
        Checkpoints(tmp_path / "foreign", MODEL, tokenizer)
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


def test_weights_restore_without_the_optimiser(mesh, tmp_path, tokenizer, fresh):
    import orbax.checkpoint as ocp

    with jax.set_mesh(mesh):
        state = fresh(0)
        with Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
            checkpoints.save(state, 7)
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(tmp_path / "run" / "7" / "params", state.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(state.params))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["tokenizer"] == tokenizer.fingerprint()


def damage(folder, how):
    """Damages the largest file of arrays below a folder, as a full or failing disk does."""
    largest = max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "missing":
        largest.unlink()
    elif how == "cut":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0xFF
        largest.write_bytes(content)


def noise(x):
    return jax.device_put(np.random.default_rng(0).normal(size=x.shape).astype(x.dtype), x.sharding)


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(mesh, tmp_path, tokenizer, fresh, caplog, how, item):
    folder = tmp_path / "run"
    with jax.set_mesh(mesh):
        state = fresh(0)
        # Moments of zero would be stored in no space.
        state = dataclasses.replace(state, opt_state=jax.tree.map(noise, state.opt_state))
        with Checkpoints(folder, MODEL, tokenizer) as checkpoints:
            for number in (1, 2):
                checkpoints.save(dataclasses.replace(state, step=state.step + number), number)
        damage(folder / "2" / item, how)
        with Checkpoints(folder, MODEL, tokenizer) as checkpoints:
            restored = checkpoints.restore(fresh(1))
            assert "step 2" in caplog.text
            assert "is damaged" in caplog.text
            assert checkpoints.latest_step == 1
            # The step can be saved again.
            checkpoints.save(dataclasses.replace(state, step=state.step + 2), 2)
        assert (folder / "damaged-2").is_dir()
        with Checkpoints(folder, MODEL, tokenizer) as checkpoints:
            assert int(checkpoints.restore(fresh(1)).step) == 2
    assert int(restored.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored.params), jax.device_get(state.params))


def test_when_all_are_damaged_nothing_is_lost_and_it_says_so(mesh, tmp_path, tokenizer, fresh):
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
        checkpoints.save(fresh(0), 1)
        checkpoints._manager.wait_until_finished()
        damage(tmp_path / "run" / "1" / "params", "cut")
        with pytest.raises(InputError, match=r"checkpoint of step 1 .* is damaged"):
            checkpoints.restore(fresh(1), 1)
        # Each time: a job that is restarted must not begin from random weights.
        for _ in range(2):
            assert checkpoints.latest_step == 1
            with pytest.raises(InputError, match=r"No checkpoint .* could be read: those of steps \[1\] are damaged"):
                checkpoints.restore(fresh(1))
    assert (tmp_path / "run" / "1" / "params").is_dir()


def test_every_so_many_stay_beside_the_newest(mesh, tmp_path, tokenizer, fresh):
    folder = tmp_path / "run"
    schedule = CheckpointConfig(keep_last=2, keep_every=4)
    with jax.set_mesh(mesh), Checkpoints(folder, MODEL, tokenizer, schedule=schedule) as checkpoints:
        for number in range(1, 8):
            checkpoints.save(fresh(0), number)
    assert sorted(int(p.name) for p in folder.iterdir() if p.is_dir()) == [4, 6, 7]


def test_a_checkpoint_has_the_configuration_of_its_stage(mesh, tmp_path, tokenizer, fresh):
    later = dataclasses.replace(MODEL, rope_theta=1e6)
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
        checkpoints.save(fresh(0), 1)
        checkpoints.save(fresh(0), 2, later, {"rows": [1, 2]})
    assert load_config(tmp_path / "run" / "1") == MODEL
    assert load_config(tmp_path / "run" / "2") == later
    with Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
        assert (checkpoints.data(1), checkpoints.data(2)) == (None, {"rows": [1, 2]})


def test_a_checkpoint_restores_onto_another_mesh_bit_for_bit(mesh, tmp_path, tokenizer, fresh):
    with jax.set_mesh(mesh), Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
        state = fresh(0)
        checkpoints.save(state, 1)
    other = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(other), Checkpoints(tmp_path / "run", MODEL, tokenizer) as checkpoints:
        restored = checkpoints.restore(abstract_state(MODEL, OPTIMIZER, other))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {8}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_lack_of_room_is_not_told_once_more_for_each_array(tmp_path, tokenizer, caplog):
    """Orbax raises the first error, and asyncio logs those of the other arrays; other errors must still be logged."""

    async def write(text: str) -> None:
        raise ValueError(text)

    async def write_all() -> None:
        tasks = [asyncio.create_task(write(text)) for text in ("full [os_error_code='28']", "another")]
        await asyncio.wait(tasks)

    with Checkpoints(tmp_path / "run", MODEL, tokenizer):
        asyncio.run(write_all())
        gc.collect()
    assert [str(record.exc_info[1]) for record in caplog.records if record.name == "asyncio"] == ["another"]
