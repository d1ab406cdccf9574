"""Decontamination as an operator: the reason to remove a document that contains test items, and where they stand."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pyarrow as pa

from qwen_jax.errors import InputError
from train.curate.contamination import Finder, Match, Mode, make_finder
from train.curate.evaluation_sets import Items, digest_of, find_sets, read_items
from train.curate.masking import Span, without_spans
from train.curate.operator import REASON, Compute, Operator
from train.data.words import Split

SPANS = "test_items"
"""The column of test items in a document: set, item, words in common, words of the item, first and last character."""

_SPANS = pa.field(
    SPANS,
    pa.list_(
        pa.struct(
            [
                pa.field("set", pa.string()),
                pa.field("item", pa.string()),
                pa.field("common", pa.int32()),
                pa.field("words", pa.int32()),
                pa.field("begin", pa.int64()),
                pa.field("end", pa.int64()),
            ]
        )
    ),
)
_REASON = pa.field(REASON, pa.string())
_TEXT = pa.field("text", pa.large_string())
# Rows that are searched together, and how often a masked text is searched again.
_ROWS, _MOST_MASKS = 64, 8


@dataclasses.dataclass(frozen=True)
class Decontaminate(Operator):
    """Finds items of evaluation sets in documents, by the rule of `train.curate.contamination`.

    Attributes:
      against: evaluation sets, each NAME=FILE or FILE.
      mode: windowed, contiguous or document; see `train.curate.contamination.Finder`.
      action: drop gives documents with test items a reason. mask takes the items out of the text, and gives a reason
        only where new ones appear again and again.
      placeholder: stands for what mask takes out.
      question: columns of questions in the files; by default question, problem, prompt and the like.
      answer: columns of answers; by default answer, target, solution and the like.
    """

    against: tuple[str, ...]
    mode: Mode = "windowed"
    action: Literal["drop", "mask"] = "drop"
    placeholder: str = ""
    question: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()

    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.against:
            raise InputError("No evaluation sets. Give their files as against, each NAME=FILE or FILE.")
        if self.placeholder and self.action == "drop":
            raise InputError("A placeholder stands for masked spans. Give it with action mask.")

    @property
    def makes(self) -> pa.Schema:
        """`reason`, the spans, and of action mask the text."""
        return pa.schema([_REASON, _SPANS, *([_TEXT] if self.action == "mask" else [])])

    def settings(self) -> Mapping[str, Any]:
        """What decides its results: the fields, and the content of the test files rather than their paths."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        sets = digest_of(find_sets(self.against))
        return {"name": self.name, "version": self.version, **fields, "against": sets}

    def start(self) -> Compute:
        """Reads and indexes the evaluation sets."""
        items = read_items(find_sets(self.against), self.question, self.answer)
        finder = make_finder(items, self.mode)

        def compute(table: pa.Table) -> pa.Table:
            columns: dict[str, list[Any]] = {name: [] for name in self.makes.names}
            texts = table.column("text").to_pylist()
            for begin in range(0, len(texts), _ROWS):
                some = texts[begin : begin + _ROWS]
                words, matches = finder.find(some)
                by_text = collections.defaultdict(list)
                for match in matches:
                    by_text[match.text].append(match)
                for number, text in enumerate(some):
                    found = by_text.get(number, [])
                    masked = self._masked(finder, words, number, text, found) if self.action == "mask" else None
                    if self.action == "mask":
                        columns["text"].append(text if masked is None else masked)
                    names = dict.fromkeys(items.names[items.owner[match.item]] for match in found)
                    reason = f"in the evaluation set {', '.join(names)}" if found and masked is None else None
                    columns[REASON].append(reason)
                    columns[SPANS].append([_described(items, words, text, match) for match in found])
            arrays = [pa.array(columns[field.name], field.type) for field in self.makes]
            return pa.Table.from_arrays(arrays, schema=self.makes)

        return compute

    def _masked(self, finder: Finder, words: Split, number: int, text: str, found: list[Match]) -> str | None:
        """The text without test items; None if new ones appear again and again, as spans are taken out."""
        for _ in range(_MOST_MASKS):
            if not found:
                return text
            spans: list[Span] = [words.place(number, text, match.begin, match.end) for match in found]
            text = without_spans(text, spans, self.placeholder)
            (words, found), number = finder.find([text]), 0
        return None if found else text


def _described(items: Items, words: Split, text: str, match: Match) -> dict[str, Any]:
    begin, end = words.place(match.text, text, match.begin, match.end)
    return {
        "set": items.names[items.owner[match.item]],
        "item": items.places[match.item],
        "common": match.common,
        "words": match.words,
        "begin": begin,
        "end": end,
    }
