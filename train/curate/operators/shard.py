"""Removal of lines and runs of words that documents of a shard share."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qwen_jax.errors import InputError
from train.curate.operator import REASON, Compute, ShardOperator
from train.data.words import mixed

_NOTHING_LEFT = "nothing but repetitions"
# Words, of scripts without spaces characters: what is counted of a line.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORDS = rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+"
_BASE = np.uint64(0x9E3779B97F4A7C15)
# Bytes of text whose words are found at a time.
_PIECE = 1 << 22


@dataclasses.dataclass(frozen=True)
class RemoveSharedLines(ShardOperator):
    """Removes lines that many documents of a shard share, such as notices and menus; in the first document they stay.

    Lines are compared exactly, without the spaces around them. Repetitions within the first document
    are not removed here, see `RemoveRepeatedLines`. A document of which nothing is left has an empty text and a reason.
    shared_lines_removed: how many. Memory: about 8 MB for each MB of text.

    Attributes:
      min_words: of a line; a character of Chinese and other scripts without spaces is a word.
      min_documents: that share a line.
    """

    min_words: int = 5
    min_documents: int = 3

    makes = pa.schema(
        [
            pa.field("text", pa.large_string()),
            pa.field("shared_lines_removed", pa.int32()),
            pa.field(REASON, pa.string()),
        ]
    )

    def __post_init__(self) -> None:
        if self.min_words < 1 or self.min_documents < 2:
            raise InputError(
                f"min_words must be at least 1 and min_documents at least 2, got {self.min_words} and "
                f"{self.min_documents}."
            )

    def start(self) -> Compute:
        return self._compute

    def _compute(self, table: pa.Table) -> pa.Table:
        texts = _one(table["text"])
        if not len(texts):
            return pa.table([[], [], []], schema=self.makes)
        # Lines of all documents, each with the row that it is from. A null has no lines.
        split = pc.split_pattern(texts, "\n")
        rows = pc.list_parent_indices(split).to_numpy()
        lines = pc.list_flatten(split)
        coded = pc.utf8_trim_whitespace(lines).dictionary_encode()
        codes = coded.indices.to_numpy()
        # A document counts once for each line.
        pairs = np.unique(codes.astype(np.int64) * len(texts) + rows)
        documents = np.bincount(pairs // len(texts), minlength=len(coded.dictionary))
        often = documents >= self.min_documents
        words = np.zeros(len(often), np.int64)
        words[often] = pc.count_substring_regex(coded.dictionary.filter(pa.array(often)), _WORDS).to_numpy()
        shared = often & (words >= self.min_words)
        # Pairs are sorted by line and then by row.
        first = np.zeros(len(often), np.int64)
        first[pairs[::-1] // len(texts)] = pairs[::-1] % len(texts)
        removed = shared[codes] & (rows != first[codes])

        counts = np.bincount(rows[removed], minlength=len(texts))
        results: list[str | None] = texts.to_pylist()
        begins = np.searchsorted(rows, np.arange(len(texts) + 1))
        for row in np.flatnonzero(counts):
            kept = ~removed[begins[row] : begins[row + 1]]
            part = lines.slice(begins[row], begins[row + 1] - begins[row])
            results[row] = "\n".join(part.filter(pa.array(kept)).to_pylist())
        return _table(self.makes, results, counts, texts)


@dataclasses.dataclass(frozen=True)
class RemoveSharedRuns(ShardOperator):
    """Removes runs of words that stand earlier in the shard, in the same document or another; the first one stays.

    Every run of `length` words that came earlier, and does not overlap its first occurrence, is removed with the spaces
    that follow; longer repetitions are made of such runs (Lee et al. 2022, arXiv:2107.06499, with words in place of
    tokens). Words are what stands between white space, and single characters of Chinese, Japanese, Korean and Thai.
    They are compared by hashes of 64 bits. What is left is searched again until nothing is found.

    A document of which nothing is left has an empty text and a reason. shared_words_removed: how many. Memory: about
    30 MB for each MB of text.

    Attributes:
      length: words of a run.
    """

    length: int = 50

    makes = pa.schema(
        [
            pa.field("text", pa.large_string()),
            pa.field("shared_words_removed", pa.int32()),
            pa.field(REASON, pa.string()),
        ]
    )

    def __post_init__(self) -> None:
        if self.length < 2:
            raise InputError(f"length must be at least 2, got {self.length}.")

    def start(self) -> Compute:
        return self._compute

    def _compute(self, table: pa.Table) -> pa.Table:
        original = texts = _one(table["text"])
        counts = np.zeros(len(texts), np.int64)
        while len(texts):
            texts, removed = self._once(texts)
            counts += removed
            if not removed.any():
                break
        return _table(self.makes, texts.to_pylist(), counts, original)

    def _once(self, texts: pa.LargeStringArray) -> tuple[pa.LargeStringArray, np.ndarray]:
        """The texts without repetitions, and the number of words removed from each."""
        counts = np.zeros(len(texts), np.int64)
        data, ends = _bytes(texts)
        starts, hashes = _words(data, ends)
        # Where each document begins, in words.
        bounds = np.searchsorted(starts, ends)
        if len(starts) < self.length:
            return texts, counts
        runs = _runs(hashes, self.length)
        # A run must not go on into the next document.
        inside = np.ones(len(runs), bool)
        for bound in np.unique(bounds):
            inside[max(bound - self.length + 1, 0) : bound] = False
        places = np.flatnonzero(inside)
        # The first place of each run; the sort is stable.
        order = places[np.argsort(runs[places], kind="stable")]
        new = np.ones(len(order), bool)
        new[1:] = runs[order[1:]] != runs[order[:-1]]
        first = order[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(order) else order
        again = order[order - first >= self.length]
        if not len(again):
            return texts, counts
        # Words that such a run covers.
        size = len(starts) + 1
        change = np.bincount(again, minlength=size) - np.bincount(again + self.length, minlength=size)
        covered = np.cumsum(change[:-1]) > 0
        # A word goes with the spaces after it, up to the next word or the end of its document.
        owner = np.searchsorted(ends, starts, side="right")
        stops = np.minimum(np.append(starts[1:], len(data)), ends[owner])
        delta = np.zeros(len(data) + 1, np.int8)
        delta[starts[covered]] += 1
        delta[stops[covered]] -= 1
        kept = np.cumsum(delta[:-1], dtype=np.int8) == 0
        counts += np.bincount(owner[covered], minlength=len(texts))
        left = np.append(0, np.cumsum(kept))[np.append(0, ends)]
        buffers = [pa.py_buffer(left.astype(np.int64)), pa.py_buffer(np.ascontiguousarray(data[kept]))]
        valid = None if not texts.null_count else pc.is_valid(texts).buffers()[1]
        result = pa.LargeStringArray.from_buffers(len(texts), buffers[0], buffers[1], valid, texts.null_count)
        return result, counts


def _one(column: pa.ChunkedArray) -> pa.LargeStringArray:
    whole = column.cast(pa.large_string()).combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _table(
    schema: pa.Schema, results: list[str | None], counts: np.ndarray, originals: pa.LargeStringArray
) -> pa.Table:
    """The columns; a text that has become empty gets a reason, and null stays null."""
    valid = pc.is_valid(originals).to_pylist()
    numbers = [int(count) if there else None for count, there in zip(counts, valid, strict=True)]
    reasons = [
        _NOTHING_LEFT if number and not (result or "").strip() else None
        for number, result in zip(numbers, results, strict=True)
    ]
    return pa.table([results, numbers, reasons], schema=schema)


def _bytes(texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """All texts as UTF-8 in one array, and where each ends in it; a null is empty."""
    filled = pc.fill_null(texts, "") if texts.null_count else texts
    _, offsets, values = filled.buffers()
    bounds = np.frombuffer(offsets, np.int64)[filled.offset : filled.offset + len(filled) + 1]
    data = np.frombuffer(values, np.uint8) if values is not None else np.zeros(0, np.uint8)
    return data[bounds[0] : bounds[-1]], bounds[1:] - bounds[0]


def _words(data: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words start, and their hashes, uint64.

    Args:
      data: UTF-8 of all documents.
      ends: of documents.
    """
    starts, hashes = [], []
    begin = 0
    while begin < len(data):
        # A piece ends with a document.
        at = int(np.searchsorted(ends, min(begin + _PIECE, len(data))))
        end = int(ends[at])
        found = _words_of(data[begin:end], ends[(ends > begin) & (ends < end)] - begin)
        starts.append(found[0] + begin)
        hashes.append(found[1])
        begin = end
    if not starts:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    return np.concatenate(starts), np.concatenate(hashes)


