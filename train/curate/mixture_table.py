"""What a corpus has: documents and tokens of each cell, that is of each domain and quality bucket."""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from train.curate.operator import REASON

UNSCORED = -1
"""Bucket of documents without a finite score."""

SCHEMA = pa.schema(
    [("id", pa.string()), ("domain", pa.string()), ("quality", pa.float64()), ("tokens", pa.float64())],
)
"""Columns of a batch of attributes: quality is null where a document has no score."""

Batches = Callable[[], Iterator[pa.Table]]
# Documents of a domain whose scores decide its quantiles; those with the smallest hashes of their ids.
_SAMPLE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Cell:
    """Documents of one domain and one quality bucket.

    Attributes:
      domain: name of it.
      bucket: from 0, the lowest quality; `UNSCORED` for documents without a score.
      documents: how many.
      tokens: of all of them.
      scored: whether the corpus has scores; without them, the cell is the domain.
    """

    domain: str
    bucket: int
    documents: int
    tokens: int
    scored: bool = True

    @property
    def name(self) -> str:
        """Of the cell: fit for a folder, and the name of its data set."""
        return cell_name(self.domain, self.bucket, self.scored)


@dataclasses.dataclass(frozen=True)
class CellTable:
    """All cells of a corpus.

    Attributes:
      cells: those that have documents, by domain and bucket.
      thresholds: of each domain, ascending. The bucket of a document is the number of thresholds that are not above
        its score. Empty for a corpus without scores.
      quality: name of the column of scores; None without scores.
    """

    cells: tuple[Cell, ...]
    thresholds: Mapping[str, tuple[float, ...]]
    quality: str | None = None

    @property
    def buckets(self) -> int:
        """Quality buckets of a domain, empty ones among them."""
        return 1 + max((len(found) for found in self.thresholds.values()), default=0)

    @property
    def domains(self) -> list[str]:
        """Names of all domains, sorted."""
        return sorted({cell.domain for cell in self.cells})

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, for `from_json`."""
        return {
            "quality": self.quality,
            "thresholds": {name: list(found) for name, found in self.thresholds.items()},
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CellTable":
        """A table from the object of `to_json`."""
        thresholds = {name: tuple(found) for name, found in value["thresholds"].items()}
        return cls(tuple(Cell(**cell) for cell in value["cells"]), thresholds, value["quality"])


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns say how good and how long a document is.

    Attributes:
      quality: column of scores, larger is better; by default there are none. In the folder of a curation also
        "STAGE.COLUMN", where several stages make a column of this name.
      tokens: column with the tokens of a document.
      num_bytes: column with its bytes, where there is none of tokens. With neither, the bytes of "text" in UTF-8.
      bytes_per_token: how many bytes count as one token.

    Raises:
      InputError: both counts, or bytes_per_token out of range.
    """

    quality: str | None = None
    tokens: str | None = None
    num_bytes: str | None = None
    bytes_per_token: float = 4.0

    def __post_init__(self) -> None:
        if self.tokens is not None and self.num_bytes is not None:
            raise InputError(f"Give a column of tokens or one of bytes, got {self.tokens} and {self.num_bytes}.")
        if not (self.bytes_per_token > 0 and math.isfinite(self.bytes_per_token)):
            raise InputError(f"bytes_per_token must be above 0, got {self.bytes_per_token}.")

    @property
    def count(self) -> str:
        """The column that tells the length."""
        return self.tokens or self.num_bytes or "text"


def cell_name(domain: str, bucket: int, scored: bool = True) -> str:
    """The name of a cell, such as web-q2, fit for a folder."""
    safe = re.sub(r"[^\w.-]", "_", domain)
    return safe if not scored else f"{safe}-unscored" if bucket == UNSCORED else f"{safe}-q{bucket}"


def hash_of(id: str, salt: str = "") -> int:
    """A hash of an id, 64 bits, the same on every machine.

    Args:
      id: of a document.
      salt: another one gives hashes that are independent.
    """
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{id}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


