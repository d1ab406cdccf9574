"""Finds test items in texts: candidates by runs of words that they share, verified by longest common subsequences.

The rule of the Qwen2.5 report (arXiv:2412.15115, section 3.1) removes a training sequence s_t where some test sequence
s_e has |LCS(s_t, s_e)| >= 13 and |LCS(s_t, s_e)| >= 0.6 min(|s_t|, |s_e|). A document of thousands of words contains
most words of any test, in their order, by chance. So s_t is here a window of the document: 1.5 |s_e| words around runs
of words that both share.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from qwen_jax.errors import InputError
from train.curate.evaluation_sets import GRAM, Items
from train.curate.lcs import copied, subsequence, substring
from train.curate.run_index import RunIndex, make_index
from train.data.words import Split, split

Mode = Literal["windowed", "contiguous", "document"]

# Words of the runs that make candidates: in a copy with a tenth of its words changed, two in three runs of 13 are
# changed, and two in five of 5. A run in more places of the items than `_FREQUENT` is left out where it can be.
_RUN, _FREQUENT = 5, 64
# Of a sequence of n words, a candidate has at least 2 runs, and at least this share of n: 0.6^5 = 0.08 would be
# expected of a copy at the limit of the rule.
_LEAST_RUNS, _RUNS_SHARE = 2, 0.03
# Times that a run counts in some 30,000 words of a text: tables repeat theirs without end.
_MOST_OF_A_RUN = 32
# The answer of a short question stands in so many words after it.
_ANSWER_WITHIN = 64
LEAST_QUESTION = _RUN
"""Questions of fewer words are found only where they are a whole text."""
# The literal rule is refused for documents that are so many times longer than the median of the items.
_MOST_TIMES = 8


@dataclasses.dataclass(frozen=True)
class Match:
    """A test item in a text.

    Attributes:
      text: number of the text.
      item: number of the item.
      common: words of the longest common subsequence (in mode contiguous: substring).
      words: words of the test sequence.
      begin: first word of the match in the text.
      end: word after its last one.
    """

    text: int
    item: int
    common: int
    words: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """Items by sequence: sequences that several items share stand once."""

    index: RunIndex
    items: np.ndarray  # Items, by sequence, int64.
    bounds: np.ndarray  # First place in `items` of each sequence, int64 [sequences + 1].

    def of(self, sequence: int) -> list[int]:
        return [int(item) for item in self.items[self.bounds[sequence] : self.bounds[sequence + 1]]]

    def save(self, folder: Path) -> None:
        self.index.save(folder)
        np.save(folder / "items.npy", self.items, allow_pickle=False)
        np.save(folder / "item_bounds.npy", self.bounds, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "_Sequences":
        arrays = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("items", "item_bounds"))
        return cls(RunIndex.load(folder), *arrays)


@dataclasses.dataclass(frozen=True)
class Finder:
    """Finds the items of evaluation sets in texts.

    Attributes:
      mode: windowed: a window of the text around shared runs has a common subsequence of at least 13 words and 0.6 of
        the shorter of text and test. contiguous: a common substring of this length. document: the whole text has such
        a subsequence, as the report has it.
    """

    mode: Mode
    _long: _Sequences
    _short: _Sequences
    _answers: list[list[int]]  # Of short questions, by item; upper halves of hashes.
    _whole: dict[tuple[int, ...], list[int]]  # Items by all words of their short question.

    @property
    def num_bytes(self) -> int:
        """Memory of the index of long items."""
        return self._long.index.num_bytes + self._long.items.nbytes + self._long.bounds.nbytes

    def find(
        self, texts: Sequence[str], rows: Sequence[int] | None = None, names: Sequence[str] = ()
    ) -> tuple[Split, list[Match]]:
        """Finds test items in texts, each of which is searched by itself.

        Args:
          texts: any.
          rows: number of the row of each text: the answer of a short question may stand in another text of its row. By
            default each text is a row.
          names: of the texts, for messages.

        Returns:
          The words of the texts, and the matches, by text, item and place.

        Raises:
          InputError: in mode document, a text is much longer than the items.
        """
        words = split(texts)
        low = _low(words.hashes)
        found: dict[tuple[int, int, int], Match] = {}
        others = _others(rows if rows is not None else range(len(texts)))
        if self.mode == "document":
            matches = self._literal(words, low, names)
        else:
            matches = self._near(self._long, words, low, others)
        for match in [*matches, *self._near(self._short, words, low, others), *self._same(words, low, others)]:
            found.setdefault((match.text, match.item, match.begin), match)
        return words, [found[key] for key in sorted(found)]

    def save(self, folder: Path) -> None:
        """Writes the finder to a folder, for `load`."""
        self._long.save(folder / "long")
        self._short.save(folder / "short")
        whole = [[list(question), found] for question, found in self._whole.items()]
        (folder / "finder.json").write_text(json.dumps([self.mode, self._answers, whole]))

    @classmethod
    def load(cls, folder: Path) -> "Finder":
        """Reads a finder; the index is shared by all processes of a machine."""
        mode, answers, whole = json.loads((folder / "finder.json").read_text())
        by_words = {tuple(question): found for question, found in whole}
        return cls(mode, _Sequences.load(folder / "long"), _Sequences.load(folder / "short"), answers, by_words)

    def _near(self, sequences: _Sequences, words: Split, low: np.ndarray, others: Sequence[range]) -> list[Match]:
        """Matches near runs that a text and a sequence share."""
        matches: list[Match] = []
        index = sequences.index
        for text, number, begin, end in _candidates(index, words):
            test = index.sequence(number)
            first, last = int(words.bounds[text]), int(words.bounds[text + 1])
            window = low[first + begin : first + end]
            place = self._verified(test, window, last - first)
            if place is None:
                continue
            common, left, right = place
            for item in sequences.of(number):
                if sequences is self._short:
                    after = low[first + begin + right : min(first + begin + right + _ANSWER_WITHIN, last)]
                    rest = [low[words.bounds[i] : words.bounds[i + 1]] for i in others[text] if i != text]
                    if not _contained(self._answers[item], [after, *rest]):
                        continue
                matches.append(Match(text, item, common, len(test), begin + left, begin + right))
        return matches

    def _verified(self, test: np.ndarray, window: np.ndarray, length: int) -> tuple[int, int, int] | None:
        """Common words of a test and a window, with first and last in the window, if they suffice."""
        if len(test) < GRAM or self.mode == "contiguous":
            common, at = substring(test, window)
            return (common, at, at + common) if _suffices(common, len(test), length) else None
        ours, theirs = test.tolist(), window.tolist()
        common = subsequence(ours, theirs)
        return (common, *copied(ours, theirs)) if _suffices(common, len(test), length) else None

    def _same(self, words: Split, low: np.ndarray, others: Sequence[range]) -> list[Match]:
        """Questions that are whole texts, where another text of the row has the answer."""
        if not self._whole:
            return []
        matches = []
        sizes = np.diff(words.bounds)
        for text in np.flatnonzero((sizes > 0) & (sizes < GRAM)).tolist():
            own = low[words.bounds[text] : words.bounds[text + 1]]
            for item in self._whole.get(tuple(own.tolist()), ()):
                rest = [low[words.bounds[i] : words.bounds[i + 1]] for i in others[text] if i != text]
                if _contained(self._answers[item], rest):
                    matches.append(Match(text, item, len(own), len(own), 0, len(own)))
        return matches

    def _literal(self, words: Split, low: np.ndarray, names: Sequence[str]) -> list[Match]:
        """The rule over whole texts, against every sequence that has enough words of the text in any order."""
        matches: list[Match] = []
        index = self._long.index
        sizes = np.diff(index.bounds)
        if not len(sizes):
            return matches
        median = float(np.median(sizes))
        order = np.argsort(index.words, kind="stable")
        known = index.words[order]
        owner = np.repeat(np.arange(len(sizes)), sizes)[order]
        for text, (first, last) in enumerate(zip(words.bounds, words.bounds[1:], strict=False)):
            own = low[first:last]
            if len(own) > _MOST_TIMES * median:
                raise InputError(
                    f"{names[text] if names else f'text {text + 1}'} has {len(own):,} words, {len(own) / median:.0f} "
                    f"times as many as the median of the test items, {median:.0f}. In so long a text any test has its "
                    "words in their order by chance, so that the literal rule removes unrelated documents: all of 4,096"
                    " words. Use --mode windowed, which applies the rule to windows of 1.5 times the test item."
                )
            unique = np.unique(own)
            begins, ends = (np.searchsorted(known, unique, side) for side in ("left", "right"))
            hits = [owner[begin:end] for begin, end in zip(begins, ends, strict=True) if end > begin]
            bound = np.bincount(np.concatenate(hits), minlength=len(sizes)) if hits else np.zeros(len(sizes), np.int64)
            shorter = np.minimum(sizes, len(own))
            for number in np.flatnonzero((bound >= GRAM) & (5 * bound >= 3 * shorter)).tolist():
                found = self._verified(index.sequence(number), own, len(own))
                if found:
                    for item in self._long.of(number):
                        matches.append(Match(text, item, found[0], int(sizes[number]), found[1], found[2]))
        return matches


def make_finder(items: Items, mode: Mode = "windowed") -> Finder:
    """Indexes the items of evaluation sets.

    Args:
      items: from `train.curate.evaluation_sets.read_items`.
      mode: see `Finder`.
    """
    long = _sequences(items.sequences, items.sequence_items, GRAM if mode == "contiguous" else _RUN)
    in_text = [q for q in items.questions if len(q.words) >= LEAST_QUESTION]
    short = _sequences([q.words for q in in_text], [q.item for q in in_text], _RUN)
    answers: list[list[int]] = [[] for _ in items.owner]
    whole: dict[tuple[int, ...], list[int]] = {}
    for question in items.questions:
        answers[question.item] = _low(question.answer).tolist()
        whole.setdefault(tuple(_low(question.words).tolist()), []).append(question.item)
    return Finder(mode, long, short, answers, whole)


def _sequences(sequences: Sequence[np.ndarray], items: Sequence[int], length: int) -> _Sequences:
    first: dict[bytes, int] = {}
    kept: list[np.ndarray] = []
    owners: list[list[int]] = []
    for sequence, item in zip(sequences, items, strict=True):
        number = first.setdefault(sequence.tobytes(), len(kept))
        if number == len(kept):
            kept.append(sequence)
            owners.append([])
        if item not in owners[number][-1:]:
            owners[number].append(item)
    index = make_index(kept, length, _FREQUENT if length < GRAM else None)
    flat = np.asarray([item for found in owners for item in found], np.int64)
    return _Sequences(index, flat, np.cumsum([0, *map(len, owners)], dtype=np.int64))


def _low(hashes: np.ndarray) -> np.ndarray:
    """The upper halves of hashes, by which words are compared."""
    return (hashes >> np.uint64(32)).astype(np.uint32)


def _others(rows: Sequence[int]) -> list[range]:
    """For each text the texts of its row, which stand one after the other."""
    found: list[range] = []
    for number, row in enumerate(rows):
        if len(found) <= number:
            end = next((i for i in range(number + 1, len(rows)) if rows[i] != row), len(rows))
            found += [range(number, end)] * (end - number)
    return found


def _contained(part: Sequence[int], texts: Sequence[np.ndarray]) -> bool:
    """Whether one of the texts has all words of a part, one after the other; an empty part is in everything."""
    wanted = np.asarray(part, np.uint32)
    return not part or any(substring(wanted, text)[0] == len(part) for text in texts)


def _suffices(common: int, test: int, text: int) -> bool:
    """The report's rule; a test of fewer than 13 words must be there in full."""
    if test < GRAM:
        return common == test
    return common >= GRAM and 5 * common >= 3 * min(test, text)


