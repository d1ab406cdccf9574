"""Vertical-slash lists contain what the published selection chooses, each pair once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.attention import sparse_parts, vertical_slash
from qwen_jax.attention.vertical_slash import Selection, Tiling
from qwen_jax.kernels.attention.lists import NOWHERE

GPU, TPU, TALL = Tiling(128, 64, 8), Tiling(), Tiling(256, 128, 128)
# All tests have the same sizes, so that few programs are compiled.
B, H, T, S = 2, 3, 512, 1664
R = sparse_parts.PROBE_ROWS


def draw() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


def random_scores(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores with clusters of strong slashes, as `line_scores` returns them."""
    vertical = rng.random((B, H, S)).astype(np.float32)
    slash = rng.random((B, H, S + R - 1)).astype(np.float32)
    for b in range(B):
        for h in range(H):
            for first in rng.integers(0, S, 3):
                slash[b, h, first : first + rng.integers(1, 60)] += 1
    return vertical, slash


@functools.partial(jax.jit, static_argnames=("tile", "max_pieces", "max_columns"))
def choose(
    vertical: jax.Array, slash: jax.Array, budgets: jax.Array, mask: kernels.Mask, slot: jax.Array, length: jax.Array,
    tile: Tiling, max_pieces: int, max_columns: int,
) -> tuple[jax.Array, ...]:  # fmt: skip
    bounds = sparse_parts.bounds([mask], tile.rows)
    made = vertical_slash.choose(
        vertical, slash, budgets, bounds, slot, length, tiling=tile, max_pieces=max_pieces, max_columns=max_columns
    )
    return tuple(getattr(made, field.name) for field in dataclasses.fields(Selection))


