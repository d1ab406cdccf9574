"""`qwen-jax data curate`."""

import json
import textwrap
from pathlib import Path

import pytest

from qwen_jax import cli
from qwen_jax.cli.curate import Options
from tests.helpers.runs import print_seed
from tests.train.curate.curations import make_input
from train.data.documents import find_sources, read_records, share_out
from train.data.text import find_files

CURATION = '''
import dataclasses

import pyarrow as pa

from train.curate.curation import Curation, Input, Map, Select
from train.curate.operator import Operator


@dataclasses.dataclass(frozen=True)
class Words(Operator):
    makes = pa.schema([pa.field("words", pa.int32())])

    def start(self):
        return lambda table: pa.table({"words": [len(t.split()) for t in table["text"].to_pylist()]}, self.makes)


def curation(books: str, least: int = 50) -> Curation:
    """Long books.

    Args:
      books: files.
      least: words of a document.
    """
    return Curation([Input("books", books)], [Map("features", [Words()]), Select(f"words >= {least}")])


def other() -> str:
    return "x"


def fails() -> Curation:
    return Curation([Input("books", {}["no such key"])])
'''


def test_a_curation_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function's arguments are options, its operators reach workers, and `data build` reads the output."""
    file = tmp_path / "my_curation.py"
    file.write_text(CURATION)
    source = make_input(tmp_path / "input", print_seed(), 100) / "books"
    # No package of this name in the working directory is taken for ours.
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    command = ["data", "curate", "--config", str(file), "--books", str(source), "--output", str(tmp_path / "run")]
    assert cli.main([*command, "--least", "40", "--workers", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["finished"]
    assert summary["stages"][1]["removed"] == {"not (words >= 40)": 100 - summary["output"]["books"]["documents"]}
    texts = [
        record.text
        for unit in share_out(find_sources(find_files([tmp_path / "run" / "output"]), "auto", "text"), 10**6)
        for piece in unit
        for record in read_records(piece, "text", 10**6)
    ]
    assert len(texts) == summary["output"]["books"]["written"]
    assert all(len(text.split()) >= 40 for text in texts)
    # Again, in words, with more kept.
    assert cli.main([*command, "--least", "10"]) == 0
    captured = capsys.readouterr()
    assert "select is run again: condition has changed" in captured.err
    assert "features: 1 of 1 shards are finished already" in captured.err
    assert "report.html" in captured.out
    assert "bad.jsonl" not in captured.out


def test_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_curation.py").write_text(CURATION)
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n' * 9 + "no\n")
    for name in "bcde":
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1 and no more")
    command = ["data", "curate", "--config", str(tmp_path / "my_curation.py"), "--least", "1", "--workers", "1"]
    assert cli.main([*command, "--books", str(tmp_path / "?.[jp]*"), "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "    1 unusable: not JSON" in said
    assert "    4 damaged files: b.parquet, c.parquet, d.parquet, ..." in said
    assert f"    all are listed in {tmp_path / 'run' / 'bad.jsonl'}" in said
    assert len((tmp_path / "run" / "bad.jsonl").read_text().splitlines()) == 5


def test_the_example_of_the_help_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = (Options.__doc__ or "").partition("FILE.py may hold:\n")[2].partition("    and `qwen-jax")[0]
    (tmp_path / "example.py").write_text(textwrap.dedent(example))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in (9, 90)))
    command = ["data", "curate", "--config", str(tmp_path / "example.py"), "--web", str(tmp_path / "a.jsonl")]
    assert cli.main([*command, "--output", str(tmp_path / "run"), "--workers", "1"]) == 0
    assert "select: 1 of 2" in capsys.readouterr().out


def test_what_cannot_be_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my_curation.py"
    file.write_text(CURATION)
    for config, message in (
        (str(file) + ":nothing", "has no function nothing. It has: curation, other, fails"),
        (str(file) + ":fails", "cannot be run: line 33: KeyError: 'no such key'."),
        (str(file) + ":other", "returned a str, expected a Curation"),
        (str(tmp_path / "none.py"), "does not exist"),
        ("recipe", "Expected FILE.py"),
    ):
        assert cli.main(["data", "curate", "--config", config, "--output", str(tmp_path / "run")]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as status:
        cli.main(["data", "curate", "--config", str(file), "--help"])
    assert status.value.code == 0
    shown = capsys.readouterr().out
    assert "--least" in shown
    assert "words of a document" in shown
