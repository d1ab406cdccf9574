"""MinHash signatures of texts, cut into bands, so that similar texts share a band (locality-sensitive hashing).

Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", section 3.4. A text is the set of hashes of its runs of words, which `train.data.words.runs` makes.
"""

import dataclasses
import functools

import numpy as np

from qwen_jax.errors import InputError
from train.data.words import mixed

# Runs that are hashed at a time: the array of their hashes stays in the cache of a core.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class MinHash:
    """Bands of MinHash signatures over sets of 64-bit hashes.

    Place i of a signature is the minimum over the set of (a_i h + b_i) mod 2^32 (Carter and Wegman 1979), where h is
    the upper half of a hash, and a_i (odd) and b_i come from the seed.

    Attributes:
      bands: of a signature. FineWeb has 14.
      rows: minima of a band. FineWeb has 8.
      seed: of the hash functions.
    """

    bands: int = 14
    rows: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("bands", "rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def probability(self, similarity: float) -> float:
        """That two texts share a band at least, at this Jaccard similarity of their runs: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - similarity**self.rows) ** self.bands

    def signature(self, hashes: np.ndarray) -> np.ndarray:
        """The minima of a set, uint32 [bands * rows].

        Args:
          hashes: uint64 [n], n at least 1, uniformly distributed; an element may come several times.
        """
        factors, terms = _functions(self.seed, self.bands * self.rows)
        halves = (hashes >> np.uint64(32)).astype(np.uint32)
        least = np.full(len(factors), np.iinfo(np.uint32).max, np.uint32)
        for begin in range(0, len(halves), _BLOCK):
            values = factors[:, None] * halves[None, begin : begin + _BLOCK]
            values += terms[:, None]
            np.minimum(least, values.min(1), out=least)
        return least

    def bands_of(self, hashes: np.ndarray) -> np.ndarray:
        """The bands of a set, uint64 [bands]: hashes of their place and minima, so that no two places have one key.

        Args:
          hashes: as for `signature`.
        """
        minima = self.signature(hashes).reshape(self.bands, self.rows)
        keys = mixed(np.arange(1, self.bands + 1, dtype=np.uint64))
        for row in range(self.rows):
            keys = mixed(keys ^ minima[:, row])
        return keys


@functools.lru_cache(maxsize=8)
def _functions(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors, which are odd, and terms of the hash functions, uint32 [size] each."""
    start = mixed(np.full(1, seed & 0xFFFFFFFFFFFFFFFF, np.uint64))
    drawn = mixed(start + np.arange(1, size + 1, dtype=np.uint64))
    return (drawn >> np.uint64(32)).astype(np.uint32) | np.uint32(1), drawn.astype(np.uint32)
