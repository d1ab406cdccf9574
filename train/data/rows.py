"""Reads rows of a built data set from the disk, in any order."""

import functools
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from qwen_jax.errors import InputError
from train.data.batch import Batch
from train.data.packing import rows_to_batch
from train.data.shards import check_files, load_manifest, starts_width


class PackedRows:
    """The rows of a data set. Its files are memory-mapped and use no memory of the process.

    Attributes:
      folder: folder of the data set.
      manifest: its manifest.
      length: tokens in a row.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = False):
        """Opens a data set and compares the size of every shard with the manifest.

        Args:
          folder: folder of the data set, from `qwen-jax data build`.
          verify: also compare the sha256 of every shard, which reads all shards.

        Raises:
          InputError: the data set is not finished, or a shard is missing, truncated or (with `verify`) changed.
        """
        self.folder = Path(folder).absolute()
        self.manifest = load_manifest(self.folder)
        self.length = self.manifest.length
        check_files(self.folder, self.manifest.shards, self.length, contents=verify)
        self._paths = [str(self.folder / shard.name) for shard in self.manifest.shards]
        self._ends = list(accumulate(shard.rows for shard in self.manifest.shards))

    def __len__(self) -> int:
        """Number of rows in all shards."""
        return self.manifest.rows

    def read(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads rows.

        Args:
          indices: indices of n rows, each in [0, len).

        Returns:
          The arguments of `rows_to_batch`: tokens int32 [n, length], starts of documents bool [n, length], and the
          number of tokens of each row [n].

        Raises:
          InputError: a token id is not in the vocabulary, because the shard is damaged.
        """
        n = len(indices)
        tokens = np.empty((n, self.length), "<u4")
        starts = np.empty((n, starts_width(self.length)), np.uint8)
        num_tokens = np.empty(n, np.int64)
        for i, index in enumerate(np.asarray(indices, np.int64).tolist()):
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            which = bisect_right(self._ends, index)
            shard = self.manifest.shards[which]
            row = index - (self._ends[which] - shard.rows)
            path = self._paths[which]
            mapped_tokens, mapped_starts = _map(path, shard.rows, self.length, shard.tokens_sha256)
            tokens[i], starts[i] = mapped_tokens[row], mapped_starts[row]
            num_tokens[i] = min(self.length, shard.tokens - row * self.length)
            if tokens[i].max() >= self.manifest.vocab_size:
                raise InputError(
                    f"{path}.tokens is damaged: row {row} has the token id {tokens[i].max()}, and the tokenizer has "
                    f"{self.manifest.vocab_size} ids. Copy it again from an intact data set, and resume; "
                    "verify_data=true looks for other damage."
                )
        bits = np.unpackbits(starts, axis=1, count=self.length, bitorder="little").view(bool)
        return tokens.view("<i4").astype(np.int32, copy=False), bits, num_tokens

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Reads rows as a batch of NumPy arrays [n, length]; they equal those of `pack` for the same documents.

        Args:
          indices: indices of n rows, each in [0, len).
        """
        return rows_to_batch(*self.read(indices))


# Each mapping needs two file descriptors, and a process may often have no more than 1024.
@functools.lru_cache(maxsize=192)
def _map(shard: str, rows: int, length: int, sha256: str) -> tuple[np.ndarray, np.ndarray]:
    """Maps a shard into memory. The hash distinguishes shards of the same name in the cache."""
    try:
        return (
            np.asarray(np.memmap(f"{shard}.tokens", "<u4", "r", shape=(rows, length))),
            np.asarray(np.memmap(f"{shard}.starts", np.uint8, "r", shape=(rows, starts_width(length)))),
        )
    except (OSError, ValueError) as error:  # ValueError where the file is too short.
        raise InputError(
            f"Cannot read {shard}, which was intact when the data set was opened: {error}. "
            "Restore it from an intact copy, and resume."
        ) from None
