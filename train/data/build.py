"""Builds a data set of packed rows from files of documents: parallel, resumable and deterministic.

The input is divided into units of work, which depend only on the files and the settings. A unit is written as one shard
and a record `units/00000.json`, in this order; a unit with a valid record is not repeated. When all units are finished,
the manifest is written and `units/` is removed.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from rich.console import Console

from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from train.data.bad_records import BadRecords, join
from train.data.documents import DamagedInputError, Piece, Record, find_sources, read_records, same_file, share_out
from train.data.progress import BuildProgress
from train.data.shards import (
    MANIFEST,
    QUARANTINE,
    Input,
    Manifest,
    Shard,
    ShardWriter,
    check_files,
    digest,
    load_manifest,
    write_json,
)
from train.data.text import find_files
from train.data.units import UnitFolder, do_units
from train.data.workers import cores
from train.lock import lock

UNIT_VERSION = 2
"""Of units: which lines belong to a piece. Units of another version are done again when a build is resumed."""
_UNITS = "units"
# Characters that are tokenized at a time; the tokenizers library uses about 170 bytes of memory for each.
_BATCH_CHARACTERS = 1_000_000


class UnitRecord(TypedDict):
    """The JSON record of a finished unit of work.

    Attributes:
      key: digest of its input: files, sizes, times, and the parts of the files.
      shard: fields of its `Shard`; None if it had no text.
      lines: lines read of each of its pieces.
      empty: number of empty documents.
      bad: number of bad records.
      records: number of all records.
    """

    key: str
    shard: dict[str, str | int] | None
    lines: list[int]
    empty: int
    bad: int
    records: int


Settings = Mapping[str, str | int]
Unit = tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """Tokenize JSON lines, Parquet and plain text into packed rows for training.

    Documents are tokenized, ended with the tokenizer's end-of-text id, concatenated and cut into rows of one length;
    each token is used exactly once. An interrupted build continues when the same command is run again.

    Attributes:
      input: files, folders or patterns: .jsonl .parquet .txt .md .rst .tex .py, all but Parquet also as .gz and .zst.
      tokenizer: folder of the tokenizer.
      length: tokens in a row.
      output: folder of the data set.
      domain: name of the data set in its manifest; by default the name of the output folder.
      field: JSON field or Parquet column that holds the text. A plain text file is one document.
      format: format of the input files; auto decides by their extensions.
      workers: number of processes; by default one for each core.
      max_document_megabytes: a longer line, value or text file is a bad record. A worker may need 200 times as much
        memory.
      max_bad: fraction of all records that may be bad; with more, the build fails and keeps what is finished.
      max_bad_lines: number of records that may be bad in any case.
      unit_megabytes: input of a unit of work, which becomes one shard; by default 128, and more for long rows.
    """

    input: tuple[str, ...]
    tokenizer: Path
    length: int
    output: Path
    domain: str | None = None
    field: str = "text"
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    workers: int | None = None
    max_document_megabytes: float = 8.0
    max_bad: float = 0.001
    max_bad_lines: int = 10
    unit_megabytes: float | None = None

    def __post_init__(self) -> None:
        if not self.input:
            raise InputError("No input. Give files, folders or patterns with --input.")
        if not 2 <= self.length <= 2**31:
            raise InputError(f"A row must hold at least 2 tokens and less than 2**31, got a length of {self.length}.")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers must be at least 1, got {self.workers}.")
        if not 0 <= self.max_bad <= 1 or self.max_bad_lines < 0:
            raise InputError(
                f"max_bad is a fraction in [0, 1] and max_bad_lines a count, got {self.max_bad} and "
                f"{self.max_bad_lines}."
            )
        for name in ("max_document_megabytes", "unit_megabytes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a positive number, got {value}.")

    @property
    def max_document_bytes(self) -> int:
        """`max_document_megabytes` in bytes."""
        return max(int(self.max_document_megabytes * 1e6), 1)

    @property
    def unit_bytes(self) -> int:
        """Bytes of input in a unit of work; by default enough for about 250 rows, of which one has padding."""
        if self.unit_megabytes is None:
            return max(128_000_000, 1024 * self.length)
        return max(int(self.unit_megabytes * 1e6), 1)


def build(config: BuildConfig, *, progress: Console | None = None) -> Manifest:
    """Builds a data set, or finishes an interrupted build.

    The result does not depend on the number of workers or on interruptions. More than one worker are spawned processes:
    a script that calls this needs the usual `if __name__ == "__main__":`.

    Args:
      config: what to read, and how to pack it.
      progress: console for the progress bar; by default standard error.

    Returns:
      The manifest, as it is in the folder. A data set that is finished already is not changed.

    Raises:
      InputError: no input or unreadable input, too many bad records, an output folder that holds something else or
        was begun with other settings, a full disk. Finished units of work are kept.
    """
    # What is asked for.
    tokenizer = load_tokenizer(config.tokenizer)
    settings: Settings = {
        "domain": config.domain if config.domain is not None else config.output.absolute().name,
        "length": config.length,
        "tokenizer": tokenizer.fingerprint(),
        "end_of_text": tokenizer.eos_id,
        "field": config.field,
        "max_document_bytes": config.max_document_bytes,
        "unit_bytes": config.unit_bytes,
    }
    # Check input and output before any work.
    files = find_files(config.input)
    output = config.output.absolute()
    inside = [path for path in files if output in path.absolute().parents]
    if inside:
        raise InputError(f"{inside[0]} is in the output folder {config.output}. Leave it out of --input.")
    folder = _folder(output)
    folder.check()
    if (output / MANIFEST).exists():
        return _finished(folder, settings, files)
    advice = "Leave the file out, or give the format of all files: --format jsonl, parquet or text."
    units = share_out(find_sources(files, config.format, config.field, advice), config.unit_bytes)
    with lock(output):
        # Which units are finished already?
        folder.begin(settings)
        keys = [_key(unit) for unit in units]
        is_whole = functools.partial(_is_whole, output, config.length)
        found = ((i, folder.record(i, key, is_whole)) for i, key in enumerate(keys))
        records: dict[int, UnitRecord] = {i: record for i, record in found if record is not None}
        todo = [(i, unit, keys[i]) for i, unit in enumerate(units) if i not in records]
        # Do the others.
        total = sum(piece.work for unit in units for piece in unit)
        left = sum(piece.work for _, unit, _ in todo for piece in unit)
        with BuildProgress(progress or Console(stderr=True), len(units), len(records), total, total - left) as display:
            try:
                records |= _run(config, tokenizer, output, todo, display)
            finally:
                folder.remove_temporary()
        # Put the data set together.
        ordered = [records[i] for i in range(len(units))]
        manifest = _manifest(tokenizer, settings, units, ordered)
        _quarantine(config, output, units, ordered, manifest)
        if not manifest.shards:
            raise InputError(
                f"Found no text in {len(files)} input files: {manifest.bad} records are bad and {manifest.empty} empty."
                " Give files with text, or give the name of its field with --field."
            )
        ours = {name for shard in manifest.shards for name, _, _ in shard.files(config.length)}
        for path in output.glob("shard-*"):
            if path.name not in ours:  # Left by an interrupted build with more input files.
                path.unlink()
        write_json(output / MANIFEST, manifest.to_json())
        folder.remove_records()
    return manifest


def _key(unit: Unit) -> str:
    """A digest of a unit's input, and of how it is read."""
    pieces = [[*same_file(piece.source), piece.source.kind, piece.start, piece.end] for piece in unit]
    return digest([UNIT_VERSION, pieces])


