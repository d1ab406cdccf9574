"""Reads the documents of a curation with the columns that stages have made so far, and writes columns."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwen_jax.errors import InputError
from train.curate.engine import Engine, Job
from train.curate.operator import DOCUMENT, REASON
from train.curate.shards import (
    DOCUMENTS,
    SCRATCH,
    File,
    Record,
    ShardWriter,
    finished,
    read_groups,
    write_record,
)
from train.curate.stage import TEXT, Stage, scatter
from train.data.shards import digest

if TYPE_CHECKING:
    import daft

SHARD, ROW = "shard", "row"
"""Columns of tables that leave the shards, int64: number of a shard in `Corpus.shards`, and row in it.

They are the key of a document; their order is that of the corpus.
"""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Documents of a row group that have no reason.

    Attributes:
      first: row in the shard of the group's first document.
      size: number of documents in the group, including those with a reason.
      indices: rows of the group that the table has, ascending.
      table: the columns that were asked for.
    """

    first: int
    size: int
    indices: pa.Array
    table: pa.Table


@dataclasses.dataclass(frozen=True)
class View:
    """Columns of documents and of stages, and where they are. Workers get it with a job.

    Attributes:
      folder: of the curation.
      made: the columns of each stage so far, in order.
    """

    folder: Path
    made: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def then(self, stage: Stage) -> "View":
        """The view with the columns of a further stage."""
        return dataclasses.replace(self, made=(*self.made, (stage.name, tuple(stage.makes.names))))

    def sources(self, columns: Iterable[str]) -> list[str]:
        """The stages that make these columns, and those that give reasons."""
        wanted = {*columns, REASON}
        return [stage for stage, names in self.made if wanted.intersection(names)]

    def batches(self, shard: str, columns: Sequence[str]) -> Iterator[Batch]:
        """Reads columns of the documents of a shard that have no reason, a row group at a time.

        Args:
          shard: its name.
          columns: of `DOCUMENT`, or made by a stage. "text" is the newest text.
        """
        documents = [name for name in columns if name in DOCUMENT.names]
        streams = {DOCUMENTS: read_groups(self.folder / DOCUMENTS / f"{shard}.parquet", documents or ["domain"])}
        for stage, names in self.made:
            if wanted := [name for name in names if name in columns or name == REASON]:
                streams[stage] = read_groups(self.folder / stage / f"{shard}.parquet", wanted)
        first = 0
        for groups in zip(*streams.values(), strict=True):
            by_stage = dict(zip(streams, groups, strict=True))
            size = by_stage[DOCUMENTS].num_rows
            found: dict[str, pa.ChunkedArray] = {name: by_stage[DOCUMENTS][name] for name in documents}
            alive: Any = pa.repeat(True, size)
            for table in list(by_stage.values())[1:]:
                for name in table.column_names:
                    if name == REASON:
                        alive = pc.and_(alive, pc.is_null(table[REASON]))
                    elif name == TEXT:
                        found[TEXT] = pc.coalesce(table[TEXT], found[TEXT])
                    else:
                        found[name] = table[name]
            indices = pc.indices_nonzero(alive)
            whole = pa.table({name: found[name] for name in columns}) if columns else pa.table({ROW: pa.nulls(size)})
            yield Batch(first, size, indices, whole if len(indices) == size else whole.take(indices))
            first += size

    def rows(self, shard: str, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Columns of some documents of a shard as they were read, whether they have a reason or not.

        Args:
          shard: its name.
          rows: in ascending order.
          columns: of `DOCUMENT`.
        """
        found, first = [], 0
        with pq.ParquetFile(self.folder / DOCUMENTS / f"{shard}.parquet") as file:
            for i in range(file.num_row_groups):
                size = file.metadata.row_group(i).num_rows
                if here := [row - first for row in rows if first <= row < first + size]:
                    found += file.read_row_group(i, columns=list(columns), use_threads=False).take(here).to_pylist()
                first += size
        return found


def write_sidecar(
    folder: Path, shard: str, schema: pa.Schema, groups: Iterable[tuple[Batch, pa.Table]]
) -> tuple[File, dict[str, Any]]:
    """Writes the sidecar of a shard: row group by row group, null where a document had a reason already.

    Args:
      folder: of the stage.
      shard: its name.
      schema: the columns of the stage.
      groups: what was read of each row group, and what was made of it.

    Returns:
      The file, and counts: documents that came in, and those removed with each reason, with the rows of a few.
    """
    came, removed, shown = 0, dict[str, int](), dict[str, list[int]]()
    with ShardWriter(folder, f"{shard}.parquet", schema) as writer:
        for batch, made in groups:
            came += len(batch.indices)
            columns = {
                name: made[name] if len(batch.indices) == batch.size else scatter(made[name], batch.indices, batch.size)
                for name in schema.names
            }
            if REASON in columns:
                count_reasons(columns[REASON], batch.first, removed, shown)
            writer.add(pa.table(columns))
        file = writer.finish()
    return file, {"in": came, "removed": removed, "rows": shown}


# Rows of each reason that a record keeps for the report, and different reasons that it tells apart.
_SHOWN, _REASONS, OTHER = 3, 100, "other reasons"


def count_reasons(
    reasons: pa.Array | pa.ChunkedArray, first: int, removed: dict[str, int], shown: dict[str, list[int]]
) -> None:
    """Adds the reasons of a row group to the counts of a shard.

    Args:
      reasons: of its documents; null where one is kept.
      first: row in the shard of the group's first document.
      removed: documents of each reason.
      shown: rows of each reason, a few.
    """
    counted = sorted((v["values"], v["counts"]) for v in pc.value_counts(reasons.drop_null()).to_pylist())
    names = {}
    for reason, count in counted:
        name = reason if reason in removed or len(removed) < _REASONS else OTHER
        names[reason] = name
        removed[name] = removed.get(name, 0) + count
    if any(len(shown.get(name, ())) < _SHOWN for name in set(names.values())):
        for row, reason in enumerate(reasons.to_pylist()):
            if reason is not None and len(rows := shown.setdefault(names[reason], [])) < _SHOWN:
                rows.append(first + row)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All documents, for a stage that looks at all of them.

    Attributes:
      engine: runs jobs and queries.
      shards: names of all shards, in the order of the corpus.
      view: what has been made so far.
      stage: the stage.
      keys: by shard, digest of the stage's settings and of all that it reads, for records.
      reads: by shard, digest of what the stage reads of it.
    """

    engine: Engine
    shards: tuple[str, ...]
    view: View
    stage: Stage
    keys: Mapping[str, str]
    reads: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """A folder for the stage's own files. What is in it stays until the stage is finished."""
        path = self.view.folder / self.stage.name / SCRATCH
        path.mkdir(parents=True, exist_ok=True)
        return path

    def batches(self, shard: str, columns: Sequence[str]) -> Iterator[Batch]:
        """Reads documents of a shard that have no reason; see `View.batches`."""
        return self.view.batches(shard, columns)

    def narrow(self, columns: Sequence[str]) -> "daft.DataFrame":
        """Columns of all documents that have no reason, for queries; see `narrow_files`."""
        return self.engine.daft.read_parquet([str(path) for path in self.narrow_files(columns)])

    def narrow_files(self, columns: Sequence[str]) -> list[Path]:
        """Writes columns of all documents that have no reason, with `SHARD` and `ROW`, to a Parquet file a shard.

        What an earlier process has written is not written again.

        Args:
          columns: small ones: a query may hold all of them in memory.
        """
        out = self.folder / f"narrow-{digest(list(columns))[:8]}"
        jobs = [
            (shard, [number, shard, self.reads[shard]])
            for number, shard in enumerate(self.shards)
            if finished(out, shard, self.reads[shard]) is None
        ]
        make = functools.partial(_narrowing, self.view, out, tuple(columns))
        for _ in self.engine.map(f"{self.stage.name}, reading", make, jobs, light=True):
            pass
        return [out / f"{shard}.parquet" for shard in self.shards]

    def write(self, shard: str, rows: Sequence[int] | pa.Array, made: pa.Table) -> Record:
        """Writes the stage's columns of a shard.

        Args:
          shard: its name.
          rows: of the shard, ascending and different; documents that are not listed have nulls.
          made: the columns `stage.makes`, a row for each of `rows`.

        Raises:
          InputError: rows that are not in the shard, or have a reason already.
        """
        return _write(self.view, self.stage, shard, self.keys[shard], np.asarray(rows, np.int64), made)

    def write_all(self, frame: "daft.DataFrame | pa.Table") -> None:
        """Writes the stage's columns of all shards from a query.

        Args:
          frame: the columns `SHARD`, `ROW` and `stage.makes`; at most one row a document, in any order. Documents that
            it lacks have nulls.
        """
        out = self.folder / "result"
        daft = self.engine.daft
        if isinstance(frame, pa.Table):
            frame = daft.from_arrow(frame)
        wanted = [SHARD, ROW, *self.stage.makes.names]
        if self.engine.kind == "ray":
            # All rows of a shard in one file.
            frame = frame.repartition(self.engine.partitions, SHARD)
        written = frame.select(*wanted).write_parquet(
            str(out), write_mode="overwrite", partition_cols=[daft.col(SHARD)]
        )
        paths: dict[int, list[str]] = {}
        for row in written.to_pylist():
            paths.setdefault(int(row[SHARD]), []).append(row["path"])
        if unknown := sorted(set(paths) - set(range(len(self.shards)))):
            raise InputError(f"{self.stage.name} names the shard {unknown[0]}, of {len(self.shards)} in the corpus.")
        jobs = [(shard, [shard, self.keys[shard], paths.get(n, [])]) for n, shard in enumerate(self.shards)]
        for _ in self.engine.map(
            f"{self.stage.name}, writing", functools.partial(_distributing, self.view, self.stage), jobs, light=True
        ):
            pass


def _narrowing(view: View, out: Path, columns: tuple[str, ...]) -> Job:
    def write(job: Any) -> None:
        number, shard, key = job
        writer: ShardWriter | None = None
        try:
            for batch in view.batches(shard, columns):
                rows = pc.add(batch.indices.cast(pa.int64()), batch.first)
                table = pa.table(
                    {SHARD: pa.array([number] * len(rows), pa.int64()), ROW: rows, **_columns(batch.table, columns)}
                )
                writer = writer or ShardWriter(out, f"{shard}.parquet", table.schema)
                writer.add(table)
            assert writer is not None
            write_record(out, shard, Record(key, (writer.finish(),), {}))
        finally:
            if writer is not None:
                writer.__exit__(None)

    return write


def _columns(table: pa.Table, columns: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    return {name: table[name] for name in columns}


def _distributing(view: View, stage: Stage) -> Job:
    def write(job: Any) -> None:
        shard, key, paths = job
        tables = [pq.ParquetFile(path).read(columns=[ROW, *stage.makes.names]) for path in paths]
        made = pa.concat_tables(tables) if tables else pa.table({ROW: pa.array([], pa.int64())})
        made = made.sort_by(ROW) if tables else made
        rows = np.asarray(made[ROW], np.int64)
        columns = made.drop_columns([ROW]) if tables else stage.makes.empty_table()
        _write(view, stage, shard, key, rows, columns)

    return write


def _write(view: View, stage: Stage, shard: str, key: str, rows: np.ndarray, made: pa.Table) -> Record:
    """Writes a sidecar whose values are given for some rows."""
    makes = pa.schema([field.with_nullable(True) for field in stage.makes])
    made = made.select(makes.names).cast(makes)
    if len(rows) and not bool(np.all(np.diff(rows) > 0)):
        raise InputError(f"{stage.name} gives rows of {shard} that do not ascend, or one twice.")

    def groups() -> Iterator[tuple[Batch, pa.Table]]:
        used = 0
        for batch in view.batches(shard, ()):
            known = np.asarray(batch.indices, np.int64) + batch.first
            begin, end = np.searchsorted(rows, [batch.first, batch.first + batch.size])
            here = rows[begin:end]
            if not np.isin(here, known).all():
                raise InputError(f"{stage.name} gives a row of {shard} that was removed before it.")
            places = np.searchsorted(known, here)
            used += len(here)
            part = made.slice(begin, end - begin)
            spread = {name: scatter(part[name], pa.array(places), len(known)) for name in makes.names}
            yield batch, pa.table(spread, schema=makes)
        if used != len(rows):
            raise InputError(f"{stage.name} gives a row of {shard} that is not in it.")

    file, counts = write_sidecar(view.folder / stage.name, shard, makes, groups())
    record = Record(key, (file,), counts)
    write_record(view.folder / stage.name, shard, record)
    return record
