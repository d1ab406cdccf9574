"""Group-bys and joins in several passes over the data, so that memory is bounded.

The native runner of Daft holds all rows of a group-by or join in memory. Where there are too many rows, each pass
handles the keys of one residue class of the hash. The result is the same; each pass reads the (narrow) columns again.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from train.data.documents import optional_library
from train.files import write_file


def load_daft() -> Any:
    """Imports Daft with its telemetry off.

    Raises:
      InputError: it is not installed.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return optional_library("daft", "duplicates")


class Tables:
    """Named Parquet tables in a folder; a table that is complete is not made again after a restart."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """
        Args:
          folder: of these tables and nothing else; is created if need be. On a cluster all machines see it.
          settings: JSON values that decide what the tables hold. Tables of other settings are removed.
        """
        self.folder = folder
        known = folder / "settings.json"
        content = json.dumps(settings, sort_keys=True).encode()
        if not known.exists() or known.read_bytes() != content:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_file(known, content)

    def make(self, name: str, frame: Callable[[int, int], Any], passes: int = 1) -> list[str]:
        """Writes a table in passes; those that an earlier process has completed are skipped.

        Args:
          name: of the table.
          frame: makes the `daft.DataFrame` of a pass from its number and the number of passes.
          passes: number of passes.

        Returns:
          The table's Parquet files. There is one at least, which may have no row.
        """
        daft = load_daft()
        files = []
        for number in range(passes):
            done = self.folder / name / f"{number:05d}"
            if not done.exists():
                temporary = self.folder / name / f".{number:05d}.tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                # The default lets as many files be read ahead as there are cores, and writes row groups of 128 MB.
                with daft.execution_config_ctx(scantask_max_parallel=2, parquet_target_row_group_size=16 * 2**20):
                    frame(number, passes).write_parquet(str(temporary), compression="zstd")
                temporary.rename(done)
            files += sorted(str(path) for path in done.glob("*.parquet"))
        return files

    def remove(self) -> None:
        """Removes the folder with all tables."""
        shutil.rmtree(self.folder, ignore_errors=True)


def part(column: str, number: int, passes: int) -> Any:
    """An expression that is true for the rows whose key belongs to a pass; equal keys belong to the same one.

    Args:
      column: the key.
      number: of the pass.
      passes: number of passes.
    """
    daft = load_daft()
    return daft.lit(True) if passes == 1 else daft.col(column).hash() % passes == number


def passes_for(rows: int, rows_at_once: int) -> int:
    """How many passes a step over so many rows takes."""
    return max(1, -(-rows // rows_at_once))


def count_rows(files: Sequence[str], column: str | None = None) -> int:
    """The rows of Parquet files, or those where a boolean column is true."""
    if column is None:
        return sum(pq.read_metadata(file).num_rows for file in files)
    return int(ds.dataset(list(files), format="parquet").count_rows(filter=ds.field(column)))
