"""Words of texts: split and hashed by whole arrays, the same words on every machine, with their places in the text."""

import dataclasses
import functools
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

# Scripts without spaces between words: each character is a word.
_SINGLE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")

# What a character is: between words, of a word, or a word. The last kind cannot be told without its neighbours.
_BETWEEN, _LETTER, _WHOLE, _JOINED = range(4)
# Code points that Unicode normalises to others lie in these ranges.
_CHANGED = (range(0xAC00), range(0xD7A4, 0xD800), range(0xE000, 0x20000), range(0x2F800, 0x2FA20))
# Characters that are split at a time: their arrays stay in the cache of a core.
_BLOCK = 1 << 15
# A hash of a word is a polynomial of its characters at this odd number, and of a run one of its words at the other.
_BASE, _RUN_BASE = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
_MASK = (1 << 64) - 1


def fold(text: str) -> str:
    """The text in Unicode's form NFKC and lower case."""
    return unicodedata.normalize("NFKC", text).casefold()


def words(text: str) -> list[str]:
    """The words of a text, normalised: NFKC, lower case, without punctuation, spaces and underscores.

    Characters of scripts without spaces, such as Chinese, are words of their own.
    """
    return _WORD.findall(fold(text))


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
class Split:
    """The words of several texts, one after the other.

    Attributes:
      hashes: of the words, uint64 [words]. Two words have the same with a probability of about 1 in 10^18.
      begins: first character of each word in its text, int64 [words]; of a changed text, in `fold` of it.
      ends: the character after its last one, int64 [words].
      bounds: first word of each text, and the number of all words, int64 [texts + 1].
      changed: the numbers of texts whose characters `fold` does not change one by one.
    """

    hashes: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    bounds: np.ndarray
    changed: frozenset[int]

    def place(self, number: int, text: str, first: int, last: int) -> tuple[int, int]:
        """Begin and end of a range of words, in characters of the text itself.

        Args:
          number: of the text among the texts.
          text: the text.
          first: word of the text, counted from its first.
          last: the word after the range.
        """
        at = int(self.bounds[number])
        begin, end = int(self.begins[at + first]), int(self.ends[at + last - 1])
        return _unfolded(text, begin, end) if number in self.changed else (begin, end)


def split(texts: Sequence[str]) -> Split:
    """Splits texts into the words that `words` finds, without making a string of each."""
    kinds, plain, values = _tables()
    changed: set[int] = set()
    parts: list[np.ndarray] = []
    edges = np.zeros(len(texts) + 1, np.int64)
    for number, text in enumerate(texts):
        codes = _codes(text)
        if codes.dtype != np.uint8 and np.any(kinds[codes] == _JOINED):
            changed.add(number)
            codes = _codes(fold(text))
        parts += codes, np.full(1, ord("\n"), np.uint8)
        edges[number + 1] = edges[number] + len(codes) + 1
    # Short texts are split together, long ones in blocks.
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    codes = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    begin, size = 0, _BLOCK
    while begin < len(codes):
        block = codes[begin : begin + size]
        kind = kinds[block]
        if changed:
            kind = np.where(kind == _JOINED, plain[block], kind)
        if begin + size < len(codes):
            # A block ends between words; one with a longer word is larger.
            gaps = np.flatnonzero(kind != _LETTER)
            if not len(gaps):
                size *= 2
                continue
            kind = kind[: gaps[-1] + 1]
        first, last, hashes = _words_of(kind, values[block[: len(kind)]])
        found.append((first + begin, last + begin, hashes))
        begin, size = begin + len(kind), _BLOCK
    empty = np.zeros(0, np.int64)
    begins, ends = (np.concatenate([empty, *(one[side] for one in found)]) for side in (0, 1))
    bounds = np.searchsorted(begins, edges)
    offsets = np.repeat(edges[:-1], np.diff(bounds))
    hashes = np.concatenate([np.zeros(0, np.uint64), *(one[2] for one in found)])
    return Split(hashes, begins - offsets, ends - offsets, bounds, frozenset(changed))


