"""The life of an output folder that is made in units of work: begun, interrupted, gone on with, finished.

While it is not finished, a folder in it has `settings.json` and a record of each finished unit, `00000.json`. A unit's
record is written last: what it names is complete.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.data.documents import DamagedInputError
from train.data.progress import BuildProgress
from train.data.shards import write_json
from train.data.workers import Workers
from train.lock import LOCK

_SETTINGS = "settings.json"
# Damaged files that an error names.
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class UnitFolder:
    """An output folder.

    Attributes:
      output: the folder.
      name: of the folder in it that holds records.
      summary: of the file in it that is there once all is finished.
      what: it holds then, such as "data set".
    """

    output: Path
    name: str
    summary: str
    what: str

    @property
    def records(self) -> Path:
        """The folder of the records."""
        return self.output / self.name

    def check(self) -> None:
        """Raises InputError unless the folder is new, empty or one of these."""
        output = self.output
        try:
            if output.exists() and not output.is_dir():
                raise InputError(f"{output} is a file. Give a folder with --output.")
            ours = (output / self.summary).exists() or self.records.is_dir()
            if output.exists() and not ours and any(path.name != LOCK for path in output.iterdir()):
                raise InputError(f"{output} is not empty and holds no {self.what}. Give a new folder with --output.")
        except OSError as error:
            raise InputError(f"Cannot use {output}: {error.strerror}. Give another folder with --output.") from None

    def check_settings(self, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """Raises InputError if settings differ.

        Args:
          saved: those that the folder was begun with.
          given: those that are asked for.
        """
        different = [name for name in given if saved.get(name) != given[name]]
        if different:
            was = "; ".join(f"{name} was {saved.get(name)!r} and is now {given[name]!r}" for name in different)
            raise InputError(
                f"{self.output} was begun with other settings: {was}. "
                "Use these settings again, give another folder with --output, or remove this one."
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Saves the settings, or compares them with those of an interrupted process, whose unfinished files it removes.

        Raises:
          InputError: other settings, or a file that cannot be written.
        """
        path = self.records / _SETTINGS
        if path.exists():
            try:
                saved = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise InputError(f"{path} is damaged ({error}). Remove {self.output} and run again.") from None
            self.check_settings(saved, settings)
        else:
            self.records.mkdir(exist_ok=True)
            write_json(path, settings)
        self.remove_temporary()

    def remove_temporary(self) -> None:
        """Removes unfinished files of processes that were killed."""
        for left_over in self.output.rglob(".*.tmp"):
            left_over.unlink(missing_ok=True)

    def remove_records(self) -> None:
        """Removes the records, once the summary is written."""
        shutil.rmtree(self.records, ignore_errors=True)

    def record(self, index: int, key: str, is_whole: Callable[[Any], bool]) -> Any:
        """The record of a unit; None if it is missing or damaged, or of another key, or its files are not whole.

        Args:
          index: of the unit.
          key: digest of its input.
          is_whole: whether the files of a record are there; it may raise OSError, ValueError, KeyError, TypeError.
        """
        try:
            record = json.loads((self.records / f"{index:05d}.json").read_bytes())
            return record if record["key"] == key and is_whole(record) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_record(self, index: int, record: Mapping[str, Any]) -> None:
        """Says that a unit is finished.

        Raises:
          InputError: the file cannot be written.
        """
        write_json(self.records / f"{index:05d}.json", record)


def do_units(
    jobs: Sequence[tuple[Any, ...]],
    processes: int,
    here: Callable[[], Callable[..., Any]],
    elsewhere: Callable[[], Callable[[Callable[[int], None]], Callable[..., Any]]],
    display: BuildProgress,
) -> dict[int, Any]:
    """Does units, in this process or in several. A damaged input file does not stop the others.

    Args:
      jobs: the arguments of each, beginning with the index of the unit.
      processes: at most.
      here: makes the function that does a job in this process.
      elsewhere: makes what makes this function in a worker process, as for `Workers`.
      display: shows the progress.

    Returns:
      The record of each unit, by its index.

    Raises:
      InputError: a job raised it; or files are damaged, after all other units are finished.
    """
    records: dict[int, Any] = {}
    damaged: list[str] = []

    def done(index: int, result: Any) -> None:
        if isinstance(result, DamagedInputError):
            damaged.append(str(result))
        else:
            records[index] = result
            display.unit()

    count = min(processes, len(jobs))
    if count <= 1:
        call = here()
        for job in jobs:
            done(job[0], call(*job))
    else:
        with Workers(count, processes // count, elsewhere()) as workers:
            for job, result in workers.run(jobs, display.advance):
                done(job[0], result)
    if damaged:
        more = f"; and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        raise InputError(
            "; ".join(sorted(damaged)[:_SHOWN]) + more + ". Download the damaged files again or leave them out, then "
            "run the same command: everything else is finished and kept."
        )
    return records
