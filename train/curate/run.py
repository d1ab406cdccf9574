"""Runs a curation: stage after stage, shard by shard, resumable at any moment."""

import dataclasses
import functools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

import qwen_jax
from qwen_jax.errors import NO_ROOM, InputError
from qwen_jax.files import to_json
from train.curate import engine as engines
from train.curate.corpus import Corpus, View
from train.curate.curation import Curation, settings_of
from train.curate.engine import Engine, Resources
from train.curate.jobs import computing, reading, writing
from train.curate.progress import CurationProgress
from train.curate.report import samples, to_html
from train.curate.shards import (
    DOCUMENTS,
    MANIFEST,
    OUTPUT,
    RECORDS,
    SCRATCH,
    VERSION,
    File,
    Record,
    finished,
    remove_others,
)
from train.curate.sources import Found, Unit, find_units
from train.curate.stage import REPETITIONS, GlobalStage, RowStage, Stage
from train.data.documents import optional_library
from train.data.shards import digest
from train.files import write_file
from train.lock import lock

SUMMARY, REPORT, BAD = "summary.json", "report.html", "bad.jsonl"


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a curation is run. None of this changes the result.

    Attributes:
      engine: "native" is this machine, "ray" a Ray cluster; every node must see inputs and output under the same paths.
      workers: by default one a core.
      address: of the Ray cluster; None is `RAY_ADDRESS`, or else a Ray of this machine, which is started.
    """

    engine: engines.Kind = "native"
    workers: int | None = None
    address: str | None = None


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A shard of documents: its domain, the hash of its file, and bytes of pages and texts in it."""

    name: str
    domain: str
    sha256: str
    rows: int
    size: int


