"""Rollouts for tests."""

import numpy as np

from train.data.rollouts import Rollout


def random_rollouts(rng: np.random.Generator, count: int, vocab: int, longest: int = 6) -> list[Rollout]:
    """Rollouts of one or two turns, with tool tokens between them; parts have from 1 to `longest` tokens."""
    rollouts = []
    for _ in range(count):
        parts = rng.integers(1, longest + 1, rng.choice([2, 4]))
        trained = np.repeat(np.arange(len(parts)) % 2 == 1, parts)
        ids = rng.integers(0, vocab, len(trained)).tolist()
        log_probs = np.where(trained, -rng.uniform(0.5, 5, len(ids)), 0.0).astype(np.float32)
        rollouts.append(Rollout(ids, trained, log_probs, bool(rng.random() < 0.7), int(rng.integers(0, 3))))
    return rollouts
