"""Packs whole texts into rows, as segments that do not see one another."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.inference.buckets import smallest
from qwen_jax.inference.runner_programs import MAX_SEGMENTS


@dataclasses.dataclass(frozen=True)
class TextRow:
    """Texts in one row.

    Attributes:
      texts: their indices.
      packed: int32 [3, T]: ids, positions, number of each token's text from 1 on; 0 is padding.
      last: int32 [MAX_SEGMENTS], where the last token of each text is.
    """

    texts: list[int]
    packed: np.ndarray
    last: np.ndarray


def pack_texts(texts: Sequence[Sequence[int]], sizes: Sequence[int], tokens: int, most: int) -> Iterator[TextRow]:
    """Rows of texts, the longest first.

    Args:
      texts: ids, at least one in each.
      sizes: lengths that a row may have, in ascending order.
      tokens: a row with several texts has at most so many.
      most: texts in a row, at most `MAX_SEGMENTS`.

    Raises:
      InputError: a text without tokens, or longer than the longest row.
    """
    for i, text in enumerate(texts):
        if not 0 < len(text) <= sizes[-1]:
            raise InputError(f"Text {i} has {len(text)} tokens; expected 1 to {sizes[-1]}.")
    waiting, row, used = sorted(range(len(texts)), key=lambda i: -len(texts[i])), list[int](), 0
    for i in waiting:
        n = len(texts[i])
        if row and (used + n > min(tokens, sizes[-1]) or len(row) == most):
            yield _packed(texts, row, smallest(sizes, used, "tokens"))
            row, used = [], 0
        row.append(i)
        used += n
    if row:
        yield _packed(texts, row, smallest(sizes, used, "tokens"))


def _packed(texts: Sequence[Sequence[int]], row: list[int], length: int) -> TextRow:
    packed, last, at = np.zeros((3, length), np.int32), np.zeros(MAX_SEGMENTS, np.int32), 0
    for number, i in enumerate(row):
        n = len(texts[i])
        packed[:, at : at + n] = texts[i], np.arange(n), np.full(n, number + 1)
        at += n
        last[number] = at - 1
    return TextRow(row, packed, last)


def in_groups(texts: Sequence[list[int]], most: int) -> list[list[list[int]]]:
    """Texts in groups of at most so many tokens, in order; a longer text is a group of its own."""
    groups: list[list[list[int]]] = []
    room = 0
    for text in texts:
        if len(text) > room:
            groups.append([])
            room = most
        groups[-1].append(text)
        room -= len(text)
    return groups
