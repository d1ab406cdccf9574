"""Quantised products on Hopper: conversion, tiling and lowering anywhere, numerics in the interpreter or on a GPU."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from qwen_jax.kernels import causal_mask
from qwen_jax.kernels.matmul import quantized, quantized_gpu
from qwen_jax.kernels.matmul.quantized_gpu_tiles import CODES, _to_bfloat16, bits, permuted
from qwen_jax.kernels.matmul.quantized_gpu_tiling import MAX_ROWS, WARPGROUPS, choose_tiling, width
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import abstract_params, bind, param_specs
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from tests.helpers.gpu_quantized import CAN_INTERPRET, interpreted, run_ptx
from tests.helpers.platforms import as_if_on
from tests.qwen_jax.kernels.test_few_rows_gpu import SHAPES, SHARDS
from tests.qwen_jax.kernels.test_flash_decode_int8_gpu import held

INT4, INT8, FLOAT8 = CODES
# Rows, outputs, inputs, inputs of a group, dtype of codes, dtype of scales, offset.
Case = tuple[int, int, int, int, Any, Any, str]


def print_seed() -> np.random.Generator:
    """A generator with a fresh seed, which pytest shows if the test fails."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def words(codes: np.ndarray) -> np.ndarray:
    """Codes [..., codes of a word] as 32-bit words."""
    if codes.dtype != INT4:
        return codes.view(np.uint32)[..., 0]
    nibbles = codes.astype(np.int8).astype(np.uint32) & 15
    return (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)


