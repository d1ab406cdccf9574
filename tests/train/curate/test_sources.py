"""Input in every format, and what cannot be used of it: counted, named, nothing else lost."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qwen_jax.errors import InputError
from tests.helpers.curation import warc_record
from tests.helpers.runs import print_seed
from tests.train.curate.curations import documents
from train.curate.curation import Curation, Input
from train.curate.run import RunOptions, run
from train.curate.sources import Bad, find_units, read_unit

ROOT = Path(__file__).parents[3]
ONE = RunOptions(workers=1)


def read(folder: Path, unit_bytes: int = 10**6, **options: Any) -> tuple[list[dict[str, Any]], list[Bad], Any]:
    """Documents, bad records, and what was found."""
    found = find_units(Input("x", str(folder), **options), unit_bytes, folder / "output")
    everything = [one for unit in found.units for one in read_unit(unit)]
    return [o for o in everything if not isinstance(o, Bad)], [o for o in everything if isinstance(o, Bad)], found


def test_json_lines_give_the_same_documents_however_they_are_cut_and_compressed(tmp_path: Path) -> None:
    rng = print_seed()
    texts = documents(rng, 100)
    lines = "".join(
        json.dumps({"text": t, "n": [i], "url": f"u{i}"}) + "\n" * int(rng.integers(1, 3)) for i, t in enumerate(texts)
    )
    for name, content in (
        ("plain", lines.encode()),
        ("gz", gzip.compress(lines.encode())),
        ("zst", zstandard.compress(lines.encode())),
    ):
        (tmp_path / name).mkdir()
        ending = "" if name == "plain" else f".{name}"
        (tmp_path / name / f"a.jsonl{ending}").write_bytes(content)
    whole, bad, _ = read(tmp_path / "plain")
    assert not bad
    assert [row["text"] for row in whole] == texts
    assert [row["url"] for row in whole] == [f"u{i}" for i in range(100)]
    assert [json.loads(row["metadata"]) for row in whole] == [{"n": [i]} for i in range(100)]
    # An id does not depend on how the file is cut, and its place leads to the line.
    for size in rng.integers(100, 5000, 3):
        assert read(tmp_path / "plain", int(size))[0] == whole
    for row in whole:
        at = int(row["source"].partition(":byte ")[2])
        assert json.loads(lines.encode()[at:].split(b"\n")[0])["text"] == row["text"]
    for name in ("gz", "zst"):
        assert [row["text"] for row in read(tmp_path / name)[0]] == texts
    assert len({row["id"] for name in ("plain", "gz", "zst") for row in read(tmp_path / name)[0]}) == 300


def test_ids_do_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    for name in ("one", "two/deep"):
        for sub in ("a", "b"):
            (tmp_path / name / sub).mkdir(parents=True)
            (tmp_path / name / sub / "x.jsonl").write_text('{"text": "t"}\n')
    first = [row["id"] for row in read(tmp_path / "one")[0]]
    assert first == [row["id"] for row in read(tmp_path / "two" / "deep")[0]]
    assert len(set(first)) == 2
    by_pattern = find_units(Input("x", str(tmp_path / "one" / "*" / "x.jsonl")), 100, tmp_path / "o")
    assert [row["id"] for unit in by_pattern.units for row in read_unit(unit)] == first  # type: ignore[index]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_archives_give_their_pages(tmp_path: Path, ending: str) -> None:
    pages = [f"<html>{i} caf\xe9</html>".encode("latin-1") * 50 for i in range(5)]
    records = [warc_record(f"http://x/{i}", page) for i, page in enumerate(pages)]
    others = [
        warc_record("http://x/p", b"%PDF", content="application/pdf"),
        warc_record("http://x/404", b"<html>", status=404),
        warc_record("http://x/q", b"", kind="request"),
    ]
    content = [*records[:2], *others, *records[2:]]
    packed = [gzip.compress(record) if ending else record for record in content]
    (tmp_path / f"a.warc{ending}").write_bytes(b"".join(packed))
    # A file that ends inside the fourth page.
    (tmp_path / f"b.warc{ending}").write_bytes(
        b"".join(packed[:-1])[:-300] if not ending else b"".join(packed[:-1])[:-40]
    )
    rows, bad, _ = read(tmp_path)
    assert [row["html"] for row in rows if row["source"].startswith("a")] == pages
    assert [row["url"] for row in rows[:5]] == [f"http://x/{i}" for i in range(5)]
    assert json.loads(rows[0]["metadata"])["charset"] == "latin-1"
    assert all(row["text"] is None for row in rows)
    assert [row["html"] for row in rows if row["source"].startswith("b")] == pages[:3]
    assert [one.reason.partition(":")[0] for one in bad if one.file.startswith("b") and not one.skipped] == [
        "the file is damaged behind this place"
    ]
    skipped = Counter(one.reason for one in bad if one.file.startswith("a"))
    assert skipped == {"a response that is not HTML": 1, "a response with an error status": 1}


def test_parquet_of_mixed_schemas(tmp_path: Path) -> None:
    texts = documents(print_seed(), 30)
    tables = {
        "plain": pa.table({"text": texts, "score": [0.5] * 30, "when": pa.array([0] * 30, pa.timestamp("s"))}),
        "dictionary": pa.table({"id": [str(i) for i in range(30)], "text": pa.array(texts).dictionary_encode()}),
        "bytes": pa.table({"text": pa.array([t.encode() for t in texts[:-1]] + [b"\xff\xfe"], pa.binary())}),
        "nulls": pa.table({"text": [*texts[:-2], None, " "]}),
        "without": pa.table({"body": texts}),
        "numbers": pa.table({"text": list(range(30))}),
        "none": pa.table({"text": pa.array([], pa.string())}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "plain.parquet").read_bytes()[:-100])
    rows, bad, found = read(tmp_path, 500)
    by_file = Counter(row["source"].partition(".")[0] for row in rows)
    assert by_file == {"plain": 30, "dictionary": 30, "bytes": 29, "nulls": 28}
    assert [row["text"] for row in rows if row["source"].startswith("dictionary")] == texts
    assert Counter(one.file.partition(".")[0] for one in bad) == {"bytes": 1, "nulls": 2}
    assert {one.reason for one in bad if one.file.startswith("nulls")} == {
        "'text' must be a string, got null",
        "the document is empty",
    }
    assert set(found.broken) == {"without.parquet", "numbers.parquet", "cut.parquet"}
    assert "no column 'text', it has body" in found.broken["without.parquet"]
    assert json.loads(rows[-1]["metadata"])["when"].startswith("1970")


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path) -> None:
    rng, folder, own = print_seed(), tmp_path / "run", tmp_path / "input"
    own.mkdir()
    texts = documents(rng, 200)
    good = [json.dumps({"text": text}).encode() for text in texts]
    bad = [
        b"not json",
        b'{"text": 7}',
        b'{"txt": "x"}',
        b'{"text": null}',
        b'{"text": "\xff\xfe"}',
        b'{"text": "half a pair \\ud800"}',
        b'["text"]',
        b'{"text": "  "}',
        b"[" * 100_000,
        json.dumps({"text": "x" * 200_000}).encode(),
        b'{"text": "' + b"y" * 1_000_000 + b'"}',
    ]
    mixed = good[:50] + bad
    order = rng.permutation(len(mixed))
    (own / "mixed.jsonl").write_bytes(b"\n".join(mixed[i] for i in order))
    whole = gzip.compress(b"\n".join(good[50:100]))
    (own / "whole.jsonl.gz").write_bytes(whole)
    (own / "cut.jsonl.gz").write_bytes(gzip.compress(b"\n".join(good[100:] * 20), compresslevel=0)[:-2000])
    (own / "cut.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(good[100:] * 20))[:-100])
    (own / "garbage.jsonl.gz").write_bytes(b"garbage")
    (own / "empty.jsonl").write_bytes(b"")
    pq.write_table(pa.table({"body": texts}), own / "without.parquet")
    (own / "zero.txt").write_bytes(b"a\0b")
    (own / "fine.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    summary = run(Curation([Input("web", str(own), max_document_megabytes=0.1)], shard_megabytes=0.5), folder, ONE)
    one = summary["inputs"]["web"]
    rows = [row for path in sorted(folder.glob("documents/*.parquet")) for row in pq.read_table(path).to_pylist()]
    by_file = Counter(row["source"].partition(":")[0] for row in rows)
    assert sum(one["bad"].values()) == len(bad) + 1
    assert (by_file["mixed.jsonl"], by_file["whole.jsonl.gz"], by_file["fine.txt"]) == (50, 50, 1)
    assert by_file["cut.jsonl.gz"] > 1800
    assert {row["text"] for row in rows} >= {*texts[:100], "one\ntwo"}
    assert set(one["damaged"]) == {"cut.jsonl.gz", "cut.jsonl.zst", "garbage.jsonl.gz"}
    assert set(one["empty"]) >= {"empty.jsonl", "zero.txt", "garbage.jsonl.gz"}
    named = [json.loads(line) for line in (folder / "bad.jsonl").open()]
    assert one["broken"] == {"without.parquet": "has no column 'text', it has body"}
    assert named[0]["file"] == "without.parquet"
    assert named[0]["reason"] == "the file cannot be read: has no column 'text', it has body"
    assert len(named) == sum(one["bad"].values()) + 3 + 1
    assert Counter(line["file"] for line in named)["mixed.jsonl"] == len(bad)
    manifest = json.loads((folder / "documents" / "manifest.json").read_text())
    assert manifest["counts"]["inputs"]["web"]["bad"] == one["bad"]
    page = (folder / "report.html").read_text()
    assert "longer than 0.1 MB" in page
    assert "not JSON" in page


def test_an_input_that_is_mostly_bad_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 5 + '{"text": "y"}\n')
    with pytest.raises(InputError, match=r"5 of 6 records cannot be used.*no field 'text', it has 'body' \(5\)"):
        run(Curation([Input("web", str(tmp_path / "a.jsonl"))]), tmp_path / "run", ONE)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(InputError, match="no documents in 1 files"):
        run(Curation([Input("web", str(tmp_path / "b.jsonl"))]), tmp_path / "run", ONE)
    # A file that cannot be read at all is listed, too, and what to do is about inputs.
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"1 files: cut.parquet: is not an intact Parquet .*[^.]\. Give files with"):
        run(Curation([Input("web", str(tmp_path / "cut.parquet"))]), tmp_path / "run", ONE)
    assert json.loads((tmp_path / "run" / "bad.jsonl").read_text())["file"] == "cut.parquet"
    (tmp_path / "c.pdf").write_text("")
    with pytest.raises(InputError, match="expected one of"):
        run(Curation([Input("web", str(tmp_path))]), tmp_path / "run", ONE)


def test_records_without_an_id_are_bad(tmp_path: Path) -> None:
    lines = [{"id": "a"}, {"id": 7}, {"id": None}, {"id": 1.5}, {"id": ""}, {"id": True}, {}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "t", **line}) + "\n" for line in lines))
    rows, bad, _ = read(tmp_path, id="id")
    assert [row["id"] for row in rows] == ["a", "7"]
    assert len(bad) == 5


def test_a_folder_of_pages_and_a_field_of_pages(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"<p>caf\xe9")
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(b"<p>x"))
    assert [row["html"] for row in read(tmp_path)[0]] == [b"<p>caf\xe9", b"<p>x"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c.jsonl").write_text('{"page": "<p>\\u00e9"}\n')
    assert read(tmp_path / "c", html="page")[0][0]["html"] == "<p>é".encode()


def test_shards_are_bounded_and_so_is_memory(tmp_path: Path) -> None:
    """A compressed file, which cannot be cut, becomes many shards; 120 MB take no more memory than 30."""
    line = json.dumps({"text": "word " * 1000}).encode() + b"\n"
    for name, count in (("few", 6_000), ("many", 24_000)):
        with zstandard.open(tmp_path / f"{name}.jsonl.zst", "wb") as file:
            for _ in range(count):
                file.write(line)
    script = (
        "import sys; from train.curate.run import *; from train.curate.curation import *\n"
        # Not ru_maxrss, which begins with the peak of the parent.
        "def peak(): return int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) / 1024\n"
        "for name in ('few', 'many'):\n"
        "    source = Input('a', f'{sys.argv[1]}/{name}.jsonl.zst')\n"
        "    run(Curation([source], shard_megabytes=20), Path(sys.argv[1], name), RunOptions(workers=1))\n"
        "    print(peak())"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    few, many = map(float, done.stdout.split())
    print(f"peak: {few:.0f} MB with 30 MB of text, {many:.0f} MB with 120 MB")
    assert many - few < 75
    sizes = [pq.read_metadata(path).num_rows for path in (tmp_path / "many" / "documents").glob("*.parquet")]
    assert sum(sizes) == 24_000
    assert max(sizes) * 5000 <= 20e6 + 5000