def _folder(output: Path) -> UnitFolder:
    return UnitFolder(output, _UNITS, MANIFEST, "data set")


def _is_whole(output: Path, length: int, record: UnitRecord) -> bool:
    """Whether the shard of a unit has files of the right sizes."""
    check_files(output, _shards([record]), length)
    return True


def _finished(folder: UnitFolder, settings: Settings, files: Sequence[Path]) -> Manifest:
    """Loads a finished data set and checks that it has the given settings and input files."""
    output = folder.output
    manifest = load_manifest(output)
    folder.check_settings({name: getattr(manifest, name) for name in settings}, settings)
    given = {str(path): path.stat().st_size for path in files}
    built = {entry.path: entry.size for entry in manifest.inputs}
    changed = sorted(path for path in {*given, *built} if given.get(path) != built.get(path))
    if changed:
        raise InputError(
            f"{output} was built from other files: {changed[0]} "
            f"{'is new' if changed[0] not in built else 'is gone' if changed[0] not in given else 'has another size'}"
            f"{f', and {len(changed) - 1} more' if len(changed) > 1 else ''}. Give another folder with --output."
        )
    check_files(output, manifest.shards, manifest.length)
    folder.remove_records()  # Left by a process that was killed after writing the manifest.
    return manifest


def _shards(records: Sequence[UnitRecord]) -> tuple[Shard, ...]:
    """The shards of finished units."""
    return tuple(Shard(**record["shard"]) for record in records if record["shard"])  # type: ignore[arg-type]


