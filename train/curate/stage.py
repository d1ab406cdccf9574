"""Stages of a curation. Each makes columns of the documents, row by row or from the whole corpus."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwen_jax.errors import InputError
from train.curate.engine import Resources
from train.curate.operator import REASON, Compute, Operator, ShardOperator

if TYPE_CHECKING:
    from train.curate.corpus import Corpus

TEXT = "text"
REPETITIONS = "repetitions"
"""A column that a stage may make, an integer: how many times the output holds a document. Null is once."""

NO_TEXT = "no text"
"""The reason of a document that has no text when an operator reads it or the output is written, such as a page that was
not extracted."""

NULL_TEXT = "null text"
"""The reason of a document to which an operator gave a null text and no reason."""


class Stage(abc.ABC):
    """Makes columns of the documents that no earlier stage has removed; for removed ones they are null.

    Subclasses are frozen dataclasses. What they make depends on the columns they read and on their settings alone.

    Attributes:
      version: to be increased when results change though the settings stay the same.
      name: of the stage and of its folder; unique in a curation.
    """

    version: ClassVar[int] = 1
    name: str

    @property
    @abc.abstractmethod
    def reads(self) -> tuple[str, ...]:
        """The columns that it needs: of `DOCUMENT`, or made by an earlier stage."""

    @property
    @abc.abstractmethod
    def makes(self) -> pa.Schema:
        """The columns that it makes. `REASON` removes documents; "text" replaces the text where it is not null."""

    def settings(self) -> Mapping[str, Any]:
        """What decides its results, as JSON values: by default class, version, and fields but name and resources."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        left_out = {name: value for name, value in fields.items() if name not in ("name", "resources")}
        return {"stage": type(self).__name__, "version": self.version, **left_out}


class RowStage(Stage):
    """A stage that looks at each document by itself. Workers run it shard by shard."""

    @property
    def resources(self) -> Resources:
        """What a worker needs."""
        return Resources()

    @property
    def light(self) -> bool:
        """Whether it does little besides reading and writing; then several threads may call its function."""
        return False

    @property
    def whole_shards(self) -> bool:
        """Whether the function is given all documents of a shard at once, rather than some MB of them."""
        return False

    @abc.abstractmethod
    def start(self) -> Compute:
        """Loads what is needed, once in a worker, and returns the function of a batch.

        It is given a table with the columns `reads` of documents that have no reason, and returns one with the columns
        `makes` and as many rows, in the same order.
        """


class GlobalStage(Stage):
    """A stage that looks at all documents: duplicates, mixtures. It runs queries and jobs on the engine."""

    @abc.abstractmethod
    def run(self, corpus: "Corpus") -> Mapping[str, Any] | None:
        """Makes the columns of all documents.

        Args:
          corpus: reads the documents that have no reason, and takes the columns: `corpus.write` or `write_all`.

        Returns:
          What the report shows of it, JSON values, or None.

        Raises:
          InputError: it cannot be done, and what to do.
        """


@dataclasses.dataclass(frozen=True)
class Map(RowStage):
    """Operators, one after the other, in one pass over the documents.

    Attributes:
      name: of the stage.
      operators: an operator may read what those before it have made. A document to which one gives a reason is skipped
        by those behind it.
      resources: of a worker, for operators with models.

    Raises:
      InputError: two operators make the same column.
    """

    name: str
    operators: Sequence[Operator]
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        object.__setattr__(self, "operators", tuple(self.operators))
        made: dict[str, str] = {}
        for operator in self.operators:
            for column in operator.makes.names:
                if column in made and column not in (TEXT, REASON):
                    raise InputError(f"{self.name}: {made[column]} and {operator.name} both make the column {column}.")
                made[column] = operator.name

    @property
    def reads(self) -> tuple[str, ...]:
        """The columns that operators read and no operator before them makes, and the text if any of them reads it."""
        made: set[str] = set()
        read: dict[str, None] = {}
        for operator in self.operators:
            read.update(dict.fromkeys(name for name in operator.reads if name not in made or name == TEXT))
            made.update(operator.makes.names)
        return tuple(read)

    @property
    def makes(self) -> pa.Schema:
        """The columns of all operators, and `REASON`."""
        fields = {f.name: f.with_nullable(True) for operator in self.operators for f in operator.makes}
        fields[REASON] = pa.field(REASON, pa.string())
        return pa.schema(list(fields.values()))

    @property
    def whole_shards(self) -> bool:
        """Whether an operator looks at a whole shard."""
        return any(isinstance(operator, ShardOperator) for operator in self.operators)

    def settings(self) -> Mapping[str, Any]:
        """The settings of the operators."""
        return {
            "stage": "Map",
            "version": self.version,
            "operators": [dict(operator.settings()) for operator in self.operators],
        }

    def start(self) -> Compute:
        """Starts all operators."""
        # Some operators read a file to say what they make: once, not for each batch.
        started = [(operator, operator.start(), _nullable(operator.makes)) for operator in self.operators]
        makes = self.makes

        def compute(table: pa.Table) -> pa.Table:
            rows = table.num_rows
            columns = {name: table[name] for name in table.column_names}
            reason: pa.Array = pa.nulls(rows, pa.string())
            for operator, function, promised in started:
                alive = reason.is_null()
                if TEXT in operator.reads and "html" not in operator.reads:
                    empty = pc.and_(alive, columns[TEXT].is_null())
                    reason = _flat(pc.if_else(empty, NO_TEXT, reason))
                    alive = reason.is_null()
                indices = pc.indices_nonzero(alive)
                here = pa.table({name: columns[name] for name in operator.reads})
                result = function(here if len(indices) == rows else here.take(indices))
                made = _checked(operator.name, promised, result, len(indices))
                for name in made.column_names:
                    column = made[name] if len(indices) == rows else scatter(made[name], indices, rows)
                    if name == REASON:
                        reason = _flat(pc.coalesce(reason, column))
                    elif name == TEXT and TEXT in columns:
                        # A document that an operator before has removed keeps the text that it had.
                        columns[TEXT] = pc.if_else(alive, column, columns[TEXT])
                    else:
                        columns[name] = column
                if TEXT in made.column_names:
                    lost = pc.and_(pc.and_(alive, reason.is_null()), columns[TEXT].is_null())
                    reason = _flat(pc.if_else(lost, NULL_TEXT, reason))
            columns[REASON] = reason
            return pa.table({name: columns[name] for name in makes.names}, schema=makes)

        return compute


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_nullable(True) for field in schema])


def _checked(name: str, promised: pa.Schema, made: pa.Table, rows: int) -> pa.Table:
    """What an operator has made, with the columns that it promised."""
    if made.num_rows != rows or set(made.column_names) != set(promised.names):
        raise InputError(
            f"The operator {name} must make {rows} rows of {', '.join(promised.names)}; it made "
            f"{made.num_rows} of {', '.join(made.column_names)}."
        )
    made = made.select(promised.names)
    try:
        return made.cast(promised)
    except pa.ArrowException as error:
        types = ", ".join(f"{field.name} {field.type}" for field in made.schema)
        expected = ", ".join(f"{field.name} {field.type}" for field in promised)
        raise InputError(f"The operator {name} must make {expected}; it made {types}: {error}.") from None


def scatter(values: pa.ChunkedArray, indices: pa.Array, rows: int) -> pa.Array:
    """An array of so many rows with the values at the indices, which ascend, and null elsewhere."""
    places = np.full(rows, -1, np.int64)
    places[np.asarray(indices)] = np.arange(len(indices))
    return _flat(values).take(pa.array(places, mask=places < 0))


def _flat(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
