"""Corpora are scored shard by shard: nothing twice after a kill, the same bytes, and never for other documents."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from jax.sharding import Mesh

from qwen_jax.cli import main
from qwen_jax.cli.formats import CheckpointFormats
from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.scoring import OPTIONS, RATINGS, TOPIC, documents, make_instruct
from tests.train.curate import curations
from tests.train.curate.curations import Lose, Repair, Words
from train.curate.curation import Curation, Input, Map
from train.curate.run import RunOptions
from train.curate.run import run as curate
from train.curate.scoring import shards as corpus
from train.curate.scoring.distil import distil
from train.curate.scoring.job import MANIFEST, _share, score_corpus
from train.curate.scoring.model import NotFiniteError, Work
from train.curate.scoring.operators import ModelScores
from train.curate.scoring.scorers import VERSION, ModelScorer, Scorer
from train.curate.scoring.shards import aligned_scores, find_shards

LOST = "lost text"


class Counting(Scorer):
    """Scores a text by its length, counts how often it is asked, and fails when it is told to."""

    schema = pa.schema([pa.field("length", pa.float32())])

    def __init__(self, fail_after: int = 1 << 30, version: int = 1):
        self.settings = {"version": version}
        self.asked: list[str] = []
        self._fail_after = fail_after

    def score(self, texts: Sequence[str | None]) -> tuple[pa.Table, Work]:
        if len(self.asked) >= self._fail_after:
            raise KeyboardInterrupt
        self.asked += [text for text in texts if text]
        if any(text == "NaN" for text in texts):
            raise NotFiniteError([*texts].index("NaN"))
        values = [float(len(text)) if text else None for text in texts]
        work = Work(len([v for v in values if v]), values.count(None), tokens=7, padding=3)
        return pa.table({"length": pa.array(values, pa.float32())}), work


SHARDS = [f"s{number}-00000-000.parquet" for number in range(3)]


def make_run(folder: Path, rng: np.random.Generator) -> Path:
    """A curation with three shards of 20 documents, one text in each removed."""
    for shard in range(3):
        texts = [f"{text} {shard}-{i}" for i, text in enumerate(documents(rng, 20, 30))]
        texts[int(rng.integers(20))] = LOST
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder.parent / f"{folder.name}-{shard}.jsonl").write_text(lines)
    return curate_run(folder)


def curate_run(folder: Path) -> Path:
    inputs = [Input(f"s{shard}", str(folder.parent / f"{folder.name}-{shard}.jsonl")) for shard in range(3)]
    curate(Curation(inputs, [Map("lose", [Lose(LOST)])]), folder, RunOptions(workers=1))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", print_seed())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def test_a_run_of_raw_pages_is_refused(tmp_path: Path) -> None:
    """Its documents have no text, so that each score would be null."""
    (tmp_path / "a.jsonl").write_text('{"page": "<p>text"}\n' * 3)
    curate(Curation([Input("web", str(tmp_path / "a.jsonl"), html="page")]), tmp_path / "run", RunOptions(workers=1))
    with pytest.raises(InputError, match=r"None of the 3 documents .* raw pages"):
        find_shards([str(tmp_path / "run")])


def test_a_run_is_scored_on_what_its_stages_have_made_and_kept(tmp_path: Path) -> None:
    """The texts are those of the output, in the order of documents; what a stage has removed has no score. A run that
    is not finished is refused."""
    rng = print_seed()
    made = curations.curation(curations.make_input(tmp_path / "input", rng, 60))
    folder, out, scorer = tmp_path / "run", tmp_path / "out", Counting()
    curate(made, folder, RunOptions(workers=1))
    score_corpus(scorer, find_shards([str(folder)]), out)
    written = {}
    for path in folder.glob("output/*/*.zst"):
        with zstandard.open(path, "rt", encoding="utf-8") as file:
            written |= {line["id"]: line["text"] for line in map(json.loads, file)}
    assert sorted(scorer.asked) == sorted(written.values())
    found = {}
    for path in sorted((folder / "documents").glob("*.parquet")):
        ids = pq.read_table(path)["id"].to_pylist()
        lengths = aligned_scores(out / path.name, path)["length"].to_pylist()
        found |= {id: length for id, length in zip(ids, lengths, strict=True) if length is not None}
    assert found == {id: len(text) for id, text in written.items()}
    # Another selection has other texts.
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(InputError, match="is not finished"):
        find_shards([str(folder)])
    (tmp_path / "manifest.json").rename(folder / "manifest.json")
    failing = dataclasses.replace(
        made, stages=[Map("features", [Repair(), Words(fail_on=next(iter(written.values())))])]
    )
    with pytest.raises(InputError, match="cannot count"):
        curate(failing, folder, RunOptions(workers=1))
    with pytest.raises(InputError, match="is not finished"):
        find_shards([str(folder)])
    curate(dataclasses.replace(made, stages=made.stages[:1]), folder, RunOptions(workers=1))
    with pytest.raises(InputError, match="holds scores of other documents"):
        score_corpus(Counting(), find_shards([str(folder)]), out)


def test_a_killed_job_goes_on_with_the_next_shard(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a shard: only that shard's documents are scored again, and all bytes are the same."""
    monkeypatch.setattr(corpus, "_CHUNK_DOCUMENTS", 8)
    shards = find_shards([str(run)])
    whole = Counting()
    summary = score_corpus(whole, shards, tmp_path / "whole")
    assert len(whole.asked) == summary["documents"] == 57
    assert (summary["rows"], summary["empty"], summary["padding_share"]) == (60, 3, 0.3)
    killed, rest = Counting(fail_after=30), Counting()
    with pytest.raises(KeyboardInterrupt):
        score_corpus(killed, shards, tmp_path / "killed")
    assert list(content(tmp_path / "killed")) == SHARDS[:1]
    # A process that is killed leaves its file; the next one removes it.
    (tmp_path / "killed" / f".{SHARDS[1]}.99999.tmp").write_bytes(b"half")
    assert score_corpus(rest, shards, tmp_path / "killed")["shards_skipped"] == 1
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    twice = set(killed.asked) & set(rest.asked)
    assert 0 < len(twice) < 20
    assert all(" 1-" in text for text in twice)
    assert sorted({*killed.asked, *rest.asked}) == sorted(whole.asked)
    assert score_corpus(Counting(), shards, tmp_path / "killed")["documents"] == 0
    # Each row belongs to its document.
    for number, file in enumerate(sorted((run / "documents").glob("*.parquet"))):
        scores, texts = aligned_scores(tmp_path / "whole" / file.name, file), pq.read_table(file)["text"].to_pylist()
        assert scores["length"].to_pylist() == [None if text == LOST else len(text) for text in texts]
        keys = pq.read_table(tmp_path / "whole" / file.name)
        assert keys["row"].to_pylist() == list(range(20))
        assert set(keys["shard"].to_pylist()) == {number}


