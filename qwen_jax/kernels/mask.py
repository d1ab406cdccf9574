"""Interval masks: the keys that each query row sees, as two numbers per row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import InputError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k_start_BT", "k_end_BT"),
    meta_fields=("is_causal", "is_disjoint"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """The keys that each query row sees: row i sees the keys k_start[i] <= j < k_end[i].

    Attributes:
      k_start_BT, k_end_BT: int32 [B, T].
      is_causal: known while tracing: every row i sees exactly the keys 0 to i. Permits kernels without interval masks.
      is_disjoint: known while tracing: no two rows of a sequence see the same key. Permits kernels to compute each row
        by itself. It affects only the speed: rows that do see the same keys then read them once for each.
    """

    k_start_BT: jax.Array
    k_end_BT: jax.Array
    is_causal: bool = False
    is_disjoint: bool = False

    def check(self, slots: int) -> None:
        """Raises `InputError` if these are not intervals over `slots` keys. Traced values are not checked.

        Kernels clip what cannot be checked: a start below 0 counts as 0, an end beyond the keys as their end, and a row
        whose start is not below its end sees nothing.
        """
        if self.k_start_BT.dtype != jnp.int32 or self.k_end_BT.dtype != jnp.int32:
            raise InputError(f"Expected int32 mask intervals; got {self.k_start_BT.dtype} and {self.k_end_BT.dtype}.")
        bounds = self.k_start_BT, self.k_end_BT
        if any(isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True) for x in bounds):
            return
        # NumPy, because a concrete mask may be checked while a program is being traced.
        start, end = map(np.asarray, bounds)
        low, high = int(start.min(initial=0)), int(end.max(initial=0))
        if low < 0 or high > slots:
            raise InputError(
                f"Expected mask intervals within the {slots} keys; got a start of {low} and an end of {high}."
            )
        if (start > end).any():
            b, t = np.argwhere(start > end)[0]
            raise InputError(
                f"Expected mask intervals whose start is at most their end; row {b}, query {t} sees keys "
                f"{start[b, t]} to {end[b, t]}."
            )


def causal_mask(batch: int, length: int, window: int | None = None) -> Mask:
    """A mask where row i sees the keys 0 to i, or the last `window` of them.

    Right padding needs no mask of its own: no real row sees it.
    """
    ends = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (batch, length))
    if window is not None:
        return Mask(_window_start(ends, window), ends)
    return Mask(jnp.zeros((batch, length), jnp.int32), ends, is_causal=True)


def cache_mask(start_B: jax.Array, slot: jax.Array, length: int, window: int | None = None) -> Mask:
    """A mask for `length` new tokens per row in cache slots from `slot` on: each sees slots start[b] to its own.

    Args:
      start_B: int32, the first used slot of each row.
      slot: int32 scalar, or [B] if rows have different lengths.
      length: number of new tokens per row; 1 for decoding.
      window: the maximal number of slots that a token sees.
    """
    ends = jnp.broadcast_to(slot, start_B.shape)[:, None] + jnp.arange(1, length + 1, dtype=jnp.int32)
    starts = jnp.broadcast_to(start_B[:, None], ends.shape)
    return Mask(starts if window is None else jnp.maximum(starts, _window_start(ends, window)), ends)


def _window_start(ends: jax.Array, window: int) -> jax.Array:
    if window < 1:
        raise InputError(f"Expected a window of at least one key; got {window}.")
    return jnp.maximum(ends - window, 0)


def packed_mask(segment_ids_BT: jax.Array, window: int | None = None) -> Mask:
    """A mask for packed rows: causal within each document.

    Args:
      segment_ids_BT: int32, equal and contiguous within a document; 0 is padding, and a padding row sees only itself.
      window: the maximal number of keys that a row sees.
    """
    T = segment_ids_BT.shape[1]
    i = jnp.arange(T, dtype=jnp.int32)
    previous = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    opens = (segment_ids_BT != previous) | (segment_ids_BT == 0)
    start = jax.lax.cummax(jnp.where(opens, i, 0), axis=1)
    ends = jnp.broadcast_to(i + 1, segment_ids_BT.shape)
    return Mask(start if window is None else jnp.maximum(start, _window_start(ends, window)), ends)
