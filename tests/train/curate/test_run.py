"""A curation: the same bytes whatever happens, nothing done twice, nothing lost."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.train.curate.curations import Lose, Repair, Repeat, Words, curation, documents, made, make_input
from train.curate.curation import Curation, Input, Map, Output, Select
from train.curate.engine import Engine
from train.curate.operators.decontaminate import Decontaminate
from train.curate.operators.language import Language
from train.curate.run import RunOptions, run
from train.curate.shards import VERSION
from train.files import HashedFile

ROOT = Path(__file__).parents[3]
ONE = RunOptions(workers=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_input(tmp_path_factory.mktemp("input"), print_seed())


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(curation(source), folder, ONE)["finished"]
    return folder


def process(*arguments: object, log: Path | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"CURATE_LOG": str(log)} if log else {})}
    command = [sys.executable, "-m", "tests.train.curate.curations", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def lines(folder: Path) -> list[dict[str, object]]:
    """All documents that a run has written."""
    found = []
    for path in sorted(folder.glob("output/*/*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            found += [json.loads(line) for line in file]
    return found


def test_a_run_that_is_killed_goes_on(source: Path, whole: Path, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Killed at random moments and started again, with one or two workers, it makes the same bytes as
    without, and counts few words twice."""
    rng, log, kills = print_seed(), tmp_path / "log", 10 if pytestconfig.getoption("--all-cases") else 3
    killed = 0
    while True:
        started = process(source, tmp_path / "run", rng.integers(1, 3), "native", log=log)
        if killed < kills:
            # The clock starts when there is a folder: before it only modules are read.
            while started.poll() is None and not (tmp_path / "run" / "lock.json").exists():
                time.sleep(0.002)
            time.sleep(float(rng.random()) * 1.5)
            # Also asked to end: it finishes the shards that are being done.
            started.send_signal(sent := (signal.SIGTERM, signal.SIGKILL)[int(rng.integers(2))])
        status = started.wait()
        if status == 0:
            break
        assert status == -sent
        killed += 1
    assert made(tmp_path / "run") == made(whole)
    documents = json.loads((tmp_path / "run/summary.json").read_text())["stages"][0]["out"]
    # A shard that was being done when the process was killed, in each worker, and no other.
    assert sum(map(int, log.read_text().split())) <= documents + killed * 2 * 150


