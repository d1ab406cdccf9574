"""A cache in 8 bits holds what a contiguous one holds, up to half a step of each vector's scale."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import quantized_cache
from qwen_jax.attention.cache import ContiguousCache, ContiguousLayer, PagedCache
from qwen_jax.attention.rope import rotate
from qwen_jax.errors import InputError
from qwen_jax.kernels import QuantizedRows
from qwen_jax.parallel.sharding import Sharding, make_mesh
from tests.helpers import exact
from tests.helpers.forward import random_unstacked
from tests.qwen_jax.attention.test_cache import CONFIG, step

INT8 = jnp.dtype("int8")


def fresh_rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


def empty_rows(shape: tuple[int, ...], channels_Kd: Any = None) -> QuantizedRows:
    return QuantizedRows(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1]), channels_Kd)


def layer_of(
    keys: QuantizedRows, values: QuantizedRows, slot: int = 0, shift_B: Any = None, fresh: bool = False
) -> Any:
    return ContiguousLayer(keys, values, jnp.int32(slot), shift_B, fresh)


# --- the numbers ---


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 20), st.floats(0, 6), st.booleans())
def test_rounding_loses_at_most_half_a_step(seed: int, exponent: float, spread: float, with_channels: bool) -> None:
    """|x - x'| <= scale / 2 times the channel's factor, for vectors of any size; zeros and the largest stay."""
    rng = np.random.default_rng(seed)
    channels = np.exp2(rng.integers(0, 6, (2, 16))).astype(np.float32) if with_channels else None
    x = rng.normal(0, 1, (1, 2, 5, 16)) * np.exp2(exponent + rng.normal(0, spread, (1, 2, 5, 1)))
    x = x.astype(np.float32)
    x[0, 0, 0], x[0, 1, 1, 3] = 0, 0
    form = empty_rows(x.shape, None if channels is None else jnp.asarray(channels))
    got = form.quantized(jnp.asarray(x))
    values, scales = np.asarray(got.values_BKSd, np.float64), np.asarray(got.scales_BKS, np.float64)
    factors = np.ones((2, 16)) if channels is None else channels.astype(np.float64)
    divided = x / factors[:, None]
    np.testing.assert_allclose(scales, np.maximum(np.abs(divided).max(-1) / 127, 1e-30), rtol=1e-6)
    # The sum of the float32 roundings of the division and of the scale: two units of the last place of 127.
    assert (np.abs(values * scales[..., None] - divided) <= scales[..., None] * (0.5 + 127 * 2**-22)).all()
    assert np.abs(values).max() <= 127
    assert (values[x == 0] == 0).all()
    # What was read back is written with the same numbers.
    again = form.quantized(got.dequantized(jnp.float32))
    np.testing.assert_array_equal(again.values_BKSd, got.values_BKSd)


def test_sizes_are_those_of_the_buffers(mesh: Mesh) -> None:
    """A little over half of bfloat16: 4 bytes of scale to each vector."""
    with jax.set_mesh(mesh):
        sharding = Sharding.for_inference(CONFIG, mesh)
        for dtype in ("int8", "bfloat16"):
            cache = ContiguousCache.for_prompts(CONFIG, sharding, jnp.zeros(3, jnp.int32), 8, jnp.dtype(dtype))
            held = sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values)))
            assert held == 3 * 8 * quantized_cache.kv_bytes_per_token(CONFIG, dtype)
        assert cache.slots == 8
        numbers = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
        with pytest.raises(InputError, match="Only ContiguousCache holds 8 bits"):
            PagedCache.empty(CONFIG, sharding, *numbers, num_pages=1, page_size=8, dtype=INT8)


# --- writing ---


def test_the_bits_do_not_depend_on_chunks_neighbours_or_padding() -> None:
    """A token's numbers and scale are the same, whichever chunk brings it and wherever its row begins."""
    rng = fresh_rng()
    B, K, S, d, T = 3, 2, 24, 8, 17
    k, v = (jnp.asarray(rng.normal(0, 2, (B, T, K, d)), jnp.bfloat16) for _ in range(2))
    write = jax.jit(lambda layer, k, v: layer.write(k, v))

    def written(cuts: list[int]) -> ContiguousLayer:
        layer = layer_of(empty_rows((B, K, S, d)), empty_rows((B, K, S, d)))
        for a, b in zip([0, *cuts], [*cuts, T], strict=True):
            layer = write(dataclasses.replace(layer, slot=jnp.int32(a)), k[:, a:b], v[:, a:b])
        return layer

    whole = written([])
    for cuts in ([8], sorted(rng.choice(np.arange(1, T), 3, replace=False).tolist())):
        for a, b in zip(jax.tree.leaves(written(cuts)), jax.tree.leaves(whole), strict=True):
            if a.ndim:
                np.testing.assert_array_equal(a, b)

    # Prompts of unequal length, padded on the right, end at the same slot: what was not written has scale 0.
    lengths = np.array([T, 5, 11])
    shift = jnp.asarray(T - lengths, jnp.int32)
    padded = write(layer_of(empty_rows((B, K, S, d)), empty_rows((B, K, S, d)), shift_B=shift, fresh=True), k, v)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(
            padded.k_BKSd.values_BKSd[b, :, T - length : T], whole.k_BKSd.values_BKSd[b, :, :length]
        )
        np.testing.assert_array_equal(
            padded.v_BKSd.scales_BKS[b, :, T - length : T], whole.v_BKSd.scales_BKS[b, :, :length]
        )
    assert not padded.k_BKSd.scales_BKS[:, :, T:].any()
    assert not padded.v_BKSd.values_BKSd[:, :, T:].any()


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"data": 4}, {"tensor": 2}], ids=str)
def test_shards_hold_the_bits_of_one_device(axes: dict[str, int]) -> None:
    """Each shard quantises its own rows and heads: the same cache bits, and attention to float32 rounding."""
    rng = fresh_rng()
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    sharding = Sharding.for_inference(CONFIG, mesh)
    B, K, H, d, S, T = 4, CONFIG.num_kv_heads, CONFIG.num_heads, CONFIG.head_dim, 16, 9
    k, v = (rng.normal(0, 1, (B, T, K, d)).astype(np.float32) for _ in range(2))
    q = rng.normal(0, 1, (B, 1, H, d)).astype(np.float32)
    channels = jnp.exp2(jnp.asarray(rng.integers(0, 4, (K, d)), jnp.float32))

    def run(layer: Any, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array) -> Any:
        layer = layer.write(k, v)
        mask = kernels.cache_mask(start, jnp.int32(T - 1), 1)
        return layer.attend(q, mask, scale=d**-0.5, implementation="reference"), layer

    start = rng.integers(0, T, B).astype(np.int32)
    rows = empty_rows((B, K, S, d), channels), empty_rows((B, K, S, d))
    (want, want_lse), one = jax.jit(run)(layer_of(*rows), q, k, v, start)
    with jax.set_mesh(mesh):
        make = functools.partial(quantized_cache.empty, (B, K, S, d), sharding, INT8)
        spec = P(sharding.cache[1], None)
        layer = layer_of(make(jax.device_put(channels, NamedSharding(mesh, spec))), make())
        arrays = [jax.device_put(x, NamedSharding(mesh, sharding.heads)) for x in (q, k, v)]
        shards = jax.shard_map(
            run,
            in_specs=(layer.specs(sharding), *(sharding.heads,) * 3, sharding.rows),
            out_specs=((sharding.heads, P(*sharding.rows, sharding.heads[2], None)), layer.specs(sharding)),
        )
        (got, lse), several = jax.jit(shards)(layer, *arrays, jax.device_put(start, NamedSharding(mesh, sharding.rows)))
    for a, b in zip(jax.tree.leaves(several), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-5)


