"""Files to packed rows: every token once, the same bytes however it was run, nothing finished is ever lost."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from rich.console import Console

from qwen_jax.cli import main
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import load_tokenizer
from tests.helpers.data_sets import (
    contents,
    documents_on_disk,
    expected_documents,
    frames_of,
    jsonl,
    random_texts,
    write,
)
from train.data import build as builder
from train.data.build import BuildConfig, build
from train.data.documents import find_sources, share_out
from train.data.mixture import Mixture, MixtureStage
from train.data.packing import pack
from train.data.rows import PackedRows
from train.data.shards import load_manifest
from train.data.text import standard_library

ROOT = Path(__file__).parents[3]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    path.mkdir()
    return path


def run(inputs: Path, tokenizer: Path, output: Path, **options: object):
    config = {"length": 37, "workers": 1, "domain": "d", **options}
    return build(
        BuildConfig(input=(str(inputs),), tokenizer=tokenizer, output=output, **config),  # type: ignore[arg-type]
        progress=Console(file=io.StringIO()),
    )


# --- what comes out ---


@pytest.mark.parametrize("unit", [None, 0.003])
def test_every_document_of_every_format_comes_once_and_whole(rng, tokenizer, folder, inputs, tmp_path, unit):
    texts = random_texts(rng, 500)
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    for name, i in zip(names, range(0, 400, 100), strict=True):
        write(inputs / name, texts[i : i + 100])
    for i in range(400, 500):
        write(inputs / f"{i}.{('txt', 'md', 'py')[i % 3]}", [texts[i]])
        texts[i] = texts[i].replace("\r\n", "\n")
    manifest = run(inputs, folder, tmp_path / "out", unit_megabytes=unit)
    got, expected = documents_on_disk(tmp_path / "out"), expected_documents(tokenizer, texts)
    assert sorted(got) == sorted(expected)
    assert len(manifest.shards) == 1 if unit is None else len(manifest.shards) > 10
    assert manifest.documents == len(texts)
    assert manifest.tokens == sum(map(len, expected))
    assert manifest.rows == PackedRows(tmp_path / "out", verify=True).manifest.rows
    assert manifest.padding == pytest.approx(1 - manifest.tokens / (37 * manifest.rows))
    assert {Path(entry.path).name: entry.size for entry in manifest.inputs} == {
        path.name: path.stat().st_size for path in inputs.iterdir()
    }
    assert manifest.tokenizer == tokenizer.fingerprint()
    assert load_manifest(tmp_path / "out") == manifest
    assert manifest.summary()["inputs"] == 104


@pytest.mark.parametrize("length", [2, 8, 37, 1000])
def test_rows_are_those_of_pack(rng, tokenizer, folder, inputs, tmp_path, length):
    texts = random_texts(rng, 60)
    write(inputs / "a.jsonl", texts)
    run(inputs, folder, tmp_path / "out", length=length)
    rows = PackedRows(tmp_path / "out")
    jax.tree.map(
        np.testing.assert_array_equal,
        rows.take(np.arange(len(rows))),
        pack(expected_documents(tokenizer, texts), length),
    )


def test_padding_of_real_text_is_under_one_percent_and_no_token_is_lost(tokenizer, folder, tmp_path):
    files = standard_library()
    config = BuildConfig(tuple(map(str, files)), folder, 4096, tmp_path / "out", workers=2, unit_megabytes=5)
    manifest = build(config, progress=Console(file=io.StringIO()))
    assert len(manifest.shards) >= 2
    assert manifest.padding < 0.01
    texts = [path.read_bytes() for path in files]
    ids = tokenizer.encode_batch([text for text in texts if text.strip()], parse_special=False)
    assert manifest.tokens == sum(len(document) + 1 for document in ids)


def test_a_line_belongs_to_the_unit_it_begins_in(rng, tokenizer, folder, inputs, tmp_path):
    # Every size of unit puts the cuts elsewhere, also exactly between lines; blank lines and a missing last newline.
    texts = random_texts(rng, 12, words=4)
    path = write(inputs / "a.jsonl", texts)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n", 3).removesuffix(b"\n"))
    size = path.stat().st_size
    for unit in [*range(1, 40), size - 1, size, size + 1]:
        run(inputs, folder, tmp_path / f"out{unit}", unit_megabytes=unit / 1e6)
        assert documents_on_disk(tmp_path / f"out{unit}") == expected_documents(tokenizer, texts)


def test_one_gets_the_same_bytes_from_any_number_of_workers(rng, folder, inputs, tmp_path):
    for i in range(6):
        write(inputs / f"{i}.jsonl", random_texts(rng, 80))
    (inputs / "bad.jsonl").write_bytes(b"not json\n")
    for workers in (1, 2, 3):
        run(inputs, folder, tmp_path / f"out{workers}", unit_megabytes=0.01, workers=workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out3")
    assert set(contents(tmp_path / "out1")) >= {"manifest.json", "quarantine.jsonl", "shard-00000.tokens"}


_BUILD = """
import sys
from pathlib import Path
from train.data.build import BuildConfig, build
if __name__ == "__main__":
    inputs, tokenizer, output = map(Path, sys.argv[1:4])
    options = {"domain": "d", "unit_megabytes": 0.1, "workers": int(sys.argv[4])}
    build(BuildConfig((str(inputs),), tokenizer, 37, output, **options))
