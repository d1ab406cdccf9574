"""Jobs of workers: read a unit of the input into shards, make the sidecar of a shard, write its kept documents."""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qwen_jax.errors import InputError
from qwen_jax.files import to_json
from train.curate.corpus import OTHER, Batch, View, count_reasons, write_sidecar
from train.curate.engine import Job
from train.curate.operator import DOCUMENT
from train.curate.shards import (
    DOCUMENTS,
    OUTPUT,
    ROW_GROUP_BYTES,
    ROW_GROUP_ROWS,
    File,
    Record,
    ShardWriter,
    write_record,
)
from train.curate.sources import Bad, Input, Part, Row, Unit, read_unit, sha256_of
from train.curate.stage import NO_TEXT, REPETITIONS, TEXT, RowStage, scatter
from train.data.bad_records import BadRecords
from train.data.documents import optional_library
from train.data.shards import digest
from train.files import AtomicFile

# Files of one shard that are written at once, each with a compressor of its own.
_MOST_FILES = 500
# Bad records that a record keeps by reason, for the report; all are in `bad.jsonl`.
_SHOWN = 3
# Different reasons that a record tells apart: some name the fields that a line has.
_REASONS = 100
_NO_REPETITION = "repeated 0 times"


def lengths(values: pa.Array | pa.ChunkedArray) -> Counter[int]:
    """Counts documents by length in bytes, rounded down to a power of two, or 0."""
    sizes = pc.binary_length(values.drop_null())
    return Counter(1 << (size.bit_length() - 1) if size else 0 for size in sizes.to_pylist())


def reading(folder: Path, shard_bytes: int) -> Job:
    """Makes the function that reads a unit into shards of documents.

    Args:
      folder: of the curation.
      shard_bytes: a shard ends with the document that reaches this size.
    """

    def read(job: Any) -> dict[str, Any]:
        unit = Unit(job["name"], Input(**job["input"]), tuple(map(Part.from_json, job["parts"])))
        reader = _Reader(unit, folder / DOCUMENTS, shard_bytes)
        with reader:
            record = Record(job["key"], *reader.run())
        write_record(folder / DOCUMENTS, unit.name, record)
        return record.to_json()

    return read


class _Reader:
    """Writes the shards of one unit."""

    def __init__(self, unit: Unit, folder: Path, shard_bytes: int):
        self._unit, self._folder, self._shard_bytes = unit, folder, shard_bytes
        self._writer: ShardWriter | None = None
        self._files: list[File] = []
        self._rows: list[Row] = []
        self._bytes = self._shard = 0
        self._sizes: list[int] = []
        self._lengths: Counter[int] = Counter()

    def run(self) -> tuple[tuple[File, ...], dict[str, Any]]:
        """Reads the unit; returns files and counts."""
        with BadRecords(self._folder / ".bad" / f"{self._unit.name}.jsonl") as records:
            return self._run(records)

    def _run(self, records: BadRecords) -> tuple[tuple[File, ...], dict[str, Any]]:
        bad, shown = Counter[str](), dict[str, list[list[str]]]()
        skipped, damaged, by_file = Counter[str](), dict[str, str](), Counter[str]()
        for found in read_unit(self._unit):
            if isinstance(found, Bad):
                if found.skipped:
                    skipped[found.reason] += 1
                    continue
                reason = found.reason.partition(":")[0]
                if reason.startswith("the file is damaged"):
                    damaged[found.file] = f"{found.place}: {found.reason}"
                else:
                    reason = reason if reason in bad or len(bad) < _REASONS else OTHER
                    bad[reason] += 1
                if len(shown.setdefault(reason, [])) < _SHOWN:
                    shown[reason].append([found.file, found.place, found.reason])
                entry = {"input": self._unit.input.name, "file": found.file, "at": found.place, "reason": found.reason}
                records.add(entry)
            else:
                by_file[found["source"].rpartition(":")[0]] += 1
                self._add(found)
        self._end_shard()
        records.finish()
        if records.count:
            self._files.append(File(f".bad/{self._unit.name}.jsonl", 0, records.size, records.sha256))
        counts = {
            "bytes": self._sizes,
            "bad": dict(sorted(bad.items())),
            "shown": dict(sorted(shown.items())),
            "skipped": dict(sorted(skipped.items())),
            "damaged": dict(sorted(damaged.items())),
            "empty": sorted({part.name for part in self._unit.parts if not by_file[part.name]}),
            "lengths": {str(key): self._lengths[key] for key in sorted(self._lengths)},
            "sha256": sha256_of(self._unit.parts),
        }
        return tuple(self._files), counts

    def _add(self, row: Row) -> None:
        self._rows.append(row)
        size = sum(len(row[name] or "") for name in ("html", "text", "metadata"))
        self._bytes += size
        self._shard += size
        if self._bytes >= ROW_GROUP_BYTES or len(self._rows) >= ROW_GROUP_ROWS:
            self._end_group()
        if self._shard >= self._shard_bytes:
            self._end_shard()

    def _end_group(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=DOCUMENT)
        self._lengths += lengths(pc.coalesce(table[TEXT].cast(pa.large_binary()), table["html"]))
        if self._writer is None:
            name = f"{self._unit.name}-{len(self._files):03d}.parquet"
            self._writer = ShardWriter(self._folder, name, DOCUMENT)
            self._sizes.append(0)
        self._sizes[-1] += sum(int(pc.sum(pc.binary_length(table[name])).as_py() or 0) for name in ("html", TEXT))
        self._writer.add(table)
        self._rows, self._bytes = [], 0

    def _end_shard(self) -> None:
        self._end_group()
        if self._writer is not None:
            self._files.append(self._writer.finish())
            self._writer = None
        self._shard = 0

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind)


