"""The stage of a curation that removes duplicates."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import pyarrow as pa

from train.curate.corpus import Corpus
from train.curate.deduplicate import DuplicateOptions, find_duplicates
from train.curate.operator import REASON
from train.curate.stage import GlobalStage


@dataclasses.dataclass(frozen=True)
class Deduplicate(GlobalStage):
    """Keeps one document of each group of duplicates; needs the columns that `Fingerprint` makes in a `Map` before.

    It makes `REASON` ("exact duplicate", "same URL" or "near duplicate"), duplicate_of (the id of the document that is
    kept) and cluster_size (documents of the group). All are null for documents that are kept.

    Attributes:
      options: what counts as a duplicate and which one is kept. With a `similarity` it needs `Shingles` too.
      name: of the stage.
    """

    options: DuplicateOptions = DuplicateOptions()
    name: str = "deduplicate"

    version: ClassVar[int] = 1

    @property
    def reads(self) -> tuple[str, ...]:
        """Id, domain, and the columns of `Fingerprint` (and `Shingles`)."""
        columns = ("id", "domain", "text_length", "text_key", "url_key", "bands")
        return columns if self.options.similarity is None else (*columns, "shingles")

    @property
    def makes(self) -> pa.Schema:
        """Why a document is not kept, and for which one."""
        return pa.schema(
            [
                pa.field(REASON, pa.string()),
                pa.field("duplicate_of", pa.string()),
                pa.field("cluster_size", pa.int64()),
            ]
        )

    def settings(self) -> Mapping[str, Any]:
        """The options but for `rows_at_once`, which does not change the result."""
        options = dataclasses.asdict(self.options)
        del options["rows_at_once"]
        return {"stage": "Deduplicate", "version": self.version, **options}

    def run(self, corpus: Corpus) -> Mapping[str, Any]:
        """Finds duplicates of all documents that have no reason; texts are not read."""
        found = find_duplicates(corpus.narrow_files(self.reads), corpus.folder / "duplicates", self.options)
        daft = corpus.engine.daft
        frame = daft.read_parquet(found.files)
        corpus.write_all(frame.with_column_renamed("kept_id", "duplicate_of"))
        return {
            "documents": found.documents,
            "duplicates": found.removed,
            "groups": found.clusters,
            "pairs": found.edges,
            "pairs before similarity": found.candidates,
            "rounds": found.rounds,
        }
