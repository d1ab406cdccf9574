"""Engines for curation, side by side: one small pipeline on Daft (native and Ray), Ray Data, and DuckDB as the oracle.

    python -m experiments.data.engines --folder /some/disk [--megabytes 12] [--engines duckdb native ray ray-data]

The pipeline: a map over batches (features of duplicates, and a score by a JAX function that each worker compiles once);
documents with the same text or a common MinHash band, connected components; a join by key that leaves one of each
group; weighted sampling by a hash of the id; Parquet in shards. Documents: pieces of the sources and texts of installed
Python packages with copies, some of them with another word. Each engine runs in a process of its own with two workers.
Peak memory is the proportional set size of all its processes together, sampled. A digest of the sorted ids of the
output says whether engines agree. `--kill SECONDS` kills each engine after that time and starts it again.

Needs psutil; duckdb for the oracle, and pandas and polars for Ray Data.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.data.deduplicate import real_documents
from train.curate.deduplicate import find_duplicates
from train.curate.operators.fingerprint import Fingerprint

WEIGHTS = {"even": 0.9, "odd": 0.5}
FEATURES = pa.schema(
    [*Fingerprint.makes, pa.field("score", pa.float32()), pa.field("draw", pa.float64())],
)
_KINDS = ["text_key", *(f"band_{band:02d}" for band in range(14))]


class Scorer:
    """Features, and a score by a function that is compiled once: a stand-in for a model."""

    def __init__(self) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax
        import jax.numpy as jnp

        weights = jax.random.normal(jax.random.key(0), (256, 512)) / 16
        self._score = jax.jit(lambda counts: jnp.tanh(counts @ weights).mean(1))
        self._compute = Fingerprint().start()

    def table(self, table: pa.Table) -> pa.Table:
        """The columns `FEATURES` of a table with the columns id, text and url."""
        made = self._compute(table.select(["text", "url"]))
        counts = [np.bincount(np.frombuffer(t.encode(), np.uint8), minlength=256) for t in table["text"].to_pylist()]
        scores = []
        for begin in range(0, len(counts), 128):
            batch = np.zeros((128, 256), np.float32)
            batch[: len(counts[begin : begin + 128])] = counts[begin : begin + 128]
            scores += np.asarray(self._score(batch / 4000)).tolist()[: len(counts) - begin]
        digests = [hashlib.blake2b(name.encode(), digest_size=6).digest() for name in table["id"].to_pylist()]
        draws = [int.from_bytes(digest, "big") / 2**48 for digest in digests]
        made = made.append_column("score", pa.array(scores, pa.float32()))
        return made.append_column("draw", pa.array(draws, pa.float64())).cast(FEATURES)


def make_input(folder: Path, megabytes: float) -> int:
    """Writes documents in 8 files; returns how many."""
    rng, pieces = np.random.default_rng(0), []
    for text in real_documents(megabytes):
        pieces += [text[begin : begin + 4000] for begin in range(0, len(text), 4000)]
    copies = [pieces[number] for number in rng.integers(0, len(pieces), len(pieces) // 5)]
    near = [" ".join([*pieces[number].split(), "end"]) for number in rng.integers(0, len(pieces), len(pieces) // 5)]
    texts = [(pieces + copies + near)[number] for number in rng.permutation(len(pieces) + len(copies) + len(near))]
    folder.mkdir(parents=True)
    for shard in range(8):
        part = texts[shard::8]
        table = {
            "shard": pa.array([shard] * len(part), pa.int64()),
            "row": pa.array(range(len(part)), pa.int64()),
            "id": [f"{shard}-{row}" for row in range(len(part))],
            "domain": ["odd" if shard % 2 else "even"] * len(part),
            "text": pa.array(part, pa.large_string()),
            "url": pa.nulls(len(part), pa.string()),
        }
        pq.write_table(pa.table(table), folder / f"{shard}.parquet", row_group_size=256)
    return len(texts)


def daft_pipeline(folder: Path, runner: str) -> None:
    """On Daft."""
    from train.curate.engine import Engine

    engine = Engine(runner, workers=2)  # type: ignore[arg-type]
    daft = engine.daft
    col = daft.col
    source = str(folder.parent / "input" / "*.parquet")
    fields = {field.name: daft.DataType.from_arrow_type(field.type) for field in FEATURES}

    class Worker:
        def __init__(self) -> None:
            self._scorer = Scorer()

        @daft.method.batch(return_dtype=daft.DataType.struct(fields), batch_size=256)
        def features(self, name: Any, text: Any, url: Any) -> Any:
            table = pa.table({"id": name.to_arrow(), "text": text.to_arrow(), "url": url.to_arrow()})
            return self._scorer.table(table).to_struct_array().combine_chunks()

    begin = time.perf_counter()
    features = folder / "features"
    if not features.exists():
        # Daft would add to the files that a killed process has left.
        shutil.rmtree(folder / "features.tmp", ignore_errors=True)
        worker = daft.cls(Worker, use_process=True, max_concurrency=2)()
        read = daft.read_parquet(source)
        made = read.select(
            "shard", "row", "id", "domain", worker.features(col("id"), col("text"), col("url")).alias("f")
        )
        columns = [col("f").get(name).alias(name) for name in fields]
        made.select("shard", "row", "id", "domain", *columns).write_parquet(str(folder / "features.tmp"))
        (folder / "features.tmp").rename(features)
    say("map", begin)
    found = find_duplicates(sorted(features.glob("*.parquet")), folder / "tables")
    say(f"duplicates in {found.rounds} rounds", begin)
    removed = daft.read_parquet(found.files).select("shard", "row")
    chosen = daft.read_parquet(str(features / "*.parquet")).select("shard", "row", "domain", "score", "draw")
    chosen = chosen.join(removed, on=["shard", "row"], how="anti")
    weight = daft.functions.when(col("domain") == "odd", WEIGHTS["odd"]).otherwise(WEIGHTS["even"])
    chosen = chosen.where(col("draw") < weight).select("shard", "row", "score")
    texts = daft.read_parquet(source).join(chosen, on=["shard", "row"])
    texts.write_parquet(str(folder / "output"), write_mode="overwrite")
    say("join and write", begin)


def duckdb_pipeline(folder: Path) -> None:
    """A pool of two processes and DuckDB: other code for everything but the features."""
    duckdb = importlib.import_module("duckdb")

    begin = time.perf_counter()
    (folder / "features").mkdir(exist_ok=True)
    jobs = [(path, folder / "features" / path.name) for path in sorted((folder.parent / "input").glob("*.parquet"))]
    with get_context("spawn").Pool(2) as pool:
        pool.map(_features_of, [job for job in jobs if not job[1].exists()], chunksize=1)
    say("map", begin)
    base = duckdb.connect()
    base.execute(f"set memory_limit = '400MB'; set temp_directory = '{folder}/spill'; set threads = 2")
    base.execute(f"create view f as select *, shard * 4294967296 + row as node from '{folder}/features/*.parquet'")
    base.execute(
        "create table e as with k as (select node, text_key as key from f where text_key is not null union all "
        "select node, unnest(bands) as key from f), m as (select node, min(node) over (partition by key) as least "
        "from k) select distinct node, least from m where node <> least"
    )
    # Labels of neighbours until nothing changes: simpler than stars, and slower on chains.
    base.execute("create table b as select node as a, least as b from e union all select least, node from e")
    base.execute("create table l as select distinct a as node, a as label from b")
    while True:
        base.execute(
            "create or replace table n as select l.node, least(min(l.label), min(o.label)) as label from l "
            "join b on l.node = b.a join l o on o.node = b.b group by l.node"
        )
        (moved,) = base.execute("select count(*) from l join n using (node) where l.label <> n.label").fetchall()[0]
        base.execute("create or replace table l as select * from n")
        if not moved:
            break
    say("duplicates", begin)
    # The survivor by length alone, then by our hash: its document is the one that the other engines keep.
    hashes = _hashes([row[0] for row in base.execute("select id from f order by node").fetchall()])
    nodes = np.asarray([row[0] for row in base.execute("select node from f order by node").fetchall()])
    base.register("h", pa.table({"node": nodes, "hash": hashes}))
    base.execute(
        "create table gone as select node from (select l.node, row_number() over (partition by label order by "
        "text_length desc, h.hash, l.node) as place from l join f using (node) join h using (node)) where place > 1"
    )
    weight = f"case when i.domain = 'odd' then {WEIGHTS['odd']} else {WEIGHTS['even']} end"
    base.execute(
        f"copy (select i.*, f.score from '{folder.parent}/input/*.parquet' i join f using (shard, row) where f.node "
        f"not in (select node from gone) and f.draw < ({weight})) to '{folder}/output' "
        "(format parquet, per_thread_output true, overwrite true)"
    )
    say("join and write", begin)


def _features_of(job: tuple[Path, Path]) -> None:
    source, path = job
    table = pq.read_table(source)
    made = Scorer().table(table)
    for name in ("shard", "row", "id", "domain"):
        made = made.append_column(name, table[name])
    pq.write_table(made, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def _hashes(ids: list[str]) -> pa.Array:
    """Daft's hash of texts, which decides among documents of the same length."""
    import daft

    return daft.Series.from_pylist(ids).hash().to_arrow().cast(pa.uint64())