"""


def process(inputs: Path, tokenizer: Path, output: Path, workers: int, **options) -> subprocess.Popen:
    arguments = [sys.executable, "-c", _BUILD, str(inputs), str(tokenizer), str(output), str(workers)]
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.draw(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_builds_go_on_to_the_same_bytes_and_leave_no_process(rng, folder, inputs, tmp_path, workers):
    write(inputs / "a.jsonl", random_texts(rng, 20_000))
    run(inputs, folder, tmp_path / "whole", unit_megabytes=0.1)
    output = tmp_path / "out"
    units = len(json.loads((tmp_path / "whole" / "manifest.json").read_text())["shards"])
    kept = 0
    for _ in range(3):
        builder = process(inputs, folder, output, workers)
        goal = min(kept + int(rng.integers(1, 4)), units - 3)
        while len(done := list(output.glob("units/[0-9]*.json"))) < goal and builder.poll() is None:
            time.sleep(0.002)
        children = psutil.Process(builder.pid).children(recursive=True)
        builder.send_signal(signal.SIGKILL)
        said = builder.communicate()[1]
        assert f"resuming: {kept} of {units} units" in said if kept else "resuming" not in said
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        assert not (output / "manifest.json").exists(), "it was killed too late to test anything"
        kept = len([path for path in output.glob("units/[0-9]*.json") if "bad" not in path.name])
        assert kept >= len(done)
    before = {path: path.stat().st_mtime_ns for path in output.glob("units/[0-9]*.json")}
    shards = {path: path.stat().st_mtime_ns for path in output.glob("shard-*") if path.stem[6:] in str(before)}
    assert process(inputs, folder, output, workers).wait() == 0
    assert contents(output) == contents(tmp_path / "whole")
    # What was finished is kept, not done again.
    assert shards
    assert all(path.stat().st_mtime_ns == modified for path, modified in shards.items())


def test_sigterm_ends_the_workers(rng, folder, inputs, tmp_path):
    write(inputs / "a.jsonl", random_texts(rng, 40_000))
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n" + _BUILD
    arguments = [sys.executable, "-c", code, str(inputs), str(folder), str(tmp_path / "o"), "2"]
    builder = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "o").glob("units/0*.json")):
        time.sleep(0.002)
    children = psutil.Process(builder.pid).children(recursive=True)
    builder.terminate()
    assert builder.wait(timeout=60) == 143
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert not list((tmp_path / "o").rglob(".*.tmp"))


def test_a_killed_worker_is_an_error_that_keeps_what_is_finished(rng, folder, inputs, tmp_path):
    write(inputs / "a.jsonl", random_texts(rng, 40_000))
    builder = process(inputs, folder, tmp_path / "out", 2)
    while not list((tmp_path / "out").glob("units/0*.json")):
        time.sleep(0.002)
    spawned = [c for c in psutil.Process(builder.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    spawned[0].kill()
    assert "most likely because memory ran out" in builder.communicate()[1]
    assert builder.returncode
    assert process(inputs, folder, tmp_path / "out", 2).wait() == 0


# --- running it again ---


def test_a_finished_data_set_is_left_alone_and_other_settings_are_refused(rng, folder, inputs, tmp_path):
    write(inputs / "a.jsonl", random_texts(rng, 30))
    output = tmp_path / "out"
    first = run(inputs, folder, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert run(inputs, folder, output, workers=2, max_bad=0.5) == first
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (output / "units").mkdir()  # As a process leaves it that is killed after its last write.
    assert run(inputs, folder, output) == first
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    for name, value in (("length", 38), ("field", "body"), ("domain", "e"), ("max_document_megabytes", 1.0)):
        with pytest.raises(InputError, match=rf"other settings: {name[:12]}\w* was .* and is now"):
            run(inputs, folder, output, **{name: value})
    write(inputs / "b.jsonl", ["new"])
    with pytest.raises(InputError, match=r"built from other files: .*b.jsonl is new"):
        run(inputs, folder, output)
    (inputs / "b.jsonl").rename(inputs / "a.jsonl")
    with pytest.raises(InputError, match=r"a.jsonl has another size"):
        run(inputs, folder, output)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_an_interrupted_build_refuses_other_settings_and_does_changed_input_again(rng, folder, inputs, tmp_path):
    for i in range(4):
        write(inputs / f"{i}.jsonl", random_texts(rng, 20))
    good = (inputs / "3.jsonl").read_bytes()
    (inputs / "3.jsonl").write_bytes(b"no\n" * 30)
    output = tmp_path / "out"
    with pytest.raises(InputError, match="in a row are bad"):
        run(inputs, folder, output, unit_megabytes=0.001)
    assert not (output / "manifest.json").exists()
    with pytest.raises(InputError, match="length was 37 and is now 99"):
        run(inputs, folder, output, unit_megabytes=0.001, length=99)
    with pytest.raises(InputError, match="no finished data set"):
        PackedRows(output)
    (inputs / "3.jsonl").write_bytes(good)
    write(inputs / "0.jsonl", random_texts(rng, 2))  # Fewer units than before.
    run(inputs, folder, output, unit_megabytes=0.001)
    run(inputs, folder, tmp_path / "fresh", unit_megabytes=0.001)
    assert contents(output) == contents(tmp_path / "fresh")


def test_units_of_another_version_are_done_again(rng, folder, inputs, tmp_path, monkeypatch):
    """Which lines belong to a piece may have changed: a build that was begun before is not mixed."""
    for i in range(3):
        write(inputs / f"{i}.jsonl", random_texts(rng, 20))
    good = (inputs / "2.jsonl").read_bytes()
    (inputs / "2.jsonl").write_bytes(b"no\n" * 30)
    monkeypatch.setattr(builder, "UNIT_VERSION", builder.UNIT_VERSION - 1)
    with pytest.raises(InputError, match="in a row are bad"):
        run(inputs, folder, tmp_path / "out", unit_megabytes=0.001)
    old = sorted((tmp_path / "out" / "units").glob("0*.json"))
    assert old
    keys = [json.loads(path.read_bytes())["key"] for path in old]
    monkeypatch.undo()
    with pytest.raises(InputError, match="in a row are bad"):
        run(inputs, folder, tmp_path / "out", unit_megabytes=0.001)
    assert not {json.loads(path.read_bytes())["key"] for path in old} & set(keys)
    (inputs / "2.jsonl").write_bytes(good)
    run(inputs, folder, tmp_path / "out", unit_megabytes=0.001)
    run(inputs, folder, tmp_path / "fresh", unit_megabytes=0.001)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_frames_are_units_and_no_line_is_lost(rng, tokenizer, folder, inputs, tmp_path):
    """A Zstandard file is cut where frames begin, in the middle of lines: each document once, in order."""
    texts = random_texts(rng, 200)
    content = jsonl(texts)
    frames = frames_of(content, rng, 9)
    (inputs / "a.jsonl.zst").write_bytes(b"".join(frames))
    units = share_out(find_sources([inputs / "a.jsonl.zst"], "auto", "text"), 300)
    manifest = run(inputs, folder, tmp_path / "out", unit_megabytes=0.0003)
    assert len(manifest.shards) <= len(units)
    expected = expected_documents(tokenizer, texts)
    assert documents_on_disk(tmp_path / "out") == expected


def test_two_builders_do_not_share_a_folder(rng, folder, inputs, tmp_path):
    write(inputs / "a.jsonl", random_texts(rng, 20_000))
    builder = process(inputs, folder, tmp_path / "out", 1)
    while not (tmp_path / "out" / "units").exists():
        time.sleep(0.002)
    with pytest.raises(InputError, match="is in use by another run"):
        run(inputs, folder, tmp_path / "out", unit_megabytes=0.1)
    assert builder.wait() == 0
    builder.communicate()


def test_a_folder_of_something_else_is_refused(rng, folder, inputs, tmp_path):
    write(inputs / "a.jsonl", ["text"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no data set"):
        run(inputs, folder, tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        run(inputs, folder, inputs / "a.jsonl")
    with pytest.raises(InputError, match="is in the output folder"):
        run(inputs, folder, inputs)
    assert contents(tmp_path / "out") == {"thesis.tex": b"precious"}


_NO_ROOM = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
"""


