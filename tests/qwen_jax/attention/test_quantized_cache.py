"""A cache in 8 bits holds what one in the compute dtype holds, up to half a step of each number."""

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
from qwen_jax.attention.cache import ContiguousCache, ContiguousLayer
from qwen_jax.attention.paged_cache import PagedCache, PagedLayer
from qwen_jax.attention.rope import rotate
from qwen_jax.errors import InputError
from qwen_jax.kernels import QuantizedRows
from qwen_jax.parallel.sharding import Sharding, make_mesh
from tests.helpers import exact
from tests.helpers.forward import random_unstacked
from tests.qwen_jax.attention.test_paged_cache import CONFIG, page_table, step

DTYPES = [jnp.dtype("int8"), jnp.dtype(jnp.float8_e4m3fn)]


def fresh_rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


def empty_rows(shape: tuple[int, ...], dtype: Any, channels_Kd: Any = None) -> QuantizedRows:
    return QuantizedRows(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1]), channels_Kd)


def half_steps(rows: QuantizedRows, x: Any) -> np.ndarray:
    """The most that the components of x are rounded by: half the distance of two neighbouring numbers of the dtype."""
    scale = np.asarray(rows.scales_BKS, np.float64)[..., None]
    if rows.dtype == jnp.int8:
        steps = np.ones(x.shape)
    else:
        # Numbers in [2^e, 2^(e + 1)) are 2^(e - 3) apart, those below 2^-6 as far as those of 2^-6.
        steps = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(np.asarray(x)) / scale, 1e-30))), -6) - 3)
    return steps * scale / 2


def layer_of(
    keys: QuantizedRows, values: QuantizedRows, slot: int = 0, shift_B: Any = None, fresh: bool = False
) -> Any:
    return ContiguousLayer(keys, values, jnp.int32(slot), shift_B, fresh)


# --- the numbers ---


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1), st.floats(-20, 20), st.floats(0, 6), st.booleans(), st.sampled_from(DTYPES))
def test_rounding_loses_at_most_half_a_step(
    seed: int, exponent: float, spread: float, with_channels: bool, dtype: Any
) -> None:
    """|x - x'| <= half a step times the channel's factor, for vectors of any size; zeros and the largest stay."""
    rng = np.random.default_rng(seed)
    channels = np.exp2(rng.integers(0, 6, (2, 16))).astype(np.float32) if with_channels else None
    x = rng.normal(0, 1, (1, 2, 5, 16)) * np.exp2(exponent + rng.normal(0, spread, (1, 2, 5, 1)))
    x = x.astype(np.float32)
    x[0, 0, 0], x[0, 1, 1, 3] = 0, 0
    form = empty_rows(x.shape, dtype, None if channels is None else jnp.asarray(channels))
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    got = form.quantized(jnp.asarray(x))
    values, scales = np.asarray(got.values_BKSd, np.float64), np.asarray(got.scales_BKS, np.float64)
    factors = np.ones((2, 16)) if channels is None else channels.astype(np.float64)
    divided = x / factors[:, None]
    np.testing.assert_allclose(scales, np.maximum(np.abs(divided).max(-1) / largest, 1e-30), rtol=1e-6)
    # The sum of the float32 roundings of the division and of the scale: two units of the last place.
    error = np.abs(values * scales[..., None] - divided)
    assert (error <= half_steps(got, divided) + np.abs(divided) * 2**-21).all()
    assert (error <= np.maximum(np.abs(divided) / 16, scales[..., None] * 0.5)).all()
    assert np.abs(values).max() == largest
    assert (values[x == 0] == 0).all()
    # What was read back is written with the same numbers.
    again = form.quantized(got.dequantized(jnp.float32))
    np.testing.assert_array_equal(np.asarray(again.values_BKSd, np.float32), np.asarray(got.values_BKSd, np.float32))


def test_a_vector_that_is_not_finite_is_read_as_nan(dtype: Any) -> None:
    """And spoils no other one."""
    x = np.ones((1, 1, 4, 8), np.float32)
    x[0, 0, 1, 3], x[0, 0, 2, 5] = np.inf, np.nan
    back = np.asarray(empty_rows(x.shape, dtype).quantized(jnp.asarray(x)).dequantized(jnp.float32))
    np.testing.assert_array_equal(np.isnan(back[0, 0]).sum(-1), [0, 8, 8, 0])
    np.testing.assert_array_equal(back[0, 0, [0, 3]], 1)


