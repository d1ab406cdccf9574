"""Packs documents of tokens, or whole examples, into rows of one length."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from qwen_jax.errors import InputError
from train.data.batch import Batch
from train.data.examples import Example


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


def pack_segments(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """Writes whole examples into rows, each as a segment of its own.

    Args:
      rows: the examples of each row, which must fit into it.
      length: tokens in a row.

    Returns:
      NumPy arrays [rows, length]. Segments are counted from 1, positions from 0 in each; loss weights are 1 on trained
      tokens, and 0 on the first token of a segment, which nothing predicts, and on padding.
    """
    shape = len(rows), length
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    batch = Batch(tokens, positions, segment_ids, np.zeros(shape, np.float32))
    for b, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row, 1):
            end = start + len(example.ids)
            assert end <= length, "an example is longer than the rest of its row"
            batch.tokens[b, start:end] = example.ids
            batch.positions[b, start:end] = np.arange(end - start)
            batch.segment_ids[b, start:end] = number
            batch.loss_weights[b, start + 1 : end] = example.trained[1:]
            start = end
    return batch


def best_fit(lengths: Sequence[int] | np.ndarray, length: int, max_items: int | None = None) -> list[list[int]]:
    """Packs items into rows by best-fit decreasing: the longest first, each into the fullest row that has room.

    The sizes of the rows depend only on the multiset of lengths. It needs at most 11/9 of the fewest rows, and one
    (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms").

    Args:
      lengths: length of each item, from 1 to `length`.
      length: room in a row.
      max_items: most items in a row; None is any number.

    Returns:
      Indices of the items of each row; each item is in one row. Items of the same length come in order.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    rows: list[list[int]] = []
    rooms: list[int] = []  # Distinct rooms of open rows, ascending.
    with_room: dict[int, list[int]] = {}
    for item in order:
        size = int(lengths[item])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(item)
        if max_items is None or len(rows[row]) < max_items:
            left = room - size
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return rows
