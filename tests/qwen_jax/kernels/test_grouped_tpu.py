"""Grouped products on TPUs: numerics in TPU interpret mode, and the TPU compiler for every generation."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import grouped_tpu
from tests.helpers.tpu_compiler import TOPOLOGIES, compile_for, needs_libtpu

M, N, K = 300, 384, 256
# Several row tiles, column tiles and tiles of the gradient; the last ones are not full.
SMALL = {
    "product_tiling": lambda inner, columns, *_: grouped_tpu.Tiling(64, 32, 256, inner, 1, 0),
    "gradient_tiling": lambda outputs, inputs, *_: grouped_tpu.Tiling(64, 32, 256, 128, 1, 0),
}


@pytest.fixture(autouse=True)
def forget():
    """Small tiles. They are chosen when a function is traced, so the caches are cleared."""
    jax.clear_caches()


@pytest.fixture
def small(monkeypatch):
    for name, tiles in SMALL.items():
        monkeypatch.setattr(grouped_tpu, name, tiles)


@functools.partial(jax.jit, static_argnames="dtype")
def run(x, dy, w, sizes, dtype=jnp.bfloat16):
    """The product, and its gradients with respect to the rows and the weights."""
    return (
        grouped_tpu.product(x, w, sizes),
        grouped_tpu.product(dy, w, sizes, transposed=True),
        grouped_tpu.weights_gradient(dy, x, sizes, dtype=dtype),
    )


def interpreted(*args, **kwargs):
    """Runs in the interpreter, where memory holds NaN until it is written and reads out of bounds raise."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return [np.asarray(a, np.float32) for a in jax.device_get(run(*args, **kwargs))]


def drawn(sizes, rows=M, outputs=N, inputs=K):
    """Rows, gradients of the product, weights and sizes; rows of no group are NaN."""
    numbers, used = np.random.default_rng(), sum(sizes)
    x, dy, w = (
        jnp.asarray(numbers.standard_normal(shape), jnp.bfloat16)
        for shape in ((rows, inputs), (rows, outputs), (len(sizes), outputs, inputs))
    )
    return x.at[used:].set(jnp.nan), dy.at[used:].set(jnp.inf), w, jnp.asarray(sizes, jnp.int32)


def wanted(x, dy, w, sizes):
    """The same results, computed group by group in float32."""
    x, dy, w = (np.asarray(a, np.float32) for a in (x, dy, w))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    begin = 0
    for g, size in enumerate(np.asarray(sizes)):
        rows = slice(begin, begin + size)
        y[rows], dx[rows], dw[g] = x[rows] @ w[g].T, dy[rows] @ w[g], dy[rows].T @ x[rows]
        begin += size
    return y, dx, dw


def check(args, dtype=jnp.bfloat16) -> None:
    """Rounding to bfloat16 is 2^-9 of a number; float32 sums differ by about 1e-6 of their terms."""
    for got, want, exact in zip(
        interpreted(*args, dtype=dtype), wanted(*args), (0, 0, dtype == jnp.float32), strict=True
    ):
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0 if exact else 2**-8, atol=2e-5 * math.sqrt(M))


SIZES = {
    "even": [60] * 5,
    "some are empty": [0, 150, 0, 150, 0],
    "all in one": [0, 0, 0, 300, 0],
    "one row": [0, 0, 1, 0, 0],
    "one row of each": [1] * 5,
    "rows of no group": [100, 0, 37, 1, 62],
    "no rows": [0] * 5,
    "whole tiles": [64, 128, 0, 64, 44],
}


def test_routings(small) -> None:
    """Parity with float32 for all groups; rows of no group are zero, and so are gradients of empty groups."""
    for sizes in SIZES.values():
        check(drawn(sizes))
    numbers = np.random.default_rng()
    for _ in range(2):
        check(drawn(list(numbers.multinomial(numbers.integers(M + 1), numbers.dirichlet([0.5] * 5)))))


