"""Rank correlation."""

import numpy as np


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, where equal values share the mean of their ranks.

    Args:
      a, b: of the same length. Pairs with NaN are left out.

    Returns:
      NaN for fewer than two pairs, or if all values of one side are equal.
    """
    there = np.isfinite(a) & np.isfinite(b)
    x, y = (_ranks(values[there]) for values in (np.asarray(a), np.asarray(b)))
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return ranks
