"""Split-key attention over 8-bit caches on Hopper GPUs: lowering anywhere, numerics on a GPU or in the interpreter."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.attention.dual_chunk import over_parts
from qwen_jax.errors import InputError
from qwen_jax.kernels.decode import flash_decode_int8_gpu
from qwen_jax.kernels.decode.quantized import QuantizedRows
from tests.helpers import masks
from tests.helpers.gpu_interpreter import CAN_INTERPRET, interpreted
from tests.helpers.platforms import as_if_on
from tests.qwen_jax.kernels.test_flash_decode_gpu import (
    Case,
    disjoint,
    errors,
    evenness,
    expected,
    one_key,
    outside,
    padded,
)


@pytest.fixture
def numbers() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print("seed", seed)  # pytest shows it if the test fails.
    return np.random.default_rng(seed)


def apart(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint intervals in any order, with gaps between them; many have one key or none."""
    cuts = np.sort(numbers.integers(0, S + 1, (B, 2 * T)), axis=1).reshape(B, T, 2)
    order = numbers.permuted(np.tile(np.arange(T), (B, 1)), axis=1)
    start, end = np.take_along_axis(cuts, order[..., None], axis=1).astype(np.int32).transpose(2, 0, 1)
    kind = numbers.integers(0, 6, (B, T))
    one_key, end = kind == 1, np.where(kind == 0, start - 3, end)
    return start, np.where(one_key, np.minimum(start + 1, end), end)


CASES = (
    Case(1, 1, 28, 4, 128, 32768),
    Case(2, 1, 28, 4, 128, 32768, masks.window),
    Case(3, 1, 28, 4, 128, 4096, padded),
    Case(1, 3, 28, 4, 128, 32768, disjoint),
    Case(2, 3, 28, 4, 128, 4096, disjoint),
    Case(3, 3, 28, 4, 128, 5000, apart),
    Case(3, 8, 14, 2, 64, 3000, apart),
    Case(80, 1, 28, 4, 128, 640, padded),
    Case(1, 1, 14, 2, 64, 32768),
    Case(1, 3, 14, 2, 64, 3000, disjoint),
    Case(5, 1, 14, 2, 64, 1000, masks.anything),
    Case(140, 1, 14, 2, 64, 200, masks.anything),
    Case(2, 8, 28, 4, 128, 5000, masks.anything),
    Case(3, 8, 14, 2, 64, 3000, masks.anything),
    Case(6, 5, 12, 2, 128, 776, one_key),
    Case(2, 64, 2, 2, 64, 4096, masks.causal),
    Case(1, 1, 4, 4, 128, 8, outside),
    Case(2, 1, 64, 1, 128, 3000, padded),
)
# Each case, and whether rows may be computed one after the other. They may overlap nevertheless.
BOTH = [(case, False) for case in CASES] + [(case, True) for case in CASES if case.T > 1]


def shapes_of(case: Case, held: Any = jnp.int8) -> list[jax.ShapeDtypeStruct]:
    """Arguments of the kernel except the scale, for a cache of a dtype."""
    c = case
    cache = jax.ShapeDtypeStruct((c.B, c.K, c.S, c.d), held)
    scales = jax.ShapeDtypeStruct((c.B, c.K, c.S), jnp.float32)
    q, i = jax.ShapeDtypeStruct((c.B, c.T, c.H, c.d), c.dtype), jax.ShapeDtypeStruct((c.B, c.T), jnp.int32)
    return [q, cache, scales, cache, scales, i, i]


