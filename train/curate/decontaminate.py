"""Removes documents and examples that contain items of evaluation sets: parallel, resumable and deterministic.

A file of the input is a unit of work; a large one is cut into several. What is kept of a file is written under its own
name, of a piece in `.decontaminate/`, and then a record `.decontaminate/00000.json`; what has a valid record is not
done again. When all is done, pieces are joined, `decontamination.json` is written, and `.decontaminate/` is removed.
"""

import collections
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from qwen_jax.errors import InputError
from train.curate.contamination import LEAST_QUESTION, Finder, Mode, make_finder
from train.curate.decontaminate_file import Cleaner, FileRecord, Settings, bad_of
from train.curate.decontaminate_parts import join_parts, locate, pieces_of
from train.curate.evaluation_sets import Items, digest_of, find_sets, read_items
from train.data.bad_records import join
from train.data.documents import Piece, Source, same_file
from train.data.progress import BuildProgress
from train.data.shards import digest, write_json
from train.data.text import find_files
from train.data.units import UnitFolder, do_units
from train.data.workers import cores
from train.lock import lock

SUMMARY, QUARANTINE = "decontamination.json", "quarantine.jsonl"
UNIT_VERSION = 2
"""Of the records of files. Files of another version are done again when a run is resumed."""
_WORK, _INDEX = ".decontaminate", "index"
# Examples that the summary keeps of each set.
_EXAMPLES = 20


