"""Attention on TPUs: numerics in TPU interpret mode, and the TPU compiler for every generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention import flash_tpu, flash_tpu_tiles
from tests.helpers import exact
from tests.helpers.masks import MASKS, anything, causal, packed, window
from tests.helpers.tpu_compiler import TOPOLOGIES, compile_for, needs_libtpu

SMALL = flash_tpu_tiles.Tiling(queries=256, keys=128, lanes=128, segment=256, backward_segment=128, vmem_bytes=64 << 20)
WIDE = dataclasses.replace(SMALL, queries=1024, lanes=256, segment=512, backward_segment=512)


@functools.partial(jax.jit, static_argnames=("scale", "tiles"))
def run(q, k, v, start, end, dout, dlse, scale, tiles):
    """Output, log-sum-exp and gradients of rows that see something."""

    def f(q, k, v):
        return flash_tpu.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), start, end, scale, tiles)

    (out, lse), pull = jax.vjp(f, q, k, v)
    return out, lse, *pull((dout, dlse))


def interpreted(*args, **kwargs):
    """Runs in the interpreter, where memory holds NaN until it is written and reads out of bounds raise."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return jax.device_get(run(*args, **kwargs))


def drawn(numbers, mask, B, T, S, H, K, d, dtype):
    q, k, v, dout = (
        jnp.asarray(numbers.standard_normal(shape), dtype)
        for shape in ((B, T, H, d), (B, S, K, d), (B, S, K, d), (B, T, H, d))
    )
    start, end = mask(numbers, B, T, S)
    # The gradient of a row without keys may be NaN (a guard that divides zero by zero). It must not spread.
    dlse = jnp.asarray(np.where((start < end)[:, None], numbers.standard_normal((B, H, T)), np.nan), jnp.float32)
    return q, k, v, jnp.asarray(start), jnp.asarray(end), dout, dlse


def check(args, tiles) -> dict[str, float]:
    q, k, v, start, end, dout, dlse = args
    scale = q.shape[-1] ** -0.5
    got = interpreted(*args, scale=scale, tiles=tiles)
    want = exact.attention(q, k, v, start, end, scale, dout, jnp.nan_to_num(dlse))
    empty = ~np.asarray(start < end)
    assert not np.asarray(got[0], np.float32)[empty].any()
    unseen = np.broadcast_to(empty[:, None], got[1].shape)
    assert (np.isneginf(got[1]) == unseen).all()
    names = ("out", "dq", "dk", "dv")
    errors = {n: exact.relative(g, w) for n, g, w in zip(names, (got[0], *got[2:]), (want.out, *want[2:]), strict=True)}
    return errors | {"lse": float(np.abs(np.where(unseen, 0, got[1] - np.where(unseen, 0, want.lse))).max())}


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32), st.sampled_from(MASKS))
def test_any_intervals(seed, mask):
    """Float32 parity with float64 over several segments: output, log-sum-exp and all three gradients."""
    errors = check(drawn(np.random.default_rng(seed), mask, 1, 300, 400, 2, 1, 64, jnp.float32), SMALL)
    assert max(errors.values()) < 5e-6, errors


CASES = (
    (packed, 2, 256, 256, 4, 2, 128, SMALL),
    (causal, 1, 130, 500, 3, 1, 64, SMALL),
    (window, 1, 1100, 600, 2, 2, 128, WIDE),
    (anything, 1, 1, 77, 7, 1, 128, SMALL),
    (packed, 1, 1024, 1024, 2, 1, 64, WIDE),
    (causal, 1, 300, 300, 2, 1, 128, None),
)


@pytest.mark.draw(2)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(getattr(x, "__name__", x)) for x in c[:-1]))
def test_bfloat16(case) -> None:
    """Errors come only from rounding the result, the probabilities and their gradients."""
    mask, *shape, tiles = case
    errors = check(drawn(np.random.default_rng(), mask, *shape, jnp.bfloat16), tiles)
    assert errors.pop("lse") < 1e-4
    assert max(errors.values()) < 6e-3, errors