def _run(
    config: BuildConfig,
    tokenizer: Tokenizer,
    output: Path,
    todo: Sequence[tuple[int, Unit, str]],
    display: BuildProgress,
) -> dict[int, UnitRecord]:
    """Does the units in `todo`."""
    return do_units(
        todo,
        config.workers or cores(),
        lambda: Encoder(config, output, display.advance, tokenizer),
        lambda: functools.partial(Encoder, config, output),
        display,
    )


class Encoder:
    """Tokenizes units of work and writes their shards. Each worker process has one."""

    def __init__(
        self, config: BuildConfig, output: Path, advance: Callable[[int], None], tokenizer: Tokenizer | None = None
    ):
        """Loads the tokenizer, unless one is given.

        Args:
          config: of the build.
          output: folder of the data set.
          advance: is called with the bytes of input that were processed since its last call.
          tokenizer: the tokenizer of `config`.
        """
        self._config, self._output, self._advance = config, output, advance
        self._tokenizer = tokenizer or load_tokenizer(config.tokenizer)
        self._unreported = 0

    def __call__(self, index: int, unit: Unit, key: str) -> UnitRecord | DamagedInputError:
        """Does one unit of work.

        Args:
          index: number of the unit, from 0.
          unit: its pieces of input files.
          key: digest of its input.

        Returns:
          The record of the unit, which is also written, or the error of a damaged input file.

        Raises:
          InputError: most records are bad, or the disk is full.
        """
        lines: list[int] = []
        empty = records = 0
        folder = self._output / _UNITS
        try:
            with (
                ShardWriter(self._output, f"shard-{index:05d}", self._config.length) as shard_writer,
                BadRecords(_bad_of(folder, index)) as bad,
            ):
                texts: list[str] = []
                size = 0
                for number, piece in enumerate(unit):
                    lines.append(0)
                    found = read_records(piece, self._config.field, self._config.max_document_bytes, self._read)
                    for record in found:
                        records += 1
                        lines[-1] = record.line
                        if record.reason is not None:
                            bad.add([number, record.line, record.reason])
                            if bad.count > max(self._config.max_bad_lines, max(self._config.max_bad, 0.5) * records):
                                if piece.source.compression:
                                    # Records of a damaged file may be garbage: read on, which raises at the damage.
                                    collections.deque(found, maxlen=0)
                                raise InputError(_hopeless(piece, records, bad.count, record))
                        elif record.text:
                            texts.append(record.text)
                            size += len(record.text)
                        else:
                            empty += 1
                        if size >= _BATCH_CHARACTERS:
                            self._encode(shard_writer, texts)
                            texts, size = [], 0
                self._encode(shard_writer, texts)
                shard = shard_writer.finish()
                bad.finish()
        except DamagedInputError as error:
            return error
        # The record comes last: it says that everything else is complete.
        done: UnitRecord = {
            "key": key,
            "shard": dataclasses.asdict(shard) if shard else None,
            "lines": lines,
            "empty": empty,
            "bad": bad.count,
            "records": records,
        }
        _folder(self._output).write_record(index, done)
        return done

    def _read(self, num_bytes: int) -> None:
        """Counts input that was read. It is reported once it is tokenized: reading alone is a hundred times faster."""
        self._unreported += num_bytes

    def _encode(self, shard: ShardWriter, texts: list[str]) -> None:
        if texts:
            shard.add(self._tokenizer.encode_documents(texts))
        self._advance(self._unreported)
        self._unreported = 0