def ray_pipeline(folder: Path) -> None:
    """On Ray Data: aggregations and joins, since a Python call for each group takes longer."""
    import ray
    from ray.data.aggregate import Count, Min

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    begin = time.perf_counter()

    class Worker:
        def __init__(self) -> None:
            self._scorer = Scorer()

        def __call__(self, table: pa.Table) -> pa.Table:
            made = self._scorer.table(table)
            for name in ("shard", "row", "id", "domain"):
                made = made.append_column(name, table[name])
            node = pa.array(np.asarray(table["shard"]) * 2**32 + np.asarray(table["row"]), pa.int64())
            return made.append_column("node", node)

    # Actors that take all cores would leave none to the tasks that read.
    read = ray.data.read_parquet(str(folder.parent / "input"))
    features = read.map_batches(
        Worker, batch_format="pyarrow", batch_size=256, concurrency=2, num_cpus=0.5
    ).materialize()
    say("map", begin)

    def keys(table: pa.Table) -> pa.Table:
        lists = [
            [text, *(bands or [])]
            for text, bands in zip(*(table[n].to_pylist() for n in ("text_key", "bands")), strict=True)
        ]
        nodes = np.repeat(np.asarray(table["node"]), [len(one) for one in lists])
        flat = np.asarray([key or 0 for one in lists for key in one], np.uint64).view(np.int64)
        return pa.table({"node": nodes[flat != 0], "key": flat[flat != 0]})

    def least_by(data: Any, key: str, value: str) -> Any:
        return data.groupby(key).aggregate(Min(value, alias_name="found"))

    def join(left: Any, right: Any, on: str, right_on: str, kind: str = "inner") -> Any:
        return left.join(right, kind, num_partitions=2, on=(on,), right_on=(right_on,))

    exploded = features.map_batches(keys, batch_format="pyarrow").materialize()
    groups = exploded.groupby("key").aggregate(Min("node", alias_name="found"), Count(alias_name="count"))
    groups = groups.filter(expr="count > 1").drop_columns(["count"])
    # Each shuffle has actors of its own: three in one plan want more cores than there are.
    edges = join(exploded, groups, "key", "key").filter(expr="node != found").materialize()
    edges = edges.groupby(["node", "found"]).aggregate(Count(alias_name="count"))
    edges = edges.drop_columns(["count"]).rename_columns({"found": "least"}).materialize()
    rounds = 0
    while True:
        rounds += 1

        def large(table: pa.Table) -> pa.Table:
            found = pa.compute.coalesce(table["found"], table["least"])
            moved = pa.compute.not_equal(found, table["least"])
            return pa.table({"node": table["node"], "least": found, "moved": moved.cast(pa.int64())})

        def small(table: pa.Table) -> pa.Table:
            node, least, found = (np.asarray(table[name]) for name in ("node", "least", "found"))
            other = least != found
            moved = np.concatenate([np.asarray(table["moved"]) | other, other[other]]).astype(np.int64)
            nodes = np.concatenate([node, least[other]])
            return pa.table({"node": nodes, "least": np.concatenate([found, found[other]]), "moved": moved})

        lesser = least_by(edges, "node", "least").rename_columns({"node": "of"})
        moved = (
            join(edges, lesser, "least", "of", "left_outer").map_batches(large, batch_format="pyarrow").materialize()
        )
        lesser = least_by(moved, "node", "least").rename_columns({"node": "of"})
        moved = join(moved, lesser, "node", "of").map_batches(small, batch_format="pyarrow").materialize()
        changed = moved.sum("moved")
        edges = (
            moved.groupby(["node", "least"]).aggregate(Count(alias_name="count")).drop_columns(["count"]).materialize()
        )
        say(f"round {rounds}", begin)
        if not changed:
            break
    stars = edges.to_pandas()
    # The choice within groups is made in this process.
    labels = {**{n: n for n in stars["least"]}, **dict(zip(stars["node"], stars["least"], strict=True))}
    columns = features.select_columns(["node", "text_length", "id"]).to_pandas()
    columns["hash"] = _hashes(columns["id"].tolist()).to_numpy()
    members = columns[columns["node"].isin(list(labels))].copy()
    members["group"] = members["node"].map(labels)
    members = members.sort_values(["group", "text_length", "hash"], ascending=[True, False, True])
    gone = ray.data.from_pandas(members[members.duplicated("group")][["node"]])
    say(f"duplicates in {rounds} rounds", begin)
    kept = join(features.select_columns(["node", "id", "domain", "score", "draw"]), gone, "node", "node", "left_anti")
    kept = kept.filter(lambda row: row["draw"] < WEIGHTS[row["domain"]]).select_columns(["id", "score"])
    join(read, kept, "id", "id").write_parquet(str(folder / "output"))
    say("join and write", begin)