def runs(hashes: np.ndarray, length: int, whole: bool = False) -> np.ndarray:
    """The hashes of all runs of so many words, uint64 [runs].

    Args:
      hashes: of words, from `split`.
      length: of a run.
      whole: whether a shorter text is one run; by default it has none.
    """
    if len(hashes) < length:
        if not (whole and len(hashes)):
            return np.zeros(0, np.uint64)
        length = len(hashes)
    count = len(hashes) - length + 1
    result = hashes[:count].copy()
    for at in range(1, length):
        result *= np.uint64(_RUN_BASE)
        result += hashes[at : at + count]
    return mixed(result)


def mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that spreads each over all (the finaliser of SplitMix64: Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _codes(text: str) -> np.ndarray:
    """The code points of a text, uint8 if all are ASCII."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _words_of(kind: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Begin, end and hash of each word of a block, which begins and ends between words."""
    letter = np.zeros(len(kind) + 2, np.bool_)
    np.equal(kind, _LETTER, out=letter[1:-1])
    turns = np.flatnonzero(letter[1:] != letter[:-1])
    begins, ends = turns[::2], turns[1::2]
    whole = np.flatnonzero(kind == _WHOLE)
    if len(whole):
        order = np.argsort(np.concatenate([begins, whole]), kind="stable")
        begins, ends = np.concatenate([begins, whole])[order], np.concatenate([ends, whole + 1])[order]
    powers, inverses = _powers(max(_BLOCK, 1 << (len(kind) - 1).bit_length()))
    # The polynomials of all words at once, as differences of one sum: what is before a word is divided out.
    sums = np.zeros(len(kind) + 1, np.uint64)
    np.cumsum(values * powers[: len(kind)], out=sums[1:])
    return begins, ends, mixed((sums[ends] - sums[begins]) * inverses[begins])


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base, and of its inverse, modulo 2^64."""
    found = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        found.append(np.cumprod(factors))
    return found[0], found[1]


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each code point: its kind, its kind in a text that `fold` has made, both uint8, and its value, uint64."""
    plain = np.zeros(sys.maxunicode + 1, np.uint8)
    folded = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    everything = folded.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    for pattern, kind in ((r"[^\W_]+", _LETTER), (f"[{_SINGLE}]+", _WHOLE)):
        for match in re.finditer(pattern, everything):
            plain[match.start() : match.end()] = kind
    # Marks combine with the character before them, and so do second characters of compositions.
    joined = {*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)}
    for code in (code for part in _CHANGED for code in part):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            joined.add(int(parts[1], 16))
        if unicodedata.combining(chr(code)):
            joined.add(code)
    kinds = plain.copy()
    for code in (code for part in _CHANGED for code in part):
        text = fold(chr(code))
        if len(text) == 1 and code not in joined and ord(text) not in joined:
            folded[code], kinds[code] = ord(text), plain[ord(text)]
        elif joined.isdisjoint(map(ord, text)) and not any(plain[ord(char)] for char in text):
            kinds[code] = _BETWEEN
        else:
            kinds[code] = _JOINED
    return kinds, plain, mixed(folded.astype(np.uint64) + np.uint64(1))


@functools.lru_cache(maxsize=1 << 16)
def _length(part: str) -> int:
    """Characters that `fold` makes of a part of a text."""
    return len(fold(part))


@functools.lru_cache(maxsize=1 << 16)
def _attached(char: str) -> bool:
    """Whether Unicode may combine a character with the one before it."""
    kinds, *_ = _tables()
    first = unicodedata.normalize("NFKD", char)[0]
    return bool(kinds[ord(first)] == _JOINED) and len(fold(first)) == 1


def _unfolded(text: str, begin: int, end: int) -> tuple[int, int]:
    """The range of characters of a text that become a range of characters of `fold` of it.

    The text is cut where Unicode combines nothing, and each part is folded alone. A part that the range has a piece of
    is in it.
    """
    codes = _codes(text)
    starts = _tables()[0][codes] != _JOINED
    for at in np.flatnonzero(~starts):
        starts[at] = not _attached(text[at])
    starts[:1] = True
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(text))
    lengths = last - first
    for part in np.flatnonzero((codes[first] >= 128) | (lengths > 1)):
        lengths[part] = _length(text[first[part] : last[part]])
    after = np.cumsum(lengths)
    return int(first[np.searchsorted(after, begin, "right")]), int(last[np.searchsorted(after, end - 1, "right")])
