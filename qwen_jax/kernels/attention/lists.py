"""Lists of keys that sparse attention visits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import InputError

NOWHERE = 2**30
"""A place that no row sees: it switches a column of `column_attention` off."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("starts_BHNL", "counts_BHN"), meta_fields=("rows", "size")
)
@dataclasses.dataclass(frozen=True)
class KeyLists:
    """For each row, query head and tile of queries, an ascending list of disjoint pieces of the keys.

    Attributes:
      starts_BHNL: int32, the first key of each piece: multiples of 8 on GPUs, of `size` on TPUs. Entries from the count
        of the list on may have any value.
      counts_BHN: int32, pieces of each list. N is the number of tiles, ceil(T / rows).
      rows: queries of a tile: 128 on GPUs; 128, 256 or 512 on TPUs.
      size: keys of a piece: 64 or 128 on GPUs; 128 on TPUs.
    """

    starts_BHNL: jax.Array
    counts_BHN: jax.Array
    rows: int = 128
    size: int = 128

    def check(self, batch: int, length: int, num_heads: int) -> None:
        """Raises `InputError` if these are not lists for queries [batch, length, num_heads, d].

        Traced values are not checked. An entry that is no ascending, disjoint start has an undefined result.
        """
        starts, counts = self.starts_BHNL, self.counts_BHN
        if self.rows < 1 or self.size < 1:
            raise InputError(f"Expected tiles and pieces of at least one token; got {self.rows} and {self.size}.")
        lists = batch, num_heads, -(-length // self.rows)
        if starts.ndim != 4 or starts.shape[:3] != lists or counts.shape != lists or starts.shape[3] < 1:
            raise InputError(
                f"Expected lists of keys with starts {(*lists, 'L')} and counts {lists}, one list for each row, query "
                f"head and tile of {self.rows} queries, L at least 1; got {starts.shape} and {counts.shape}."
            )
        if starts.dtype != jnp.int32 or counts.dtype != jnp.int32:
            raise InputError(f"Expected int32 lists of keys; got {starts.dtype} and {counts.dtype}.")
        if not _known(starts, counts):
            return
        # NumPy, because concrete lists may be checked while a program is being traced.
        self._check_values(np.asarray(starts), np.asarray(counts))

    def _check_values(self, starts: np.ndarray, counts: np.ndarray) -> None:
        if counts.min() < 0 or counts.max() > starts.shape[3]:
            raise InputError(
                f"Expected lists of 0 to {starts.shape[3]} pieces; got counts from {counts.min()} to {counts.max()}."
            )
        counted = np.arange(starts.shape[3]) < counts[..., None]
        if (starts < 0)[counted].any():
            raise InputError(f"Expected pieces that start at a key; got a start of {starts[counted].min()}.")
        crowded = (np.diff(starts, axis=3) < self.size) & counted[..., 1:]
        if crowded.any():
            b, h, n, i = np.argwhere(crowded)[0]
            raise InputError(
                f"Expected ascending, disjoint pieces of {self.size} keys; row {b}, head {h}, tile {n} has pieces at "
                f"{starts[b, h, n, i]} and {starts[b, h, n, i + 1]}."
            )

    def check_multiple(self, multiple: int) -> None:
        """Raises `InputError` if a piece starts at no multiple of this. Traced values are not checked."""
        if not _known(self.starts_BHNL, self.counts_BHN):
            return
        starts, counts = np.asarray(self.starts_BHNL), np.asarray(self.counts_BHN)
        wrong = (starts % multiple != 0) & (np.arange(starts.shape[3]) < counts[..., None])
        if wrong.any():
            raise InputError(
                f"Expected pieces that start at multiples of {multiple} keys; got a start of {starts[wrong][0]}. "
                "Use implementation='reference', or round the starts down."
            )


def _known(*arrays: jax.Array) -> bool:
    """Whether the values are known here and now."""
    return all(not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True) for x in arrays)
