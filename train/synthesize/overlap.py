"""Overlap of texts: with evaluation sets, by runs of 13 words, and among themselves, by the words that they share."""

import dataclasses
import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from train.data.tables import find_tables, read_rows
from train.synthesize.item import Item, Rejected
from train.synthesize.pipeline import Pipeline, Result, Together

GRAM = 13
"""Words of a run that training data must not share with an evaluation set."""

# Scripts without spaces between words: each character is a word.
_SINGLE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")
_QUESTIONS = ("question", "problem", "prompt", "instruction", "query", "input", "text")
_ANSWERS = ("answer", "target", "solution", "output", "response", "completion", "label")

# Words of a shingle, and hashes of a signature.
_SHINGLE, _HASHES = 3, 128
# A pair as similar as the threshold is missed with at most this probability.
_MOST_MISSED = 1e-3


def words(text: str) -> list[str]:
    """The words of a text, normalised: NFKC, lower case, without punctuation, spaces and underscores.

    Characters of scripts without spaces, such as Chinese, are words of their own.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def texts_of(value: object) -> Iterator[str]:
    """All texts and numbers in a JSON value, but for names of fields and messages of role system."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if value.get("role") != "system":
            for key, part in value.items():
                if not (key == "role" and isinstance(part, str)):
                    yield from texts_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts_of(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


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
    """The runs of 13 words of evaluation sets, as sorted hashes: 10 bytes a run.

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
        grams: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        self._short: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
        for given in sets:
            name, equals, file = given.partition("=")
            if not (equals and name.strip() and file.strip()):
                raise InputError(f"Expected an evaluation set as NAME=FILE, got {given!r}.")
            before = self.records.setdefault(name, 0)
            number = list(self.records).index(name)
            for path in find_tables([file]):
                for row in read_rows(path):
                    found = self._add(row.values, number)
                    self.records[name] += found is not None
                    if found is not None and len(found):
                        grams.append(found)
                        owners.append(np.full(len(found), number, np.uint16))
            if self.records[name] == before:
                raise InputError(f"{file} has no record with words. Give a file of the evaluation set {name}.")
        self._names = list(self.records)
        pairs = np.zeros(0, [("gram", np.uint64), ("owner", np.uint16)])
        if grams:
            pairs = np.zeros(sum(map(len, grams)), pairs.dtype)
            pairs["gram"], pairs["owner"] = np.concatenate(grams), np.concatenate(owners)
            pairs = np.unique(pairs)
        self._grams, self._owners = np.ascontiguousarray(pairs["gram"]), np.ascontiguousarray(pairs["owner"])

    def find(self, texts: Iterable[str]) -> Overlap | None:
        """What the texts of one example share with the sets; None if that is nothing."""
        split = [words(text) for text in texts]
        hits: dict[int, str] = {}
        for one in split:
            grams = _runs(one, GRAM)
            first, last = (np.searchsorted(self._grams, grams, side) for side in ("left", "right"))
            for at in np.flatnonzero(last > first):
                for number in self._owners[first[at] : last[at]]:
                    hits.setdefault(int(number), " ".join(one[at : at + GRAM]))
        for one in split:
            for number, answer in self._short.get(tuple(one), ()):
                if not answer or any(_contains(other, answer) for other in split if other is not one):
                    hits.setdefault(number, " ".join((*one, *answer)))
        if not hits:
            return None
        order = sorted(hits)
        return Overlap(tuple(self._names[number] for number in order), hits[order[0]])

    def _add(self, record: Mapping[str, Any], number: int) -> np.ndarray | None:
        """The runs of a record; None if it has no words. A short one is remembered."""
        columns = {name: [words(text) for text in texts_of(value)] for name, value in record.items()}
        texts = [text for values in columns.values() for text in values if text]
        if not texts:
            return None
        question = next((columns[name] for name in _QUESTIONS if columns.get(name)), [texts[0]])
        # The question of a conversation is its last message before the answer, of a text the text.
        asked = question[-1]
        if 0 < len(asked) < GRAM:
            none: list[list[str]] = [[]]
            answers = next((columns[name] for name in _ANSWERS if columns.get(name)), none)
            # A worked answer has runs of its own; of a list of answers the first one counts.
            entry = (number, tuple(answers[0]))
            self._short.setdefault(tuple(asked), []).append(entry)
        return np.concatenate([_runs(text, GRAM) for text in texts])


class NearDuplicates:
    """Texts that share most of their runs of three words with an earlier one (Jaccard similarity).

    MinHash signatures with fixed numbers propose pairs (Broder 1997, "On the resemblance and containment of
    documents"), and the similarity of these is computed from all runs. A pair as similar as the threshold is missed
    with a probability below 0.001. Memory holds hashes alone: 8 bytes for each different run of a text, and some 100
    bytes for each band of its signature; there are 64 bands at a threshold of 0.5, 25 at 0.8, and 10 at 0.95.
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
        self._rows = max(sizes, default=1)
        seeds = np.arange(1, _HASHES + 1, dtype=np.uint64)
        self._seeds = _mixed(seeds)[:, None]
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
        shingles = np.unique(np.concatenate([_EMPTY, *(_runs(w, _SHINGLE, whole=True) for w in map(words, texts))]))
        if not len(shingles):
            return None
        bands = self._bands_of(shingles)
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

    def _bands_of(self, shingles: np.ndarray) -> list[int]:
        """The bands of a signature, each as a hash of its number and its minima."""
        least = np.full(_HASHES, np.iinfo(np.uint64).max, np.uint64)
        for begin in range(0, len(shingles), 4096):
            np.minimum(least, _mixed(shingles[None, begin : begin + 4096] ^ self._seeds).min(1), out=least)
        count = _HASHES // self._rows
        bands = least[: count * self._rows].reshape(count, self._rows)
        keys = np.arange(count, dtype=np.uint64)
        for row in range(self._rows):
            keys = _mixed(keys ^ bands[:, row])
        return [int(key) for key in keys]


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
        stages.append(Together("evaluation sets", lambda items: _without_overlap(items, sets, texts)))
    if near_duplicates is not None:
        make = functools.partial(NearDuplicates, near_duplicates)
        make()
        stages.append(Together("near duplicates", lambda items: _without_repetition(items, make(), texts)))

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


_EMPTY = np.zeros(0, np.uint64)


@functools.lru_cache(maxsize=1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _runs(text: Sequence[str], length: int, whole: bool = False) -> np.ndarray:
    """The hashes of all runs of so many words, uint64 [runs].

    Args:
      text: words.
      length: of a run.
      whole: whether a shorter text is one run; by default it has none.
    """
    if len(text) < length:
        if not (whole and text):
            return _EMPTY
        length = len(text)
    hashes = np.fromiter(map(_hash, text), np.uint64, len(text))
    count = len(text) - length + 1
    result = np.full(count, length, np.uint64)
    for at in range(length):
        result = _mixed(result ^ hashes[at : at + count])
    return result


def _mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that spreads each over all (the finaliser of SplitMix64: Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _contains(text: Sequence[str], part: Sequence[str]) -> bool:
    return any(tuple(text[at : at + len(part)]) == tuple(part) for at in range(len(text) - len(part) + 1))
