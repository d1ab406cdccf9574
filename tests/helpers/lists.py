"""Random lists of keys and columns for sparse attention, and attention over any mask in float64."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_jax.kernels import KeyLists


def random_lists(
    numbers: np.random.Generator, B: int, H: int, T: int, S: int, *, rows: int = 128, size: int = 128, step: int = 8
) -> tuple[KeyLists, np.ndarray]:
    """Lists of random density; some are empty, some reach beyond the keys. Entries that do not count are random.

    Returns:
      The lists, and what they cover as a bool array [B, H, T, S].
    """
    N = -(-T // rows)
    capacity = S // size + 2
    starts = numbers.integers(-(2**30), 2**30, (B, H, N, capacity))
    counts = np.zeros((B, H, N), np.int64)
    covered = np.zeros((B, H, N, S), bool)
    for where in np.ndindex(B, H, N):
        gap = int(numbers.choice([1, 2, 4, max(S // step, 1)]))
        at = step * int(numbers.integers(0, gap))
        most = int(numbers.integers(0, capacity + 1)) if numbers.integers(4) == 0 else capacity
        while at < S + size and counts[where] < most:
            starts[where][counts[where]] = at
            counts[where] += 1
            covered[where][at : at + size] = True
            at += size + step * int(numbers.integers(0, gap))
    lists = KeyLists(jnp.asarray(starts, jnp.int32), jnp.asarray(counts, jnp.int32), rows, size)
    return lists, np.repeat(covered, rows, axis=2)[:, :, :T]


def full_lists(B: int, H: int, T: int, S: int, *, rows: int = 128, size: int = 128) -> KeyLists:
    """Lists of all keys."""
    N, L = -(-T // rows), -(-S // size)
    starts = jnp.broadcast_to(size * jnp.arange(L, dtype=jnp.int32), (B, H, N, L))
    return KeyLists(starts, jnp.full((B, H, N), L, jnp.int32), rows, size)


def random_places(numbers: np.random.Generator, B: int, H: int, T: int, C: int, S: int, rows: int = 128) -> np.ndarray:
    """Places of columns: ascending, some switched off, for some tiles all of them."""
    N = -(-T // rows)
    places = np.sort(numbers.integers(0, S, (B, H, N, C)), axis=3)
    off = numbers.random((B, H, N, C)) < numbers.choice([0.0, 0.3, 1.0], (B, H, N, 1))
    return np.where(off, 2**30, places).astype(np.int32)


def seen_columns(places: np.ndarray, start: Any, end: Any, rows: int = 128) -> np.ndarray:
    """What each row sees of columns at places, as a bool array [B, H, T, C]."""
    at = np.repeat(places, rows, axis=2)[:, :, : np.shape(start)[1]]
    return (np.asarray(start)[:, None, :, None] <= at) & (at < np.asarray(end)[:, None, :, None])


def seen_interval(start: Any, end: Any, S: int) -> np.ndarray:
    """What an interval mask lets each row see, as a bool array [B, 1, T, S]."""
    j = np.arange(S)
    return ((np.asarray(start)[..., None] <= j) & (j < np.asarray(end)[..., None]))[:, None]


def exact_attention(q: Any, k: Any, v: Any, seen: np.ndarray, scale: float, bias: float = 0.0) -> tuple[Any, Any]:
    """Output [B, T, H, d] and log-sum-exp [B, H, T] in float64.

    Args:
      q: [B, T, H, d].
      k, v: [B, K, S, d].
      seen: bool [B, H, T, S].
      scale: of the logits.
      bias: is added to the logits.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q.swapaxes(1, 2), k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = np.where(seen, q @ k.swapaxes(2, 3) * scale + bias, -math.inf)
    top = np.where(seen.any(-1, keepdims=True), logits.max(-1, keepdims=True), 0)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return (weights / np.where(total == 0, 1, total) @ v).swapaxes(1, 2), lse
