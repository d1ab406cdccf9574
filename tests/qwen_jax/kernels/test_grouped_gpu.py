"""Grouped products on Hopper: tiles and lowering anywhere, numerics where an interpreter or a GPU can run them."""

import contextlib
import functools

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
    def test_numerics_and_races_in_the_interpreter(blocks, sizes, rows, N, K, monkeypatch: pytest.MonkeyPatch) -> None:
        """Equal to float64 with memory that starts as NaN, without races, on a device with few multiprocessors."""
        monkeypatch.setattr(grouped_gpu, "MULTIPROCESSORS", blocks)
        monkeypatch.setattr(grouped_gpu_blocks, "store_rows", store_one_by_one)
        monkeypatch.setattr(grouped_gpu_schedule, "_claim", claim_in_order)
        how = interpret_params.InterpretGPUParams(
            out_of_bounds_reads="uninitialized", inline_mgpu="ignore", detect_races=True
        )
        with contextlib.ExitStack() as stack:
            for f in (product, weights_gradient):
                f.clear_cache()
                stack.callback(f.clear_cache)
            stack.enter_context(interpret_params.force_gpu_interpret_mode(how))
            check(sizes, rows, N, K)
            assert not gpu_callbacks.get_races().races_found


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
