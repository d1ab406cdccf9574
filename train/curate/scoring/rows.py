"""Packs documents with their questions into rows of one length, so that few programs serve all lengths.

A document stands in its row once, and its questions after it. A token of the document sees the document up to itself;
a token of a question sees the whole document, and its own question up to itself. So there are two intervals of keys for
each token, and questions see neither one another nor other documents:

    row        | document A       | question 1 | question 2 | document B | question 1 | question 2 | padding
    positions  | 0 1 ... n-1      | n n+1 ...  | n n+1 ...  | 0 1 ... m-1| m m+1 ...  | m m+1 ...  | 0
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from train.curate.scoring.prompt import Prompt

TOKENS, POSITIONS, SHARED_START, SHARED_END, OWN_START, OWN_END = range(6)
"""The arrays of a batch. SHARED are the keys of the document, OWN those of the question."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are run together.

    Attributes:
      packed: int32 [B, 6, T], the arrays above. Padding sees nothing.
      last: int32 [B, M], where the last token of each question is; 0 for none.
      document: int32 [B, M], index of its document; -1 for none.
      question: int32 [B, M], index of the question.
      tokens: how many are not padding.
    """

    packed: np.ndarray
    last: np.ndarray
    document: np.ndarray
    question: np.ndarray
    tokens: int


class Packer:
    """Collects documents and gives full batches of rows, by best fit, the longest documents first.

    The batches depend on the documents and their order alone.

    Attributes:
      sizes: numbers of rows that a batch may have. All but the last batches have the largest.
    """

    def __init__(self, prompt: Prompt, length: int, rows: int, shards: int = 1, window: int = 8):
        """
        Args:
          prompt: gives the questions.
          length: T, at least `prompt.longest`.
          rows: of a full batch, a multiple of `shards`.
          shards: of the rows on the mesh.
          window: batches that documents are collected for before they are packed; at least 2.
        """
        self._prompt, self._length, self._rows, self._window = prompt, length, rows, window
        self.sizes = [shards]
        while self.sizes[-1] < rows:
            self.sizes.append(min(2 * self.sizes[-1], rows))
        # One question is a part of its text like any other; several are branches.
        branches = prompt.questions if len(prompt.questions) > 1 else ()
        self._shared = np.concatenate([prompt.closing, *(() if branches else prompt.questions)])
        self._branches = np.concatenate([np.zeros(0, np.int32), *branches])
        lengths = [len(ids) for ids in branches]
        self._starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths) if branches else np.zeros(0, int)
        self._ends = np.cumsum(lengths) if branches else np.zeros(1, int)
        self._fixed = len(prompt.head) + len(self._shared) + len(self._branches)
        # No row has more answers than this: documents have at least one token.
        self._most = length // (self._fixed + 1) * len(self._ends)
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._tokens = 0

    @property
    def answers(self) -> int:
        """M, the most questions of a row."""
        return self._most

    def add(self, index: int, ids: np.ndarray) -> Iterator[Batch]:
        """Adds a document, and gives the batches that are full now.

        Args:
          index: of the document.
          ids: its tokens.
        """
        self._waiting.append((index, ids))
        self._tokens += len(ids) + self._fixed
        if self._tokens < self._window * self._rows * self._length:
            return
        rows = self._packed()
        # The emptiest rows wait for further documents.
        full = (len(rows) - 1) // self._rows * self._rows
        for start in range(0, full, self._rows):
            yield self._batch(rows[start : start + self._rows], self._rows)
        self._waiting = [document for row in rows[full:] for document in row]
        self._tokens = sum(len(ids) + self._fixed for _, ids in self._waiting)

    def flush(self) -> Iterator[Batch]:
        """Gives the batches of all documents that are left."""
        rows = self._packed()
        self._waiting, self._tokens = [], 0
        for start in range(0, len(rows), self._rows):
            some = rows[start : start + self._rows]
            yield self._batch(some, next(size for size in self.sizes if size >= len(some)))

    def _packed(self) -> list[list[tuple[int, np.ndarray]]]:
        """The documents that wait, in rows, the fullest first."""
        rows: list[list[tuple[int, np.ndarray]]] = []
        room = np.zeros(len(self._waiting), np.int64)
        for document in sorted(self._waiting, key=lambda document: (-len(document[1]), document[0])):
            size = len(document[1]) + self._fixed
            fits = room[: len(rows)] >= size
            if fits.any():
                row = int(np.argmin(np.where(fits, room[: len(rows)], np.iinfo(np.int64).max)))
            else:
                row = len(rows)
                rows.append([])
                room[row] = self._length
            rows[row].append(document)
            room[row] -= size
        return [rows[i] for i in np.argsort(room[: len(rows)], kind="stable")]

    def _batch(self, rows: Sequence[Sequence[tuple[int, np.ndarray]]], count: int) -> Batch:
        packed = np.zeros((count, 6, self._length), np.int32)
        packed[:, SHARED_START:] = np.arange(self._length)
        last, question = np.zeros((2, count, self._most), np.int32)
        document, tokens = np.full((count, self._most), -1, np.int32), 0
        for r, row in enumerate(rows):
            at, answers = 0, len(self._ends)
            for i, (index, ids) in enumerate(row):
                end = self._write(packed[r], at, ids)
                slots = slice(i * answers, (i + 1) * answers)
                last[r, slots] = end - len(self._branches) + self._ends - 1
                document[r, slots], question[r, slots] = index, np.arange(answers)
                at = end
            tokens += at
        return Batch(packed, last, document, question, tokens)

    def _write(self, row_XT: np.ndarray, at: int, ids: np.ndarray) -> int:
        """Writes a document and its questions from a place on; returns the place after them."""
        shared = np.concatenate([self._prompt.head, ids, self._shared])
        middle = at + len(shared)
        end = middle + len(self._branches)
        row_XT[TOKENS, at:middle], row_XT[TOKENS, middle:end] = shared, self._branches
        row_XT[POSITIONS, at:middle] = np.arange(len(shared))
        row_XT[POSITIONS, middle:end] = len(shared) + np.arange(len(self._branches)) - self._starts
        row_XT[SHARED_START, at:end] = at
        row_XT[SHARED_END, at:middle] = np.arange(at, middle) + 1
        row_XT[SHARED_END, middle:end] = middle
        # Nothing, at a place near the question's, so that kernels skip whole tiles.
        row_XT[OWN_START : OWN_END + 1, at:middle] = middle
        row_XT[OWN_START, middle:end] = middle + self._starts
        row_XT[OWN_END, middle:end] = np.arange(middle, end) + 1
        return end
