"""Sparse prefill is attention over a reported subset of what the masks permit, and all of it at full budgets."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.attention import sparse, sparse_parts
from qwen_jax.attention.sparse import Part, PooledBlocks, Tiling, VerticalSlash
from qwen_jax.errors import InputError

GPU, TPU = Tiling(128, 64, 8), Tiling()
B, H, K, T, S, D, SCALE = 2, 4, 2, 256, 1024, 16, 0.3
LINES = VerticalSlash(((S,) * H,), ((S,) * H,))


def draw() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


def cache(rng: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values with a few keys that attract all queries."""
    q = rng.normal(size=(B, T, H, D)).astype(np.float32)
    k, v = rng.normal(size=(2, B, K, S, D)).astype(np.float32)
    k[:, :, rng.integers(0, S, 9)] += 2 * q.mean((0, 1, 2))
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)


@functools.partial(jax.jit, static_argnames=("pattern", "tiling", "measure", "max_pieces", "max_columns"))
def attend(parts: list[Part], k: jax.Array, v: jax.Array, pattern: Any, **options: Any) -> Any:
    return sparse.attend(parts, k, v, pattern, scale=SCALE, **options)


def chunk_masks(low: np.ndarray, slot: int, chunk: int) -> list[kernels.Mask]:
    """Masks of dual-chunk attention: the own chunk, the chunk before and older ones, for rows that begin at `low`."""
    p = slot + np.arange(T) - low[:, None]
    start = p // chunk * chunk
    ends = np.where(p >= 0, p + 1, 0)
    edges = [np.zeros_like(p), np.maximum(start - chunk, 0), np.maximum(start, 0), ends]
    return [
        kernels.Mask(*(jnp.asarray(np.minimum(x, ends) + low[:, None], jnp.int32) for x in edges[i : i + 2]))
        for i in (2, 1, 0)
    ]


def test_full_budgets_are_dense() -> None:
    """With all columns or all slashes the result equals dense attention, and density and recall are 1. Left padding
    is not seen."""
    rng = draw()
    q, k, v = cache(rng)
    slot, low = 640, jnp.asarray([0, 100], jnp.int32)
    mask = kernels.cache_mask(low, jnp.int32(slot), T)
    want, want_lse = kernels.decode_attention(q, k, v, mask, scale=SCALE)
    part = Part(q, mask, q[:, -sparse.PROBE_ROWS :])
    for budgets in ((S, 0), (0, S), (S, S)):
        both = jnp.full((H, 2), jnp.asarray(budgets), jnp.int32)
        out, lse, found = attend([part], k, v, LINES, slot=slot, length=T, budgets_H2=both, tiling=GPU)
        np.testing.assert_allclose(out, want, atol=3e-6)
        np.testing.assert_allclose(lse, want_lse, atol=3e-6)
        for share in (found.density_BH, found.audit_recall_BH):
            np.testing.assert_allclose(share, 1.0, atol=1e-5)
        assert (np.asarray(found.pieces_cut_BH) == 0).all()
        assert (np.asarray(found.columns_cut_BH) == 0).all()


@pytest.mark.parametrize("tiling", [GPU, TPU], ids=str)
def test_pairs_are_counted_once(tiling: Tiling) -> None:
    """Where all logits are zero, the log-sum-exp is the logarithm of the number of visited pairs, and values of one
    give one. So density is exact. Three parts with equal queries visit the same pairs as one part, where chunks end
    inside tiles."""
    rng = draw()
    q, k, v = cache(rng)
    slot, low = int(rng.integers(512, S - T)), np.array([0, 77])
    # The first dimension is for choosing keys only.
    k, v = jnp.zeros_like(k).at[..., 0].set(3 * k[..., 0]), jnp.ones_like(v)
    critical = q[:, -sparse.PROBE_ROWS :]
    q = q.at[..., 0].set(0)
    budgets = jnp.asarray(rng.integers(1, 250, (H, 2)), jnp.int32).at[0].set(jnp.asarray([20, 5]))
    mask = kernels.cache_mask(jnp.asarray(low, jnp.int32), jnp.int32(slot), T)
    options = {"slot": slot, "length": T, "budgets_H2": budgets, "tiling": tiling}
    out, lse, found = attend([Part(q, mask, critical)], k, v, LINES, **options)
    np.testing.assert_allclose(out, 1.0, atol=1e-5)
    counts = np.exp(np.asarray(lse, np.float64))
    np.testing.assert_allclose(counts, counts.round(), rtol=1e-5)
    visible = (np.asarray(mask.k_end_BT) - np.asarray(mask.k_start_BT)).sum(1)
    np.testing.assert_allclose(np.asarray(found.density_BH), counts.round().sum(2) / visible[:, None], rtol=1e-6)
    assert np.asarray(found.density_BH).min() < 0.9
    if tiling == TPU:
        return
    parts = [Part(q, mask, critical) for mask in chunk_masks(low, slot, chunk=200)]
    three, three_lse, other = attend(parts, k, v, LINES, **options)
    np.testing.assert_allclose(three_lse, lse, atol=1e-5)
    np.testing.assert_allclose(three, 1.0, atol=1e-5)
    np.testing.assert_array_equal(other.density_BH, found.density_BH)


