"""Runs from a configuration: stages in one log, exact resume, and what must not change on resume."""

import json
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax.config import load_config
from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import load_tokenizer, train_bpe
from tests.helpers.data_sets import make_rows
from tests.helpers.runs import assert_same_weights, config_file, configuration, numbers, stop_after
from train import run
from train.config import load, set_fields
from train.data.batch import row_part
from train.data.mixture import Mixture
from train.data.rows import PackedRows
from train.observe.metrics import read_log


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
    """With another base, stage 2 has other losses from its first step on, from the same weights."""
    config = set_fields(configuration(material, tmp_path / "run"), "stages.1.rope_theta=1e4")
    run.pretrain(config)
    assert numbers(tmp_path / "run")[:8] == numbers(straight)[:8]
    assert numbers(tmp_path / "run")[8:] != numbers(straight)[8:]


@pytest.mark.draw(1)
@pytest.mark.parametrize("at", [4, 6, 8])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(material, tmp_path, straight, monkeypatch, at):
    output, config = tmp_path / "run", configuration(material, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, at)
        assert run.pretrain(config)
    assert (output / "checkpoints" / str(at)).is_dir()
    assert not run.pretrain(config)
    assert numbers(output) == numbers(straight)
    assert_same_weights(output, straight)
    # A run that has ended does nothing more.
    assert not run.pretrain(config)
    assert numbers(output) == numbers(straight)