def test_a_full_disk_is_an_error_and_what_is_finished_is_kept(rng, folder, inputs, tmp_path):
    # A limit on the size of files stands for the full disk: the write fails in the same place, with another errno.
    write(inputs / "a.jsonl", random_texts(rng, 1500))  # More than one unit.
    write(inputs / "b.jsonl.gz", random_texts(rng, 5000))
    arguments = [sys.executable, "-c", _NO_ROOM + _BUILD, str(inputs), str(folder), str(tmp_path / "out"), "1"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert "InputError: Cannot write" in done.stderr
    assert "run the same command again" in done.stderr
    files = contents(tmp_path / "out")
    assert "units/00001.json" in files
    assert not [name for name in files if name.endswith(".tmp")]
    assert process(inputs, folder, tmp_path / "out", 1).wait() == 0
    run(inputs, folder, tmp_path / "fresh", unit_megabytes=0.1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


# --- a damaged data set ---


def test_a_damaged_shard_is_found(rng, folder, inputs, tmp_path):
    write(inputs / "a.jsonl", random_texts(rng, 30))
    run(inputs, folder, tmp_path / "out")
    for name in ("shard-00000.tokens", "shard-00000.starts"):
        path = tmp_path / "out" / name
        content = path.read_bytes()
        changed = bytearray(content)
        changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        PackedRows(tmp_path / "out")  # Sizes alone do not tell.
        with pytest.raises(InputError, match=f"{name} is not what was built: its sha256"):
            PackedRows(tmp_path / "out", verify=True)
        path.write_bytes(content[:-1])
        with pytest.raises(InputError, match=f"{name} has {len(content) - 1} bytes, expected {len(content)}"):
            PackedRows(tmp_path / "out")
        path.write_bytes(b"")
        with pytest.raises(InputError, match="has 0 bytes"):
            run(inputs, folder, tmp_path / "out")
        path.unlink()
        with pytest.raises(InputError, match=f"Cannot read .*{name}: No such file"):
            PackedRows(tmp_path / "out")
        path.write_bytes(content)
    PackedRows(tmp_path / "out", verify=True)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_shard_that_goes_away_during_training_is_named(rng, folder, inputs, tmp_path, threads):
    write(inputs / "a.jsonl", random_texts(rng, 30))
    run(inputs, folder, tmp_path / "out")
    mixture = Mixture([MixtureStage(3, 2, 37, {"d": 1})], {"d": PackedRows(tmp_path / "out")}, 0)
    (tmp_path / "out" / "shard-00000.starts").write_bytes(b"")
    with pytest.raises(InputError, match=r"Cannot read .*shard-00000, which was intact"):
        next(iter(mixture.loader(threads=threads)))


def test_a_damaged_manifest_is_found(rng, folder, inputs, tmp_path):
    write(inputs / "a.jsonl", random_texts(rng, 30))
    run(inputs, folder, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    whole = path.read_text()
    value = json.loads(whole)
    for content, match in (
        (whole[:-20], "is damaged"),
        ("[]", "not the manifest"),
        (json.dumps({**value, "version": 2}), "version 2, expected 1"),
        (json.dumps({**value, "length": 38}), "fingerprint does not match"),
        (json.dumps({key: value[key] for key in value if key != "rows"}), "is damaged"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=match):
            PackedRows(tmp_path / "out")
    with pytest.raises(InputError, match="no finished data set"):
        PackedRows(tmp_path / "nothing")


# --- options and progress ---


def test_impossible_options_are_refused(folder, tmp_path):
    good = BuildConfig(("x",), folder, 8, tmp_path)
    for change in (
        {"input": ()},
        {"length": 1},
        {"workers": 0},
        {"max_bad": 1.5},
        {"max_bad_lines": -1},
        {"unit_megabytes": 0.0},
        {"max_document_megabytes": float("inf")},
    ):
        with pytest.raises(InputError):
            dataclasses.replace(good, **change)
    assert good.unit_bytes == 128_000_000
    assert dataclasses.replace(good, length=2**18).unit_bytes == 2**28


def test_progress_is_a_bar_on_a_terminal_and_few_lines_elsewhere(rng, folder, inputs, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    write(inputs / "a.jsonl", random_texts(rng, 3000))
    for terminal in (True, False):
        file = io.StringIO()
        config = BuildConfig((str(inputs),), folder, 37, tmp_path / f"out{terminal}", workers=1, unit_megabytes=0.005)
        build(config, progress=Console(file=file, force_terminal=terminal, width=100))
        if terminal:
            assert "building" in file.getvalue()
            assert "\x1b[" in file.getvalue()
        else:
            assert "\x1b" not in file.getvalue()
            assert 5 <= len(file.getvalue().splitlines()) <= 21


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_progress_counts_what_is_tokenized(rng, folder, inputs, tmp_path, monkeypatch, suffix):
    """With a tokenizer of 1 MB of input in a second, no speed is far from 1 MB/s, the first one included."""
    now = [0.0]
    texts = [rng.bytes(5000).hex() for _ in range(1000)]
    path = write(inputs / f"a.{suffix}", texts)
    kind = type(load_tokenizer(folder))

    def slow(self, batch, **options):
        now[0] += sum(map(len, batch)) / sum(map(len, texts)) * path.stat().st_size / 1e6
        return [[1]] * len(batch)

    monkeypatch.setattr("train.data.progress.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(kind, "encode_batch", slow)
    out = io.StringIO()
    build(BuildConfig((str(inputs),), folder, 37, tmp_path / "out", workers=1), progress=Console(file=out, width=200))
    speeds = [float(line.split(" MB/s")[0].split()[-1]) for line in out.getvalue().splitlines()]
    assert len(speeds) >= 5
    # What is read ahead counts too early.
    assert all(0.8 <= speed <= 1.3 for speed in speeds), speeds


def test_workers_do_not_import_jax():
    code = "import sys, train.data.build; assert 'jax' not in sys.modules and 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ})


def test_command_builds_and_says_what_it_made(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one object of `--json` agrees with the folder, also when the same command is run again."""
    write(tmp_path / "web.jsonl", random_texts(np.random.default_rng(0), 30))
    command = ["data", "build", "--input", f"{tmp_path}/*.jsonl", "--tokenizer", str(folder)]
    command += ["--length", "32", "--output", f"{tmp_path}/out", "--domain", "web", "--workers", "1"]
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        manifest = load_manifest(tmp_path / "out")
        assert (said["domain"], said["documents"], said["length"]) == ("web", 30, 32)
        assert (said["tokens"], said["rows"], said["fingerprint"]) == (
            manifest.tokens,
            manifest.rows,
            manifest.fingerprint,
        )
    assert main([*command[:2], "--input", f"{tmp_path}/none*", *command[4:]]) == 1
    assert "none*" in capsys.readouterr().err


def test_command_says_what_was_left_out_and_where(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its last line, when it builds and when it finds the data set finished."""
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\nbad\n{"text": ""}\n{"other": 1}\n{"text": "two"}\n')
    command = ["data", "build", "--input", f"{tmp_path}/a.jsonl", "--tokenizer", str(folder), "--length", "32"]
    for _ in range(2):
        assert main([*command, "--output", f"{tmp_path}/out", "--workers", "1"]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert "of 2 documents" in last
        assert f"; left out: 2 bad records (see {tmp_path}/out/quarantine.jsonl) and 1 empty document" in last
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 2
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n')
    assert main([*command, "--output", f"{tmp_path}/whole", "--workers", "1"]) == 0
    assert "left out" not in capsys.readouterr().out
