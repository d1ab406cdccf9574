"""What the next step needs of each running sequence, in arrays by slot: a step is packed by gathers, not by loops."""

from collections.abc import Sequence

import numpy as np

from qwen_jax.inference.row_sampling import STEP, SampleRow, Variant, pack, variant_with


class Slots:
    """Arrays with a row for each slot, and one more, at index `max_seqs`, for rows that are padding.

    A row is written when its sequence begins to be decoded. From then on only its pages change.
    """

    def __init__(self, max_seqs: int, pages: int, page_size: int) -> None:
        """
        Args:
          max_seqs: slots of sequences.
          pages: the most pages of a sequence.
          page_size: tokens in a page.
        """
        self._dummy, self._page_size = max_seqs, page_size
        self._fields_SF = np.repeat(pack([None], 1, max_seqs), max_seqs + 1, axis=0)
        self._needs_S = np.zeros(max_seqs + 1, np.int32)
        self._adapter_S = np.zeros(max_seqs + 1, np.int32)
        self._table_SM = np.zeros((max_seqs + 1, pages), np.int32)
        self._pages_S = np.zeros(max_seqs + 1, np.int32)

    def place(self, row: SampleRow, pages: Sequence[int], adapter: int = 0) -> None:
        """Writes the row of a slot.

        Args:
          row: how the tokens of its sequence are sampled; `step` does not count.
          pages: of the sequence.
          adapter: number of its adapter; 0 is none.

        Raises:
          ValueError: penalties without rules.
        """
        self._fields_SF[row.slot] = pack([row], 1, self._dummy)[0]
        self._needs_S[row.slot] = row.needs
        self._adapter_S[row.slot] = adapter
        self._pages_S[row.slot] = 0
        self._extend(row.slot, pages)

    def _extend(self, slot: int, pages: Sequence[int]) -> None:
        """Writes those of a sequence's pages that are new."""
        known = int(self._pages_S[slot])
        set_table(self._table_SM[slot, known:], pages[known:])
        self._pages_S[slot] = len(pages)

    def pack_rows(
        self, packed_BN: np.ndarray, slots: Sequence[int], lengths: Sequence[int], pages: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Writes the rows of a decode step, and returns the number of each row's adapter, int32.

        Args:
          packed_BN: int32, what the program takes for these rows: page table, slot, tokens in the cache, new tokens.
          slots: of sequences that were placed.
          lengths: tokens of each that are in the cache.
          pages: of each: those that were placed, and perhaps more.

        Raises:
          ValueError: a sequence without room in its pages for one more token.
        """
        slot_B, count_B = np.array(slots, np.int32), np.array([len(one) for one in pages], np.int32)
        for i in np.flatnonzero(count_B != self._pages_S[slot_B]).tolist():
            self._extend(slots[i], pages[i])
        packed_BN[:, -3], packed_BN[:, -2], packed_BN[:, -1] = slot_B, lengths, 1
        short = np.flatnonzero(count_B * self._page_size <= packed_BN[:, -2])
        if len(short):
            raise no_room(count_B[short[0]], self._page_size, packed_BN[short[0], -2] + 1)
        packed_BN[:, :-3] = self._table_SM[:, : packed_BN.shape[1] - 3][slot_B]
        adapter_B: np.ndarray = self._adapter_S[slot_B]
        return adapter_B

    def pack_sampling(
        self, slots: Sequence[int | None], steps: Sequence[int], padded: int
    ) -> tuple[np.ndarray, Variant]:
        """The parameters of rows, as `row_sampling.pack` gives them, and the first variant that can serve them all.

        Args:
          slots: of sequences that were placed; None for a row that is not sampled.
          steps: tokens of each text that were sampled before.
          padded: number of rows of the program.
        """
        slot_B = np.full(padded, self._dummy, np.int32)
        slot_B[: len(slots)] = [self._dummy if slot is None else slot for slot in slots]
        fields_BF = self._fields_SF[slot_B]
        fields_BF[: len(slots), STEP] = steps
        fields_BF[slot_B == self._dummy, STEP] = 0
        return fields_BF, variant_with(int(np.bitwise_or.reduce(self._needs_S[slot_B])))


def set_table(table_M: np.ndarray, pages: Sequence[int]) -> None:
    """Writes pages into a row of a page table, or into its end.

    What is behind the row's own slots is masked, not skipped: it must be finite, as its own pages are.
    """
    used = min(len(pages), len(table_M))
    if used:
        table_M[:used] = pages[:used]
        table_M[used:] = table_M[used - 1]


def no_room(pages: int, page_size: int, needed: int) -> ValueError:
    """The error for a sequence whose pages do not hold its tokens."""
    return ValueError(f"{pages} pages of {page_size} slots do not hold {needed} tokens.")
