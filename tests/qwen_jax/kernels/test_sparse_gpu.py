"""The sparse attention kernels for Hopper GPUs: on a GPU, and small ones in the interpreter where jax can run it.

What needs neither is in test_sparse_attention.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import platform
from qwen_jax.kernels import KeyLists, Mask, column_attention, merge, sparse_attention
from qwen_jax.kernels.attention import flash_gpu, sparse_gpu
from tests.helpers import exact
from tests.helpers.gpu_interpreter import CAN_INTERPRET, interpreted
from tests.helpers.lists import (
    exact_attention,
    full_lists,
    random_lists,
    random_places,
    seen_columns,
    seen_interval,
)
from tests.helpers.masks import MASKS, anything, causal, window

on_hopper = pytest.mark.skipif(not platform.on_hopper(), reason="needs a Hopper GPU")
interpreter = pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")

run = jax.jit(functools.partial(sparse_attention, implementation="gpu"), static_argnames="scale")
run_columns = jax.jit(
    functools.partial(column_attention, implementation="gpu"), static_argnames=("scale", "bias", "rows")
)

# Queries, keys, query heads, key/value heads, head_dim, dtype. Lengths are multiples of a tile, of 8, or of nothing.
CASES = [
    (300, 900, 4, 2, 64, "bfloat16"),
    (257, 1001, 7, 1, 128, "float16"),
    (128, 129, 2, 2, 128, "bfloat16"),
    (1, 40, 4, 4, 64, "float16"),
    (640, 2048, 28, 4, 128, "bfloat16"),
    (500, 1500, 28, 4, 64, "bfloat16"),
]


@pytest.fixture
def numbers(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)  # pytest shows it if the test fails.
    return np.random.default_rng(seed)


def inputs(numbers: np.random.Generator, case, keys: int | None = None, kv_heads: int | None = None):
    T, S, H, K, d, dtype = case
    shapes = (2, T, H, d), *[(2, kv_heads or K, keys or S, d)] * 2
    return [jnp.asarray(numbers.standard_normal(s), dtype) for s in shapes]


def check(got: tuple[jax.Array, jax.Array], want: tuple[np.ndarray, np.ndarray]) -> None:
    """Rows that see nothing have zeros and minus infinity; the others have the errors of dense attention's tests."""
    out, lse = jax.device_get(got)
    unseen = np.isneginf(want[1])
    assert (np.isneginf(lse) == unseen).all()
    assert not np.asarray(out, np.float32)[unseen.swapaxes(1, 2)].any()
    assert exact.relative(out, want[0]) < 1e-2
    assert np.abs(np.where(unseen, 0, lse) - np.where(unseen, 0, want[1])).max() < 1e-3


def same_bits(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@on_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_a_list_of_all_keys_gives_the_bits_of_dense_attention(case, mask, numbers) -> None:
    """Output and log-sum-exp."""
    T, S, H, _, d, _ = case
    (q, k, v), (start, end) = inputs(numbers, case), map(jnp.asarray, mask(numbers, 2, T, S))
    want = flash_gpu.attention(q, k, v, start, end, d**-0.5, True)
    same_bits(run(q, k, v, Mask(start, end), full_lists(2, H, T, S), scale=d**-0.5), want)


@on_hopper
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mask", [causal, window, anything])
def test_random_lists(size, case, mask, numbers) -> None:
    """Against float64; the second run gives the same bits."""
    T, S, H, _, d, _ = case
    (q, k, v), (start, end) = inputs(numbers, case), mask(numbers, 2, T, S)
    lists, covered = random_lists(numbers, 2, H, T, S, size=size)
    rows = Mask(jnp.asarray(start), jnp.asarray(end))
    got = run(q, k, v, rows, lists, scale=d**-0.5)
    check(got, exact_attention(q, k, v, covered & seen_interval(start, end, S), d**-0.5))
    same_bits(got, run(q, k, v, rows, lists, scale=d**-0.5))


@on_hopper
@pytest.mark.parametrize("size", [64, 128])
def test_lists_of_many_query_tiles_of_very_different_lengths(size, numbers) -> None:
    """Each thread block has several turns. Keys of zero count the visible pairs; values of one give one."""
    case = T, S, H, *_ = 2000, 4096, 28, 4, 128, "bfloat16"
    (q, k, v), (start, end) = inputs(numbers, case), causal(numbers, 2, T, S)
    lists, covered = random_lists(numbers, 2, H, T, S, size=size)
    out, lse = run(q, 0 * k, 0 * v + 1, Mask(jnp.asarray(start), jnp.asarray(end)), lists, scale=1.0)
    count = (covered & seen_interval(start, end, S)).sum(axis=3)
    np.testing.assert_allclose(np.exp(np.asarray(lse)), count, rtol=1e-4)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.broadcast_to((count > 0).swapaxes(1, 2)[..., None], out.shape), rtol=1e-2
    )


