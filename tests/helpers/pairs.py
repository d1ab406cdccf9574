"""Rows of preference pairs for tests, packed as they are told."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.data.batch import Batch
from train.data.pairs import PairBatch


class TokenPair(NamedTuple):
    """A prompt with two answers, as token ids, and the answers' log-probabilities under a reference."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    reference: tuple[float, float] = (0.0, 0.0)


def random_pairs(rng: np.random.Generator, count: int, vocab: int, longest: int = 8) -> list[TokenPair]:
    """Pairs whose prompts and answers have from 1 to `longest` tokens, with a random reference."""
    pairs = []
    for _ in range(count):
        ids = [rng.integers(0, vocab, rng.integers(1, longest + 1)) for _ in range(3)]
        reference = [-len(answer) * rng.uniform(2, 5) for answer in ids[1:]]
        pairs.append(TokenPair(*ids, (reference[0], reference[1])))
    return pairs


def pack_pairs(rows: Sequence[Sequence[TokenPair]], length: int, padding: str = "right") -> PairBatch:
    """Rows that hold given pairs one after the other, padded on one side."""
    tokens, positions, segments = (np.zeros((len(rows), length), np.int32) for _ in range(3))
    weights, reference, margin = (np.zeros((len(rows), length), np.float32) for _ in range(3))
    for b, row in enumerate(rows):
        answers = [(pair.prompt, x, pair.reference[i]) for pair in row for i, x in enumerate(pair[1:3])]
        at = 0 if padding == "right" else length - sum(len(prompt) + len(answer) for prompt, answer, _ in answers)
        for segment, (prompt, answer, log_prob) in enumerate(answers, 1):
            n = len(prompt) + len(answer)
            here = slice(at, at + n)
            tokens[b, here] = np.concatenate([prompt, answer])
            positions[b, here], segments[b, here] = np.arange(n), segment
            weights[b, at + len(prompt) : at + n] = 1
            reference[b, at + n - 1] = log_prob
            at += n
    return PairBatch(Batch(tokens, positions, segments, weights), reference, margin)
