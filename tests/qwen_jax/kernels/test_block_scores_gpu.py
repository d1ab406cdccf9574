"""The kernel for Hopper GPUs that scores blocks of keys: on a GPU, and small ones in the interpreter.

The implementation by XLA is tested in tests/qwen_jax/attention/test_pooled_blocks.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import platform
from qwen_jax.attention.pooled_blocks import block_scores
from qwen_jax.errors import InputError
from qwen_jax.kernels.attention import block_scores_gpu
from tests.helpers.gpu_interpreter import CAN_INTERPRET, interpreted

on_hopper = pytest.mark.skipif(not platform.on_hopper(), reason="needs a Hopper GPU")
interpreter = pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")

run = jax.jit(functools.partial(block_scores, implementation="gpu"), static_argnames="scale")

# Rows, tiles, queries of a tile, query heads, key/value heads, head_dim, blocks, parts, dtype.
CASES = [
    (1, 256, 16, 28, 4, 128, 7813, 3, "bfloat16"),
    (2, 21, 16, 4, 2, 64, 700, 3, "bfloat16"),
    (1, 5, 128, 7, 1, 128, 1001, 3, "float16"),
    (1, 70, 8, 2, 2, 128, 520, 2, "bfloat16"),
    (2, 3, 64, 4, 2, 64, 129, 1, "bfloat16"),
    (1, 9, 32, 2, 1, 128, 5, 1, "float16"),
    (1, 64, 128, 28, 4, 128, 4000, 1, "bfloat16"),
]
# A tile has 128, 16 or 8 queries: strides 1, 8 and 16. Groups of 256 rows and tiles of means are not whole.
SMALL = [
    (1, 3, 128, 1, 1, 64, 200, 3, "bfloat16"),
    (1, 20, 16, 2, 1, 64, 150, 1, "bfloat16"),
    (2, 10, 16, 2, 2, 64, 150, 3, "float16"),
    (1, 34, 8, 1, 1, 64, 140, 3, "bfloat16"),
]


@pytest.fixture
def numbers(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)  # pytest shows it if the test fails.
    return np.random.default_rng(seed)


def inputs(numbers: np.random.Generator, case, ranges: str):
    """Queries of each part, means, and ranges.

    "aligned": the ranges of all tiles are about equal, as in dual-chunk attention. "any": the ranges of a part overlap
    those of other parts of other tiles, in any order, and some are empty.
    """
    B, N, rows, H, K, d, J, P, dtype = case
    queries = [jnp.asarray(numbers.standard_normal((B, N * rows, H, d)), dtype) for _ in range(P)]
    means = jnp.asarray(numbers.standard_normal((B, K, J, d)), dtype)
    if ranges == "aligned":
        cuts = np.sort(numbers.integers(0, J - min(J - 1, N) + 1, (P + 1, B, 1)), axis=0)
        cuts = cuts + np.where(np.arange(P + 1) == P, np.arange(N)[:, None] * min(J - 1, N) // N, 0).T[:, None]
    else:
        cuts = np.sort(numbers.integers(0, J + 1, (P + 1, B, N)), axis=0)
    first, end = cuts[:-1].copy(), cuts[1:].copy()
    if ranges == "any":
        # An empty range may begin after its end. One tile scores nothing.
        empty = numbers.random(first.shape) < 0.2
        first, end = np.where(empty, end, first), np.where(empty, first, end)
        first[:, :, N // 2] = end[:, :, N // 2] = J // 2
        order = numbers.permutation(P)
        first, end = first[order], end[order]
    return queries, means, first, end


def exact_scores(queries, means, first, end, scale: float) -> np.ndarray:
    """Scores in float64, one query head at a time."""
    (B, T, H, _), (K, J), (P, _, N) = queries[0].shape, means.shape[1:3], first.shape
    j, scores = np.arange(J), np.zeros((B, H, N, J))
    scored = (first[..., None] <= j) & (j < end[..., None])
    assert scored.sum(0).max() <= 1
    for b, h in np.ndindex(B, H):
        k = np.asarray(means[b, h // (H // K)], np.float64)
        logits = np.full((N, T // N, J), -np.inf)
        for p in range(P):
            product = (np.asarray(queries[p][b, :, h], np.float64) @ k.T).reshape(logits.shape) * scale
            logits = np.where(scored[p, b][:, None], product, logits)
        top = logits.max(axis=2, keepdims=True)
        scores[b, h] = np.exp(logits - np.where(np.isneginf(top), 0, top)).sum(axis=1)
    return scores


@on_hopper
@pytest.mark.parametrize("ranges", ["aligned", "any"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores(case, ranges, numbers) -> None:
    """Against float64 for a few heads, and against XLA for all. The second run gives the same bits."""
    queries, means, first, end = inputs(numbers, case, ranges)
    bounds = jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)
    got = np.asarray(run(queries, means, *bounds, scale=0.1))
    np.testing.assert_array_equal(got, np.asarray(run(queries, means, *bounds, scale=0.1)))
    by_xla = jax.jit(functools.partial(block_scores, scale=0.1, implementation="xla"))
    np.testing.assert_allclose(got, by_xla(queries, means, *bounds), rtol=1e-3, atol=1e-5)
    H, K = queries[0].shape[2], means.shape[1]
    group, last = H // K, K - 1
    want = exact_scores([q[:, :, -group:][:, :, :1] for q in queries], means[:, last:], first, end, 0.1)
    np.testing.assert_allclose(got[:, last * group : last * group + 1], want, rtol=1e-3, atol=1e-5)


@interpreter
@pytest.mark.parametrize(("case", "ranges"), [(SMALL[0], "aligned"), *((case, "any") for case in SMALL)], ids=str)
def test_scores_in_the_interpreter(case, ranges, numbers) -> None:
    """Against float64. A thread block has several turns, and every barrier is waited for as often as it is arrived at:
    otherwise the interpreter would not end."""
    queries, means, first, end = inputs(numbers, case, ranges)
    bounds = jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)
    with interpreted(1):
        got = block_scores_gpu.scores(queries, means, *bounds, 0.125)
    np.testing.assert_allclose(got, exact_scores(queries, means, first, end, 0.125), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "d"), [(8, 128), (16, 64), (16, 128), (128, 128)])
def test_it_lowers(rows, d) -> None:
    """For a GPU, without one."""
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 6 * rows, 4, d), (1, 2, 300, d)))
    bounds = jax.ShapeDtypeStruct((3, 1, 6), jnp.int32)
    lowered = block_scores_gpu.scores.trace([q] * 3, k, bounds, bounds, 0.1).lower(lowering_platforms=("cuda",))
    assert "block_scores" in lowered.as_text()


@pytest.mark.skipif(platform.on_hopper(), reason="a Hopper GPU has the kernel")
def test_the_kernel_cannot_be_had_elsewhere(numbers) -> None:
    """The message says what is missing and what to use."""
    queries, means, first, end = inputs(numbers, SMALL[0], "any")
    with pytest.raises(InputError, match=r"needs a Hopper GPU.*implementation='xla'"):
        block_scores(queries, means, jnp.asarray(first), jnp.asarray(end), scale=0.1, implementation="gpu")
