"""Features of duplicates: normal forms keep what matters and nothing else, and bands match as theory says."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.curate.minhash import MinHash
from train.curate.operators.fingerprint import Fingerprint, Shingles, normalise_text
from train.curate.urls import normalise_url
from train.data.words import mixed, runs, split


def features(texts: list[str], urls: list[str | None] | None = None, **settings: int) -> list[dict[str, object]]:
    table = pa.table(
        {"text": pa.array(texts, pa.large_string()), "url": pa.array(urls or [None] * len(texts), pa.string())}
    )
    operator = Fingerprint(**settings)
    made = operator.start()(table)
    assert made.schema == operator.makes
    return made.to_pylist()


def similar_pairs(rng: np.random.Generator, count: int, runs: int, shared: int) -> tuple[list[str], list[str]]:
    """Pairs of texts with `runs` runs of 5 words each, of which `shared` are the same and all others different."""
    left, right = [], []
    for number in range(count):
        base = [f"w{number}x{word}" for word in rng.integers(0, 2**60, shared + 4).tolist()]
        for texts, letter in ((left, "a"), (right, "b")):
            own = [f"{letter}{word}" for word in rng.integers(0, 2**60, runs - shared).tolist()]
            texts.append(" ".join(base + own))
    return left, right


def sets(texts: list[str], gram: int = 5) -> list[np.ndarray]:
    """The hashes of the runs of words of each text."""
    return [runs(split([text]).hashes, gram) for text in texts]


@pytest.mark.parametrize(("bands", "rows"), [(14, 8), (20, 5)])
def test_pairs_share_a_band_as_theory_says(bands: int, rows: int) -> None:
    """1 - (1 - s^r)^b of the pairs with Jaccard similarity s share a band: within the binomial interval of 1 in 10^6.
    Signatures agree in s of their places, and no more variably than independent hashes."""
    rng, minhash, pairs, runs = print_seed(), MinHash(bands, rows), 400, 60
    for similarity in (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        shared = round(2 * runs * similarity / (1 + similarity))
        exact = shared / (2 * runs - shared)
        left, right = similar_pairs(rng, pairs, runs, shared)
        one, other = ([row["bands"] for row in features(texts, bands=bands, rows=rows)] for texts in (left, right))
        found = int((np.array(one) == np.array(other)).any(1).sum())
        low, high = binom.interval(1 - 1e-6, pairs, minhash.probability(exact))
        assert low <= found <= high, f"{found} of {pairs} pairs with similarity {exact:.3f}, expected {low} to {high}"
        first, second = (np.stack([minhash.signature(hashes) for hashes in sets(texts)]) for texts in (left, right))
        agree = (first == second).mean(1)
        size = bands * rows
        assert abs(agree.mean() - exact) < 6 * np.sqrt(exact * (1 - exact) / size / pairs)
        # The variance of a sample of 400 has a standard deviation of about 7%.
        assert agree.var() < 1.5 * exact * (1 - exact) / size


def test_the_signature_is_the_minimum_of_each_function_over_the_set() -> None:
    """A union has the smaller of two minima, also of sets that are longer than a block; order and copies do not
    count, and other seeds have other functions."""
    rng, minhash = print_seed(), MinHash(4, 8)
    one, other = (mixed(rng.integers(0, 2**63, size, np.uint64)) for size in (3000, 700))
    least = minhash.signature(one)
    both = np.minimum(least, minhash.signature(other))
    np.testing.assert_array_equal(minhash.signature(np.concatenate([one, other])), both)
    np.testing.assert_array_equal(minhash.signature(rng.permutation(np.concatenate([one, one]))), least)
    np.testing.assert_array_equal(least, np.min([minhash.signature(hash) for hash in one[:, None]], 0))
    # Of 32 minima of 3,000 random numbers below 2^32, some agree with a probability of 2 in 10^5.
    assert (MinHash(4, 8, seed=2).signature(one) == least).mean() < 0.5


def test_signatures_have_not_changed() -> None:
    """Columns of earlier runs stay comparable; if this must change, the operator's version is to be raised."""
    (row,) = features(["The quick brown fox, jumps over the lazy dog."])
    assert row["bands"][:3] == [6687082122310112299, 15271934287794375494, 12254249818971538522]  # type: ignore[index]


def test_empty_and_short_texts_have_nothing_in_common() -> None:
    """Texts without visible characters have no key, and texts with fewer words than a run have no band: they form no
    group. A short text still has the key of its text."""
    made = features(["", " \n\t\u00a0", "one two three four", "one two three four five", "?!"])
    assert [row["text_key"] is None for row in made] == [True, True, False, False, False]
    assert [row["bands"] is None for row in made] == [True, True, True, False, True]
    assert [row["text_length"] for row in made] == [0, 4, 18, 23, 2]
    assert features([]) == []