@dataclasses.dataclass(frozen=True)
class DecontaminateConfig:
    """Remove documents and examples that contain items of evaluation sets.

    A document is removed where a test item and some window of the document, of 1.5 times as many words, have a longest
    common subsequence of at least 13 words and 0.6 of the item (or of the document, if that is shorter): the rule of
    the Qwen2.5 report, for documents of any length. It finds copies in which words have been changed, added or left
    out, whatever their case, punctuation and line breaks. Items of fewer than 13 words must be there word for word,
    together with their answer. No rule of this kind finds translations, or all paraphrases.

    The output folder has a file for each file of the input, with the same name, format and compression; what is kept
    is not changed by a byte. An interrupted command continues when it is run again.

    qwen-jax data decontaminate --input 'web/*.jsonl.zst' --against gsm8k=test.jsonl mmlu=mmlu/ --output clean

    qwen-jax data decontaminate --input chats.jsonl --against humaneval.jsonl.gz --output clean --report leaks.html

    Attributes:
      input: files, folders or patterns: .jsonl .parquet .txt .md .rst .tex .py, all but Parquet also as .gz and .zst.
        Documents have a column text; of examples (messages, prompt and completion, pairs) all texts count.
      against: test files, NAME=FILE or FILE: .jsonl .json .parquet, or folders and patterns of them.
      output: folder of the result.
      mode: windowed is the rule above. contiguous asks for a common substring instead, and misses changed copies.
        document applies the rule to whole documents, as the report states it. It is refused where documents are
        much longer than the test items, because any item would match by chance.
      action: drop leaves out the document or example. mask keeps it without the matched spans.
      placeholder: what mask puts in the place of a span; by default nothing.
      field: the only column of the input that counts; by default text, or else all columns.
      question: columns of the questions in the test files; by default question, problem, prompt and the like.
      answer: columns of the answers; by default answer, target, solution and the like.
      workers: number of processes; by default one for each core.
      unit_megabytes: larger JSON lines (uncompressed, or in several Zstandard frames) and Parquet files are cut into
        pieces of this size, which workers do in parallel.
      max_document_megabytes: a longer line, value or text file is a bad record. It may need 20 times as much memory.
      max_bad: fraction of all records that may be bad. Bad records are listed in quarantine.jsonl, not copied.
      max_bad_lines: number of records that may be bad in any case.
    """

    input: tuple[str, ...]
    against: tuple[str, ...]
    output: Path
    mode: Mode = "windowed"
    action: Literal["drop", "mask"] = "drop"
    placeholder: str = ""
    field: str | None = None
    question: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    workers: int | None = None
    unit_megabytes: float = 128.0
    max_document_megabytes: float = 128.0
    max_bad: float = 0.001
    max_bad_lines: int = 10

    def __post_init__(self) -> None:
        if not self.input:
            raise InputError("No input. Give files, folders or patterns with --input.")
        if not self.against:
            raise InputError("No evaluation sets. Give their files with --against, as NAME=FILE or FILE.")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers must be at least 1, got {self.workers}.")
        if not 0 <= self.max_bad <= 1 or self.max_bad_lines < 0:
            raise InputError(
                f"max_bad is a fraction in [0, 1] and max_bad_lines a count, got {self.max_bad} and "
                f"{self.max_bad_lines}."
            )
        for name in ("unit_megabytes", "max_document_megabytes"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a positive number, got {value}.")
        if self.placeholder and self.action == "drop":
            raise InputError("A placeholder stands for masked spans. Give it with --action mask.")


def decontaminate(config: DecontaminateConfig, *, progress: Console | None = None) -> dict[str, Any]:
    """Decontaminates files, or finishes an interrupted run.

    The result does not depend on the number of workers or on interruptions. More than one worker means spawned
    processes: a script that calls this needs the usual `if __name__ == "__main__":`.

    Args:
      config: what to read, and what to look for.
      progress: console for the progress bar; by default standard error.

    Returns:
      The summary, as it is in `decontamination.json`: counts of records, and of each evaluation set its items, how many
      were found, in how many documents, and examples. A folder that is finished already is not changed.

    Raises:
      InputError: no input or unreadable input, test files without questions, too many bad records, an output folder
        that holds something else or was begun with other settings, a full disk. Finished files are kept.
    """
    # Check what is asked for before any work.
    files = find_files(config.input)
    if not files:
        raise InputError(f"No files in {', '.join(config.input)}. Give files, folders or patterns with --input.")
    output = config.output.absolute()
    inside = [path for path in files if output in path.absolute().parents]
    if inside:
        raise InputError(f"{inside[0]} is in the output folder {config.output}. Leave it out of --input.")
    sources = [locate(path) for path in files]
    sets = find_sets(config.against)
    settings = {
        "mode": config.mode,
        "action": config.action,
        "placeholder": config.placeholder,
        "field": config.field,
        "question": list(config.question),
        "answer": list(config.answer),
        "max_document_megabytes": config.max_document_megabytes,
        "sets": digest_of(sets),
    }
    folder = UnitFolder(output, _WORK, SUMMARY, "decontaminated data")
    folder.check()
    names = _names(files)
    keys = [digest([*same_file(source), name]) for source, name in zip(sources, names, strict=True)]
    if (output / SUMMARY).exists():
        return _finished(folder, settings, keys)
    with lock(output):
        folder.begin(settings)
        work = folder.records
        units = _units(sources, names, keys, max(int(config.unit_megabytes * 1e6), 1))
        is_whole = functools.partial(_is_whole, output)
        found = ((unit.index, folder.record(unit.index, unit.key, is_whole)) for unit in units)
        records: dict[int, FileRecord] = {i: record for i, record in found if record is not None}
        todo = [unit for unit in units if unit.index not in records]
        items = read_items(sets, config.question, config.answer)
        finder = make_finder(items, config.mode)
        total = sum(unit.piece.work for unit in units)
        left = sum(unit.piece.work for unit in todo)
        console = progress or Console(stderr=True)
        with BuildProgress(console, len(units), len(records), total, total - left, "decontaminating") as display:
            try:
                records |= _run(config, work, items, finder, todo, display)
            finally:
                folder.remove_temporary()
        done = [(unit, records[unit.index]) for unit in units]
        parts: dict[str, list[Path]] = collections.defaultdict(list)
        for unit in units:
            parts[unit.piece.source.path].append(output / unit.name)
        for source, name in zip(sources, names, strict=True):
            if len(parts[source.path]) > 1:
                join_parts(source, parts[source.path], output / name)
        summary = _summary(settings, keys, items, done)
        _quarantine(config, output, done, summary)
        write_json(output / SUMMARY, summary)
        folder.remove_records()
    return summary


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A piece of a file, and the path of what is kept of it in the output folder."""

    index: int
    piece: Piece
    name: str
    key: str


def _units(sources: Sequence[Source], names: Sequence[str], keys: Sequence[str], unit_bytes: int) -> list[_Unit]:
    units: list[_Unit] = []
    for source, name, key in zip(sources, names, keys, strict=True):
        pieces = pieces_of(source, unit_bytes)
        for piece in pieces:
            part = name if len(pieces) == 1 else f"{_WORK}/{len(units):05d}.part"
            unit_key = digest([UNIT_VERSION, key, piece.start, piece.end, len(pieces)])
            units.append(_Unit(len(units), piece, part, unit_key))
    return units


def _names(files: Sequence[Path]) -> list[str]:
    """Paths of the output files in their folder: those of the input below the folder that all are in."""
    absolute = [path.absolute() for path in files]
    common = os.path.commonpath([path.parent for path in absolute])
    return [str(path.relative_to(common)) for path in absolute]


def _is_whole(output: Path, record: FileRecord) -> bool:
    """Whether what was written of a unit has the right size."""
    return record["output"] is None or (output / record["output"]).stat().st_size == record["size"]


def _finished(folder: UnitFolder, settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The summary of a finished folder, if it is one of these settings and files."""
    output = folder.output
    try:
        summary: dict[str, Any] = json.loads((output / SUMMARY).read_bytes())
        folder.check_settings(summary["settings"], settings)
        same = summary["inputs"] == list(keys)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{output / SUMMARY} is damaged ({error}). Remove {output} and run again.") from None
    if not same:
        raise InputError(f"{output} was made from other files. Give another folder with --output.")
    folder.remove_records()  # Left by a process that was killed after writing the summary.
    return summary


def _run(
    config: DecontaminateConfig,
    work: Path,
    items: Items,
    finder: Finder,
    todo: Sequence[_Unit],
    display: BuildProgress,
) -> dict[int, FileRecord]:
    """Does the units in `todo`."""
    settings = Settings(
        work.parent,
        work,
        config.action,
        config.placeholder,
        config.field,
        max(int(config.max_document_megabytes * 1e6), 1),
        config.max_bad,
        config.max_bad_lines,
    )
    jobs = [(unit.index, unit.piece, unit.name, unit.key) for unit in todo]

    def elsewhere() -> Callable[[Callable[[int], None]], Cleaner]:
        finder.save(work / _INDEX)
        return functools.partial(_load_cleaner, settings, work / _INDEX, items.owner)

    here = functools.partial(Cleaner, settings, finder, items.owner, display.advance)
    return do_units(jobs, config.workers or cores(), here, elsewhere, display)


def _load_cleaner(settings: Settings, index: Path, owner: Sequence[int], advance: Any) -> Cleaner:
    return Cleaner(settings, Finder.load(index), owner, advance)


def _summary(
    settings: dict[str, Any], keys: Sequence[str], items: Items, done: Sequence[tuple[_Unit, FileRecord]]
) -> dict[str, Any]:
    """Counts of all files, and what was found of each evaluation set."""
    number = collections.Counter(items.owner)
    short = collections.Counter(items.owner[q.item] for q in items.questions)
    tiny = collections.Counter(items.owner[q.item] for q in items.questions if len(q.words) < LEAST_QUESTION)
    hits = collections.Counter[int]()
    documents = collections.Counter[int]()
    examples: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    records = [record for _, record in done]
    for (unit, record), before in zip(done, _lines_before(done), strict=True):
        hits.update({int(item): count for item, count in record["items"].items()})
        documents.update({int(owner): count for owner, count in record["sets"].items()})
        for example in record["examples"]:
            kept = examples[items.owner[example["item"]]]
            if len(kept) < _EXAMPLES:
                item = example["item"]
                place = {"file": unit.piece.source.path, "record": before + example["record"]}
                known = {"item": items.places[item], "item_text": items.texts[item]}
                kept.append({**example, **place, **known})
    found = collections.Counter(items.owner[item] for item in hits)
    total = collections.Counter[int]()
    for item, count in hits.items():
        total[items.owner[item]] += count
    counts = ("records", "kept", "dropped", "masked", "empty")
    return {
        **{name: sum(record[name] for record in records) for name in counts},  # type: ignore[literal-required]
        "bad": sum(record["bad"] for record in records),
        "sets": {
            name: {
                "items": number[i],
                "items of fewer than 13 words": short[i],
                "of these, known only as whole texts": tiny[i],
                "records without words": items.empty[name],
                "items found": found[i],
                "documents": documents[i],
                "hits": total[i],
                "examples": examples[i],
            }
            for i, name in enumerate(items.names)
        },
        "settings": settings,
        "inputs": list(keys),
    }


def _lines_before(done: Sequence[tuple[_Unit, FileRecord]]) -> list[int]:
    """Of each unit, the lines or rows of its file before it."""
    before, lines = [], collections.Counter[str]()
    for unit, record in done:
        before.append(lines[unit.piece.source.path])
        lines[unit.piece.source.path] += record["lines"]
    return before


def _quarantine(
    config: DecontaminateConfig, output: Path, done: Sequence[tuple[_Unit, FileRecord]], summary: dict[str, Any]
) -> None:
    """Lists the bad records in `quarantine.jsonl`, and raises InputError if there are too many."""
    path = output / QUARANTINE
    if not summary["bad"]:
        path.unlink(missing_ok=True)
        return
    work = output / _WORK
    parts = (
        (bad_of(work, unit.index), functools.partial(_entry, unit.piece.source.path, before))
        for (unit, _), before in zip(done, _lines_before(done), strict=True)
    )
    first = join(path, parts)
    if summary["bad"] > max(config.max_bad_lines, config.max_bad * summary["records"]):
        listed = "; ".join("{file}, line {line}: {reason}".format(**entry) for entry in first)
        raise InputError(
            f"{summary['bad']} of {summary['records']} records are bad, more than --max-bad {config.max_bad:g} and "
            f"--max-bad-lines {config.max_bad_lines} allow: {listed}. All are listed in {path}. Correct them, or "
            "accept them with a larger --max-bad: finished files are kept."
        )


def _entry(file: str, before: int, bad: tuple[int, str]) -> dict[str, str | int]:
    line, reason = bad
    return {"file": file, "line": before + line, "reason": reason}