def test_parts_have_their_own_queries() -> None:
    """With full lists, parts with different queries give dense attention whose logits come from the part of each key.
    Keys are chosen by the critical queries: what these attract is visited."""
    rng = draw()
    _, k, v = cache(rng)
    slot, low = 700, np.array([0, 50])
    masks = chunk_masks(low, slot, chunk=300)
    queries = [jnp.asarray(rng.normal(size=(B, T, H, D)), jnp.float32) for _ in masks]
    dense = [kernels.decode_attention(q, k, v, m, scale=SCALE) for q, m in zip(queries, masks, strict=True)]
    want, want_lse = kernels.merge(dense)
    full = jnp.full((H, 2), S, jnp.int32)
    parts = [Part(q, m, q[:, -sparse.PROBE_ROWS :]) for q, m in zip(queries, masks, strict=True)]
    out, lse, found = attend(parts, k, v, LINES, slot=slot, length=T, budgets_H2=full, tiling=GPU)
    np.testing.assert_allclose(out, want, atol=3e-6)
    np.testing.assert_allclose(lse, want_lse, atol=3e-6)
    np.testing.assert_allclose(found.audit_recall_BH, 1.0, atol=1e-5)
    # One key in the oldest part attracts the critical queries, and no other query.
    target, direction = 60, np.zeros(D, np.float32)
    direction[0] = 30
    k = k.at[..., 0].set(0).at[:, :, target].set(direction)
    queries = [q.at[..., 0].set(0) for q in queries]
    critical = jnp.zeros((B, sparse.PROBE_ROWS, H, D)).at[..., 0].set(1)
    budgets = jnp.tile(jnp.asarray([[31, 1]], jnp.int32), (H, 1))
    lone = v.at[:].set(0).at[:, :, target].set(1)
    for chosen in (jnp.zeros_like(critical), critical):
        parts = [Part(q, m, chosen) for q, m in zip(queries, masks, strict=True)]
        out = attend(parts, k, lone, LINES, slot=slot, length=T, budgets_H2=budgets, tiling=GPU)[0]
        assert (np.asarray(out)[1] > 0).all()  # Row 1 begins at slot 50, so that 60 is one of its first 30 keys.
        assert (np.asarray(out)[0] > 0).all() == chosen.any()


def test_recall_grows_with_budgets() -> None:
    """Recall and density are within [0, 1] and do not fall when budgets grow; budgets of zero visit nothing."""
    rng = draw()
    q, k, v = cache(rng)
    slot = 768
    mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(slot), T)
    before: list[np.ndarray] = [np.zeros((B, H))] * 2
    for n in (0, 1, 40, 150, 400, S):
        budgets = jnp.full((H, 2), n, jnp.int32)
        part = Part(q, mask, q[:, -sparse.PROBE_ROWS :])
        out, lse, found = attend([part], k, v, LINES, slot=slot, length=T, budgets_H2=budgets, tiling=GPU)
        now = [np.asarray(x) for x in (found.audit_recall_BH, found.density_BH)]
        for old, new in zip(before, now, strict=True):
            assert (new >= old - 1e-6).all()
            assert (new <= 1 + 1e-6).all()
        if n == 0:
            assert (np.asarray(out) == 0).all()
            assert (np.asarray(lse) == -np.inf).all()
            assert max(x.max() for x in now) == 0
        before = now
    np.testing.assert_allclose(now, 1.0, atol=1e-5)


@pytest.mark.parametrize("length", [5, 100])
def test_padded_chunks(length: int) -> None:
    """Rows of padding at the end of a chunk, and fewer rows than probes, do not change what the real rows get: the
    same as with other rubbish in the padding."""
    rng = draw()
    q, k, v = cache(rng)
    slot = 512
    mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(slot), T)
    budgets = jnp.asarray(rng.integers(1, 200, (H, 2)), jnp.int32)
    other = q.at[:, length:].set(1), *(x.at[:, :, slot + length :].set(2) for x in (k, v))
    results = [
        attend([Part(q, mask)], k, v, LINES, slot=slot, budgets_H2=budgets, length=length, tiling=GPU, measure=True)
        for q, k, v in ((q, k, v), other)
    ]
    for one, two in zip(results[0][:2], results[1][:2], strict=True):
        one, two = (x if x.ndim == 4 else jnp.swapaxes(x, 1, 2)[..., None] for x in (one, two))
        np.testing.assert_allclose(one[:, :length], two[:, :length], atol=1e-6)
    np.testing.assert_allclose(results[0][2].audit_recall_BH, results[1][2].audit_recall_BH, atol=1e-6)


