"""Characters in repeated word n-grams of many documents at once (Rae et al. 2021, table A1)."""

import dataclasses

import numpy as np

TOP = (2, 3, 4)
"""n for which the most frequent n-gram counts."""

DUPLICATE = (5, 6, 7, 8, 9, 10)
"""n for which all repeated n-grams count."""


@dataclasses.dataclass(frozen=True)
class GramCharacters:
    """Characters in n-grams, int64 [documents] for each n.

    Attributes:
      top: of `TOP`: the length of the most frequent n-gram, with a blank between its words, times its frequency. Of
        equally frequent ones the first counts; 0 in a document with fewer than n words.
      duplicate: of `DUPLICATE`: the lengths of the n-grams, without blanks, that repeat an earlier one. They are
        found from left to right and do not overlap: a repetition is skipped as a whole, and what begins inside of it
        is no example for later ones.
    """

    top: dict[int, np.ndarray]
    duplicate: dict[int, np.ndarray]


def count_grams(words: np.ndarray, bounds: np.ndarray, lengths: np.ndarray) -> GramCharacters:
    """Counts the characters in repeated n-grams.

    An n-gram can only be repeated where both (n-1)-grams in it are. So each n looks at few places, and compares pairs
    of group numbers instead of words: results are exact, without hashes.

    Args:
      words: numbers of the words of all documents, [words].
      bounds: where each document begins, and the end, int64 [documents + 1].
      lengths: characters of each of these words, [words].
    """
    total, documents = len(words), len(bounds) - 1
    sizes = np.diff(bounds)
    document = np.repeat(np.arange(documents), sizes)
    offsets = np.zeros(total + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    result = GramCharacters({}, {})

    # Places of repeated n-grams, ascending, and the group of equal n-grams that each belongs to. Groups are sorted by
    # document, because the most significant part of every key is.
    places = groups = np.arange(total)
    number = total
    key = document * (int(words.max(initial=0)) + 1) + words
    for n in range(1, DUPLICATE[-1] + 1):
        if n > 1:
            pairs = (places[1:] == places[:-1] + 1) & (document[places[1:]] == document[places[:-1]])
            key = groups[:-1][pairs] * number + groups[1:][pairs]
            places = places[:-1][pairs]
        groups, counts, first = _group(key)
        number = len(counts)
        if n in TOP:
            result.top[n] = _top(n, counts, places[first], document, bounds, offsets)
        repeated = counts[groups] > 1
        places, groups = places[repeated], groups[repeated]
        if n in DUPLICATE:
            found = np.array(_repetitions(n, places, groups, number), np.int64)
            characters = np.bincount(document[found], offsets[found + n] - offsets[found], documents)
            result.duplicate[n] = characters.astype(np.int64)
    return result


def _group(key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers the different keys in their order: the number of each place, and of each number count and first place."""
    if not len(key):
        none = np.zeros(0, np.int64)
        return none, none, none
    # Key and place in one number, where they fit: sorting numbers is faster than sorting places by their keys.
    bits = len(key).bit_length()
    if int(key.max()).bit_length() + bits < 64:
        packed = np.sort((key << bits) | np.arange(len(key)))
        order, ordered = packed & ((1 << bits) - 1), packed >> bits
    else:
        order = np.argsort(key, kind="stable")
        ordered = key[order]
    new = np.ones(len(key), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    groups = np.empty(len(key), np.int64)
    groups[order] = np.cumsum(new) - 1
    return groups, np.diff(starts, append=len(key)), order[starts]


def _top(
    n: int, counts: np.ndarray, first: np.ndarray, document: np.ndarray, bounds: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """Characters in the most frequent n-gram of each document, from the count and first place of each group."""
    total = len(document)
    # Without a repetition, the first n-gram is as frequent as any.
    count = (np.diff(bounds) >= n).astype(np.int64)
    place = np.where(count, bounds[:-1], 0)
    repeated = counts > 1
    if repeated.any():
        counts, first = counts[repeated], first[repeated]
        owner = document[first]
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        # The greatest count and, among equals, the least place: as one number.
        best = np.maximum.reduceat(counts * (total + 1) - first, starts)
        count[owner[starts]] = most = (best + total) // (total + 1)
        place[owner[starts]] = most * (total + 1) - best
    return count * (offsets[np.minimum(place + n, total)] - offsets[place] + n - 1)


def _repetitions(n: int, places: np.ndarray, groups: np.ndarray, number: int) -> list[int]:
    """Places of n-grams that repeat an earlier one, from left to right and without overlap."""
    seen = bytearray(number)
    found = []
    free = 0
    for place, group in zip(places.tolist(), groups.tolist(), strict=True):
        if place >= free:
            if seen[group]:
                found.append(place)
                free = place + n
            else:
                seen[group] = 1
    return found
