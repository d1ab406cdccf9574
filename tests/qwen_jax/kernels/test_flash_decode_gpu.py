"""Split-key decode attention on Hopper GPUs: shares and lowering anywhere, numerics where there is a GPU."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.kernels.decode import flash_decode_gpu
from qwen_jax.kernels.decode.tiles_gpu import tiles_of_share
from tests.helpers import masks


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(1, 130))
def test_shares_cover_every_used_tile_once(first: int, tiles: int, splits: int) -> None:
    """They are contiguous from the first tile to the last, and their lengths differ by at most one."""
    begin, count = tiles_of_share(jnp.int32(first), jnp.int32(tiles), jnp.arange(splits), splits)
    begin, count = np.asarray(begin), np.asarray(count)
    np.testing.assert_array_equal(np.concatenate([np.arange(b, b + n) for b, n in zip(begin, count, strict=True)]),
                                  np.arange(first, first + tiles))  # fmt: skip
    assert count.max() - count.min() <= 1


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 600), st.integers(1, 300_000), st.sampled_from([64, 128]), st.booleans())
def test_there_are_at_most_as_many_splits_as_tiles(rows: int, slots: int, d: int, uneven: bool) -> None:
    shape = flash_decode_gpu.TILINGS[d]
    splits = flash_decode_gpu.splits_for(rows, slots, shape, uneven)
    assert 1 <= splits <= max(1, -(-slots // shape.keys))


def test_splits_fill_the_chip_when_heads_alone_do_not() -> None:
    for model, d in ((4, 128), (2, 64)):
        shape = flash_decode_gpu.TILINGS[d]
        for batch in (1, 2, 3, 8):
            blocks = batch * model * flash_decode_gpu.splits_for(batch * model, 131072, shape)
            assert blocks >= 0.85 * 132
        assert flash_decode_gpu.splits_for(264, 4096, shape) == 1


def evenness(tiling: flash_decode_gpu.Tiling, rows: int, slots: int) -> float:
    """The mean number of tiles of a multiprocessor over the largest one."""
    splits, tiles = flash_decode_gpu.splits_for(rows, slots, tiling), -(-slots // tiling.keys)
    # Blocks go to the multiprocessors in turn, and after as many as run at once in rounds.
    at_once = 132 if rows * splits <= 132 else 132 * tiling.blocks
    return rows * tiles / (-(-rows * splits // at_once) * at_once * -(-tiles // splits))


@pytest.mark.parametrize("slots", [131072, 1_000_064])
def test_long_caches_are_split_evenly(slots: int) -> None:
    """For the key/value heads of one long row, on one or several devices."""
    for tiling in flash_decode_gpu.TILINGS.values():
        assert min(evenness(tiling, rows, slots) for rows in (1, 2, 4, 8)) >= 0.95


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, the mask, slots of a page (0: one array) and the dtype."""

    B: int
    T: int
    H: int
    K: int
    d: int
    S: int
    mask: Callable[..., tuple[np.ndarray, np.ndarray]] = masks.causal
    page: int = 0
    dtype: Any = jnp.bfloat16

    def __str__(self) -> str:
        numbers = "-".join(str(x) for x in (self.B, self.T, f"{self.H}/{self.K}", self.d, self.S))
        return f"{numbers}-{self.mask.__name__}-{f'page{self.page}' if self.page else 'array'}-{self.dtype.__name__}"