@pytest.mark.parametrize("pattern", [LINES, PooledBlocks()], ids=["lines", "blocks"])
def test_one_program(pattern: Any) -> None:
    """Offsets, lengths and budgets are traced: one compilation. Recall is not there if it is not measured."""
    rng = draw()
    q, k, v = cache(rng)
    before, measure = attend._cache_size(), pattern is LINES
    for slot, length in ((0, T), (256, 200), (768, 3)):
        mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(slot), T)
        budgets = jnp.asarray(rng.integers(0, 99, (H, 2)), jnp.int32)
        options = {"slot": slot, "length": length, "budgets_H2": budgets, "tiling": GPU, "measure": measure}
        found = attend([Part(q, mask)], k, v, pattern, **options)[2]
        assert (found.audit_recall_BH is not None) == measure
    assert attend._cache_size() <= before + 1


@pytest.mark.parametrize("pattern", [VerticalSlash(((200, 100),), ((9, 9),)), PooledBlocks()], ids=["lines", "blocks"])
def test_no_array_of_all_pairs(monkeypatch: pytest.MonkeyPatch, pattern: Any) -> None:
    """Choosing keys needs no array with an element for each pair of a query and a key, nor one that is as large."""
    length, slots = 2048, 8192

    def stub(q: jax.Array, *_: Any, **__: Any) -> tuple[jax.Array, jax.Array]:
        return q, q.sum(3).swapaxes(1, 2)

    for name in ("sparse_attention", "column_attention", "decode_attention"):
        monkeypatch.setattr(kernels, name, stub)
    monkeypatch.setattr("qwen_jax.attention.pooled_blocks._BYTES", 2**22)
    monkeypatch.setattr("qwen_jax.attention.vertical_slash._BYTES", 2**22)

    def run(q: jax.Array, k: jax.Array, slot: jax.Array) -> Any:
        mask = kernels.cache_mask(jnp.zeros(1, jnp.int32), slot, length)
        budgets = jnp.ones((2, 2), jnp.int32)
        return sparse.attend(
            [Part(q, mask)], k, k, pattern, slot=slot, budgets_H2=budgets, scale=1.0, tiling=GPU, max_pieces=128
        )

    q, k = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((1, length, 2, 8), (1, 1, slots, 8)))
    text = jax.jit(run).lower(q, k, jnp.int32(0)).as_text()
    sizes = [math.prod(map(int, x.split("x")[:-1])) for x in re.findall(r"tensor<((?:\d+x)+\w+)>", text)]
    assert len(sizes) > 100
    assert max(sizes) < length * slots


@pytest.mark.parametrize("parts", [1, 3])
def test_rows_over_ranges_of_keys(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """The log-sum-exp of a few rows does not depend on the number of ranges into which their keys are split, also where
    a row sees nothing. Audit rows are rows of the chunk, spread over it."""
    rng = draw()
    q, k, v = cache(rng)
    slot, low = 600, np.array([0, 650])
    masks = chunk_masks(low, slot, chunk=250)[:parts]
    rows = jnp.concatenate([sparse.probe_rows(jnp.int32(40)), sparse_parts.audit_rows(jnp.int32(slot), jnp.int32(T))])
    audit = np.asarray(rows)[sparse.PROBE_ROWS :]
    assert (audit * sparse.AUDIT_ROWS // T == np.arange(sparse.AUDIT_ROWS)).all()
    queries = [sparse_parts.take_rows(q, rows)] * parts
    of_rows = [sparse_parts.mask_rows(mask, rows) for mask in masks]
    found = []
    for size in (8192, 64):
        monkeypatch.setattr(sparse_parts, "_RANGE", size)
        found.append(sparse_parts.rows_lse(queries, of_rows, k, v, scale=SCALE, implementation="reference"))
    assert (np.asarray(found[0])[:, :, :24] == -np.inf).all()
    assert np.isfinite(np.asarray(found[0])[0, :, 24:]).all()
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_wrong_arguments() -> None:
    """Errors say what was expected."""
    q, k, v = cache(draw())
    mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(0), T)
    run = functools.partial(sparse.attend, slot=0, scale=SCALE)
    budgets = jnp.ones((H, 2), jnp.int32)
    with pytest.raises(InputError, match="at least one part"):
        run([], k, v, LINES)
    with pytest.raises(InputError, match=r"needs budgets \[4, 2\]"):
        run([Part(q, mask)], k, v, LINES)
    with pytest.raises(InputError, match="whole tiles"):
        run([Part(q[:, :100], mask)], k, v, LINES, budgets_H2=budgets)
    with pytest.raises(InputError, match="a multiple of 128 slots"):
        run([Part(q, mask)], k[:, :, :1000], v[:, :, :1000], LINES, budgets_H2=budgets)
    with pytest.raises(InputError, match="within the 1024 slots"):
        run([Part(q, mask)], k, v, LINES, budgets_H2=budgets, slot=900)
    with pytest.raises(InputError, match="the same queries"):
        run([Part(q, mask, q)], k, v, LINES, budgets_H2=budgets)
