"""Duplicates: speed of the features, the probability that a pair is found, and memory of the search.

    python -m experiments.data.deduplicate speed [--megabytes 20]
    python -m experiments.data.deduplicate curve --output experiments/data/duplicates.png
    python -m experiments.data.deduplicate memory --folder /some/disk [--documents 20000000] [--rows-at-once 1000000]

speed: CPU time (all threads) of the features of real documents, the sources and texts of installed Python packages, and
of each part; and of other ways to make MinHash signatures (rensa only if it is installed).

curve: pairs of texts whose exact Jaccard similarity is constructed; the fraction that shares a band, against
1 - (1 - s^r)^b and its binomial interval of 99%.

memory: made features of so many documents, a fifth of them copies of another, and `find_duplicates` on the native
runner in a process of its own, whose peak of resident memory is compared with the size of the features in memory.
"""

import argparse
import importlib
import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from train.curate.deduplicate import DuplicateOptions, find_duplicates
from train.curate.engine import Engine
from train.curate.minhash import MinHash
from train.curate.operators.fingerprint import Fingerprint, Shingles, normalise_text
from train.data.words import runs, split, words


def real_documents(megabytes: float) -> list[str]:
    """Texts of the standard library and of installed packages, of 500 to 200,000 bytes, in the order of their paths."""
    texts, size = [], 0
    for name in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[name]).rglob("*")):
            if path.suffix in (".py", ".md", ".rst", ".txt") and path.is_file() and 500 < path.stat().st_size < 200_000:
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
                size += len(texts[-1].encode())
                if size > megabytes * 1e6:
                    return texts
    return texts


