"""`qwen-jax data curate --tokenizer DIR --length N`: rows of the output of a curation."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qwen_jax import cli
from qwen_jax.tokenizer import Tokenizer
from tests.helpers.runs import print_seed
from tests.train.curate.curations import documents, make_input
from tests.train.curate.test_command import CURATION
from tests.train.curate.test_run import lines
from train.curate.curation import Curation, Input, Select
from train.curate.pack import pack
from train.curate.run import RunOptions, run

ONE = RunOptions(workers=1)


def packed(run: Path, tokenizer: Path) -> dict[str, int]:
    """Packs rows of 32; tokens of each data set."""
    made = pack(run, tokenizer, 32, 1, Console(file=io.StringIO()))
    assert sorted(made) == sorted(path.name for path in (run / "rows").iterdir() if path.is_dir())
    return {name: data["tokens"] for name, data in made.items()}


def written(run: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens of all documents that a run has written, each with the end of text, by domain."""
    count: dict[str, int] = {}
    for line in lines(run):
        domain = str(line["domain"])
        count[domain] = count.get(domain, 0) + len(tokenizer.encode(str(line["text"]))) + 1
    return count


def test_the_command_packs_what_is_kept(
    tmp_path: Path, tokenizer: Tokenizer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows have each token once. They are kept on a second call, and built anew for another threshold."""
    (tmp_path / "my_curation.py").write_text(CURATION)
    source, out = make_input(tmp_path / "input", print_seed(), 60) / "books", tmp_path / "run"
    command = ["data", "curate", "--config", str(tmp_path / "my_curation.py"), "--books", str(source), "--workers", "1"]
    command += ["--output", str(out), "--tokenizer", str(folder), "--length", "32", "--json", "--least"]
    times, tokens = [], []
    for least in "30", "30", "50":
        assert cli.main([*command, least]) == 0
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        assert {name: data["tokens"] for name, data in rows.items()} == written(out, tokenizer)
        times.append((out / "rows" / "books" / "manifest.json").stat().st_mtime_ns)
        tokens.append(rows["books"]["tokens"])
    assert times[0] == times[1] != times[2]
    assert tokens[0] == tokens[1] > tokens[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "32"], "belong together"),
        (["--tokenizer", "FOLDER"], "belong together"),
        (["--tokenizer", "FOLDER", "--length", "1"], "at least 2 tokens"),
        (["--tokenizer", "none", "--length", "32"], "none"),
    ],
)
def test_wrong_options_are_refused_before_the_work(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "my_curation.py").write_text(CURATION)
    command = ["data", "curate", "--config", str(tmp_path / "my_curation.py"), "--books", "x"]
    given = [option.replace("FOLDER", str(folder)) for option in options]
    assert cli.main([*command, "--output", str(tmp_path / "run"), *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rows_follow_the_output(tmp_path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """No rows are left of a domain that is gone; a folder that was moved is packed again."""
    rng, out = print_seed(), tmp_path / "run"
    inputs = [Input(name, str(tmp_path / f"{name}.jsonl")) for name in "ab"]
    for name in "ab":
        texts = documents(rng, 10)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(Curation(inputs), out, ONE)
    assert packed(out, folder) == written(out, tokenizer)
    run(Curation(inputs[:1]), out, ONE)
    assert packed(out, folder) == written(out, tokenizer)
    out = out.rename(tmp_path / "moved")
    assert packed(out, folder) == written(out, tokenizer)
    run(Curation(inputs, [Select("length(text) < 0")]), out, ONE)
    assert packed(out, folder) == {}


def test_long_records_are_packed(tmp_path: Path, tokenizer: Tokenizer, folder: Path) -> None:
    """What the curation has let through is no bad record later, such as a short text with long metadata."""
    records = [{"text": "a b"}, {"text": "b c", "more": "x" * 8_100_000}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run(Curation([Input("a", str(tmp_path / "a.jsonl"))]), tmp_path / "run", ONE)
    assert packed(tmp_path / "run", folder) == written(tmp_path / "run", tokenizer)