def _candidates(index: RunIndex, words: Split) -> list[tuple[int, int, int, int]]:
    """Windows of texts that share runs with a sequence: text, sequence, first word in the text, word after the last."""
    at, place = index.lookup(words.hashes, _MOST_OF_A_RUN, words.bounds)
    text = np.searchsorted(words.bounds, at, "right") - 1
    # A run may not reach into the next text.
    inside = at + index.length <= words.bounds[text + 1]
    at, place, text = at[inside], place[inside], text[inside]
    sequence = np.searchsorted(index.bounds, place, "right") - 1
    pair = text * (len(index.bounds) - 1) + sequence
    # Most pairs share one run by chance.
    sizes = index.bounds[sequence + 1] - index.bounds[sequence]
    lengths = words.bounds[text + 1] - words.bounds[text]
    need = _needed(index.length, sizes, lengths)
    _, inverse, counts = np.unique(pair, return_inverse=True, return_counts=True)
    kept = counts[inverse] >= need
    pair, sizes, lengths, need = pair[kept], sizes[kept], lengths[kept], need[kept]
    # Where the sequence would begin in the text if the run were part of a copy. Runs of a copy begin it at about the
    # same word; two divisions into ranges, shifted by half a range, have all that are near each other in one range.
    begin = (at - words.bounds[text] - place + index.bounds[sequence])[kept]
    width = np.maximum(sizes // 2, 8)
    found: dict[tuple[int, int, int, int], None] = {}
    for shift in (0, width // 2):
        group = (begin + shift) // width
        order = np.lexsort((begin, group, pair))
        if not len(order):
            break
        pairs, groups, begins = pair[order], group[order], begin[order]
        edges = np.flatnonzero(np.append(True, (pairs[1:] != pairs[:-1]) | (groups[1:] != groups[:-1])))
        ends = np.append(edges[1:], len(order))
        for one in np.flatnonzero(ends - edges >= need[order][edges]):
            row = order[edges[one]]
            n, length = int(sizes[row]), int(lengths[row])
            middle = (int(begins[edges[one]]) + int(begins[ends[one] - 1])) // 2
            first, last = max(middle - n // 4, 0), min(middle + n + n // 4, length)
            text_number, number = divmod(int(pair[row]), len(index.bounds) - 1)
            found[text_number, number, first, last] = None
    return list(found)


def _needed(length: int, sizes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Runs that make a candidate, of sequences of `sizes` words in texts of `lengths`."""
    if length >= GRAM:
        return np.ones_like(sizes)
    shorter = np.minimum(sizes, lengths)
    least = np.maximum(np.ceil(_RUNS_SHARE * shorter).astype(np.int64), _LEAST_RUNS)
    return np.where(sizes < GRAM, 1, least)
