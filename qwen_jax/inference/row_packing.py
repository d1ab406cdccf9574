"""Packs texts of many lengths into few shapes of rows."""

import bisect
from collections.abc import Iterator, Sequence

# The shortest rows. Longer ones are twice as long, and so on: few shapes are compiled.
_SHORTEST = 128


class RowPacker:
    """Batches of rows of equal length, the longest texts first.

    Iterating takes texts away: each batch is a list of rows, each a list of the indices of its texts, and the length of
    the rows, a power of two. Some of the last rows may be empty: the number of rows is that of the shards times a power
    of two, or as many as fit.
    """

    def __init__(self, sizes: Sequence[int], *, shards: int, tokens: int, row: int = 0, alone: bool = False):
        """
        Args:
          sizes: tokens of each text, at least 1.
          shards: of the rows of a batch.
          tokens: of all rows of a batch; a longer text is a batch of its own.
          row: rows are so long, a power of two, if there is enough text for them; 0: as long as their longest text
            needs.
          alone: each row has one text.
        """
        self._shards, self._tokens, self._row, self._alone = shards, tokens, row, alone
        # The shortest first. Of equal texts the first is taken first.
        self._waiting = sorted(range(len(sizes)), key=lambda i: (sizes[i], -i))
        self._sizes = [sizes[i] for i in self._waiting]
        self._left = sum(self._sizes)

    def __iter__(self) -> Iterator[tuple[list[list[int]], int]]:
        while self._waiting:
            yield self._next_batch()

    def _next_batch(self) -> tuple[list[list[int]], int]:
        wanted = max(self._sizes[-1], min(self._row, -(-self._left // self._shards)))
        length = power_of_two(wanted, _SHORTEST)
        most = max(self._tokens // length // self._shards, 1) * self._shards
        rows: list[list[int]] = []
        while self._waiting and len(rows) < most:
            rows.append(self._fill(length))
        count = self._shards
        while count < len(rows):
            count = min(2 * count, most)
        return rows + [[]] * (count - len(rows)), length

    def _fill(self, room: int) -> list[int]:
        """A row: always the longest text that still fits."""
        row: list[int] = []
        while at := bisect.bisect_right(self._sizes, room):
            size = self._sizes.pop(at - 1)
            row.append(self._waiting.pop(at - 1))
            room -= size
            self._left -= size
            if self._alone:
                break
        return row


def power_of_two(least: int, first: int = 1) -> int:
    """The smallest of first, 2 first, 4 first, ... that is at least `least`."""
    while first < least:
        first *= 2
    return first