def test_scores_of_other_documents_or_settings_are_refused(run: Path, tmp_path: Path) -> None:
    shards, out = find_shards([str(run)]), tmp_path / "out"
    score_corpus(Counting(), shards, out)
    file = run / "documents" / SHARDS[1]
    with pytest.raises(InputError, match=r"000.parquet holds scores of other documents than .*row 0 is the first"):
        aligned_scores(out / SHARDS[0], file)
    with pytest.raises(InputError, match=r"scores.version was 1, is 2"):
        score_corpus(Counting(version=2), shards, out)
    with pytest.raises(InputError, match=r"scores.sample was 1.0, is 0.5"):
        score_corpus(Counting(), shards, out, sample=0.5)
    with pytest.raises(InputError, match="sample must be above 0"):
        score_corpus(Counting(), shards, out, sample=0)
    with pytest.raises(InputError, match="holds Parquet files of something else"):
        score_corpus(Counting(), shards, run / "documents")
    pq.write_table(pq.read_table(file).slice(0, 19), file)
    with pytest.raises(InputError, match=r"is not what manifest.json says"):
        find_shards([str(run)])
    with pytest.raises(InputError, match="20 and 19 of them, and row 19 is the first"):
        aligned_scores(out / SHARDS[1], file)
    file.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a Parquet file that can be read"):
        aligned_scores(out / SHARDS[1], file)