def speed(megabytes: float) -> None:
    """Prints a table of MB/s for one core."""
    texts = real_documents(megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    table = pa.table({"text": pa.array(texts, pa.large_string()), "url": pa.nulls(len(texts), pa.string())})
    strings = [words(text) for text in texts]
    joined = pa.array([" ".join(text) for text in strings], pa.large_string())
    sets = [runs(split([text]).hashes, 5) for text in texts]
    minhash = MinHash()
    daft = importlib.import_module("daft")

    def by_daft() -> None:
        minima = daft.functions.minhash(daft.col("text"), num_hashes=112, ngram_size=5, seed=1)
        batch = daft.recordbatch.RecordBatch.from_pydict({"text": daft.Series.from_arrow(joined)})
        batch.eval_expression_list([minima])

    ways: dict[str, Callable[[], Any]] = {
        "all features (Fingerprint)": lambda: operator(table),
        "words, split and hashed": lambda: [split([text]) for text in texts],
        "normal form of the text": lambda: [normalise_text(text) for text in texts],
        "signatures and bands (`MinHash`)": lambda: [minhash.bands_of(found) for found in sets if len(found)],
        "sets of runs (Shingles), words included": lambda: Shingles().start()(table),
        "words as strings": lambda: [words(text) for text in texts],
        "signatures by Daft, from strings": by_daft,
    }
    try:
        rensa = importlib.import_module("rensa")

        ways["signatures by rensa"] = lambda: rensa.RMinHash.digests_from_token_sets(
            [[" ".join(text[at : at + 5]) for at in range(len(text) - 4)] for text in strings], 112, 1
        )
    except ImportError:
        print("rensa is not installed")
    operator = Fingerprint().start()
    print(f"{len(texts)} documents, {size:.1f} MB\n\n| | MB/s a core |\n|---|---|")
    for name, way in ways.items():
        begin = time.process_time()
        way()
        print(f"| {name} | {size / (time.process_time() - begin):.1f} |")


def curve(output: Path, pairs: int = 2000, size: int = 100) -> None:
    """Draws the fraction of pairs that share a band, and prints it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from scipy.stats import binom

    rng = np.random.default_rng()
    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    x = np.linspace(0.3, 1, 200)
    print(f"{pairs} pairs a point\n\n| bands x rows | similarity | found | theory | interval of 99% |")
    print("|---|---|---|---|---|")
    for color, (bands, rows) in zip(("C0", "C1"), ((14, 8), (20, 5)), strict=True):
        minhash = MinHash(bands, rows)
        theory = minhash.probability(x)  # type: ignore[arg-type]
        low, high = (np.asarray(end) / pairs for end in binom.interval(0.99, pairs, theory))
        axes.plot(x, theory, color, label=f"{bands} bands of {rows}")
        axes.fill_between(x, low, high, color=color, alpha=0.2)
        for similarity in (0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
            shared = round(2 * size * similarity / (1 + similarity))
            exact = shared / (2 * size - shared)
            left, right = [], []
            for _ in range(pairs):
                drawn = [str(word) for word in rng.integers(0, 2**62, shared + 4 + 2 * (size - shared)).tolist()]
                begin, first, second = np.split(np.asarray(drawn), [shared + 4, shared + 4 + size - shared])
                left.append(" ".join([*begin, *first]))
                right.append(" ".join([*begin, *second]))
            one, other = (
                np.stack([minhash.bands_of(runs(split([text]).hashes, 5)) for text in texts]) for texts in (left, right)
            )
            found = float((one == other).any(1).mean())
            ends = [end / pairs for end in binom.interval(0.99, pairs, minhash.probability(exact))]
            expected = minhash.probability(exact)
            interval = f"{ends[0]:.4f} to {ends[1]:.4f}"
            print(f"| {bands} x {rows} | {exact:.3f} | {found:.4f} | {expected:.4f} | {interval} |", flush=True)
            axes.plot(exact, found, color + "o", markersize=4)
    axes.set(xlabel="Jaccard similarity of the runs of 5 words", ylabel="pairs that share a band", ylim=(0, 1.02))
    axes.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=130)


def make_features(folder: Path, documents: int) -> int:
    """Writes features in shards of 500,000 documents; returns their bytes in memory."""
    rng, size, bands = np.random.default_rng(0), 500_000, 14
    folder.mkdir(parents=True, exist_ok=True)
    factors = np.arange(3, 3 + 2 * bands, 2, dtype=np.uint64)
    total = 0
    for shard in range(-(-documents // size)):
        # A fifth has a key of a small pool; a band of the others is the same with a probability of 0.7.
        pool = rng.integers(0, documents // 10, size)
        own = documents + shard * size + np.arange(size)
        key = np.where(rng.random(size) < 0.2, pool, own).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        other = rng.integers(0, 2**64, (size, bands), dtype=np.uint64)
        keys = np.where(rng.random((size, bands)) < 0.3, other, key[:, None] * factors)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(keys.reshape(-1)), bands)
        table = pa.table(
            {
                "shard": np.full(size, shard),
                "row": np.arange(size),
                "id": pa.array([f"document-{shard}-{row}" for row in range(size)]),
                "domain": pa.array(["web"] * size),
                "text_length": rng.integers(1, 20000, size),
                "text_key": key,
                "url_key": rng.integers(0, 2**64, size, dtype=np.uint64),
                "bands": lists.cast(pa.list_(pa.uint64())),
            }
        )
        total += table.nbytes
        pq.write_table(table, folder / f"{shard:05d}.parquet", compression="zstd", row_group_size=100_000)
    return total


def memory(folder: Path, documents: int, rows_at_once: int, near: bool) -> None:
    """Prints peak and size."""
    size = make_features(folder / "features", documents)
    print(f"{documents} documents, features {size / 1e6:.0f} MB in memory")
    command = [sys.executable, "-m", "experiments.data.deduplicate", "search", "--folder", str(folder)]
    command += ["--rows-at-once", str(rows_at_once), *(["--near"] if near else [])]
    begin = time.perf_counter()
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    seconds = time.perf_counter() - begin
    print(json.dumps({**result, "seconds": round(seconds), "data / peak": round(size / result["peak_bytes"], 2)}))


def search(folder: Path, rows_at_once: int, near: bool) -> None:
    """Finds duplicates in this process and prints its peak of resident memory."""
    _ = Engine("native").daft
    options = DuplicateOptions(near=near, rows_at_once=rows_at_once)
    found = find_duplicates(sorted((folder / "features").glob("*.parquet")), folder / "tables", options)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    cpu = round(time.process_time())
    counts = {"removed": found.removed, "groups": found.clusters, "edges": found.edges, "rounds": found.rounds}
    print(json.dumps({**counts, "peak_bytes": peak, "cpu_seconds": cpu}))


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "curve", "memory", "search"))
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--output", type=Path, default=Path("duplicates.png"))
    parser.add_argument("--folder", type=Path, default=Path("duplicates"))
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--rows-at-once", type=int, default=1_000_000)
    parser.add_argument("--near", action="store_true", help="also MinHash bands, which take longest")
    args = parser.parse_args()
    if args.what == "speed":
        speed(args.megabytes)
    elif args.what == "curve":
        curve(args.output)
    elif args.what == "memory":
        memory(args.folder, args.documents, args.rows_at_once, args.near)
    else:
        search(args.folder, args.rows_at_once, args.near)


if __name__ == "__main__":
    main()
