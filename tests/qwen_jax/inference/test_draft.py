"""Proposals by prompt look-up."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.inference.draft import NgramIndex, propose

Texts = st.lists(st.integers(0, 3), max_size=40)


def by_definition(tokens: list[int], k: int, longest: int, shortest: int) -> list[int]:
    """The continuation of the latest earlier occurrence of the longest end that has one, found by search."""
    for n in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for i in range(k):
                    text.append(text[start + n + i])
                return text[len(tokens) :]
    return []


@given(Texts, st.integers(0, 8), st.integers(1, 5), st.integers(0, 3))
def test_proposals_are_those_of_the_definition(tokens: list[int], k: int, shortest: int, more: int) -> None:
    """At every length, whether the text is given at once or token by token."""
    longest = shortest + more
    index = NgramIndex(longest=longest, shortest=shortest)
    for length in range(len(tokens) + 1):
        expected = by_definition(tokens[:length], k, longest, shortest)
        assert index.propose(k) == expected
        assert propose(tokens[:length], k, longest, shortest) == expected
        assert len(index) == length
        if length < len(tokens):
            index.push(tokens[length])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True), st.integers(1, 20))
def test_a_text_that_repeats_goes_on_repeating(part: list[int], k: int) -> None:
    tokens = part * 12
    assert propose(tokens, k) == [part[i % len(part)] for i in range(k)]


def test_nothing_is_proposed_for_what_is_new() -> None:
    assert propose([], 4) == propose([1], 4) == propose([1, 2, 3, 4, 5], 4) == []
    assert propose([1, 9, 1], 4) == [], "one token is too little by default"
    assert propose([1, 2, 3, 1, 2], 0) == []


def test_the_latest_occurrence_counts_and_the_longest_end() -> None:
    assert propose([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8]
    assert propose([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 1) == [7], "three tokens that match are better than two"


@pytest.mark.parametrize(("longest", "shortest"), [(2, 3), (2, 0)])
def test_sizes_that_make_no_sense(longest: int, shortest: int) -> None:
    with pytest.raises(ValueError, match="shortest"):
        NgramIndex(longest=longest, shortest=shortest)


def test_a_step_costs_the_same_after_a_long_text() -> None:
    """The time of 2,000 steps after 200,000 tokens is near that after 2,000: a search would take a hundred times it."""

    def seconds(length: int) -> float:
        index = NgramIndex(i * i % 8191 for i in range(length))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for i in range(2000):
                index.push(i * 7 % 513)
                index.propose(4)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(200_000) < 20 * seconds(2_000)
