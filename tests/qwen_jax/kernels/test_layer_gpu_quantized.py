"""Layers with quantised weights: lowering and use in decoding anywhere, numerics interpreted or on a GPU."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.attention.quantized_cache import KVDtype
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import one_row
from qwen_jax.kernels.decode import layer, layer_gpu_quantized
from qwen_jax.kernels.decode.layer_gpu_quantized import Matrix, Vector, layer_tail
from qwen_jax.kernels.matmul import quantized_gpu_digits as digits
from qwen_jax.kernels.matmul.quantized import dequantize
from qwen_jax.kernels.matmul.quantized_gpu_few import product
from qwen_jax.kernels.matmul.quantized_gpu_tiles import Operands, permuted
from qwen_jax.kernels.matmul.quantized_gpu_tiling import choose_tiling
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from tests.helpers.gpu_quantized import CAN_INTERPRET, interpreted
from tests.helpers.layer_cases import (
    EPS,
    ON_HOPPER,
    check_texts,
    error,
    generate,
    logits_of_both,
    plain_kernels,
    plain_quantized_tail,
)
from tests.helpers.layer_cases import (
    norm as plain_norm,
)

SCHEMES = (
    Scheme("int4", 128, "float16", "zero"),
    Scheme("int4", 32, "bfloat16"),
    Scheme("int8", 0, "bfloat16"),
    Scheme("float8_e4m3fn", 0, "float32"),
)


def print_seed() -> np.random.Generator:
    """A generator with a fresh seed, which pytest shows if the test fails."""
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


def sizes(D: int, F: int, I: int, R: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of a layer."""
    return {"o": (D, I), "gate_up": (2 * F, D), "down": (D, F), "qkv": (R, D)}


def drawn(size: tuple[int, int], scheme: Scheme, rng: np.random.Generator) -> Matrix:
    """A random matrix whose products have about the magnitude of their input."""
    (N, K), dtype = size, jnp.dtype(scheme.codes)
    groups, bounds = scheme.groups(K), (-8, 8) if dtype == jnp.int4 else (-127, 128)
    codes = rng.integers(*bounds, (N, K)).astype(np.float32)
    scales = (0.5 + rng.random((N, groups))) / bounds[1] / np.sqrt(K)
    zeros = rng.integers(-4, 4, (N, groups)) if scheme.offset == "zero" else None
    return Matrix(
        jnp.asarray(codes, dtype),
        jnp.asarray(scales, scheme.scales),
        None if zeros is None else jnp.asarray(zeros, dtype),
    )


def arguments(D: int, F: int, I: int, R: int, scheme: Scheme, rng: np.random.Generator) -> tuple[Any, ...]:
    """Arguments of `layer_tail`."""
    heads, stream, mid, after = (
        jnp.asarray(mean + deviation * rng.standard_normal(n), jnp.bfloat16)
        for n, mean, deviation in ((I, 0, 1), (D, 0, 1), (D, 1, 0.1), (D, 1, 0.1))
    )
    w = {name: drawn(size, scheme, rng) for name, size in sizes(D, F, I, R).items()}
    return heads, stream, w["o"], mid, w["gate_up"], w["down"], after, w["qkv"]


