"""Split-key attention over pages in 8 bits on Hopper GPUs: lowering anywhere, numerics on a GPU or interpreted."""

import functools
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import kernels
from qwen_jax.errors import InputError
from qwen_jax.kernels.decode import flash_decode_int8_gpu
from qwen_jax.kernels.decode.quantized import QuantizedRows
from qwen_jax.kernels.select import log_once
from tests.helpers import masks
from tests.helpers.gpu_interpreter import CAN_INTERPRET, interpreted
from tests.helpers.platforms import as_if_on
from tests.qwen_jax.kernels.test_flash_decode_gpu import Case, disjoint, one_key, outside, padded
from tests.qwen_jax.kernels.test_flash_decode_int8_gpu import check, drawn, numbers

__all__ = ["numbers"]  # a fixture

CASES = (
    Case(1, 1, 28, 4, 128, 32768, page=64),
    Case(3, 1, 28, 4, 128, 4096, padded, page=32),
    Case(3, 2, 28, 4, 128, 4096, masks.anything, page=32),
    Case(2, 3, 28, 4, 128, 4096, disjoint, page=64),
    Case(3, 1, 28, 4, 128, 4800, masks.window, page=96),
    Case(80, 1, 28, 4, 128, 640, padded, page=128),
    Case(5, 3, 14, 2, 64, 2048, padded, page=32),
    Case(2, 1, 14, 2, 64, 3072, outside, page=256),
    Case(2, 8, 28, 4, 128, 4096, masks.anything, page=64),
    Case(1, 1, 2, 1, 64, 32, one_key, page=32),
)


def shapes_of(case: Case, held: Any = jnp.int8) -> list[jax.ShapeDtypeStruct]:
    """Arguments of the kernel except the scale, for pages of a dtype."""
    c, M = case, case.S // case.page
    pages = jax.ShapeDtypeStruct((c.B * M + 3, c.K, c.page, c.d), held)
    scales = jax.ShapeDtypeStruct(pages.shape[:3], jnp.float32)
    q, i = jax.ShapeDtypeStruct((c.B, c.T, c.H, c.d), c.dtype), jax.ShapeDtypeStruct((c.B, c.T), jnp.int32)
    return [q, pages, scales, pages, scales, jax.ShapeDtypeStruct((c.B, M), jnp.int32), i, i]


def in_pages(case: Case, numbers: np.random.Generator, args: list[jax.Array]) -> list[jax.Array]:
    """Arguments of the kernel for one array, in shuffled pages. Unused pages have NaN for scales, and their entries of
    the table are out of range."""
    c, M = case, case.S // case.page
    q, *cache, start, end = args
    table = numbers.permutation(c.B * M + 3)[: c.B * M].reshape(c.B, M).astype(np.int32)
    held = []
    for x in cache:
        pages = np.full((c.B * M + 3, c.K, c.page, *x.shape[3:]), 7 if x.ndim == 4 else np.nan).astype(x.dtype)
        pages[table] = np.asarray(x).reshape(c.B, c.K, M, c.page, *x.shape[3:]).swapaxes(1, 2)
        held.append(jnp.asarray(pages))
    sees, n = np.asarray(start < end), np.arange(M)
    low = np.where(sees, np.maximum(start, 0), c.S).min(axis=1)[:, None]
    high = np.where(sees, np.minimum(end, c.S), 0).max(axis=1)[:, None]
    used = (n * c.page < high) & ((n + 1) * c.page > low)
    return [q, *held, jnp.asarray(np.where(used, table, 2**30), jnp.int32), start, end]


