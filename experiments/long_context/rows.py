"""The rows that `experiments.long_context.train_and_extend` trains on: text, repetitions and needles."""

import dataclasses

import jax
import numpy as np

from experiments.learning.data import find_text
from experiments.long_context.sizes import LAYOUT, Setup
from qwen_jax.errors import InputError
from train.data.batch import Batch
from train.data.text import split_documents
from train.evaluate import synthetic_ids

# The kind of each of eight rows: 0 repetitions, 1 needles, 2 text.
_KINDS = np.array([0, 0, 1, 1, 1, 2, 2, 2])


class Mixture:
    """Rows of one document: a quarter repeats sequences, three eighths have needles, three eighths are text.

    The answers of a row of needles, and a row's repetitions, weigh as much as a row of text.

    Args:
      length: tokens of a row.
      text: bytes of all training documents.
    """

    def __init__(self, length: int, text: np.ndarray):
        self._length, self._text = length, text

    def rows(self, rng: np.random.Generator, first: int, count: int) -> Batch:
        """Rows `first` to `first + count - 1` of a run. Any eight neighbours have the shares of the mixture."""
        repetitions, needles, text = np.bincount(_KINDS[np.arange(first, first + count) % 8], minlength=3).tolist()
        return _joined(self.repetitions(rng, repetitions), self.needles(rng, needles), self.text(rng, text))

    def repetitions(self, rng: np.random.Generator, rows: int) -> Batch:
        """Rows that repeat a sequence of 8 ids to half a row."""
        T = self._length
        return self._answers(*synthetic_ids.repeated_rows(rng, rows, T, LAYOUT, min(8, T // 4)))

    def needles(self, rng: np.random.Generator, rows: int) -> Batch:
        """Rows of needles, half of them in text and half in random ids; at least half of the keys are asked for."""
        T = self._length
        most = min(T // 15, 32)
        asked = max(most // 2, 1)
        noise = rng.choice(LAYOUT.noise, (rows, T)).astype(np.int32)
        noise[::2] = self._rows(rng, len(noise[::2]))
        count = int(rng.integers(asked, most + 1))
        return self._answers(*synthetic_ids.needle_rows(rng, rows, T, LAYOUT, count, asked, noise=noise))

    def text(self, rng: np.random.Generator, rows: int) -> Batch:
        """Rows of text."""
        tokens = self._rows(rng, rows)
        return _batch(tokens, np.ones(tokens.shape, np.float32))

    def _answers(self, tokens: np.ndarray, weights: np.ndarray) -> Batch:
        """Rows whose weighted tokens together weigh as much as a row of text."""
        return _batch(tokens, weights * (self._length / weights.sum(axis=1, keepdims=True)))

    def _rows(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Stretches of the text, int32 [count, length]."""
        begins = rng.integers(0, len(self._text) - self._length, count)
        return self._text[begins[:, None] + np.arange(self._length)].astype(np.int32)


class MixedLengths:
    """Batches by step: 40% of the rows hold one document, 60% hold four that are a quarter as long.

    Each kind of rows has the shares of `Mixture`. The shares of lengths are those of the Qwen2.5 report
    (arXiv:2412.15115, section 3.3).

    Args:
      length: tokens of a row.
      rows: of a step.
      text: bytes of all training documents.
      seed: of the data.
    """

    def __init__(self, length: int, rows: int, text: np.ndarray, seed: int):
        self._num_rows, self._seed = rows, seed
        self._short, self._long = (Mixture(n, text) for n in (length // 4, length))

    def __getitem__(self, step: int) -> Batch:
        rng, rows = np.random.default_rng([self._seed, step, 1]), self._num_rows
        # Long rows before this step and after it. Rounded so, their share is exact over any five steps.
        first, end = (2 * rows * n // 5 for n in (step, step + 1))
        count = end - first
        short = self._short.rows(rng, 4 * (rows * step - first), 4 * (rows - count))
        return _joined(self._long.rows(rng, first, count), _packed(short))


def _joined(*parts: Batch) -> Batch:
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _packed(rows: Batch) -> Batch:
    """Four rows in each, as segments 1 to 4 whose positions begin at 0."""
    segment = np.arange(len(rows.tokens), dtype=np.int32)[:, None] % 4
    numbered = dataclasses.replace(rows, segment_ids=rows.segment_ids + segment)
    return jax.tree.map(lambda x: x.reshape(len(x) // 4, 4 * x.shape[1]), numbered)


def _batch(tokens: np.ndarray, weights: np.ndarray) -> Batch:
    """Rows of one document each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Batch(tokens, positions, np.ones(tokens.shape, np.int32), weights.astype(np.float32))


def read_text(setup: Setup, folders: list[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of a Python installation's sources and documentation.

    Args:
      setup: how much, and how long a window is.
      folders: where to look; by default in the standard library and the installed packages.

    Returns:
      uint8 [n], all training documents; and uint8 [windows, longest test length], beginnings of held-out documents.

    Raises:
      InputError: too little text.
    """
    documents = find_text(int(setup.megabytes * 1e6), 0, folders)
    training, held_out = split_documents(documents, 0.1, 0)
    longest, longest_row = setup.longest(), max(stage.length for stage in setup.stages())
    found = [np.frombuffer(text.encode(), np.uint8)[:longest] for text in held_out]
    windows = [text for text in found if len(text) == longest][: setup.windows]
    text = np.frombuffer("\n".join(training).encode(), np.uint8)
    if not windows or len(text) <= longest_row:
        raise InputError(
            f"The text has {len(text):,} bytes to train on and {len(windows)} held-out documents of {longest:,} bytes. "
            "Give more (--megabytes), or test smaller lengths."
        )
    return text, np.stack(windows)
