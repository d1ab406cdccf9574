"""Documents of tokens to rows of one length."""

from collections.abc import Sequence

import numpy as np

from qwen_jax.errors import InputError
from train.data.batch import Batch


def pack(documents: Sequence[Sequence[int] | np.ndarray], length: int) -> Batch:
    """Lays documents end to end over rows of one length.

    Every token is used exactly once, and only the last row has padding. A document that reaches the end of a row goes
    on in the next one as a segment of its own: the model never sees across a row, so positions start again there.

    Args:
      documents: token ids, with whatever ends a document already appended. Empty documents vanish.
      length: tokens in a row.

    Returns:
      All rows, as NumPy arrays [rows, length]; weights are 1, and 0 on padding.

    Raises:
      InputError: no tokens at all, or a length below 2.
    """
    if length < 2:
        raise InputError(f"Rows must hold at least 2 tokens, got a length of {length}.")
    arrays = [np.asarray(document, np.int32) for document in documents if len(document)]
    if not arrays:
        raise InputError("Expected documents with at least one token, got none.")
    flat = np.concatenate(arrays)
    numbers = np.repeat(np.arange(1, len(arrays) + 1, dtype=np.int32), [len(a) for a in arrays])
    padding = -len(flat) % length
    tokens, document_of = (np.pad(x, (0, padding)).reshape(-1, length) for x in (flat, numbers))

    real = document_of > 0
    # Documents are numbered from 1 in each row.
    segment_ids = np.where(real, document_of - document_of[:, :1] + 1, 0).astype(np.int32)
    i = np.arange(length, dtype=np.int32)
    opens = np.diff(segment_ids, axis=1, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(opens, i, 0), axis=1)
    positions = np.where(real, i - starts, 0).astype(np.int32)
    return Batch(tokens, positions, segment_ids, real.astype(np.float32))
