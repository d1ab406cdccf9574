"""Input as it comes: what is bad is counted, named and kept out; what is damaged costs nothing else."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from qwen_jax.errors import InputError
from tests.helpers.data_sets import contents, documents_on_disk, expected_documents, jsonl, random_texts, write
from train.data.build import BuildConfig, build
from train.data.documents import find_sources, share_out

ROOT = Path(__file__).parents[3]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = np.random.SeedSequence().generate_state(1)[0]
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def go(folder: Path, tmp_path: Path):
    """Builds from what lies in `in/` into `out/`."""
    (tmp_path / "in").mkdir()

    def go(output: str = "out", **options):
        given = {"input": (str(tmp_path / "in"),), "length": 16, "domain": "d", "workers": 1, **options}
        config = BuildConfig(tokenizer=folder, output=tmp_path / output, **given)
        return build(config, progress=Console(file=io.StringIO()))

    return go


def quarantine(tmp_path: Path) -> list[tuple[str, int, str]]:
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    return [(Path(e["file"]).name, e["line"], e["reason"]) for e in map(json.loads, lines)]


BAD = {
    b'{"text": "caf\xe9"}': "not UTF-8: byte 0xe9 at offset 13",
    b'{"text": "x"': "not JSON",
    b"[" * 100_000: "not JSON",
    b"9" * 5000: "not JSON",
    b'["text"]': "expected a JSON object, got list",
    b'{"content": "x", "id": 1}': "no field 'text', it has 'content', 'id'",
    b'{"text": ["x"]}': "'text' must be a string, got list",
    b'{"text": null}': "'text' must be a string, got null",
    b'{"text": "\\ud800"}': "lone surrogate U+D800",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("unit", [None, 0.0005])
def test_bad_lines_are_counted_and_listed_where_they_are(rng, tokenizer, go, tmp_path, name, unit):
    texts = random_texts(rng, 200)
    lines = jsonl(texts).splitlines()
    expected = []
    # From the back, so that the places of those in front do not move.
    for at, (line, reason) in zip(sorted(rng.choice(200, len(BAD), replace=False))[::-1], BAD.items(), strict=True):
        lines.insert(at, line)
        expected = [(at, reason), *expected]
    expected = [(name, at + 1 + earlier, reason) for earlier, (at, reason) in enumerate(expected)]
    content = b"\n".join(lines)
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(name.split(".")[-1], bytes)
    (tmp_path / "in" / name).write_bytes(compress(content))
    manifest = go(unit_megabytes=unit)
    assert manifest.bad == len(BAD)
    found = quarantine(tmp_path)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    for (_, _, reason), (_, _, wanted) in zip(found, expected, strict=True):
        assert wanted in reason
    assert documents_on_disk(tmp_path / "out") == expected_documents(tokenizer, texts)


def test_the_limit_on_bad_lines_can_be_set_and_what_is_finished_is_kept(rng, go, tmp_path):
    path = tmp_path / "in" / "a.jsonl"
    path.write_bytes(jsonl(random_texts(rng, 100)) + b"bad\n" * 11)
    with pytest.raises(InputError, match=r"11 of 111 records are bad.*a.jsonl, line 101: not JSON"):
        go()
    assert len(quarantine(tmp_path)) == 11
    shard = tmp_path / "out" / "shard-00000.tokens"
    made = shard.stat().st_mtime_ns
    assert go(max_bad_lines=11).bad == 11
    assert shard.stat().st_mtime_ns == made
    assert go("fraction", max_bad=0.1).bad == 11
    with pytest.raises(InputError, match="11 of 111"):
        go("less", max_bad=0.09)


def test_a_wrong_field_is_noticed_at_once(rng, go, tmp_path):
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(random_texts(rng, 1000), "content"))
    with pytest.raises(InputError, match=r"11 of 11 .*line 11: no field 'text', it has 'content', 'id'.*--field"):
        go()
    assert go("other", field="content").documents == 1000


def test_empty_documents_vanish_and_no_document_is_an_error(go, tmp_path):
    (tmp_path / "in" / "a.jsonl").write_bytes(b'{"text": ""}\n\n{"text": " \\n"}\n')
    (tmp_path / "in" / "b.txt").write_bytes(b"")
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(b"")
    with pytest.raises(InputError, match="no text in 3 input files: 0 records are bad and 3 empty"):
        go()
    assert not (tmp_path / "out" / "manifest.json").exists()
    (tmp_path / "in" / "d.txt").write_bytes(b"x")
    manifest = go()
    assert (manifest.documents, manifest.empty) == (1, 3)


def test_byte_order_marks_are_not_text(tokenizer, go, tmp_path):
    """Also inside a file, as `cat a.jsonl b.jsonl` leaves them."""
    (tmp_path / "in" / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n')
    (tmp_path / "in" / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    (tmp_path / "in" / "c.jsonl").write_bytes(b"\xef\xbb\xbf\r\n")
    assert go().bad == 0
    assert documents_on_disk(tmp_path / "out") == expected_documents(tokenizer, ["one", "two", "three"])


@pytest.mark.parametrize("unit", [None, 0.0005])
def test_line_ends_are_treated_alike(rng, tokenizer, go, tmp_path, unit):
    """Files with "\\r\\n" give the same data set as files with "\\n"; text in a JSON string stays as it is."""
    texts = [text.replace("\r\n", "\n") for text in random_texts(rng, 40)]
    for folder, end in (("unix", b"\n"), ("windows", b"\r\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(jsonl([*texts, "kept\r\n"]).replace(b"\n", end))
        (tmp_path / folder / "b.txt").write_bytes("\n".join(texts).encode().replace(b"\n", end))
        go(f"{folder}-out", input=(str(tmp_path / folder),), unit_megabytes=unit)
    assert documents_on_disk(tmp_path / "unix-out") == documents_on_disk(tmp_path / "windows-out")
    expected = expected_documents(tokenizer, [*texts, "kept\r\n", "\n".join(texts)])
    assert documents_on_disk(tmp_path / "unix-out") == expected


def test_names_may_be_as_long_as_the_file_system_allows(tokenizer, go, tmp_path):
    """Names of 255 bytes, in folders and files; a longer one is an error that names it."""
    name = "ü" * 125
    (tmp_path / "in" / f"{name}.txt").write_bytes(b"text")
    go(f"{name}12345")
    assert documents_on_disk(tmp_path / f"{name}12345") == expected_documents(tokenizer, ["text"])
    with pytest.raises(InputError, match=r"Cannot use .*: File name too long"):
        go("x" * 256)
    with pytest.raises(InputError, match=r"Cannot look for .*File name too long"):
        go("out", input=("x" * 256,))


def test_files_that_are_no_text_are_bad(go, tmp_path):
    for name, content in (("a", b"\xff\xfe"), ("b", b"a\0b"), ("c", b"text")):
        (tmp_path / "in" / f"{name}.txt").write_bytes(content)
    assert go().documents == 1
    (first, *_), (second, *_) = found = quarantine(tmp_path)
    assert (first, second) == ("a.txt", "b.txt")
    assert "not UTF-8" in found[0][2]
    assert "zero byte" in found[1][2]


def test_extensions(rng, go, tmp_path):
    texts = random_texts(rng, 20)
    (tmp_path / "in" / "a.json5").write_bytes(jsonl(texts))
    with pytest.raises(InputError, match=r"a.json5: expected one of .jsonl .* --format"):
        go()
    assert go(format="jsonl").documents == 20
    assert go("text", format="text").documents == 1
    (tmp_path / "in" / "a.json5").rename(tmp_path / "in" / "a.JSONL")
    assert go("upper").documents == 20
    (tmp_path / "in" / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="compresses inside the file"):
        go("again")
    with pytest.raises(InputError, match="No such file or folder"):
        go("none", input=(str(tmp_path / "in" / "*.nothing"),))


# --- damaged files ---


def compressed(content: bytes, suffix: str) -> bytes:
    return gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "rubbish", "not compressed"])
def test_a_damaged_file_is_named_and_the_others_are_kept(rng, go, tmp_path, suffix, damage):
    for i in range(3):
        write(tmp_path / "in" / f"{i}.jsonl.{suffix}", random_texts(rng, 300))
    path = tmp_path / "in" / f"1.jsonl.{suffix}"
    good = path.read_bytes()
    middle = len(good) // 4
    path.write_bytes(
        {
            "cut": good[: middle + 7],
            "flipped": good[:middle] + bytes(255 - b for b in good[middle : middle + 40]) + good[middle + 40 :],
            # What damage can be read as until it is noticed.
            "rubbish": compressed(b"not JSON\n" * 500, suffix) + good[:middle],
            "not compressed": b"plain text\n" * 100,
        }[damage]
    )
    with pytest.raises(
        InputError, match=rf"1.jsonl.{suffix} cannot be read beyond document .*everything else"
    ) as error:
        go(unit_megabytes=0.001)
    assert "0.jsonl" not in str(error.value)
    units = share_out(find_sources(sorted((tmp_path / "in").iterdir()), "auto", "text"), 1000)
    intact = {f"shard-{i:05d}" for i, unit in enumerate(units) if unit[0].source.path != str(path)}
    assert (
        intact <= {p.stem for p in (tmp_path / "out").glob("shard-*")} < {f"shard-{i:05d}" for i in range(len(units))}
    )
    # The units before the damaged file keep their numbers when it is replaced.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-00000.*")}
    path.write_bytes(good)
    go(unit_megabytes=0.001)
    assert all(p.stat().st_mtime_ns == modified for p, modified in before.items())
    go("fresh", unit_megabytes=0.001)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_damaged_parquet_and_wrong_columns(rng, go, tmp_path):
    path = write(tmp_path / "in" / "a.parquet", random_texts(rng, 100))
    with pytest.raises(InputError, match=r"no column 'body', it has id, text.*--field"):
        go(field="body")
    with pytest.raises(InputError, match=r"column 'id' must hold strings, it holds int64"):
        go(field="id")
    good = path.read_bytes()
    for content in (b"", b"PAR1", good[:-1], good[:50]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a.parquet is not an intact Parquet file: .*Download it again"):
            go()
    # The footer is whole, a page is not.
    footer = int.from_bytes(good[-8:-4], "little") + 8
    path.write_bytes(good[:200] + bytes(len(good) - 200 - footer) + good[-footer:])
    with pytest.raises(InputError, match=r"cannot be read beyond document \d+ of this part"):
        go()


_KINDS = (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view())


@pytest.mark.parametrize("kind", _KINDS, ids=str)
def test_every_kind_of_string_column(rng, tokenizer, go, tmp_path, kind):
    texts = random_texts(rng, 90)
    values = pa.array(texts)
    column = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
    pq.write_table(pa.table({"n": range(90), "text": column}), tmp_path / "in" / "a.parquet", row_group_size=17)
    go(unit_megabytes=0.002)
    assert documents_on_disk(tmp_path / "out") == expected_documents(tokenizer, texts)


def test_bad_values_in_parquet(tokenizer, go, tmp_path):
    values = pa.array([b"good", b"caf\xe9", None, b"", b"x" * 2000, b"fine"], pa.binary())
    broken = values.view(pa.string())  # Says that it is UTF-8, and is not.
    pq.write_table(pa.table({"text": broken}), tmp_path / "in" / "a.parquet", row_group_size=2)
    manifest = go(max_document_megabytes=0.001, unit_megabytes=1e-6)
    assert (manifest.bad, manifest.empty) == (3, 1)
    (_, one, utf8), (_, two, null), (_, three, long) = quarantine(tmp_path)
    assert (one, two, three) == (2, 3, 5)
    assert "not UTF-8: byte 0xe9 at offset 3" in utf8
    assert "got null" in null
    assert "longer than 0.001 MB" in long
    assert documents_on_disk(tmp_path / "out") == expected_documents(tokenizer, ["good", "fine"])


@pytest.mark.parametrize("package", ["pyarrow", "zstandard"])
def test_a_missing_library_is_named(rng, go, tmp_path, monkeypatch, package):
    write(tmp_path / "in" / ("a.parquet" if package == "pyarrow" else "a.jsonl.zst"), random_texts(rng, 20))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"need {package}.*pip install 'qwen-jax\[data\]'"):
        go()


# --- documents longer than memory ---

_MEASURED = """
import io, sys
from pathlib import Path
from rich.console import Console
from train.data.build import BuildConfig, build
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e3
inputs, tokenizer, output = map(Path, sys.argv[1:])
before = peak()
manifest = build(BuildConfig((str(inputs),), tokenizer, 16, output, workers=1, max_document_megabytes=1),
                 progress=Console(file=io.StringIO()))