# --- attention ---


@pytest.mark.parametrize(("T", "H", "K"), [(1, 6, 2), (3, 4, 4), (7, 4, 1)])
def test_attention_is_that_over_the_dequantised_cache(T: int, H: int, K: int) -> None:
    """Against float64: disjoint intervals, a row that sees nothing, unwritten slots, factors of channels."""
    rng = fresh_rng()
    B, S, d = 2, 40, 16
    channels = jnp.exp2(jnp.asarray(rng.integers(0, 5, (K, d)), jnp.float32))
    written = empty_rows((B, K, S, d), channels), empty_rows((B, K, S, d))
    quantized = jax.jit(lambda form, x: form.quantized(x))
    keys, values = (quantized(x, rng.normal(0, 1, (B, K, S, d)).astype(np.float32)) for x in written)
    q = jnp.asarray(rng.normal(0, 1, (B, T, H, d)), jnp.float32)
    ends = np.sort(rng.integers(0, S + 1, (B, T + 1)), axis=1)[:, ::-1].astype(np.int32)
    start, end = ends[:, 1:].copy(), ends[:, :-1].copy()
    end[0, 0] = start[0, 0]
    mask = kernels.Mask(jnp.asarray(start), jnp.asarray(end))
    out, lse = jax.jit(functools.partial(kernels.quantized_attention, scale=0.3))(q, keys, values, mask)
    wide = [np.asarray(x.dequantized(jnp.float32)).swapaxes(1, 2) for x in (keys, values)]
    want = exact.attention(q, *wide, start, end, 0.3)
    assert exact.relative(out, want.out) < 2e-6
    np.testing.assert_allclose(np.asarray(lse), want.lse, rtol=0, atol=1e-5)


