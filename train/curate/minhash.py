"""MinHash signatures of texts, cut into bands, so that similar texts share a band (locality-sensitive hashing).

Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", section 3.4.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from qwen_jax.errors import InputError
from train.data.documents import optional_library
from train.data.words import mixed


@dataclasses.dataclass(frozen=True)
class MinHash:
    """Bands of MinHash signatures over the set of runs of words of a text.

    The engine computes the signature: MurmurHash3 (32 bits) of a run, then for each position of the signature the
    minimum of (a h + b mod 2^61 - 1) mod 2^32 with a and b drawn from the seed (Carter and Wegman 1979).
    `band_keys` makes the bands.

    Attributes:
      gram: words of a run. FineWeb has 5.
      bands: of a signature. FineWeb has 14.
      rows: minima of a band. FineWeb has 8.
      seed: of the hash functions.
    """

    gram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("gram", "bands", "rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def probability(self, similarity: float) -> float:
        """That two texts share a band at least, at this Jaccard similarity of their runs: 1 - (1 - s^rows)^bands."""
        return 1 - (1 - similarity**self.rows) ** self.bands

    def signatures(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """The minima of texts.

        Args:
          texts: the words of each, without spaces, at least `gram` of them.

        Returns:
          [texts, bands * rows], uint32.
        """
        daft = optional_library("daft", "near duplicates")
        size = self.bands * self.rows
        if not texts:
            return np.zeros((0, size), np.uint32)
        joined = pa.array([" ".join(words) for words in texts], pa.large_string())
        minima = daft.functions.minhash(daft.col("text"), num_hashes=size, ngram_size=self.gram, seed=self.seed)
        # A query would go through the engine, in which this may already run: the expression is evaluated right here.
        batch = daft.recordbatch.RecordBatch.from_pydict({"text": daft.Series.from_arrow(joined)})
        found = batch.eval_expression_list([minima.alias("minima")]).to_arrow_table().column("minima")
        flat = pa.concat_arrays([chunk.flatten() for chunk in found.chunks])
        return flat.to_numpy(zero_copy_only=False).reshape(len(texts), size)

    def bands_of(self, texts: Sequence[Sequence[str]]) -> list[np.ndarray | None]:
        """The bands of texts, uint64 [bands] each; None for a text with fewer than `gram` words.

        Such a text has no run. It has no near duplicates, only exact ones.
        """
        long = [number for number, words in enumerate(texts) if len(words) >= self.gram]
        minima = self.signatures([texts[number] for number in long]).reshape(-1, self.bands, self.rows)
        keys = band_keys(minima)
        result: list[np.ndarray | None] = [None] * len(texts)
        for number, bands in zip(long, keys, strict=True):
            result[number] = bands
        return result


def band_keys(minima: np.ndarray) -> np.ndarray:
    """A hash of each band of signatures: of its number and its minima, so that bands of two places never are one key.

    Args:
      minima: of signatures, [..., bands, rows], uint32 or uint64.

    Returns:
      [..., bands], uint64.
    """
    *_, bands, rows = minima.shape
    keys = np.broadcast_to(mixed(np.arange(1, bands + 1, dtype=np.uint64)), minima.shape[:-1])
    for row in range(rows):
        keys = mixed(keys ^ minima[..., row])
    return keys
