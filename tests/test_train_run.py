"""Runs from a configuration: stages in one log, resume that leaves no trace, and what must not change on the way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from data_sets import make_rows
from jax.experimental.compilation_cache import compilation_cache
from processes import run as run_processes

from qwen_jax.config import load_config, published
from qwen_jax.errors import InputError
from qwen_jax.sharding import make_mesh
from qwen_jax.tokenizer import train_bpe
from train import run
from train.config import RunConfig, Stage, load, set_field
from train.data.batch import row_part
from train.data.mixture import Mixture
from train.data.rows import PackedRows
from train.metrics import read_log
from train.optimizer import Schedule

MODEL = dataclasses.replace(published("tiny"), vocab_size=1024, num_layers=1, rope_theta=1e4)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Runs that begin anew find their programs compiled, as they would on a cluster with a cache; it saves minutes."""
    folder = str(tmp_path_factory.mktemp("cache"))
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (folder, 0.5), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tokenizer, and data sets of two lengths."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = train_bpe(["some text of no importance " * 9], 300)
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name, length in (("a", 16), ("b", 16), ("long", 32), ("held", 16)):
        make_rows(folder / name, rng, 12, length, tokenizer=tokenizer.fingerprint())
    return folder


def configuration(material, output, **changes) -> RunConfig:
    config = RunConfig(
        output=str(output),
        model=MODEL,
        tokenizer=str(material / "tokenizer"),
        data={name: str(material / name) for name in ("a", "b", "long")},
        held_out={"held": str(material / "held")},
        stages=(
            Stage(Schedule(6, 1e-2, warmup_steps=2), 16, 4, {"a": 1, "b": 3}),
            Stage(Schedule(4, 1e-3, schedule="wsd"), 32, 2, {"long": 1}, rope_theta=1e6, accumulation=2),
        ),
        dtype="float32",
        remat="none",
        evaluate_every=5,
        checkpoint_every=3,
        keep_last=3,
    )
    return dataclasses.replace(config, **changes)


def numbers(output) -> list[tuple]:
    keys = "step", "loss", "grad_norm", "learning_rate", "weight", "skipped", "held_out_held_loss"
    records = read_log(Path(output) / "metrics.jsonl")
    # Where the time went is another thing each time.
    return [tuple(r.get(key) for key in keys) for r in records if "seconds_step" not in r]


def final_weights(output, step=10):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(output) / "checkpoints" / str(step) / "params")


@pytest.fixture(scope="module")
def straight(material, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert not run.pretrain(configuration(material, output))
    return output


def test_stages_are_one_run_with_one_log(straight, material):
    records = read_log(straight / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 11))
    rates = [r["learning_rate"] for r in steps]
    np.testing.assert_allclose(rates[:2], [5e-3, 1e-2], rtol=1e-6)
    np.testing.assert_allclose(rates[6:], 1e-3, rtol=1e-6)
    # Before the first step, every five, and at the end of each stage.
    assert [r["step"] for r in records if "held_out_held_loss" in r] == [0, 5, 6, 10]
    # Each checkpoint is a model of its stage.
    checkpoints = straight / "checkpoints"
    assert sorted(int(p.name) for p in checkpoints.iterdir() if p.is_dir()) == [6, 9, 10]
    assert load_config(checkpoints / "6").rope_theta == 1e4
    assert load_config(checkpoints / "9").rope_theta == 1e6
    (launch,) = [json.loads(line) for line in (straight / "launches.jsonl").read_text().splitlines()]
    assert launch["config"]["stages"][1]["rope_theta"] == 1e6
    assert launch["versions"]["jax"] == jax.__version__
    assert launch["step"] == 0


def test_a_stage_changes_the_rotary_base_and_nothing_else(material, tmp_path, straight):
    """The first loss of stage 2 with another base is another, from the same weights."""
    config = set_field(configuration(material, tmp_path / "run"), "stages.1.rope_theta=1e4")
    run.pretrain(config)
    assert numbers(tmp_path / "run")[:8] == numbers(straight)[:8]
    assert numbers(tmp_path / "run")[8:] != numbers(straight)[8:]