def test_the_error_of_attention_is_bounded_by_the_steps() -> None:
    """Logits are off by at most e = scale |q|_1 s_k / 2, so outputs by (exp(2 e) - 1) max|v| + s_v / 2."""
    rng = fresh_rng()
    B, K, H, S, d, scale = 2, 2, 4, 50, 16, 0.25
    q, k, v = (rng.normal(0, 1, shape).astype(np.float32) for shape in ((B, 1, H, d), *((B, S, K, d),) * 2))
    mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(S - 1), 1)

    @jax.jit
    def run(layer: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        layer = layer.write(k, v)
        return layer.attend(q, mask, scale=scale, implementation="reference"), layer

    (got, lse), layer = run(layer_of(empty_rows((B, K, S, d)), empty_rows((B, K, S, d))), q, k, v)
    want = exact.attention(q, k, v, np.zeros((B, 1)), np.full((B, 1), S), scale)
    e = scale * np.abs(q).sum(-1).max() * float(layer.k_BKSd.scales_BKS.max()) / 2
    bound = np.expm1(2 * e) * np.abs(v).max() + float(layer.v_BKSd.scales_BKS.max()) / 2
    error = np.abs(np.asarray(got) - want.out).max()
    assert 1e-5 < error < bound
    assert np.abs(np.asarray(lse) - want.lse).max() < e


def test_factors_of_channels_take_the_bias_out_of_the_steps() -> None:
    """With a bias of one component, as of Qwen2.5, the factors make the logits at least 3 times as exact.

    The error goes with the largest component times the norm of the factors: at best 8 times, the root of 128 / 2.
    """
    rng = fresh_rng()
    K, S, d, at = 2, 32, 128, 9
    bias = np.zeros((K, d), np.float32)
    bias[:, at] = rng.choice([-1, 1], K) * rng.uniform(100, 300, K)
    factors = quantized_cache.key_channels(jnp.asarray(bias))
    # Powers of two, equal for the two components that RoPE mixes.
    outliers = np.isin(np.arange(d), [at, at + d // 2])
    np.testing.assert_array_equal(factors, np.exp2(np.round(np.log2(factors))))
    np.testing.assert_array_equal(factors[:, at], factors[:, at + d // 2])
    assert (factors[:, outliers] > 4).all()
    np.testing.assert_array_equal(factors[:, ~outliers], 1)
    angle = rng.uniform(0, 6, (1, S, 1, d // 2)).astype(np.float32)
    k = rotate(jnp.asarray(rng.normal(0, 2, (1, S, K, d)) + bias, jnp.float32), (jnp.cos(angle), jnp.sin(angle)))
    k, q = k.swapaxes(1, 2), rng.normal(0, 1, (d, 100))

    def error(channels: Any) -> float:
        back = empty_rows(k.shape, channels).quantized(k).dequantized(jnp.float32)
        return float(np.sqrt((((np.asarray(back, np.float64) - np.asarray(k)) @ q) ** 2).mean()))

    assert error(factors) < error(None) / 3


# --- in the model ---


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_key_biases_are_found_in_both_layouts(tensor: int) -> None:
    """Those of the separate projection, and those between queries and values of each shard of the fused one."""
    mesh = make_mesh({"tensor": tensor}, jax.devices()[:tensor])
    sharding, d, H = Sharding.for_inference(CONFIG, mesh), CONFIG.head_dim, CONFIG.num_heads
    assert CONFIG.num_kv_heads == 2
    bias = np.arange(2 * d, dtype=np.float32).reshape(2, d)
    each = np.repeat(bias, sharding.kv_heads // 2, axis=0).reshape(tensor, -1, d)
    other = np.full((tensor, H // tensor, d), -1.0, np.float32), -2.0 * np.ones_like(each)
    fused = np.concatenate([other[0], each, other[1]], axis=1)
    with jax.set_mesh(mesh):
        layers = [
            {"attention": {"k": {"bias": jax.device_put(bias, NamedSharding(mesh, sharding.kv_bias))}}},
            {"attention": {"qkv": {"bias": jax.device_put(fused, NamedSharding(mesh, sharding.fused_qkv_bias))}}},
        ]
        for got in jax.jit(lambda layers: quantized_cache.key_biases({"layers": layers}, CONFIG, sharding))(layers):
            np.testing.assert_array_equal(got, each.reshape(-1, d))


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_logits_are_close_to_those_of_a_float32_cache(axes: dict[str, int]) -> None:
    """Prompts of unequal lengths, then single tokens. A step is 1/127 of the largest component, about 3 standard
    deviations: a relative error of 3 / 127 / sqrt(12) = 0.7% of keys and values, of which a few pass two layers."""
    rng = fresh_rng()
    mesh = make_mesh(axes) if axes else make_mesh({}, jax.devices()[:1])
    sharding = Sharding.for_inference(CONFIG, mesh)
    B, T, steps = 4, 13, 4
    lengths = rng.integers(1, T + 1, B).astype(np.int32)
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T + steps), np.int32)
    wide = NamedSharding(mesh, sharding.tokens)
    with jax.set_mesh(mesh):
        params = random_unstacked(CONFIG, mesh, rng)
        on_rows = jax.device_put(lengths, NamedSharding(mesh, sharding.rows))
        channels = [quantized_cache.key_channels(x) for x in quantized_cache.key_biases(params, CONFIG, sharding)]
        make = functools.partial(ContiguousCache.for_prompts, CONFIG, sharding, on_rows, 32)
        plain, in_8_bits = make(jnp.dtype("float32")), make(INT8, channels)

        # A prompt attends to its own keys, which are not rounded.
        prompt = jax.device_put(tokens[:, :T], wide)
        want, plain = step(sharding, params, prompt, plain)
        got, in_8_bits = step(sharding, params, prompt, in_8_bits)
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(np.asarray(got)[b, :length], np.asarray(want)[b, :length], rtol=0, atol=1e-5)
        plain, in_8_bits = plain.advanced(lengths.max()), in_8_bits.advanced(lengths.max())

        for i in range(steps):
            one = jax.device_put(tokens[:, T + i : T + i + 1], wide)
            want, plain = step(sharding, params, one, plain)
            got, in_8_bits = step(sharding, params, one, in_8_bits)
            assert 1e-5 < exact.relative(got, want) < 0.03
            plain, in_8_bits = plain.advanced(1), in_8_bits.advanced(1)
