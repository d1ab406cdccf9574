"""Cuts a large file of the input of decontamination into pieces, and joins what was made of them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.data.documents import Piece, Source, find_sources, optional_library, reading_errors, share_out
from train.data.shards import writing
from train.files import written_whole


def locate(path: Path) -> Source:
    """The format and size of an input file, after checking that it can be read.

    Raises:
      InputError: an unknown extension, or a file that cannot be opened.
    """
    if path.suffix.lower() != ".parquet":
        return find_sources([path], "auto", "text")[0]
    parquet = optional_library("pyarrow.parquet", "Parquet files")
    # The text may be in any column: the bytes of all of them count.
    source = find_sources([path], "text", "text")[0]
    try:
        with parquet.ParquetFile(path) as file:
            metadata = file.metadata
            groups = tuple(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    except reading_errors():
        groups = ()  # It is damaged: an error when its turn comes.
    return Source(source.path, "parquet", "", source.size, source.modified_ns, groups)


def pieces_of(source: Source, unit_bytes: int) -> list[Piece]:
    """The pieces of a file, each a unit of work: one, if it is small or can only be read from its beginning."""
    pieces = [piece for unit in share_out([source], unit_bytes) for piece in unit]
    return pieces or [Piece(source, 0, 0, 0)]


def codec_of(file: Any) -> str:
    """The compression of a Parquet file, as its writer calls it."""
    metadata = file.metadata
    if not (metadata.num_row_groups and metadata.num_columns):
        return "SNAPPY"
    codec: str = metadata.row_group(0).column(0).compression
    return "NONE" if codec == "UNCOMPRESSED" else codec


def join_parts(source: Source, parts: Sequence[Path], path: Path) -> None:
    """Joins what was made of the pieces of a file: the lines, frames or row groups of one after those of the other.

    Args:
      source: the file of the input.
      parts: of its pieces, in order.
      path: of the result, which appears when it is complete.

    Raises:
      InputError: the result cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            if source.kind == "parquet":
                _join_row_groups(source, parts, temporary)
            else:
                with temporary.open("wb") as whole:
                    for part in parts:
                        with part.open("rb") as file:
                            shutil.copyfileobj(file, whole, 1 << 20)


def _join_row_groups(source: Source, parts: Sequence[Path], temporary: Path) -> None:
    parquet = optional_library("pyarrow.parquet", "Parquet files")
    with parquet.ParquetFile(source.path) as file:
        schema, codec = file.schema_arrow, codec_of(file)
    with parquet.ParquetWriter(temporary, schema, compression=codec) as writer:
        for part in parts:
            with parquet.ParquetFile(part) as file:
                for group in range(file.metadata.num_row_groups):
                    writer.write_table(file.read_row_group(group))