def say(what: str, begin: float) -> None:
    """Prints how long it took until now."""
    print(f"  {what}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)


def memory_of(process: Any) -> float:
    """Proportional set size of a process and its descendants, in MB."""
    psutil = importlib.import_module("psutil")

    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    return total


def measure(engine: str, folder: Path, kill_after: float | None = None) -> tuple[float, float]:
    """Runs an engine; returns seconds and peak memory. It and all it has started are killed after a time, if given."""
    psutil = importlib.import_module("psutil")

    command = [sys.executable, "-m", "experiments.data.engines", "--folder", str(folder.parent), "--run", engine]
    environment = {**os.environ, "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    begin, peak = time.perf_counter(), 0.0
    running = psutil.Popen(command, env=environment)
    while running.poll() is None:
        try:
            peak = max(peak, memory_of(running))
        except psutil.NoSuchProcess:
            break
        if kill_after is not None and time.perf_counter() - begin > kill_after:
            for one in [*running.children(recursive=True), running]:
                one.send_signal(signal.SIGKILL)
        time.sleep(0.2)
    if running.wait() and kill_after is None:
        raise SystemExit(f"{engine} failed")
    return time.perf_counter() - begin, peak


def digest(folder: Path) -> tuple[int, str]:
    """How many documents an output has, and a digest of their ids."""
    paths = sorted((folder / "output").rglob("*.parquet"))
    tables = [pq.ParquetFile(path).read(columns=["id"]) for path in paths]
    ids = sorted(name for table in tables for name in table["id"].to_pylist())
    return len(ids), hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("engines"))
    parser.add_argument("--megabytes", type=float, default=12)
    parser.add_argument("--engines", nargs="+", default=["duckdb", "native", "ray", "ray-data"])
    parser.add_argument("--kill", type=float)
    parser.add_argument("--run")
    args = parser.parse_args()
    if args.run:
        folder = args.folder / args.run
        folder.mkdir(parents=True, exist_ok=True)
        if args.run in ("native", "ray"):
            daft_pipeline(folder, args.run)
        else:
            {"duckdb": duckdb_pipeline, "ray-data": ray_pipeline}[args.run](folder)
        return
    args.folder = args.folder.absolute()
    shutil.rmtree(args.folder / "input", ignore_errors=True)
    print(f"{make_input(args.folder / 'input', args.megabytes)} documents; load {os.getloadavg()[0]:.1f}")
    for engine in args.engines:
        shutil.rmtree(args.folder / engine, ignore_errors=True)
        killed = ""
        if args.kill is not None:
            measure(engine, args.folder / engine, args.kill)
            killed = f" after a kill at {args.kill} s"
        seconds, peak = measure(engine, args.folder / engine)
        count, ids = digest(args.folder / engine)
        print(f"| {engine}{killed} | {seconds:.1f} s | {peak:.0f} MB | {count} documents, ids {ids} |", flush=True)


if __name__ == "__main__":
    main()
