"""Decode attention on TPUs: numerics and races in TPU interpret mode, and the TPU compiler for every generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax import kernels
from qwen_jax.errors import InputError
from qwen_jax.kernels.decode import flash_decode_tpu
from qwen_jax.kernels.decode.quantized import QuantizedRows
from qwen_jax.kernels.tpu import device, tiles
from tests.helpers import exact
from tests.helpers.masks import MASKS, anything, window
from tests.helpers.platforms import as_if_on
from tests.helpers.tpu_compiler import TOPOLOGIES, compile_for, needs_libtpu


def drawn(numbers, mask, B, T, S, H, K, d, dtype):
    q, k, v = (jnp.asarray(numbers.standard_normal(s), dtype) for s in ((B, T, H, d), (B, K, S, d), (B, K, S, d)))
    start, end = mask(numbers, B, T, S)
    return q, k, v, jnp.asarray(start), jnp.asarray(end)


def paged(numbers, k, v, P):
    """The same caches in pages in random order among others, and their table, followed by undefined entries."""
    B, K, S, d = k.shape
    M = -(-S // P)
    places = numbers.permutation(B * M + 3)[: B * M].reshape(B, M)

    def cut(x):
        x = np.pad(np.asarray(x, np.float32), ((0, 0), (0, 0), (0, M * P - S), (0, 0)))
        pages = numbers.standard_normal((B * M + 3, K, P, d))
        pages[places] = x.reshape(B, K, M, P, d).swapaxes(1, 2)
        return jnp.asarray(pages, k.dtype)

    rubbish = numbers.integers(-(2**31), 2**31, (B, 3))
    return cut(k), cut(v), jnp.asarray(np.concatenate([places, rubbish], axis=1), jnp.int32)


def check(got, args, scale) -> None:
    out, lse = (np.asarray(x, np.float64) for x in got)
    q, k, v, start, end = args
    want = exact.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), start, end, scale)
    small = q.dtype == jnp.float32
    assert exact.relative(out, want.out) < (2e-6 if small else 5e-3)
    unseen = np.isneginf(want.lse)
    assert (np.isneginf(lse) == unseen).all()
    assert np.abs(np.where(unseen, 0, lse - np.where(unseen, 0, want.lse))).max() < (1e-5 if small else 1e-4)


@pytest.mark.draw(4)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("T", "H", "K", "d", "dtype"), [(1, 4, 2, 64, "float32"), (5, 14, 2, 128, "bfloat16")])
@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.__name__)
def test_numerics_of_contiguous_and_paged_caches(monkeypatch, mask, T, H, K, d, dtype, splits) -> None:
    """Parity with float64: tiles of a few pages, used ranges that begin and end anywhere, one split and two."""
    monkeypatch.setattr(flash_decode_tpu, "cache_tile_bytes", lambda: 1 << 18)
    monkeypatch.setattr(flash_decode_tpu, "_splits", lambda _: splits)
    numbers, scale = np.random.default_rng(), d**-0.5
    args = drawn(numbers, mask, 2, T, 1000, H, K, d, dtype)
    q, k, v, start, end = args
    pages = paged(numbers, k, v, 64)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        whole = jax.jit(functools.partial(flash_decode_tpu.attention, scale=scale))(*args)
        parts = jax.jit(functools.partial(flash_decode_tpu.paged_attention, scale=scale))(q, *pages, start, end)
        jax.block_until_ready((whole, parts))
    check(whole, args, scale)
    check(parts, args, scale)


@pytest.fixture(params=["int8", "float8_e4m3fn", "float8_e4m3fn as e4m3b11"])
def narrow(request, monkeypatch):
    """A dtype of 8 bits; float8_e4m3fn is converted in one way on v5 and v6, and in another one on v4 and 7x."""
    name, _, unpacked = request.param.partition(" as ")
    monkeypatch.setattr(device, "unpacks_e4m3b11", lambda: bool(unpacked))
    return jnp.dtype(name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_number_of_8_bits_becomes_itself(narrow, dtype) -> None:
    """Zeros, subnormal numbers and the largest ones, in any order. Only NaN may become another number."""
    codes = np.random.default_rng().permutation(np.arange(32 * 128).astype(np.uint8))
    x = jnp.asarray(codes.reshape(32, 128).view(narrow))

    def program(x_ref, out_ref):
        out_ref[...] = tiles.widened(x_ref[...], dtype) * tiles.unit(x_ref.dtype)

    with pltpu.force_tpu_interpret_mode():
        got = pl.pallas_call(program, out_shape=jax.ShapeDtypeStruct(x.shape, dtype))(x)
    want = np.asarray(x).astype(np.float64)
    assert np.unique(codes).size == 256
    np.testing.assert_array_equal(np.asarray(got, np.float64)[np.isfinite(want)], want[np.isfinite(want)])


@pytest.mark.parametrize(
    ("T", "H", "K", "d", "dtype", "splits"), [(1, 4, 2, 64, "float32", 1), (3, 14, 2, 128, "bfloat16", 2)]
)
def test_numerics_of_a_cache_in_8_bits(monkeypatch, narrow, T, H, K, d, dtype, splits) -> None:
    """Parity with float64 over the dequantised cache; intervals that begin and end anywhere."""
    monkeypatch.setattr(flash_decode_tpu, "cache_tile_bytes", lambda: 1 << 18)
    monkeypatch.setattr(flash_decode_tpu, "_splits", lambda _: splits)
    numbers, scale = np.random.default_rng(), d**-0.5
    q, k, v, start, end = drawn(numbers, anything, 2, T, 1000, H, K, d, dtype)
    held, wide = [], []
    for x in (k, v):
        rows = QuantizedRows(jnp.zeros(x.shape, narrow), jnp.zeros(x.shape[:-1])).quantized(x)
        held += [rows.values_BKSd, rows.scales_BKS]
        wide.append(rows.dequantized(jnp.float32))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        run = jax.jit(functools.partial(flash_decode_tpu.quantized_attention, scale=scale))
        got = jax.block_until_ready(run(q, *held, start, end))
        # The same in pages of 32 slots, in random order; a tile has whole registers of scales.
        k_pages, v_pages, table = paged(numbers, held[0], held[2], 32)
        scales = [jnp.pad(x, ((0, 0), (0, 0), (0, 32 * table.shape[1] - 1000))) for x in (held[1], held[3])]
        run = jax.jit(functools.partial(flash_decode_tpu.paged_attention, scale=scale))
        parts = jax.block_until_ready(run(q, k_pages, v_pages, table, start, end, scales=tuple(scales)))
    check(got, (q, *wide, start, end), scale)
    check(parts, (q, *wide, start, end), scale)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("when", ["eager", "on_wait"])
def test_copies_of_pages_are_waited_for(monkeypatch, when, bits) -> None:
    """Results are correct whether a copy happens at once or only at its wait; nothing is read while it is written."""
    monkeypatch.setattr(flash_decode_tpu, "cache_tile_bytes", lambda: 1 << 18)
    numbers = np.random.default_rng()
    args = drawn(numbers, window, 1, 2, 700, 2, 1, 64, jnp.float32)
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=when, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        run = functools.partial(flash_decode_tpu.paged_attention, scale=0.125)
        if bits == 8:
            args = args[0], *(jnp.clip(jnp.round(16 * x), -127, 127) / 16 for x in args[1:3]), *args[3:]
        k, v, table = paged(numbers, *args[1:3], 64)
        if bits == 8:
            scales = jnp.full((1, 1, 64 * table.shape[1]), 1 / 16, jnp.float32)
            run = functools.partial(run, scales=(scales, scales))
            k, v = ((16 * x).astype(jnp.int8) for x in (k, v))
        got = jax.block_until_ready(run(args[0], k, v, table, *args[3:]))
    check(got, args, 0.125)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def test_pages_in_8_bits_are_read_where_they_are() -> None:
    """Of a multiple of 32 slots, also with factors of channels; others are gathered first."""
    numbers, (N, K, P, d) = np.random.default_rng(), (9, 2, 32, 64)
    q = jnp.asarray(numbers.standard_normal((2, 1, 4, d)), jnp.float32)
    table = jnp.asarray(numbers.permutation(N)[:8].reshape(2, 4), jnp.int32)
    mask = kernels.Mask(jnp.asarray([[3], [0]], jnp.int32), jnp.asarray([[100], [128]], jnp.int32))
    channels = jnp.exp2(jnp.asarray(numbers.integers(0, 4, (K, d)), jnp.float32))

    def pages_of(dtype, size):
        zeros = jnp.zeros((N, K, size, d), dtype), jnp.zeros((N, K, size), jnp.float32)
        x = jnp.asarray(numbers.standard_normal((2, N, K, size, d)), jnp.float32)
        return [QuantizedRows(*zeros, c).quantized(y) for c, y in zip((channels, None), x, strict=True)]

    run = functools.partial(kernels.paged_attention, scale=0.125)
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        held = pages_of(dtype, P)
        with as_if_on("TPU"):
            got = jax.block_until_ready(run(q, *held, table, mask))
            for size in (P, 16):
                text = str(jax.make_jaxpr(run)(q, *pages_of(dtype, size), table, mask))
                assert ("paged_decode_attention_8_bits" in text) == (size == P)
        want = run(q, *held, table, mask, implementation="reference")
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_splits_share_the_used_tiles() -> None:
    for first in range(4):
        for last in range(first, 9):
            live = np.array([[first, last]])
            shares = [flash_decode_tpu._share(live, 0, s, 2) for s in (0, 1)]
            assert int(shares[0][0]) == first
            assert int(shares[0][1]) == int(shares[1][0])
            assert int(shares[1][1]) == last
            assert abs(sum((-1) ** i * int(b - a) for i, (a, b) in enumerate(shares))) <= 1


@pytest.mark.draw(5)
@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(("B", "T", "H", "K", "d"), [(1, 1, 28, 4, 128), (3, 4, 14, 1, 64)])
def test_compiles(chip, B, T, H, K, d) -> None:
    q, i = jax.ShapeDtypeStruct((B, T, H, d), jnp.bfloat16), jax.ShapeDtypeStruct((B, T), jnp.int32)
    cache, pages = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, K, 32768, d), (512, K, 64, d)))
    table = jax.ShapeDtypeStruct((B, 300), jnp.int32)
    run = compile_for(chip, lambda *x: flash_decode_tpu.attention(*x, 0.1), q, cache, cache, i, i)
    assert "decode_attention" in run.as_text()
    run = compile_for(chip, lambda *x: flash_decode_tpu.paged_attention(*x, 0.1), q, pages, pages, table, i, i)
    assert "paged_decode_attention" in run.as_text()
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        narrow, scales = (jax.ShapeDtypeStruct(cache.shape[:n], x) for n, x in ((4, dtype), (3, jnp.float32)))
        args = q, narrow, scales, narrow, scales, i, i
        run = compile_for(chip, lambda *x: flash_decode_tpu.quantized_attention(*x, 0.1), *args)
        assert "decode_attention_8_bits" in run.as_text()
        narrow, scales = (jax.ShapeDtypeStruct(*x) for x in ((pages.shape, dtype), ((B, K, 300 * 64), jnp.float32)))
        args = q, narrow, narrow, table, i, i, scales, scales
        run = compile_for(chip, lambda *x: flash_decode_tpu.paged_attention(*x[:6], 0.1, x[6:]), *args)
        assert "paged_decode_attention_8_bits" in run.as_text()


@needs_libtpu
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_a_cache_that_is_not_whole_tiles_is_not_copied(dtype) -> None:
    """A million slots: the compiled program has no array of the cache's size beside the cache."""
    B, H, K, S, d = 1, 28, 4, 1_000_064, 128
    q, i = jax.ShapeDtypeStruct((B, 3, H, d), jnp.bfloat16), jax.ShapeDtypeStruct((B, 3), jnp.int32)
    held, run = [jax.ShapeDtypeStruct((B, K, S, d), dtype)], flash_decode_tpu.attention
    if dtype != "bfloat16":
        held.append(jax.ShapeDtypeStruct((B, K, S), jnp.float32))
        run = flash_decode_tpu.quantized_attention
    memory = compile_for("v5p", lambda *x: run(*x, 0.1), q, *held, *held, i, i).memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * memory.argument_size_in_bytes


def test_unsupported_arguments_are_refused() -> None:
    i = jnp.ones((1, 20), jnp.int32)
    q, k = jnp.ones((1, 20, 14, 64), jnp.bfloat16), jnp.ones((1, 2, 64, 64), jnp.bfloat16)
    with pytest.raises(InputError, match="at most 128 query rows"):
        flash_decode_tpu.attention(q, k, k, i, i, 1.0)
    large, long = jnp.ones((1, 2, 8192, 64), jnp.bfloat16), jnp.ones((1, 2**18), jnp.int32)
    for pages, table in ((k[:, :, :8], i), (large, i), (k, long)):
        with pytest.raises(InputError, match=r"multiple of 16 slots.*Use implementation='reference'"):
            flash_decode_tpu.paged_attention(q[:, :1], pages, pages, table, i[:, :1], i[:, :1], 1.0)