def test_counts_add_up(whole: Path, source: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["ids", "features", "select", "lengths"]
    came = sum(one["documents"] for one in summary["inputs"].values())
    assert came == 600
    for stage in summary["stages"]:
        assert stage["in"] == came
        came = stage["out"]
        assert stage["in"] - stage["out"] == sum(stage["removed"].values())
    assert summary["stages"][0]["removed"]["the id of an earlier document"] in range(1, 6)
    written = lines(whole)
    assert len({line["id"] for line in written}) == came == sum(o["documents"] for o in summary["output"].values())
    assert len(written) == sum(1 + (line["words"] > 20) for line in {line["id"]: line for line in written}.values())
    page = (whole / "report.html").read_text()
    assert all(html.escape(reason) in page for stage in summary["stages"] for reason in stage["removed"])
    assert sum(summary["lengths"]["written"].values()) == len(written)


def test_documents_that_vanish_have_a_reason(tmp_path: Path) -> None:
    """A null text without a reason, zero repetitions and a page without text are counted, named and shown: what comes
    in is what is written and what has a reason."""
    rng = print_seed()
    texts = [*documents(rng, 60, 8), "mat", "the mat", "cat sat the", "cat sat"]
    rows = [{"text": text} for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"page": "<p>text"}))
    inputs = [Input("web", str(tmp_path / "a.jsonl")), Input("pages", str(tmp_path / "b.jsonl"), html="page")]
    summary = run(Curation(inputs[:1], [Map("lose", [Lose(), Repeat()])]), tmp_path / "run", ONE)
    lost = [text for text in texts if "mat" in text]
    own = [text for text in lost if text.startswith("mat")]
    kept = [text for text in texts if "mat" not in text]
    never = [text for text in kept if len(text.split()) % 3 == 0]
    (stage,), writing = summary["stages"], summary["writing"]
    assert stage["removed"] == {"null text": len(lost) - len(own), "its own": len(own)}
    assert writing["removed"] == {"repeated 0 times": len(never)}
    assert (stage["in"], stage["out"], writing["in"], writing["out"]) == (
        len(texts),
        len(kept),
        len(kept),
        len(kept) - len(never),
    )
    assert {one["text"] for one in writing["samples"]["repeated 0 times"]} <= set(never)
    written = Counter(str(line["text"]) for line in lines(tmp_path / "run"))
    assert written == Counter(text for text in kept for _ in range(len(text.split()) % 3))
    assert summary["output"]["web"]["documents"] == writing["out"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"repeated 0 times: {len(never):,}" in page
    assert f"null text: {len(lost) - len(own):,}" in page
    pages = run(Curation(inputs[1:]), tmp_path / "pages", ONE)
    assert pages["writing"]["removed"] == {"no text": 1}


def test_what_is_kept_is_what_the_operators_say(whole: Path, source: Path) -> None:
    """Each document by itself, without shards, sidecars or engine."""
    rows = [json.loads(line) for name in "ab" for line in (source / "web" / f"{name}.jsonl").open()]
    seen, expected = set(), {}
    for row in rows:
        if row["key"] not in seen:
            expected[row["key"]] = row["text"]
        seen.add(row["key"])
    for i, text in enumerate(pq.read_table(source / "books" / "c.parquet")["text"].to_pylist()):
        expected[f"c.parquet:row {i}"] = text
    kept, lengths = [], set()
    for key, text in expected.items():
        words = len(text.split())
        if text.startswith("cat") or not 5 <= words < 75 or (words <= 20 and words in lengths):
            continue
        lengths.add(words)
        kept.append((key, text.replace("dog ", "hound ")))
    found = {line["source"] if line["domain"] == "books" else line["id"]: line["text"] for line in lines(whole)}
    assert found == dict(kept)


def test_a_threshold_runs_only_what_reads_it(source: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(curation(source), folder, ONE)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    # Nothing has changed: nothing is written.
    run(curation(source), folder, ONE)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before
    # A threshold: selection, and what is skipped by it.
    run(curation(source, least=9), folder, ONE)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert {path.parent.name for path in after if after[path] != before[path]} == {"select", "lengths"}
    run(curation(source, least=9), tmp_path / "other", ONE)
    assert made(folder) == made(tmp_path / "other")
    run(curation(source), folder, ONE)
    assert made(folder) == made(whole)


def test_what_a_stage_has_found_is_that_of_its_own_documents(source: Path, tmp_path: Path) -> None:
    """Killed before a stage over the whole corpus has its manifest, a run does not tell what was found earlier."""
    manifest, found = tmp_path / "lengths" / "manifest.json", []
    for least in (5, 40):
        before = manifest.read_bytes() if manifest.exists() else b""
        found.append(run(curation(source, least=least), tmp_path, ONE)["stages"][-1]["found"])
    manifest.write_bytes(before)
    assert found[0] != found[1] == run(curation(source, least=40), tmp_path, ONE)["stages"][-1]["found"]


def test_a_file_that_is_new_leaves_other_inputs_alone(source: Path, tmp_path: Path) -> None:
    rng, folder, own = print_seed(), tmp_path / "run", make_input(tmp_path / "input", print_seed(), 60)
    run(curation(own), folder, ONE)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("features/*.parquet")}
    (own / "web" / "z.jsonl").write_text(
        "\n".join(json.dumps({"key": f"z{i}", "text": t}) for i, t in enumerate(documents(rng, 200)))
    )
    run(curation(own), folder, ONE)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("features/*.parquet")}
    assert all(after[path] == before[path] for path in before if path.name.startswith("books"))
    (own / "web" / "z.jsonl").unlink()
    run(curation(own), folder, ONE)
    run(curation(own), tmp_path / "fresh", ONE)
    assert made(folder) == made(tmp_path / "fresh")


def test_a_job_that_fails_is_named_and_the_others_are_kept(source: Path, tmp_path: Path) -> None:
    texts = pq.read_table(source / "books" / "c.parquet")["text"].to_pylist()
    text = next(text for text in texts[200:] if texts.count(text) == 1)
    broken = Curation(
        [Input("books", str(source / "books"))], [Map("features", [Words(fail_on=text)])], shard_megabytes=0.01
    )
    with pytest.raises(InputError, match=r"features, books-\d{5}-000: (?s:.*)ZeroDivisionError: cannot count"):
        run(broken, tmp_path, ONE)
    shards, done = (len(list((tmp_path / name).glob("*.parquet"))) for name in ("documents", "features"))
    assert done == shards - 1
    assert "ZeroDivisionError" in (tmp_path / "report.html").read_text()