def _words_of(data: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    space = (data == 32) | ((data >= 9) & (data <= 13))
    # Lead bytes of U+3000 to U+9FFF, U+AC00 to U+D7FF and U+20000 on; and E0 B8 to E0 BB of Thai and Lao.
    alone = ((data >= 0xE3) & (data <= 0xED)) | (data == 0xF0)
    thai = np.zeros(len(data), bool)
    thai[:-1] = (data[:-1] == 0xE0) & (data[1:] >= 0xB8) & (data[1:] <= 0xBB)
    alone |= thai
    # A word starts after a space, at a character that is a word, and after one.
    start = alone.copy()
    start[:1] = True
    start[1:] |= space[:-1]
    start[bounds] = True
    lead = (data & 0xC0) != 0x80
    leads = np.flatnonzero(lead)
    start[leads[1:][alone[leads[:-1]]]] = True
    start &= ~space
    # The hash of a word: a polynomial of its bytes.
    text = np.flatnonzero(~space)
    starts = np.flatnonzero(start)
    if not len(starts):
        return starts, np.zeros(0, np.uint64)
    begins = np.searchsorted(text, starts)
    sizes = np.diff(np.append(begins, len(text)))
    powers = np.cumprod(np.full(int(sizes.max()) + 1, _BASE))
    within = np.arange(len(text)) - np.repeat(begins, sizes)
    terms = mixed(data[text].astype(np.uint64) + np.uint64(1)) * powers[within]
    return starts, mixed(np.add.reduceat(terms, begins) + sizes.astype(np.uint64))


def _runs(hashes: np.ndarray, length: int) -> np.ndarray:
    """The hash of each run of so many words, uint64 [words - length + 1]: a polynomial, put together from halves."""
    count = len(hashes) - length + 1
    result = np.zeros(count, np.uint64)
    part, size, done = hashes, 1, 0
    power = _BASE
    with np.errstate(over="ignore"):
        while done < length:
            if length & size:
                result = result * power + part[done : done + count]
                done += size
            if done < length:
                part = part[:-size] * power + part[size:]
                size *= 2
                power = power * power
    return result