def test_features_are_of_the_document_alone() -> None:
    """The same bytes in every batch; words that differ by case, punctuation and space have the same bands, and only
    the same text in normal form has the same key."""
    rng = print_seed()
    texts = [" ".join(f"Wörd{word}," for word in rng.integers(0, 50, rng.integers(1, 40))) for _ in range(30)]
    urls = [None if rng.random() < 0.5 else f"https://a.org/{number}" for number in range(30)]
    made = features(texts, urls)
    assert made == [features([text], [url])[0] for text, url in zip(texts, urls, strict=True)]
    other = features([unicodedata.normalize("NFD", text).replace(" ", "\n ") for text in texts])
    assert [row["text_key"] for row in other] == [row["text_key"] for row in made]
    other = features([text.upper().replace(",", " -") for text in texts])
    assert [row["bands"] for row in other] == [row["bands"] for row in made]
    assert all(a["text_key"] != b["text_key"] for a, b in zip(other, made, strict=True))


def test_shingles_are_the_set_of_runs() -> None:
    """Sorted, different, and as many as there are different runs of words."""
    words = [str(word) for word in print_seed().integers(0, 4, 400)]
    text = " ".join(words)
    (found,) = Shingles(3).start()(pa.table({"text": pa.array([text], pa.large_string())})).to_pylist()
    assert found["shingles"] == sorted(set(found["shingles"]))
    assert len(found["shingles"]) == len({tuple(words[at : at + 3]) for at in range(398)})


def test_normal_text_is_its_own_normal_form() -> None:
    """Also of accents and Korean letters in parts, and of spaces of all kinds."""
    rng, characters = print_seed(), list("ab A\u0301é \t\n\u00a0\u2003가\u1100\u1161.")
    for _ in range(200):
        text = "".join(rng.choice(characters, 12))
        normal = normalise_text(text)
        assert normal is None or normalise_text(normal) == normal


SAME = [
    ("http://example.org/a", "https://example.org/a"),
    ("https://example.org:443/a", "https://example.org/a"),
    ("http://example.org:80", "http://example.org/"),
    ("https://Example.ORG/a/", "https://example.org/a"),
    ("https://example.org./a#part", "https://example.org/a"),
    ("https://user:secret@example.org/a", "https://example.org/a"),
    ("https://example.org/a?utm_source=x&b=1&fbclid=2", "https://example.org/a?b=1"),
    ("https://example.org/a?", "https://example.org/a"),
    ("https://example.org/a?b=1&&c=2", "https://example.org/a?b=1&c=2"),
    ("https://example.org/%7ea%2f", "https://example.org/~a%2F"),
    ("https://example.org/x/../a/./b", "https://example.org/a/b"),
    ("https://example.org/ü b", "https://example.org/%C3%BC%20b"),
    ("https://bücher.example/a", "https://xn--bcher-kva.example/a"),
    (" https://example.org/a\n", "https://example.org/a"),
]
DIFFERENT = [
    ("https://example.org/a", "https://example.org/A"),
    ("https://example.org/a", "https://example.org/a/b"),
    ("https://example.org/a", "https://www.example.org/a"),
    ("https://example.org/a", "https://example.org:8080/a"),
    ("https://example.org/a?b=1", "https://example.org/a?b=2"),
    ("https://example.org/a?b=1&c=2", "https://example.org/a?c=2&b=1"),
    ("https://example.org/a%2Fb", "https://example.org/a/b"),
    ("ftp://example.org/a", "https://example.org/a"),
]


def test_addresses_of_a_page_have_one_normal_form() -> None:
    """What does not change the page does not change the form; what may change it does. The form is its own form."""
    for one, other in SAME:
        assert normalise_url(one) == normalise_url(other), one
    for one, other in DIFFERENT:
        assert normalise_url(one) != normalise_url(other), one
    for url in [*sum(SAME + DIFFERENT, ()), "http://[::1", "http://a:b/", "mailto:a@b", "a b", "http://[::1]:80/a"]:
        normal = normalise_url(url)
        assert normal is not None
        assert normalise_url(normal) == normal
    assert normalise_url(" \n") is None


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(InputError, match="gram must be at least 1, got 0"):
        Fingerprint(gram=0)
    with pytest.raises(InputError, match="gram must be at least 1, got 0"):
        Shingles(gram=0)
    with pytest.raises(InputError, match="bands must be at least 1, got 0"):
        Fingerprint(bands=0)
