"""Pooled-block selection and its mean correction agree with a model in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.attention import pooled_blocks, sparse, sparse_parts
from qwen_jax.attention.sparse import Part, PooledBlocks
from qwen_jax.kernels.attention.lists import NOWHERE

B, H, K, T, S, D, SLOT, SCALE = 1, 4, 2, 384, 1792, 16, 1280, 0.3
BLOCK = pooled_blocks.BLOCK
PATTERN = PooledBlocks(threshold=0.3, sink=100, window=200)
STRIDED = dataclasses.replace(PATTERN, stride=4)


def draw() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


def inputs(rng: np.random.Generator, parts: int) -> tuple[list[Part], jax.Array, jax.Array]:
    """Queries with different rotations for up to three parts of the keys, whose borders are at no block's border, and
    keys whose blocks differ in their means."""
    k, v = rng.normal(size=(2, B, K, S, D)).astype(np.float32)
    k += np.repeat(rng.normal(size=(B, K, S // BLOCK, D)), BLOCK, axis=2).astype(np.float32)
    end = np.arange(SLOT, SLOT + T) + 1
    edges = [np.full(T, 40), *(np.full(T, x) for x in (300, 700)[: parts - 1]), end]
    masks = [
        kernels.Mask(*(jnp.asarray(np.broadcast_to(x, (B, T)), jnp.int32) for x in edges[p : p + 2]))
        for p in range(parts)
    ]
    # The queries of a tile resemble each other, so that blocks differ in their scores.
    queries = 0.5 * rng.normal(size=(parts, B, T, H, D))
    queries = (queries + np.repeat(rng.normal(size=(B, T // BLOCK, H, D)), BLOCK, axis=1)).astype(np.float32)
    return [Part(jnp.asarray(q), mask) for q, mask in zip(queries, masks, strict=True)], jnp.asarray(k), jnp.asarray(v)


@functools.partial(jax.jit, static_argnames=("pattern", "max_pieces"))
def attend(parts: list[Part], k: jax.Array, v: jax.Array, pattern: PooledBlocks, **options: Any) -> Any:
    return sparse.attend(parts, k, v, pattern, slot=SLOT, scale=SCALE, **options)


def visits(parts: list[Part], k: jax.Array, pattern: PooledBlocks, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [H, N, J] that are visited, and those that means replace."""
    bounds = sparse_parts.bounds([part.mask for part in parts], BLOCK)
    made = pooled_blocks.choose(
        [p.q_BTHd for p in parts], pooled_blocks.block_means(k), bounds, pattern, scale=SCALE, max_blocks=capacity
    )
    made.lists.check(B, T, H)
    starts, counts = np.asarray(made.lists.starts_BHNL)[0], np.asarray(made.lists.counts_BHN)[0]
    visited = np.zeros((H, T // BLOCK, S // BLOCK), bool)
    for h, n in np.ndindex(*counts.shape):
        visited[h, n, starts[h, n, : counts[h, n]] // BLOCK] = True
    places = np.asarray(made.places_BHNJ)[0]
    replaced = places != NOWHERE
    assert (places == np.where(replaced, np.arange(S // BLOCK) * BLOCK, NOWHERE)).all()
    assert not (visited & replaced).any()
    assert float(made.skipped_BH.sum()) == replaced.sum()
    return visited, replaced


def logits_by_part(parts: list[Part], k: np.ndarray, begin: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [H, T, X] of keys, or of means of `width` keys from `begin` on, and which of them a row sees wholly in
    one part; in float64."""
    wide = np.repeat(np.asarray(k, np.float64)[0], H // K, axis=0)
    total, seen = np.zeros((H, T, len(begin))), np.zeros((T, len(begin)), bool)
    for part in parts:
        start, end = (np.asarray(x)[0, :, None] for x in (part.mask.k_start_BT, part.mask.k_end_BT))
        inside = (start <= begin) & (begin + width <= end)
        product = np.einsum("thd,hxd->htx", np.asarray(part.q_BTHd, np.float64)[0], wide) * SCALE
        total, seen = np.where(inside, product, total), seen | inside
    return total, seen


def model_scores(parts: list[Part], k: jax.Array, stride: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Scores [H, N, J] in float64, and the blocks [N, J] that all rows of a tile see in one part."""
    begin = np.arange(0, S, BLOCK)
    means = np.asarray(k, np.float64).reshape(B, K, -1, BLOCK, D).mean(3)
    logits, _ = logits_by_part(parts, means, begin, BLOCK)
    whole = np.zeros((T // BLOCK, len(begin)), bool)
    for part in parts:
        start, end = (np.asarray(x)[0, :, None] for x in (part.mask.k_start_BT, part.mask.k_end_BT))
        whole |= ((start <= begin) & (begin + BLOCK <= end)).reshape(-1, BLOCK, len(begin)).all(1)
    logits = np.where(np.repeat(whole, BLOCK, axis=0), logits, -np.inf)
    powers = np.exp(logits - logits.max(2, keepdims=True))[:, ::stride]
    scores = powers.reshape(H, -1, BLOCK // stride, len(begin)).sum(2)
    return scores, whole


@pytest.mark.parametrize(("sections", "pattern"), [(1024, PATTERN), (3, PATTERN), (3, STRIDED)])
@pytest.mark.parametrize("parts", [1, 3])
def test_scores_and_choice(monkeypatch: pytest.MonkeyPatch, parts: int, sections: int, pattern: PooledBlocks) -> None:
    """Scores agree with float64. A block is visited if its score is enough, if it is in the sink or the window, or if
    not all rows of the tile see all of it in one part. All other visible blocks are replaced by means."""
    monkeypatch.setattr(pooled_blocks, "_SECTION", sections)
    monkeypatch.setattr(pooled_blocks, "_BYTES", 1 if sections == 3 else 2**28)
    own, k, _ = inputs(draw(), parts)
    scores, whole = model_scores(own, k, pattern.stride)
    bounds = sparse_parts.bounds([part.mask for part in own], BLOCK)
    first, end = -(-bounds.whole_start_PBN // BLOCK), bounds.whole_end_PBN // BLOCK
    queries = [p.q_BTHd[:, :: pattern.stride] for p in own]
    got = pooled_blocks.block_scores(queries, pooled_blocks.block_means(k), first, end, scale=SCALE)
    np.testing.assert_allclose(np.asarray(got)[0], scores, rtol=2e-5, atol=1e-6)
    visited, replaced = visits(own, k, pattern, S // BLOCK)
    begin, last = np.arange(0, S, BLOCK), SLOT + BLOCK * np.arange(1, T // BLOCK + 1)[:, None]
    visible = (begin < last) & (begin + BLOCK > 40)
    always = (begin < 40 + PATTERN.sink) | (begin + BLOCK > last - BLOCK + 1 - PATTERN.window) | ~whole
    share = scores / scores.max(2, keepdims=True)
    close = abs(share - PATTERN.threshold) < 1e-4
    assert (visited == (visible & (always | (share >= PATTERN.threshold))))[~close].all()
    assert ((visited | replaced) == visible).all()
    assert 0 < replaced.sum() < visible.sum() * H


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_attention_with_means(parts: int, correct: bool) -> None:
    """Output and log-sum-exp equal float64 attention over visited blocks and, with mean correction, over one key for
    each other block: the mean, with the logit of 128 such keys. Density and recall are what this model gives."""
    own, k, v = inputs(draw(), parts)
    pattern = PooledBlocks(PATTERN.threshold, PATTERN.sink, PATTERN.window, correct)
    out, lse, found = attend(own, k, v, pattern)
    visited, replaced = visits(own, k, pattern, S // BLOCK)
    logits, seen = logits_by_part(own, np.asarray(k), np.arange(S), 1)
    begin = np.arange(0, S, BLOCK)
    k_mean, v_mean = (np.asarray(x, np.float64).reshape(B, K, -1, BLOCK, D).mean(3) for x in (k, v))
    means, _ = logits_by_part(own, k_mean, begin, BLOCK)
    rows = np.repeat(np.arange(T // BLOCK), BLOCK)
    on = np.repeat(visited, BLOCK, axis=2)[:, rows] & seen
    everything = np.concatenate(
        [np.where(on, logits, -np.inf), np.where(replaced[:, rows] & correct, means + np.log(BLOCK), -np.inf)], axis=2
    )
    values = np.repeat(np.concatenate([np.asarray(v, np.float64)[0], v_mean[0]], axis=1), H // K, axis=0)
    want_lse = np.log(np.exp(everything).sum(2))
    want = np.einsum("htx,hxd->thd", np.exp(everything - want_lse[..., None]), values)
    np.testing.assert_allclose(np.asarray(lse)[0], want_lse, atol=2e-5)
    np.testing.assert_allclose(np.asarray(out)[0], want, atol=2e-5)
    full = np.log(np.where(seen, np.exp(logits), 0).sum(2))
    recall = np.exp(want_lse - full)
    assert recall.max() <= 1 + 1e-9  # A mean stands for no more than its keys.
    audit = sparse_parts.audit_rows(jnp.int32(SLOT), jnp.int32(T))
    np.testing.assert_allclose(np.asarray(found.audit_recall_BH)[0], recall[:, audit].mean(1), rtol=1e-4)
    pairs = on.sum((1, 2)) + replaced.sum((1, 2)) * BLOCK * correct
    np.testing.assert_allclose(np.asarray(found.density_BH)[0], pairs / seen.sum(), rtol=1e-6)


def test_everything_is_dense_and_given_means_are_used() -> None:
    """A threshold of 0 gives dense attention, density and recall 1. Means that are given equal those that are made."""
    own, k, v = inputs(draw(), 1)
    out, lse, found = attend(own, k, v, PooledBlocks(threshold=0.0))
    want, want_lse = kernels.decode_attention(own[0].q_BTHd, k, v, own[0].mask, scale=SCALE)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    for share in (found.density_BH, found.audit_recall_BH):
        np.testing.assert_allclose(share, 1.0, atol=1e-5)
    means = sparse.block_means(k), sparse.block_means(v)
    given = attend(own, k, v, PATTERN, means=means)
    made = attend(own, k, v, PATTERN)
    assert (given[0] == made[0]).all()
    new = sparse.block_means(k[:, :, SLOT : SLOT + T])
    np.testing.assert_array_equal(new, means[0][:, :, SLOT // BLOCK : (SLOT + T) // BLOCK])


def test_overflow_is_counted() -> None:
    """Lists that are too short keep what is always visited and the greatest scores, and the rest becomes means."""
    own, k, v = inputs(draw(), 1)
    pattern = PooledBlocks(0.0, 100, 200)
    scores, _ = model_scores(own, k, pattern.stride)
    visited, replaced = visits(own, k, pattern, 6)
    visible = (np.arange(0, S, BLOCK) < SLOT + BLOCK * np.arange(1, T // BLOCK + 1)[:, None]).sum(1)
    assert (visited.sum(2) == 6).all()
    assert ((visited | replaced).sum(2) == visible).all()
    for h, n in np.ndindex(*visited.shape[:2]):
        free = visited[h, n] & (scores[h, n] > 0)
        free[:2], free[(SLOT + n * BLOCK - 200) // BLOCK :] = False, False
        assert scores[h, n][replaced[h, n]].max() <= scores[h, n][free].min(initial=np.inf) + 1e-4
    found = attend(own, k, v, pattern, max_pieces=6)[2]
    assert (np.asarray(found.pieces_cut_BH) == (visible - 6).sum()).all()


@pytest.mark.draw(1)
@pytest.mark.parametrize(("parts", "capacity"), [(1, 6), (3, S // BLOCK)])
def test_the_last_queries_see_all_keys(parts: int, capacity: int) -> None:
    """The tiles that hold some of the last queries of a prompt attend as dense attention does, also where lists are too
    short, and all that they see counts as visited. The other tiles attend as ever, bit for bit."""
    rng = draw()
    own, k, v = inputs(rng, parts)
    pattern = dataclasses.replace(PATTERN, threshold=0.9, last=int(rng.integers(1, 300)))
    want, want_lse = kernels.merge([kernels.decode_attention(p.q_BTHd, k, v, p.mask, scale=SCALE) for p in own])
    _, replaced = visits(own, k, pattern, capacity)
    pairs = (np.arange(SLOT, SLOT + T) + 1 - 40).sum()
    out, lse, without = attend(own, k, v, dataclasses.replace(pattern, last=0), max_pieces=capacity)
    compiled = attend._cache_size()
    # Ends within the chunk, at its end, shortly behind it, and in a later chunk.
    for end in (int(rng.integers(1, T)), T, T + int(rng.integers(pattern.last)), 2 * T + pattern.last):
        row = np.arange(T) // BLOCK * BLOCK
        is_dense = (row + BLOCK > end - pattern.last) & (row < end)
        got, got_lse, found = attend(own, k, v, pattern, end=SLOT + end, max_pieces=capacity)
        np.testing.assert_allclose(got[:, is_dense], want[:, is_dense], atol=2e-5)
        np.testing.assert_allclose(got_lse[..., is_dense], want_lse[..., is_dense], atol=2e-5)
        np.testing.assert_array_equal(got[:, ~is_dense], out[:, ~is_dense])
        np.testing.assert_array_equal(got_lse[..., ~is_dense], lse[..., ~is_dense])
        assert (np.asarray(found.pieces_cut_BH) <= np.asarray(without.pieces_cut_BH)).all()
        skipped = replaced[:, ~is_dense[::BLOCK]].sum((1, 2)) * BLOCK * (BLOCK - 1)
        np.testing.assert_allclose(np.asarray(found.density_BH)[0], 1 - skipped / pairs, rtol=1e-6)
    # The end is traced.
    assert attend._cache_size() == compiled + 1


def test_dense_tiles_hold_the_last_queries() -> None:
    """Of any chunk: a tile is dense if one of its rows is among the last of the prompt, and lies in the window."""
    rng = draw()
    for _ in range(200):
        N, last, end = (int(rng.integers(1, n)) for n in (9, 1500, 3000))
        made = pooled_blocks.dense_tiles(N * BLOCK, last, jnp.int32(end))
        row = np.arange(N * BLOCK)
        want = ((end - last <= row) & (row < end)).reshape(N, BLOCK).any(1)
        assert (np.asarray(made.is_dense_N) == want).all()
        first, tile = int(made.first), np.flatnonzero(want)
        assert 0 <= first <= N * BLOCK - made.rows
        assert ((first <= tile * BLOCK) & ((tile + 1) * BLOCK <= first + made.rows)).all()
        assert made.rows <= last + 2 * BLOCK
