"""Compressed files: all records before damage, the place of the damage, and pieces that begin with Zstandard frames."""

import io
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tests.helpers.curation import warc_record
from tests.helpers.data_sets import frames_of
from tests.helpers.runs import print_seed
from train.curate.curation import Input
from train.curate.sources import Bad, find_units, read_unit
from train.data.archives import Archive, frame_starts


def lines_of(rng: np.random.Generator, count: int) -> list[str]:
    return [json.dumps({"text": f"{i} " + "a" * int(rng.integers(200))}) for i in range(count)]


def read(path: Path, size: int = 1 << 30) -> tuple[list[dict[str, object]], list[Bad]]:
    """Documents and faults of a file, in units of a size; no page is bad but for damage."""
    rows: list[dict[str, object]] = []
    bad: list[Bad] = []
    for unit in find_units(Input("x", str(path)), size, path.parent / "out").units:
        for one in read_unit(unit):
            bad.append(one) if isinstance(one, Bad) else rows.append(one)
    return rows, bad


def decompressed_prefix(content: bytes, suffix: str) -> bytes:
    """What can be decompressed of a file that ends too early: byte by byte, by the library alone."""
    made = b""
    codec = zlib.decompressobj(wbits=31) if suffix == "gz" else zstandard.ZstdDecompressor().decompressobj()
    for i in range(len(content)):
        made += codec.decompress(content[i : i + 1])
    return made


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_ends_too_early_gives_all_that_can_be_decompressed(suffix: str, tmp_path: Path) -> None:
    rng = print_seed()
    # Random bytes do not get shorter: there are many blocks.
    texts = [rng.bytes(200).hex() for _ in range(1000)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if suffix == "gz":
        codec = zlib.compressobj(wbits=31)
        packed = codec.compress(content) + codec.flush()
    else:
        packed = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    cut = packed[: int(rng.integers(20, len(packed)))]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(cut)
    rows, bad = read(path)
    whole = decompressed_prefix(cut, suffix).rpartition(b"\n")[0].splitlines()
    assert [row["text"] for row in rows] == texts[: len(whole)]
    (damage,) = bad
    part = "gzip member" if suffix == "gz" else "Zstandard frame"
    assert damage.reason == (
        f"the file is damaged behind this place: it ends in the middle of the {part} that begins at byte 0"
    )
    assert damage.place == (str(rows[-1]["source"]).rpartition(":")[2] if rows else "the beginning")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_what_comes_before_a_damaged_byte_is_given(suffix: str, tmp_path: Path) -> None:
    """The header of a frame or member is damaged: all before it comes, and the place is that byte."""
    rng = print_seed()
    parts = [b"".join(rng.bytes(50).hex().encode() + b"\n" for _ in range(50)) for _ in range(6)]
    packed = [zlib.compress(part, wbits=31) if suffix == "gz" else zstandard.compress(part) for part in parts]
    which = int(rng.integers(1, 6))
    place = sum(map(len, packed[:which]))
    damaged = bytearray(b"".join(packed))
    damaged[place] ^= 0xFF
    archive = Archive(io.BytesIO(damaged), zstandard if suffix == "zst" else None)
    found = b""
    why = ""
    try:
        while piece := archive.read(int(rng.integers(1, 5000))):
            found += piece
    except EOFError as error:
        why = str(error)
    at = re.fullmatch(rf"it is damaged at byte (\d+), in the .* that begins at byte {place}: .*", why)
    # The first bytes of a header are looked at together.
    assert at is not None
    assert 0 <= int(at[1]) - place < 4
    assert found == b"".join(parts[:which])


def test_the_pages_before_a_damaged_record_are_kept(tmp_path: Path) -> None:
    """A record of an archive is a member of its own; damage in one leaves all pages before it."""
    rng = print_seed()
    pages = [f"<html>{i} {rng.bytes(300).hex()}</html>".encode() for i in range(20)]
    packed = [zlib.compress(warc_record(f"http://x/{i}", page), wbits=31) for i, page in enumerate(pages)]
    which = int(rng.integers(1, 20))
    begin = sum(map(len, packed[:which]))
    damaged = bytearray(b"".join(packed))
    # In the data or in the checksum.
    place = begin + int(rng.integers(10, len(packed[which])))
    damaged[place] ^= 0xFF
    path = tmp_path / "a.warc.gz"
    path.write_bytes(damaged)
    rows, bad = read(path)
    # Damage that looks like a page is noticed behind it, by the checksum.
    assert [row["html"] for row in rows[:which]] == pages[:which]
    assert len(rows) <= which + 1
    (damage,) = [one for one in bad if one.reason.startswith("the file is damaged")]
    assert damage.place in (f"record {which - 1}", f"record {which}")
    # Damaged data may also seem to have no end.
    found = re.search(r"(damaged at|ends in the middle of) .*the gzip member that begins at byte (\d+)", damage.reason)
    assert found is not None
    assert int(found[2]) == begin


def test_an_archive_that_ends_too_early_says_so(tmp_path: Path) -> None:
    """Wherever it ends, but between two records: also in a header, which the library takes for the end."""
    rng = print_seed()
    records = [warc_record(f"http://x/{i}", b"<html>page") for i in range(4)]
    edges = np.cumsum([0, *map(len, records)]).tolist()
    path = tmp_path / "a.warc"
    for end in (*rng.integers(1, edges[-1], 20).tolist(), *edges[1:]):
        path.write_bytes(b"".join(records)[:end])
        rows, bad = read(path)
        whole = sum(edge <= end for edge in edges[1:])
        # The blank lines behind a record are not needed to read it.
        assert len(rows) - whole in ((0,) if end in edges else (0, 1))
        faults = [one.reason.partition(":")[0] for one in bad if not one.skipped]
        assert faults == ([] if end in edges else ["the file is damaged behind this place"])


def test_documents_do_not_depend_on_how_frames_are_cut(tmp_path: Path) -> None:
    """Frames end anywhere in a line, and pieces are cut between them: the same documents, ids and places, each once;
    a place leads to its line."""
    rng = print_seed()
    lines = lines_of(rng, 300)
    ending = "\n" if rng.integers(2) else "\r\n"
    content = ending.join(lines).encode() + b"\n" * int(rng.integers(3))
    frames = frames_of(content, rng, int(rng.integers(2, 12)))
    path = tmp_path / "a.jsonl.zst"
    packed = b"".join(frames)
    path.write_bytes(packed)
    starts = np.cumsum([0, *map(len, frames)]).tolist()
    assert frame_starts(path, zstandard) == starts[:-1]
    whole, bad = read(path)
    assert not bad
    assert [row["text"] for row in whole] == [json.loads(line)["text"] for line in lines]
    assert len({row["id"] for row in whole}) == len(lines)
    for size in (1, *rng.integers(20, max(starts), 5).tolist()):
        assert read(path, size) == (whole, [])
    for row, line in zip(whole, lines, strict=True):
        place = str(row["source"]).rpartition(":")[2]
        found = re.fullmatch(r"byte (\d+)(?: of the frame at byte (\d+))?", place)
        assert found is not None
        begins, at = int(found[2] or 0), int(found[1])
        reader = zstandard.ZstdDecompressor().stream_reader(packed[begins:], read_across_frames=True)
        assert reader.readall()[at:].startswith(line.encode())