@pytest.mark.parametrize("at", [4, 6, 8])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(material, tmp_path, straight, monkeypatch, at):
    output, config = tmp_path / "run", configuration(material, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run._Sigterm, "_asked", lambda self, step: step == at)
        assert run.pretrain(config)
    assert (output / "checkpoints" / str(at)).is_dir()
    assert not run.pretrain(config)
    assert numbers(output) == numbers(straight)
    jax.tree.map(np.testing.assert_array_equal, final_weights(output), final_weights(straight))
    # A run that has ended does nothing more.
    assert not run.pretrain(config)
    assert numbers(output) == numbers(straight)


def test_a_run_on_another_mesh_goes_on_within_noise(material, tmp_path, straight, monkeypatch):
    output, config = tmp_path / "run", configuration(material, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run._Sigterm, "_asked", lambda self, step: step == 4)
        run.pretrain(config)
    # Stages on meshes of their own: the state moves from one to the other.
    for change in ("mesh.fsdp=2", "stages.1.accumulation=1", "stages.1.mesh.tensor=2"):
        config = set_field(config, change)
    run.pretrain(config)
    got, expected = numbers(output), numbers(straight)
    assert got[:6] == expected[:6]
    # float32 sums in another order.
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose([x or 0 for x in a], [x or 0 for x in b], rtol=1e-4)


