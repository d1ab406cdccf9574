"""Overlap of texts: with evaluation sets, by runs of 13 words, and among themselves, by the words that they share."""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from train.curate.evaluation_sets import GRAM, find_sets
from train.curate.minhash import MinHash
from train.curate.run_index import make_index
from train.data.tables import read_rows
from train.data.words import runs, split, texts_of, words
from train.synthesize.item import Item, Rejected
from train.synthesize.pipeline import EVALUATION_SETS, NEAR_DUPLICATES, Pipeline, Result, Together

_QUESTIONS = ("question", "problem", "prompt", "instruction", "query", "input", "text")
_ANSWERS = ("answer", "target", "solution", "output", "response", "completion", "label")

# Words of a shingle, and hashes of a signature.
_SHINGLE, _HASHES = 3, 128
# A pair as similar as the threshold is missed with at most this probability.
_MOST_MISSED = 1e-3


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What a text shares with evaluation sets.

    Attributes:
      names: of the sets, in their order.
      shared: the words that the text and the first of them share.
    """

    names: tuple[str, ...]
    shared: str


class EvaluationSets:
    """The runs of 13 words of evaluation sets, in a `RunIndex`: 4 bytes a word and 20 a run.

    This is stricter than `qwen-jax data decontaminate`, which asks for 0.6 of a test item: one run of it is enough.
    A record whose texts have fewer words is known by its whole question, and by its answer, which must stand in the
    same data. Where the record has no answer, the question is enough. A hash has 64 bits: that one of a million runs
    meets one of ten million others by accident has a probability of 1 in 2 million.

    Attributes:
      records: of each set, by its name.
    """

    def __init__(self, sets: Sequence[str]):
        """
        Args:
          sets: each NAME=FILE, JSON lines, JSON or Parquet, or a pattern or folder of them; a name may come again with
            another file. All columns count.

        Raises:
          InputError: not of this form, no such file, or one without records or without words.
        """
        self.records: Counter[str] = Counter()
        sequences: list[np.ndarray] = []
        owners: list[int] = []
        self._short: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
        for given in sets:
            if "=" not in given:
                raise InputError(f"Expected an evaluation set as NAME=FILE, got {given!r}.")
            ((name, paths),) = find_sets([given])
            before = self.records.setdefault(name, 0)
            number = list(self.records).index(name)
            for row in (row for path in paths for row in read_rows(path)):
                found = self._add(row.values, number)
                self.records[name] += found is not None
                sequences += found or []
                owners += [number] * len(found or [])
            if self.records[name] == before:
                raise InputError(f"{given} has no record with words. Give a file of the evaluation set {name}.")
        self._names = list(self.records)
        self._owners = np.asarray(owners, np.int64)
        self._index = make_index(sequences, GRAM)

    def find(self, texts: Iterable[str]) -> Overlap | None:
        """What the texts of one example share with the sets; None if that is nothing."""
        given = list(texts)
        found = split(given)
        at, place = self._index.lookup(found.hashes)
        text = np.searchsorted(found.bounds, at, "right") - 1
        inside = at + GRAM <= found.bounds[text + 1]
        owners = self._owners[np.searchsorted(self._index.bounds, place[inside], "right") - 1]
        hits: dict[int, str] = {}
        # The first run that each set has.
        for owner, first in zip(*np.unique(owners, return_index=True), strict=True):
            one, begin = int(text[inside][first]), int(at[inside][first])
            begin -= int(found.bounds[one])
            hits[int(owner)] = " ".join(words(given[one])[begin : begin + GRAM])
        sizes = np.diff(found.bounds)
        short = [given[one] for one in np.flatnonzero((sizes > 0) & (sizes < GRAM))] if self._short else []
        if any(tuple(words(text)) in self._short for text in short):
            parts = [words(one) for one in given]
            for part in parts:
                for number, answer in self._short.get(tuple(part), ()):
                    if not answer or any(_contains(other, answer) for other in parts if other is not part):
                        hits.setdefault(number, " ".join((*part, *answer)))
        if not hits:
            return None
        order = sorted(hits)
        return Overlap(tuple(self._names[number] for number in order), hits[order[0]])

    def _add(self, record: Mapping[str, Any], number: int) -> list[np.ndarray] | None:
        """The texts of a record of at least 13 words, as hashes; None if it has no words. A short one is remembered."""
        columns = {name: [text for text in texts_of(value)] for name, value in record.items()}
        texts = [text for values in columns.values() for text in values]
        found = split(texts)
        sizes = np.diff(found.bounds)
        if not sizes.any():
            return None
        question = next((columns[name] for name in _QUESTIONS if columns.get(name)), [texts[int(np.argmax(sizes > 0))]])
        # The question of a conversation is its last message before the answer, of a text the text.
        asked = words(question[-1])
        if 0 < len(asked) < GRAM:
            answers = next((columns[name] for name in _ANSWERS if columns.get(name)), [""])
            # A worked answer has runs of its own; of a list of answers the first one counts.
            entry = (number, tuple(words(answers[0])))
            self._short.setdefault(tuple(asked), []).append(entry)
        return [found.hashes[found.bounds[i] : found.bounds[i + 1]] for i in np.flatnonzero(sizes >= GRAM)]


class NearDuplicates:
    """Texts that share most of their runs of three words with an earlier one (Jaccard similarity).

    `MinHash` proposes pairs, and the similarity of these is computed from all runs. A pair as similar as the threshold
    is missed with a probability below 0.001. Memory holds hashes alone: 8 bytes for each different run of a text, and
    some 100 bytes for each band of its signature; there are 64 bands at a threshold of 0.5, 25 at 0.8, and 10 at 0.95.
    """

    def __init__(self, threshold: float):
        """
        Args:
          threshold: similarity from which two texts are near duplicates, above 0 and at most 1.

        Raises:
          InputError: the threshold is out of range.
        """
        if not 0 < threshold <= 1:
            raise InputError(f"near_duplicates must be above 0 and at most 1, got {threshold}.")
        self._threshold = threshold
        # As many hashes to a band as find nearly all similar pairs: the fewest others are proposed.
        sizes = [rows for rows in range(1, 17) if (1 - threshold**rows) ** (_HASHES // rows) <= _MOST_MISSED]
        rows = max(sizes, default=1)
        self._minhash = MinHash(_HASHES // rows, rows)
        self._kept: list[tuple[str, np.ndarray]] = []
        # By hash of a band: the first text that has it, and further ones.
        self._first: dict[int, int] = {}
        self._more: dict[int, list[int]] = {}

    def add(self, name: str, texts: Iterable[str]) -> tuple[str, float] | None:
        """The earlier text that these texts nearly repeat, and how similar they are; None if there is none.

        In this case they are remembered.

        Args:
          name: of the texts, such as the id of their item.
          texts: of one example; runs do not go over their limits.
        """
        found = split(list(texts))
        parts = (found.hashes[begin:end] for begin, end in itertools.pairwise(found.bounds))
        shingles = np.unique(np.concatenate([found.hashes[:0], *(runs(part, _SHINGLE, whole=True) for part in parts)]))
        if not len(shingles):
            return None
        bands = self._minhash.bands_of(shingles).tolist()
        known = {self._first[band] for band in bands if band in self._first}
        known.update(number for band in bands for number in self._more.get(band, ()))
        for number in sorted(known):
            other, theirs = self._kept[number]
            # Sorted arrays without repetitions; what is in both is counted.
            small, large = sorted((shingles, theirs), key=len)
            if len(small) < self._threshold * len(large):
                continue
            at = np.searchsorted(large, small)
            both = int(np.count_nonzero(large[np.minimum(at, len(large) - 1)] == small))
            similarity = both / (len(small) + len(large) - both)
            if similarity >= self._threshold:
                return other, similarity
        number = len(self._kept)
        self._kept.append((name, shingles))
        for band in bands:
            if self._first.setdefault(band, number) != number:
                self._more.setdefault(band, []).append(number)
        return None


def cleaned(pipeline: Pipeline, decontaminate: Sequence[str] = (), near_duplicates: float | None = None) -> Pipeline:
    """A pipeline with the stages that end every recipe: no overlap with evaluation sets, and no near duplicates.

    They look at all texts of the rows that an item becomes, but for messages of role system.

    Args:
      pipeline: any.
      decontaminate: evaluation sets, each NAME=FILE. An item that shares 13 words in a row with one is rejected; the
        reason names the set.
      near_duplicates: similarity from which an item repeats an earlier one and is rejected; None keeps all.

    Raises:
      InputError: as `EvaluationSets` and `NearDuplicates`.
    """

    def texts(item: Item) -> list[str]:
        return [text for output in pipeline.outputs for row in output.rows(item) for text in texts_of(dict(row))]

    stages: list[Together] = []
    records: dict[str, int] = {}
    if decontaminate:
        sets = EvaluationSets(decontaminate)
        records = dict(sets.records)
        stages.append(Together(EVALUATION_SETS, lambda items: _without_overlap(items, sets, texts)))
    if near_duplicates is not None:
        make = functools.partial(NearDuplicates, near_duplicates)
        make()
        stages.append(Together(NEAR_DUPLICATES, lambda items: _without_repetition(items, make(), texts)))

    def measures() -> dict[str, Any]:
        return {**pipeline.measures(), **({"records of evaluation sets": records} if records else {})}

    return dataclasses.replace(pipeline, stages=[*pipeline.stages, *stages], measures=measures)


def _without_overlap(
    items: Iterator[Item], sets: EvaluationSets, texts: Callable[[Item], Iterable[str]]
) -> Iterator[tuple[Item, Result]]:
    for item in items:
        found = sets.find(texts(item))
        if found is None:
            yield item, item
        else:
            yield item, Rejected(f"in the evaluation set {', '.join(found.names)}", found.shared)


def _without_repetition(
    items: Iterator[Item], known: NearDuplicates, texts: Callable[[Item], Iterable[str]]
) -> Iterator[tuple[Item, Result]]:
    for item in items:
        found = known.add(item.id, texts(item))
        if found is None:
            yield item, item
        else:
            yield item, Rejected("a near duplicate", f"of {found[0]}, similarity {found[1]:.3f}")


def _contains(text: Sequence[str], part: Sequence[str]) -> bool:
    return any(tuple(text[at : at + len(part)]) == tuple(part) for at in range(len(text) - len(part) + 1))