@pytest.mark.parametrize("codes", [jnp.int4, jnp.int8, jnp.float8_e4m3fn], ids=lambda x: x.__name__)
def test_the_order_of_codes_is_that_of_the_products(codes: Any) -> None:
    """Each input goes to the place where `permuted` has it."""
    i = np.arange(256)
    unit, digits = layer_gpu_quantized.ORDERS[4 if codes == jnp.int4 else 8]
    place = i // unit * unit + sum(i // here % size * there for size, here, there in digits)
    want = np.asarray(permuted(jnp.arange(256), codes))
    np.testing.assert_array_equal(want[place], i)


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-72b"])
@pytest.mark.parametrize("code_bits", [4, 8])
def test_a_whole_product_has_no_partial_results(name: str, code_bits: int) -> None:
    c = published(name)
    N = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    p = choose_tiling(1, N, c.hidden_size, code_bits, whole=True)
    assert p.parts == 1
    assert p.blocks * p.share >= -(-N // (64 * p.high)) * -(-c.hidden_size // (p.chunk * p.wide))


@pytest.mark.draw(2)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b"])
def test_lowers_for_hopper_to_eight_kernels_and_nothing_else(name: str, scheme: Scheme) -> None:
    """Nothing lies between the kernels, so that they overlap, and nothing of the size of a weight is created."""
    c = published(name)
    I, D, F = c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size

    def matrix(size: tuple[int, int]) -> Matrix:
        (N, K), G = size, scheme.groups(size[1])
        arrays = {name: jax.ShapeDtypeStruct((N, G), dtype) for name, dtype in scheme.arrays().items()}
        return Matrix(**{**arrays, "weight": jax.ShapeDtypeStruct((N, K), scheme.codes)})  # type: ignore[arg-type]

    w = {name: matrix(size) for name, size in sizes(D, F, I, I + 2 * c.num_kv_heads * c.head_dim).items()}
    heads, stream = (jax.ShapeDtypeStruct((n,), jnp.bfloat16) for n in (I, D))
    run = jax.jit(functools.partial(layer_tail, eps=EPS))
    traced = run.trace(heads, stream, w["o"], stream, w["gate_up"], w["down"], stream, w["qkv"])
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 8
    done = set(re.findall(r"stablehlo\.(\w+)", text))
    assert done <= {"custom_call", "output_operand_alias", "reshape", "broadcast_in_dim"}, done


@pytest.mark.draw(2)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("name", "shards"), [("qwen2.5-7b", 2), ("qwen2.5-7b", 4), ("qwen2.5-32b", 4)])
def test_a_tensor_shard_adds_two_sums_and_two_all_reduces(name: str, shards: int, scheme: Scheme) -> None:
    """Beside the eight kernels of a layer, each of the shard's sizes."""
    if jax.device_count() < shards:
        pytest.skip(f"Needs {shards} devices.")
    c = dataclasses.replace(published(name), quantization=Quantization(scheme))
    assert layer.supports(c, shards)
    mesh = make_mesh({"tensor": shards}, jax.devices()[:shards])
    I, D, F = c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def matrix(N: int, K: int, spec: P) -> Matrix:
        G = scheme.groups(K, shards if spec[1] else 1)
        arrays = {name: array((N, G), dtype, spec) for name, dtype in scheme.arrays().items()}
        return Matrix(**{**arrays, "weight": array((N, K), scheme.codes, spec)})  # type: ignore[arg-type]

    outputs, inputs = P("tensor", None), P(None, "tensor")
    heads, stream = array((I,), jnp.bfloat16, P("tensor")), array((D,), jnp.bfloat16, P(None))
    o, gate_up, down = matrix(D, I, inputs), matrix(2 * F, D, outputs), matrix(D, F, inputs)
    qkv = matrix(I + 2 * c.num_kv_heads * c.head_dim, D, outputs)
    args = heads, stream, o, stream, gate_up, down, stream, qkv
    tail = functools.partial(layer_tail, eps=EPS, axis="tensor")
    with jax.set_mesh(mesh):
        run = jax.shard_map(tail, out_specs=(P(None), P("tensor")), check_vma=False)
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 8
    assert text.count("stablehlo.all_reduce") == text.count("stablehlo.reduce(") == 2


def test_sizes_of_a_shard_decide_about_its_kernels() -> None:
    """72B has parts of 7,392 columns on four devices, and its quantised checkpoints 29,696 columns for 29,568."""
    quantized = dataclasses.replace(published("qwen2.5-72b"), quantization=Quantization(SCHEMES[0]))
    assert not layer.supports(quantized, 4)
    assert layer.supports(dataclasses.replace(quantized, intermediate_size=29_696), 4)
    # Groups of 128 are cut to 64 where a shard has 1,856 columns, which are not whole tiles.
    assert not layer.supports(dataclasses.replace(quantized, intermediate_size=29_696), 16)