@pytest.mark.draw(5)
@pytest.mark.parametrize("held", flash_decode_int8_gpu.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lowers_to_one_kernel_and_a_merge(case: Case, held: Any) -> None:
    """The kernels pass the layout inference of Mosaic GPU, and nothing of the size of the pages is made of them."""
    run = jax.jit(functools.partial(flash_decode_int8_gpu.paged_attention, scale=0.1))
    text = run.trace(*shapes_of(case, held)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2
    pages = shapes_of(case)[1].shape[0]
    assert f"tensor<{pages}x{case.K}x{case.page}x{case.d}xbf16" not in text
    assert f"tensor<{case.B}x{case.K}x{case.S}x{case.d}x" not in text


def entry(q: jax.Array, k: Any, k_scales: Any, v: Any, v_scales: Any, table: Any, start: Any, end: Any) -> Any:
    pages = QuantizedRows(k, k_scales, jnp.full((k.shape[1], k.shape[3]), 4.0)), QuantizedRows(v, v_scales)
    return kernels.paged_attention(q, *pages, table, kernels.Mask(start, end), scale=0.1)


def test_decode_steps_read_the_pages_and_chunks_of_prompts_gather_them() -> None:
    for T, held in itertools.product((1, 3, 256), flash_decode_int8_gpu.DTYPES):
        with as_if_on("Hopper GPU"):
            text = str(jax.make_jaxpr(entry)(*shapes_of(Case(1, T, 28, 4, 128, 4096, page=64), held)))
        assert ("flash_decode_int8" in text) == (T < 10)
        assert ("bf16[1,4,4096,128]" in text) == (T == 256)


def test_a_decode_step_that_gathers_pages_warns(caplog: pytest.LogCaptureFixture) -> None:
    """Pages of 16 slots are gathered, and then read in 8 bits; the log says what the kernel for pages needs."""
    log_once.cache_clear()
    args = shapes_of(Case(1, 1, 28, 4, 128, 4096, page=16))
    with as_if_on("Hopper GPU"), caplog.at_level(logging.WARNING, "qwen_jax.kernels"):
        text = str(jax.make_jaxpr(entry)(*args))
    assert "i8[1,4,4096,128]" in text
    assert "flash_decode_int8" in text
    assert "pages of a multiple of 32 slots" in caplog.text


def test_arrays_that_do_not_match_are_refused() -> None:
    args = shapes_of(Case(2, 1, 4, 2, 64, 64, page=32))
    small = shapes_of(Case(2, 1, 4, 2, 64, 64, page=16))
    fewer = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    flat = jax.ShapeDtypeStruct((2,), jnp.int32)
    narrow = jax.ShapeDtypeStruct((2, 2), jnp.int16)
    mixed = jax.ShapeDtypeStruct(args[3].shape, jnp.float8_e4m3fn)
    for change in (
        {1: small[1], 2: small[2], 3: small[3], 4: small[4]},
        {5: fewer},
        {5: flat},
        {5: narrow},
        {3: mixed},
    ):
        with pytest.raises(InputError, match="a multiple of 32"):
            jax.eval_shape(
                lambda *x: flash_decode_int8_gpu.paged_attention(*x, 1.0),
                *(change.get(n, x) for n, x in enumerate(args)),
            )


def both(case: Case, numbers: np.random.Generator, splits: int | None) -> tuple[Any, Any, Any]:
    """From pages, from one array with the same shares, and in float64."""
    args, want = drawn(case, numbers)
    how: Any = {"scale": case.d**-0.5, "splits": splits}
    pages = in_pages(case, numbers, args)
    table = pages.pop(5)
    got = flash_decode_int8_gpu._run(*pages, table, uneven=True, **how)
    whole = flash_decode_int8_gpu._run(*args, uneven=True, **how)
    return jax.device_get(got), jax.device_get(whole), want


# One key/value head. Pages are smaller than a tile, of one and a half tiles, and larger.
SMALL = (
    Case(3, 1, 7, 1, 64, 320, padded, page=32),
    Case(2, 3, 7, 1, 128, 288, masks.anything, page=96),
    Case(2, 2, 7, 1, 64, 384, masks.window, page=128),
    Case(2, 3, 7, 1, 64, 96, disjoint, page=32),
)


@pytest.mark.draw(2)
@pytest.mark.skipif(not CAN_INTERPRET, reason="needs jax 0.11, and a CPU")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_pages_in_the_interpreter(case: Case, numbers: np.random.Generator) -> None:
    """They give the numbers of one array, and of float64, for any number of shares, with NaN in slots of no row."""
    splits = int(numbers.integers(2, 6))
    print("splits", splits)
    with interpreted(2):
        got, whole, want = both(case, numbers, splits)
    check(case, got, want, 6e-3)
    for a, b in zip(got, whole, strict=True):
        np.testing.assert_array_equal(a, b)


if jax.default_backend() == "gpu":

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_numerics_on_the_gpu(case: Case, numbers: np.random.Generator) -> None:
        """Against float64 over the same 8-bit numbers; with equal shares, the location of the slots changes no bit."""
        got, whole, want = both(case, numbers, None)
        for a, b in zip(got, whole, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
        check(case, got, want, 4e-3)
