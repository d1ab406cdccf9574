"""Sums and log-sum-exps of probe rows on Hopper GPUs, and small ones in the interpreter where jax can run it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import platform
from qwen_jax.attention import sparse_parts, vertical_slash
from qwen_jax.errors import InputError
from qwen_jax.kernels import Mask
from qwen_jax.kernels.attention import probe_gpu, probe_lse_gpu
from tests.helpers.gpu_interpreter import CAN_INTERPRET, interpreted

on_hopper = pytest.mark.skipif(not platform.on_hopper(), reason="needs a Hopper GPU")
interpreter = pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")

R = 64
# Rows of the batch, keys, query heads, key/value heads, head_dim, dtype.
CASES = [
    (1, 20008, 28, 4, 128, "bfloat16"),
    (2, 1000, 4, 2, 64, "float16"),
    (1, 5000, 16, 2, 128, "bfloat16"),
    (2, 72, 3, 3, 128, "float16"),
    (3, 4096, 14, 2, 64, "bfloat16"),
]


@pytest.fixture
def numbers() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)  # pytest shows it if the test fails.
    return np.random.default_rng(seed)


def intervals(numbers: np.random.Generator, B: int, S: int, parts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Consecutive rows with padding on the left. Their keys are in parts, which begin at other places for later rows.
    Some rows see nothing."""
    end = int(numbers.integers(min(S // 2, 70), S))
    row_end = np.broadcast_to(np.arange(end - R, end) + 1, (B, R))
    low = np.broadcast_to(numbers.integers(0, max(end // 3, 1), (B, 1)), (B, R))
    step = (np.arange(R) >= numbers.integers(0, R)) * 40
    inner = [np.minimum(np.maximum(low, end * p // parts + step), row_end) for p in range(1, parts)]
    edges = [low, *inner, row_end]
    none = numbers.integers(0, R, 3)
    both = []
    for start, stop in itertools.pairwise(edges):
        stop = stop.copy()
        stop[:, none] = 0
        both.append((start.astype(np.int32), stop.astype(np.int32)))
    return both


def exact_sums(queries, k, bounds, scale):
    """Log-sum-exp [B, H, R], column sums [B, H, S] and diagonal sums [B, H, S + R - 1] in float64."""
    (B, K, S, _), H = k.shape, queries[0].shape[2]
    wide, j = np.repeat(np.asarray(k, np.float64), H // K, 1), np.arange(S)
    logits = np.full((B, H, R, S), -np.inf)
    for q, (start, end) in zip(queries, bounds, strict=True):
        seen = (start[..., None] <= j) & (j < end[..., None])
        product = np.einsum("brhd,bhsd->bhrs", np.asarray(q, np.float64), wide) * scale
        logits = np.where(seen[:, None], product, logits)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(logits).sum(-1))
    weights = np.exp(logits - np.where(np.isfinite(lse), lse, 0)[..., None])
    diagonals = np.zeros((B, H, S + R - 1))
    for r in range(R):
        diagonals[:, :, R - 1 - r : R - 1 - r + S] += weights[:, :, r]
    return lse, weights.sum(2), diagonals


def inputs(numbers: np.random.Generator, case, parts: int):
    B, S, H, K, d, dtype = case
    queries = [jnp.asarray(numbers.standard_normal((B, R, H, d)), dtype) for _ in range(parts)]
    return queries, jnp.asarray(numbers.standard_normal((B, K, S, d)), dtype), intervals(numbers, B, S, parts)


def check(got, want) -> None:
    """Columns have the errors of float32; diagonals add probabilities that are rounded to float16."""
    columns, diagonals = (np.asarray(x) for x in got)
    assert (columns.shape, diagonals.shape) == (want[0].shape, want[1].shape)
    np.testing.assert_allclose(columns, want[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(diagonals, want[1], rtol=2e-3, atol=4e-6)
    assert (columns[want[0] == 0] == 0).all()
    assert (diagonals[want[1] == 0] == 0).all()


def check_lse(got, want) -> None:
    got = np.asarray(got)
    assert (np.isneginf(got) == np.isneginf(want)).all()
    np.testing.assert_allclose(got[np.isfinite(want)], want[np.isfinite(want)], atol=1e-4)


@on_hopper
@pytest.mark.parametrize("rows", [64, 128, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_log_sum_exp(case, parts, rows, numbers) -> None:
    """Against float64, for one block of 64 rows, two, and a part of one; the second run gives the same bits."""
    queries, k, bounds = inputs(numbers, case, parts)
    lse, *_ = exact_sums(queries, k, bounds, 0.1)
    queries = [jnp.tile(q, (1, 2, 1, 1))[:, :rows] for q in queries]
    masks = [Mask(*(jnp.asarray(np.tile(x, (1, 2))[:, :rows]) for x in both)) for both in bounds]
    run = jax.jit(functools.partial(sparse_parts.rows_lse, scale=0.1, implementation="gpu"))
    got = run(queries, masks, k, k)
    check_lse(got, np.tile(lse, 2)[:, :, :rows])
    np.testing.assert_array_equal(got, run(queries, masks, k, k))


@on_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_sums(case, parts, numbers) -> None:
    """Against float64; the second run gives the same bits."""
    queries, k, bounds = inputs(numbers, case, parts)
    scale = case[4] ** -0.5
    lse, *want = exact_sums(queries, k, bounds, scale)
    run = jax.jit(functools.partial(vertical_slash.line_scores, scale=scale, implementation="gpu"))
    masks = [Mask(*map(jnp.asarray, x)) for x in bounds]
    got = run(queries, masks, jnp.asarray(lse, jnp.float32), k)
    check(got, want)
    for x, y in zip(got, run(queries, masks, jnp.asarray(lse, jnp.float32), k), strict=True):
        np.testing.assert_array_equal(x, y)


@on_hopper
def test_keys_that_no_row_sees_may_be_anything(numbers) -> None:
    """Even NaN."""
    (q,), k, ((start, end),) = inputs(numbers, CASES[1], 1)
    lse, *want = exact_sums([q], k, [(start, end)], 0.1)
    j = np.arange(k.shape[2])
    seen = ((start[..., None] <= j) & (j < end[..., None])).any(axis=1)
    k = jnp.where(seen[:, None, :, None], k, jnp.nan)
    check(probe_gpu.line_sums(q, k, start, end, jnp.asarray(lse, jnp.float32), 0.1), want)


@interpreter
@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ((2, 328, 4, 2, 64, "bfloat16"), 1),
        ((1, 456, 4, 2, 64, "float16"), 3),
        ((1, 136, 28, 4, 64, "bfloat16"), 1),
        ((1, 200, 8, 1, 128, "bfloat16"), 1),
    ],
    ids=str,
)
def test_sums_in_the_interpreter(case, parts, numbers) -> None:
    """Against float64, one part after the other. Of two rows of the batch, one sees nothing at all."""
    queries, k, bounds = inputs(numbers, case, parts)
    for _, end in bounds:
        end[1:] = 0
    lse, *want = exact_sums(queries, k, bounds, 0.125)
    with interpreted(3):
        sums = [
            probe_gpu.line_sums(q, k, start, end, jnp.asarray(lse, jnp.float32), 0.125)
            for q, (start, end) in zip(queries, bounds, strict=True)
        ]
        lses = [
            probe_lse_gpu.rows_lse(q, k, start, end, 0.125) for q, (start, end) in zip(queries, bounds, strict=True)
        ]
    check([sum(np.asarray(x) for x in both) for both in zip(*sums, strict=True)], want)
    check_lse(jax.nn.logsumexp(jnp.stack([jnp.asarray(x) for x in lses]), axis=0), lse)


def test_all_heads_of_published_models_fit() -> None:
    """Heads that share a block share the keys. A group is divided evenly."""
    assert [probe_gpu.heads_of_block(*x) for x in ((7, 64), (8, 64), (7, 128), (5, 128), (8, 128))] == [7, 8, 7, 5, 4]


@pytest.mark.parametrize(
    ("rows", "S", "d", "dtype"),
    [(63, 128, 64, "bfloat16"), (64, 129, 64, "bfloat16"), (64, 128, 32, "bfloat16"), (64, 128, 64, "float32")],
)
def test_what_the_kernel_cannot_do_is_an_error(rows, S, d, dtype) -> None:
    """Each argument alone."""
    q, k = jnp.zeros((1, rows, 4, d), dtype), jnp.zeros((1, 2, S, d), dtype)
    where = jnp.zeros((1, rows), jnp.int32)
    with pytest.raises(InputError, match="probe rows needs"):
        probe_gpu.line_sums(q, k, where, where, jnp.zeros((1, 4, rows)), 1.0)
    with pytest.raises(InputError, match="log-sum-exp kernel needs"):
        probe_lse_gpu.rows_lse(q, k, where, where, 1.0)
