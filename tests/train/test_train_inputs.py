"""Inputs of a run, from the command line: raw documents, an export at the end, and bad input of all kinds."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import convert
from qwen_jax.cli import main
from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import load_tokenizer
from tests.helpers.data_sets import contents, random_texts, write
from tests.helpers.processes import run as run_processes
from tests.helpers.runs import (
    assert_same_weights,
    config_file,
    configuration,
    losses,
    numbers,
    print_seed,
    saved_steps,
    stop_after,
)
from train import run
from train.config import Stage
from train.data.build import BuildConfig, build
from train.data.rows import PackedRows
from train.inputs import HeldOutBatches
from train.optimizer import Schedule

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def command(material: Path, tmp_path: Path, capsys: Capture):
    """`qwen-jax train pretrain` with changes: its status and what it wrote on standard error."""
    file = config_file(tmp_path / "config.py", material, tmp_path / "run")

    def call(*changes: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["train", "pretrain", "--config", str(file), *(["--set", *changes] if changes else [])])
        return status, capsys.readouterr().err

    return call


# Export


def test_a_run_ends_with_a_hugging_face_folder_that_is_its_last_checkpoint(command, tmp_path: Path) -> None:
    """`qwen-jax convert` makes such a folder of any checkpoint, at any time."""
    output, export = tmp_path / "run", tmp_path / "export"
    status, told = command(f"export={export}")
    assert status == 0, told
    for step in saved_steps(output):
        assert main(["convert", str(output / "checkpoints" / str(step)), str(tmp_path / f"hf-{step}")]) == 0
    assert contents(export) == contents(tmp_path / "hf-10")
    assert contents(export) != contents(tmp_path / "hf-9")
    config, params = convert.load(export, make_mesh({}, jax.devices()[:1]))
    assert config.rope_theta == 1e6
    assert load_tokenizer(export).fingerprint() == load_tokenizer(output / "checkpoints" / "10").fingerprint()
    _, saved = convert.load(output / "checkpoints" / "10", make_mesh({}, jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, params, saved)
    # The same command again changes nothing; an export that was removed is written again.
    before = contents(export)
    assert command(f"export={export}")[0] == 0
    assert contents(export) == before
    shutil.rmtree(export)
    assert command(f"export={export}")[0] == 0
    assert contents(export) == before
    # A run with steps left does not overwrite an export, and says so before its first step.
    status, told = command(f"export={export}", "stages.1.schedule.steps=6")
    assert status == 1
    assert "exists already" in told
    assert len(losses(output)) == 10


# Raw documents


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    rng = print_seed()
    folder = tmp_path / "documents"
    folder.mkdir()
    write(folder / "a.jsonl", random_texts(rng, 40))
    write(folder / "b.txt", random_texts(rng, 1))
    return folder


def raw(material: Path, output: Path, documents: Path | str):
    config = configuration(material, output, data={"a": str(documents)}, held_out={"held": str(documents)})
    return dataclasses.replace(config, stages=(Stage(Schedule(10, 1e-2), 16, 4, {"a": 1}),))


def test_raw_documents_are_the_rows_that_a_build_of_them_has(
    material: Path, tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may begin with raw documents and resume with the built data set; it resumes like any other."""
    built = tmp_path / "built"
    build(BuildConfig((str(documents),), material / "tokenizer", 16, built))
    run.pretrain(raw(material, tmp_path / "built-run", built))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert run.pretrain(raw(material, tmp_path / "run", documents))
    rows = PackedRows(tmp_path / "run" / "data" / "data" / "a")
    assert rows.manifest.fingerprint == PackedRows(built).manifest.fingerprint
    assert not run.pretrain(raw(material, tmp_path / "run", documents))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "built-run")
    assert_same_weights(tmp_path / "run", tmp_path / "built-run")


def raw_on_hosts(material: str, output: str, documents: str) -> list[float]:
    """In each of two processes, which start with nothing built."""
    config = dataclasses.replace(raw(Path(material), Path(output), documents), mesh={"data": 2})
    run.pretrain(config)
    return losses(output)