@pytest.mark.draw(6)
@pytest.mark.parametrize(("case", "separately"), BOTH, ids=str)
def test_lowers_to_one_kernel_and_a_merge(case: Case, separately: bool, numbers: np.random.Generator) -> None:
    """The kernels pass the layout inference of Mosaic GPU, and no array of the cache's size but the cache exists."""
    run = jax.jit(functools.partial(flash_decode_int8_gpu.attention, scale=0.1, disjoint=separately))
    text = (
        run.trace(*shapes_of(case, numbers.choice(flash_decode_int8_gpu.DTYPES)))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert text.count("@mosaic_gpu_v2") == 2
    assert f"{case.S}x{case.d}xbf16" not in text


def held(layout: Any, tile: np.ndarray) -> np.ndarray:
    """What each warp and lane holds of a tile, [4, 32, registers, numbers of a register]."""
    x = tile
    for sizes in layout.tiling.tiles:
        outer, inner = x.shape[: -len(sizes)], x.shape[-len(sizes) :]
        x = x.reshape(*outer, *(n for whole, part in zip(inner, sizes, strict=True) for n in (whole // part, part)))
        n, k = len(outer), len(sizes)
        x = x.transpose([*range(n), *range(n, n + 2 * k, 2), *range(n + 1, n + 2 * k, 2)])
    warps, lanes, vector = (
        [x.ndim + d for d in dims] for dims in (layout.warp_dims, layout.lane_dims, [layout.vector_dim])
    )
    rest = [d for d in range(x.ndim) if d not in (*warps, *lanes, *vector)]
    return x.transpose([*warps, *lanes, *rest, *vector]).reshape(4, 32, -1, x.shape[vector[0]])


@pytest.mark.parametrize("d", [64, 128])
def test_keys_are_in_the_order_of_the_permuted_queries(d: int) -> None:
    """Every thread's four neighbours of an int8 tile, taken for two pairs of an operand, are those of `permuted`."""
    from jax.experimental.mosaic.gpu import fragmented_array

    tile = np.arange(64 * d).reshape(64, d)
    four, pairs = (
        held(layout, tile) for layout in (fragmented_array.WGMMA_LAYOUT_UPCAST_2X, fragmented_array.WGMMA_LAYOUT)
    )
    # Registers count columns of 16, and within them two rows; in pairs, columns of 8 and two rows.
    four = four.reshape(4, 32, d // 16, 2, 2, 2).swapaxes(3, 4)
    operand = np.empty(64 * d, int)
    operand[pairs.reshape(-1)] = four.reshape(-1)
    want = np.asarray(flash_decode_int8_gpu.permuted(jnp.asarray(tile)))
    np.testing.assert_array_equal(operand.reshape(64, d), want)


@pytest.mark.parametrize("slots", [131072, 1_000_064])
def test_long_caches_are_split_evenly(slots: int) -> None:
    """For the key/value heads of one long row, on one or several devices, with two blocks on each multiprocessor."""
    for tiling in flash_decode_int8_gpu.TILINGS.values():
        assert min(evenness(tiling, rows, slots) for rows in (1, 2, 4, 8)) >= 0.95


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case(1, 1, 4, 2, 96, 64), "head_dim 64 or 128"),
        (Case(1, 1, 4, 2, 64, 100), "multiple of 8"),
        (Case(1, 10, 28, 4, 128, 64), "up to 64"),
        (Case(1, 1, 4, 2, 64, 64, dtype=jnp.float16), "bfloat16"),
    ],
    ids=lambda x: str(x).replace(" ", "-"),
)
def test_errors_say_what_is_supported(case: Case, says: str) -> None:
    with pytest.raises(InputError, match=says):
        jax.eval_shape(lambda *x: flash_decode_int8_gpu.attention(*x, 1.0), *shapes_of(case))
    assert not flash_decode_int8_gpu.supports(case.dtype, case.T, case.H, case.K, case.d, case.S)


def test_arrays_that_do_not_match_are_refused() -> None:
    args = shapes_of(Case(2, 1, 4, 2, 64, 64))
    half = jax.ShapeDtypeStruct(args[2].shape, jnp.float16)
    fewer = jax.ShapeDtypeStruct((2, 2, 32), jnp.float32)
    wide = jax.ShapeDtypeStruct(args[1].shape, jnp.bfloat16)
    for place, wrong in ((2, half), (4, fewer), (1, wide), (5, half)):
        with pytest.raises(InputError):
            jax.eval_shape(
                lambda *x: flash_decode_int8_gpu.attention(*x, 1.0),
                *(wrong if n == place else x for n, x in enumerate(args)),
            )


def entry(q: jax.Array, k: Any, k_scales: Any, v: Any, v_scales: Any, start: Any, end: Any) -> Any:
    cache = QuantizedRows(k, k_scales, jnp.full((k.shape[1], k.shape[3]), 4.0)), QuantizedRows(v, v_scales)
    return kernels.quantized_attention(q, *cache, kernels.Mask(start, end), scale=0.1)


def test_few_rows_read_8_bits_and_many_rows_a_converted_copy() -> None:
    """On a Hopper GPU the kernel runs for decoding, also of dual-chunk attention; a chunk of a prompt is as usual."""
    for T, held in itertools.product((1, 3, 256), flash_decode_int8_gpu.DTYPES):
        args = shapes_of(Case(1, T, 28, 4, 128, 4096), held)
        with as_if_on("Hopper GPU"):
            text = str(jax.make_jaxpr(entry)(*args))
        assert ("flash_decode_int8" in text) == (T < 10)
        assert ("bf16[1,4,4096,128]" in text) == (T == 256)


def test_the_parts_of_dual_chunk_attention_are_computed_one_after_the_other() -> None:
    """Each of the three rows of a token has 16 columns of its own. Three tokens have 32 together."""

    def parts(queries: tuple[jax.Array, ...], *rest: Any) -> Any:
        *cache, start, end = rest
        masks = (kernels.Mask(start, end),) * 3
        return over_parts(lambda q, mask: attend(q, cache, mask), queries, masks, one_call=True)

    def attend(q: jax.Array, cache: Any, mask: kernels.Mask) -> tuple[jax.Array, jax.Array]:
        k, k_scales, v, v_scales = cache
        return kernels.quantized_attention(q, QuantizedRows(k, k_scales), QuantizedRows(v, v_scales), mask, scale=0.1)

    q, *one_token = shapes_of(Case(1, 1, 28, 4, 128, 4096))
    with as_if_on("Hopper GPU"):
        apart = str(jax.make_jaxpr(parts)((q,) * 3, *one_token))
        together = str(jax.make_jaxpr(entry)(*shapes_of(Case(1, 3, 28, 4, 128, 4096))))
    for text, shape, other in ((apart, "f32[1,12,16,", "f32[1,4,32,"), (together, "f32[1,4,32,", "f32[1,12,16,")):
        assert shape in text
        assert other not in text


def test_a_cache_that_the_kernels_do_not_know_is_refused() -> None:
    rows = QuantizedRows(jnp.zeros((1, 1, 8, 16), jnp.int8), jnp.zeros((1, 1, 8)), jnp.ones((1, 16)))
    one = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(InputError, match="factors of channels for keys only"):
        kernels.quantized_attention(jnp.ones((1, 1, 1, 16)), rows, rows, kernels.Mask(one, one), scale=1.0)


def drawn(case: Case, numbers: np.random.Generator) -> tuple[list[jax.Array], tuple[np.ndarray, np.ndarray]]:
    """Arguments of the kernel except the scale, and the output and log-sum-exp in float64, for one of the dtypes.

    Slots that no row sees hold other numbers and scales, and what was written there as NaN.
    """
    c = case
    start, end = c.mask(numbers, c.B, c.T, c.S)
    q = numbers.standard_normal((c.B, c.T, c.H, c.d), np.float32).astype(jnp.bfloat16)
    held, wide = [], []
    dtype = numbers.choice(flash_decode_int8_gpu.DTYPES)
    j = np.arange(c.S)
    seen = ((start[:, :, None] <= j) & (j < end[:, :, None])).any(axis=1)
    for _ in range(2):
        values = numbers.integers(-127, 128, (c.B, c.K, c.S, c.d)).astype(dtype)
        scales = np.exp(numbers.normal(0, 1, (c.B, c.K, c.S))).astype(np.float32) / 100
        unseen = numbers.choice([0, 1e10, np.nan], int((~seen).sum()))[:, None]
        scales.swapaxes(1, 2)[~seen] = unseen
        held += [jnp.asarray(values), jnp.asarray(scales)]
        wide.append(values.astype(np.float64) * scales[..., None].astype(np.float64))
    args = [jnp.asarray(q), *held, jnp.asarray(start), jnp.asarray(end)]
    return args, expected(q, *wide, start, end, c.d**-0.5)


def check(case: Case, got: Any, want: Any, within: float) -> None:
    """Probabilities times scales, and the output, are rounded to 8 bits: an error of 2e-3, or more in small cases."""
    out, lse = errors(case, got, want)
    assert out < within
    assert lse < 1e-4


# One key/value head. Caches end inside a tile, or have fewer tiles than there are shares.
SMALL = (
    Case(3, 3, 7, 1, 64, 512, apart),
    Case(2, 3, 7, 1, 128, 328, apart),
    Case(2, 3, 7, 1, 64, 320, masks.anything),
    Case(3, 3, 7, 1, 64, 64, disjoint),
)


@pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_rows_one_after_the_other_in_the_interpreter(case: Case, numbers: np.random.Generator) -> None:
    """They agree with float64 and with all rows at once, for disjoint and other intervals, and any number of shares.

    What the kernel leaves unwritten is NaN, where no copy reaches beyond the cache.
    """
    args, want = drawn(case, numbers)
    splits = int(numbers.integers(2, 6))
    print("splits", splits)
    run = functools.partial(flash_decode_int8_gpu._run, *args, scale=case.d**-0.5, splits=splits)
    with interpreted(2, uninitialized="zero" if case.S % 64 else "nan"):
        together, apart = (jax.device_get(run(disjoint=separately)) for separately in (False, True))
    check(case, together, want, 6e-3)
    check(case, apart, want, 6e-3)
    check(case, apart, together, 8e-3)


if jax.default_backend() == "gpu":

    @pytest.mark.parametrize(("case", "separately"), BOTH, ids=str)
    def test_numerics_on_the_gpu(case: Case, separately: bool, numbers: np.random.Generator) -> None:
        """Against float64 over the same 8-bit numbers; a second run gives the same bits."""
        args, want = drawn(case, numbers)
        run = functools.partial(flash_decode_int8_gpu.attention, scale=case.d**-0.5, disjoint=separately)
        first, again = (jax.device_get(run(*args)) for _ in range(2))
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
        check(case, first, want, 4e-3)
