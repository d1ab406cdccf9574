"""Packs documents of tokens into rows of one length."""

from collections.abc import Sequence

import numpy as np

from qwen_jax.errors import InputError
from train.data.batch import Batch


def pack(documents: Sequence[Sequence[int] | np.ndarray], length: int) -> Batch:
    """Concatenates documents and cuts them into rows of one length.

    Every token is used exactly once, and only the last row has padding. A document that reaches the end of a row
    continues in the next row as a segment of its own, whose positions start at 0: attention does not cross rows.

    Args:
      documents: token ids of each, including an end-of-text id if there is to be one. Empty documents are left out.
      length: tokens in a row.

    Returns:
      All rows, as NumPy arrays [rows, length]; loss weights are 1, and 0 on padding.

    Raises:
      InputError: there is no token, or the length is below 2.
    """
    if length < 2:
        raise InputError(f"Rows must hold at least 2 tokens, got a length of {length}.")
    arrays = [np.asarray(document, np.int32) for document in documents if len(document)]
    if not arrays:
        raise InputError("Expected documents with at least one token, got none.")
    flat = np.concatenate(arrays)
    starts = np.zeros(len(flat), bool)
    starts[np.cumsum([0, *map(len, arrays[:-1])])] = True
    padding = -len(flat) % length
    tokens, begins = (np.pad(x, (0, padding)).reshape(-1, length) for x in (flat, starts))
    num_tokens = np.full(len(tokens), length)
    num_tokens[-1] -= padding
    return rows_to_batch(tokens, begins, num_tokens)


def rows_to_batch(tokens: np.ndarray, starts: np.ndarray, num_tokens: np.ndarray) -> Batch:
    """Makes a batch of packed rows: computes segment ids, positions and loss weights.

    Args:
      tokens: int32 [rows, length], token ids.
      starts: bool [rows, length], true where a document begins. The first token of a row always begins a segment.
      num_tokens: [rows], number of tokens of each row; the rest of the row is padding.

    Returns:
      The rows. Segments are counted from 1, positions from 0; loss weights are 1, and 0 on padding.
    """
    length = tokens.shape[1]
    i = np.arange(length, dtype=np.int32)
    real = i < np.asarray(num_tokens)[:, None]
    opens = starts | (i == 0)
    segment_ids = np.cumsum(opens, axis=1, dtype=np.int32)
    positions = i - np.maximum.accumulate(np.where(opens, i, 0), axis=1)
    if not real.all():
        segment_ids *= real
        positions *= real
    return Batch(tokens, positions.astype(np.int32, copy=False), segment_ids, real.astype(np.float32))
