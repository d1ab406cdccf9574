"""`qwen-jax data decontaminate`: what is kept keeps its bytes, what is removed is counted, and a run goes on."""

import contextlib
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from qwen_jax.cli import main
from qwen_jax.errors import InputError
from tests.helpers.data_sets import frames_of
from tests.helpers.runs import print_seed
from train.curate import decontaminate as module
from train.curate.decontaminate import DecontaminateConfig, decontaminate
from train.curate.decontaminate_report import to_html
from train.curate.operators.decontaminate import Decontaminate
from train.data.words import texts_of

ROOT = Path(__file__).resolve().parents[3]
WORDS = [f"w{i}" for i in range(3000)]


class Material:
    """Test items, and texts with and without one."""

    def __init__(self, folder: Path):
        self.rng = random.Random(int(print_seed().integers(1 << 30)))
        self.items = [" ".join(self.rng.choices(WORDS, k=self.rng.randrange(20, 60))) for _ in range(40)]
        (folder / "sums.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in self.items[:20]))
        (folder / "trivia.json").write_text(json.dumps([{"problem": q} for q in self.items[20:]]))
        self.against = (f"sums={folder / 'sums.jsonl'}", str(folder / "trivia.json"))

    def text(self, item: int | None = None) -> str:
        before, after = (" ".join(self.rng.choices(WORDS, k=self.rng.randrange(1, 200))) for _ in range(2))
        return f"{before}.\n\u00c9 {'' if item is None else self.items[item]} \u2014 {after}"


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return Material(tmp_path)


def clean(material: Material, inputs: list[Path], output: Path, **options: Any) -> dict[str, Any]:
    config = DecontaminateConfig(tuple(map(str, inputs)), material.against, output, **{"workers": 1, **options})
    return decontaminate(config, progress=Console(file=io.StringIO()))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines_of(material: Material, count: int) -> tuple[list[bytes], list[int | None]]:
    """Lines of JSON in different styles, each with an item or without."""
    lines, planted = [], []
    for number in range(count):
        item = material.rng.randrange(40) if material.rng.random() < 0.3 else None
        text = material.text(item)
        row = material.rng.choice(
            [
                {"id": number, "text": text, "url": "a/b"},
                {"messages": [{"role": "user", "content": "So?"}, {"role": "assistant", "content": text}]},
                {"prompt": text, "completion": "Yes."},
                {"chosen": "a", "rejected": text, "n": 1.50},
            ]
        )
        separators = material.rng.choice([(",", ":"), (" , ", " :  ")])
        line = json.dumps(row, ensure_ascii=material.rng.random() < 0.5, separators=separators)
        lines.append(line.encode() + material.rng.choice([b"\n", b"\r\n", b" \n"]))
        planted.append(item)
    return lines, planted


def test_lines_without_items_keep_their_bytes(material: Material, tmp_path: Path) -> None:
    folder, expected = tmp_path / "in", {}
    (folder / "deep").mkdir(parents=True)
    hits = {"sums": 0, "trivia": 0}
    for name in ("a.jsonl", "deep/b.jsonl.gz", "deep/a.jsonl.zst"):
        lines, planted = lines_of(material, 60)
        lines.insert(30, b"\n")
        planted.insert(30, None)
        content = b"".join(lines).rstrip(b"\r\n ")
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        (folder / name).write_bytes(pack(content))
        kept = [line for line, item in zip(lines, planted, strict=True) if item is None]
        expected[name] = b"".join(kept)[: None if planted[-1] is not None else len(b"".join(kept).rstrip(b"\r\n "))]
        for item in planted:
            if item is not None:
                hits["sums" if item < 20 else "trivia"] += 1
    (folder / "kept.md").write_text(material.text())
    (folder / "dropped.txt").write_text(material.text(0))
    hits["sums"] += 1
    expected["kept.md"] = (folder / "kept.md").read_bytes()
    summary = clean(material, [folder], tmp_path / "out")
    made = files(tmp_path / "out")
    assert json.loads(made.pop("decontamination.json")) == summary
    unpack = {
        ".gz": gzip.decompress,
        ".zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    }
    assert {name: unpack.get(Path(name).suffix, bytes)(data) for name, data in made.items()} == expected
    assert {name: one["documents"] for name, one in summary["sets"].items()} == hits
    assert summary["records"] == 182 == summary["kept"] + summary["dropped"]
    # The same command again changes nothing; on its own output it finds nothing.
    before = files(tmp_path / "out")
    assert clean(material, [folder], tmp_path / "out") == summary
    assert files(tmp_path / "out") == before
    again = clean(material, sorted((tmp_path / "out").rglob("*.jsonl*")), tmp_path / "twice")
    assert again["dropped"] == 0 < again["kept"]


def test_masked_spans_are_taken_out_and_nothing_else(material: Material, tmp_path: Path) -> None:
    lines, planted = lines_of(material, 50)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    options = {"action": "mask", "placeholder": "[cut]"}
    summary = clean(material, [tmp_path / "a.jsonl"], tmp_path / "out", **options)
    made = (tmp_path / "out" / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert summary["masked"] == sum(item is not None for item in planted) > 0
    for line, before, item in zip(made, lines, planted, strict=True):
        if item is None:
            assert line == before
        else:
            # The item alone was replaced: what is before and after it is unchanged.
            assert before == line.replace(b"[cut]", material.items[item].encode())
    assert clean(material, [tmp_path / "out" / "a.jsonl"], tmp_path / "twice")["dropped"] == 0


def test_parquet_keeps_schema_values_and_order(material: Material, tmp_path: Path) -> None:
    planted = [material.rng.randrange(40) if i % 3 == 0 else None for i in range(40)]
    texts = [material.text(item) for item in planted]
    messages = [[{"role": "user", "content": text}] for text in texts]
    schema = pa.schema([("text", pa.large_string()), ("n", pa.int16())], metadata={"a": "b"})
    documents = pa.table({"text": [None, *texts[1:]], "n": [None, *range(39)]}, schema=schema)
    chats = pa.table({"messages": messages, "n": range(40)})
    pq.write_table(documents, tmp_path / "d.parquet", row_group_size=15, compression="zstd")
    pq.write_table(chats, tmp_path / "c.parquet", row_group_size=7)
    inputs = [tmp_path / "d.parquet", tmp_path / "c.parquet"]
    summary = clean(material, inputs, tmp_path / "out")
    kept = [i for i, item in enumerate(planted) if item is None]
    found = pq.read_table(tmp_path / "out" / "d.parquet")
    assert found.equals(documents.take([0, *kept]))
    assert found.schema.metadata == schema.metadata
    assert pq.ParquetFile(tmp_path / "out" / "d.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    assert pq.read_table(tmp_path / "out" / "c.parquet").equals(chats.take(kept))
    assert (summary["records"], summary["empty"]) == (80, 1)
    clean(material, inputs, tmp_path / "masked", action="mask")
    found = pq.read_table(tmp_path / "masked" / "c.parquet")
    assert found.schema == chats.schema
    for row, text, item in zip(found.to_pylist(), texts, planted, strict=True):
        assert row["messages"][0]["content"] == (text if item is None else text.replace(material.items[item], ""))


def test_odd_files_are_read(material: Material, tmp_path: Path) -> None:
    """Parquet without compression, or with strings that are not UTF-8; lines with a form feed around them."""
    texts = [material.text(0), material.text()]
    pq.write_table(pa.table({"text": texts}), tmp_path / "plain.parquet", compression="NONE")
    content = b"\xff".join(text.encode() for text in texts)
    ends = [0, len(content), len(content) + 1]
    buffers = [None, pa.py_buffer(b"".join(end.to_bytes(4, "little") for end in ends)), pa.py_buffer(content + b"x")]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, buffers)}), tmp_path / "bytes.parquet")
    (tmp_path / "feed.jsonl").write_bytes(b"\f" + json.dumps({"text": texts[0]}).encode() + b"\f\n")
    made = {}
    for name, count in (("plain.parquet", (1, 1, 0)), ("bytes.parquet", (1, 0, 1)), ("feed.jsonl", (0, 1, 0))):
        summary = clean(material, [tmp_path / name], tmp_path / f"of-{name}", action="mask")
        assert (summary["kept"], summary["masked"], summary["bad"]) == count
        made[name] = tmp_path / f"of-{name}" / name
    assert pq.read_table(made["plain.parquet"])["text"].to_pylist()[1] == texts[1]
    assert pq.read_table(made["bytes.parquet"])["text"].to_pylist() == ["x"]
    masked = json.loads(made["feed.jsonl"].read_bytes().strip())["text"]
    assert masked == pq.read_table(made["plain.parquet"])["text"].to_pylist()[0]


