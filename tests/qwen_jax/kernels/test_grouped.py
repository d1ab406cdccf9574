"""Grouped products: what every implementation guarantees, and which one is selected."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.grouped import grouped_matmul, select_grouped
from qwen_jax.kernels.select import log_once
from tests.helpers.platforms import as_if_on

SIZES = {
    "even": (70, [10] * 7),
    "empty groups": (64, [0, 30, 0, 0, 34, 0]),
    "all in one": (200, [0, 200, 0]),
    "one row": (1, [0, 0, 1]),
    "none": (5, [0, 0]),
    "rows of no group": (150, [65, 1, 20]),
    "tiles and a bit": (300, [64, 65, 63, 108]),
}


@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients_equal_a_loop_over_groups(name: str) -> None:
    """In float64, up to float32 rounding. Rows of no group hold NaN and have no effect; their results are zero."""
    M, sizes = SIZES[name]
    rng = np.random.default_rng()
    N, K, used = 24, 40, sum(sizes)
    x, dout = rng.normal(size=(M, K)), rng.normal(size=(M, N))
    w = rng.normal(size=(len(sizes), N, K))
    x[used:] = dout[used:] = np.nan
    want, dx, dw, first = np.zeros((M, N)), np.zeros((M, K)), np.zeros_like(w), 0
    for g, size in enumerate(sizes):
        rows = slice(first, first + size)
        want[rows], dx[rows], dw[g] = x[rows] @ w[g].T, dout[rows] @ w[g], dout[rows].T @ x[rows]
        first += size

    f32 = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    run = lambda x, w: grouped_matmul(x, w, jnp.array(sizes, jnp.int32), implementation="tiles")  # noqa: E731
    got, pull = jax.vjp(jax.jit(run), f32(x), f32(w))
    for mine, wanted in zip((got, *pull(f32(dout))), (want, dx, dw), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-5 * max(np.abs(wanted).max(), 1))


def test_the_gradient_of_the_matrices_is_summed_in_float32() -> None:
    """In bfloat16 the sum of very many equal rows would stop growing."""
    x, w = jnp.ones((2048, 8), jnp.bfloat16), jnp.ones((1, 8, 8), jnp.bfloat16)
    _, pull = jax.vjp(lambda w: grouped_matmul(x, w, jnp.array([2048], jnp.int32)), w)
    assert (pull(jnp.ones((2048, 8), jnp.bfloat16))[0] == 2048).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((4, 8), (2, 6, 7), (2,)), r"need rows \[M, K\], matrices \[G, N, K\] and sizes \[G\]; got \(4, 8\)"),
        (((4, 8), (2, 6, 8), (3,)), r"sizes \[G\]; got"),
        (((8,), (2, 6, 8), (2,)), r"need rows \[M, K\]"),
    ],
)
def test_shapes_that_do_not_match_are_refused(arguments: Any, says: str) -> None:
    x, w, sizes = arguments
    with pytest.raises(InputError, match=says):
        grouped_matmul(jnp.zeros(x), jnp.zeros(w), jnp.zeros(sizes, jnp.int32))


def test_dtypes_that_do_not_match_are_refused() -> None:
    x, w = jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros((2, 6, 8))
    with pytest.raises(InputError, match="of one dtype, and int32 sizes; got bfloat16, float32 and int32"):
        grouped_matmul(x, w, jnp.zeros((2,), jnp.int32))
    with pytest.raises(InputError, match="int32 sizes; got float32, float32 and float32"):
        grouped_matmul(jnp.zeros((4, 8)), w, jnp.zeros((2,)))


@pytest.mark.parametrize(
    ("where", "dtype", "sizes", "chosen"),
    [
        ("CPU", "bfloat16", (256, 128), "tiles"),
        ("Hopper GPU", "bfloat16", (256, 64), "gpu"),
        ("Hopper GPU", "bfloat16", (256, 72), "tiles"),
        ("Hopper GPU", "float32", (256, 64), "tiles"),
        ("TPU", "bfloat16", (256, 128), "tpu"),
        ("TPU", "bfloat16", (256, 64), "tiles"),
    ],
)
def test_auto_selects_what_can_run_and_warns_if_it_is_slow(
    where: str, dtype: str, sizes: tuple[int, int], chosen: str, caplog: Any
) -> None:
    log_once.cache_clear()
    with as_if_on(where), caplog.at_level(logging.INFO, "qwen_jax"):
        assert select_grouped("auto", dtype, *sizes) == chosen
        assert select_grouped("auto", dtype, *sizes) == chosen
    (record,) = caplog.records
    slow = chosen == "tiles" and where != "CPU"
    assert record.levelno == (logging.WARNING if slow else logging.INFO)
    assert ("slow here" in record.message) == slow


def test_what_cannot_run_is_refused_with_its_needs() -> None:
    with pytest.raises(
        InputError, match=r"by gpu needs a Hopper GPU; got matrices .* on cpu\. Use implementation='tiles'"
    ):
        select_grouped("gpu", "bfloat16", 128, 128)
    with pytest.raises(InputError, match="needs a TPU and bfloat16 and sizes that are multiples of 128"):
        select_grouped("tpu", "float32", 100, 128)
    with pytest.raises(InputError, match="Unknown grouped product implementation 'triton': use auto, gpu, tpu"):
        select_grouped("triton", "bfloat16", 128, 128)
