"""The stage of a curation that follows a sampling plan: each document's cell, its repetitions, and who stays out."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwen_jax.errors import InputError
from train.curate.mixture_plan import Plan
from train.curate.mixture_table import buckets_of, cell_name, hash_of
from train.curate.operator import REASON, Compute, Operator

SAMPLED_OUT = "sampled out"
"""Reason of a document in a cell of which only a part is taken."""
NOT_PLANNED = "not in the plan"
"""Reason of a document in a cell of which nothing is taken."""


@dataclasses.dataclass(frozen=True)
class Mix(Operator):
    """Samples documents by a plan.

    A document with the hash u of its id, in [0, 1), is taken ceil(epochs - u) times, where epochs are those of its
    cell: of 2.3 epochs, all documents are taken twice, and three in ten a third time. This does not depend on other
    documents, and the documents of a smaller plan are among those of a larger one.

    Columns: `cell`, the name of the document's cell and of the data set that it belongs to; `repetitions`, how often it
    is taken; and a reason where that is 0.

    Attributes:
      epochs: of each cell, by its name; 0 where nothing is taken.
      thresholds: of the quality buckets of each domain; empty without scores.
      quality: column of scores; None without scores.
      salt: another one samples other documents.
    """

    epochs: Mapping[str, float]
    thresholds: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    quality: str | None = None
    salt: str = ""

    makes = pa.schema([("cell", pa.string()), ("repetitions", pa.int32()), (REASON, pa.string())])

    @classmethod
    def of(cls, plan: Plan, salt: str = "") -> "Mix":
        """The stage of a plan.

        Args:
          plan: to follow.
          salt: another one samples other documents.
        """
        epochs = {one.cell.name: one.epochs for one in plan.cells}
        return cls(epochs, plan.thresholds, plan.quality, salt)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        """Id, domain and score."""
        return ("id", "domain", *([self.quality] if self.quality is not None else []))

    def settings(self) -> Mapping[str, Any]:
        """What decides its results, as JSON values."""
        thresholds = {name: list(found) for name, found in self.thresholds.items()}
        return {**super().settings(), "epochs": dict(self.epochs), "thresholds": thresholds}

    def start(self) -> Compute:
        """The function that samples a batch. It raises InputError at a document of a domain that the plan lacks."""
        return self._sample

    def _sample(self, table: pa.Table) -> pa.Table:
        domains = table["domain"].to_pylist()
        scores = np.zeros(len(table))
        if self.quality is not None:
            scores = pc.fill_null(pc.cast(table[self.quality], pa.float64()), math.nan).to_numpy()
        cells: list[str] = [""] * len(table)
        for domain in sorted(set(domains)):
            mine = np.array([one == domain for one in domains], bool)
            buckets = buckets_of(scores[mine], self.thresholds.get(domain, ()))
            for at, bucket in zip(np.flatnonzero(mine).tolist(), buckets.tolist(), strict=True):
                cells[at] = cell_name(domain, bucket, self.quality is not None)
        if unknown := sorted(set(cells) - set(self.epochs)):
            raise InputError(
                f"The plan has no cell {unknown[0]}. It has: {', '.join(self.epochs)}. Make a plan of these documents."
            )
        repetitions = [
            max(0, math.ceil(self.epochs[cell] - hash_of(id, f"mix {self.salt}") / 2**64))
            for id, cell in zip(table["id"].to_pylist(), cells, strict=True)
        ]
        reasons = [
            None if count else SAMPLED_OUT if self.epochs[cell] > 0 else NOT_PLANNED
            for count, cell in zip(repetitions, cells, strict=True)
        ]
        return pa.table(
            [pa.array(cells), pa.array(repetitions, pa.int32()), pa.array(reasons, pa.string())], schema=self.makes
        )