def test_unsupported_arguments_are_refused() -> None:
    good = list(arguments(256, 128, 128, 384, SCHEMES[0], print_seed()))
    wrong = good[2]._replace(weight=good[2].weight.astype(jnp.int16))
    fewer = good[4]._replace(scales=good[4].scales[:-1])
    for index, bad in ((0, good[0][:96]), (1, good[1].astype(jnp.float32)), (2, wrong), (4, fewer)):
        with pytest.raises(InputError, match="multiples of 128"):
            layer_tail(*good[:index], bad, *good[index + 1 :], eps=EPS)


def small(scheme: Scheme, **changes: Any) -> ModelConfig:
    """Two layers of a small model with quantised weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_layers": 2, "vocab_size": 512} | changes
    return dataclasses.replace(published("tiny"), dtype="bfloat16", quantization=Quantization(scheme), **sizes)


def test_models_that_the_kernels_do_not_know_are_left_to_the_general_path() -> None:
    """An order of inputs, minima, rounded activations, and a projection in full precision."""
    for scheme in SCHEMES:
        assert layer.supports(dataclasses.replace(published("qwen2.5-7b"), quantization=Quantization(scheme)))
    [config] = [dataclasses.replace(published("qwen2.5-7b"), quantization=Quantization(SCHEMES[0]))]
    for quantization in (
        Quantization(Scheme("int4", 128, ordered=True)),
        Quantization(Scheme("int4", 32, offset="min")),
        Quantization(Scheme("int8"), activations="int8"),
        Quantization(SCHEMES[0], (("layers.3.mlp.up", None),)),
        Quantization(Scheme("int4", 16)),
    ):
        assert not layer.supports(dataclasses.replace(config, quantization=quantization))
    sparse = dataclasses.replace(published("qwen1.5-moe-a2.7b"), quantization=Quantization(SCHEMES[0]))
    assert not layer.supports(sparse)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels themselves are tested there")
@pytest.mark.parametrize("scheme", SCHEMES[::2] + SCHEMES[3:], ids=str)
def test_a_step_with_the_kernels_equals_the_model(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get the right codes, scales, zero points, norms, positions and slots: with plain functions in their
    place, the decode loop gives the tokens of the model, and a step its logits.

    The model rounds gate and up, and every dequantised weight, to 8 bits; here neither is rounded.
    """
    config = small(scheme)
    expected = generate(config)
    calls = plain_kernels(monkeypatch)
    got = generate(config)
    assert calls == ["quantised first", "attention", "quantised", "attention", "quantised", "first"]
    check_texts(got, expected, 4)
    by_kernels, by_model = logits_of_both(config, count=3)
    assert error(jnp.asarray(by_kernels), jnp.asarray(by_model)) < 2e-2


@pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")
@pytest.mark.usefixtures("multiplied")
def test_partial_results_are_added_in_the_interpreter() -> None:
    """SwiGLU and the residual stream of sums of partial products, and the norm, in either order of codes."""
    rng = print_seed()
    parts = jnp.asarray(rng.standard_normal((3, 512)), jnp.float32)
    stream, norm = (jnp.asarray(1 + rng.standard_normal(256), jnp.bfloat16) for _ in range(2))
    gate, up = parts.sum(axis=0).reshape(2, 256)
    for scheme in SCHEMES:
        w = drawn((64, 256), scheme, rng)
        with interpreted(1):
            inner = layer_gpu_quantized.swiglu(parts, w)
            added, x = layer_gpu_quantized.add_norm(stream, norm, w, parts[:, :256], eps=EPS)
        assert x is not None
        want = stream + gate.astype(jnp.bfloat16)
        assert error(values(inner, scheme), in_order_of(scheme, jax.nn.silu(gate) * up)) < 3e-3
        assert error(added, want) < 1e-3
        assert error(values(x, scheme), in_order_of(scheme, plain_norm(want, norm))) < 3e-3


