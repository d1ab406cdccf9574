"""Scores a whole corpus, shard by shard, on one or several hosts. A shard that is finished is never scored again."""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from qwen_jax.errors import NO_ROOM, InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.parallel.multihost import gather_from_processes, in_step
from train.curate.scoring.model import NotFiniteError, Work
from train.curate.scoring.scorers import Scorer
from train.curate.scoring.shards import Shard, chunks
from train.fields import differences
from train.files import temporary_name, write_file
from train.lock import lock

SETTINGS, MANIFEST = "settings.json", "manifest.json"


@dataclasses.dataclass
class _Total:
    """Of a job: the work of this process, and records that could not be read."""

    work: Work
    bad: int = 0


def score_corpus(
    scorer: Scorer,
    shards: Sequence[Shard],
    output: Path,
    *,
    field: str = "text",
    sample: float = 1.0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Scores all shards that are not scored yet, and writes the scores of each beside it: OUTPUT/NAME.

    A file has the columns id, shard and row, and those of the scorer, a row for each document in its order. It appears
    when it is complete. After an interruption the same call goes on, and leaves the same bytes.

    With several processes, all of them call this with the same arguments, on a shared folder; process 0 writes.

    Args:
      scorer: makes the columns.
      shards: from `find_shards`.
      output: folder for scores.
      field: of the text, in input files.
      sample: share of the documents that are scored, chosen by their ids; the others have nulls.
      console: for progress; by default standard error.

    Returns:
      The manifest, with the work of this call.

    Raises:
      InputError: scores of other settings or documents in the folder, input that cannot be read, a score that is not
        finite, or a full disk.
    """
    if not 0 < sample <= 1:
        raise InputError(f"sample must be above 0 and at most 1, got {sample}.")
    with contextlib.ExitStack() as held:
        with in_step(f"Opening {output}"):
            if jax.process_index() == 0:
                held.enter_context(lock(output))
        done = _open(output, {**scorer.settings, "sample": sample}, shards)
        left = [shard for shard, is_done in zip(shards, done, strict=True) if not is_done]
        total, begin = _Total(Work()), time.perf_counter()
        with _Shown(console or Console(stderr=True), shards, len(shards) - len(left)) as shown:
            for shard in left:
                with in_step(f"Scoring {shard.name}"):
                    _score(scorer, shard, output, field, sample, total, shown)
        total.work.seconds = time.perf_counter() - begin
        manifest = _manifest(scorer, shards, output, total, len(shards) - len(left))
        with in_step(f"Writing {output / MANIFEST}"):
            if jax.process_index() == 0:
                write_file(output / MANIFEST, (to_json(manifest, indent=2) + "\n").encode())
    return manifest


def _open(output: Path, settings: Mapping[str, Any], shards: Sequence[Shard]) -> list[bool]:
    """Checks the settings of a folder, or writes them; tells which shards are done."""
    wanted = {"scores": dict(settings), "shards": [shard.to_json() for shard in shards]}
    done = [0] * len(shards)
    with in_step(f"Opening {output}"):
        if jax.process_index() == 0:
            path = output / SETTINGS
            for left in output.glob(".*.parquet.*.tmp"):
                left.unlink()  # Of a process that was killed; this one holds the lock.
            if path.is_file():
                changed = differences(read_json(path), wanted)
                if changed:
                    some = list(changed.items())[:5]
                    listed = "; ".join(f"{name} was {before!r}, is {now!r}" for name, (before, now) in some)
                    raise InputError(
                        f"{output} holds scores of other documents or settings: {listed}. Give another folder "
                        "(--output), or remove it."
                    )
            elif any(output.glob("*.parquet")):
                raise InputError(f"{output} holds Parquet files of something else. Give another folder (--output).")
            else:
                write_file(path, (to_json(wanted, indent=2) + "\n").encode())
            done = [int((output / shard.name).is_file()) for shard in shards]
    # All processes skip the same shards.
    flags: list[bool] = np.atleast_2d(gather_from_processes(done))[0].astype(bool).tolist()
    return flags


def _score(
    scorer: Scorer,
    shard: Shard,
    output: Path,
    field: str,
    sample: float,
    total: _Total,
    shown: "_Shown",
) -> None:
    row = 0
    with _Output(output / shard.name, scorer.schema, writes=jax.process_index() == 0) as out:
        for chunk in chunks(shard, field):
            pairs = zip(chunk.ids, chunk.texts, strict=True)
            texts = [text if sample == 1 or _share(id) < sample else None for id, text in pairs]
            table, work = _scores_of(scorer, shard, row, chunk.ids, texts)
            out.write(chunk.ids, shard.number, row, table)
            row += len(chunk.ids)
            total.bad += chunk.bad
            total.work.add(work)
            shown.update(total)
        out.finish()
    shown.shard()


class _Output:
    """A Parquet file that appears when it is complete.

    A failure to write is raised at the end of a shard: until then the other processes compute with this one.
    """

    def __init__(self, path: Path, columns: pa.Schema, writes: bool):
        keys = pa.string(), pa.int32(), pa.int64()
        names = ("id", "shard", "row")
        key_fields = [pa.field(name, kind, nullable=False) for name, kind in zip(names, keys, strict=True)]
        self._path, self._schema, self._writes = path, pa.schema([*key_fields, *columns]), writes
        self._temporary = temporary_name(path)
        self._problem: OSError | None = None

    def __enter__(self) -> Self:
        if self._writes:
            self._file = self._temporary.open("wb")
            self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd")
        return self

    def write(self, ids: Sequence[str], shard: int, row: int, table: pa.Table) -> None:
        """Writes scores from a row on."""
        if not self._writes or self._problem is not None:
            return
        count = len(ids)
        keys = [
            pa.array(ids, pa.string()),
            pa.array(np.full(count, shard, np.int32)),
            pa.array(np.arange(row, row + count, dtype=np.int64)),
        ]
        try:
            self._writer.write_table(pa.Table.from_arrays([*keys, *table.columns], schema=self._schema))
        except OSError as error:
            self._problem = error

    def finish(self) -> None:
        """Completes the file. Raises InputError if the disk is full, or what else went wrong."""
        if not self._writes:
            return
        try:
            if self._problem is not None:
                raise self._problem
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._temporary.replace(self._path)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise InputError(f"The disk of {self._path} is full. Make room; finished shards are kept.") from None
            raise

    def __exit__(self, *_: object) -> None:
        if self._writes:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def _share(id: str) -> float:
    """A number from 0 to below 1 that an id decides."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=6).digest()) / 2**48


def _scores_of(
    scorer: Scorer, shard: Shard, row: int, ids: Sequence[str], texts: Sequence[str | None]
) -> tuple[pa.Table, Work]:
    try:
        return scorer.score(texts)
    except NotFiniteError as error:
        i = error.document
        raise NotFiniteError(row + i, f"{ids[i]} (row {row + i} of {shard.name})") from None


def _manifest(scorer: Scorer, shards: Sequence[Shard], output: Path, total: _Total, skipped: int) -> dict[str, Any]:
    rows = [pq.read_metadata(output / shard.name).num_rows for shard in shards] if jax.process_index() == 0 else []
    return {
        "columns": {field.name: str(field.type) for field in scorer.schema},
        "shards": len(shards),
        "shards_skipped": skipped,
        "rows": sum(rows),
        "bad_records": total.bad,
        "processes": jax.process_count(),
        "device": jax.devices()[0].device_kind,
        **total.work.to_json(),
    }


class _Shown:
    """Progress: a bar on a terminal, a line for each shard elsewhere."""

    def __init__(self, console: Console, shards: Sequence[Shard], done: int):
        self._console, self._count, self._done = console, len(shards), done
        self._begin = time.perf_counter()
        self._text = ""
        self._bar = Progress(
            TextColumn("scoring"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or jax.process_index() > 0,
            transient=True,
        )
        self._task = self._bar.add_task("", total=len(shards), completed=done)

    def __enter__(self) -> "_Shown":
        if self._done:
            self._print(f"resuming: {self._done} of {self._count} shards are scored")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, total: _Total) -> None:
        """Shows the rates so far."""
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        work = total.work
        self._text = f"{work.documents / seconds:,.1f} documents/s, {work.tokens / seconds:,.0f} tokens/s"
        self._bar.update(self._task, description=f"{self._done}/{self._count} shards, {self._text}")

    def shard(self) -> None:
        """A shard is done."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        if not self._console.is_terminal:
            self._print(f"{self._done}/{self._count} shards  {self._text}")

    def _print(self, text: str) -> None:
        if jax.process_index() == 0:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
