"""Finds documents whose id an earlier document has, over all inputs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from train.curate.corpus import ROW, SHARD, Corpus
from train.curate.operator import REASON
from train.curate.stage import GlobalStage

IDS = "ids"
USED_TWICE = "the id of an earlier document"


@dataclasses.dataclass(frozen=True)
class UniqueIds(GlobalStage):
    """Removes documents whose id an earlier document has: earlier in the order of inputs, files and records."""

    name: str = IDS

    @property
    def reads(self) -> tuple[str, ...]:
        """The id."""
        return ("id",)

    @property
    def makes(self) -> pa.Schema:
        """The reason."""
        return pa.schema([pa.field(REASON, pa.string())])

    def run(self, corpus: Corpus) -> Mapping[str, Any] | None:
        """Groups all ids by one query."""
        daft = corpus.engine.daft
        # The order of the corpus as one number.
        place = daft.col(SHARD) * daft.lit(2**40) + daft.col(ROW)
        ids = corpus.narrow(["id"]).with_column("place", place)
        first = ids.groupby("id").agg(
            daft.col("place").min().alias("first"), daft.col("place").count().alias("documents")
        )
        later = ids.join(first.where(daft.col("documents") > 1), on="id").where(daft.col("place") != daft.col("first"))
        corpus.write_all(later.select(SHARD, ROW, daft.lit(USED_TWICE).alias(REASON)))
        return None
