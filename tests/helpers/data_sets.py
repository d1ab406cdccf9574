"""Small data sets, and an independent reader of what lies on the disk."""

import gzip
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from qwen_jax.tokenizer import Tokenizer
from train.data.rows import PackedRows
from train.data.shards import MANIFEST, Manifest, ShardWriter, write_json

WORDS = "the of <|im_end|> été 你好 \t\n\n def return  12,345 x🙂y I'm <|endoftext|> Ω".split(" ")


def random_texts(rng: np.random.Generator, count: int, words: int = 40) -> list[str]:
    """Distinct texts of up to `words` words, some of them with what is hard: other scripts, control tokens, CRLF."""
    return [
        f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, words)).tolist()) + ("\r\n" if i % 7 == 0 else "")
        for i in range(count)
    ]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    """JSON lines; every third one with escapes instead of UTF-8."""
    lines = [json.dumps({"id": i, field: text}, ensure_ascii=i % 3 == 0) for i, text in enumerate(texts)]
    return "\n".join(lines).encode() + b"\n"


def write(path: Path, texts: list[str]) -> Path:
    """Writes documents in the form that the file's name says."""
    name = path.name
    if name.endswith(".parquet"):
        table = pa.table({"id": range(len(texts)), "text": texts})
        pq.write_table(table, path, row_group_size=max(len(texts) // 5, 1))
    elif name.endswith(".gz"):
        # Two members, as `cat a.gz b.gz` makes them.
        half = len(texts) // 2
        path.write_bytes(gzip.compress(jsonl(texts[:half])) + gzip.compress(jsonl(texts[half:])))
    elif name.endswith(".zst"):
        half = len(texts) // 2
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(jsonl(texts[:half])) + compress(jsonl(texts[half:])))
    elif name.endswith(".jsonl"):
        path.write_bytes(jsonl(texts))
    else:
        (text,) = texts
        path.write_bytes(text.encode())
    return path


def documents_on_disk(folder: Path) -> list[list[int]]:
    """The documents of a data set, read by nothing but NumPy and the manifest."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    length = manifest["length"]
    documents: list[list[int]] = []
    for shard in manifest["shards"]:
        tokens = np.fromfile(folder / f"{shard['name']}.tokens", "<u4")
        packed = np.fromfile(folder / f"{shard['name']}.starts", np.uint8).reshape(shard["rows"], -1)
        starts = np.unpackbits(packed, axis=1, bitorder="little")[:, :length].ravel()
        assert len(tokens) == shard["rows"] * length
        assert not tokens[shard["tokens"] :].any()
        assert not starts[shard["tokens"] :].any()
        edges = [*np.flatnonzero(starts).tolist(), shard["tokens"]]
        assert edges[0] == 0
        assert len(edges) - 1 == shard["documents"]
        documents += [tokens[a:b].tolist() for a, b in itertools.pairwise(edges)]
    return documents


def expected_documents(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """What the documents must become: plain text, then end-of-text."""
    return [[*tokenizer.encode(text, parse_special=False), tokenizer.eos_id] for text in texts]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make_rows(
    folder: Path, rng: np.random.Generator, rows: int, length: int, shards: int = 1, tokenizer: str = "t"
) -> PackedRows:
    """A data set of random tokens without text, with about `rows` rows in each shard."""
    folder.mkdir()
    written = []
    for i in range(shards):
        with ShardWriter(folder, f"shard-{i:05d}", length) as writer:
            left = rows * length - int(rng.integers(length))
            while left:
                size = min(int(rng.integers(1, 2 * length)), left)
                writer.add([rng.integers(0, 1000, size).tolist()])
                left -= size
            shard = writer.finish()
        assert shard is not None
        written.append(shard)
    total, tokens = sum(shard.rows for shard in written), sum(shard.tokens for shard in written)
    manifest = Manifest(
        domain=folder.name,
        length=length,
        tokenizer=tokenizer,
        vocab_size=1000,
        end_of_text=0,
        field="text",
        max_document_bytes=1,
        unit_bytes=1,
        rows=total,
        tokens=tokens,
        documents=sum(shard.documents for shard in written),
        padding=1 - tokens / (total * length),
        empty=0,
        bad=0,
        inputs=(),
        shards=tuple(written),
    )
    write_json(folder / MANIFEST, manifest.to_json())
    return PackedRows(folder)


def frames_of(content: bytes, rng: np.random.Generator, count: int) -> list[bytes]:
    """Content in Zstandard frames of any size, with and without checksums; among them skippable and empty ones."""
    edges = sorted(rng.integers(0, len(content) + 1, count - 1).tolist())
    frames = []
    for begin, end in zip([0, *edges], [*edges, len(content)], strict=True):
        compressor = zstandard.ZstdCompressor(write_checksum=bool(rng.integers(2)), write_content_size=False)
        frames.append(compressor.compress(content[begin:end]))
        if rng.random() < 0.3:
            frames.append(struct.pack("<II", 0x184D2A50 + int(rng.integers(16)), 5) + b"extra")
        if rng.random() < 0.3:
            frames.append(zstandard.compress(b""))
    return frames