def all_codes(dtype: Any) -> np.ndarray:
    """Every code, in random words [n, codes of a word]. NaN of float8 is left out."""
    codes = np.arange(-8, 8).astype(dtype) if dtype == INT4 else np.arange(256, dtype=np.uint8).view(dtype)
    codes = codes[~np.isnan(codes.astype(np.float32))]
    return print_seed().permuted(np.repeat(codes, 64)).reshape(-1, 32 // bits(dtype))


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("subtract", [False, True])
def test_ptx_converts_every_code_exactly(dtype: Any, subtract: bool) -> None:
    """Each pair of a word becomes its two codes, minus a zero point for integers, in bfloat16 without rounding."""
    if subtract and dtype == FLOAT8:
        return
    codes = all_codes(dtype)
    low, high = (-8, 8) if dtype == INT4 else (-128, 128)
    zeros = print_seed().integers(low, high, len(codes)) if subtract else np.zeros(len(codes), int)
    added = (zeros + (136 if dtype == INT4 else 0)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(added.astype(int), zeros + (136 if dtype == INT4 else 0))
    operand = np.stack([added, added], axis=-1).view(np.uint32)[:, 0]
    for pair in range(codes.shape[1] // 2):
        word = words(codes) >> np.uint32(4 * pair if dtype == INT4 else 0)
        got = run_ptx(_to_bfloat16(dtype, pair, subtract), word, *[operand] * subtract)
        which = [pair, pair + 4] if dtype == INT4 else [2 * pair, 2 * pair + 1]
        want = codes[:, which].astype(np.float64) - zeros[:, None]
        np.testing.assert_array_equal(got.view(jnp.bfloat16).reshape(-1, 2).astype(np.float64), want)


@pytest.mark.parametrize("dtype", [INT4, INT8], ids=str)
def test_codes_are_in_the_order_of_the_permuted_rows(dtype: Any) -> None:
    """The pairs that a thread converts are at the places of an operand where `permuted` has their inputs."""
    from jax.experimental.mosaic.gpu import fragmented_array

    K = 128
    tile = np.arange(64 * K).reshape(64, K)
    pairs = held(fragmented_array.WGMMA_LAYOUT, tile)
    # Registers count units of inputs and within them two rows; in pairs, units of 8 and two rows.
    if dtype == INT4:
        own = held(fragmented_array.WGMMA_LAYOUT_UPCAST_4X, tile).reshape(4, 32, K // 32, 2, 2, 4)
        own = own.transpose(0, 1, 2, 5, 3, 4)
    else:
        own = held(fragmented_array.WGMMA_LAYOUT_UPCAST_2X, tile).reshape(4, 32, K // 16, 2, 2, 2).swapaxes(3, 4)
    operand = np.empty(64 * K, int)
    operand[pairs.reshape(-1)] = own.reshape(-1)
    np.testing.assert_array_equal(operand.reshape(64, K), np.asarray(permuted(jnp.asarray(tile), dtype)))


@pytest.mark.parametrize("rows", [1, 8, 33, MAX_ROWS])
@pytest.mark.parametrize("code_bits", [4, 8])
def test_tiling_covers_the_product_and_fits_in_shared_memory(rows: int, code_bits: int) -> None:
    """Every step of every tile is in one share, tiles have as many parts as blocks share them, and the rings fit."""
    shapes = [(n * gates, k) for n, k, gates in SHAPES if n < 100_000]
    shapes += [s[:2] for s in SHARDS if s[0] < 20_000 and s[0] % 64 == 0 and s[1] % 64 == 0]
    for n, k in set(shapes):
        for at_once in (32, 128):
            p = choose_tiling(rows, n, k, code_bits, at_once)
            tiles, steps = -(-n // (64 * p.high)), -(-k // (p.chunk * p.wide))
            assert p.high * p.wide == WARPGROUPS
            assert (p.blocks - 1) * p.share < tiles * steps <= p.blocks * p.share
            assert p.blocks <= 132
            parts = [(t * steps + steps - 1) // p.share - t * steps // p.share + 1 for t in range(tiles)]
            assert p.parts == max(parts)
            stage = 64 * p.high * p.chunk * p.wide * code_bits // 8 + width(rows) * p.chunk * p.wide * 2
            sums = (p.wide - 1) * p.high * 64 * width(rows) * 4
            assert p.stages >= 2
            assert p.stages * stage + sums + 2048 <= 227 * 1024, (n, k, p)


LOWERED: list[Case] = [
    (1, 4608, 3584, 128, INT4, jnp.float16, "none"),
    (33, 896, 4864, 128, INT4, jnp.float16, "zero"),
    (8, 896, 4864, 32, INT4, jnp.float32, "min"),
    (64, 448, 2368, 2368, FLOAT8, jnp.float32, "none"),
    (1000, 896, 4864, 128, INT8, jnp.bfloat16, "zero"),
]


def shapes_of(case: Case) -> list[jax.ShapeDtypeStruct | None]:
    M, N, K, group, dtype, scales, offset = case
    matrix = jax.ShapeDtypeStruct((N, K), dtype)
    zeros, mins = (jax.ShapeDtypeStruct((N, K // group), d) for d in (dtype, jnp.float32))
    return [
        jax.ShapeDtypeStruct((M, K), jnp.bfloat16),
        matrix,
        jax.ShapeDtypeStruct((N, K // group), scales),
        zeros if offset == "zero" else None,
        mins if offset == "min" else None,
    ]


@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_lowers_to_one_kernel_without_another_array_of_the_size_of_the_weight(case: Case) -> None:
    """The program for CUDA is one kernel over the codes themselves: they are neither converted nor copied."""
    text = jax.jit(quantized_gpu.matmul).trace(*shapes_of(case)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    _, N, K, *_ = case
    assert not re.search(rf"= stablehlo.* -> tensor<{N}x{K}x", text)


def arrays(case: Case, numbers: np.random.Generator) -> list[jax.Array | None]:
    """Random arguments of a product."""
    M, N, K, group, dtype, scales, offset = case
    G = K // group

    def codes(shape: tuple[int, ...]) -> jax.Array:
        if dtype == FLOAT8:
            return jnp.asarray(numbers.standard_normal(shape), jnp.float32).astype(dtype)
        info = jnp.iinfo(dtype)
        return jnp.asarray(numbers.integers(int(info.min), int(info.max) + 1, shape), jnp.int32).astype(dtype)

    return [
        jnp.asarray(numbers.standard_normal((M, K)), jnp.bfloat16),
        codes((N, K)),
        jnp.asarray(numbers.uniform(0.5, 1.5, (N, G)) * K**-0.5 / 4, scales),
        codes((N, G)) if offset == "zero" else None,
        jnp.asarray(numbers.standard_normal((N, G)), jnp.float32) if offset == "min" else None,
    ]


def errors(case: Case) -> tuple[float, float]:
    """Relative errors on fresh inputs, against weights that are not rounded and weights rounded to bfloat16."""
    x, w, scales, zeros, mins = args = arrays(case, print_seed())
    got = np.asarray(quantized_gpu.matmul(*args), np.float64)
    values = np.asarray(w.astype(jnp.float32)).reshape(*scales.shape, -1)
    values = values if zeros is None else values - np.asarray(zeros.astype(jnp.float32))[..., None]
    values = values * np.asarray(scales.astype(jnp.float32))[..., None]
    values = (values if mins is None else values - np.asarray(mins)[..., None]).reshape(w.shape)
    x64 = np.asarray(x.astype(jnp.float32), np.float64)
    wants = [x64 @ v.astype(np.float64).T for v in (values, values.astype(jnp.bfloat16))]
    exact, rounded = (float(np.linalg.norm(got - want) / np.linalg.norm(want)) for want in wants)
    return exact, rounded


def check(case: Case) -> None:
    """Few rows are sums of exact products; many rows are those of the weights of "plain", rounded to bfloat16."""
    exact, rounded = errors(case)
    # Sums in float32. The rounding of a weight is a relative error of 2^-9 at most, 1.6e-3 on average.
    if case[0] <= MAX_ROWS:
        assert exact < 2e-5, exact
        assert rounded < 3e-3, rounded
    else:
        assert rounded < 2e-5, rounded


# Multiprocessors and the product: several tiles of a block, several blocks of a tile, ends in the middle of a step.
if CAN_INTERPRET:

    @pytest.mark.parametrize(
        ("multiprocessors", "case"),
        [
            (4, (1, 192, 1664, 128, INT4, jnp.float16, "zero")),
            (1, (8, 64, 512, 64, INT4, jnp.float32, "min")),
            (3, (9, 192, 576, 64, INT8, jnp.bfloat16, "zero")),
            (3, (3, 192, 896, 896, FLOAT8, jnp.float32, "none")),
            (2, (72, 192, 256, 128, INT4, jnp.float16, "zero")),
            (1, (100, 64, 192, 64, INT8, jnp.float32, "min")),
        ],
        ids=str,
    )
    def test_numerics_in_the_interpreter(multiprocessors: int, case: Case) -> None:
        with interpreted(multiprocessors):
            check(case)


if jax.default_backend() == "gpu":

    @pytest.mark.parametrize("rows", [1, 3, 8, 33, 64, 100, 513])
    @pytest.mark.parametrize(
        "matrix",
        [
            (1152, 896, 128, INT4, jnp.float16, "none"),
            (896, 4864, 128, INT4, jnp.float16, "zero"),
            (4608, 3584, 64, INT4, jnp.bfloat16, "zero"),
            (896, 4864, 32, INT4, jnp.float32, "min"),
            (320, 1088, 1088, INT8, jnp.bfloat16, "none"),
            (896, 4864, 128, INT8, jnp.float16, "zero"),
            (1152, 896, 128, FLOAT8, jnp.bfloat16, "none"),
            (896, 4864, 4864, FLOAT8, jnp.float32, "none"),
        ],
        ids=str,
    )
    def test_numerics_on_the_gpu(rows: int, matrix: tuple[Any, ...]) -> None:
        check((rows, *matrix))


def test_few_rows_on_hopper_run_in_the_kernel_and_others_do_not() -> None:
    """ "auto" takes the kernel where it supports the call, and for as many rows as it is thought to be faster."""

    def chosen(case: Case) -> str:
        x, w, scales, zeros, mins = shapes_of(case)
        return quantized.select_quantized("auto", x, w, scales, zeros is not None or mins is not None)

    with as_if_on("Hopper GPU"):
        assert chosen((1, 4608, 3584, 128, INT4, jnp.float16, "zero")) == "gpu"
        assert chosen((1024, 4608, 3584, 128, INT8, jnp.float16, "none")) == "gpu"
        assert chosen((8192, 4608, 3584, 128, INT4, jnp.float16, "none")) == "plain"
        assert chosen((1, 4608, 3584, 16, INT4, jnp.float16, "none")) == "plain"
        assert chosen((1, 4608, 3600, 3600, INT8, jnp.float16, "none")) == "plain"
        text = jax.jit(quantized.quantized_matmul).trace(*shapes_of(LOWERED[0])).lower(lowering_platforms=("cuda",))
        assert text.as_text().count("@mosaic_gpu_v2") == 1
    with as_if_on("CPU"):
        assert chosen((1, 4608, 3584, 128, INT4, jnp.float16, "zero")) == "plain"


def test_rows_are_rounded_where_that_is_asked_for() -> None:
    """Also on Hopper, before its kernel; never without being asked."""
    x, w = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16), jax.ShapeDtypeStruct((128, 256), INT8)
    scales = jax.ShapeDtypeStruct((128, 1), jnp.float32)
    for device in ("Hopper GPU", "CPU"):
        with as_if_on(device):
            assert quantized.select_quantized("auto", x, w, scales, False, rounded=True) == "w8a8"
            assert quantized.select_quantized("auto", x, w, scales, False) in ("gpu", "plain")
    groups = jax.ShapeDtypeStruct((128, 2), jnp.float32)
    with pytest.raises(InputError, match="needs one scale for each output"):
        quantized.select_quantized("w8a8", x, w, groups, False)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
def test_many_rounded_rows_are_multiplied_by_the_kernel_of_codes(dtype: Any) -> None:
    """On Hopper, where no sums are to be added over shards of the inputs, and rows are in bfloat16."""

    def kernels(rows: int, dtype_of_rows: Any, K: int = 256) -> int:
        x, w = jax.ShapeDtypeStruct((rows, K), dtype_of_rows), jax.ShapeDtypeStruct((192, K), dtype)
        scales = jax.ShapeDtypeStruct((192, 1), jnp.float16)
        chosen = quantized.select_quantized("auto", x, w, scales, False, True)
        assert quantized.select_quantized("auto", x, w, scales, False, True, sharded=True) == "w8a8"
        run = jax.jit(functools.partial(quantized.quantized_matmul, implementation=chosen)).trace(x, w, scales)
        return int(run.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2"))

    with as_if_on("Hopper GPU"):
        assert kernels(1500, jnp.bfloat16) == 1
        assert kernels(1500, jnp.float32) == kernels(1024, jnp.bfloat16) == kernels(1500, jnp.bfloat16, 192) == 0


@pytest.mark.parametrize("scheme", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("model", "least"), [("tiny", 4), ("tiny-moe", 6)])
def test_a_models_many_rounded_rows_lower_to_the_kernel_of_codes(scheme: Any, model: str, least: int) -> None:
    """The projections of a layer and its experts, on a mesh of one device: within a `shard_map`, as in a model."""
    config = published(model)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    if config.moe is not None:
        sizes["moe"] = dataclasses.replace(config.moe, intermediate_size=256, shared_intermediate_size=256)
    config = dataclasses.replace(
        config,
        num_layers=1,
        max_window_layers=1,
        quantization=Quantization(Scheme(scheme), activations=scheme),
        **sizes,
    )
    mesh, options = make_mesh({}, jax.devices()[:1]), Options(stacked=False, fused=True, dtype="bfloat16")
    sharding = Sharding.for_inference(config, mesh)
    params = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec)),
        abstract_params(config, sharding, options, jnp.bfloat16),
        param_specs(config, sharding, options),
    )
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=jax.NamedSharding(mesh, sharding.tokens))

    def run(params: Any, tokens: jax.Array) -> jax.Array:
        model = bind(config, params, sharding, options)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return model(tokens, positions, causal_mask(*tokens.shape)).hidden

    with as_if_on("Hopper GPU"), jax.set_mesh(mesh):
        text = jax.jit(run).trace(params, tokens)
        kernels = text.lower(lowering_platforms=("cuda",)).as_text().count("grouped_product")
    assert kernels >= least, kernels


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
def test_many_rounded_rows_are_the_products_of_their_codes(dtype: Any) -> None:
    """Up to one rounding to bfloat16; on a Hopper GPU by the kernel, whose sums of float8 have 14 bits."""
    rng = print_seed()
    M, N, K = (int(x) for x in rng.integers([1025, 1, 1], [1300, 4, 4]) * [1, 64, 128])
    x = jnp.asarray(rng.normal(size=(M, K)), jnp.bfloat16)
    w = jnp.asarray(rng.integers(-127, 128, (N, K)), dtype)
    scales = jnp.asarray(rng.uniform(0.5, 2, (N, 1)), jnp.float16)
    codes, of_rows = (np.asarray(a, np.float64) for a in quantized.quantize_rows(x, dtype))
    factors = of_rows * np.asarray(scales, np.float64).T
    want = codes @ np.asarray(w, np.float64).T * factors
    terms = np.abs(codes) @ np.abs(np.asarray(w, np.float64)).T * factors
    chosen = quantized.select_quantized("auto", x, w, scales, False, True)
    got = np.asarray(quantized.quantized_matmul(x, w, scales, implementation=chosen), np.float64)
    assert (np.abs(got - want) <= 2.0**-8 * np.abs(want) + (2.0**-10 if dtype == FLOAT8 else 2.0**-23) * terms).all()


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ((1, 96, 256, 128, INT4, jnp.float16, "none"), {}, "multiples of 64"),
        ((1, 64, 256, 16, INT4, jnp.float16, "none"), {}, "multiple of 32 inputs"),
        ((1, 64, 256, 128, jnp.int16, jnp.float16, "none"), {}, "codes"),
        ((1, 64, 256, 128, INT4, jnp.int32, "none"), {}, "scales"),
        ((1, 64, 256, 128, FLOAT8, jnp.float16, "zero"), {}, "integer zeros"),
        ((1, 64, 256, 128, INT4, jnp.float16, "none"), {0: (1, 128)}, "x \\[M, K\\]"),
        ((1, 64, 256, 128, INT4, jnp.float16, "zero"), {3: (64, 1)}, "mins \\[N, G\\]"),
    ],
)
def test_unsupported_arguments_are_refused(case: Case, change: dict[int, tuple[int, ...]], says: str) -> None:
    args = shapes_of(case)
    for at, shape in change.items():
        args[at] = jax.ShapeDtypeStruct(shape, args[at].dtype)
    with pytest.raises(InputError, match=says):
        jax.eval_shape(quantized_gpu.matmul, *args)
