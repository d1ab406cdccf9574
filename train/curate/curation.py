"""What a curation is: inputs, stages and an output. `train.curate.run` runs it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from qwen_jax.errors import InputError
from train.curate.corpus import ROW, SHARD
from train.curate.jobs import Output
from train.curate.operator import DOCUMENT, REASON
from train.curate.select import Select
from train.curate.shards import RESERVED
from train.curate.sources import Input
from train.curate.stage import REPETITIONS, TEXT, GlobalStage, Map, RowStage, Stage
from train.curate.unique_ids import UniqueIds

__all__ = ["Curation", "GlobalStage", "Input", "Map", "Output", "RowStage", "Select", "Stage"]


@dataclasses.dataclass(frozen=True)
class Curation:
    """Documents from inputs, through stages, to an output.

    Attributes:
      inputs: the domains.
      stages: in the order in which they run. When a stage gives a document a reason, all later stages skip it.
      output: what is written of the documents that are kept.
      name: for the report.
      shard_megabytes: size of a shard of documents, the unit of work. With another size all is computed again.

    Raises:
      InputError: a stage reads a column that nothing makes, two stages make the same column, or a name is used twice.
    """

    inputs: Sequence[Input]
    stages: Sequence[Stage] = ()
    output: Output = Output()
    name: str = "curation"
    shard_megabytes: float = 64.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.inputs:
            raise InputError("A curation needs at least one Input.")
        if not self.shard_megabytes > 0:
            raise InputError(f"shard_megabytes must be above 0, got {self.shard_megabytes}.")
        _once([source.name for source in self.inputs], "inputs")
        _once([stage.name for stage in self.stages], "stages")
        known = {name: DOCUMENT.field(name).type for name in DOCUMENT.names}
        owner = dict.fromkeys(DOCUMENT.names, "the documents")
        for stage in self.all_stages:
            _check_stage(stage, known, owner)
        self._check_output(known)

    @property
    def shard_bytes(self) -> int:
        """`shard_megabytes` in bytes."""
        return max(int(self.shard_megabytes * 1e6), 1)

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages; if an input has ids, the one before them that finds an id used twice."""
        if any(source.id is not None for source in self.inputs):
            return (UniqueIds(), *self.stages)
        return tuple(self.stages)

    @property
    def repeats(self) -> bool:
        """Whether a stage says how many times a document is written."""
        return any(REPETITIONS in stage.makes.names for stage in self.stages)

    def settings(self) -> dict[str, Any]:
        """All that decides the result except the files."""
        return {
            "inputs": [source.settings() for source in self.inputs],
            "stages": [{"name": stage.name, **settings_of(stage)} for stage in self.all_stages],
            "output": dataclasses.asdict(self.output),
            "shard_bytes": self.shard_bytes,
        }

    def _check_output(self, known: Mapping[str, pa.DataType]) -> None:
        if self.output.format not in ("jsonl", "parquet"):
            raise InputError(f"The format of the output is jsonl or parquet, got {self.output.format!r}.")
        for name in (*self.output.columns, self.output.by):
            if name not in known or name in ("html", REASON):
                raise InputError(f"The output cannot have the column {name!r}. There are: {', '.join(known)}.")
        by = known[self.output.by]
        if not (pa.types.is_string(by) or pa.types.is_large_string(by) or pa.types.is_integer(by)):
            raise InputError(f"The output can be divided by a column of strings or integers; {self.output.by} is {by}.")


def _check_stage(stage: Stage, known: dict[str, pa.DataType], owner: dict[str, str]) -> None:
    """Whether a stage finds what it reads and makes what nothing else does; adds what it makes."""
    name = stage.name
    if (
        not name
        or not name.replace("_", "a").replace("-", "a").isalnum()
        or (name in RESERVED and not isinstance(stage, UniqueIds))
    ):
        raise InputError(
            f"A stage's name has letters, digits, '_' and '-', and is not {', '.join(RESERVED)}: {name!r}."
        )
    for column in stage.reads:
        if column not in known:
            raise InputError(
                f"The stage {name} reads the column {column!r}, which nothing before it makes. There are: "
                f"{', '.join(known)}."
            )
    for field in stage.makes:
        if field.name in (SHARD, ROW) or (field.name in owner and field.name not in (TEXT, REASON)):
            by = owner.get(field.name, "the shards")
            raise InputError(f"The stage {name} makes the column {field.name!r}, which is of {by} already.")
        if field.name != REASON:
            known[field.name] = field.type
            owner[field.name] = f"the stage {name}"
    settings_of(stage)


def settings_of(stage: Stage) -> dict[str, Any]:
    """A stage's settings.

    Raises:
      InputError: they are not JSON values, or a file that they name cannot be read.
    """
    try:
        settings: dict[str, Any] = json.loads(json.dumps(dict(stage.settings()), allow_nan=False))
    except InputError as error:
        raise InputError(f"The stage {stage.name}: {error}") from None
    except OSError as error:
        raise InputError(f"The stage {stage.name}: cannot read {error.filename}: {error.strerror}.") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"The settings of the stage {stage.name} must be JSON values: {error}.") from None
    return settings


def _once(names: Sequence[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Two {what} have the name {twice[0]}. Give each its own.")
