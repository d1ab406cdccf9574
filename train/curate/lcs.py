"""Longest common subsequence and substring of two sequences of words."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.data.documents import optional_library


def subsequence(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004) in rapidfuzz."""
    return int(_library().similarity(first, second))


def matched(first: Sequence[int], second: Sequence[int]) -> np.ndarray:
    """Places in both sequences of one longest common subsequence, int64 [2, length], ascending."""
    blocks = [b for b in _library().opcodes(first, second) if b.tag == "equal"]
    empty = np.zeros(0, np.int64)
    return np.stack(
        [
            np.concatenate([empty, *(np.arange(b.src_start, b.src_end) for b in blocks)]),
            np.concatenate([empty, *(np.arange(b.dest_start, b.dest_end) for b in blocks)]),
        ]
    )


def copied(test: Sequence[int], window: Sequence[int]) -> tuple[int, int]:
    """The range of a window that is a copy of a test: where matched words outnumber the others most.

    Args:
      test: words of the test.
      window: words of a text that have a common subsequence with it.
    """
    ours, theirs = matched(test, window)
    begin, end = densest(theirs)
    # A word at an edge may have been matched with the same word farther off.
    first, last = (int(ours[np.searchsorted(theirs, place)]) for place in (begin, end - 1))
    while begin and first and test[first - 1] == window[begin - 1]:
        begin, first = begin - 1, first - 1
    while end < len(window) and last + 1 < len(test) and test[last + 1] == window[end]:
        end, last = end + 1, last + 1
    return begin, end


def substring(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """Length of the longest common substring, and where it begins in the second sequence (0 if there is none).

    Args:
      first: hashes of words [n].
      second: hashes of words [m].
    """
    if not len(first) or not len(second):
        return 0, 0
    # Row by row of the table of all pairs: how many words before and at each place are equal.
    best, at = 0, 0
    before = np.zeros(len(second) + 1, np.int64)
    for word in first:
        now = np.zeros_like(before)
        now[1:] = np.where(second == word, before[:-1] + 1, 0)
        end = int(now.argmax())
        if now[end] > best:
            best, at = int(now[end]), end - int(now[end])
        before = now
    return best, at


def densest(places: np.ndarray) -> tuple[int, int]:
    """The range where matched words outnumber the others most; words that match by chance far away are left out.

    Args:
      places: of matched words, int64, ascending, not empty.

    Returns:
      The first place and the one after the last.
    """
    # Over the matched words, each worth 1, gaps cost their length (the maximum subarray: Bentley 1984).
    best, best_range, begin, total = 0, (0, 0), 0, 0
    for number, place in enumerate(places):
        gap = int(place - places[number - 1] - 1) if number else 0
        if total - gap <= 0:
            begin, total = int(place), 0
        else:
            total -= gap
        total += 1
        if total > best:
            best, best_range = total, (begin, int(place) + 1)
    return best_range


def _library() -> Any:
    return optional_library("rapidfuzz.distance", "Longest common subsequences").LCSseq
