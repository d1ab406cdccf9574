"""Words of texts: arrays find what the pattern finds, and know where each word stands in the text."""

import random

import numpy as np
import pytest

from tests.helpers.runs import print_seed
from train.data import words as module
from train.data.words import fold, runs, split, texts_of, words

# Ligatures, compositions, fullwidth forms, fractions, Hangul, marks, scripts without spaces.
_ODD = "ß\u0130\u0149\u0300\u0301\u0327\u0345\ufb01½…\u1100\u1161\u11a8\uac00\uff76\uff9e\u3099か\u09be\u09c7क\u093c"
_ODD += "\u0958\u1e9bΣ\u212b\ufdfa你\U0001d15e\u0344\ufb2cא\u05b0\uffa1\uffc2Å\u2019—_٣"


def odd_text(rng: random.Random, length: int) -> str:
    plain = [chr(code) for code in range(32, 127)]
    return "".join(rng.choice(rng.choice((plain, _ODD, [chr(rng.randrange(0xD800))]))) for _ in range(length))


@pytest.mark.parametrize("block", [1 << 15, 7])
def test_arrays_find_the_words_of_the_pattern(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = random.Random(int(print_seed().integers(1 << 30)))
    hashes: dict[str, int] = {}
    for _ in range(200):
        texts = [odd_text(rng, rng.randrange(60)) for _ in range(rng.randrange(5))]
        found = split(texts)
        assert len(found.bounds) == len(texts) + 1
        for number, text in enumerate(texts):
            own = found.hashes[found.bounds[number] : found.bounds[number + 1]].tolist()
            expected = words(text)
            assert len(own) == len(expected), text
            assert all(hashes.setdefault(word, value) == value for word, value in zip(expected, own, strict=True))
    assert len(set(hashes.values())) == len(hashes) > 1000


def test_places_are_exact_in_the_original_text() -> None:
    """What stands at the place of words folds to these words, and the parts before and after fold by themselves."""
    rng = random.Random(int(print_seed().integers(1 << 30)))
    changed = 0
    for _ in range(600):
        texts = [odd_text(rng, rng.randrange(1, 25)) for _ in range(2)]
        found, number = split(texts), rng.randrange(2)
        text, expected = texts[number], words(texts[number])
        if not expected:
            continue
        first = rng.randrange(len(expected))
        last = rng.randrange(first, len(expected)) + 1
        begin, end = found.place(number, text, first, last)
        if number in found.changed:
            changed += 1
            # One character may become several words, and is not divided.
            assert " ".join(expected[first:last]) in " ".join(words(text[begin:end]))
            assert fold(text[:begin]) + fold(text[begin:end]) + fold(text[end:]) == fold(text)
        else:
            assert words(text[begin:end]) == expected[first:last]
            assert begin == 0 or last - first < len(expected) or words(text[:begin]) == []
    assert changed > 100


def test_runs_are_equal_where_words_are() -> None:
    rng = random.Random(int(print_seed().integers(1 << 30)))
    texts = [[rng.choice("abc") for _ in range(rng.randrange(40))] for _ in range(30)]
    known: dict[tuple[str, ...], int] = {}
    for text in texts:
        hashes = split([" ".join(text)]).hashes
        for length in (1, 3, 5):
            found = runs(hashes, length)
            expected = [tuple(text[i : i + length]) for i in range(len(text) - length + 1)]
            assert len(found) == len(expected)
            assert all(known.setdefault(run, int(value)) == value for run, value in zip(expected, found, strict=True))
        assert len(runs(hashes[:2], 3, whole=True)) == (len(text) > 0)
    assert len(set(known.values())) == len(known)
    assert not len(split([]).hashes)
    assert np.array_equal(split(["", "a", " . "]).bounds, [0, 0, 1, 1])


def test_texts_of_a_row() -> None:
    row = {"messages": [{"role": "system", "content": "no"}, {"role": "user", "content": "yes", "n": [1, True, None]}]}
    assert list(texts_of(row)) == ["yes", "1"]