def padded(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """The last queries of sequences of different length with left padding; one sequence sees nothing."""
    length = numbers.integers(T, S + 1, (B, 1))
    end = np.minimum(numbers.integers(0, S, (B, 1)) + length, S)
    start = np.maximum(end - length, 0)
    end = end - np.arange(T)[::-1]
    end[B // 2] = start[B // 2] if B > 1 else end[0]
    return np.broadcast_to(start, (B, T)).astype(np.int32), end.astype(np.int32)


def one_key(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    start = numbers.integers(0, S, (B, T)).astype(np.int32)
    return start, start + 1


def disjoint(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring intervals, the last row's first, as of dual-chunk attention; some with gaps that no row sees."""
    ends = np.sort(numbers.integers(0, S + 1, (B, T + 1)), axis=1)[:, ::-1]
    start, end = ends[:, 1:].astype(np.int32), ends[:, :-1].astype(np.int32)
    return np.minimum(start + numbers.integers(0, 2, (B, 1)) * 5, end).astype(np.int32), end


def outside(numbers: np.random.Generator, B: int, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Intervals that extend beyond the cache on either side."""
    return np.full((B, T), -5, np.int32), np.full((B, T), S + 1000, np.int32)


CASES = (
    Case(1, 1, 28, 4, 128, 32768),
    Case(2, 1, 28, 4, 128, 32768, masks.window),
    Case(3, 1, 28, 4, 128, 4096, padded),
    Case(80, 1, 28, 4, 128, 640, padded),
    Case(1, 1, 14, 2, 64, 32768),
    Case(5, 1, 14, 2, 64, 1000, masks.anything),
    Case(140, 1, 14, 2, 64, 200, masks.anything),
    Case(4, 4, 28, 4, 128, 2048, padded),
    Case(2, 8, 28, 4, 128, 5000, masks.anything),
    Case(3, 8, 14, 2, 64, 3000, masks.anything),
    Case(2, 3, 40, 8, 128, 1024, masks.window),
    Case(6, 5, 12, 2, 128, 776, one_key),
    Case(2, 64, 2, 2, 64, 4096, masks.causal),
    Case(70, 2, 8, 2, 64, 520, masks.anything),
    Case(1, 3, 28, 4, 128, 32768, disjoint),
    Case(3, 3, 14, 2, 64, 3000, disjoint),
    Case(2, 9, 14, 2, 64, 1000, disjoint),
    Case(2, 3, 28, 4, 128, 4096, disjoint, page=64),
    Case(1, 1, 4, 4, 128, 8, outside),
    Case(2, 1, 64, 1, 128, 3000, padded),
    Case(2, 2, 28, 4, 128, 4096, padded, dtype=jnp.float16),
    Case(1, 1, 28, 4, 128, 32768, page=64),
    Case(3, 1, 28, 4, 128, 4096, padded, page=16),
    Case(3, 2, 28, 4, 128, 4096, masks.anything, page=32),
    Case(3, 1, 28, 4, 128, 4080, masks.window, page=48),
    Case(80, 1, 28, 4, 128, 640, padded, page=128),
    Case(5, 1, 14, 2, 64, 2048, masks.anything, page=16),
    Case(5, 3, 14, 2, 64, 2048, padded, page=64),
    Case(2, 1, 14, 2, 64, 3072, outside, page=256),
    Case(1, 1, 2, 1, 64, 16, one_key, page=16),
)


def shapes_of(case: Case) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """The function of a case, and its arguments except the scale."""
    c = case
    q, i = jax.ShapeDtypeStruct((c.B, c.T, c.H, c.d), c.dtype), jax.ShapeDtypeStruct((c.B, c.T), jnp.int32)
    if not c.page:
        return flash_decode_gpu.attention, [q, *[jax.ShapeDtypeStruct((c.B, c.K, c.S, c.d), c.dtype)] * 2, i, i]
    held = jax.ShapeDtypeStruct((c.B * c.S // c.page + 3, c.K, c.page, c.d), c.dtype)
    table = jax.ShapeDtypeStruct((c.B, c.S // c.page), jnp.int32)
    return flash_decode_gpu.paged_attention, [q, held, held, table, i, i]


@pytest.mark.draw(6)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lowers_to_one_kernel_and_a_merge_if_keys_are_split(case: Case) -> None:
    """The kernels pass the layout inference of Mosaic GPU, and nothing of the length of the cache is created."""
    f, args = shapes_of(case)
    text = jax.jit(lambda *x: f(*x, 0.1)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    splits = flash_decode_gpu.splits_for(case.B * case.K, case.S, flash_decode_gpu.TILINGS[case.d], case.page > 0)
    assert text.count("@mosaic_gpu_v2") == 1 + (splits > 1)


def test_layers_of_one_shape_share_their_kernels() -> None:
    _, (q, k, v, start, end) = shapes_of(Case(1, 1, 28, 4, 128, 4096))

    def layers(q: jax.Array, *rest: jax.Array) -> jax.Array:
        for _ in range(3):
            q = flash_decode_gpu.attention(q, *rest, 0.1)[0]
        return q

    text = jax.jit(layers).trace(q, k, v, start, end).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (Case(1, 1, 4, 2, 96, 64), "head_dim 64 or 128"),
        (Case(1, 1, 4, 2, 64, 100), "multiple of 8"),
        (Case(1, 1, 4, 2, 64, 80, page=8), "multiple of 16"),
        (Case(1, 10, 28, 4, 128, 64), "up to 64"),
        (Case(1, 1, 4, 2, 64, 64, dtype=jnp.float32), "bfloat16 or float16"),
    ],
    ids=lambda x: str(x).replace(" ", "-"),
)
def test_errors_say_what_is_supported(case: Case, says: str) -> None:
    f, args = shapes_of(case)
    with pytest.raises(InputError, match=says):
        jax.eval_shape(lambda *x: f(*x, 1.0), *args)
    assert not flash_decode_gpu.supports(case.dtype, case.T, case.H, case.K, case.d, case.S, case.page)


def test_shapes_that_do_not_match_are_refused() -> None:
    f, args = shapes_of(Case(2, 1, 4, 2, 64, 64))
    two_rows = jax.ShapeDtypeStruct((2, 2), jnp.int32)
    other_dtype = jax.ShapeDtypeStruct(args[2].shape, jnp.float16)
    fewer = jax.ShapeDtypeStruct((1, *args[0].shape[1:]), args[0].dtype)
    not_int32 = jax.ShapeDtypeStruct((2, 1), jnp.float32)
    for place, wrong in ((3, two_rows), (2, other_dtype), (0, fewer), (4, not_int32)):
        with pytest.raises(InputError):
            jax.eval_shape(lambda *x: f(*x, 1.0), *(wrong if n == place else x for n, x in enumerate(args)))


def drawn(case: Case, numbers: np.random.Generator) -> tuple[np.ndarray, ...]:
    """q, keys and values as [B, K, S, d] and the intervals. Slots that no row of their sequence sees are NaN."""
    c = case
    start, end = c.mask(numbers, c.B, c.T, c.S)
    j = np.arange(c.S)
    seen = ((start[:, :, None] <= j) & (j < end[:, :, None])).any(axis=1)
    q, k, v = (
        numbers.standard_normal(shape, np.float32).astype(c.dtype)
        for shape in ((c.B, c.T, c.H, c.d), *((c.B, c.K, c.S, c.d),) * 2)
    )
    for x, rubbish in ((k, np.nan), (v, np.inf)):
        x.swapaxes(1, 2)[~seen] = rubbish
    return q, k, v, start, end


def in_pages(case: Case, numbers: np.random.Generator, k: np.ndarray, v: np.ndarray, start: Any, end: Any) -> list[Any]:
    """The same cache in shuffled pages, and the page table, whose unused entries are out of range."""
    c, M = case, case.S // case.page
    table = numbers.permutation(c.B * M + 3)[: c.B * M].reshape(c.B, M).astype(np.int32)
    held = []
    for x in (k, v):
        pages = np.full((c.B * M + 3, c.K, c.page, c.d), np.nan).astype(c.dtype)
        pages[table] = x.reshape(c.B, c.K, M, c.page, c.d).swapaxes(1, 2)
        held.append(pages)
    sees, n = start < end, np.arange(M)
    low = np.where(sees, np.maximum(start, 0), c.S).min(axis=1)[:, None]
    high = np.where(sees, np.minimum(end, c.S), 0).max(axis=1)[:, None]
    return [*held, np.where((n * c.page < high) & ((n + 1) * c.page > low), table, 2**30).astype(np.int32)]


def expected(q: Any, k: Any, v: Any, start: Any, end: Any, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp in float64."""
    (B, T, H, d), (K, S) = q.shape, k.shape[1:3]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros((B, T, H, d)), np.full((B, H, T), -np.inf)
    for b in range(B):
        for t in range(T):
            here = slice(max(start[b, t], 0), min(end[b, t], S))
            if here.start < here.stop:
                logits = np.einsum("kgd,ksd->kgs", q[b, t].reshape(K, H // K, d), k[b, :, here]) * scale
                top = logits.max(axis=-1, keepdims=True)
                weights = np.exp(logits - top)
                total = weights.sum(axis=-1, keepdims=True)
                out[b, t] = np.einsum("kgs,ksd->kgd", weights / total, v[b, :, here]).reshape(H, d)
                lse[b, :, t] = (top + np.log(total)).reshape(H)
    return out, lse


def errors(case: Case, got: Any, want: Any) -> tuple[float, float]:
    """Relative error of the output and absolute error of the log-sum-exp; infinite if an exact value is wrong."""
    (out, lse), (true_out, true_lse) = (tuple(np.asarray(x, np.float64) for x in y) for y in (got, want))
    empty = np.isneginf(true_lse)
    if (np.isneginf(lse) != empty).any() or out.swapaxes(1, 2)[empty].any():
        return np.inf, np.inf
    of_out = np.linalg.norm(out - true_out) / max(np.linalg.norm(true_out), 1e-6)
    return float(of_out), float(np.abs(np.where(empty, 0.0, lse) - np.where(empty, 0.0, true_lse)).max())


def run(case: Case, seed: int | None = None) -> tuple[float, float]:
    numbers = np.random.default_rng(seed)
    scale = case.d**-0.5
    q, k, v, start, end = drawn(case, numbers)
    f, _ = shapes_of(case)
    held = in_pages(case, numbers, k, v, start, end) if case.page else [k, v]
    args = [jnp.asarray(x) for x in (q, *held, start, end)]
    first, again = (jax.device_get(f(*args, scale)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    if case.page:
        # With equal shares, the location of the slots changes no bit.
        shape = flash_decode_gpu.TILINGS[case.d]
        splits = flash_decode_gpu.splits_for(case.B * case.K, case.S, shape, uneven=True)
        whole = [jnp.asarray(x) for x in (q, k, v, start, end)]
        other = jax.device_get(flash_decode_gpu._run(*whole, None, scale=scale, splits=splits))
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    return errors(case, first, expected(q, k, v, start, end, scale))


if jax.default_backend() == "gpu":

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_numerics_on_the_gpu(case: Case) -> None:
        """Against float64, with NaN and infinity in unseen slots; a second run and pages give the same bits."""
        out, lse = run(case)
        # Probabilities and the output are rounded to 8 bits, or 11.
        assert out < (4e-3 if case.dtype == jnp.bfloat16 else 1e-3)
        assert lse < 1e-4