def test_sizes_are_those_of_the_buffers(mesh: Mesh) -> None:
    """A little over half of bfloat16: 4 bytes of scale to each vector."""
    with jax.set_mesh(mesh):
        sharding = Sharding.for_inference(CONFIG, mesh)
        numbers = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
        for kind in (*DTYPES, "bfloat16"):
            cache = ContiguousCache.for_prompts(CONFIG, sharding, jnp.zeros(3, jnp.int32), 8, jnp.dtype(kind))
            sizes: Any = {"num_pages": 3, "page_size": 8, "dtype": jnp.dtype(kind)}
            pages = PagedCache.empty(CONFIG, sharding, *numbers, **sizes)
            for held in (cache, pages):
                size = sum(x.nbytes for x in jax.tree.leaves((held.keys, held.values)))
                assert size == 3 * 8 * quantized_cache.kv_bytes_per_token(CONFIG, kind)
                assert held.slots == 8
        for kind in ("int16", "float8_e5m2", "bool"):
            with pytest.raises(InputError, match=f"bfloat16, float16, float32, int8 or float8_e4m3fn; got {kind}"):
                ContiguousCache.for_prompts(CONFIG, sharding, jnp.zeros(3, jnp.int32), 8, jnp.dtype(kind))
    with pytest.raises(InputError, match=r"auto \(the compute dtype\), int8 or fp8; got 'int4'"):
        quantized_cache.check_kv_dtype("int4")


# --- writing ---