def test_a_worker_that_dies_loses_nothing(source: Path, tmp_path: Path) -> None:
    texts = pq.read_table(source / "books" / "c.parquet")["text"].to_pylist()
    text = next(text for text in texts[200:] if texts.count(text) == 1)
    books = [Input("books", str(source / "books"))]
    run(Curation(books, shard_megabytes=0.01), tmp_path, ONE)
    with pytest.raises(InputError, match=r"A worker of features has ended.*run the same command again"):
        run(
            Curation(books, [Map("features", [Words(die_on=text)])], shard_megabytes=0.01),
            tmp_path,
            RunOptions(workers=2),
        )
    mended = Curation(books, [Map("features", [Words()])], shard_megabytes=0.01)
    assert run(mended, tmp_path, ONE)["finished"]


def test_a_full_disk_says_so(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: HashedFile, data: bytes) -> int:
        raise OSError(28, os.strerror(28), "x")

    run(Curation([Input("books", str(source / "books"))]), tmp_path, ONE)
    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(InputError, match=r"No space left on device\. Make room and run the same command again"):
        run(Curation([Input("books", str(source / "books"))], [Map("features", [Words()])]), tmp_path, ONE)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(Curation([Input("books", str(source / "books"))], [Map("features", [Words()])]), tmp_path, ONE)[
        "finished"
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Select("words > 5")], "reads the column 'words', which nothing before it makes"),
        ([Map("a", [Words()]), Map("b", [Words()])], "makes the column 'words', which is of the stage a already"),
        ([Map("a", [Words()]), Map("a", [Repair()])], "Two stages have the name a"),
        ([Map("documents", [Words()])], "A stage's name"),
        ([Map("rows", [Words()])], "A stage's name"),
        ([Map("a", [Language("none.py:identify")])], "The stage a: cannot read none.py: No such file"),
        ([Map("a", [Decontaminate(("none.jsonl",))])], "The stage a: No such file or folder: none.jsonl"),
    ],
)
def test_a_curation_that_cannot_work_is_refused(stages: list[Map], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Curation([Input("web", "x")], stages)


@pytest.mark.parametrize("name", ["documents", "features", "output"])
def test_files_of_others_are_not_removed(source: Path, tmp_path: Path, name: str) -> None:
    """A folder that has the name of a stage by chance is left as it is."""
    other = tmp_path / "run" / name / "mine.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(InputError, match=f"{name} was not made by a curation"):
        run(curation(source), tmp_path / "run", ONE)
    assert other.read_text() == "mine"


def test_a_folder_of_another_version_is_refused(source: Path, whole: Path, tmp_path: Path) -> None:
    """Its records do not mean what they mean now: the error says what to do, and nothing is touched."""
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run").rglob("manifest.json"):
        path.write_text(path.read_text().replace(f'"version": {VERSION}', '"version": 1'))
    before = made(tmp_path / "run")
    with pytest.raises(
        InputError, match=r"has version 1 .*expected \d+: another version .* give another output folder"
    ):
        run(curation(source), tmp_path / "run", ONE)
    assert made(tmp_path / "run") == before


def test_two_runs_cannot_share_a_folder(source: Path, tmp_path: Path) -> None:
    from train.lock import lock

    with lock(tmp_path), pytest.raises(InputError, match="in use by another run"):
        run(curation(source), tmp_path, ONE)


def test_a_process_has_one_engine() -> None:
    Engine(workers=1)
    with pytest.raises(InputError, match="runs the engine native already"):
        Engine("ray")


def test_a_thousand_reasons_are_counted_as_a_hundred(tmp_path: Path) -> None:
    """Records without the field are counted by the names that they have; all are listed, but few are told apart."""
    records = [{"text": "good"}, *({f"field {number}": "x"} for number in range(1000))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Input("web", str(tmp_path / "a.jsonl"), max_bad=1)
    bad = run(Curation([source]), tmp_path / "run", ONE)["inputs"]["web"]["bad"]
    assert (len(bad), sum(bad.values()), bad["other reasons"]) == (101, 1000, 900)
    assert len((tmp_path / "run" / "bad.jsonl").read_text().splitlines()) == 1000


def test_an_output_of_too_many_folders_is_refused(source: Path, tmp_path: Path) -> None:
    many = Curation([Input("both", str(source))], [], Output(by="id"), shard_megabytes=100)
    with pytest.raises(InputError, match="more than 500 files: the column id, which divides the output, has too many"):
        run(many, tmp_path, ONE)


def test_output_as_parquet(source: Path, whole: Path, tmp_path: Path) -> None:
    run(curation(source, output=Output("parquet", ("words",))), tmp_path, ONE)
    found = [row for path in sorted(tmp_path.glob("output/*/*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert {(row["id"], row["text"], row["words"]) for row in found} == {
        (line["id"], line["text"], line["words"]) for line in lines(whole)
    }
