"""Duplicates in a whole corpus: the same text or address, or nearly the same words; one of each group is kept."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwen_jax.errors import InputError
from train.curate.components import connected_components
from train.curate.passes import Tables, count_rows, load_daft, part, passes_for

FEATURES = pa.schema(
    [
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("text_length", pa.int64(), nullable=False),
        pa.field("text_key", pa.uint64()),
        pa.field("url_key", pa.uint64()),
        pa.field("bands", pa.list_(pa.uint64())),
    ]
)
"""What `find_duplicates` reads: a document's key, its id and domain, and what `Fingerprint` makes."""

DUPLICATES = pa.schema(
    [
        pa.field("shard", pa.int64()),
        pa.field("row", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("kept_id", pa.string()),
        pa.field("cluster_size", pa.int64()),
    ]
)
"""What it writes, one row for each document that is not kept, in the order of shard and row.

reason: "exact duplicate", "same URL" or "near duplicate" of the document that is kept of its group; a near duplicate
may be connected with it through other documents. kept_id: id of that document. cluster_size: documents of the group,
the kept one among them.
"""

# A key of a document in the graph is shard * 2^32 + row. Lengths of 2^48 and more count as the same.
_ROWS = 2**32
_LONGEST = 2**48
# Documents of a band before it that one is compared with: of small groups all pairs, of huge ones a bounded number.
_COMPARED = 8


@dataclasses.dataclass(frozen=True)
class DuplicateOptions:
    """What counts as a duplicate, and which one is kept.

    Attributes:
      text: documents with the same text in normal form are duplicates.
      url: documents with the same address in normal form are duplicates.
      near: documents that share a MinHash band are duplicates.
      similarity: documents that share a band only count if the Jaccard similarity of their runs of words is at least
        this; each is compared with the first document that has the same band, and the 8 before it. None: the band is
        enough. Needs the column that `Shingles` makes.
      domains: documents of the first are kept before those of later ones, and these before all other domains.
      rows_at_once: keys that a step holds in memory, each some 150 bytes; more are worked on in several passes. The
        result does not depend on it.
    """

    text: bool = True
    url: bool = True
    near: bool = True
    similarity: float | None = None
    domains: tuple[str, ...] = ()
    rows_at_once: int = 20_000_000

    def __post_init__(self) -> None:
        if not (self.text or self.url or self.near):
            raise InputError("Nothing counts as a duplicate: set one of text, url and near.")
        if self.similarity is not None and not (self.near and 0 < self.similarity <= 1):
            raise InputError(f"similarity must be above 0 and at most 1, with near set, got {self.similarity}.")
        if len(set(self.domains)) != len(self.domains):
            raise InputError(f"A domain is named twice in {', '.join(self.domains)}.")
        if self.rows_at_once < 1:
            raise InputError(f"rows_at_once must be at least 1, got {self.rows_at_once}.")


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """What `find_duplicates` found.

    Attributes:
      files: Parquet files with the columns of `DUPLICATES`, in order.
      documents: that were looked at.
      removed: those of them that are not kept.
      clusters: groups of duplicates.
      edges: pairs of documents from which the groups come.
      candidates: pairs that share a band, before their similarity was computed; None if it was not computed.
      rounds: of large-star and small-star.
    """

    files: list[str]
    documents: int
    removed: int
    clusters: int
    edges: int
    candidates: int | None
    rounds: int


def find_duplicates(features: Sequence[Path], folder: Path, options: DuplicateOptions | None = None) -> Duplicates:
    """Finds all duplicates of a corpus with the engine that is set: Daft's native runner or Ray.

    Documents with the same key are connected with the first of them (by shard and row), not in pairs, so that a group
    of n takes n - 1 edges. Groups are the connected components: two documents of a group need not be similar if others
    lie between them. The document with the least (place of its domain, -text_length, hash of its id, shard, row) is
    kept: of the preferred domain, then the longest, then an arbitrary one, the same on every machine and for every
    number of workers. Texts are not read.

    Args:
      features: Parquet files with the columns of `FEATURES`, and "shingles" if the options ask for similarity.
      folder: for tables; on a cluster all machines see it. After a kill, what is complete there is not computed again.
        Tables of other features or options are removed.
      options: by default those of `DuplicateOptions`.

    Raises:
      InputError: the engine is not installed, or a column is missing or of another type.
    """
    options = options or DuplicateOptions()
    files, bands = _checked(features, options)
    tables = Tables(folder, {**_identity(files), **dataclasses.asdict(options)})
    documents = count_rows(files)

    # Narrow columns, so that a step reads only its own.
    passes = min(len(files), passes_for(documents, options.rows_at_once))
    nodes = tables.make("nodes", lambda number, of: _nodes(files[number::of], bands, options), passes)

    # Edges: documents with the same key. Where there are few documents, one pass takes all kinds of keys.
    kinds = [*["text"] * options.text, *["url"] * options.url]
    near = [f"band_{band:03d}" for band in range(bands)]
    edges = _edges(tables, nodes, kinds if options.similarity is not None else kinds + near, documents, options)
    candidates = None
    if options.similarity is not None:
        found = _edges(tables, nodes, near, documents, options, "candidates", _COMPARED)
        pairs, similar = _similar(tables, found, files, options)
        candidates = count_rows(pairs)
        edges += similar

    # Groups, and the document of each that is kept.
    components = connected_components(edges, Tables(folder / "components", {}), options.rows_at_once)
    passes = passes_for(documents, options.rows_at_once)
    members = tables.make("members", lambda number, of: _members(components.stars, nodes, number, of), passes)
    # Rows of members are wider than keys.
    passes = passes_for(4 * count_rows(members), options.rows_at_once)
    chosen = tables.make("chosen", lambda number, of: _chosen(members, number, of), passes)

    # In the order of shard and row, in parts by ranges of shards.
    greatest = load_daft().read_parquet(nodes).agg(load_daft().col("node").max()).to_pydict()["node"][0]
    shards = 1 + (greatest or 0) // _ROWS
    result = tables.make("duplicates", lambda number, of: _ordered(chosen, shards, number, of), min(passes, shards))
    removed = count_rows(result)
    return Duplicates(
        # A pass may write several files, which have random names.
        files=sorted(result, key=_first_key),
        documents=documents,
        removed=removed,
        clusters=count_rows(chosen) - removed,
        edges=count_rows(edges),
        candidates=candidates,
        rounds=components.rounds,
    )


def _checked(features: Sequence[Path], options: DuplicateOptions) -> tuple[list[str], int]:
    """The files as texts, and how many bands they have."""
    needed = {field.name: field.type for field in FEATURES}
    if options.similarity is not None:
        needed["shingles"] = pa.list_(pa.uint32())
    bands = set()
    for path in features:
        with pq.ParquetFile(path) as file:
            has = {field.name: field.type for field in file.schema_arrow}
            wrong = [name for name, kind in needed.items() if not _alike(has.get(name), kind)]
            if wrong:
                raise InputError(
                    f"{path} needs the columns {', '.join(f'{name} ({needed[name]})' for name in wrong)}. "
                    f"They come from the operators Fingerprint and, for similarity, Shingles."
                )
            for batch in file.iter_batches(columns=["bands"]):
                lengths = pc.unique(pc.list_value_length(batch.column(0))).drop_null().to_pylist()
                bands.update(lengths)
                if lengths:
                    break
    if len(bands) > 1:
        raise InputError(
            f"Documents have {', '.join(map(str, sorted(bands)))} bands: make them all by the same settings."
        )
    return [str(path) for path in features], bands.pop() if bands and options.near else 0


def _identity(files: Sequence[str]) -> dict[str, Any]:
    stats = [Path(file).stat() for file in files]
    return {"files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]}


def _alike(has: pa.DataType | None, needed: pa.DataType) -> bool:
    if has is None:
        return False
    if pa.types.is_list(needed):
        return (pa.types.is_list(has) or pa.types.is_large_list(has)) and has.value_type == needed.value_type
    if pa.types.is_string(needed):
        return pa.types.is_string(has) or pa.types.is_large_string(has)
    return has.equals(needed) or (pa.types.is_integer(has) and needed == pa.int64() and has != pa.uint64())


def _node() -> Any:
    daft = load_daft()
    whole = daft.DataType.uint64()
    return daft.col("shard").cast(whole) * daft.lit(_ROWS).cast(whole) + daft.col("row").cast(whole)


def _nodes(files: Sequence[str], bands: int, options: DuplicateOptions) -> Any:
    """One row a document: node, precedence (the less, the sooner it is kept), id, a column for each kind of key."""
    daft = load_daft()
    col = daft.col
    place = daft.lit(len(options.domains))
    for number, domain in reversed(list(enumerate(options.domains))):
        place = daft.functions.when(col("domain") == domain, daft.lit(number)).otherwise(place)
    most = daft.lit(_LONGEST - 1)
    length = daft.functions.when(col("text_length") > most, most).otherwise(col("text_length"))
    precedence = place.cast(daft.DataType.int64()) * daft.lit(_LONGEST) + most - length
    keys = [col("bands").get(band).alias(f"band_{band:03d}") for band in range(bands)]
    read = daft.read_parquet(list(files))
    named = [col("text_key").alias("text"), col("url_key").alias("url"), *keys]
    return read.select(_node().alias("node"), precedence.alias("precedence"), "id", *named)


def _edges(
    tables: Tables,
    nodes: Sequence[str],
    kinds: Sequence[str],
    documents: int,
    options: DuplicateOptions,
    name: str = "edges",
    compared: int = 0,
) -> list[str]:
    """Connects documents with the same key with the first of them, and with so many before it as are to be compared.

    The tables have the columns node and least.
    """
    daft = load_daft()
    col = daft.col
    if not kinds:
        # No document has words enough for a band: a table without rows.
        none = daft.read_parquet(list(nodes)).select("node", col("node").alias("least")).where(daft.lit(False))
        return tables.make(f"{name}-000", lambda number, of: none)
    at_once = max(1, options.rows_at_once // max(documents, 1))
    result = []
    for begin in range(0, len(kinds), at_once):
        group = kinds[begin : begin + at_once]
        passes = passes_for(documents * len(group), options.rows_at_once)

        def frame(number: int, of: int, group: Sequence[str] = group) -> Any:
            read = daft.read_parquet(list(nodes))
            keys = read.select("node", daft.functions.to_list(*(col(kind) for kind in group)).alias("key")).explode(
                "key"
            )
            keyed = keys.where(col("key").not_null() & part("key", number, of))
            same = daft.Window().partition_by("key")
            others = col("node").min().over(same)
            if compared:
                earlier = [col("node").lag(place).over(same.order_by("node")) for place in range(1, compared + 1)]
                others = daft.functions.to_list(others, *earlier)
            pairs = keyed.with_column("least", others)
            if compared:
                pairs = pairs.explode("least").where(col("least").not_null())
            return pairs.where(col("node") != col("least")).select("node", "least")

        result += tables.make(f"{name}-{begin:03d}", frame, passes)
    return result


def _similar(
    tables: Tables, edges: Sequence[str], files: Sequence[str], options: DuplicateOptions
) -> tuple[list[str], list[str]]:
    """The different edges, and those whose ends are similar enough."""
    daft = load_daft()
    col = daft.col

    def distinct(number: int, of: int) -> Any:
        return daft.read_parquet(list(edges)).where(part("node", number, of)).distinct()

    pairs = tables.make("pairs", distinct, passes_for(count_rows(edges), options.rows_at_once))
    similar = daft.func.batch(return_dtype=daft.DataType.float64())(_jaccard)
    # A pair holds two sets: as many rows as hashes of a common document.
    passes = passes_for(count_rows(pairs) * _HASHES_OF_PAIR, options.rows_at_once * _HASHES_OF_KEY)

    def frame(number: int, of: int) -> Any:
        read = daft.read_parquet(list(files)).select(_node().alias("of"), "shingles")
        both = daft.read_parquet(list(pairs)).where(part("node", number, of))
        both = both.join(read.select(col("of").alias("node"), col("shingles").alias("a")), on="node")
        both = both.join(read.select(col("of").alias("least"), col("shingles").alias("b")), on="least")
        return both.where(similar(col("a"), col("b")) >= options.similarity).select("node", "least")

    return pairs, tables.make("similar", frame, passes)


# Bytes of two sets of a document of 1000 words, and of a key.
_HASHES_OF_PAIR, _HASHES_OF_KEY = 8000, 150


def _jaccard(first: Any, second: Any) -> Any:
    """The Jaccard similarity of sorted sets, pair by pair; Daft's series of lists in, of float64 out."""
    daft = load_daft()
    pairs = zip(first.to_arrow(), second.to_arrow(), strict=True)
    found = []
    for one, other in pairs:
        a, b = (np.asarray(pa.array([]) if x.values is None else x.values, np.uint32) for x in (one, other))
        both = len(np.intersect1d(a, b, assume_unique=True))
        found.append(both / max(len(a) + len(b) - both, 1))
    return daft.Series.from_arrow(pa.array(found, pa.float64()))


def _members(stars: Sequence[str], nodes: Sequence[str], number: int, of: int) -> Any:
    """All documents of groups: the least node of the group, and the document's columns but for its bands."""
    daft = load_daft()
    col = daft.col
    ends = daft.functions.to_list(col("node"), col("least"))
    # The least one of a group is an end of each of its edges.
    grouped = daft.read_parquet(list(stars)).with_column("end", ends).explode("end").where(part("end", number, of))
    grouped = grouped.select(col("end").alias("node"), col("least").alias("group")).distinct()
    documents = daft.read_parquet(list(nodes)).select("node", "precedence", "id", "text", "url")
    return grouped.join(documents.where(part("node", number, of)), on="node")


def _chosen(members: Sequence[str], number: int, of: int) -> Any:
    """All documents of groups, each with the one that is kept; its own row has no reason."""
    daft = load_daft()
    col = daft.col
    group = daft.Window().partition_by("group")
    found = daft.read_parquet(list(members)).where(part("group", number, of))
    # Numbers with leading zeros are in order as texts: one column whose minimum can be asked for.
    numbers = (col("precedence"), col("id").hash(), col("node"))
    digits = [number.cast(daft.DataType.string()).lpad(20, "0") for number in numbers]
    found = found.with_column("rank", digits[0] + digits[1] + digits[2])
    found = found.with_columns({"best": col("rank").min().over(group), "cluster_size": col("node").count().over(group)})
    is_kept = col("rank") == col("best")

    def of_kept(column: str, kind: Any) -> Any:
        none = daft.lit(None).cast(kind)
        return daft.functions.when(is_kept, col(column)).otherwise(none).min().over(group)

    whole, text = daft.DataType.uint64(), daft.DataType.string()
    found = found.with_columns(
        {"kept_id": of_kept("id", text), "kept_text": of_kept("text", whole), "kept_url": of_kept("url", whole)}
    )
    none = daft.lit(None).cast(daft.DataType.bool())
    same_text = daft.functions.coalesce(col("text") == col("kept_text"), none, daft.lit(False))
    same_url = daft.functions.coalesce(col("url") == col("kept_url"), none, daft.lit(False))
    why = daft.functions.when(same_text, daft.lit("exact duplicate")).when(same_url, daft.lit("same URL"))
    reason = why.otherwise(daft.lit("near duplicate"))
    return found.select(
        col("node").shift_right(daft.lit(32).cast(whole)).cast(daft.DataType.int64()).alias("shard"),
        (col("node") % _ROWS).cast(daft.DataType.int64()).alias("row"),
        daft.functions.when(is_kept, daft.lit(None).cast(text)).otherwise(reason).alias("reason"),
        "kept_id",
        col("cluster_size").cast(daft.DataType.int64()),
    )


def _ordered(chosen: Sequence[str], shards: int, number: int, of: int) -> Any:
    daft = load_daft()
    col = daft.col
    begin, end = number * shards // of, (number + 1) * shards // of
    removed = daft.read_parquet(list(chosen)).where(col("reason").not_null())
    return removed.where((col("shard") >= begin) & (col("shard") < end)).sort(["shard", "row"])


def _first_key(file: str) -> tuple[int, int]:
    """Shard and row of the first row of a file of duplicates; (-1, -1) if it has none."""
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(1, columns=["shard", "row"]):
            return batch.column(0)[0].as_py(), batch.column(1)[0].as_py()
    return -1, -1