@on_hopper
@pytest.mark.parametrize(
    ("case", "shared", "C", "bias"),
    [
        (CASES[0], False, 300, 0.0),
        (CASES[1], False, 517, math.log(128)),
        (CASES[3], True, 8, 0.0),
        (CASES[4], True, 300, math.log(128)),
        (CASES[4], False, 1024, 0.0),
    ],
    ids=str,
)
def test_columns(case, shared, C, bias, numbers) -> None:
    """Columns of each query head or of each key/value head, in numbers that are no multiples of a tile."""
    T, S, H, K, d, _ = case
    q, k, v = inputs(numbers, case, keys=C, kv_heads=K if shared else H)
    (start, end), places = causal(numbers, 2, T, S), random_places(numbers, 2, H, T, C, S)
    args = q, k, v, Mask(jnp.asarray(start), jnp.asarray(end)), jnp.asarray(places)
    got = run_columns(*args, scale=d**-0.5, bias=bias)
    check(got, exact_attention(q, k, v, seen_columns(places, start, end), d**-0.5, bias))
    same_bits(got, run_columns(*args, scale=d**-0.5, bias=bias))


@on_hopper
def test_pieces_and_columns_merge_into_attention_over_their_keys(numbers) -> None:
    """Columns are every eighth key outside the pieces."""
    case = T, S, H, *_ = 300, 1024, 4, 2, 128, "bfloat16"
    (q, k, v), (start, end) = inputs(numbers, case), causal(numbers, 2, T, S)
    lists, covered = random_lists(numbers, 2, H, T, S, size=64)
    at = np.arange(0, S, 8)
    taken = covered[:, :, ::128, at]
    places = np.where(taken, 2**30, at).astype(np.int32)
    rows = Mask(jnp.asarray(start), jnp.asarray(end))
    parts = [
        run(q, k, v, rows, lists, scale=0.1),
        run_columns(q, k[:, :, at], v[:, :, at], rows, jnp.asarray(places), scale=0.1),
    ]
    both = covered.copy()
    both[..., at] = True
    check(merge(parts), exact_attention(q, k, v, both & seen_interval(start, end, S), 0.1))


@on_hopper
def test_what_a_list_does_not_count_has_no_effect(numbers) -> None:
    """Neither entries beyond the count, nor keys outside the pieces, change a bit."""
    case = T, S, H, *_ = 300, 1024, 4, 1, 128, "bfloat16"
    (q, k, v), (start, end) = inputs(numbers, case), causal(numbers, 2, T, S)
    lists, _ = random_lists(numbers, 2, 1, T, S, size=64)
    lists = KeyLists(*(jnp.repeat(x, H, axis=1) for x in (lists.starts_BHNL, lists.counts_BHN)), 128, 64)
    rows = Mask(jnp.asarray(start), jnp.asarray(end))
    first = run(q, k, v, rows, lists, scale=0.1)
    counted = jnp.arange(lists.starts_BHNL.shape[3]) < lists.counts_BHN[..., None]
    other = KeyLists(jnp.where(counted, lists.starts_BHNL, 8), lists.counts_BHN, 128, 64)
    same_bits(first, run(q, k, v, rows, other, scale=0.1))
    # The first tile of queries of each row: what its list lacks may be any finite number.
    used = np.zeros((2, S), bool)
    for b in range(2):
        for i in range(int(lists.counts_BHN[b, 0, 0])):
            used[b, int(lists.starts_BHNL[b, 0, 0, i]) :][:64] = True
    k, v = (jnp.where(used[:, None, :, None], x, x * 1e30) for x in (k, v))
    changed = run(q, k, v, rows, lists, scale=0.1)
    same_bits((first[0][:, :128], first[1][:, :, :128]), (changed[0][:, :128], changed[1][:, :, :128]))


SMALL = (200, 520, 2, 1, 64, "bfloat16")


def small(numbers: np.random.Generator, **sizes: int):
    """Inputs of one row, with four query tiles for three multiprocessors."""
    mask = MASKS[numbers.integers(len(MASKS))]
    return [x[:1] for x in inputs(numbers, SMALL, **sizes)], mask(numbers, 1, *SMALL[:2])


@interpreter
def test_a_list_of_all_keys_in_the_interpreter(numbers) -> None:
    """The bits of dense attention, and float64."""
    (q, k, v), (start, end) = small(numbers)
    args = q, k, v, jnp.asarray(start), jnp.asarray(end)
    with interpreted(3):
        want = flash_gpu.attention(*args, 0.125, True)
        got = sparse_gpu.attention(*args, full_lists(1, 2, *SMALL[:2]), 0.125)
    same_bits(got, want)
    check(got, exact_attention(q, k, v, seen_interval(start, end, SMALL[1]), 0.125))


@interpreter
@pytest.mark.parametrize("size", [64, 128])
def test_random_lists_in_the_interpreter(size, numbers) -> None:
    """Every barrier is waited for as often as it is arrived at: otherwise the interpreter would not end."""
    (q, k, v), (start, end) = small(numbers)
    lists, covered = random_lists(numbers, 1, 2, *SMALL[:2], size=size)
    with interpreted(3):
        got = sparse_gpu.attention(q, k, v, jnp.asarray(start), jnp.asarray(end), lists, 0.125)
    check(got, exact_attention(q, k, v, covered & seen_interval(start, end, SMALL[1]), 0.125))


@interpreter
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_columns_in_the_interpreter(kv_heads, numbers) -> None:
    (q, k, v), (start, end) = small(numbers, keys=300, kv_heads=kv_heads)
    places = random_places(numbers, 1, 2, SMALL[0], 300, SMALL[1])
    with interpreted(3):
        got = sparse_gpu.columns(q, k, v, jnp.asarray(start), jnp.asarray(end), jnp.asarray(places), 0.125, 1.5, 128)
    check(got, exact_attention(q, k, v, seen_columns(places, start, end), 0.125, 1.5))