def _bad_of(folder: Path, index: int) -> Path:
    """The list of bad records of a unit: number of the piece, line in it, and reason."""
    return folder / f"{index:05d}.bad.jsonl"


def _hopeless(piece: Piece, records: int, bad: int, last: Record) -> str:
    where = f"line {last.line}" + (f" after byte {piece.start}" if piece.start else "")
    return (
        f"{bad} of {records} records in a row are bad; the last, {piece.source.path}, {where}: {last.reason}. "
        "Give the name of the field with --field, give other files, or accept bad records with a larger --max-bad."
    )


def _manifest(
    tokenizer: Tokenizer,
    settings: Settings,
    units: Sequence[Unit],
    records: Sequence[UnitRecord],
) -> Manifest:
    shards = _shards(records)
    rows, tokens = sum(shard.rows for shard in shards), sum(shard.tokens for shard in shards)
    sizes = {piece.source.path: piece.source.size for unit in units for piece in unit}
    return Manifest(
        **settings,  # type: ignore[arg-type]
        vocab_size=tokenizer.vocab_size,
        rows=rows,
        tokens=tokens,
        documents=sum(shard.documents for shard in shards),
        padding=1 - tokens / (rows * int(settings["length"])) if rows else 0.0,
        empty=sum(record["empty"] for record in records),
        bad=sum(record["bad"] for record in records),
        inputs=tuple(Input(path, size) for path, size in sizes.items()),
        shards=shards,
    )


def _quarantine(
    config: BuildConfig, output: Path, units: Sequence[Unit], records: Sequence[UnitRecord], manifest: Manifest
) -> None:
    """Lists the bad records in `quarantine.jsonl`, and raises InputError if there are too many."""
    path = output / QUARANTINE
    if not manifest.bad:
        path.unlink(missing_ok=True)
        return

    def parts() -> Iterator[tuple[Path, Callable[[Any], object]]]:
        before: dict[str, int] = {}  # Lines of each file in earlier pieces.
        for index, (unit, record) in enumerate(zip(units, records, strict=True)):
            starts = []
            for piece, lines in zip(unit, record["lines"], strict=True):
                starts.append((piece.source.path, before.get(piece.source.path, 0)))
                before[piece.source.path] = starts[-1][1] + lines
            yield _bad_of(output / _UNITS, index), functools.partial(_entry, starts)

    first = join(path, parts())
    total = manifest.documents + manifest.empty + manifest.bad
    if manifest.bad > max(config.max_bad_lines, config.max_bad * total):
        listed = "; ".join("{file}, line {line}: {reason}".format(**entry) for entry in first)
        raise InputError(
            f"{manifest.bad} of {total} records are bad, more than --max-bad {config.max_bad:g} and --max-bad-lines "
            f"{config.max_bad_lines} allow: {listed}. All are listed in {path}. Correct them, or accept them with a "
            "larger --max-bad: finished units of work are kept."
        )


def _entry(starts: Sequence[tuple[str, int]], bad: tuple[int, int, str]) -> dict[str, str | int]:
    """A bad record of a unit with its file, and its line in the file."""
    number, line, reason = bad
    file, before = starts[number]
    return {"file": file, "line": before + line, "reason": reason}