def test_scores_of_a_changed_text_of_the_same_length_are_refused(tmp_path: Path) -> None:
    """Ids and sizes stay: files are known by the times of their changes, shards of a curation by their hashes."""
    file, folder = tmp_path / "a.jsonl", tmp_path / "run"
    source = Curation([Input("web", str(file))])
    for number, text in enumerate(("one", "two")):
        file.write_text(json.dumps({"text": text}) + "\n")
        os.utime(file, (number, number))
        curate(source, folder, RunOptions(workers=1))
        for name, given in (("of-file", file), ("of-run", folder)):
            if number:
                with pytest.raises(InputError, match="holds scores of other documents or settings"):
                    score_corpus(Counting(), find_shards([str(given)]), tmp_path / name)
            else:
                assert score_corpus(Counting(), find_shards([str(given)]), tmp_path / name)["documents"] == 1
    # The same documents again, though their files are new ones.
    file.write_text(json.dumps({"text": "one"}) + "\n")
    shutil.rmtree(folder)
    curate(source, folder, RunOptions(workers=1))
    assert score_corpus(Counting(), find_shards([str(folder)]), tmp_path / "of-run")["shards_skipped"] == 1


def test_a_student_is_not_trained_on_scores_of_other_texts(tmp_path: Path) -> None:
    """The ids stay, the text of one document changes."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "one"}) + "\n")
    score_corpus(Counting(), find_shards([str(file)]), tmp_path / "scores")
    file.write_text(json.dumps({"text": "another"}) + "\n")
    with pytest.raises(InputError, match=r"other documents than the input: shards\.0\."):
        distil(find_shards([str(file)]), tmp_path / "scores")


def test_a_student_of_classes_is_refused(tmp_path: Path) -> None:
    """Names of classes are no numbers, whether they are asked for or nothing else is there."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    shards = find_shards([str(tmp_path / "a.jsonl")])
    score_corpus(Counting(), shards, tmp_path / "scores")
    file = tmp_path / "scores" / shards[0].name
    table = pq.read_table(file).drop_columns(["length"]).append_column("topic", pa.array(["news"]))
    pq.write_table(table.append_column("topic_probability", pa.array([0.5], pa.float32())), file)
    with pytest.raises(InputError, match=r"has classes alone, .*columns of topic_probability"):
        distil(shards, tmp_path / "scores")
    with pytest.raises(InputError, match=r"has no score topic\. Expected some of topic_probability"):
        distil(shards, tmp_path / "scores", columns=["topic"])