def computing(view: View, stage: RowStage) -> Job:
    """Makes the function that makes the sidecar of a shard.

    Args:
      view: what the stage may read.
      stage: what makes the columns.
    """
    compute = stage.start()
    makes = pa.schema([field.with_nullable(True) for field in stage.makes])

    def sidecar(job: Sequence[str]) -> dict[str, Any]:
        shard, key = job

        def made_of(table: pa.Table) -> pa.Table:
            made = compute(table) if table.num_rows else makes.empty_table()
            if TEXT in made.column_names and TEXT in table.column_names:
                # Null where the text stays as it was.
                same = pc.coalesce(pc.equal(made[TEXT], table[TEXT]), False)
                at = made.column_names.index(TEXT)
                made = made.set_column(at, TEXT, pc.if_else(same, None, made[TEXT]))
            return made.select(makes.names)

        def groups() -> Iterator[tuple[Batch, pa.Table]]:
            batches = view.batches(shard, stage.reads)
            if not stage.whole_shards:
                yield from ((batch, made_of(batch.table)) for batch in batches)
                return
            kept = list(batches)
            made = made_of(pa.concat_tables([batch.table for batch in kept]))
            begin = 0
            for batch in kept:
                yield batch, made.slice(begin, len(batch.indices))
                begin += len(batch.indices)

        file, counts = write_sidecar(view.folder / stage.name, shard, makes, groups())
        record = Record(key, (file,), counts)
        write_record(view.folder / stage.name, shard, record)
        return record.to_json()

    return sidecar


@dataclasses.dataclass(frozen=True)
class Output:
    """What is written of the documents that are kept.

    Attributes:
      format: "jsonl" (JSON lines, compressed with Zstandard) or "parquet"; `qwen-jax data build` reads both.
      columns: of stages, to be written beside those of `DOCUMENT`.
      by: the column whose value names the folder that a document is written to: one for each data set to build.
    """

    format: str = "jsonl"
    columns: tuple[str, ...] = ()
    by: str = "domain"

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))

    @property
    def writes(self) -> tuple[str, ...]:
        """The columns that are written."""
        return tuple(dict.fromkeys(["id", "domain", "source", "url", TEXT, "metadata", *self.columns]))


