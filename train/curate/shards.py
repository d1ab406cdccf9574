"""The folder of a curation: documents in shards, sidecars of stages beside them, and records of what is finished.

    documents/web-00000-000.parquet     documents of the input "web": unit of work 0, part 0
    STAGE/web-00000-000.parquet         what a stage has made of them: row i belongs to document i
    */.records/NAME.json                written last: the job NAME is finished, with the hashes of its files
    STAGE/manifest.json                 of a finished stage: settings, hashes, counts
    output/web/web-00000-000.jsonl.zst  what is kept

A file is written under a temporary name and renamed. Its bytes depend on inputs and settings alone.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_jax.files import to_json
from train.files import AtomicFile, write_file

DOCUMENTS, OUTPUT, RECORDS, MANIFEST = "documents", "output", ".records", "manifest.json"
ROWS = "rows"
SCRATCH = ".scratch"
RESERVED = (DOCUMENTS, OUTPUT, ROWS, "ids", "lock.json", "summary.json", "report.html", MANIFEST, "bad.jsonl")
"""Names in the folder that a stage cannot have."""

VERSION = 2
"""Of the folder: what jobs count, and what their keys mean."""
# A row group is what is in memory at once.
ROW_GROUP_BYTES, ROW_GROUP_ROWS = 8_000_000, 8192


@dataclasses.dataclass(frozen=True)
class File:
    """A finished file.

    Attributes:
      name: relative to the folder of the stage.
      rows: documents in it.
      size: in bytes.
      sha256: of its content (hex).
    """

    name: str
    rows: int
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished job.

    Attributes:
      key: digest of everything that its result depends on.
      files: what it has written.
      counts: what it has counted, JSON values.
    """

    key: str
    files: tuple[File, ...]
    counts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"key": self.key, "files": [dataclasses.asdict(file) for file in self.files], "counts": self.counts}


def write_record(folder: Path, name: str, record: Record) -> None:
    """Says that a job is finished; its files are there.

    Args:
      folder: of the stage.
      name: of the job.
      record: of it.
    """
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    write_file(folder / RECORDS / f"{name}.json", to_json(record.to_json()).encode())


def finished(folder: Path, name: str, key: str) -> Record | None:
    """The record of a job, if it is finished with this key and its files have their sizes; else None."""
    try:
        content = json.loads((folder / RECORDS / f"{name}.json").read_bytes())
        record = Record(content["key"], tuple(File(**file) for file in content["files"]), content["counts"])
        if record.key != key or any((folder / file.name).stat().st_size != file.size for file in record.files):
            return None
    except (OSError, ValueError, KeyError, TypeError):  # Missing or damaged: the job is done again.
        return None
    return record


def remove_others(folder: Path, records: Mapping[str, Record]) -> None:
    """Removes files of a stage that belong to no record: of earlier inputs, and of processes that were killed."""
    ours = {folder / file.name for record in records.values() for file in record.files}
    ours |= {folder / RECORDS / f"{name}.json" for name in records} | {folder / MANIFEST}
    for root, _, names in os.walk(folder):
        for path in (Path(root) / name for name in names):
            if path not in ours:
                path.unlink(missing_ok=True)


class ShardWriter:
    """Writes a Parquet file of one row group after the other, as a context manager.

    Attributes:
      rows: written so far.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema):
        """
        Args:
          folder: of the stage.
          name: of the file.
          schema: of its columns.
        """
        self.rows = 0
        self._schema = schema
        self._name = name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        self._atomic = AtomicFile(folder / name)
        try:
            self._writer = pq.ParquetWriter(
                self._atomic.file, schema, compression="zstd", compression_level=1, use_dictionary=_repeated(schema)
            )
        except BaseException:
            self._atomic.__exit__()
            raise

    def add(self, table: pa.Table) -> None:
        """Writes a row group."""
        table = table.select(self._schema.names).cast(self._schema).combine_chunks()
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self.rows += table.num_rows

    def finish(self) -> File:
        """Completes the file."""
        self._writer.close()
        return File(self._name, self.rows, *self._atomic.finish())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer.is_open:
            try:
                self._writer.close()
            except OSError:
                if kind is None:
                    raise
        self._atomic.__exit__(kind)


def _repeated(schema: pa.Schema) -> list[str]:
    """Columns with few different values."""
    return [field.name for field in schema if field.name in ("domain", "reason", "language")]


def read_groups(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Reads columns of a shard, a row group at a time."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for i in range(file.num_row_groups):
            yield file.read_row_group(i, columns=list(columns), use_threads=False)