@pytest.fixture(params=[False, True], ids=["converted", "digits"])
def multiplied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Integer codes are converted, or multiplied as integers. Compiled programs are forgotten."""
    monkeypatch.setattr(digits, "ENABLED", request.param)
    jax.clear_caches()
    yield
    jax.clear_caches()


def in_digits(scheme: Scheme) -> bool:
    """Whether a vector of 256 for a matrix of this scheme is written as digits."""
    return digits.supports(scheme.codes, 256, scheme.groups(256))


def in_order_of(scheme: Scheme, x: jax.Array) -> jax.Array:
    """The components of a vector in the order in which it is written for a matrix of this scheme."""
    return (digits.permuted if in_digits(scheme) else permuted)(x, scheme.codes)


def values(vector: Vector, scheme: Scheme) -> np.ndarray:
    """What the input of a product stands for."""
    if not in_digits(scheme):
        return np.asarray(vector.x[0], np.float64)
    whole = np.tensordot(256.0 ** np.arange(4), np.asarray(vector.x, np.float64), 1)
    return whole * np.repeat(np.asarray(vector.factors, np.float64), 128)


@pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")
@pytest.mark.usefixtures("multiplied")
@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2]], ids=str)
def test_a_layer_is_correct_in_the_interpreter(scheme: Scheme) -> None:
    """All kernels of a layer, one after another, against float32 products with the same roundings."""
    args = arguments(256, 384, 128, 384, scheme, print_seed())
    with interpreted(2):
        stream, qkv = layer_tail(*args, eps=EPS)
    want_stream, want_qkv = plain_quantized_tail(*args)
    assert error(stream, want_stream) < 8e-3
    assert error(qkv, want_qkv) < 8e-3


@pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")
def test_a_product_that_begins_early_is_the_same_in_the_interpreter() -> None:
    """All steps of a thread block fit in shared memory at once."""
    rng, inputs = print_seed(), 1024
    w = drawn((64, inputs), SCHEMES[2], rng)
    x = jnp.asarray(rng.standard_normal((1, inputs)), jnp.bfloat16)
    operands = Operands(permuted(x, w.weight.dtype), *w)
    with interpreted(1):
        early, late = (jax.device_get(product(operands, 1, early=early)) for early in (True, False))
    np.testing.assert_array_equal(early, late)
    assert error(early.sum(axis=0), x.astype(jnp.float32) @ dequantize(*w).T) < 1e-5


if ON_HOPPER:

    @pytest.mark.usefixtures("multiplied")
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b"])
    def test_the_kernels_are_correct_every_time(name: str, scheme: Scheme) -> None:
        """Against float32 products with the same roundings; 100 runs, which overlap, are bit-identical."""
        c = published(name)
        I = c.num_heads * c.head_dim
        R = I + 2 * c.num_kv_heads * c.head_dim
        args = arguments(c.hidden_size, c.intermediate_size, I, R, scheme, print_seed())
        stream, qkv = layer_tail(*args, eps=EPS)
        want_stream, want_qkv = jax.jit(plain_quantized_tail)(*args)
        assert error(stream, want_stream) < 8e-3
        assert error(qkv, want_qkv) < 8e-3
        for _ in range(100):
            again = layer_tail(*args, eps=EPS)
            np.testing.assert_array_equal(np.asarray(again[0]), np.asarray(stream))
            np.testing.assert_array_equal(np.asarray(again[1]), np.asarray(qkv))

    @pytest.mark.usefixtures("multiplied")
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
    def test_decoding_with_the_kernels_equals_the_model(
        kv_dtype: KVDtype, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The whole loop, with overlapping launches, compared with the code for larger batches."""
        base = published("qwen2.5-0.5b")
        config = dataclasses.replace(base, num_layers=3, vocab_size=4096, quantization=Quantization(scheme))
        got = generate(config, kv_dtype)
        np.testing.assert_array_equal(generate(config, kv_dtype), got)
        jax.clear_caches()
        monkeypatch.setattr(one_row, "supports", lambda *_: False)
        check_texts(got, generate(config, kv_dtype), 16)
