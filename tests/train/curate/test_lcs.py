"""Common subsequences and substrings are those of the plain dynamic programmes."""

import random

import numpy as np

from tests.helpers.runs import print_seed
from train.curate.lcs import copied, densest, matched, subsequence, substring


def tables(a: list[int], b: list[int]) -> tuple[int, int]:
    """Lengths of the longest common subsequence and substring, entry by entry."""
    any_gap = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    no_gap = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            any_gap[i][j] = any_gap[i - 1][j - 1] + 1 if x == y else max(any_gap[i - 1][j], any_gap[i][j - 1])
            no_gap[i][j] = no_gap[i - 1][j - 1] + 1 if x == y else 0
    return any_gap[-1][-1], max(map(max, no_gap))


def test_lengths_are_those_of_the_dynamic_programmes() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    for _ in range(150):
        vocabulary = [rng.randrange(2**32) for _ in range(rng.choice([2, 5, 50]))]
        a, b = ([rng.choice(vocabulary) for _ in range(rng.randrange(70))] for _ in range(2))
        longest, run = tables(a, b)
        assert subsequence(a, b) == longest
        ours, theirs = matched(a, b)
        assert len(ours) == len(theirs) == longest
        assert np.all(np.diff(ours) > 0)
        assert np.all(np.diff(theirs) > 0)
        assert all(a[i] == b[j] for i, j in zip(ours, theirs, strict=True))
        length, at = substring(np.asarray(a, np.uint32), np.asarray(b, np.uint32))
        assert length == run
        assert not run or any(a[i : i + run] == b[at : at + run] for i in range(len(a)))


def test_the_range_of_a_copy_has_all_of_it() -> None:
    """Words of a copy also stand before and after it, and the longest common subsequence may take those instead."""
    rng = random.Random(int(print_seed().integers(1 << 30)))
    for _ in range(100):
        copy = rng.sample(range(100), 30)
        before, after = ([rng.choice(copy) for _ in range(8)] for _ in range(2))
        before[-1], after[0] = 200, 201
        assert copied(copy, [*before, *copy, *after]) == (8, 38)


def test_the_densest_range_is_that_of_all_ranges() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    for _ in range(100):
        places = sorted(rng.sample(range(30), rng.randrange(1, 20)))
        begin, end = densest(np.asarray(places))

        def worth(a: int, b: int, places: list[int] = places) -> int:
            inside = sum(a <= place < b for place in places)
            return 2 * inside - (b - a)

        assert worth(begin, end) == max(worth(a, b) for a in range(30) for b in range(a + 1, 31))
        assert begin in places
        assert end - 1 in places