def writing(view: View, output: Output, repeats: bool) -> Job:
    """Makes the function that writes the kept documents of a shard.

    Each repetition of a document is in another file, so that repetitions are far from each other. A document without
    text, or with 0 repetitions, is not written; it is counted with this reason.

    Args:
      view: what there is.
      output: what is written.
      repeats: a stage says how many times a document is written.
    """
    further = [*([REPETITIONS] if repeats else []), output.by]
    columns = list(dict.fromkeys([*output.writes, *further]))
    folder = view.folder / OUTPUT

    def write(job: Sequence[str]) -> dict[str, Any]:
        shard, key = job
        counts: dict[str, Counter[str]] = {}
        by_length = Counter[int]()
        came, removed, shown = 0, dict[str, int](), dict[str, list[int]]()
        with contextlib.ExitStack() as stack:
            writers: dict[tuple[str, int], _OutputFile] = {}
            for batch in view.batches(shard, columns):
                came += batch.table.num_rows
                # A page that nothing has extracted has no text to write.
                reasons = pc.if_else(pc.is_null(batch.table[TEXT]), NO_TEXT, pa.scalar(None, pa.string()))
                if repeats:
                    times = pc.coalesce(batch.table[REPETITIONS], 1)
                    if pc.any(pc.less(times, 0)).as_py():
                        least = pc.min(times).as_py()
                        raise InputError(f"The column {REPETITIONS} has {least} in {shard}; expected 0 or more.")
                    reasons = pc.coalesce(reasons, pc.if_else(pc.equal(times, 0), _NO_REPETITION, None))
                count_reasons(scatter(reasons, batch.indices, batch.size), batch.first, removed, shown)
                table = batch.table.filter(pc.is_null(reasons))
                by = pc.coalesce(table[output.by].cast(pa.string()), table["domain"])
                numbers = pc.coalesce(table[REPETITIONS], 1) if repeats else pa.repeat(1, table.num_rows)
                for value in sorted(pc.unique(by).to_pylist()):
                    name, here = folder_name(value), pc.equal(by, value)
                    count = counts.setdefault(name, Counter())
                    for repetition in range(pc.max(pc.if_else(here, numbers, 0)).as_py()):
                        part = table.filter(pc.and_(here, pc.greater(numbers, repetition))).select(output.writes)
                        if (name, repetition) not in writers:
                            if len(writers) == _MOST_FILES:
                                raise InputError(
                                    f"The documents go to more than {_MOST_FILES} files: the column {output.by}, which "
                                    "divides the output, has too many values, or documents are repeated too often."
                                )
                            ending = f".{repetition + 1}" if repetition else ""
                            file = _OutputFile(folder, f"{name}/{shard}{ending}", output)
                            writers[name, repetition] = stack.enter_context(file)
                        writers[name, repetition].add(part)
                        count["documents"] += 0 if repetition else part.num_rows
                        count["written"] += part.num_rows
                        count["bytes"] += int(pc.sum(pc.binary_length(part[TEXT])).as_py() or 0)
                        by_length += lengths(part[TEXT])
            files = [writers[at].finish() for at in sorted(writers)]
        found = {
            "documents": sum(count["documents"] for count in counts.values()),
            "by": {name: dict(counts[name]) for name in sorted(counts)},
            "lengths": {str(length): by_length[length] for length in sorted(by_length)},
            "in": came,
            "removed": removed,
            "rows": shown,
        }
        record = Record(key, tuple(files), found)
        write_record(folder, shard, record)
        return record.to_json()

    return write


def folder_name(value: str) -> str:
    """The name of a folder for a value: itself if it is a plain name, else a name with a hash."""
    plain = re.sub(r"[^A-Za-z0-9_.=+-]", "_", value).strip(".")
    return plain if plain == value and len(value) < 100 else f"{plain[:80]}-{digest(value)[:8]}".lstrip("-")


class _OutputFile:
    """A file of documents, as a context manager."""

    def __init__(self, folder: Path, name: str, output: Output):
        self._folder, self._name, self._output = folder, name, output
        self._stack = contextlib.ExitStack()
        self._rows = 0
        self._parquet: ShardWriter | None = None
        if output.format == "jsonl":
            path = folder / f"{name}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._atomic = self._stack.enter_context(AtomicFile(path))
            library = optional_library("zstandard", ".zst files")
            self._file = library.ZstdCompressor(level=3, write_checksum=True).stream_writer(
                self._atomic.file, closefd=False
            )

    def add(self, table: pa.Table) -> None:
        if self._output.format != "jsonl":
            if self._parquet is None:
                writer = ShardWriter(self._folder, f"{self._name}.parquet", table.schema)
                self._parquet = self._stack.enter_context(writer)
            self._parquet.add(table)
            return
        self._rows += table.num_rows
        for row in table.to_pylist():
            known = {name: value for name, value in row.items() if value is not None}
            # Metadata is JSON already.
            rest = known.pop("metadata", None)
            line = to_json(known, default=str, ascii=False)
            self._file.write((line if rest is None else f'{line[:-1]}, "metadata": {rest}}}').encode() + b"\n")

    def finish(self) -> File:
        if self._parquet is not None:
            return self._parquet.finish()
        self._file.close()
        return File(f"{self._name}.jsonl.zst", self._rows, *self._atomic.finish())

    def __enter__(self) -> "_OutputFile":
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.__exit__(*details)