def many_files(material: Material, folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    for number in range(count):
        lines, _ = lines_of(material, 15)
        (folder / f"{number}.jsonl").write_bytes(b"".join(lines))
    return [folder]


@contextlib.contextmanager
def interrupted(renames: int) -> Iterator[None]:
    """What the block does is interrupted after so many renames of files."""
    replace, left = os.replace, renames

    def fail(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_pieces_of_a_large_file_give_what_the_whole_gives(material: Material, tmp_path: Path) -> None:
    """Cut anywhere, also after an interruption with other cuts: the same lines, rows, counts and bad records."""
    rng, folder = np.random.default_rng(material.rng.getrandbits(32)), tmp_path / "in"
    folder.mkdir()
    lines, _ = lines_of(material, 60)
    for _ in range(4):
        lines.insert(material.rng.randrange(len(lines)), material.rng.choice([b"\n", b"{no\n"]))
    content = b"".join(lines).rstrip(b"\r\n ")
    (folder / "a.jsonl").write_bytes(content)
    (folder / "b.jsonl.zst").write_bytes(b"".join(frames_of(content, rng, 9)))
    texts = [material.text(material.rng.randrange(40) if i % 3 == 0 else None) for i in range(30)]
    pq.write_table(pa.table({"text": texts, "n": range(30)}), folder / "c.parquet", row_group_size=4)
    whole = clean(material, [folder], tmp_path / "whole", max_bad=1.0)

    def result(output: Path) -> dict[str, bytes]:
        made = files(output)
        reader = zstandard.ZstdDecompressor().stream_reader(made["b.jsonl.zst"], read_across_frames=True)
        made["b.jsonl.zst"] = reader.readall()
        del made["decontamination.json"]
        return made

    def counts(summary: dict[str, Any]) -> dict[str, Any]:
        sets = {name: {k: v for k, v in one.items() if k != "examples"} for name, one in summary["sets"].items()}
        return {**summary, "sets": sets}

    # Interrupted with other cuts.
    with interrupted(6):
        clean(material, [folder], tmp_path / "cut", max_bad=1.0, unit_megabytes=0.002)
    size = material.rng.randrange(500, 4000)
    cut = clean(material, [folder], tmp_path / "cut", max_bad=1.0, unit_megabytes=size / 1e6)
    assert counts(cut) == counts(whole)
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    # Examples name their line in the file; of pieces there are more.
    for one in cut["sets"].values():
        for example in one["examples"]:
            number, file = example["record"] - 1, Path(example["file"]).name
            row = texts[number] if file == "c.parquet" else content.split(b"\n")[number].decode()
            assert example["match"] in (row if file == "c.parquet" else " ".join(texts_of(json.loads(row))))


def test_interrupted_runs_go_on_to_the_same_bytes(material: Material, tmp_path: Path) -> None:
    # Two renames a file, so that five attempts of at most four do not suffice.
    inputs = many_files(material, tmp_path / "in", 12)
    clean(material, inputs, tmp_path / "whole")
    for _ in range(5):
        with interrupted(material.rng.randrange(2, 5)):
            clean(material, inputs, tmp_path / "out")
        assert not (tmp_path / "out" / module.SUMMARY).exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.jsonl")}
    records = len(list((tmp_path / "out" / ".decontaminate").glob("0*.json")))
    assert records > 0
    clean(material, inputs, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    # What was finished was not done again.
    assert sum(p.stat().st_mtime_ns == modified for p, modified in done.items()) >= records


def test_killed_workers_leave_a_run_that_goes_on(material: Material, tmp_path: Path) -> None:
    inputs = many_files(material, tmp_path / "in", 12)
    whole = clean(material, inputs, tmp_path / "whole")
    code = (
        "import sys; from pathlib import Path; from train.curate.decontaminate import *\n"
        "if __name__ == '__main__': decontaminate(DecontaminateConfig((sys.argv[1],), tuple(sys.argv[3:]), "
        "Path(sys.argv[2]), workers=2))"
    )
    (tmp_path / "run.py").write_text(code)
    output = tmp_path / "out"
    command = [sys.executable, tmp_path / "run.py", inputs[0], output, *material.against]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)
    while not list(output.glob(".decontaminate/0*.json")) and process.poll() is None:
        time.sleep(0.002)
    # On a slow machine it may have ended before it was looked at again.
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not psutil.wait_procs(children, timeout=60)[1]
    assert clean(material, inputs, output) == whole
    assert files(output) == files(tmp_path / "whole")


def test_bad_input_is_named_and_nothing_is_lost(material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    good = json.dumps({"text": "good"}).encode() + b"\n"
    bad = [b'{"text": "\xe9"}\n', b"[1]\n", b"{no\n", b'{"text": "' + b"x" * 2000 + b'"}\n', b'{"text": "\\ud800"}\n']
    (folder / "a.jsonl").write_bytes(good * 20 + b"".join(line + good for line in bad))
    (folder / "zero.txt").write_bytes(b"a\0b")
    (folder / "empty.jsonl").write_bytes(b"")
    summary = clean(material, [folder], tmp_path / "out", max_document_megabytes=0.001)
    assert (summary["records"], summary["kept"], summary["bad"]) == (31, 26, 5)
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == good * 24 + bad[4] + good
    assert (tmp_path / "out" / "empty.jsonl").read_bytes() == b""
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").open()]
    reasons = {(Path(one["file"]).name, one["line"]): one["reason"] for one in listed}
    assert list(reasons) == [("a.jsonl", 21), ("a.jsonl", 23), ("a.jsonl", 25), ("a.jsonl", 27), ("zero.txt", 1)]
    for reason, says in zip(
        reasons.values(), ("UTF-8", "got list", "not JSON", "longer than 0.001 MB", "zero"), strict=True
    ):
        assert says in reason
    with pytest.raises(InputError, match=r"5 of 31 records are bad, more than --max-bad 0.001"):
        clean(material, [folder], tmp_path / "strict", max_document_megabytes=0.001, max_bad_lines=4)

    # Damaged archives do not stop the others, whose results stay.
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(good * 99)[:-9])
    (folder / "cut.jsonl.zst").write_bytes(zstandard.compress(os.urandom(999))[:-9])
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz cannot.*cut\.jsonl\.zst cannot.*cut\.parquet cannot.*kept"):
        clean(material, [folder], tmp_path / "cut", max_document_megabytes=0.001)
    assert (tmp_path / "cut" / "a.jsonl").read_bytes() == good * 24 + bad[4] + good
    assert not list((tmp_path / "cut").glob("cut*"))

    (tmp_path / "without").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    for options, says in (
        ({"inputs": [tmp_path / "none.jsonl"]}, "No such file"),
        ({"inputs": [tmp_path / "without"]}, "No files in .*without. Give files"),
        ({"inputs": [tmp_path / "a.pdf"]}, "Leave the file out, or give it the extension of its format.$"),
        ({"inputs": [tmp_path / "out" / "a.jsonl"], "output": tmp_path / "out"}, "in the output folder"),
        ({"output": folder}, "not empty|in the output folder"),
        ({"output": folder / "a.jsonl"}, "is a file"),
        ({"output": tmp_path / "out"}, "other settings: max_document_megabytes"),
        ({"field": "body"}, "no field 'body'.*--field"),
        ({"placeholder": "x"}, "--action mask"),
        ({"workers": 0}, "workers"),
        ({"max_bad": 2.0}, "max_bad"),
    ):
        options = {"inputs": [folder / "a.jsonl"], "output": tmp_path / "new", **options}
        with pytest.raises(InputError, match=says):
            clean(material, **options)
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="no column 'text', it has body"):
        clean(material, [tmp_path / "b.parquet"], tmp_path / "p", field="text")


def test_the_command_reports_both_texts(material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": material.text(3).replace("w", "<W", 1)}) + "\n")
    command = ["data", "decontaminate", "--input", str(tmp_path / "a.jsonl"), "--against", *material.against]
    command += ["--output", str(tmp_path / "out"), "--report", str(tmp_path / "r.html"), "--workers", "1"]
    assert main(command) == 0
    assert "1 records: 0 kept, 1 dropped" in (said := capsys.readouterr().out)
    assert "sums: 1 of 20 items found, in 1 records" in said
    page = (tmp_path / "r.html").read_text()
    assert f"<mark>{material.items[3]}</mark>" in page
    assert f"<pre>{material.items[3]}</pre>" in page
    assert "sums.jsonl, line 4" in page
    assert "<W" not in page
    assert main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["sets"]["sums"]["examples"][0]["match"] == material.items[3]
    assert to_html(summary) == page


def test_the_operator_agrees_with_the_command(material: Material, tmp_path: Path) -> None:
    planted = [material.rng.randrange(40) if i % 4 == 0 else None for i in range(150)]
    texts = [material.text(item) for item in planted]
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    drop = Decontaminate(material.against)
    found = drop.start()(table)
    assert found.schema == drop.makes
    for row, item, text in zip(found.to_pylist(), planted, texts, strict=True):
        name = None if item is None else "sums" if item < 20 else "trivia"
        assert row["reason"] == (name and f"in the evaluation set {name}")
        assert [text[s["begin"] : s["end"]] for s in row["test_items"]] == (
            [] if item is None else [material.items[item]]
        )
    mask = Decontaminate(material.against, action="mask", placeholder="#")
    masked = mask.start()(table)
    assert masked.schema == mask.makes
    assert masked.column("reason").null_count == 150
    for text, before, item in zip(masked.column("text").to_pylist(), texts, planted, strict=True):
        assert text == (before if item is None else before.replace(material.items[item], "#"))
    # Settings hold the content of the test files.
    before = json.dumps(drop.settings())
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write('{"question": "more"}\n')
    assert json.dumps(drop.settings()) != before
