"""Features by which duplicates are found: hashes of the text, of the address, and of the runs of words."""

import dataclasses
import hashlib
import itertools
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from qwen_jax.errors import InputError
from train.curate.minhash import MinHash
from train.curate.operator import Compute, Operator
from train.curate.urls import normalise_url
from train.data.words import runs, split


@dataclasses.dataclass(frozen=True)
class Fingerprint(Operator):
    """Narrow features of a document, from which `find_duplicates` works.

    text_length: characters, int64. text_key: 64-bit hash of the text in normal form (`normalise_text`), null if it has
    no visible character. url_key: of the address in normal form (`normalise_url`), null without one. bands: MinHash
    bands of the words, null if the text has fewer words than a run. Null is never equal to null: empty documents are
    no duplicates of each other.

    Among n different texts, some two have the same key with a probability of n^2 / 2^65: 3% for n = 10^9.

    Attributes:
      gram: words of a run. FineWeb has 5.
      bands, rows, seed: of `MinHash`.
    """

    gram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1

    version = 2
    reads = ("text", "url")
    makes = pa.schema(
        [
            pa.field("text_length", pa.int64()),
            pa.field("text_key", pa.uint64()),
            pa.field("url_key", pa.uint64()),
            pa.field("bands", pa.list_(pa.uint64())),
        ]
    )

    def __post_init__(self) -> None:
        _check_gram(self.gram)
        self._minhash()

    def _minhash(self) -> MinHash:
        return MinHash(self.bands, self.rows, self.seed)

    def start(self) -> Compute:
        minhash = self._minhash()

        def compute(table: pa.Table) -> pa.Table:
            texts: list[str] = table.column("text").to_pylist()
            urls = table.column("url").to_pylist()
            columns = {
                "text_length": [len(text) for text in texts],
                "text_key": [_key(normalise_text(text), b"text") for text in texts],
                "url_key": [None if url is None else _key(normalise_url(url), b"url") for url in urls],
                "bands": [minhash.bands_of(found) if len(found) else None for found in _runs(texts, self.gram)],
            }
            return pa.table(columns, schema=self.makes)

        return compute


@dataclasses.dataclass(frozen=True)
class Shingles(Operator):
    """The set of the runs of words of a document, so that the similarity of a pair can be computed.

    Only `find_duplicates` with a `similarity` needs it. It takes 4 bytes for each word of a text.

    Attributes:
      gram: words of a run; as in `Fingerprint`.
    """

    gram: int = 5

    version = 2
    reads = ("text",)
    makes = pa.schema([pa.field("shingles", pa.list_(pa.uint32()))])

    def __post_init__(self) -> None:
        _check_gram(self.gram)

    def start(self) -> Compute:
        def compute(table: pa.Table) -> pa.Table:
            texts: list[str] = table.column("text").to_pylist()
            halves = [(found >> np.uint64(32)).astype(np.uint32) for found in _runs(texts, self.gram)]
            return pa.table({"shingles": [np.unique(found) for found in halves]}, schema=self.makes)

        return compute


def normalise_text(text: str) -> str | None:
    """The text in NFC, with single spaces between its words; None if it has no visible character.

    Two texts with the same normal form look the same to a reader, but for the width of spaces and line breaks. Case
    and punctuation count.
    """
    return unicodedata.normalize("NFC", " ".join(text.split())) or None


def _runs(texts: Sequence[str], gram: int) -> Iterator[np.ndarray]:
    """The hashes of the runs of words of each text, uint64; none if it has fewer than `gram` words."""
    found = split(texts)
    for begin, end in itertools.pairwise(found.bounds):
        yield runs(found.hashes[begin:end], gram)


def _check_gram(gram: int) -> None:
    if gram < 1:
        raise InputError(f"gram must be at least 1, got {gram}.")


def _key(text: str | None, kind: bytes) -> int | None:
    """A 64-bit hash; texts and addresses do not share their values. Null for None."""
    if text is None:
        return None
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=kind).digest(), "little")
