"""Batches of rows in memory, in a seeded order; a data set for small runs and for evaluation."""

import hashlib

import grain
import jax
import numpy as np

from qwen_jax.errors import InputError
from train.data.batch import Batch


def batches(rows: Batch, batch_size: int, seed: int) -> "grain.MapDataset[Batch]":
    """An endless map from step to batch: `batches(...)[step]` is a pure function of (seed, step).

    In each epoch every row comes once, in a new order.

    Args:
      rows: NumPy arrays [rows, length], as from `pack`.
      batch_size: rows in a batch.
      seed: seed of the order.

    Raises:
      InputError: there are fewer rows than a batch needs.
    """
    num_rows, length = rows.shape
    if not 1 <= batch_size <= num_rows:
        raise InputError(
            f"A batch takes {batch_size} rows of {length} tokens, and the text fills {num_rows}. "
            "Give more text, or use a smaller batch or length."
        )
    order = grain.MapDataset.range(num_rows).shuffle(seed=seed).repeat().batch(batch_size)

    def take(indices: np.ndarray) -> Batch:
        batch: Batch = jax.tree.map(lambda array: array[indices], rows)
        return batch

    return order.map(take)


def whole_batches(rows: Batch, batch_size: int) -> list[Batch]:
    """All rows in order, for evaluation; the last batch is padded with empty rows.

    Args:
      rows: NumPy arrays [rows, length].
      batch_size: rows in a batch.
    """
    missing = -rows.shape[0] % batch_size
    padded = jax.tree.map(lambda array: np.pad(array, ((0, missing), (0, 0))), rows)
    starts = range(0, rows.shape[0], batch_size)
    return [jax.tree.map(lambda array, i=i: array[i : i + batch_size], padded) for i in starts]


def fingerprint(rows: Batch) -> str:
    """A sha256 (hex) of the rows, to be compared on resume."""
    digest = hashlib.sha256(repr(rows.shape).encode())
    for array in jax.tree.leaves(rows):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
