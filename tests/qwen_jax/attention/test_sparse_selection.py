"""Exact top-k and compaction without sorting agree with NumPy's sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.attention import sparse_selection as selection


def draw() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.mark.parametrize("length", [1, 31, 128, 1000])
@pytest.mark.parametrize("distinct", [3, 10**9])
def test_top_mask_is_a_stable_sort(length: int, distinct: int) -> None:
    """The chosen elements are the first ones of a stable sort from great to small, for every count from 0 to all
    allowed ones, also with infinities and with many equal scores."""
    rng = draw()
    R = 7
    scores = (rng.integers(0, distinct, (R, length)) / distinct * 64).astype(np.float32)
    scores[rng.random((R, length)) < 0.1] = np.inf
    allowed = rng.random((R, length)) < 0.8
    counts = np.array([round(share * n) for share, n in zip(np.linspace(0, 1, R), allowed.sum(1), strict=True)])
    got = jax.jit(lambda s, a, n: selection.top_mask(selection.order_keys(s, a), n))(
        scores, allowed, counts.astype(np.int32)
    )
    for r in range(R):
        order = np.argsort(np.where(allowed[r], -scores[r], 1.0), kind="stable")
        assert set(np.flatnonzero(np.asarray(got)[r])) == set(order[: counts[r]])


@pytest.mark.parametrize("length", [64, 1000, 1029])
@pytest.mark.parametrize("distinct", [3, 10**9])
def test_top_mask_by_groups_is_the_same(length: int, distinct: int) -> None:
    """For counts of at most one element in 64, which groups are for, and for larger ones up to all."""
    rng = draw()
    R, few = 6, length // 64
    scores = (rng.integers(0, distinct, (R, length)) / distinct * 64).astype(np.float32)
    allowed = rng.random((R, length)) < np.array([1, 1, 1, 0.5, 0.5, 0.1])[:, None]
    keys = selection.order_keys(jnp.asarray(scores), jnp.asarray(allowed))
    both = jax.jit(lambda n: [selection.top_mask(keys, n, by_groups=by_groups) for by_groups in (False, True)])
    most = allowed.sum(axis=1)
    for counts in (np.minimum(most, few), np.minimum(most, rng.integers(0, few + 1, R)), most // 2, most):
        want, got = map(np.asarray, both(counts.astype(np.int32)))
        assert (got == want).all()
        assert (got.sum(axis=1) == counts).all()


@pytest.mark.parametrize(("length", "capacity"), [(1, 3), (33, 5), (700, 700)])
def test_places_are_the_true_elements(length: int, capacity: int) -> None:
    """Ascending places of true elements as NumPy finds them, cut at the capacity, filled up with the length."""
    rng = draw()
    mask = rng.random((4, length)) < np.array([[0.0], [0.1], [0.6], [1.0]])
    places, count = jax.jit(selection.places, static_argnums=1)(mask, capacity)
    assert (np.asarray(count) == mask.sum(1)).all()
    for row, got in zip(mask, np.asarray(places), strict=True):
        want = np.flatnonzero(row)[:capacity]
        assert (got[: len(want)] == want).all()
        assert (got[len(want) :] == length).all()


def test_windows_and_counts() -> None:
    """`window_any` and `count_below` agree with their definitions."""
    rng = draw()
    mask = rng.random((3, 90)) < 0.05
    got = np.asarray(selection.window_any(jnp.asarray(mask), 7))
    assert (got == np.stack([[row[max(j - 6, 0) : j + 1].any() for j in range(90)] for row in mask])).all()
    rows, values = np.sort(rng.integers(0, 50, (3, 20)), axis=1), rng.integers(-5, 60, (3, 11))
    below = np.asarray(selection.count_below(jnp.asarray(rows), jnp.asarray(values)))
    assert (below == (rows[:, None] < values[:, :, None]).sum(2)).all()