def test_without_fill_the_rows_after_the_last_group_are_not_written(small) -> None:
    """Rows of groups are bit-identical; the tiles after those of the last group are never written."""

    @jax.jit
    def unfilled(x, dy, w, sizes):
        return grouped_tpu.product(x, w, sizes, fill=False), grouped_tpu.product(
            dy, w, sizes, transposed=True, fill=False
        )

    for sizes in SIZES.values():
        args, used = drawn(sizes), sum(sizes)
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
            got = [np.asarray(a, np.float32) for a in jax.device_get(unfilled(*args))]
        for a, b in zip(got, interpreted(*args)[:2], strict=True):
            np.testing.assert_array_equal(a[:used], b[:used])
            assert np.isnan(a[-(-max(used, 1) // 64) * 64 :]).all()


def test_float32_gradient(small) -> None:
    check(drawn(SIZES["rows of no group"]), jnp.float32)


def test_the_tiling_of_a_real_core() -> None:
    """More than two row tiles, and a single row."""
    check(drawn([700, 3, 500], 1300, 256, 128))
    check(drawn([0, 1], 1, 128, 128))


def test_two_cores_share_the_columns(monkeypatch) -> None:
    """Each core begins with its own part; in the interpreter one runs after the other."""
    monkeypatch.setattr(
        grouped_tpu, "product_tiling", lambda inner, columns, *_: grouped_tpu.Tiling(64, 32, 128, inner, 2, 0)
    )
    monkeypatch.setattr(grouped_tpu, "gradient_tiling", lambda *_: grouped_tpu.Tiling(64, 32, 128, 256, 2, 0))
    check(drawn([90, 0, 110], 256, 512, 512))


def test_other_groups_change_no_bit(small) -> None:
    """NaN in one group changes no bit of the others."""
    x, dy, w, sizes = drawn([70, 50, 81, 0, 9])
    own = slice(70, 120)
    first = interpreted(x, dy, w, sizes)
    second = interpreted(x.at[own].set(jnp.nan), dy.at[own].set(-jnp.inf), w.at[1].set(jnp.nan), sizes)
    for a, b, at in zip(first, second, (own, own, 1), strict=True):
        assert np.isnan(b[at]).any()
        a[at] = b[at] = 0
        np.testing.assert_array_equal(a, b)


LANES = st.integers(1, 64).map(lambda n: 128 * n)


@settings(deadline=None, max_examples=300)
@given(LANES, LANES, st.sampled_from([(16, 128, 2), (128, 128, 1), (64, 128, 2), (128, 256, 1), (64, 256, 1)]))
def test_tiles_fit_and_cover(outputs, inputs, core) -> None:
    vmem, width, cores = core
    kind = (vmem << 20, width), cores
    found = grouped_tpu.gradient_tiling(outputs, inputs, *kind)
    assert found.vmem_bytes <= vmem * 3 << 18
    assert -(-outputs // found.columns) * -(-inputs // found.inner) % found.cores == 0
    try:
        found = grouped_tpu.product_tiling(inputs, outputs, *kind)
    except InputError:
        assert vmem == 16
        assert inputs > 4096
        return
    assert found.vmem_bytes <= vmem * 3 << 18
    assert found.rows % found.block == 0
    parts = -(-outputs // found.columns)
    assert parts % found.cores == 0
    assert (parts - 1) * found.columns < outputs
    assert found.columns % width == 0 or parts == 1


@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles_without_copies(chip) -> None:
    """The compiler refuses a kernel that needs more VMEM than we count. No other operation touches an array."""
    # Neither rows nor dimensions are multiples of a tile.
    G, M, N, K = 60, 8191, 1408, 896
    x, dy, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((M, K), (M, N), (G, N, K)))
    compiled = compile_for(chip, run, x, dy, w, jax.ShapeDtypeStruct((G,), jnp.int32))
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not re.search(rf"= bf16\[{G},\d+,\d+\]\S* (copy|transpose|copy-start|fusion)\(", text)
    # Beside the kernels there is only the table of visits.
    assert compiled.memory_analysis().temp_size_in_bytes <= 1 << 20


@needs_libtpu
def test_compiles_at_the_edge_of_vmem() -> None:
    """v4 has the least VMEM."""
    x, w = jax.ShapeDtypeStruct((4096, 3584), jnp.bfloat16), jax.ShapeDtypeStruct((4, 5120, 3584), jnp.bfloat16)
    compile_for("v4", grouped_tpu.product, x, w, jax.ShapeDtypeStruct((4,), jnp.int32))


def test_unsupported_arguments_are_refused() -> None:
    x, w, sizes = jnp.ones((64, 256), jnp.bfloat16), jnp.ones((2, 128, 256), jnp.bfloat16), jnp.ones(2, jnp.int32)
    with pytest.raises(InputError, match="multiples of 128"):
        grouped_tpu.product(x[:, :200], w[:, :, :200], sizes)
    with pytest.raises(InputError, match="x to be bfloat16"):
        grouped_tpu.product(x.astype(jnp.float32), w, sizes)
    with pytest.raises(InputError, match=r"x to be bfloat16 \[rows, 128\]"):
        grouped_tpu.product(x, w, sizes, transposed=True)
    (x8, w8), of_codes = (a.astype(jnp.int8) for a in (x, w)), (jnp.ones((64, 1)), jnp.ones((2, 128)))
    with pytest.raises(InputError, match=r"float32 scales \[\(64, 1\), \(2, 128\)\]"):
        grouped_tpu.product(x8, w8, sizes, scales=(of_codes[0], of_codes[1][:1]))
    with pytest.raises(InputError, match="x to be int8"):
        grouped_tpu.product(x, w8, sizes, scales=of_codes)
    with pytest.raises(InputError, match="codes beside scales, not transposed; got bfloat16"):
        grouped_tpu.product(x, w, sizes, scales=of_codes)
    with pytest.raises(InputError, match="sizes of 2 groups"):
        grouped_tpu.product(x, w, jnp.ones(3, jnp.int32))
    with pytest.raises(InputError, match="as many rows"):
        grouped_tpu.weights_gradient(x[:32], x, sizes)
    with pytest.raises(InputError, match="float32 or bfloat16"):
        grouped_tpu.weights_gradient(x, x, sizes, dtype=jnp.float16)
    with pytest.raises(InputError, match="shard that dimension"):
        grouped_tpu.product_tiling(16384, 128, (16 << 20, 128))
