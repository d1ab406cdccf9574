"""A quantised model computes what its dequantised weights compute: in every layout, on every mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from convert.placement import place
from convert.source import TreeSource
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference.weights import fuse
from qwen_jax.kernels.matmul.quantized import dequantize, quantize_rows
from qwen_jax.linear import Linear
from qwen_jax.lora import LoRA
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params
from qwen_jax.published import published
from qwen_jax.quantization import W8A8_TOKENS, Quantization, Scheme, unified
from qwen_jax.quantized import QuantizedLinear
from tests.helpers.forward import logits
from tests.helpers.quantized import dequantized, random_quantized, with_quantization
from tests.helpers.runs import print_seed

SCHEMES = {
    "int4": Scheme("int4", 16),
    "int4-zeros-order": Scheme("int4", 16, offset="zero", ordered=True),
    "int8-mins": Scheme("int8", 32, "float32", "min"),
    "int8-rows": Scheme("int8", 0, "bfloat16"),
    "fp8": Scheme("float8_e4m3fn", 0, "float32"),
}
DENSE, MOE = published("tiny-untied"), published("tiny-moe")


def tokens(rng: np.random.Generator, config: ModelConfig, rows: int = 2, length: int = 12) -> np.ndarray:
    return rng.integers(0, config.vocab_size, (rows, length))


def in_layout(params: Params, config: ModelConfig, mesh: Mesh, layout: str) -> tuple[Params, Options]:
    options = Options(stacked=layout == "stacked")
    placed = place(TreeSource(params, config), mesh, "float32", options)
    if layout == "fused":
        with jax.set_mesh(mesh):
            placed = fuse(placed, config, Sharding.for_inference(config, mesh))
    return placed, dataclasses.replace(options, fused=layout == "fused")


@pytest.mark.draw(8)
@pytest.mark.parametrize("layout", ["stacked", "listed", "fused"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_dequantised_weights(mesh: Mesh, scheme: str, layout: str) -> None:
    rng = print_seed()
    config = with_quantization(DENSE, Quantization(SCHEMES[scheme]))
    params = random_quantized(config, rng)
    plain, weights = dequantized(params, config, mesh)
    text = tokens(rng, config)
    want = logits(plain, weights, mesh, text, Options(stacked=False))
    placed, options = in_layout(params, config, mesh, layout)
    got = logits(config, placed, mesh, text, options)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("axes", [{"tensor": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}])
@pytest.mark.parametrize("layout", ["listed", "fused"])
def test_shards_never_split_a_group(axes: dict[str, int], layout: str) -> None:
    """Also where the axis does not divide the number of groups, and with inputs that are in another order."""
    rng = print_seed()
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    one = make_mesh({}, jax.devices()[:1])
    scheme = Scheme("int4", 64, offset="zero", ordered=bool(rng.integers(2)))
    config = with_quantization(DENSE, Quantization(scheme))
    params = random_quantized(config, rng)
    plain, weights = dequantized(params, config, one)
    text = tokens(rng, config, rows=4)
    want = logits(plain, weights, one, text, Options(stacked=False))
    placed, options = in_layout(params, config, mesh, layout)
    got = logits(config, placed, mesh, text, options)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("layout", ["stacked", "fused"])
@pytest.mark.parametrize("axes", [{}, {"expert": 2, "tensor": 2}, {"fsdp": 2}])
def test_experts(axes: dict[str, int], layout: str) -> None:
    rng = print_seed()
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    one = make_mesh({}, jax.devices()[:1])
    scheme = Scheme("int4", 16, offset="zero", ordered="tensor" not in axes)
    config = with_quantization(MOE, Quantization(scheme))
    params = random_quantized(config, rng)
    plain, weights = dequantized(params, config, one)
    text = tokens(rng, config)
    want = logits(plain, weights, one, text, Options(stacked=False))
    placed, options = in_layout(params, config, mesh, layout)
    got = logits(config, placed, mesh, text, options)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_layers_and_projections_may_differ(mesh: Mesh) -> None:
    """As in GGUF files, whose value projections have more bits; joined projections keep all values."""
    rng = print_seed()
    wide, fine = Scheme("int8", 16, "float32"), Scheme("int4", 32, "float32", "min")
    exceptions = (("layers.0.attention.v", wide), ("layers.1.mlp.up", fine), ("layers.1.attention.q", None))
    config = with_quantization(DENSE, Quantization(Scheme("int4", 64, offset="zero"), exceptions))
    params = random_quantized(config, rng)
    plain, weights = dequantized(params, config, mesh)
    text = tokens(rng, config)
    want = logits(plain, weights, mesh, text, Options(stacked=False))
    for layout in ("listed", "fused"):
        placed, options = in_layout(params, config, mesh, layout)
        got = logits(config, placed, mesh, text, options)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    with pytest.raises(InputError, match="cannot be stacked"):
        in_layout(params, config, mesh, "stacked")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_rounded_activations(dtype: Any, mesh: Mesh) -> None:
    """Rows are rounded to the nearest code, with the same scale on every mesh."""
    rng = print_seed()
    x = jnp.asarray(rng.normal(size=(5, 64)) * rng.lognormal(size=(5, 1)), jnp.float32)
    codes, scales = quantize_rows(x.at[2].set(0), dtype)
    top = float(jnp.iinfo(dtype).max if dtype == "int8" else jnp.finfo(dtype).max)
    # Half a unit in the last place of a code: 1/2 of an integer, 1/16 of the value of a float with 3 bits.
    step = np.where(dtype == "int8", 0.5 * scales, np.maximum(np.abs(x) / 16, scales * 2.0**-10))
    assert (np.abs(codes.astype(jnp.float32) * scales - x.at[2].set(0)) <= step * 1.0001).all()
    assert np.abs(codes.astype(jnp.float32)).max() == top
    config = with_quantization(DENSE, Quantization(Scheme(dtype, 0, "float32"), activations=dtype))
    params, text = random_quantized(config, rng), tokens(rng, config)
    found = []
    for axes in ({}, {"tensor": 2}):
        on = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
        placed, options = in_layout(params, config, on, "fused")
        found.append(logits(config, placed, on, text, options))
    # Sums in another order may move an activation to the next code.
    relative = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[0])
    assert relative < 0.02
    plain, weights = dequantized(params, config, mesh)
    exact = logits(plain, weights, mesh, text, Options(stacked=False))
    assert 0 < np.linalg.norm(found[0] - exact) / np.linalg.norm(exact) < 0.2


@pytest.mark.draw(1)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("model", ["dense", "experts"])
def test_rounding_on_request_begins_with_many_tokens(dtype: Any, model: str, mesh: Mesh) -> None:
    """With fewer tokens the logits are those without rounding, with more those of a checkpoint that states it."""
    rng = print_seed()
    small = dataclasses.replace(DENSE if model == "dense" else MOE, num_layers=1)
    never = with_quantization(small, Quantization(Scheme(dtype, 0, "float32")))
    assert never.quantization is not None
    asked = never.with_w8a8()
    always = dataclasses.replace(never, quantization=dataclasses.replace(never.quantization, activations=dtype))
    assert always.with_w8a8() == always
    params = random_quantized(never, rng)
    for tokens_in_all, same, other in ((W8A8_TOKENS - 1, never, always), (W8A8_TOKENS, always, never)):
        text = tokens(rng, never, 1, tokens_in_all)
        found = []
        for config in (asked, same, other):
            placed, options = in_layout(params, config, mesh, "fused")
            found.append(logits(config, placed, mesh, text, options))
        np.testing.assert_array_equal(found[0], found[1])
        assert (found[0] != found[2]).any()


@pytest.mark.draw(1)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_rows_of_experts_are_rounded(dtype: Any, mesh: Mesh) -> None:
    """On every mesh. All experts are chosen, so that a rounding error cannot change the choice."""
    rng = print_seed()
    assert MOE.moe is not None
    moe = dataclasses.replace(MOE.moe, num_experts_per_tok=MOE.moe.num_experts)
    # Only the experts are quantised.
    others = [f"attention.{name}" for name in "qkvo"] + [f"moe.shared.{name}" for name in ("gate", "up", "down")]
    exceptions = tuple((f"layers.0.{name}", None) for name in others)
    quantization = Quantization(Scheme(dtype, 0, "float32"), exceptions, dtype)
    config = with_quantization(dataclasses.replace(MOE, moe=moe, num_layers=1), quantization)
    params, text = random_quantized(config, rng), tokens(rng, config)
    found = []
    for axes in ({}, {"expert": 2, "tensor": 2}, {"fsdp": 2}):
        on = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
        placed, options = in_layout(params, config, on, "fused")
        found.append(logits(config, placed, on, text, options))
    plain, weights = dequantized(params, config, mesh)
    exact = logits(plain, weights, mesh, text, Options(stacked=False))
    # Sums in another order may move an activation to the next code.
    for one in found[1:]:
        assert np.linalg.norm(found[0] - one) / np.linalg.norm(found[0]) < 0.02
    assert 0 < np.linalg.norm(found[0] - exact) / np.linalg.norm(exact) < 0.2


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_gradients_pass_through_rounded_activations(dtype: Any, axes: dict[str, int]) -> None:
    """With respect to x and LoRA's matrices they are those beside the dequantised weight, on every mesh.

    The first projection has sharded outputs, the second sharded inputs.
    """
    rng = print_seed()
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    s, scheme = Sharding.for_training(DENSE, mesh), Scheme(dtype, 0, "float32")
    for einsum, specs, O, I in (
        ("BTD,FD->BTF", {"x": s.hidden, "w": s.gate_up, "out": s.feed_forward}, 96, 64),
        ("BTF,DF->BTD", {"x": s.feed_forward, "w": s.down, "out": s.hidden}, 64, 96),
    ):
        x, dy = (rng.normal(size=(4, 6, n)).astype(np.float32) for n in (I, O))
        codes = jnp.asarray(rng.integers(-100, 100, (O, I))).astype(dtype)
        scales = jnp.asarray(rng.uniform(0.01, 0.02, (O, 1)), jnp.float32)
        a, b = rng.normal(size=(3, I)).astype(np.float32), rng.normal(size=(O, 3)).astype(np.float32)

        def loss(x: jax.Array, a: jax.Array, b: jax.Array, quantised: bool) -> jax.Array:
            linear = Linear(einsum, dequantize(codes, scales), **specs)  # noqa: B023
            values: dict[str, jax.Array] = {"lora_a": a, "lora_b": b}
            if quantised:
                linear = QuantizedLinear(linear, scheme, s, Quantization(scheme, activations=dtype), trained=True)
                values |= {"weight": codes, "scales": scales}  # noqa: B023
            else:
                values["weight"] = linear.weight[...]
            linear.add_lora(LoRA(rank=3), jax.random.key(0))
            for name, value in values.items():
                param = getattr(linear, name)
                # Shards of the inputs repeat the scales.
                param.set_value(jax.reshard(jnp.broadcast_to(value, param.shape), param.get_metadata("spec")))
            return (linear(jax.reshard(x, linear.x)) * jax.reshard(dy, linear.out)).sum()  # noqa: B023

        with jax.set_mesh(mesh):
            both = [jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)(x, a, b, q) for q in (True, False)]
        (rounded, got), (exact, want) = both
        assert rounded != exact
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_reading_back_gives_the_arrays(mesh: Mesh) -> None:
    """Also from shards whose groups were cut."""
    rng = print_seed()
    config = with_quantization(DENSE, Quantization(Scheme("int4", 64, offset="zero", ordered=True)))
    params = random_quantized(config, rng)
    for on in (mesh, make_mesh({"tensor": 4}, jax.devices()[:4])):
        placed, _ = in_layout(params, config, on, "listed")
        again = place(TreeSource(placed, config), mesh, "float32", Options(stacked=False))
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, np.asarray(b))


def test_unified_schemes() -> None:
    four, zeros = Scheme("int4", 128), Scheme("int4", 32, offset="zero")
    assert unified(four, four) == four
    assert unified(four, zeros) == Scheme("int4", 32, offset="zero")
    assert unified(zeros, Scheme("int8", 0, "float32", "min")) == Scheme("int8", 32, "float32", "min")
    assert unified(four, None) is None
    assert unified(four, Scheme("float8_e4m3fn")) is None


def test_projections_that_are_joined_must_agree_on_the_order(mesh: Mesh) -> None:
    config = with_quantization(DENSE, Quantization(Scheme("int4", 16, ordered=True)))
    params = random_quantized(config, print_seed())
    order = params["layers"][1]["mlp"]["up"]["order"]
    params["layers"][1]["mlp"]["up"]["order"] = np.roll(order, 1)
    with pytest.raises(InputError, match="Layer 1: gate and up have different orders"):
        in_layout(params, config, mesh, "fused")


def test_bad_schemes() -> None:
    with pytest.raises(InputError, match="must be positive"):
        Scheme("int4", -1)
    with pytest.raises(InputError, match="float8 weights have neither"):
        Scheme("float8_e4m3fn", ordered=True)
    with pytest.raises(InputError, match="one scale for each output"):
        Quantization(Scheme("int8", 128), activations="int8")
    for wrong in (Scheme("int4"), Scheme("int8", 128), Scheme("int8", offset="zero")):
        with pytest.raises(InputError, match=rf"one scale for each output; got {wrong}\. Leave w8a8 out, or quantise"):
            Quantization(wrong).with_w8a8()
    with pytest.raises(InputError, match="this model is not quantised"):
        DENSE.with_w8a8()
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    config = with_quantization(MOE, Quantization(Scheme("int4", 16, ordered=True)))
    with pytest.raises(InputError, match="Use an expert axis"):
        place(TreeSource(random_quantized(config, print_seed()), config), mesh, "float32", Options(stacked=False))


def test_codes_take_the_bytes_that_they_need() -> None:
    """No array of a quantised model is wider than its scheme says."""
    config = with_quantization(DENSE, Quantization(Scheme("int4", 32)))
    params = random_quantized(config, print_seed())
    mesh = make_mesh({}, jax.devices()[:1])
    placed, _ = in_layout(params, config, mesh, "fused")
    dtypes = {str(x.dtype) for layer in placed["layers"] for x in jax.tree.leaves(layer["mlp"])}
    assert dtypes == {"int4", "float16"}
    assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(placed))