def test_a_run_on_another_mesh_goes_on_within_noise(material, tmp_path, straight, monkeypatch):
    output, config = tmp_path / "run", configuration(material, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run.pretrain(config)
    # Each stage has its own mesh: the state moves from one to the other.
    config = set_fields(config, "mesh.fsdp=2", "stages.1.accumulation=1", "stages.1.mesh.tensor=2")
    run.pretrain(config)
    got, expected = numbers(output), numbers(straight)
    assert got[:5] == expected[:5]  # Up to where it was stopped.
    # float32 sums in another order.
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose([x or 0 for x in a], [x or 0 for x in b], rtol=1e-4)


def test_what_a_run_has_seen_may_not_change_and_what_comes_may(material, tmp_path, straight, monkeypatch):
    output, config = tmp_path / "run", configuration(material, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
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
        ("model.eos_token_ids=[999999]", r"ends texts with the ids .999999.*end-of-text id .* eos_token_ids=\(\d+,\)"),
    ):
        with pytest.raises(InputError, match=message):
            run.pretrain(set_fields(config, change))
    assert numbers(output) == before
    run.pretrain(set_fields(config, "stages.1.schedule.steps=2"))
    assert numbers(output)[:8] == numbers(straight)[:8]
    assert len([n for n in numbers(output) if n[1] is not None]) == 8


def _tokenizer(material) -> str:
    return PackedRows(material / "a").manifest.tokenizer


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
    assert set_fields(config, "stages.1.schedule.learning_rate=2").stages[1].schedule.learning_rate == 2.0
    assert set_fields(config, "mesh.fsdp=4").mesh == {"fsdp": 4}
    assert set_fields(config, "stages.0.mesh.fsdp=4").stages[0].mesh == {"fsdp": 4}
    # Neither is valid without the other.
    both = "stages.0.schedule.steps=2", "stages.0.schedule.warmup_steps=1"
    for order in (both, both[::-1]):
        schedule = set_fields(config, *order).stages[0].schedule
        assert (schedule.steps, schedule.warmup_steps) == (2, 1)
    with pytest.raises(InputError, match="must fit into steps"):
        set_fields(config, both[0])
    assert set_fields(config, "output=7").output == "7"
    assert set_fields(config, 'data={"a": "x"}').data == {"a": "x"}
    assert set_fields(config, "stages.1.rope_theta=null").next_token(1).model.rope_theta == 1e4
    for change, message in (
        ("stages.0.lenght=1", "Stage has no field 'lenght'; did you mean 'length'"),
        ("stages.2.length=1", "expected an index from 0 to 1"),
        ("sed=1", "did you mean 'seed'"),
        ("seed=1.5", "expected an integer, got '1.5'"),
        ("step.remat=half", "expected one of 'none', 'full', 'dots', got 'half'"),
        ("mesh.fdsp=2", "no axis 'fdsp'; did you mean 'fsdp'"),
        ("checkpoints.every=-1", "must be at least 0"),
        ("seed", "Expected path.to.field=value"),
        ("seed.x=1", "has no field 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            set_fields(config, change)


def test_a_configuration_is_a_function_in_a_file(material, tmp_path, capsys):
    file = tmp_path / "runs.py"
    config_file(file, material, Path("out"))
    assert load(str(file), ["seed=3"]).seed == 3
    with pytest.raises(InputError, match="no function 'confg'; did you mean 'config'"):
        load(f"{file}:confg")
    with pytest.raises(InputError, match="No Python file"):
        load(str(tmp_path / "none.py"))
    file.write_text("def run():\n    return 5\n")
    with pytest.raises(InputError, match=r"must return a train.config.RunConfig, got int"):
        load(str(file))


@pytest.mark.parametrize("name", ["standard", "turbo", "million"])
def test_the_reports_recipes(name, capsys):
    file = Path(__file__).parents[2] / "experiments" / "pretrain" / "qwen2_5.py"
    assert run.main(["--config", f"{file}:{name}", "--print-config"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    lengths = [(stage["length"], stage["rope_theta"]) for stage in stages]
    if name == "standard":
        assert lengths == [(4096, 1e4), (32768, 1e6)]
    elif name == "million":
        assert lengths == [(65536, 1e6), (131072, 5e6), (262144, 1e7)]
        assert all(sorted(stage["mixture"].values()) == [0.25, 0.75] for stage in stages)
    else:
        assert lengths == [(n, 1e7) for n in (32768, 65536, 131072, 262144)]
        assert all(sorted(stage["mixture"].values()) == [0.4, 0.6] for stage in stages)


def test_runs_that_cannot_work_are_refused_before_anything_is_made(material, tmp_path):
    config = configuration(material, tmp_path / "run")
    tokenizer = load_tokenizer(material / "tokenizer").fingerprint()
    make_rows(tmp_path / "held-18", np.random.default_rng(0), 4, 18, tokenizer=tokenizer)
    for change, message in (
        ("mesh.fsdp=3", "not divisible by the fsdp axis"),
        ("mesh.data=3", "does not divide into 1 micro-batches over 3 shards"),
        ("mesh.data=16", "needs 16 devices, there are 8"),
        # Before the steps of the first stage are taken.
        ("stages.1.mesh.context=3", "Stage 2: Rows of 32 tokens do not divide into 6 chunks"),
        (
            f'stages.1.mesh.context=2 held_out={{"held": "{tmp_path / "held-18"}"}}',
            "Stage 2, the held-out data set 'held': Rows of 18 tokens do not divide into 4 chunks",
        ),
        ("model.vocab_size=512", "token ids up to 999"),
        ("data.a=nowhere", "nowhere"),
        ("stages.0.mixture.c=1", "names the data set 'c', which is not there"),
        ("stages.0.length=32", "has rows of 16"),
    ):
        with pytest.raises(InputError, match=message):
            run.pretrain(set_fields(config, *change.split(" ", 1)))
    assert not (tmp_path / "run").exists()


def test_the_configuration_in_the_help_can_be_loaded(tmp_path, capsys):
    """As a newcomer would copy it into a file."""
    with pytest.raises(SystemExit):
        run.main(["--help"])
    example = capsys.readouterr().out.partition("experiments/pretrain):")[2].partition("watch it:")[0]
    (tmp_path / "copied.py").write_text(textwrap.dedent(example.strip("\n")))
    assert load(str(tmp_path / "copied.py")).stages[0].length == 4096