def test_a_document_without_a_finite_score_is_named(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "run-1.jsonl"
    lines = file.read_text().splitlines()
    lines[7] = '{"text": "NaN"}'
    file.write_text("\n".join(lines))
    curate_run(run)
    with pytest.raises(
        NotFiniteError, match=r"scores of document \w+ \(row 7 of s1-00000-000.parquet\) are not finite"
    ):
        score_corpus(Counting(), find_shards([str(run)]), tmp_path / "out")
    assert list(content(tmp_path / "out")) == SHARDS[:1]


def test_a_full_disk_loses_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard is computed to its end, for the other processes; what was finished stays, and no half file is left."""
    monkeypatch.setattr(corpus, "_CHUNK_DOCUMENTS", 8)
    written, write = 0, pq.ParquetWriter.write_table

    def fails(self: pq.ParquetWriter, table: pa.Table) -> None:
        nonlocal written
        written += 1
        if written == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, table)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fails)
    scorer, shards = Counting(), find_shards([str(run)])
    with pytest.raises(InputError, match=r"The disk of .*s1-00000-000\.parquet is full"):
        score_corpus(scorer, shards, tmp_path / "out")
    assert (list(content(tmp_path / "out")), len(scorer.asked)) == (SHARDS[:1], 38)
    assert not list((tmp_path / "out").glob(".*"))
    score_corpus(Counting(), shards, tmp_path / "out")
    assert len(content(tmp_path / "out")) == 3


def test_a_sample_is_chosen_by_ids(run: Path, tmp_path: Path) -> None:
    scorer = Counting()
    summary = score_corpus(scorer, find_shards([str(run)]), tmp_path / "out", sample=0.5)
    tables = [pq.read_table(run / "documents" / name, columns=["id", "text"]).to_pylist() for name in SHARDS]
    chosen = [row["text"] for table in tables for row in table if _share(row["id"]) < 0.5 and row["text"] != LOST]
    assert scorer.asked == chosen
    assert summary["documents"] == len(chosen)
    again = Counting()
    score_corpus(again, find_shards([str(run)]), tmp_path / "again", sample=0.5)
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_a_model_scores_a_run_as_the_operator_does(run: Path, tmp_path: Path, mesh: Mesh) -> None:
    """The operator survives pickling, gives the columns that it says, and the same numbers in any batch."""
    make_instruct(tmp_path / "model", int(print_seed().integers(1 << 16)))
    questions = (*RATINGS, TOPIC)
    operator = ModelScores(str(tmp_path / "model"), questions, CheckpointFormats(), options=OPTIONS)
    # A new version of the scorer is another operator.
    assert VERSION in operator.settings()["version"][1:]
    assert json.dumps(dict(operator.settings())) == json.dumps(dict(pickle.loads(pickle.dumps(operator)).settings()))
    file = run / "documents" / SHARDS[2]
    table = pq.read_table(file)
    texts = table.filter(pa.compute.not_equal(table["text"], LOST)).select(["text"])
    compute = operator.start()
    scores = compute(texts)
    assert scores.schema == operator.makes
    assert set(scores["topic"].to_pylist()) <= {"code", "news", "other"}
    parts = pa.concat_tables([compute(texts.slice(0, 5)), compute(texts.slice(5))])
    for name in ("good", "clear", "topic_probability"):
        np.testing.assert_allclose(parts[name], scores[name], atol=1.01e-3)
    scorer = ModelScorer(str(tmp_path / "model"), questions, CheckpointFormats(), mesh, OPTIONS)
    out = tmp_path / "out"
    summary = score_corpus(scorer, find_shards([str(run)]), out)
    assert 0 < summary["answer_mass"] < 1
    assert 0 < summary["padding_share"] < 0.5
    found = aligned_scores(out / file.name, file)
    np.testing.assert_allclose(found["good"].drop_null(), scores["good"], atol=1.01e-3)
    # Another model is another setting.
    make_instruct(tmp_path / "other", 7)
    other = dataclasses.replace(operator, model=str(tmp_path / "other"))
    assert other.settings() != operator.settings()


def test_the_commands_score_distil_and_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files with bad records; a reward model by default gives its reward; a student scores what it has not seen."""
    from tests.helpers.scoring import make_reward

    make_reward(tmp_path / "model", int(print_seed().integers(1 << 16)))
    texts = documents(print_seed(), 60, 20)
    lines = [json.dumps({"text": text}) for text in texts]
    lines[3:3] = ["{", '{"other": 1}', '{"text": ""}']
    file, out, student = tmp_path / "in.jsonl", tmp_path / "out", tmp_path / "student"
    file.write_text("\n".join(lines))

    def call(*argv: str) -> dict[str, object]:
        capsys.readouterr()
        assert main(["data", *argv, "--json"]) == 0, capsys.readouterr().err
        found: dict[str, object] = json.loads(capsys.readouterr().out)
        return found

    sizes = ["--max-tokens", "64", "--row-tokens", "256", "--batch-tokens", "256"]
    score = ["score", "--input", str(file), "--output", str(out)]
    summary = call(*score, "--model", str(tmp_path / "model"), *sizes)
    assert (summary["documents"], summary["empty"], summary["bad_records"]) == (60, 3, 2)
    table = pq.read_table(out / "00000.parquet")
    assert table["reward"].is_null().to_pylist() == [3 <= i < 6 for i in range(63)]
    assert table["id"][4].as_py() == f"{file}, line 5"
    assert json.loads((out / MANIFEST).read_text())["columns"] == {"reward": "float"}
    found = call("distil", "--input", str(file), "--scores", str(out), "--output", str(student), "--epochs", "1")
    assert found["trained"] + found["held_out"] == 60  # type: ignore[operator]
    shutil.rmtree(out)
    call(*score, "--model", str(student))
    assert pq.read_table(out / "00000.parquet")["reward"].null_count == 3
    for argv, message in (
        ([*score, "--model", str(student), "--rubric", "clarity"], "is a student"),
        ([*score, "--model", str(tmp_path / "model"), "--rubric", "clarity"], "This is a reward model"),
        ([*score, "--model", str(tmp_path / "model"), "--rubric", "taste"], "There is no question 'taste'"),
        (["distil", "--input", str(file), "--scores", str(out), "--output", str(student)], "exists already"),
        (["distil", "--input", str(file), "--scores", str(tmp_path), "--output", "x"], "settings.json does not exist"),
    ):
        assert main(["data", *argv]) == 1
        assert message in capsys.readouterr().err