def test_other_documents_change_no_bit() -> None:
    """Changing one document changes no bit of outputs and gradients of the others."""
    T, cut = 512, 200
    numbers = np.random.default_rng()
    q, k, v, _, _, dout, _ = drawn(numbers, causal, 1, T, T, 2, 1, 64, jnp.bfloat16)
    place = np.arange(T)
    start, end = (jnp.asarray(x[None], jnp.int32) for x in (np.where(place < cut, 0, cut), place + 1))
    none = jnp.zeros((1, 2, T))
    first = interpreted(q, k, v, start, end, dout, none, scale=0.1, tiles=SMALL)
    changed = [x.at[:, :cut].multiply(-3) for x in (q, k, v)]
    second = interpreted(*changed, start, end, dout, none, scale=0.1, tiles=SMALL)
    for a, b, axis in zip(first, second, (1, 2, 1, 1, 1), strict=True):
        a, b = (np.moveaxis(np.asarray(x, np.float32), axis, 0) for x in (a, b))
        np.testing.assert_array_equal(a[cut:], b[cut:])
        assert (a[:cut] != b[:cut]).any()


def test_tile_sizes_change_the_result_only_by_rounding() -> None:
    args = drawn(np.random.default_rng(), packed, 1, 700, 700, 2, 1, 64, jnp.float32)
    one, other = (interpreted(*args, scale=0.125, tiles=tiles) for tiles in (SMALL, WIDE))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(st.integers(1, 5000), st.integers(1, 2**20)),
    st.sampled_from([(16, 128), (64, 128), (64, 256), (128, 128), (128, 256)]),
    st.sampled_from([(64, "bfloat16"), (128, "bfloat16"), (128, "float32")]),
)
def test_tilings_fit_and_need_little_padding(T, core, kind) -> None:
    (vmem, lanes), (d, dtype) = core, kind
    found = flash_tpu_tiles.choose_tiling(T, T, d, dtype, (vmem << 20, lanes))
    assert found.queries % (2 * lanes) == 0
    assert found.segment % found.backward_segment == found.backward_segment % found.keys == 0
    itemsize = jnp.dtype(dtype).itemsize
    assert flash_tpu_tiles.forward_bytes(found, d, itemsize) <= (vmem << 20) * 15 // 16
    assert flash_tpu_tiles.backward_bytes(found, d, itemsize) <= (vmem << 20) * 15 // 16
    assert -(-T // found.segment) * found.segment <= 1.1 * T + 512
    assert -(-T // found.queries) * found.queries <= 1.2 * T + 1024


@pytest.mark.draw(2)
@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize(
    ("d", "dtype", "T", "S", "H", "K"),
    [
        (128, "bfloat16", 32768, 32768, 4, 2),
        (64, "bfloat16", 4096, 4096, 4, 2),
        (128, "float32", 32768, 32768, 4, 2),
        # One row and one key/value head: XLA would fuse the stacking of the segments' gradients into the kernel.
        (128, "bfloat16", 131072, 262144, 1, 1),
    ],
)
def test_compiles_within_its_vmem(chip, d, dtype, T, S, H, K, record_property) -> None:
    """Forward and backward compile; the compiler refuses a kernel that needs more VMEM than we count."""
    used = {}

    def f(q, k, v, start, end):
        tiles = flash_tpu_tiles.choose_tiling(T, S, d, dtype)
        size = jnp.dtype(dtype).itemsize
        used.update(
            forward=flash_tpu_tiles.forward_bytes(tiles, d, size),
            backward=flash_tpu_tiles.backward_bytes(tiles, d, size),
        )
        assert max(used.values()) <= tiles.vmem_bytes
        run = functools.partial(flash_tpu.attention, start_BT=start, end_BT=end, scale=0.1)
        (out, lse), pull = jax.vjp(run, q, k, v)
        return out, pull((out, lse))

    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, T, H, d), (1, K, S, d)))
    i = jax.ShapeDtypeStruct((1, T), jnp.int32)
    compiled = compile_for(chip, f, q, k, k, i, i)
    text = compiled.as_text()
    assert "flash_forward" in text
    assert "flash_backward" in text
    for name, size in used.items():
        record_property(f"VMEM bytes, {chip}, {name}", size)


def test_unsupported_arguments_are_refused() -> None:
    q, k, i = (
        jnp.ones((1, 64, 2, 32), jnp.bfloat16),
        jnp.ones((1, 2, 64, 32), jnp.bfloat16),
        jnp.ones((1, 64), jnp.int32),
    )
    with pytest.raises(InputError, match="head_dim 64 or 128"):
        flash_tpu.attention(q, k, k, i, i, 1.0)
    q, k = jnp.ones((1, 64, 2, 64), jnp.float16), jnp.ones((1, 2, 64, 64), jnp.float16)
    with pytest.raises(InputError, match="bfloat16 or float32"):
        flash_tpu.attention(q, k, k, i, i, 1.0)
