"""Shards of a corpus that are scored one after the other: those of a curation's run, or units of input files."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, why_unusable
from train.curate.corpus import View
from train.curate.shards import DOCUMENTS, MANIFEST, VERSION, read_groups
from train.curate.stage import TEXT, scatter
from train.data.documents import Piece, find_sources, read_records, same_file, share_out
from train.data.shards import digest
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
      view: the documents of a curation and what its stages have made of them; None for a unit of input files.
      pieces: of the input files.
      content: digest of the files that decide ids and texts, by the manifests of the curation.
    """

    number: int
    name: str
    size: int
    view: View | None = None
    pieces: tuple[Piece, ...] = ()
    content: str = ""

    def to_json(self) -> dict[str, Any]:
        """What must not change while the corpus is scored."""
        if self.view is not None:
            return {"name": self.name, "bytes": self.size, "content": self.content}
        return {"name": self.name, "pieces": [[*same_file(p.source), p.start, p.end] for p in self.pieces]}


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Documents in a row.

    Attributes:
      ids: of documents; of files, the place of each, such as "web.jsonl, line 3".
      texts: None for a document that the curation has removed, one without text, or a bad record.
      bad: how many are bad records.
    """

    ids: list[str]
    texts: list[str | None]
    bad: int = 0


def find_shards(inputs: Sequence[str], field: str = "text", unit_bytes: int = 1 << 26) -> list[Shard]:
    """The shards of a corpus.

    Args:
      inputs: the folder of a finished curation, alone: the documents that no stage has removed, with the newest text;
        or files, folders and patterns, as for `qwen-jax data build`.
      field: JSON field or Parquet column with the text of files.
      unit_bytes: size of a shard of files.

    Raises:
      InputError: nothing is found, or a file that cannot be read.
    """
    folder = Path(inputs[0]).expanduser() if len(inputs) == 1 else None
    if folder is not None and (folder / DOCUMENTS).is_dir():
        return _shards_of_run(folder)
    units = share_out(find_sources(find_files(inputs, "files of documents"), "auto", field), unit_bytes)
    return [Shard(i, f"{i:05d}.parquet", sum(p.work for p in unit), None, unit) for i, unit in enumerate(units)]


def _shards_of_run(folder: Path) -> list[Shard]:
    """The shards of a finished curation; a stage's files that are not those of its manifest are refused."""
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"The curation in {folder} is not finished: it has no {MANIFEST}. Run qwen-jax data curate to its end."
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{folder} has version {manifest.get('version')!r} of a curation's folders, expected {VERSION}: another "
            "version of qwen-jax has written it. Run the curation again in a new folder."
        )
    files = {name: _files(folder / name) for name in (DOCUMENTS, *(stage["name"] for stage in manifest["stages"]))}
    documents = [name for name in files[DOCUMENTS] if name.endswith(".parquet")]
    made = {name: tuple(_parquet(folder / name / documents[0]).schema_arrow.names) for name in files if documents}
    view = View(folder, tuple((name, made[name]) for name in list(made)[1:]))
    sources = [DOCUMENTS, *view.sources((TEXT,))]
    if documents and not any(TEXT in made[name] for name in sources[1:]):
        _refuse_pages(folder, documents)
    shards = []
    for i, name in enumerate(documents):
        for source in sources:
            if (folder / source / name).stat().st_size != files[source][name]["size"]:
                raise InputError(f"{folder / source / name} is not what {MANIFEST} says. Run the curation again.")
        content = digest([files[source][name]["sha256"] for source in sources])
        shards.append(Shard(i, name, files[DOCUMENTS][name]["size"], view, content=content))
    return shards


def _files(stage: Path) -> dict[str, Any]:
    """The files of a stage by its manifest: sizes and hashes."""
    files: dict[str, Any] = read_json(stage / MANIFEST)["files"]
    for name in files:
        if problem := why_unusable(stage / name):
            raise InputError(problem)
    return files


def _refuse_pages(folder: Path, files: Sequence[str]) -> None:
    """Raises InputError if no document of a run has a text, as in a run of raw pages from which none is extracted."""
    rows = texts = 0
    for name in files:
        metadata = _parquet(folder / DOCUMENTS / name).metadata
        rows += metadata.num_rows
        column = metadata.schema.names.index("text")
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            statistics = group.column(column).statistics
            known = statistics is not None and statistics.has_null_count
            texts += group.num_rows - (statistics.null_count if known else 0)
    if rows and not texts:
        raise InputError(
            f"None of the {rows:,} documents in {folder} has a text: they are raw pages. Add ExtractText to the "
            "curation."
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
    if shard.view is None:
        for piece in shard.pieces:
            kind = "line" if piece.source.kind == "jsonl" else "record"
            for record in read_records(piece, field, most):
                begins = f" from byte {piece.start}" if piece.start else ""
                where = f"{piece.source.path}, {kind} {record.line}{begins}"
                yield where, record.text if record.reason is None else None, record.reason is not None
        return
    path = shard.view.folder / DOCUMENTS / shard.name
    try:
        batches = shard.view.batches(path.stem, (TEXT,))
        for ids, batch in zip(read_groups(path, ("id",)), batches, strict=True):
            texts = scatter(batch.table[TEXT], batch.indices, batch.size)
            for id, text in zip(ids["id"].to_pylist(), texts.to_pylist(), strict=True):
                yield id, text, False
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read to its end: {error}. Run the curation again.") from None


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