def run(
    curation: Curation, folder: Path, options: RunOptions | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Runs a curation into a folder. What an earlier run has finished there, with the same settings, is kept.

    Args:
      curation: what is made.
      folder: gets documents, sidecars, output, manifests, `summary.json` and `report.html`.
      options: how it is run.
      console: shows progress; by default nothing is shown.

    Returns:
      The summary, which is also written.

    Raises:
      InputError: input that cannot be used, a stage that fails, a full disk, a missing library. Finished shards are
        kept: the same call goes on from there.
    """
    options = options or RunOptions()
    if curation.output.format == "jsonl":
        optional_library("zstandard", "Outputs in JSON lines")
    with lock(folder):
        try:
            # Scratch of the engine is of this run alone.
            engine = Engine(options.engine, options.workers, options.address, folder / SCRATCH)
            with CurationProgress(console, len(curation.all_stages) + 2) as progress:
                return _Run(curation, folder.absolute(), engine, progress).run()
        except OSError as error:
            if error.errno in NO_ROOM:
                raise InputError(
                    f"{error.strerror}: {error.filename or folder}. Make room and run the same command again: finished "
                    "shards are kept."
                ) from error
            raise
        finally:
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)


class _Run:
    """A run of a curation: what is counted, and what each stage has written."""

    def __init__(self, curation: Curation, folder: Path, engine: Engine, progress: CurationProgress):
        self._curation, self._folder, self._engine, self._progress = curation, folder, engine, progress
        self._shards: list[_Shard] = []
        # By stage and shard, what has been written.
        self._records: dict[str, dict[str, Record]] = {}
        self._view = View(folder)
        self._summary: dict[str, Any] = {
            "curation": curation.name,
            "finished": False,
            "fault": None,
            "qwen_jax": qwen_jax.__version__,
            "config": digest(curation.settings()),
            "inputs": {},
            "stages": [],
            "output": {},
            "lengths": {},
            "writing": {"in": 0, "out": 0, "removed": {}, "samples": {}},
        }

    def run(self) -> dict[str, Any]:
        """Reads, runs all stages, writes the output, summary and report."""
        began = time.monotonic()
        self._check_folders()
        try:
            self._read()
            for stage in self._curation.all_stages:
                self._stage(stage)
            self._write()
            self._summary["finished"] = True
        except InputError as error:
            self._summary["fault"] = str(error)
            raise
        finally:
            self._summary["seconds"] = time.monotonic() - began
            write_file(self._folder / SUMMARY, to_json(self._summary, indent=1).encode())
            write_file(self._folder / REPORT, to_html(self._summary).encode())
        return self._summary

    def _check_folders(self) -> None:
        """Raises InputError where a folder is of another version, or holds files of others, which would be removed."""
        for name in (DOCUMENTS, *(stage.name for stage in self._curation.all_stages), OUTPUT):
            folder = self._folder / name
            if folder.exists() and not (folder / RECORDS).is_dir() and (not folder.is_dir() or any(folder.iterdir())):
                raise InputError(f"{folder} was not made by a curation. Move it away, or give another output folder.")
            manifest = _read_manifest(folder)
            if manifest is not None and manifest.get("version") != VERSION:
                raise InputError(
                    f"{folder} has version {manifest.get('version')!r} of a curation's folders, expected {VERSION}: "
                    f"another version of qwen-jax has written it. Remove {self._folder}, or give another output folder."
                )

    def _read(self) -> None:
        """Reads all inputs into shards of documents."""
        curation = self._curation
        found = {source.name: find_units(source, curation.shard_bytes, self._folder) for source in curation.inputs}
        units = [unit for one in found.values() for unit in one.units]
        keys = {
            unit.name: digest(
                [VERSION, unit.input.settings(), curation.shard_bytes, [part.key() for part in unit.parts]]
            )
            for unit in units
        }
        jobs = {
            unit.name: {
                "name": unit.name,
                "key": keys[unit.name],
                "input": dataclasses.asdict(unit.input),
                "parts": [part.to_json() for part in unit.parts],
            }
            for unit in units
        }
        # Which units are finished already? The others are read.
        settings = {"inputs": [source.settings() for source in curation.inputs], "shard_bytes": curation.shard_bytes}
        make = functools.partial(reading, self._folder, curation.shard_bytes)
        work = {unit.name: unit.work for unit in units}
        records = self._do(DOCUMENTS, make, keys, jobs, work, settings)
        seconds = self._progress.end(_rows(records), _rows(records) + _bad(records.values()))
        # What was found, and was it enough?
        for name, one in found.items():
            self._summary["inputs"][name] = _input_summary(one, {unit.name: records[unit.name] for unit in one.units})
        self._write_bad(found, units, records)
        self._shards = [
            _Shard(file.name.removesuffix(".parquet"), unit.input.name, file.sha256, file.rows, size)
            for unit in units
            # Behind the shards there may be the list of bad records.
            for file, size in zip(records[unit.name].files, records[unit.name].counts["bytes"], strict=False)
        ]
        self._manifest(DOCUMENTS, settings, {}, records, {"inputs": self._summary["inputs"]})
        self._summary["lengths"]["read"] = _lengths(records.values())
        self._summary["seconds_reading"] = seconds
        self._check_inputs()

    def _check_inputs(self) -> None:
        """Raises InputError where nearly nothing of an input can be used."""
        for source in self._curation.inputs:
            counts = self._summary["inputs"][source.name]
            bad, good = sum(counts["bad"].values()), counts["documents"]
            why = [f"{reason} ({count:,})" for reason, count in _most(counts["bad"])[:3]]
            why += [f"{file}: {reason}" for file, reason in {**counts["broken"], **counts["damaged"]}.items()][:3]
            if bad > source.max_bad * (bad + good):
                raise InputError(
                    f"The input {source.name}: {bad:,} of {bad + good:,} records cannot be used, more than max_bad "
                    f"{source.max_bad:g} allows: {'; '.join(why)}. All are listed in {self._folder / BAD}. Name other "
                    "fields or files, or raise max_bad."
                )
            if not good:
                raise InputError(
                    f"The input {source.name} has no documents in {counts['files']} files{': ' if why else ''}"
                    f"{'; '.join(why)}. Give files with documents, or leave the input out."
                )

    def _stage(self, stage: Stage) -> None:
        """Runs a stage on all shards that it has not done with these inputs and settings."""
        settings = settings_of(stage)
        sources = self._view.sources(stage.reads)
        reads = {
            shard.name: digest(
                [VERSION, shard.sha256, {s: self._records[s][shard.name].files[0].sha256 for s in sources}]
            )
            for shard in self._shards
        }
        if isinstance(stage, GlobalStage):
            whole = digest([settings, reads])
            keys = {name: digest([whole, name]) for name in reads}
        else:
            keys = {name: digest([settings, read]) for name, read in reads.items()}
        found: Mapping[str, Any] | None = None
        if isinstance(stage, GlobalStage):
            records, found = self._globally(stage, keys, reads, settings)
        else:
            assert isinstance(stage, RowStage)
            make = functools.partial(computing, self._view, stage)
            jobs = {name: [name, key] for name, key in keys.items()}
            work = {shard.name: shard.size for shard in self._shards}
            records = self._do(stage.name, make, keys, jobs, work, settings, stage.resources, stage.light)
        inputs = {source: digest(list(reads.values())) for source in (DOCUMENTS, *sources)}
        self._records[stage.name] = records
        counts = {**_yield(records), "found": found}
        seconds = self._progress.end(counts["out"], counts["in"])
        self._manifest(stage.name, settings, inputs, records, counts)
        self._summary["stages"].append(
            {
                "name": stage.name,
                "stage": type(stage).__name__,
                **counts,
                "samples": self._samples(records),
                "seconds": seconds,
            }
        )
        self._view = self._view.then(stage)

    def _globally(
        self, stage: GlobalStage, keys: Mapping[str, str], reads: Mapping[str, str], settings: Mapping[str, Any]
    ) -> tuple[dict[str, Record], Mapping[str, Any] | None]:
        """Runs a stage that looks at all documents, unless it is finished."""
        folder = self._folder / stage.name
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        done = _finished(folder, keys)
        self._progress.begin(stage.name, sum(shard.size for shard in self._shards), len(keys), len(done))
        manifest = _read_manifest(folder)
        # A process may have been killed between the last sidecar and the manifest, which is then an earlier one.
        its = manifest and (manifest.get("config"), manifest.get("inputs", {}).get(DOCUMENTS))
        if len(done) == len(keys) and manifest is not None and its == (digest(settings), digest(list(reads.values()))):
            return done, manifest["counts"].get("found")
        self._begin_changes()
        self._say_why(stage.name, settings, manifest)
        names = tuple(shard.name for shard in self._shards)
        found = stage.run(Corpus(self._engine, names, self._view, stage, dict(keys), dict(reads)))
        done = _finished(folder, keys)
        if missing := [name for name in keys if name not in done]:
            raise InputError(f"The stage {stage.name} has written nothing for {len(missing)} shards: {missing[0]}.")
        self._progress.advance(sum(shard.rows for shard in self._shards), sum(shard.size for shard in self._shards))
        return done, found

    def _do(
        self,
        name: str,
        make: Any,
        keys: Mapping[str, str],
        jobs: Mapping[str, Any],
        work: Mapping[str, int],
        settings: Mapping[str, Any],
        resources: Resources | None = None,
        light: bool = False,
    ) -> dict[str, Record]:
        """Does the jobs of a stage that are not finished; returns all records, in order."""
        folder = self._folder / name
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
        done = _finished(folder, keys)
        todo = [(key, jobs[key]) for key in keys if key not in done]
        self._progress.begin(name, sum(work[key] for key, _ in todo), len(keys), len(done))
        if todo:
            self._begin_changes()
            self._say_why(name, settings, _read_manifest(folder))
        for key, record in self._engine.map(name, make, todo, resources, light):
            made = Record(record["key"], tuple(File(**file) for file in record["files"]), record["counts"])
            done[key] = made
            self._progress.advance(made.counts.get("in", sum(file.rows for file in made.files)), work[key])
        return {key: done[key] for key in keys}

    def _begin_changes(self) -> None:
        """The manifest of the run is there only while all files of all stages belong to it."""
        (self._folder / MANIFEST).unlink(missing_ok=True)

    def _say_why(self, name: str, settings: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> None:
        """Says why a stage that was finished is run again."""
        if manifest is None:
            return
        before = manifest.get("settings", {})
        different = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if different:
            self._progress.say(f"{name} is run again: {', '.join(different)} has changed")
        else:
            self._progress.say(f"{name} is run again where what it reads has changed")

    def _write(self) -> None:
        """Writes the documents that are kept."""
        output, repeats = self._curation.output, self._curation.repeats
        sources = self._view.sources([*output.writes, output.by, *([REPETITIONS] if repeats else [])])
        settings = {**dataclasses.asdict(output), "repeats": repeats}
        keys = {}
        for shard in self._shards:
            reads = {source: self._records[source][shard.name].files[0].sha256 for source in sources}
            keys[shard.name] = digest([VERSION, settings, shard.sha256, reads])
        make = functools.partial(writing, self._view, output, repeats)
        work = {shard.name: shard.size for shard in self._shards}
        records = self._do(OUTPUT, make, keys, {name: [name, key] for name, key in keys.items()}, work, settings)
        remove_others(self._folder / OUTPUT, records)
        counts = _yield(records)
        self._summary["writing"] = {**counts, "samples": self._samples(records)}
        self._progress.end(counts["out"], sum(shard.rows for shard in self._shards))
        totals: dict[str, Counter[str]] = {}
        for record in records.values():
            for name, counts in record.counts["by"].items():
                totals.setdefault(name, Counter()).update(counts)
            for file in record.files:
                totals[file.name.partition("/")[0]].update({"files": 1, "size": file.size})
        self._summary["output"] = {name: dict(totals[name]) for name in sorted(totals)}
        self._summary["lengths"]["written"] = _lengths(records.values())
        manifest = {
            "version": VERSION,
            "qwen_jax": self._summary["qwen_jax"],
            "libraries": _libraries(),
            "config": self._summary["config"],
            "settings": self._curation.settings(),
            "inputs": self._summary["inputs"],
            "stages": [{name: s[name] for name in ("name", "in", "out", "removed")} for s in self._summary["stages"]],
            "writing": counts,
            "output": self._summary["output"],
            "files": _files(records),
        }
        write_file(self._folder / MANIFEST, to_json(manifest, indent=1).encode())

    def _manifest(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        records: Mapping[str, Record],
        counts: Mapping[str, Any],
    ) -> None:
        """Writes the manifest of a finished stage, and removes what does not belong to it."""
        folder = self._folder / name
        manifest = {
            "stage": name,
            "version": VERSION,
            "qwen_jax": self._summary["qwen_jax"],
            "libraries": _libraries(),
            "config": digest(settings),
            "settings": settings,
            "inputs": inputs,
            "counts": counts,
            "files": _files(records),
        }
        write_file(folder / MANIFEST, to_json(manifest, indent=1).encode())
        remove_others(folder, records)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)

    def _samples(self, records: Mapping[str, Record]) -> dict[str, list[dict[str, str]]]:
        """Documents that these records have removed, a few of each reason."""
        return samples(self._view, {name: record.counts["rows"] for name, record in records.items()})

    def _write_bad(self, found: Mapping[str, Found], units: Sequence[Unit], records: Mapping[str, Record]) -> None:
        """Lists all files and records that cannot be used."""
        names = [file.name for unit in units for file in records[unit.name].files if file.name.endswith(".jsonl")]
        broken = [
            {"input": name, "file": file, "at": "the beginning", "reason": f"the file cannot be read: {reason}"}
            for name, one in found.items()
            for file, reason in one.broken.items()
        ]
        path = self._folder / BAD
        if not names and not broken:
            path.unlink(missing_ok=True)
            return
        temporary = self._folder / f".{BAD}.tmp"
        with temporary.open("wb") as file:
            file.writelines(to_json(one).encode() + b"\n" for one in broken)
            for name in names:
                with (self._folder / DOCUMENTS / name).open("rb") as part:
                    shutil.copyfileobj(part, file)
        temporary.replace(path)


def _finished(folder: Path, keys: Mapping[str, str]) -> dict[str, Record]:
    return {name: record for name, key in keys.items() if (record := finished(folder, name, key)) is not None}


def _read_manifest(folder: Path) -> Mapping[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "counts" in manifest else None


def _input_summary(found: Found, records: Mapping[str, Record]) -> dict[str, Any]:
    """What was found in an input."""
    bad, skipped, shown = Counter[str](), Counter[str](), dict[str, list[Any]]()
    damaged, hashes = dict[str, str](), dict[str, str]()
    for record in records.values():
        bad.update(record.counts["bad"])
        skipped.update(record.counts["skipped"])
        damaged |= record.counts["damaged"]
        hashes |= record.counts["sha256"]
        for reason, places in record.counts["shown"].items():
            shown[reason] = [*shown.get(reason, []), *places][:3]
    # A file that was cut is empty where all its pieces are.
    pieces: dict[str, list[bool]] = {}
    for unit in found.units:
        for part in unit.parts:
            pieces.setdefault(part.name, []).append(part.name in records[unit.name].counts["empty"])
    empty = {name for name, flags in pieces.items() if all(flags)} | (set(found.files) - set(pieces))
    return {
        "files": len(found.files) + len(found.broken),
        "documents": _rows(records),
        "bytes": sum(sum(record.counts["bytes"]) for record in records.values()),
        "bad": dict(_most(bad)),
        "shown": shown,
        "skipped": dict(_most(skipped)),
        "broken": dict(found.broken),
        "damaged": damaged,
        "empty": sorted(empty),
        "sizes": {name: size for name, (_, size) in found.files.items()},
        "sha256": hashes,
    }


def _yield(records: Mapping[str, Record]) -> dict[str, Any]:
    """Documents that came in, that are left, and those removed by reason."""
    came = sum(record.counts["in"] for record in records.values())
    removed = Counter[str]()
    for record in records.values():
        removed.update(record.counts["removed"])
    return {"in": came, "out": came - removed.total(), "removed": dict(_most(removed))}


def _rows(records: Mapping[str, Record]) -> int:
    return sum(file.rows for record in records.values() for file in record.files)


def _bad(records: Iterable[Record]) -> int:
    return sum(sum(record.counts["bad"].values()) for record in records)


def _lengths(records: Iterable[Record]) -> dict[str, int]:
    total = Counter[int]()
    for record in records:
        total.update({int(key): count for key, count in record.counts["lengths"].items()})
    return {str(key): total[key] for key in sorted(total)}


def _files(records: Mapping[str, Record]) -> dict[str, dict[str, Any]]:
    return {
        file.name: {"rows": file.rows, "size": file.size, "sha256": file.sha256}
        for record in records.values()
        for file in record.files
    }


def _most(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent first; equal ones by name."""
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _libraries() -> dict[str, str]:
    """Versions of what decides bytes."""
    return {name: metadata.version(name) for name in ("daft", "pyarrow")}