def buckets_of(scores: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The bucket of each score, int64 [n]; `UNSCORED` where it is not finite."""
    found = np.searchsorted(np.asarray(thresholds, np.float64), scores, side="right").astype(np.int64)
    return np.where(np.isfinite(scores), found, UNSCORED)


def cell_table(
    batches: Batches, quality: str | None = None, buckets: int = 1, thresholds: Sequence[float] = ()
) -> CellTable:
    """Counts documents and tokens by domain and quality bucket.

    Args:
      batches: returns an iterator over all attributes each time it is called; tables of `SCHEMA`.
      quality: name of the column of scores, for the record; None if the corpus has none.
      buckets: quantiles: each bucket of a domain has about as many tokens. The thresholds come from the scores of up
        to 65,536 documents of each domain, those with the smallest hashes of their ids: they do not depend on order.
      thresholds: scores that divide buckets in all domains, instead.

    Raises:
      InputError: no documents, buckets without scores, thresholds that do not ascend, or two names that become one.
    """
    if buckets < 1 or (buckets > 1 and thresholds):
        raise InputError(f"Give a number of buckets of at least 1, or thresholds; got {buckets} and {thresholds}.")
    if any(not a < b for a, b in itertools.pairwise(thresholds)) or not all(map(math.isfinite, thresholds)):
        raise InputError(f"Thresholds must be numbers that ascend, got {list(thresholds)}.")
    if quality is None and (buckets > 1 or thresholds):
        raise InputError("Quality buckets need scores. Name their column, or leave buckets and thresholds out.")
    edges = _quantiles(batches(), buckets) if buckets > 1 else {}
    # Count, with the thresholds of each domain.
    documents: dict[tuple[str, int], int] = {}
    tokens: dict[tuple[str, int], float] = {}
    for domain, _, scores, lengths in _by_domain(batches()):
        if quality is None:
            scores = np.zeros_like(scores)
        mine = edges.setdefault(domain, tuple(thresholds))
        found = buckets_of(scores, mine)
        for bucket in np.unique(found).tolist():
            chosen = found == bucket
            key = domain, bucket
            documents[key] = documents.get(key, 0) + int(chosen.sum())
            tokens[key] = tokens.get(key, 0.0) + float(lengths[chosen].sum())
    if not documents:
        raise InputError("There are no documents. Give attributes of at least one.")
    cells = tuple(
        Cell(domain, bucket, documents[domain, bucket], round(tokens[domain, bucket]), quality is not None)
        for domain, bucket in sorted(documents)
    )
    if len({cell.name for cell in cells}) < len(cells):
        raise InputError(
            f"The names of domains must differ in letters and digits, got {sorted({cell.domain for cell in cells})}."
        )
    return CellTable(cells, {} if quality is None else dict(sorted(edges.items())), quality)


def read_attributes(inputs: Sequence[Path], columns: Columns) -> Iterator[pa.Table]:
    """Reads the attributes of documents.

    Args:
      inputs: Parquet files with the columns id, domain and those that are named; or folders of curations, without
        the documents to which a stage gives a reason.
      columns: which they are.

    Yields:
      Tables of `SCHEMA`.

    Raises:
      InputError: a file or a column is missing, or a length is null or negative.
    """
    for path in inputs:
        if (path / "documents").is_dir():
            yield from (_attributes(table, columns, where) for where, table in _shards(path, columns))
            continue
        if not path.is_file():
            raise InputError(f"{path} is neither a Parquet file nor the folder of a curation.")
        wanted = ["id", "domain", *([columns.quality] if columns.quality else []), columns.count]
        with _opened(path) as file:
            _need(wanted, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=wanted):
                yield _attributes(pa.Table.from_batches([batch]), columns, str(path))


def _shards(run: Path, columns: Columns) -> Iterator[tuple[str, pa.Table]]:
    """The documents that are left in each shard of a curation, with the columns of all stages that are needed."""
    stages = _stages(run)
    needed = {columns.count} | ({columns.quality} if columns.quality else set())
    for shard in sorted((run / "documents").glob("*.parquet")):
        table = _read(shard, ["id", "domain"])
        keep = np.ones(len(table), bool)
        # What stages have made stands before what the documents had.
        made: dict[str, list[Path]] = {}
        for sidecar in (stage / shard.name for stage in stages):
            if not sidecar.is_file():
                raise InputError(f"The stage {sidecar.parent.name} of {run} has no {shard.name}. Let it finish first.")
            names = _names(sidecar)
            for name in needed:
                if name in names or (name.startswith(f"{sidecar.parent.name}.") and _plain(name, sidecar) in names):
                    made.setdefault(name, []).append(sidecar)
            # Who was sampled out by an earlier plan takes part in the next one.
            if REASON in names and "repetitions" not in names:
                keep &= _column(sidecar, REASON, shard, len(table)).is_null().to_numpy()
        own = _names(shard)
        _need(sorted(needed), sorted({*made, *own}), str(run))
        for name in sorted(needed):
            found = made.get(name, [shard])
            if name == "text":
                # A stage has a null where the text stays as it was; the newest text counts.
                texts = [_column(one, name, shard, len(table)) for one in (*reversed(made.get(name, [])), shard)]
                table = table.append_column(name, pc.coalesce(*texts))
                continue
            if len(found) > 1:
                raise InputError(
                    f"Several stages of {run} make the column {name}: {', '.join(one.parent.name for one in found)}. "
                    "Name one as STAGE.COLUMN."
                )
            table = table.append_column(name, _column(found[0], _plain(name, found[0]), shard, len(table)))
        yield str(shard), table.filter(pa.array(keep))


def _stages(run: Path) -> list[Path]:
    """The folders whose columns count: those of the stages of the curation in their order, then those of scores.

    A stage that the curation had earlier, and has no more, has a folder too.
    """
    manifests = sorted(path for path in run.glob("*/manifest.json") if path.parent.name != "documents")
    if not (run / "manifest.json").is_file():
        return [path.parent for path in manifests]
    stages = [run / stage["name"] for stage in read_json(run / "manifest.json")["stages"]]
    return stages + [path.parent for path in manifests if "stage" not in read_json(path)]


def _names(path: Path) -> set[str]:
    with _opened(path) as file:
        return set(file.schema_arrow.names)


def _plain(name: str, sidecar: Path) -> str:
    """A column's name without that of its stage."""
    return name.removeprefix(f"{sidecar.parent.name}.")


def _column(path: Path, name: str, shard: Path, rows: int) -> pa.ChunkedArray:
    """A column that has a value for each row of a shard."""
    values = _read(path, [name])[name]
    if len(values) != rows:
        raise InputError(f"{path} has {len(values)} rows, {shard} has {rows}. Run the stage {path.parent.name} again.")
    return values


def _attributes(table: pa.Table, columns: Columns, where: str) -> pa.Table:
    """A table of `SCHEMA`."""
    count = table[columns.count]
    if columns.count == "text":
        count = pc.binary_length(count.cast(pa.large_binary()))
    lengths = pc.cast(count, pa.float64())
    if lengths.null_count or (len(lengths) and not pc.min(lengths).as_py() >= 0):
        raise InputError(f"{where}: a document has no length in the column {columns.count}, or a negative one.")
    if columns.tokens is None:
        lengths = pc.divide(lengths, columns.bytes_per_token)
    scores = pa.nulls(len(table), pa.float64())
    if columns.quality:
        try:
            scores = pc.cast(table[columns.quality], pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(f"{where}: the column {columns.quality} has no numbers.") from None
    for name in ("id", "domain"):
        if table[name].null_count:
            raise InputError(f"{where}: the column {name} has nulls. Each document needs one.")
    return pa.table([table["id"].cast(pa.string()), table["domain"].cast(pa.string()), scores, lengths], schema=SCHEMA)


def _by_domain(batches: Iterable[pa.Table]) -> Iterator[tuple[str, pa.ChunkedArray, np.ndarray, np.ndarray]]:
    """Ids, scores (NaN for null) and tokens of the documents of one domain in a batch."""
    for table in batches:
        scores = pc.fill_null(table["quality"], math.nan).to_numpy()
        lengths, domains = table["tokens"].to_numpy(), table["domain"]
        for domain in sorted(pc.unique(domains).to_pylist()):
            chosen = pc.equal(domains, domain).to_numpy()
            yield domain, table["id"].filter(pa.array(chosen)), scores[chosen], lengths[chosen]


def _quantiles(batches: Iterable[pa.Table], buckets: int) -> dict[str, tuple[float, ...]]:
    """The scores that divide the tokens of each domain into so many parts."""
    samples: dict[str, np.ndarray] = {}
    for domain, ids, scores, lengths in _by_domain(batches):
        known = np.isfinite(scores)
        hashes = np.array([hash_of(id, "quantiles") for id in ids.to_pylist()], np.float64)
        new = np.stack([hashes, scores, lengths])[:, known]
        sample = np.concatenate([samples[domain], new], axis=1) if domain in samples else new
        if sample.shape[1] > 2 * _SAMPLE:
            sample = sample[:, np.argsort(sample[0], kind="stable")[:_SAMPLE]]
        samples[domain] = sample
    if not any(sample.shape[1] for sample in samples.values()):
        raise InputError("No document has a finite score, so there are no quantiles. Score the documents first.")
    edges = {}
    for domain, sample in samples.items():
        # The documents with the smallest hashes, by score.
        sample = sample[:, np.lexsort((sample[1], sample[0]))[:_SAMPLE]]
        sample = sample[:, np.argsort(sample[1], kind="stable")]
        before = np.cumsum(sample[2]) - sample[2]
        total = sample[2].sum()
        places = [int(np.searchsorted(before, total * i / buckets)) for i in range(1, buckets)]
        edges[domain] = tuple(float(sample[1, min(p, sample.shape[1] - 1)]) for p in places) if sample.shape[1] else ()
    return edges


def _need(wanted: Sequence[str], names: Sequence[str], where: str) -> None:
    if missing := [name for name in wanted if name not in names]:
        raise InputError(f"{where} has no column {missing[0]}. It has: {', '.join(names)}.")


def _read(path: Path, names: Sequence[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(names))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
