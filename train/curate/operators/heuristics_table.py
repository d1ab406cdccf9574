"""Numbers for words, so that counting and comparing them is arithmetic on arrays."""
# ruff: noqa: RUF001 (marks of many scripts)

import array
import dataclasses
import string
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from train.curate.operators.heuristics_words import splitter

# Characters with Unicode's property Sentence_Terminal (version 15), and three Khmer signs.
_TERMINALS = """
    21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6
    17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 2e2e
    2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb fe52
    fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 111c5-111c6
    111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 1173c-1173e 11944
    11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 16b44 16e98 1bc9f
    1da88
"""
TERMINALS = frozenset(
    chr(code)
    for first, _, last in (span.partition("-") for span in _TERMINALS.split())
    for code in range(int(first, 16), int(last or first, 16) + 1)
)
"""Marks that end a sentence, in all scripts."""

# A run of these alone is a mark, not a word.
_CONTROLS = "".join(map(chr, (*range(32), *range(127, 160))))
_MARKS = "".join(TERMINALS) + string.punctuation + "«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～" + _CONTROLS

_OTHER, _PUNCTUATION, _TERMINAL = range(3)

SPACE = "\n"
"""Stands for white space other than one blank, where a list of runs needs it."""


@dataclasses.dataclass(frozen=True)
class WordFacts:
    """Properties of words, arrays with one entry for each number.

    Attributes:
      length: int32, characters.
      proper: bool, whether a word has a character that is neither a punctuation mark nor a control character.
      alphabetic: bool, whether it has a letter.
      stop: uint64, a bit for each stop word; 0 for other words.
      kind: int8, what a word is in counting sentences.
    """

    length: np.ndarray
    proper: np.ndarray
    alphabetic: np.ndarray
    stop: np.ndarray
    kind: np.ndarray


class WordTable:
    """Numbers the different runs and words that it meets, and remembers the words of each run.

    Attributes:
      characters: characters of the runs that it remembers; the measure of its memory, some 15 bytes for each.
    """

    def __init__(self, stop_words: Sequence[str]):
        """
        Args:
          stop_words: at most 64.
        """
        self.characters = 0
        self._stop = {word: 1 << bit for bit, word in enumerate(stop_words)}
        self._runs = _Numbers(self._add_run)
        self._words = _Numbers(self._add_word)
        # The words of all runs in a row, and where each run begins.
        self._members = array.array("i")
        self._starts = array.array("q", [0])
        self._length, self._kind = array.array("i"), array.array("b")
        self._proper, self._alphabetic = array.array("b"), array.array("b")
        self._bits = array.array("Q")
        self._split = splitter()
        self._words[SPACE]
        self._members.append(0)
        self._starts.append(1)
        dict.__setitem__(self._runs, SPACE, 0)

    def numbers(self, runs: Sequence[str]) -> np.ndarray:
        """The numbers of runs, int32 [runs]."""
        return np.fromiter(map(self._runs.__getitem__, runs), np.int32, len(runs))

    def words(self, numbers: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The words of runs.

        Args:
          numbers: of the runs, int32 [runs].
          bounds: where each part of them begins, and their end, int64 [parts + 1].

        Returns:
          The numbers of the words, int32 [words], and where each part begins and the end, int64 [parts + 1].
        """
        starts, members = np.array(self._starts), np.array(self._members)
        counts = (starts[1:] - starts[:-1])[numbers]
        ends = np.zeros(len(numbers) + 1, np.int64)
        np.cumsum(counts, out=ends[1:])
        # A word of run r is at starts[r] plus its place in the run.
        at = np.arange(ends[-1])
        at += np.repeat(starts[numbers] - ends[:-1], counts)
        return members[at], ends[bounds]

    def facts(self) -> WordFacts:
        """Properties of all words up to now."""
        return WordFacts(
            length=np.array(self._length),
            proper=np.array(self._proper, bool),
            alphabetic=np.array(self._alphabetic, bool),
            stop=np.array(self._bits),
            kind=np.array(self._kind),
        )

    def _add_run(self, run: str) -> None:
        self.characters += len(run)
        number = self._words.__getitem__
        self._members.fromlist([number(word) for word in self._split(run)])
        self._starts.append(len(self._members))

    def _add_word(self, word: str) -> None:
        letters = word.isalpha() or (word.upper() != word.lower() if word.isascii() else any(map(str.isalpha, word)))
        self._length.append(len(word))
        self._alphabetic.append(letters)
        self._proper.append(letters or word.strip(_MARKS) != "")
        self._bits.append(self._stop.get(word, 0))
        if letters or word.isalnum():
            kind = _OTHER
        elif word in TERMINALS:
            kind = _TERMINAL
        else:
            marks = all(unicodedata.category(char)[0] == "P" for char in word)
            kind = _PUNCTUATION if marks and word != SPACE else _OTHER
        self._kind.append(kind)


def sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The sum of each part, int64 [parts]; bounds as of `WordTable.words`."""
    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=ends[1:])
    return ends[bounds[1:]] - ends[bounds[:-1]]


def count_sentences(kinds: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sentences of each line, int64 [lines]: one, and one more for each end of a sentence before a further word.

    Args:
      kinds: `WordFacts.kind` of the words, int8 [words].
      bounds: where each line begins, and the end, int64 [lines + 1].
    """
    line = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    # A quote or bracket between the end and the next word belongs to the sentence.
    kept = kinds != _PUNCTUATION
    kinds, line = kinds[kept], line[kept]
    ends = (kinds[:-1] == _TERMINAL) & (kinds[1:] == _OTHER) & (line[:-1] == line[1:])
    return 1 + np.bincount(line[:-1][ends], minlength=len(bounds) - 1)


class _Numbers(dict[str, int]):
    """Numbers keys in the order in which they come."""

    def __init__(self, add: Callable[[str], None]):
        super().__init__()
        self._add = add

    def __missing__(self, key: str) -> int:
        self._add(key)
        number = self[key] = len(self)
        return number
