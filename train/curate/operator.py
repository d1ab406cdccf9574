"""The columns of a document, and operators, which compute columns from columns, row by row."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pyarrow as pa

DOCUMENT = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("html", pa.large_binary()),
        pa.field("text", pa.large_string()),
        pa.field("metadata", pa.string()),
    ]
)
"""Columns of a document.

id: unique in the corpus. domain: name of the input that it came from. source: file and record, for people. url: where
it was found, or null. html: the raw page, where the input holds pages, else null. text: the text; null until it has
been extracted. metadata: all other fields of the input record as one JSON object, or null.
"""

REASON = "reason"
"""A column that an operator may make: why a document cannot be used, such as "no text in the page"; null if it can."""

Compute = Callable[[pa.Table], pa.Table]


class Operator(abc.ABC):
    """Makes columns from columns of the same document, and from nothing else.

    Subclasses are frozen dataclasses whose fields are JSON values: they are pickled, and their fields decide whether
    earlier results still hold. The same input gives the same bytes, on every machine and in every batch.

    Attributes:
      version: to be increased when results change though the fields stay the same.
      reads: the columns that it needs: of `DOCUMENT`, or made by an operator before it.
      makes: the columns that it makes. "text" replaces the text, and `REASON` removes documents.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("text",)
    makes: pa.Schema

    @property
    def name(self) -> str:
        """Name of the operator in manifests and reports."""
        return type(self).__name__

    @abc.abstractmethod
    def start(self) -> Compute:
        """Loads what the operator needs, once a process, and returns the function that computes a batch.

        It is given a table with the columns `reads`, where no value of "text" is null unless "html" is read too, and
        returns one with the columns `makes` and as many rows, in the same order. A document whose text becomes null is
        removed, with the reason "null text" where the operator gives none.

        Raises:
          InputError: a library or file that it needs is missing.
        """

    def settings(self) -> Mapping[str, Any]:
        """What decides its results: name, version and fields."""
        return {"name": self.name, "version": self.version, **vars(self)}


class ShardOperator(Operator):
    """Makes columns from all documents of one shard together, for example to remove text that they share.

    `start` returns a function of a whole shard: the rows of `documents/00000.parquet`, in their order. Its results
    depend on the other rows, so it cannot be given batches. Shards do not see each other. "text" is null in rows that
    were removed before; such rows are ignored, and their results are null. The docstring of a subclass states the
    memory that it needs for each MB of text.
    """
