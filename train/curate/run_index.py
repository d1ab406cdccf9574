"""An index of runs of words: which sequences have a run, and where."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.words import runs

# Bits of the filter for each run: so few others pass.
_FILTER_BITS = 32
# Runs that are looked up at a time: their arrays stay in the cache of a core.
_BLOCK = 1 << 15
_ARRAYS = ("words", "bounds", "keys", "places", "filter")


@dataclasses.dataclass(frozen=True)
class RunIndex:
    """The runs of one length of many sequences of words.

    Memory is 4 bytes for each word, and 16 to 20 for each run: 12 in the sorted arrays and 4 to 8 in a filter of bits,
    which nearly all runs of unrelated texts do not pass.

    Attributes:
      length: words of a run.
      words: upper halves of the hashes of all words, uint32 [words].
      bounds: first word of each sequence, and the number of all words, int64 [sequences + 1].
      keys: hashes of the runs, sorted, uint64 [runs].
      places: first word of each run, uint32 [runs].
      filter: a bit for each value of the upper bits of a key, uint8.
    """

    length: int
    words: np.ndarray
    bounds: np.ndarray
    keys: np.ndarray
    places: np.ndarray
    filter: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Memory of all arrays."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    def sequence(self, number: int) -> np.ndarray:
        """The words of a sequence, uint32."""
        return self.words[self.bounds[number] : self.bounds[number + 1]]

    def lookup(
        self, hashes: np.ndarray, most: int | None = None, bounds: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs of texts that sequences have.

        Args:
          hashes: of their words, uint64, one text after the other.
          most: times that a run counts in each 32,768 words of a text, so that a table of zeros does not fill the
            memory; None counts all.
          bounds: first word of each text, and the number of all words; None for one text.

        Returns:
          First words of runs in the texts and in all words of the sequences, int64, one pair for each two equal runs.
        """
        if not len(self.keys):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        shift = np.uint64(64 - (len(self.filter) * 8).bit_length() + 1)
        found, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for begin in range(0, len(hashes) - self.length + 1, _BLOCK):
            block = runs(hashes[begin : begin + _BLOCK + self.length - 1], self.length)
            at = block >> shift
            bits = self.filter[at >> np.uint64(3)] >> (at & np.uint64(7)).astype(np.uint8)
            passed = np.flatnonzero(bits & np.uint8(1))
            found.append(passed + begin)
            keys.append(block[passed])
        where, passed_keys = np.concatenate(found), np.concatenate(keys)
        if most is not None and len(where) > most:
            # Each text by itself: what is found in one must not depend on those before it.
            edges = np.array([0, len(hashes)]) if bounds is None else np.asarray(bounds)
            text = np.searchsorted(edges, where, "right") - 1
            kept = _ranks(passed_keys, text, (where - edges[text]) // _BLOCK) < most
            where, passed_keys = where[kept], passed_keys[kept]
        first = np.searchsorted(self.keys, passed_keys, "left")
        known = self.keys[np.minimum(first, len(self.keys) - 1)] == passed_keys
        where, first, passed_keys = where[known], first[known], passed_keys[known]
        counts = np.searchsorted(self.keys, passed_keys, "right") - first
        total = int(counts.sum())
        within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(where, counts), self.places[np.repeat(first, counts) + within].astype(np.int64)

    def save(self, folder: Path) -> None:
        """Writes the arrays to a folder, for `load`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        np.save(folder / "length.npy", np.asarray(self.length), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "RunIndex":
        """Maps the arrays into memory, which all processes of a machine then share."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return cls(int(np.load(folder / "length.npy", allow_pickle=False)), **arrays)


def _ranks(*keys: np.ndarray) -> np.ndarray:
    """How many equal keys come before each."""
    order = np.lexsort(keys)
    new = [ordered[1:] != ordered[:-1] for ordered in (key[order] for key in keys)]
    edges = np.flatnonzero(np.append(True, np.logical_or.reduce(new)))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(edges, np.diff(np.append(edges, len(order))))
    return ranks


def make_index(sequences: Sequence[np.ndarray], length: int, frequent: int | None = None) -> RunIndex:
    """Indexes the runs of sequences.

    Args:
      sequences: hashes of words, uint64; none may be longer than 2^32 words together.
      length: words of a run.
      frequent: a run that more places than this have is left out, but of each sequence the rarer half of its runs
        stays; None keeps all.
    """
    empty = np.zeros(0, np.uint64)
    bounds = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    hashes = np.concatenate([empty, *sequences])
    counts = np.maximum(np.diff(bounds) - length + 1, 0)
    owners = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
    starts = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = (starts + bounds[owners]).astype(np.uint32)
    keys = runs(hashes, length)[places] if len(places) else empty
    order = np.argsort(keys, kind="stable")
    keys, places, owners = keys[order], places[order], owners[order]
    del order, starts
    if frequent is not None and len(keys):
        edges = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        times = np.diff(np.append(edges, len(keys))).astype(np.uint32)
        times = np.repeat(times, times)
        # Rank of each run among those of its sequence, the rarest first.
        by_owner = np.lexsort((places, times, owners))
        rank = np.empty(len(keys), np.uint32)
        rank[by_owner] = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = (times <= frequent) | (2 * rank < counts[owners])
        del by_owner, rank, times
        keys, places = keys[kept], places[kept]
    bits = max((_FILTER_BITS * len(keys)).bit_length(), 10) - 1
    filled = np.zeros(1 << bits, np.bool_)
    filled[keys >> np.uint64(64 - bits)] = True
    words = (hashes >> np.uint64(32)).astype(np.uint32)
    return RunIndex(length, words, bounds, keys, places, np.packbits(filled, bitorder="little"))