print(manifest.documents, manifest.bad, peak() - before)
"""


def test_a_document_longer_than_memory_is_bad_and_never_held(folder, tmp_path):
    (tmp_path / "in").mkdir()
    short = b'{"text": "short"}\n'
    long = b'{"text": "' + b"a" * 400_000_000 + b'"}\n'
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(short + long + short, 1))
    (tmp_path / "in" / "b.jsonl.zst").write_bytes(zstandard.compress(short + long + short))
    (tmp_path / "in" / "c.txt.gz").write_bytes(gzip.compress(long, 1))
    with (tmp_path / "in" / "d.jsonl").open("wb") as file:
        file.write(short)
        file.truncate(400_000_000)  # A hole of zeros: one long line.
        file.seek(0, 2)
        file.write(b"\n" + short)
    arguments = [sys.executable, "-c", _MEASURED, str(tmp_path / "in"), str(folder), str(tmp_path / "out")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr
    documents, bad, grown = done.stdout.split()
    assert (int(documents), int(bad)) == (6, 4)
    assert float(grown) < 200, "megabytes; one of these documents has 400"
    assert [(name, line) for name, line, _ in quarantine(tmp_path)] == [
        ("d.jsonl", 2), ("a.jsonl.gz", 2), ("b.jsonl.zst", 2), ("c.txt.gz", 1)
    ]  # fmt: skip


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_limit_is_exact_and_a_line_end_does_not_count(go, tmp_path, end):
    line = json.dumps({"text": "a" * 500}).encode()
    (tmp_path / "in" / "a.jsonl").write_bytes(line + end + b'{"text": "b"}' + end if end else line)
    assert go(max_document_megabytes=len(line) / 1e6).bad == 0
    if not end:
        with pytest.raises(InputError, match="no text"):
            go("less", max_document_megabytes=(len(line) - 1) / 1e6)
    else:
        less = go("less", max_document_megabytes=(len(line) - 1) / 1e6)
        assert (less.bad, less.documents) == (1, 1)