def covered(lists: kernels.KeyLists, places: Any, T: int, S: int) -> np.ndarray:
    """How often each pair [B, H, T, S] is in a piece or a column of its tile, without the mask."""
    starts, counts, places = (np.asarray(x) for x in (lists.starts_BHNL, lists.counts_BHN, places))
    B, H, N, _ = starts.shape
    times = np.zeros((B, H, N, S), int)
    for b, h, n in np.ndindex(B, H, N):
        for start in starts[b, h, n, : counts[b, h, n]]:
            times[b, h, n, start : start + lists.size] += 1
        inside = places[b, h, n][places[b, h, n] != NOWHERE]
        np.add.at(times[b, h, n], inside, 1)
    return np.repeat(times, lists.rows, axis=2)[:, :, :T]


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the greatest scores, of equal ones the first."""
    return np.argsort(-scores, kind="stable")[:count]


@pytest.mark.parametrize("tile", [GPU, TPU, TALL], ids=str)
@pytest.mark.parametrize("slot", [0, 1024, 1029])
def test_lists_contain_the_published_selection(tile: Tiling, slot: int) -> None:
    """Every chosen column and slash is visited by every query that may see it, and no pair twice. Each piece has a key
    that a slash needs, and starts where the kernel can read it. Rows are padded on the left, the chunk on the right.
    The counts of visited pairs are exact."""
    rng = draw()
    length = T - int(rng.integers(0, 100))
    low = np.array([0, rng.integers(0, slot + 100)])
    vertical, slash = random_scores(rng)
    budgets = np.array([[30, 60], [200, 150], [rng.integers(1, 50), rng.integers(1, 300)]], np.int32)
    mask = kernels.cache_mask(jnp.asarray(low, jnp.int32), jnp.int32(slot), T)
    made = Selection(*choose(vertical, slash, budgets, mask, slot, length, tile, 64, 256))
    starts, counts = np.asarray(made.lists.starts_BHNL), np.asarray(made.lists.counts_BHN)
    listed = np.arange(starts.shape[3]) < counts[..., None]
    made.lists.check(B, T, H)  # Ascending, disjoint, from key 0 on.
    assert (starts[listed] % tile.step == 0).all()
    times = covered(made.lists, made.places_BHNC, T, S)
    i, j = np.arange(slot, slot + T)[:, None], np.arange(S)
    end = slot + length
    for b in range(B):
        seen = (j >= low[b]) & (j <= i)
        assert times[b][:, seen].max() == 1
        assert (np.asarray(made.visited_BH)[b] == (times[b] * seen).sum((1, 2))).all()
        for h, (columns, slashes) in enumerate(budgets):
            columns = 130 if columns == 30 else columns
            score = vertical[b, h, low[b] : end].copy()
            score[:30] = np.inf
            wanted = low[b] + top(score, columns)
            by_distance = slash[b, h, end - 1 - np.arange(end - low[b])]
            by_distance[:100] = np.inf
            distances = top(by_distance, slashes)
            on_slash = np.isin(i - j, distances) & seen
            assert (times[b, h][on_slash | (np.isin(j, wanted) & seen)] == 1).all()
            # Nothing needless: each piece has a key that a slash of its tile needs, before the mask cuts it.
            needed = np.isin(i - j, distances).reshape(-1, tile.rows, S).any(1)
            for n in range(len(needed)):
                for start in starts[b, h, n, : counts[b, h, n]]:
                    near = slice(start, start + tile.size)
                    assert needed[n, near].any() or start + tile.size > slot + (n + 1) * tile.rows
            # Columns that are not in pieces are the chosen ones, or keys that no piece can reach.
            placed = np.unique(np.asarray(made.places_BHNC)[b, h])[:-1]
            assert np.isin(placed, np.r_[wanted, low[b] : tile.size - tile.step]).all()
    assert (np.asarray(made.pieces_cut_BH) == 0).all()
    assert (np.asarray(made.columns_cut_BH) == 0).all()


@pytest.mark.parametrize("tile", [GPU, TPU], ids=str)
def test_overflow_is_counted_and_keeps_the_best(tile: Tiling) -> None:
    """With capacities that are too small, pairs are still visited at most once, what was cut is counted, and the
    nearest slashes and the greatest columns stay."""
    rng = draw()
    slot = 1024
    vertical, slash = random_scores(rng)
    budgets = np.array([[250, 700], [3, 120], [64, 300]], np.int32)
    mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(slot), T)
    everything = Selection(*choose(vertical, slash, budgets, mask, slot, T, tile, 64, 256))
    made = Selection(*choose(vertical, slash, budgets, mask, slot, T, tile, 5, 64))
    full, few = (np.asarray(x.lists.counts_BHN)[..., -1] for x in (everything, made))
    assert (full[:, 0] > 5).all()
    assert few.max() <= 5
    assert np.asarray(made.columns_cut_BH).tolist() == [[250 - 64, 0, 0]] * B
    assert (np.asarray(made.pieces_cut_BH)[:, 0] >= full[:, 0] - few[:, 0]).all()
    times, all_times = (covered(x.lists, x.places_BHNC, T, S) for x in (made, everything))
    assert times.max() == 1
    assert (times.sum((2, 3)) < all_times.sum((2, 3)))[:, 0].all()
    i, j = np.arange(slot, slot + T)[:, None], np.arange(S)
    near = (j <= i) & (i - j < 100)
    assert (times[:, :, near] == 1).all()
    for b in range(B):
        best = np.isin(j, np.r_[np.arange(30), 30 + top(vertical[b, 0, 30 : slot + T], 34)]) & (j <= i)
        assert (times[b, 0][best] == 1).all()


@pytest.mark.parametrize("tile", [GPU, TPU], ids=str)
def test_empty_budgets_visit_nothing(tile: Tiling) -> None:
    """Budgets of zero give empty lists and no column."""
    rng = draw()
    vertical, slash = random_scores(rng)
    mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(0), T)
    made = Selection(*choose(vertical, slash, np.zeros((H, 2), np.int32), mask, 0, T, tile, 64, 256))
    assert (np.asarray(made.lists.counts_BHN) == 0).all()
    assert (np.asarray(made.places_BHNC) == NOWHERE).all()
    assert (np.asarray(made.visited_BH) == 0).all()


@pytest.mark.parametrize("few_bytes", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_line_scores(monkeypatch: pytest.MonkeyPatch, few_bytes: bool, parts: int) -> None:
    """Sums of probabilities along columns and diagonals agree with float64, for keys in one or three parts with
    queries of their own, in one block of keys or several, the last of which overlaps."""
    rng = draw()
    if few_bytes:
        monkeypatch.setattr(vertical_slash, "_BYTES", 1)
    B, H, K, S, d, scale, end = 2, 4, 2, 2500, 8, 0.4, 2300
    k = rng.normal(size=(B, K, S, d)).astype(np.float32)
    queries = rng.normal(size=(parts, B, R, H, d)).astype(np.float32)
    row_end = np.arange(end - R, end) + 1
    edges = [np.full(R, 17), *(np.full(R, x) for x in (900, 2000)[: parts - 1]), row_end]
    masks = [
        kernels.Mask(*(jnp.asarray(np.broadcast_to(x, (B, R)), jnp.int32) for x in edges[p : p + 2]))
        for p in range(parts)
    ]
    logits = np.full((B, H, R, S), -np.inf)
    for p in range(parts):
        product = np.einsum("brhd,bhsd->bhrs", queries[p].astype(np.float64), np.repeat(k, H // K, 1)) * scale
        inside = (np.arange(S) >= edges[p][:, None]) & (np.arange(S) < edges[p + 1][:, None])
        logits = np.where(inside, product, logits)
    lse = np.log(np.exp(logits).sum(-1))
    weights = np.exp(logits - lse[..., None])
    diagonals = np.zeros((B, H, S + R - 1))
    for r in range(R):
        diagonals[:, :, R - 1 - r : R - 1 - r + S] += weights[:, :, r]
    with jax.default_matmul_precision("highest"):  # GPUs round float32 to TF32 otherwise
        vertical, slash = jax.jit(functools.partial(vertical_slash.line_scores, scale=scale))(
            list(queries), masks, lse.astype(np.float32), k
        )
    np.testing.assert_allclose(vertical, weights.sum(2), atol=2e-5)
    np.testing.assert_allclose(slash, diagonals, atol=2e-5)


def test_gathered_columns() -> None:
    """Each query head gets the keys of its key/value head at its own places."""
    rng = draw()
    x, columns = rng.normal(size=(2, 2, 50, 4)).astype(np.float32), rng.integers(0, 50, (2, 6, 7)).astype(np.int32)
    got = np.asarray(vertical_slash.gather_columns(jnp.asarray(x), jnp.asarray(columns)))
    for b, h in np.ndindex(2, 6):
        assert (got[b, h] == x[b, h // 3, columns[b, h]]).all()
