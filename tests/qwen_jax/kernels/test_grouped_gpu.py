"""Grouped products on Hopper: tiles and lowering anywhere, numerics where an interpreter or a GPU can run them."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import grouped, grouped_gpu, grouped_gpu_blocks, grouped_gpu_schedule, grouped_gpu_tiles
from qwen_jax.kernels.matmul.grouped_gpu import product, row_tiles, supports, weights_gradient

_ON_HOPPER = jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability.startswith("9.")


@st.composite
def routings(draw):
    """Sizes of groups, and the length of the array of rows."""
    sizes = draw(st.lists(st.one_of(st.just(0), st.just(1), st.integers(0, 9), st.integers(0, 700)), min_size=1))
    rows = max(1, sum(sizes) + draw(st.sampled_from([0, 0, 1, 7, 300])))
    return np.array(sizes, np.int32), rows


@settings(deadline=None, max_examples=40)
@given(routings(), st.sampled_from([1, 2, 3]))
def test_row_tiles_contain_every_row_of_every_group_once(routing, warpgroups):
    """No tile mixes groups, is empty, begins off a multiple of 8, is longer than its warpgroups, or is unnecessary."""
    sizes, rows = routing
    table, counts = map(np.asarray, jax.jit(row_tiles, static_argnums=(1, 2))(sizes, rows, warpgroups))
    count, total = counts
    assert total == sizes.sum()
    assert count <= len(table)
    held = np.full(rows, -1)
    for group, begin, first, end in table[:count]:
        assert begin % 8 == 0
        assert begin <= first < end <= begin + 64 * warpgroups
        assert first - begin < 8
        assert (held[first:end] == -1).all()
        held[first:end] = group
    np.testing.assert_array_equal(held, np.concatenate([np.repeat(np.arange(len(sizes)), sizes), [-1] * rows])[:rows])
    # There are no more tiles than the groups need one by one.
    ends = np.cumsum(sizes)
    starts = (ends - sizes) // 8 * 8
    assert count == sum(-(-(e - s) // (64 * warpgroups)) for s, e, n in zip(starts, ends, sizes, strict=True) if n)


def test_tiles_of_a_group_are_about_equally_long():
    """Seven units of 64 rows are 3 + 2 + 2, not 3 + 3 + 1."""
    table, _ = row_tiles(jnp.array([7 * 64, 0, 3 * 64]), 1000, 3)
    units = np.diff(np.asarray(table)[:4, [1, 3]], axis=1).ravel() // 64
    assert sorted(units[:3]) == [2, 2, 3]
    assert units[3] == 3


@jax.jit
def _places(rows, columns):
    return jax.vmap(lambda n: grouped_gpu_tiles.place(n, rows, columns))(jnp.arange(70 * 25))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 25))
def test_every_tile_has_one_place_and_neighbours_share_a_column(rows, columns):
    row, column = (np.asarray(x)[: rows * columns] for x in _places(np.int32(rows), np.int32(columns)))
    assert sorted(zip(row, column, strict=True)) == [(i, j) for i in range(rows) for j in range(columns)]
    assert (np.diff(column) != 0).sum() <= -(-rows // grouped_gpu_tiles.PANEL) * columns


@pytest.mark.parametrize(("N", "K"), [(5120, 3584), (64, 64), (1408, 2048), (192, 320)])
def test_lowers_to_one_kernel_each_without_copies_of_the_matrices(N: int, K: int) -> None:
    G, M = 60, 1000
    x, dy, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((M, K), (M, N), (G, N, K)))
    sizes = jax.ShapeDtypeStruct((G,), jnp.int32)
    programs = [
        jax.jit(lambda x, w, sizes: product(x, w, sizes)).trace(x, w, sizes),
        jax.jit(lambda dy, w, sizes: product(dy, w, sizes, transposed=True)).trace(dy, w, sizes),
        *(
            jax.jit(lambda dy, x, sizes, to=to: weights_gradient(dy, x, sizes, dtype=to)).trace(dy, x, sizes)
            for to in (jnp.float32, jnp.bfloat16)
        ),
    ]
    for program in programs:
        text = program.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu_v2") == 1
        assert not any(op in text for op in ("stablehlo.transpose", "stablehlo.dot"))
        assert N < 128 or "stablehlo.pad" not in text


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("N", "K"), [(2816, 2048), (2048, 1408), (64, 128)])
def test_products_of_codes_lower_to_one_kernel_without_copies_of_the_matrices(N: int, K: int, dtype: str) -> None:
    G, M = 60, 1000
    shapes = ((M, K), dtype), ((G, N, K), dtype), ((G,), "int32"), ((M, 1), "float32"), ((G, N), "float32")
    program = jax.jit(lambda x, w, sizes, *scales: product(x, w, sizes, scales=scales))
    traced = program.trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert not any(op in text for op in ("stablehlo.transpose", "stablehlo.dot"))
    # Scales alone are padded.
    code = "i8" if dtype == "int8" else "f8E4M3FN"
    assert not re.search(rf"stablehlo.(pad|convert) .*tensor<{G}x{N}x{K}x{code}>", text)


@pytest.mark.parametrize("rematerialise", [True, False])
def test_lowers_in_a_scan_that_is_differentiated(rematerialise: bool) -> None:
    """As in training: a loop over layers, with recomputation or without."""

    def loss(w_LGNN: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(grouped._grouped("gpu", 64, True, x, w, sizes)), None

        return jax.lax.scan(jax.checkpoint(layer) if rematerialise else layer, x, w_LGNN)[0].astype(jnp.float32).sum()

    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 128), (3, 4, 128, 128)))
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    text = jax.jit(jax.grad(loss)).trace(w, x, sizes).lower(lowering_platforms=("cuda",)).as_text()
    # The product, once more if recomputed, and its gradients with respect to x and w.
    assert text.count("mosaic_gpu_v2") == 3 + rematerialise


def test_supports_multiples_of_64_in_bfloat16() -> None:
    assert supports(jnp.bfloat16, 64, 4096)
    assert not any(supports(*x) for x in ((jnp.float32, 64, 64), (jnp.bfloat16, 96, 64), (jnp.bfloat16, 64, 0)))


def test_supports_codes_with_inputs_of_multiples_of_128() -> None:
    assert all(supports(dtype, 64, 128, codes=True) for dtype in ("int8", "float8_e4m3fn"))
    assert not any(supports(*x, codes=True) for x in (("int8", 64, 64), ("bfloat16", 64, 128), ("int4", 64, 128)))


@pytest.mark.parametrize(
    ("x", "w", "sizes", "transposed", "why"),
    [
        ((8, 128), (2, 64, 64), (2,), False, "x \\[M, K\\]"),
        ((8, 64), (2, 64, 128), (2,), False, "x \\[M, K\\]"),
        ((8, 128), (2, 64, 128), (2,), True, "x \\[M, N\\]"),
        ((8, 64), (64, 64), (1,), False, "w \\[G, N, K\\]"),
        ((8, 64), (2, 64, 64), (3,), False, "sizes \\[G\\]"),
        ((8, 96), (2, 64, 96), (2,), False, "multiples of 64.*\\[64, 96\\]"),
    ],
)
def test_unsupported_shapes_are_refused(x, w, sizes, transposed, why) -> None:
    with pytest.raises(InputError, match=why):
        product(jnp.ones(x, jnp.bfloat16), jnp.ones(w, jnp.bfloat16), jnp.ones(sizes, jnp.int32), transposed=transposed)


def test_unsupported_dtypes_are_refused() -> None:
    rows, sizes = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((1,), jnp.int32)
    with pytest.raises(InputError, match="bfloat16 and float32"):
        product(rows, jnp.ones((1, 64, 64)), sizes)
    with pytest.raises(InputError, match="int32"):
        product(rows, rows.reshape(1, 8, 64).repeat(8, axis=1), jnp.ones((1,)))
    with pytest.raises(InputError, match="float32 or bfloat16; asked for float16"):
        weights_gradient(rows, rows, sizes, dtype=jnp.float16)
    with pytest.raises(InputError, match="dy \\[M, N\\]"):
        weights_gradient(rows, rows[:4], sizes, dtype=jnp.float32)


def test_codes_and_scales_that_do_not_match_are_refused() -> None:
    x, w, sizes = jnp.ones((8, 128), jnp.int8), jnp.ones((2, 64, 128), jnp.int8), jnp.ones(2, jnp.int32)
    rows, outputs = jnp.ones((8, 1)), jnp.ones((2, 64))
    with pytest.raises(InputError, match="int8 or float8_e4m3fn, K a multiple of 128"):
        product(x, w.astype(jnp.float8_e4m3fn), sizes, scales=(rows, outputs))
    with pytest.raises(InputError, match="int8 or float8_e4m3fn, K a multiple of 128"):
        product(x[:, :64], w[:, :, :64], sizes, scales=(rows, outputs))
    with pytest.raises(InputError, match="need bfloat16"):
        product(x, w, sizes)
    for wrong in ((rows[:, 0], outputs), (rows, outputs[:1]), (rows.astype(jnp.bfloat16), outputs)):
        with pytest.raises(InputError, match="needs float32 scales"):
            product(x, w, sizes, scales=wrong)


# Numerics, in the interpreter or on a GPU.


def zipf(numbers: np.random.Generator, G: int, rows: int) -> np.ndarray:
    share = 1 / np.arange(1, G + 1)
    return numbers.multinomial(rows, numbers.permutation(share / share.sum()))


def errors(sizes: np.ndarray, rows: int, N: int, K: int) -> dict[str, float]:
    """Errors against float64: relative for float32 results, otherwise in units of the error of rounding to bfloat16.

    Rows beyond the groups hold NaN. Repeated runs must give the same bits, and rows without a group must be zero.
    """
    numbers, total, G = np.random.default_rng(), int(np.sum(sizes)), len(sizes)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(numbers.standard_normal(shape, np.float32), jnp.bfloat16)

    x, dy, w = normal(rows, K).at[total:].set(jnp.nan), normal(rows, N).at[total:].set(jnp.nan), normal(G, N, K)
    x64, dy64, w64 = (np.asarray(a, np.float64) for a in (x, dy, w))
    want = {"product": np.zeros((rows, N)), "transposed": np.zeros((rows, K)), "gradient": np.zeros((G, N, K))}
    for g, end in enumerate(np.cumsum(sizes)):
        own = slice(end - sizes[g], end)
        want["product"][own], want["transposed"][own] = x64[own] @ w64[g].T, dy64[own] @ w64[g]
        want["gradient"][g] = dy64[own].T @ x64[own]
    want["gradient in bfloat16"] = want["gradient"]
    on_device = jnp.asarray(sizes, jnp.int32)
    runs = {
        "product": lambda: product(x, w, on_device),
        "transposed": lambda: product(dy, w, on_device, transposed=True),
        "gradient": lambda: weights_gradient(dy, x, on_device, dtype=jnp.float32),
        "gradient in bfloat16": lambda: weights_gradient(dy, x, on_device, dtype=jnp.bfloat16),
    }
    result = {}
    for name, run in runs.items():
        got, right = run(), want[name]
        if _ON_HOPPER:
            for _ in range(3):
                np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(run()).view(np.uint8))
        got64 = np.asarray(got, np.float64)
        assert got.shape == right.shape
        assert (got64[right == 0] == 0).all(), name
        scale = max(np.linalg.norm(right), 1e-30)
        if got.dtype == jnp.bfloat16:
            scale = max(np.linalg.norm(np.asarray(jnp.asarray(right, jnp.bfloat16), np.float64) - right), 1e-30)
        result[name] = float(np.linalg.norm(got64 - right) / scale)
    return result


def check(sizes, rows: int, N: int, K: int) -> None:
    """Float32 sums on tensor cores round down: 2e-5. A bfloat16 result is rounded once."""
    for name, error in errors(np.asarray(sizes), rows, N, K).items():
        assert error < (2e-5 if name == "gradient" else 1.02), (name, error)


def check_codes(sizes, rows: int, N: int, K: int, dtype: str) -> None:
    """Products of codes against float64.

    Sums of int8 are exact, and the result is rounded once to bfloat16. Of sums of float8, Hopper's tensor cores may
    lose 2^-13 in each step of 32 (they keep 14 bits). Scales of rows beyond the groups are NaN.
    """
    numbers, total, G = np.random.default_rng(), int(np.sum(sizes)), len(sizes)

    def drawn(*shape: int) -> jax.Array:
        x = numbers.integers(-127, 128, shape) if dtype == "int8" else numbers.standard_normal(shape).clip(-4, 4) * 100
        return jnp.asarray(x, jnp.float32).astype(dtype)

    x, w = drawn(rows, K), drawn(G, N, K)
    of_rows = jnp.asarray(numbers.lognormal(size=(rows, 1)), jnp.float32).at[total:].set(jnp.nan)
    of_outputs = jnp.asarray(numbers.uniform(0.5, 1.5, (G, N)) / 127**2, jnp.float32)
    x64, w64, a64, b64 = (np.asarray(z.astype(jnp.float32), np.float64) for z in (x, w, of_rows, of_outputs))
    want = np.zeros((rows, N))
    for g, end in enumerate(np.cumsum(sizes)):
        own = slice(end - sizes[g], end)
        want[own] = x64[own] @ w64[g].T * a64[own] * b64[g]
    run = functools.partial(product, x, w, jnp.asarray(sizes, jnp.int32), scales=(of_rows, of_outputs))
    got = run()
    for _ in range(3 * _ON_HOPPER):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(run()).view(np.uint8))
    got64 = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert (got64[total:] == 0).all()
    rounding = np.linalg.norm(np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64) - want)
    lost = 0 if dtype == "int8" else K / 32 * 2**-13 * np.linalg.norm(want)
    error = np.linalg.norm(got64 - want)
    print(dtype, N, K, "error in units of the rounding to bfloat16:", error / max(rounding, 1e-30))
    assert error <= 1.02 * rounding + lost


if jax.__version_info__ >= (0, 11) and jax.default_backend() == "cpu":
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret import params as interpret_params

    def store_one_by_one(ref, rows, own) -> None:
        """`store_rows` for the interpreter, which cannot run it."""
        for r in range(rows.shape[0]):

            def store(r: int = r) -> None:
                ref[r] = rows[r]

            pl.when(own[r] != 0)(store)

    def claim_in_order(turn, counter_ref, taken_smem) -> jax.Array:
        """A `_claim` with a static schedule, for the interpreter, which has no atomic operations."""
        n = jax.lax.axis_index("block") + turn * jax.lax.axis_size("block")
        taken_smem[turn % 2] = n
        return n

    @contextlib.contextmanager
    def interpreted(blocks: int):
        """Memory starts as NaN, and races are an error; on a device with few multiprocessors."""
        how = interpret_params.InterpretGPUParams(
            out_of_bounds_reads="uninitialized", inline_mgpu="ignore", detect_races=True
        )
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(grouped_gpu, "MULTIPROCESSORS", blocks)
            patch.setattr(grouped_gpu_blocks, "store_rows", store_one_by_one)
            patch.setattr(grouped_gpu_schedule, "_claim", claim_in_order)
            for f in (product, weights_gradient):
                f.clear_cache()
                stack.callback(f.clear_cache)
            stack.enter_context(interpret_params.force_gpu_interpret_mode(how))
            yield
            assert not gpu_callbacks.get_races().races_found

    # (blocks, sizes, rows, N, K): empty groups, single rows, ends anywhere, parts of a tile, small matrices.
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("blocks", "sizes", "rows", "N", "K"),
        [
            (3, [70, 0, 1, 60, 13], 200, 192, 320),
            (1, [0, 133, 3, 0, 4], 140, 64, 64),
            (2, [0, 0, 9], 9, 128, 448),
            (2, [0, 0], 21, 64, 128),
            (4, [300], 300, 320, 128),
        ],
    )
    def test_numerics_and_races_in_the_interpreter(blocks, sizes, rows, N, K) -> None:
        with interpreted(blocks):
            check(sizes, rows, N, K)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
    @pytest.mark.parametrize(
        ("blocks", "sizes", "rows", "N", "K"),
        [(3, [70, 0, 1, 60, 13], 200, 192, 384), (1, [0, 133, 3, 0, 4], 140, 64, 128), (4, [300], 300, 320, 128)],
    )
    def test_numerics_and_races_of_codes_in_the_interpreter(blocks, sizes, rows, N, K, dtype) -> None:
        with interpreted(blocks):
            check_codes(np.asarray(sizes), rows, N, K, dtype)


if _ON_HOPPER:
    _RNG = np.random.default_rng()
    # Even and skewed routing, empty groups, one group with all rows, one row, rows beyond the groups.
    _ROUTINGS = {
        "even": ([512] * 8, 4096),
        "uneven": (_RNG.multinomial(4000, [1 / 16] * 16), 4096),
        "zipf": (zipf(_RNG, 64, 5000), 5003),
        "few": (zipf(_RNG, 64, 100), 700),
        "empty": ([0, 0, 777, 0, 64, 0, 1, 0], 1000),
        "all": ([0, 0, 3001, 0], 3001),
        "one": ([0, 1, 0], 1),
        "one of many": ([0] * 100 + [1] + [0] * 27, 4096),
        "none": ([0, 0], 100),
    }

    @pytest.mark.parametrize("routing", _ROUTINGS)
    @pytest.mark.parametrize(("N", "K"), [(512, 768), (192, 320), (64, 64), (1408, 2048)])
    def test_numerics_on_the_gpu(routing: str, N: int, K: int) -> None:
        check(*_ROUTINGS[routing], N, K)

    @pytest.mark.parametrize("routing", _ROUTINGS)
    @pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
    @pytest.mark.parametrize(("N", "K"), [(512, 768), (192, 384), (64, 128), (2816, 2048), (2048, 1408)])
    def test_numerics_of_codes_on_the_gpu(routing: str, N: int, K: int, dtype: str) -> None:
        sizes, rows = _ROUTINGS[routing]
        check_codes(np.asarray(sizes), rows, N, K, dtype)

    @pytest.mark.parametrize("known", [False, True])
    def test_kernels_that_share_a_counter_leave_it_at_zero(known: bool) -> None:
        """Products of one program with the same sizes, for which XLA may use one operand; constant and traced sizes."""
        sizes = jnp.asarray(zipf(_RNG, 16, 3000), jnp.int32)
        x, w = (
            jnp.asarray(_RNG.standard_normal(s, np.float32) / 16, jnp.bfloat16) for s in ((3000, 256), (16, 256, 256))
        )

        def some(x: jax.Array, sizes: jax.Array = sizes) -> list[jax.Array]:
            y = product(x, w, sizes)
            z = product(y, w, sizes, transposed=True)
            return [y, z, *(weights_gradient(a, x, sizes, dtype=jnp.float32) for a in (y, z))]

        one_by_one = some(x)
        run = functools.partial(jax.jit(some), x, *([] if known else [sizes]))
        for _ in range(5):
            for got, expected in zip(run(), one_by_one, strict=True):
                np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))

    @settings(deadline=None, max_examples=10)
    @given(routings(), st.integers(1, 6), st.integers(1, 6))
    def test_any_routing_on_the_gpu(routing, n, k) -> None:
        check(*routing, 64 * n, 64 * k)