def test_what_a_run_has_seen_may_not_change_and_what_comes_may(material, tmp_path, straight, monkeypatch):
    output, config = tmp_path / "run", configuration(material, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run._Sigterm, "_asked", lambda self, step: step == 4)
        run.pretrain(config)
    before = numbers(output)
    other_text = train_bpe(["other text altogether " * 9], 290)
    other_text.save(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    changed = make_rows(tmp_path / "data" / "a", np.random.default_rng(9), 12, 16, tokenizer=_tokenizer(material))
    for change, message in (
        ("seed=1", "seed was 0 and is now 1"),
        ("stages.0.mixture.a=2", "stage 1: shares was"),
        (f"data.a={changed.folder}", "the content of 'a' has changed"),
        (f"tokenizer={tmp_path / 'tokenizer'}", "built with the tokenizer"),
        ("model.num_layers=2", "another model: num_layers was 1 and is now 2"),
        ("stages.0.schedule.steps=3", "stage 1"),
    ):
        with pytest.raises(InputError, match=message):
            run.pretrain(set_field(config, change))
    assert numbers(output) == before
    run.pretrain(set_field(config, "stages.1.schedule.steps=2"))
    assert numbers(output)[:8] == numbers(straight)[:8]
    assert len([n for n in numbers(output) if n[1] is not None]) == 8


def _tokenizer(material) -> str:
    return PackedRows(material / "a").manifest.tokenizer


CONFIG_FILE = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from test_train_run import configuration
def config():
    return configuration(pathlib.Path({material!r}), {output!r})
"""


@pytest.mark.slow
def test_killed_at_any_time_a_run_ends_as_if_it_had_not_been(material, tmp_path, straight, cache):
    """By SIGKILL at random moments, also during a save, and by SIGTERM."""
    output = tmp_path / "run"
    text = CONFIG_FILE.format(tests=str(Path(__file__).parent), material=str(material), output=str(output))
    (tmp_path / "config.py").write_text(text)
    code = "import sys; from train.run import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--config", str(tmp_path / "config.py"), "--set", "checkpoint_every=1"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    rng, log = np.random.default_rng(0), output / "metrics.jsonl"
    for i in range(4):
        seen = log.read_bytes().count(b"\n") if log.exists() else 0
        with (tmp_path / f"err-{i}").open("wb") as err:
            process = subprocess.Popen(command, env=environment, stderr=err)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if i < 3 and log.exists() and log.read_bytes().count(b"\n") not in (seen, 0):
                time.sleep(rng.random() * 0.2)
                process.send_signal(signal.SIGTERM if i == 1 else signal.SIGKILL)
                break
            time.sleep(0.005)
        status = process.wait(200)
        assert status in ((0, run.STOPPED) if i == 1 else (0, -signal.SIGKILL) if i < 3 else (0,)), (
            tmp_path / f"err-{i}"
        ).read_text()
    assert [n for n in numbers(output) if n[1]] == [n for n in numbers(straight) if n[1]]
    jax.tree.map(np.testing.assert_array_equal, final_weights(output), final_weights(straight))


def on_hosts(material: str, output: str) -> list[tuple]:
    """In each of several processes."""
    config = configuration(Path(material), output, mesh={"data": 2, "tensor": 2})
    run.pretrain(dataclasses.replace(config, stages=(config.stages[0],)))
    return numbers(output)


def test_hosts_train_together_on_rows_of_their_own(material, tmp_path, straight):
    got, _ = run_processes(on_hosts, str(material), str(tmp_path / "run"), processes=2, devices=2)
    for a, b in zip(got, numbers(straight), strict=False):
        np.testing.assert_allclose([x or 0 for x in a], [x or 0 for x in b], rtol=1e-4)
    assert len((tmp_path / "run" / "launches.jsonl").read_text().splitlines()) == 1


def test_another_number_of_hosts_reads_the_same_global_batches(material):
    config = configuration(material, "unused")
    mixture = Mixture(config.mixture_stages(), {n: PackedRows(f) for n, f in config.data.items()}, seed=0)
    for step in (0, 5):
        whole = mixture[step]
        for count in (1, 2, 4):
            parts = [mixture.batch(step, i, count) for i in range(count)]
            joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
            jax.tree.map(np.testing.assert_array_equal, joined, whole)
    assert row_part(make_mesh({"data": 4}), 8) == (0, 1)


def test_fields_are_set_by_their_path_and_misspelt_ones_are_named(material):
    config = configuration(material, "run")
    assert set_field(config, "stages.1.schedule.learning_rate=2").stages[1].schedule.learning_rate == 2.0
    assert set_field(config, "mesh.fsdp=4").mesh == {"fsdp": 4}
    assert set_field(config, "stages.0.mesh.fsdp=4").stages[0].mesh == {"fsdp": 4}
    assert set_field(config, "output=7").output == "7"
    assert set_field(config, 'data={"a": "x"}').data == {"a": "x"}
    assert set_field(config, "stages.1.rope_theta=null").pretrain(1).model.rope_theta == 1e4
    for change, message in (
        ("stages.0.lenght=1", "Stage has no field 'lenght'; did you mean 'length'"),
        ("stages.2.length=1", "expected an index from 0 to 1"),
        ("sed=1", "did you mean 'seed'"),
        ("seed=1.5", "expected int, got '1.5'"),
        ("remat=half", "expected"),
        ("mesh.fdsp=2", "no axis 'fdsp'; did you mean 'fsdp'"),
        ("checkpoint_every=-1", "must be at least 0"),
        ("seed", "Expected path.to.field=value"),
        ("seed.x=1", "has no field 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            set_field(config, change)


def test_a_configuration_is_a_function_in_a_file(material, tmp_path, capsys):
    file = tmp_path / "runs.py"
    file.write_text(CONFIG_FILE.format(tests=str(Path(__file__).parent), material=str(material), output="out"))
    assert load(str(file), ["seed=3"]).seed == 3
    with pytest.raises(InputError, match="no function 'confg'; did you mean 'config'"):
        load(f"{file}:confg")
    with pytest.raises(InputError, match="No Python file"):
        load(str(tmp_path / "none.py"))
    file.write_text("def run():\n    return 5\n")
    with pytest.raises(InputError, match=r"must return a train.config.RunConfig, got int"):
        load(str(file))


@pytest.mark.parametrize("name", ["standard", "turbo"])
def test_the_reports_recipes(name, capsys):
    file = Path(__file__).parent.parent / "experiments" / "pretrain" / "qwen2_5.py"
    assert run.main(["--config", f"{file}:{name}", "--print-config"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    lengths = [(stage["length"], stage["rope_theta"]) for stage in stages]
    if name == "standard":
        assert lengths == [(4096, 1e4), (32768, 1e6)]
    else:
        assert lengths == [(n, 1e7) for n in (32768, 65536, 131072, 262144)]
        assert all(sorted(stage["mixture"].values()) == [0.4, 0.6] for stage in stages)


def test_runs_that_cannot_work_are_refused_before_anything_is_made(material, tmp_path):
    config = configuration(material, tmp_path / "run")
    for change, message in (
        ("mesh.fsdp=3", "not divisible by the fsdp axis"),
        ("mesh.data=3", "does not divide into 1 accumulated parts over 3 shards"),
        ("mesh.data=16", "needs 16 devices, there are 8"),
        ("model.vocab_size=512", "token ids up to 999"),
        ("data.a=nowhere", "nowhere"),
        ("stages.0.mixture.c=1", "names the data set 'c', which is not there"),
        ("stages.0.length=32", "has rows of 16"),
    ):
        with pytest.raises(InputError, match=message):
            run.pretrain(set_field(config, change))
    assert not (tmp_path / "run").exists()
