"""Products of operands rounded to 8 bits: rounding, products and gradients, factors, meshes, refusals."""

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import low_precision
from qwen_jax.linear import Linear
from qwen_jax.parallel.sharding import Sharding, make_mesh
from tests.helpers.runs import print_seed
from tests.helpers.tpu_compiler import needs_libtpu
from train.plan.topology import mesh_of, target

FORMATS = {jnp.float8_e4m3fn: 448.0, jnp.float8_e5m2: 57344.0}


def spread(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values of many magnitudes, so that many of them are below float8's smallest normal number when scaled."""
    return (rng.normal(size=shape) * 2.0 ** rng.integers(-25, 1, shape) * 2.0 ** rng.integers(-30, 30)).astype(
        np.float32
    )


def rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """x in float64 rounded with one factor: the largest power of two, up to 2^63, with which nothing overflows."""
    largest = np.abs(x).max()
    if largest == 0:
        return x.astype(np.float64)
    # One too large, whatever the rounding of the logarithms, and down from there.
    factor = 2.0 ** (1 + np.ceil(np.log2(FORMATS[dtype]) - np.log2(float(largest))))
    while float(largest) * factor > FORMATS[dtype]:
        factor /= 2
    factor = min(factor, 2.0**63)
    return (x.astype(np.float64) * factor).astype(np.float32).astype(np.dtype(dtype)).astype(np.float64) / factor


def rounded_blocks(x: np.ndarray, dtype: Any, block: tuple[int, ...]) -> np.ndarray:
    """The same with a factor for each block."""
    result = np.zeros(x.shape)
    for start in np.ndindex(*(-(-n // size) for n, size in zip(x.shape, block, strict=True))):
        part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(start, block, strict=True))
        result[part] = rounded(x[part], dtype)
    return result


def rows_of_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of int8 and the scales of rows; computed in float32 as the products do, so that halves fall alike."""
    scales = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1
    return np.round(x * (1 / scales)).astype(np.float64), scales.astype(np.float64)


# Rounding


@pytest.mark.parametrize("dtype", FORMATS)
def test_values_are_rounded_after_the_largest_exact_factor(dtype: Any) -> None:
    rng = print_seed()
    round_ = jax.jit(functools.partial(low_precision.round_scaled, dtype=dtype))
    for _ in range(20):
        x = spread(rng, (7, 5))
        codes, scale = jax.device_get(round_(x))
        np.testing.assert_array_equal(codes.astype(np.float64) * float(scale), rounded(x, dtype))
        assert FORMATS[dtype] / 2 * (1 - 2**-3) < np.abs(codes.astype(np.float32)).max() <= FORMATS[dtype]
    # The largest values that keep a factor, and the next ones that need a smaller one.
    for largest, expected in ((1.75, 1.0), (np.nextafter(np.float32(1.75), np.float32(2)), 2.0)):
        _, scale = round_(np.array([largest, 0.1], np.float32))
        assert scale == expected * 1.75 / FORMATS[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
def test_another_factor_changes_only_values_below_the_smallest_normal_number(dtype: Any) -> None:
    """So what shares a factor, such as a batch or a micro-batch, changes little."""
    rng = print_seed()
    x = spread(rng, (100,))
    alone, beside = (
        jax.device_get(low_precision.round_scaled(array, dtype))
        for array in (x, np.append(x, np.abs(x).max() * np.float32(2.0 ** rng.integers(1, 9))))
    )
    values = [codes.astype(np.float64) * float(scale) for codes, scale in (alone, beside)]
    is_normal = np.abs(x) >= float(jnp.finfo(dtype).smallest_normal) * float(beside.scale)
    np.testing.assert_array_equal(values[0][is_normal], values[1][:-1][is_normal])


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_stay_zeros_and_what_is_not_finite_makes_all_nan(dtype: Any) -> None:
    for x in (np.zeros((3, 4), np.float32), np.full((3, 4), 1e-45, np.float32)):
        codes, scale = low_precision.round_scaled(x, dtype)
        np.testing.assert_array_equal(codes.astype(jnp.float32) * scale, 0)
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((3, 4), np.float32)
        x[1, 2] = bad
        codes, scale = low_precision.round_scaled(x, dtype)
        assert np.isnan(codes.astype(jnp.float32) * scale).all()
    # Blocks are apart: only the one with the number is lost.
    blocks = np.asarray(low_precision.round_blocks(x, dtype, (1, 2)))
    np.testing.assert_array_equal(np.isnan(blocks), [[False] * 4, [False, False, True, True], [False] * 4])


def test_blocks_are_rounded_each_by_itself() -> None:
    rng = print_seed()
    for block in ((1, 3, 4), (2, 4, 1), (1, 1, 128)):
        x = spread(rng, (2, 7, 6)) * 2.0 ** rng.integers(-20, 20, (2, 7, 6)).astype(np.float32)
        got = jax.jit(lambda x, block=block: low_precision.round_blocks(x, jnp.float8_e4m3fn, block))(x)
        np.testing.assert_array_equal(got, rounded_blocks(x, jnp.float8_e4m3fn, block))


# Products

# The einsum of a projection, the axes of its weight, and the PartitionSpecs of weight, input and result.
S = Sharding(kv_heads=2)
KINDS: dict[str, tuple[str, tuple[int, ...], P, P, P]] = {
    "q": ("BTD,HdD->BTHd", (2, 8, 32), S.q, S.hidden, S.heads),
    "o": ("BTHd,DHd->BTD", (32, 2, 8), S.o, S.heads, S.hidden),
    "down": ("BTF,DF->BTD", (256, 256), S.down, S.feed_forward, S.hidden),
}


@functools.cache
def compiled(
    kind: str, products: low_precision.Products, dtype: Any, axes: tuple[tuple[str, int], ...]
) -> Callable[..., Any]:
    """A projection's result and gradients as a function of x, w and dy in float32."""
    einsum, _, w_spec, x_spec, y_spec = KINDS[kind]
    mesh = make_mesh(dict(axes))

    @jax.jit
    def run(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
        def f(x: jax.Array, w: jax.Array) -> jax.Array:
            linear = Linear(einsum, w, x=x_spec, w=w_spec, out=y_spec)
            linear.products = products
            return linear(x)

        y, pull = jax.vjp(f, x.astype(dtype), w.astype(dtype))
        return y, *pull(dy.astype(dtype))

    def call(*arrays: np.ndarray) -> Any:
        with jax.set_mesh(mesh):
            placed = (
                jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, (x_spec, w_spec, y_spec), strict=True)
            )
            return [np.asarray(result, np.float64) for result in jax.device_get(run(*placed))]

    return call


def operands(kind: str, rng: np.random.Generator, dtype: Any) -> list[np.ndarray]:
    """x, w and dy, whose values are exact in the compute dtype. A part of each is far smaller than the rest."""
    einsum, shape, *_ = KINDS[kind]
    letters, out = einsum.split("->")
    x_letters, w_letters = letters.split(",")
    sizes = {"B": 4, "T": 4, **dict(zip(w_letters, shape, strict=True))}
    arrays = [spread(rng, tuple(sizes[c] for c in names)) for names in (x_letters, w_letters, out)]
    for array in arrays:
        # One device's shard has the largest values: another one alone would choose another factor.
        array[: array.shape[0] // 2, ..., : array.shape[-1] // 2] *= 2.0**-12
    return [np.array(jnp.asarray(array, dtype), np.float32) for array in arrays]


def expected(kind: str, products: str, arrays: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Result and gradients in float64, each with the sum of magnitudes that its rounding error is relative to."""
    (x, w, dy), e4m3, e5m2 = arrays, jnp.float8_e4m3fn, jnp.float8_e5m2
    x_BTK, dy_BTN = (a.reshape(4, 4, -1) for a in (x, dy))
    w_NK = w.reshape(dy_BTN.shape[-1], -1)
    if products == "fp8":
        x_y = x_w = rounded(x_BTK, e4m3)
        w_, dy_x = rounded(w_NK, e4m3), rounded(dy_BTN, e5m2)
        dy_w = dy_x
    elif products == "int8":
        (x_codes, x_scales), (w_codes, w_scales) = rows_of_int8(x_BTK), rows_of_int8(w_NK)
        x_y = x_w = x_codes * x_scales
        w_, dy_w = w_codes * w_scales, dy_BTN
        # The scales of weights are in the gradient when it is rounded.
        dy_codes, dy_scales = rows_of_int8(dy_BTN * w_scales[:, 0].astype(np.float32))
        dy_x = dy_codes * dy_scales / w_scales[:, 0]
    else:
        b = low_precision.BLOCK
        x_y, x_w = (rounded_blocks(x_BTK, e4m3, block) for block in ((1, 1, b), (1, b, 1)))
        dy_x, dy_w = (rounded_blocks(dy_BTN, e5m2, block) for block in ((1, 1, b), (1, b, 1)))
        w_ = rounded_blocks(w_NK, e4m3, (b, b))
    return [
        tuple(np.einsum(s, f(a), f(b)).reshape(like.shape) for f in (np.array, np.abs))  # type: ignore[misc]
        for s, a, b, like in (
            ("BTK,NK->BTN", x_y, w_, dy),
            ("BTN,NK->BTK", dy_x, w_, x),
            ("BTN,BTK->NK", dy_w, x_w, w),
        )
    ]


def expected_in_parts(kind: str, arrays: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """`expected` of int8 on two devices of a tensor axis: each rounds its own part of a row."""
    x_axis, w_axis, y_axis = {"q": (None, 0, 2), "o": (2, 1, None), "down": (2, 1, None)}[kind]
    cut = [
        [array, array] if axis is None else np.split(array, 2, axis)
        for array, axis in zip(arrays, (x_axis, w_axis, y_axis), strict=True)
    ]
    first, second = (expected(kind, "int8", list(part)) for part in zip(*cut, strict=True))
    return [
        tuple(a + b if axis is None else np.concatenate((a, b), axis) for a, b in zip(one, other, strict=True))
        for one, other, axis in zip(first, second, (y_axis, x_axis, w_axis), strict=True)
    ]  # type: ignore[return-value]


LAYOUTS = [(), (("fsdp", 2), ("tensor", 2)), (("data", 2), ("fsdp", 2))]


@pytest.mark.draw(6)
@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", ["fp8", "fp8-blocks", "int8"])
def test_products_are_those_of_rounded_operands_on_any_mesh(
    products: low_precision.Products, kind: str, axes: tuple[tuple[str, int], ...]
) -> None:
    """Result and both gradients, within the rounding of n float32 additions: n 2^-24 of the sum of magnitudes.

    Factors of "fp8" are those of the whole tensor also where a mesh shards it. On a tensor axis blocks are compared for
    `down` alone, whose shards they fill: smaller matrices are one block on one device and several on the axis.
    """
    if products == "fp8-blocks" and kind != "down" and ("tensor", 2) in axes:
        kind = "down"
    rng = print_seed()
    arrays = operands(kind, rng, jnp.float32)
    got = compiled(kind, products, jnp.float32, axes)(*arrays)
    in_parts = products == "int8" and ("tensor", 2) in axes
    wanted = expected_in_parts(kind, arrays) if in_parts else expected(kind, products, arrays)
    for name, result, (value, magnitude) in zip(("y", "dx", "dw"), got, wanted, strict=True):
        error = np.abs(result - value)
        assert (error <= 512 * 2.0**-24 * magnitude).all(), (name, (error / np.maximum(magnitude, 1e-300)).max())


@pytest.mark.parametrize("products", ["fp8", "fp8-blocks", "int8"])
def test_bfloat16_results_are_rounded_once(products: low_precision.Products) -> None:
    """Half a unit in the last place of the result, beside the rounding of float32 sums.

    With int8, the gradient of the weight has an operand that is rounded to bfloat16 too.
    """
    rng = print_seed()
    arrays = operands("q", rng, jnp.bfloat16)
    results = compiled("q", products, jnp.bfloat16, ())(*arrays)
    for name, result, (value, magnitude) in zip(
        ("y", "dx", "dw"), results, expected("q", products, arrays), strict=True
    ):
        sums = (512 * 2.0**-24 + (2.0**-8 if (products, name) == ("int8", "dw") else 0)) * magnitude
        assert (np.abs(result - value) <= 2.0**-8 * (np.abs(value) + sums) + sums).all()


@pytest.mark.parametrize("products", ["fp8", "fp8-blocks", "int8"])
def test_powers_of_two_pass_through(products: low_precision.Products) -> None:
    """Exactly through the rounding; a product may add up its float32 numbers in another order."""
    rng = print_seed()
    call = compiled("q", products, jnp.float32, ())
    # Close to 1: no block, however small beside the rest, meets the largest factor, 2^63.
    arrays = [array * 2.0 ** -np.floor(np.log2(np.abs(array).max())) for array in operands("q", rng, jnp.float32)]
    y, dx, dw = call(*arrays)
    a, b, c = (2.0 ** int(k) for k in rng.integers(-8, 9, 3))
    for factor, array in zip((a, b, c), arrays, strict=True):
        rows = jnp.asarray(array.reshape(array.shape[0], -1))
        for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
            plain, scaled = (low_precision.round_scaled(f * rows, dtype) for f in (1.0, factor))
            np.testing.assert_array_equal(scaled.codes.astype(jnp.float32), plain.codes.astype(jnp.float32))
            assert scaled.scale == factor * plain.scale
            plain, scaled = (
                low_precision.round_blocks(f * rows, dtype, (1, low_precision.BLOCK)) for f in (1.0, factor)
            )
            np.testing.assert_array_equal(scaled, factor * plain)
    results = call(*(np.float32(f) * array for f, array in zip((a, b, c), arrays, strict=True)))
    factors, magnitudes = (a * b, b * c, a * c), (magnitude for _, magnitude in expected("q", products, arrays))
    for got, want, factor, magnitude in zip(results, (y, dx, dw), factors, magnitudes, strict=True):
        assert (np.abs(got - factor * want) <= 2 * 512 * 2.0**-24 * factor * magnitude).all()


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_what_is_not_finite_makes_the_whole_product_nan(axes: tuple[tuple[str, int], ...]) -> None:
    """On every device, whichever has the value: a maximum over CPU devices may leave out NaN."""
    rng = print_seed()
    call = compiled("q", "fp8", jnp.float32, axes)
    for bad, (index, lost) in itertools.product((np.nan, np.inf), enumerate(((0, 2), (0, 1), (1, 2)))):
        arrays = operands("q", rng, jnp.float32)
        arrays[index].flat[rng.integers(arrays[index].size)] = bad
        results = call(*arrays)
        assert [bool(np.isnan(result).all()) for result in results] == [i in lost for i in range(3)]


def test_of_int8_what_is_not_finite_stays_so() -> None:
    """Every number that depends on one that is not finite is not finite either, and no other one is lost."""
    rng = print_seed()
    call = compiled("q", "int8", jnp.float32, ())
    for bad, index in itertools.product((np.nan, np.inf, -np.inf), range(3)):
        arrays = operands("q", rng, jnp.float32)
        place = np.unravel_index(rng.integers(arrays[index].size), arrays[index].shape)
        arrays[index][place] = bad
        lost = [np.zeros((4, 4, 16), bool), np.zeros((4, 4, 32), bool), np.zeros((16, 32), bool)]
        y, dx, dw = lost
        if index == 0:
            y[place[:2]] = dw[:] = True
        elif index == 1:
            y[..., place[0] * 8 + place[1]] = dx[:] = True
        else:
            dx[place[:2]] = dw[place[2] * 8 + place[3]] = True
        for result, expected_lost in zip(call(*arrays), lost, strict=True):
            np.testing.assert_array_equal(~np.isfinite(result.reshape(expected_lost.shape)), expected_lost)


# Devices


def test_devices_without_such_products_are_refused() -> None:
    def mesh(platform: str, kind: str, **more: str) -> Any:
        device = types.SimpleNamespace(platform=platform, device_kind=kind, **more)
        return types.SimpleNamespace(devices=np.array([device]))

    old = mesh("gpu", "NVIDIA A100", compute_capability="8.0")
    other = mesh("gpu", "AMD Instinct MI300X", compute_capability="gfx942")
    for found, text in (old, r"NVIDIA A100, 8\.0"), (other, "AMD Instinct MI300X, gfx942"):
        for products in ("fp8", "fp8-blocks"):
            with pytest.raises(
                InputError, match=rf"capability 8\.9 or later, or a TPU 7x \(found {text}\)\. Use products='bfloat16'"
            ):
                low_precision.check_devices(products, found)
        low_precision.check_devices("bfloat16", found)
    for capability in ("8.9", "9.0", "10.0", "12.1"):
        hopper = mesh("gpu", "NVIDIA", compute_capability=capability)
        low_precision.check_devices("fp8", hopper)
        with pytest.raises(InputError, match=r"'int8' need a TPU v5e, v5p or v6e .*Use products='fp8'"):
            low_precision.check_devices("int8", hopper)


@needs_libtpu
@pytest.mark.parametrize(("topology", "has"), [("v4:2x2x1", "bfloat16"), ("v5e:2x2", "int8"), ("v5p:2x2x1", "int8"),
                                              ("v6e:2x2", "int8"), ("7x:2x2x1", "fp8")])  # fmt: skip
def test_tpus_have_what_their_matrix_unit_multiplies_faster(topology: str, has: str) -> None:
    """The others are refused, and the one that the chip has is named."""
    where = target(topology)
    mesh = mesh_of(where, {"fsdp": len(where.devices)})
    for products in ("fp8", "fp8-blocks", "int8"):
        if products.partition("-")[0] == has:
            low_precision.check_devices(products, mesh)
        else:
            with pytest.raises(InputError, match=rf"found TPU.*Use products='{has}'"):
                low_precision.check_devices(products, mesh)


def test_emulation_is_told(caplog: pytest.LogCaptureFixture) -> None:
    low_precision.log_once.cache_clear()
    low_precision.check_devices("fp8", make_mesh({}))
    assert "'fp8' are emulated on CPUs" in caplog.text
