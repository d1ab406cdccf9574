"""Speed of the input: how fast rows come from the disk as batches, and how fast text becomes rows.

    python -m experiments.data.benchmark --directory /some/disk [--tokenizer DIR] [--megatokens 200] [--json out.json]

Reading: `Mixture.loader` mixes two data sets of random tokens (documents of 10 to 10,000 tokens) 2:1, and every batch
is read and dropped. Warm means that the files are in the page cache, cold that they were removed from it. Expected:
well above 120,000 tokens/s, ten times what one host needs to train a 7B model.

Building, with --tokenizer: the sources of Python's standard library, cut into documents of 4,000 characters and
repeated, are built by the function of `qwen-jax data build` in a new process for each row of the table.
"""

import argparse
import dataclasses
import gzip
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from train.data.mixture import Mixture, MixtureStage
from train.data.rows import PackedRows
from train.data.shards import MANIFEST, Manifest, ShardWriter, write_json

# A script rather than a function: worker processes import the main module, and this module imports JAX.
_BUILD = """
import io, json, resource, sys, time
from pathlib import Path
from rich.console import Console
from train.data.build import BuildConfig, build
if __name__ == "__main__":
    source, tokenizer, output, workers = sys.argv[1:]
    config = BuildConfig((source,), Path(tokenizer), 4096, Path(output), workers=int(workers), unit_megabytes=8)
    begin = time.perf_counter()
    manifest = build(config, progress=Console(file=io.StringIO()))
    seconds = time.perf_counter() - begin
    # ru_maxrss of this process would include the memory of its parent; that of its children does not.
    own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    peak = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e6
    print(json.dumps({"seconds": seconds, "tokens": manifest.tokens, "padding": manifest.padding, "peak_gb": peak}))
"""


def make_rows(folder: Path, tokens: int, length: int, seed: int) -> PackedRows:
    """A data set of random tokens, in shards of about 64 MB."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    shards = []
    for i in range(-(-tokens // 2**24)):
        with ShardWriter(folder, f"shard-{i:05d}", length) as writer:
            left = 2**24
            while left > 0:
                sizes = np.minimum(np.exp(rng.uniform(np.log(10), np.log(10_000), 2000)).astype(int), left)
                writer.add(np.split(rng.integers(0, 151_665, sizes.sum()), np.cumsum(sizes)[:-1]))  # type: ignore[arg-type]
                left -= int(sizes.sum())
            shard = writer.finish()
        assert shard is not None
        shards.append(shard)
    rows, total = sum(shard.rows for shard in shards), sum(shard.tokens for shard in shards)
    manifest = Manifest(
        domain=folder.name, length=length, tokenizer="random", vocab_size=151_665, end_of_text=0, field="text",
        max_document_bytes=1, unit_bytes=2**24, rows=rows, tokens=total, padding=1 - total / (rows * length),
        documents=sum(shard.documents for shard in shards), empty=0, bad=0, inputs=(), shards=tuple(shards),
    )  # fmt: skip
    write_json(folder / MANIFEST, manifest.to_json())
    return PackedRows(folder)


def forget(folder: Path) -> None:
    """Removes the files from the page cache."""
    for path in folder.rglob("shard-*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_speed(datasets: dict[str, PackedRows], length: int, batch_tokens: int, threads: int) -> float:
    """Tokens per second of one epoch."""
    batch = max(batch_tokens // length, 1)
    steps = sum(map(len, datasets.values())) // batch
    mixture = Mixture([MixtureStage(steps, batch, length, {"a": 2, "b": 1})], datasets, 0)
    begin, tokens = time.perf_counter(), 0
    for step in mixture.loader(threads=threads):
        tokens += step.tokens.size
    return tokens / (time.perf_counter() - begin)


def reading(directory: Path, megatokens: int) -> list[dict[str, Any]]:
    """Measures reading at every length, with and without reading threads, warm and cold."""
    table = []
    for length in (4096, 32_768, 262_144):
        folder = Path(tempfile.mkdtemp(dir=directory))
        try:
            datasets = {name: make_rows(folder / name, megatokens * 500_000, length, i) for i, name in enumerate("ab")}
            for threads in (0, 1, 2):
                speeds = {}
                for state in ("cold", "warm"):
                    if state == "cold":
                        for name in "ab":
                            datasets[name] = PackedRows(folder / name)
                        forget(folder)
                    speeds[state] = read_speed(datasets, length, 2**19, threads)
                table.append({"length": length, "threads": threads, **speeds})
        finally:
            shutil.rmtree(folder)
    return table


def write_text(folder: Path, suffix: str, repeats: int) -> int:
    """Writes the standard library as documents; returns the number of bytes of text."""
    from train.data.text import read_documents, standard_library

    texts = read_documents(standard_library(), 10**9).texts
    pieces = [text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)] * repeats
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": pieces})
        pyarrow.parquet.write_table(table, folder / "text.parquet", row_group_size=2000)
    else:
        lines = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces).encode()
        content = gzip.compress(lines, 6) if suffix == "jsonl.gz" else lines
        (folder / f"text.{suffix}").write_bytes(content)
    return sum(len(piece.encode()) for piece in pieces)


def building(directory: Path, tokenizer: Path, repeats: int) -> list[dict[str, Any]]:
    """Measures builds of several formats, with one process and with one for each core."""
    table = []
    for suffix, workers in (("jsonl", 1), ("jsonl", os.cpu_count() or 1), ("jsonl.gz", 1), ("parquet", 1)):
        folder = Path(tempfile.mkdtemp(dir=directory))
        try:
            (folder / "in").mkdir()
            num_bytes = write_text(folder / "in", suffix, repeats)
            arguments = [str(folder / "in"), str(tokenizer), str(folder / "out"), str(workers)]
            done = subprocess.run(
                [sys.executable, "-c", _BUILD, *arguments],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            result = json.loads(done.stdout)
            result["mb_per_second"] = num_bytes / 1e6 / result["seconds"]
            table.append({"format": suffix, "workers": workers, "megabytes": num_bytes / 1e6, **result})
        finally:
            shutil.rmtree(folder)
    return table


@dataclasses.dataclass(frozen=True)
class Report:
    """The measurements, and the versions of packages."""

    versions: dict[str, str]
    reading: list[dict[str, Any]]
    building: list[dict[str, Any]]


def main() -> None:
    """Measures, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer; without it nothing is built")
    parser.add_argument("--megatokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=6, help="of the standard library's 10 MB")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("numpy", "grain", "tokenizers", "pyarrow")}
    built = building(options.directory, options.tokenizer, options.repeats) if options.tokenizer else []
    report = Report(versions, reading(options.directory, options.megatokens), built)
    print(" ".join(f"{name} {version}" for name, version in versions.items()))
    print("\n| length | threads | cold Mtokens/s | warm Mtokens/s |\n|---|---|---|---|")
    for row in report.reading:
        print(f"| {row['length']} | {row['threads']} | {row['cold'] / 1e6:.1f} | {row['warm'] / 1e6:.1f} |")
    if built:
        print("\n| format | workers | MB | seconds | MB/s | Mtokens/s | padding | peak |\n" + "|---" * 8 + "|")
    for row in built:
        print(
            f"| {row['format']} | {row['workers']} | {row['megabytes']:.0f} | {row['seconds']:.1f} | "
            f"{row['mb_per_second']:.1f} | {row['tokens'] / row['seconds'] / 1e6:.2f} | {row['padding']:.2%} | "
            f"{row['peak_gb']:.2f} GB |"
        )
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
