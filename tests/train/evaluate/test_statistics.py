"""Intervals cover the truth as often as they say, and paired tests are wrong as often as they say."""

import math

import numpy as np
import pytest

from tests.helpers.runs import print_seed
from train.evaluate import statistics
from train.evaluate.statistics import estimate, mcnemar, paired, tango


def binomial_bounds(trials: int, p: float) -> tuple[int, int]:
    """What a count stays within but for one time in ten million."""
    width = 5.4 * math.sqrt(trials * p * (1 - p))
    return math.floor(trials * p - width), math.ceil(trials * p + width)


def test_the_interval_covers_the_truth() -> None:
    rng, trials = print_seed(), 300
    covered = 0
    for _ in range(trials):
        found = estimate((rng.random(200) < 0.7).astype(float).tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.7 <= found.high
    # 95%, and of 200 items about one percent more or less.
    assert covered >= binomial_bounds(trials, 0.93)[0]


def test_the_interval_of_a_share_is_that_of_scipy_and_never_a_point() -> None:
    """Models that have all or no items right are no exception: their intervals contain more than one number."""
    from scipy.stats import binomtest

    rng = print_seed()
    for n in (2, 12, *rng.integers(3, 500, 20).tolist()):
        for right in {0, n, int(rng.integers(n + 1))}:
            found = estimate([1.0] * right + [0.0] * (n - right))
            want = binomtest(right, n).proportion_ci(method="wilson")
            assert (found.low, found.high) == (pytest.approx(want.low, abs=1e-12), pytest.approx(want.high, abs=1e-12))
            assert found.low < found.high


def test_an_aggregate_is_resampled_with_its_items() -> None:
    """For the mean in disguise: the same value, and nearly the same interval."""
    values = print_seed().random(50).tolist()
    plain, other = estimate(values), estimate(values, lambda x: sum(x) / len(x))
    assert plain.value == pytest.approx(other.value)
    assert plain.stderr is not None
    assert other.stderr == pytest.approx(plain.stderr, rel=0.4)
    assert plain == estimate(values)
    assert estimate([]).value is None
    assert (estimate([0.5]).value, estimate([0.5]).low) == (0.5, None)


def test_mcnemar_is_the_binomial_of_the_items_that_differ() -> None:
    from scipy.stats import binomtest

    rng = print_seed()
    for better, worse in [(0, 0), (5, 0), (7, 7), *rng.integers(0, 60, (20, 2)).tolist(), (900, 1000)]:
        n = better + worse
        want = binomtest(better, n, 0.5).pvalue if n else 1.0
        assert mcnemar(better, worse) == pytest.approx(want, rel=1e-6)


def test_the_interval_of_two_shares_covers_their_difference() -> None:
    """By exact enumeration of all outcomes, for random shares of items that one model alone has right."""
    from scipy.stats import multinomial

    rng = print_seed()
    n = int(rng.integers(8, 25))
    bounds = {(b, c): tango(b, c, n) for b in range(n + 1) for c in range(n + 1 - b)}
    outcomes = np.array([(b, c, n - b - c) for b, c in bounds])
    low, high = np.array(list(bounds.values())).T
    for _ in range(10):
        shares = rng.dirichlet([1, 1, rng.choice([1, 5])])
        difference = shares[0] - shares[1]
        covered = (low <= difference) & (difference <= high)
        assert multinomial.pmf(outcomes[covered], n, shares).sum() > 0.9


def test_the_interval_of_two_shares_agrees_with_their_test_and_is_never_a_point() -> None:
    """It has 0 where McNemar's statistic is below its quantile; without a difference it is z^2 / (n + z^2) wide."""
    rng, squared = print_seed(), 1.959963984540054**2
    for n in [2, 3, *rng.integers(4, 3000, 40).tolist()]:
        assert tango(0, 0, n) == pytest.approx((-squared / (n + squared), squared / (n + squared)), rel=1e-6)
        better = int(rng.integers(n + 1))
        worse = int(rng.integers(n - better + 1))
        low, high = tango(better, worse, n)
        assert -1 <= low <= (better - worse) / n <= high <= 1
        assert low < high
        assert tango(worse, better, n) == pytest.approx((-high, -low), abs=1e-9)
        assert (low < 0 < high) == ((better - worse) ** 2 < squared * (better + worse) or better == worse)
    agreeing = paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (agreeing.low, agreeing.high) == tango(0, 0, 3)
    assert paired([1.0], [0.0]).low is None


def test_equal_models_differ_as_often_as_the_level_says() -> None:
    rng, trials = print_seed(), 150
    found = {"McNemar": 0, "permutation": 0}
    for _ in range(trials):
        a, b = rng.random((2, 60)) < 0.6
        one = paired(a.astype(float).tolist(), b.astype(float).tolist())
        x, y = rng.random((2, 20))
        other = paired(x.tolist(), y.tolist())
        for each in (one, other):
            assert each.p is not None
            found[each.test] += each.p <= 0.05
    # The exact test is conservative.
    assert found["McNemar"] <= binomial_bounds(trials, 0.05)[1]
    assert found["permutation"] <= binomial_bounds(trials, 0.05)[1]


def test_a_real_difference_is_found() -> None:
    rng = print_seed()
    a = rng.random(300)
    found = paired(a.tolist(), (a + 0.1 + 0.05 * rng.standard_normal(300)).tolist())
    assert found.p is not None
    assert found.p < 0.001
    assert found.low is not None
    assert found.low > 0
    assert paired([], []).items == 0


def test_numbers_do_not_depend_on_how_many_draws_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = print_seed()
    a, b = rng.random((2, 33)).tolist()
    before = estimate(a), paired(a, b)
    monkeypatch.setattr(statistics, "_MOST_DRAWN", 33 * 7)
    assert (estimate(a), paired(a, b)) == before
