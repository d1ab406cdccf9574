"""Shards of a corpus that are scored one after the other: those of a curation's run, or units of input files."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, why_unusable
from train.curate.shards import DOCUMENTS, MANIFEST
from train.data.documents import Piece, find_sources, read_records, same_file, share_out
from train.data.text import find_files

# A chunk of documents that is scored and written together ends at either number.
_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 4096, 1 << 25


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a corpus with a fixed order of documents.

    Attributes:
      number: from 0.
      name: of its Parquet file, in the corpus of a run and in the folder of scores.
      size: in bytes, for progress.
      path: the Parquet file with the documents; None for a unit of input files.
      pieces: of the input files.
      content: of the Parquet file, its SHA-256 by the manifest of the curation, or else the time of its last change.
    """

    number: int
    name: str
    size: int
    path: Path | None = None
    pieces: tuple[Piece, ...] = ()
    content: str = ""

    def to_json(self) -> dict[str, Any]:
        """What must not change while the corpus is scored."""
        if self.path is not None:
            return {"name": self.name, "bytes": self.size, "content": self.content}
        return {"name": self.name, "pieces": [[*same_file(p.source), p.start, p.end] for p in self.pieces]}


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Documents in a row.

    Attributes:
      ids: of documents; of files, the place of each, such as "web.jsonl, line 3".
      texts: None for a document without text, or a bad record.
      bad: how many are bad records.
    """

    ids: list[str]
    texts: list[str | None]
    bad: int = 0


def find_shards(inputs: Sequence[str], field: str = "text", unit_bytes: int = 1 << 26) -> list[Shard]:
    """The shards of a corpus.

    Args:
      inputs: the folder of a curation's run, alone; or files, folders and patterns, as for `qwen-jax data build`.
      field: JSON field or Parquet column with the text of files.
      unit_bytes: size of a shard of files.

    Raises:
      InputError: nothing is found, or a file that cannot be read.
    """
    folder = Path(inputs[0]).expanduser() / DOCUMENTS if len(inputs) == 1 else None
    if folder is not None and folder.is_dir():
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise InputError(f"{folder} holds no Parquet file. Expected the documents of a curation in it.")
        for file in files:
            if problem := why_unusable(file):
                raise InputError(problem)
            missing = {"id", "text"} - set(_parquet(file).schema_arrow.names)
            if missing:
                raise InputError(f"{file} has no column {' and '.join(sorted(missing))}. It is no file of documents.")
        _refuse_pages(folder, files)
        manifest = read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).is_file() else {}
        shards = []
        for i, file in enumerate(files):
            stat, known = file.stat(), manifest.get(file.name, {})
            content = known["sha256"] if known.get("size") == stat.st_size else str(stat.st_mtime_ns)
            shards.append(Shard(i, file.name, stat.st_size, file, content=content))
        return shards
    units = share_out(find_sources(find_files(inputs, "files of documents"), "auto", field), unit_bytes)
    return [Shard(i, f"{i:05d}.parquet", sum(p.work for p in unit), None, unit) for i, unit in enumerate(units)]


def _refuse_pages(folder: Path, files: Sequence[Path]) -> None:
    """Raises InputError if no document of a run has a text, as in a run of raw pages, whose text is made later."""
    rows = texts = 0
    for file in files:
        metadata = _parquet(file).metadata
        rows += metadata.num_rows
        column = metadata.schema.names.index("text")
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            statistics = group.column(column).statistics
            known = statistics is not None and statistics.has_null_count
            texts += group.num_rows - (statistics.null_count if known else 0)
    if rows and not texts:
        raise InputError(
            f"None of the {rows:,} documents in {folder} has a text: they are raw pages. Score the text that was "
            f"made of them: --input {folder.parent / 'output'}; or add ModelScores after ExtractText to the curation."
        )


def chunks(shard: Shard, field: str = "text", max_document_bytes: int = 1 << 28) -> Iterator[Chunk]:
    """The documents of a shard, in order. Where chunks end depends on the documents alone.

    Args:
      shard: of `find_shards`.
      field: as there.
      max_document_bytes: a longer record of a file is a bad record.

    Raises:
      InputError: a file that cannot be read to its end.
    """
    ids: list[str] = []
    texts: list[str | None] = []
    bad = characters = 0
    for id, text, is_bad in _documents(shard, field, max_document_bytes):
        ids.append(id)
        texts.append(text)
        bad += is_bad
        characters += len(text or "")
        if len(ids) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield Chunk(ids, texts, bad)
            ids, texts, bad, characters = [], [], 0, 0
    if ids:
        yield Chunk(ids, texts, bad)


def _documents(shard: Shard, field: str, most: int) -> Iterator[tuple[str, str | None, bool]]:
    if shard.path is None:
        for piece in shard.pieces:
            kind = "line" if piece.source.kind == "jsonl" else "record"
            for record in read_records(piece, field, most):
                begins = f" from byte {piece.start}" if piece.start else ""
                where = f"{piece.source.path}, {kind} {record.line}{begins}"
                yield where, record.text if record.reason is None else None, record.reason is not None
        return
    try:
        for batch in _parquet(shard.path).iter_batches(256, columns=["id", "text"]):
            for id, text in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True):
                yield id, text, False
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{shard.path} cannot be read to its end: {error}. Make it again.") from None


def aligned_scores(scores: Path, documents: Path) -> pa.Table:
    """The scores of a shard of documents, row by row.

    Args:
      scores: a Parquet file that `qwen-jax data score` has written.
      documents: the file of documents that it belongs to.

    Returns:
      The columns of scores alone, in the order of the documents.

    Raises:
      InputError: the scores are those of other documents, or a file cannot be read.
    """
    table = _parquet(scores).read()
    ids = _parquet(documents).read(["id"])["id"]
    if "id" not in table.column_names or not table["id"].combine_chunks().equals(ids.combine_chunks()):
        found = table["id"].to_pylist() if "id" in table.column_names else []
        first = next((i for i, (a, b) in enumerate(zip(found, ids.to_pylist(), strict=False)) if a != b), None)
        first = min(len(found), len(ids)) if first is None else first
        raise InputError(
            f"{scores} holds scores of other documents than {documents}: {len(found)} and {len(ids)} of them, and row "
            f"{first} is the first that differs. Score these documents: qwen-jax data score."
        )
    return table.drop_columns([name for name in ("id", "shard", "row") if name in table.column_names])


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file that can be read: {error}. Make it again.") from None
