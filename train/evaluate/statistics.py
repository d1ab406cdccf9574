"""Confidence intervals of scores, and paired tests of differences."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train.evaluate.task import mean

# The 97.5% quantile of the normal distribution.
_NORMAL = 1.959963984540054
_RESAMPLES, _SLOW_RESAMPLES, _SIGNS = 2000, 200, 10_000
# Random numbers in memory at one time.
_MOST_DRAWN = 2_000_000
# All draws are the same every time: equal scores give equal intervals.
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with what is known of its error.

    Attributes:
      value: of all items; None if no item has a score.
      low, high: the 95% interval: of a mean of zeros and ones Wilson's, which does not have the width 0 where all items
        have one score; else by bootstrap over items (percentiles). None with fewer than two items.
      stderr: the standard deviation of the bootstrap.
      items: that count.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    items: int = 0


def estimate(values: Sequence[Any], aggregate: Callable[[Sequence[Any]], float] = mean) -> Estimate:
    """A metric over items, with its interval.

    Args:
      values: of each item; those without a score left out.
      aggregate: from the values to the number.
    """
    if not values:
        return Estimate(None)
    whole, n = float(aggregate(values)), len(values)
    if n < 2:
        return Estimate(whole, items=n)
    draws = np.random.default_rng(_SEED)
    if aggregate is mean:
        resampled = _means(np.asarray(values, np.float64), draws)
    else:
        rows = draws.integers(0, n, (_SLOW_RESAMPLES, n))
        resampled = np.asarray([aggregate([values[i] for i in row]) for row in rows.tolist()])
    is_share = aggregate is mean and np.isin(np.asarray(values, np.float64), (0.0, 1.0)).all()
    low, high = wilson(whole, n) if is_share else np.percentile(resampled, [2.5, 97.5])
    return Estimate(whole, float(low), float(high), float(resampled.std(ddof=1)), n)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share by Wilson's score (1927, JASA 22, 209): right also for few items, and near 0 and 1.

    Args:
      share: of the items.
      n: how many items there are.
    """
    weight = _NORMAL**2 / n
    middle = (share + weight / 2) / (1 + weight)
    width = math.sqrt(weight * share * (1 - share) + weight**2 / 4) / (1 + weight)
    return max(middle - width, 0.0), min(middle + width, 1.0)


@dataclasses.dataclass(frozen=True)
class Difference:
    """B minus A on the same items.

    Attributes:
      value: the difference.
      low, high: its 95% interval: of zeros and ones Tango's, which does not have the width 0 where the models agree on
        all items; else by bootstrap over items, both models resampled together. None with fewer than two items.
      p: probability of a difference at least as large, if both models were equally good.
      test: which test gave it.
      items: that both have scores for.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    test: str
    items: int


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compares the scores of two models on the same items.

    Where all scores are 0 or 1: McNemar's exact test, the binomial of the items that one model alone has right. Else a
    permutation test that swaps the two scores of each item at random.

    Args:
      a, b: scores of the same items, in the same order.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, change = len(x), y - x
    if n == 0:
        return Difference(math.nan, None, None, None, "none", 0)
    value, low, high = float(change.mean()), None, None
    if np.isin(np.concatenate([x, y]), (0.0, 1.0)).all():
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        if n > 1:
            low, high = tango(better, worse, n)
        return Difference(value, low, high, mcnemar(better, worse), "McNemar", n)
    draws = np.random.default_rng(_SEED)
    if n > 1:
        low, high = (float(v) for v in np.percentile(_means(change, draws), [2.5, 97.5]))
    extreme = done = 0
    # A tolerance: sums in another order must not decide.
    bound = abs(value) * (1 - 1e-9)
    while done < _SIGNS:
        count = _at_a_time(n, _SIGNS - done)
        signs = draws.integers(0, 2, (count, n)) * 2 - 1
        extreme += int((np.abs((signs * change).mean(axis=1)) >= bound).sum())
        done += count
    return Difference(value, low, high, (extreme + 1) / (done + 1), "permutation", n)


def paired_aggregate(a: Sequence[Any], b: Sequence[Any], aggregate: Callable[[Sequence[Any]], float]) -> Difference:
    """Compares two models by a metric of the whole corpus, such as BLEU.

    Both models are computed on the same resampled items. The p-value is twice the share of resamples in which the
    difference has the other sign or is zero. Source: Koehn 2004, "Statistical Significance Tests for Machine
    Translation Evaluation", two-sided here.

    Args:
      a, b: what the metric is computed from, of the same items, in the same order.
      aggregate: from the values to the metric.
    """
    n = len(a)
    if n == 0:
        return Difference(math.nan, None, None, None, "none", 0)
    value = float(aggregate(b)) - float(aggregate(a))
    if n == 1:
        return Difference(value, None, None, 1.0, "none", 1)
    rows = np.random.default_rng(_SEED).integers(0, n, (_SLOW_RESAMPLES, n)).tolist()
    drawn = np.asarray([aggregate([b[i] for i in row]) - aggregate([a[i] for i in row]) for row in rows])
    low, high = (float(v) for v in np.percentile(drawn, [2.5, 97.5]))
    other_sign = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (other_sign + 1) / (_SLOW_RESAMPLES + 1))
    return Difference(value, low, high, p, "paired bootstrap", n)


def _means(values: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """The means of resampled values, some resamples at a time, which bounds the memory."""
    n, found = len(values), list[np.ndarray]()
    while (left := _RESAMPLES - sum(map(len, found))) > 0:
        found.append(values[draws.integers(0, n, (_at_a_time(n, left), n))].mean(axis=1))
    return np.concatenate(found)


def _at_a_time(n: int, left: int) -> int:
    """How many resamples of n items are drawn at a time. The draws do not depend on it."""
    return max(1, min(left, _MOST_DRAWN // n))


def tango(better: int, worse: int, n: int) -> tuple[float, float]:
    """The 95% interval of the difference of two shares of the same items, by Tango's score (1998, Stat. Med. 17, 891).

    It has the differences that a score test does not reject. McNemar's test, without a correction, is that of 0.

    Args:
      better, worse: items that only the one, only the other model has right.
      n: all items.
    """

    def score(difference: float) -> float:
        """How many standard deviations the observed difference is above a true one."""
        # The most likely share of items that only the other model has right, if this is the difference.
        linear = (2 * n - better + worse) * difference - better - worse
        root = math.sqrt(max(linear**2 + 8 * n * worse * difference * (1 - difference), 0.0))
        share = (root - linear) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        above = better - worse - n * difference
        return above / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, above) if above else 0.0

    def bound(outer: float) -> float:
        inner = (better - worse) / n
        for _ in range(60):
            middle = (inner + outer) / 2
            inner, outer = (middle, outer) if abs(score(middle)) < _NORMAL else (inner, middle)
        return inner

    return bound(-1.0), bound(1.0)


def mcnemar(better: int, worse: int) -> float:
    """The two-sided p-value of McNemar's exact test.

    Args:
      better, worse: items that only the one, only the other model has right.
    """
    n = better + worse
    if n == 0:
        return 1.0
    # Exact integers, one binomial coefficient from the last.
    tail = coefficient = 1
    for k in range(min(better, worse)):
        coefficient = coefficient * (n - k) // (k + 1)
        tail += coefficient
    return min(1.0, float(2 * tail / 2**n) if n < 1000 else 2 * math.exp(math.log(tail) - n * math.log(2)))