@pytest.mark.slow
def test_one_of_several_processes_builds_raw_documents_for_all(material: Path, tmp_path: Path, documents: Path) -> None:
    first, second = run_processes(raw_on_hosts, str(material), str(tmp_path / "two"), str(documents), processes=2)
    run.pretrain(raw(material, tmp_path / "one", documents))
    assert first == second
    # float32 sums in another order.
    np.testing.assert_allclose(first, losses(tmp_path / "one"), rtol=1e-4)


def test_raw_documents_may_not_change_on_resume_and_not_be_too_many(
    material: Path, tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = raw(material, tmp_path / "run", documents)
    with pytest.raises(InputError, match=r"more than the 0.001 that a run builds .* qwen-jax data build --input"):
        run.pretrain(dataclasses.replace(config, max_raw_megabytes=0.001))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert run.pretrain(config)
    before = numbers(tmp_path / "run")
    with (documents / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(InputError, match=r"data.a, .*a.jsonl has another size.* begin a new run"):
        run.pretrain(config)
    assert numbers(tmp_path / "run") == before
    two = dataclasses.replace(config.stages[0], length=32, mixture={"a": 1})
    with pytest.raises(InputError, match=r"stages ask for \[16, 32\]"):
        run.pretrain(dataclasses.replace(config, stages=(*config.stages, two)))


def test_bad_raw_documents_are_quarantined_and_too_many_are_an_error(
    material: Path, tmp_path: Path, documents: Path
) -> None:
    with (documents / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "caf\xe9"}\nno json\n{"other": 1}\n')
    config = raw(material, tmp_path / "run", documents)
    run.pretrain(config)
    quarantine = tmp_path / "run" / "data" / "data" / "a" / "quarantine.jsonl"
    reasons = [json.loads(line)["reason"] for line in quarantine.read_text().splitlines()]
    assert len(reasons) == 3
    with (documents / "a.jsonl").open("ab") as file:
        file.write(b"no json\n" * 20)
    with pytest.raises(InputError, match=r"data.a, .*: 23 of .* records are bad"):
        run.pretrain(raw(material, tmp_path / "other", documents))


# Held-out rows


def test_held_out_batches_hold_every_row_once_and_padding_after_them(material: Path) -> None:
    rows, rng = PackedRows(material / "held"), print_seed()
    mesh = make_mesh({"data": 2, "fsdp": 2})
    whole = rows.take(range(len(rows)))
    for size in (4, 8 * int(rng.integers(1, 4))):
        parts = [jax.device_get(batch) for batch in HeldOutBatches(rows, size, mesh)]
        assert {part.shape for part in parts} == {(size, rows.length)}
        joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        jax.tree.map(lambda got, expected: np.testing.assert_array_equal(got[: len(rows)], expected), joined, whole)
        assert not joined.segment_ids[len(rows) :].any()
        assert not joined.loss_weights[len(rows) :].any()


# Bad input


def spoil(folder: Path, how: str) -> None:
    """Damages a built data set."""
    tokens = folder / "shard-00000.tokens"
    if how == "empty":
        tokens.write_bytes(b"")
    elif how == "missing":
        tokens.unlink()
    elif how == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-8])
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "manifest":
        (folder / "manifest.json").write_text('{"format": ')
    elif how == "flipped":  # The lowest bit of a token, which makes it another valid token.
        content = bytearray(tokens.read_bytes())
        content[0] ^= 1
        tokens.write_bytes(content)
    else:  # A token outside any vocabulary, in every row.
        content = bytearray(tokens.read_bytes())
        content[3::4] = b"\x7f" * (len(content) // 4)
        tokens.write_bytes(content)


@pytest.mark.draw(2)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "shard-00000.tokens has 0 bytes, expected"),
        ("missing", "Cannot read"),
        ("cut", "bytes, expected"),
        ("no manifest", "is no finished data set"),
        ("manifest", "is damaged"),
        ("flipped", "is not what was built: its sha256"),
        ("token", "is damaged: row"),
    ],
)
def test_damaged_data_is_an_error_and_what_is_saved_stays(
    command, material: Path, tmp_path: Path, how: str, message: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(material / "b", data)
    changes = [f"data.b={data}", "stages.0.schedule.steps=3", "stages.1.length=16", 'stages.1.mixture={"b": 1}']
    assert command(*changes, "stages.1.schedule.steps=1")[0] == 0
    before = contents(tmp_path / "run")
    spoil(data, how)
    verify = ["verify_data=true"] if how == "flipped" else []
    status, told = command(*changes, "stages.1.schedule.steps=50", *verify)
    assert status == 1
    assert told.splitlines()[-1].startswith("qwen-jax: error: ")
    assert message in told
    assert "Traceback" not in told
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before if "checkpoints/" in name} == {
        name: content for name, content in before.items() if "checkpoints/" in name
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.a=nowhere"], "No such file or folder: nowhere"),
        (["data={}"], "names the data set 'a', which is not there"),
        (["stages=[]"], "at least one stage"),
        (["stages.0.mixture.a=0", "stages.0.mixture.b=0"], "add up to nothing"),
        (["stages.0.mixture.a=-1"], "must be a number of at least 0"),
        (["mesh.data=16"], "needs 16 devices, there are 8"),
        (["stages.0.batch_size=5", "mesh.data=2"], "does not divide"),
        (["stages.0.accumulation=3"], "does not divide"),
        (["tokenizer=nowhere"], "nowhere"),
        (["output=CONFIG/below"], "Not a directory"),
        (["initial=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_work_is_said_at_once(command, tmp_path: Path, changes: list[str], message: str) -> None:
    status, told = command(*(change.replace("CONFIG", str(tmp_path / "config.py")) for change in changes))
    assert status == 1
    assert message in told
    assert told.splitlines()[-1].startswith("qwen-jax: error: ")
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_empty_folder_of_data_is_an_error(command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, told = command(f"data.a={tmp_path / 'empty'}")
    assert status == 1
    assert str(tmp_path / "empty") in told
    (tmp_path / "empty" / "blank.txt").write_text(" \n")
    status, told = command(f"data.a={tmp_path / 'empty'}")
    assert status == 1
    assert "Found no text" in told


def test_a_checkpoint_of_another_model_is_refused(command, tmp_path: Path) -> None:
    few = ["stages.0.schedule.steps=3", "stages.1.schedule.steps=1"]
    assert command(*few)[0] == 0
    before = contents(tmp_path / "run" / "checkpoints")
    status, told = command(*few, "model.num_layers=2")
    assert status == 1
    assert "another model: num_layers was 1 and is now 2" in told
    weights = tmp_path / "run" / "checkpoints" / "4"
    status, told = command(*few, "model.num_layers=2", f"output={tmp_path / 'other'}", f"initial={weights}")
    assert status == 1
    assert "num_layers is 1 there and 2 here" in told
    assert contents(tmp_path / "run" / "checkpoints") == before


def test_a_loss_that_is_no_number_ends_the_run_and_the_checkpoints_stay(command, tmp_path: Path) -> None:
    few = ["stages.0.schedule.steps=3", "stages.1.schedule.steps=1", "checkpoints.every=1"]
    assert command(*few)[0] == 0
    # With this learning rate, the first step ruins the weights.
    status, told = command(
        *few[:1],
        "stages.1.schedule.steps=60",
        "stages.1.schedule.learning_rate=1e30",
        "loop.max_skipped=3",
        "checkpoints.keep_last=50",
    )
    assert status == 1
    assert "steps up to step" in told
    assert "not finite" in told
    assert "Traceback" not in told
    assert 4 in saved_steps(tmp_path / "run")
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run")[:4])