def test_the_bits_do_not_depend_on_chunks_neighbours_padding_or_pages(dtype: Any) -> None:
    """A token's numbers and scale are the same, whichever chunk brings it, wherever its row begins, in any page."""
    rng = fresh_rng()
    B, K, S, d, T = 3, 2, 16, 8, 11
    k, v = (jnp.asarray(rng.normal(0, 2, (B, T, K, d)), jnp.bfloat16) for _ in range(2))
    write = jax.jit(lambda layer, k, v: layer.write(k, v))

    def written(cuts: list[int]) -> ContiguousLayer:
        layer = layer_of(empty_rows((B, K, S, d), dtype), empty_rows((B, K, S, d), dtype))
        for a, b in zip([0, *cuts], [*cuts, T], strict=True):
            layer = write(dataclasses.replace(layer, slot=jnp.int32(a)), k[:, a:b], v[:, a:b])
        return layer

    whole = written([])
    cuts = sorted(rng.choice(np.arange(1, T), 2, replace=False).tolist())
    for a, b in zip(jax.tree.leaves(written(cuts)), jax.tree.leaves(whole), strict=True):
        if a.ndim:
            np.testing.assert_array_equal(a, b)

    # Prompts of unequal length, padded on the right, end at the same slot: what was not written has scale 0.
    lengths = np.array([T, 5, 8])
    shift = jnp.asarray(T - lengths, jnp.int32)
    rows = empty_rows((B, K, S, d), dtype)
    padded = write(layer_of(rows, rows, shift_B=shift, fresh=True), k, v)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(
            padded.k_BKSd.values_BKSd[b, :, T - length : T], whole.k_BKSd.values_BKSd[b, :, :length]
        )
        np.testing.assert_array_equal(
            padded.v_BKSd.scales_BKS[b, :, T - length : T], whole.v_BKSd.scales_BKS[b, :, :length]
        )
    assert not padded.k_BKSd.scales_BKS[:, :, T:].any()
    assert not padded.v_BKSd.values_BKSd[:, :, T:].any()

    # Pages of any size, token by token as in decoding.
    page = int(rng.choice([4, 8]))
    M = S // page
    table = rng.permutation(40)[: B * M].reshape(B, M).astype(np.int32)
    held = empty_rows((40, K, page, d), dtype)
    layer = PagedLayer(held, held, jnp.asarray(table), jnp.zeros(B, jnp.int32), jnp.ones(B, jnp.int32), fresh=False)
    for t in range(T):
        layer = dataclasses.replace(layer, lengths_B=jnp.full(B, t, jnp.int32))
        layer = write(layer, k[:, t : t + 1], v[:, t : t + 1])
    for got, want in zip(
        jax.tree.leaves((layer.k_NKPd, layer.v_NKPd)), jax.tree.leaves((whole.k_BKSd, whole.v_BKSd)), strict=True
    ):
        # [B, M, K, page, ...] as one row of slots for each B.
        flat = np.moveaxis(np.asarray(got)[table], 2, 1).reshape(B, K, S, *got.shape[3:])
        np.testing.assert_array_equal(flat[:, :, :T].view(np.uint8), np.asarray(want)[:, :, :T].view(np.uint8))


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"data": 4}, {"tensor": 2}], ids=str)
def test_shards_hold_the_bits_of_one_device(axes: dict[str, int]) -> None:
    """Each shard quantises its own rows and heads: the same cache bits, and attention to float32 rounding."""
    rng = fresh_rng()
    dtype = DTYPES[int(rng.integers(2))]
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
    rows = empty_rows((B, K, S, d), dtype, channels), empty_rows((B, K, S, d), dtype)
    (want, want_lse), one = jax.jit(run)(layer_of(*rows), q, k, v, start)
    with jax.set_mesh(mesh):
        make = functools.partial(quantized_cache.empty, (B, K, S, d), sharding, dtype)
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
    """Against float64: disjoint intervals, a row that sees nothing, unwritten slots, factors of channels; in pages."""
    rng = fresh_rng()
    dtype = DTYPES[int(rng.integers(2))]
    B, S, d = 2, 40, 16
    channels = jnp.exp2(jnp.asarray(rng.integers(0, 5, (K, d)), jnp.float32))
    written = empty_rows((B, K, S, d), dtype, channels), empty_rows((B, K, S, d), dtype)
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

    # The same in pages, all rows at a time and one by one.
    page, M = 8, S // 8
    table = rng.permutation(B * M + 3)[: B * M].reshape(B, M).astype(np.int32)

    def in_pages(x: jax.Array) -> jax.Array:
        parts = np.moveaxis(np.asarray(x).reshape(B, K, M, page, *x.shape[3:]), 2, 1)
        pages = np.zeros((B * M + 3, *parts.shape[2:]), parts.dtype)
        pages[table] = parts
        return jnp.asarray(pages)

    k, v = (QuantizedRows(in_pages(x.values_BKSd), in_pages(x.scales_BKS), x.channels_Kd) for x in (keys, values))
    for most in (2**18, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qwen_jax.kernels.decode.GATHERED_SLOTS", most)
            paged = jax.jit(functools.partial(kernels.paged_attention, scale=0.3))(q, k, v, jnp.asarray(table), mask)
        np.testing.assert_allclose(paged[0], out, rtol=0, atol=1e-6)
        np.testing.assert_allclose(paged[1], lse, rtol=0, atol=1e-5)


def test_the_error_of_attention_is_bounded_by_the_steps(dtype: Any) -> None:
    """With half steps h, logits are off by at most e = scale |q| h_k, so outputs by (exp(2 e) - 1) max|v| + h_v."""
    rng = fresh_rng()
    B, K, H, S, d, scale = 2, 2, 4, 50, 16, 0.25
    q, k, v = (rng.normal(0, 1, shape).astype(np.float32) for shape in ((B, 1, H, d), *((B, S, K, d),) * 2))
    mask = kernels.cache_mask(jnp.zeros(B, jnp.int32), jnp.int32(S - 1), 1)

    @jax.jit
    def run(layer: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        layer = layer.write(k, v)
        return layer.attend(q, mask, scale=scale, implementation="reference"), layer

    rows = empty_rows((B, K, S, d), dtype)
    (got, lse), layer = run(layer_of(rows, rows), q, k, v)
    want = exact.attention(q, k, v, np.zeros((B, 1)), np.full((B, 1), S), scale)
    halves_k, halves_v = half_steps(layer.k_BKSd, k.swapaxes(1, 2)), half_steps(layer.v_BKSd, v.swapaxes(1, 2))
    of_head = np.abs(q).reshape(B, K, H // K, d)
    e = scale * np.einsum("BKGd,BKSd->BKGS", of_head, halves_k).max()
    bound = np.expm1(2 * e) * np.abs(v).max() + halves_v.max()
    error = np.abs(np.asarray(got) - want.out).max()
    assert 1e-5 < error < bound
    assert np.abs(np.asarray(lse) - want.lse).max() < e + 1e-5


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
        back = empty_rows(k.shape, DTYPES[0], channels).quantized(k).dequantized(jnp.float32)
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


def test_logits_are_off_by_what_the_rounding_makes_of_them(dtype: Any, mesh: Mesh) -> None:
    """To first order a logit is off by the sum of J_i e_i over all numbers of the cache, with its gradient J and their
    rounding errors e: by less than the sum of |J_i| h_i for half steps h, and hardly ever by more than a few roots of
    the sum of (J_i h_i)^2."""
    rng = fresh_rng()
    sharding, B, T = Sharding.for_inference(CONFIG, mesh), 1, 40
    tokens = jax.device_put(
        rng.integers(0, CONFIG.vocab_size, (B, T + 1), np.int32), NamedSharding(mesh, sharding.tokens)
    )
    with jax.set_mesh(mesh):
        params = random_unstacked(CONFIG, mesh, rng)
        lengths = jax.device_put(np.full(B, T, np.int32), NamedSharding(mesh, sharding.rows))
        plain = ContiguousCache.for_prompts(CONFIG, sharding, lengths, T + 1, jnp.dtype("float32"))
        plain = step(sharding, params, tokens[:, :T], plain)[1].advanced(T)
        channels = quantized_cache.channels_of_keys(params, CONFIG, sharding)
        forms = (
            [empty_rows(plain.keys[0].shape, dtype, x) for x in channels],
            [empty_rows(plain.keys[0].shape, dtype)] * len(channels),
        )
        rounded = [
            tuple(form.quantized(x) for form, x in zip(some, held, strict=True))
            for some, held in zip(forms, (plain.keys, plain.values), strict=True)
        ]
        in_8_bits = dataclasses.replace(plain, keys=rounded[0], values=rounded[1])
        got, _ = step(sharding, params, tokens[:, T:], in_8_bits)

        def logits(keys: Any, values: Any) -> jax.Array:
            cache = dataclasses.replace(plain, keys=keys, values=values)
            return step(sharding, params, tokens[:, T:], cache)[0]

        want, gradient = jax.vjp(logits, plain.keys, plain.values)
        chosen, most, square = rng.permutation(CONFIG.vocab_size)[:6], np.zeros(6), np.zeros(6)
        for i, token in enumerate(chosen):
            one = np.zeros(want.shape, np.float32)
            one[0, 0, token] = 1
            J = gradient(jax.device_put(one, want.sharding))
            for slopes, held, some in zip(J, (plain.keys, plain.values), rounded, strict=True):
                for slope, x, rows in zip(slopes, held, some, strict=True):
                    factors = np.ones(x.shape) if rows.channels_Kd is None else np.asarray(rows.channels_Kd)[:, None]
                    part = np.abs(np.asarray(slope, np.float64)) * half_steps(rows, x / factors) * factors
                    most[i] += part.sum()
                    square[i] += (part**2).sum()
    error = (np.asarray(got) - np.asarray(want))[0, 0, chosen]
    # The new token's own key and value are rounded, too: one of 41, and terms of second order.
    assert (np.abs(error) < 1.2 * most).all()
    # Independent errors within their half steps exceed 5.5 times this root once in a million (Hoeffding's inequality).
    assert (np.abs(error) < 1.2 * 5.5 * np.sqrt(square)).all()
    assert error.any()


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_contiguous_and_paged_give_the_same_logits(axes: dict[str, int]) -> None:
    """Prompts of unequal lengths in one piece or in chunks, then single tokens, in pages of two sizes."""
    rng = fresh_rng()
    dtype = DTYPES[int(rng.integers(2))]
    mesh = make_mesh(axes) if axes else make_mesh({}, jax.devices()[:1])
    sharding = Sharding.for_inference(CONFIG, mesh)
    B, T, steps, num_pages = 4, 13, 3, 64
    lengths = rng.integers(2, T + 1, B).astype(np.int32)
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T + steps), np.int32)
    wide = NamedSharding(mesh, sharding.tokens)
    on_rows = functools.partial(jax.device_put, device=NamedSharding(mesh, sharding.rows))
    ones = on_rows(np.ones(B, np.int32))
    with jax.set_mesh(mesh):
        params = random_unstacked(CONFIG, mesh, rng)
        channels = quantized_cache.channels_of_keys(params, CONFIG, sharding)
        caches: list[Any] = [ContiguousCache.for_prompts(CONFIG, sharding, on_rows(lengths), 32, dtype, channels)]
        for page in (8, 4) if not axes else (4,):
            table = page_table(rng, B, 16 // page, sharding.batch_shards, num_pages)
            sizes: Any = {"num_pages": num_pages, "page_size": page, "dtype": dtype, "key_channels": channels}
            pages = jax.device_put(table, wide)
            caches.append(PagedCache.empty(CONFIG, sharding, pages, on_rows(lengths), **sizes))
        prompt, found = jax.device_put(tokens[:, :T], wide), []
        for i, cache in enumerate(caches):
            logits, cache = step(sharding, params, prompt, cache)
            real = [np.asarray(logits)[b, :length] for b, length in enumerate(lengths)]
            found.append([np.concatenate(real)])
            cache = cache.advanced(lengths.max() if i == 0 else ones)
            for t in range(T, T + steps):
                logits, cache = step(sharding, params, jax.device_put(tokens[:, t : t + 1], wide), cache)
                found[-1].append(np.asarray(logits)[:, 0])
                cache = cache.advanced(1 if i == 0 else ones)
        # The last paged one once more, with its prompts token by token. It is not `fresh`, so that one program runs.
        cache = dataclasses.replace(PagedCache.empty(CONFIG, sharding, pages, ones, **sizes), fresh=False)
        by_token = []
        for t in range(T):
            logits, cache = step(sharding, params, jax.device_put(tokens[:, t : t + 1], wide), cache)
            by_token.append(np.asarray(logits)[:, 0])
            cache = cache.advanced(ones)
    every = np.stack(by_token, axis=1)
    found.append([np.concatenate([every[b, :length] for b, length in enumerate(lengths)])])
    # A number on the edge between two steps may be rounded either way: a step is 1% of a key at most.
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=False):
            assert exact.relative(a, b) < 2e-3
            assert np.median(np.abs(a - b)) < 1e-5
