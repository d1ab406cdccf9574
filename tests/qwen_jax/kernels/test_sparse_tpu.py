"""Sparse and column attention on TPUs: numerics in TPU interpret mode, and the TPU compiler for every generation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwen_jax import kernels
from qwen_jax.errors import InputError
from qwen_jax.kernels.attention import flash_tpu, flash_tpu_tiles, sparse_tpu
from qwen_jax.kernels.attention.lists import NOWHERE, KeyLists
from qwen_jax.kernels.tpu.device import Core
from tests.helpers import exact
from tests.helpers.masks import MASKS, causal, window
from tests.helpers.platforms import as_if_on
from tests.helpers.tpu_compiler import compile_for, needs_libtpu

PIECE = 128
sparse = jax.jit(sparse_tpu.attention, static_argnames=("scale", "tiles"))
columns = jax.jit(sparse_tpu.columns, static_argnames=("scale", "bias", "rows", "tiles"))
dense = jax.jit(flash_tpu.attention, static_argnames=("scale", "tiles"))


def interpreted(run, *args, **kwargs):
    """Runs in the interpreter, where memory holds NaN until it is written and reads out of bounds raise."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return [np.asarray(x) for x in jax.device_get(run(*args, **kwargs))]


def drawn(numbers, T, S, H, K, d, dtype):
    return [jnp.asarray(numbers.standard_normal(shape), dtype) for shape in ((1, T, H, d), (1, K, S, d), (1, K, S, d))]


def intervals(numbers, mask, T, S):
    return [jnp.asarray(x) for x in mask(numbers, 1, T, S)]


def drawn_lists(numbers, T, S, H, rows) -> KeyLists:
    """Random pieces, some beyond the keys; some lists are empty. Behind the pieces there are random numbers."""
    N, pieces = -(-T // rows), S // PIECE + 2
    starts = numbers.integers(-(2**31), 2**31, (1, H, N, pieces))
    counts = numbers.integers(0, pieces + 1, (1, H, N)) * (numbers.random((1, H, N)) < 0.8)
    for place in np.ndindex(counts.shape):
        starts[place][: counts[place]] = np.sort(numbers.permutation(pieces)[: counts[place]]) * PIECE
    return KeyLists(jnp.asarray(starts, jnp.int32), jnp.asarray(counts, jnp.int32), rows, PIECE)


def listed(lists, T, S) -> np.ndarray:
    """Which keys the lists let each query see, bool [1, H, T, S]."""
    starts, counts = np.asarray(lists.starts_BHNL), np.asarray(lists.counts_BHN)
    result = np.zeros((*counts.shape, S + 2 * PIECE), bool)
    for place in np.ndindex(counts.shape):
        for start in starts[place][: counts[place]]:
            result[place][start : start + lists.size] = True
    return np.repeat(result, lists.rows, axis=2)[:, :, :T, :S]


def within(start, end, places) -> np.ndarray:
    """Which places the intervals let each query see; places are [1, H or 1, T or 1, C]."""
    start, end = (np.asarray(x)[:, None, :, None] for x in (start, end))
    return (start <= places) & (places < end)


def check(got, q, k, v, seen, scale, bias=0.0) -> dict[str, float]:
    """Errors against float64 under a dense mask [1, H, T, S]; rows without keys must be exact."""
    q, k, v = (np.asarray(x, np.float64) for x in (q.swapaxes(1, 2), k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = np.where(seen, q @ k.swapaxes(2, 3) * scale + bias, -np.inf)
    some = seen.any(-1)
    top = np.where(some, logits.max(-1), 0)
    p = np.exp(logits - top[..., None])
    total = np.where(some, p.sum(-1), 1)
    out, lse = got
    assert (np.isneginf(lse) == ~some).all()
    assert not out.swapaxes(1, 2)[~some].any()
    wanted = (p @ v / total[..., None]).swapaxes(1, 2)
    return {
        "out": exact.relative(out, wanted),
        "lse": float(np.abs(np.where(some, lse, 0) - np.where(some, top + np.log(total), 0)).max()),
    }


def small(rows, d) -> sparse_tpu.Tiling:
    """Small tiles of two parts, with the body that a matrix unit of 128 gets."""
    return sparse_tpu.Tiling(rows, 4, 2, 128, transposed=d == 64)


SIZES = [(128, 64), (256, 128)]


@settings(deadline=None, max_examples=4)
@given(st.integers(0, 2**32), st.sampled_from(MASKS), st.sampled_from(SIZES))
def test_random_lists(seed, mask, sizes):
    """Float32 parity with float64: pieces of a list that a row may see, and no others, count once."""
    numbers, (rows, d), T, S = np.random.default_rng(seed), sizes, 300, 1100
    q, k, v = drawn(numbers, T, S, 2, 1, d, jnp.float32)
    start, end = intervals(numbers, mask, T, S)
    lists = drawn_lists(numbers, T, S, 2, rows)
    got = interpreted(sparse, q, k, v, start, end, lists, scale=d**-0.5, tiles=small(rows, d))
    seen = listed(lists, T, S) & within(start, end, np.arange(S))
    errors = check(got, q, k, v, seen, d**-0.5)
    assert max(errors.values()) < 5e-6, errors


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 2**32), st.sampled_from(SIZES))
def test_every_visible_pair_counts_once(seed, sizes) -> None:
    """With keys of zero the log-sum-exp is the logarithm of the number of visible pairs; values of one give one."""
    numbers, (rows, d), T, S = np.random.default_rng(seed), sizes, 300, 1100
    q, k, _ = drawn(numbers, T, S, 2, 1, d, jnp.float32)
    start, end = intervals(numbers, causal, T, S)
    lists = drawn_lists(numbers, T, S, 2, rows)
    zero, one = jnp.zeros_like(k), jnp.ones_like(k)
    out, lse = interpreted(sparse, q, zero, one, start, end, lists, scale=d**-0.5, tiles=small(rows, d))
    count = (listed(lists, T, S) & within(start, end, np.arange(S))).sum(-1)
    np.testing.assert_allclose(np.exp(lse), count, atol=0.01)
    np.testing.assert_allclose(out, np.broadcast_to((count > 0).swapaxes(1, 2)[..., None], out.shape), rtol=1e-5)


@pytest.mark.draw(1)
@pytest.mark.parametrize("d", [64, 128])
def test_full_lists_give_the_bits_of_dense_attention(d) -> None:
    """Lists of all pieces take the same keys in the same parts and order as `flash_tpu` takes tiles.

    With one part to a tile the bodies are also the same code. With more parts the compiler for CPUs fuses some products
    and sums in other places, and a few log-sum-exps differ in their last bit.
    """
    numbers, T, S, rows = np.random.default_rng(), 260, 900, 256
    tiles = sparse_tpu.Tiling(rows, 4, 1, 128, transposed=d == 64)
    same = flash_tpu_tiles.Tiling(rows, 512, 128, 512, 512, 64 << 20)
    q, k, v = drawn(numbers, T, S, 1, 1, d, jnp.bfloat16)
    N, L = -(-T // rows), -(-S // PIECE)
    starts = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32) * PIECE, (1, 1, N, L))
    lists = KeyLists(starts, jnp.full((1, 1, N), L, jnp.int32), rows, PIECE)
    for mask in (causal, window):
        start, end = intervals(numbers, mask, T, S)
        got = interpreted(sparse, q, k, v, start, end, lists, scale=d**-0.5, tiles=tiles)
        want = interpreted(dense, q, k, v, start, end, scale=d**-0.5, tiles=same)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("d", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (128, "float32")])
def test_parts_are_tiles_of_dense_attention(d, dtype) -> None:
    """By default a part has the keys of a tile of `flash_tpu`, and the same body."""
    for core in (Core(64 << 20, 128), Core(128 << 20, 256)):
        tiles, same = sparse_tpu.tiling(d, dtype, core=core), flash_tpu_tiles.choose_tiling(4096, 4096, d, dtype, core)
        assert tiles.step * PIECE == same.keys
        assert tiles.transposed == (d < same.lanes)


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 2**32), st.sampled_from([(128, 64), (512, 128)]))
def test_columns(seed, sizes) -> None:
    """Float32 parity with float64: a column counts where its place is visible; some are off, some queries see none."""
    numbers, (rows, d), T, C, S = np.random.default_rng(seed), sizes, 300, 700, 1000
    # Columns of each query head, or shared.
    q, k, v = drawn(numbers, T, C, 2, 2 if d == 64 else 1, d, jnp.float32)
    start, end = intervals(numbers, window, T, S)
    places = np.sort(numbers.integers(0, S, (1, 2, -(-T // rows), C)), axis=3)
    places = np.where(numbers.random(places.shape) < 0.3, NOWHERE, places).astype(np.int32)
    # A tile in which no pair is masked, and one that is off.
    places[0, 0, 0, :256] = int(np.asarray(start)[0, :rows].max())
    places[0, 1, 0, 256:] = NOWHERE
    sizes = {"scale": d**-0.5, "bias": 1.5, "rows": rows, "tiles": small(rows, d)}
    got = interpreted(columns, q, k, v, start, end, jnp.asarray(places), **sizes)
    seen = within(start, end, np.repeat(places, rows, axis=2)[:, :, :T])
    errors = check(got, q, k, v, seen, d**-0.5, 1.5)
    assert max(errors.values()) < 5e-6, errors


def test_lists_and_columns_add_up_to_dense_attention(monkeypatch) -> None:
    """Every second piece is listed and the keys of the others are columns: merged they are plain attention, through
    the entry points, as the reference computes it."""
    monkeypatch.setattr(sparse_tpu, "tiling", lambda d, dtype, rows: small(rows, d))
    numbers, T, S, H, d = np.random.default_rng(), 200, 768, 2, 128
    q, k, v = drawn(numbers, T, S, H, 1, d, jnp.float32)
    mask = kernels.Mask(*intervals(numbers, causal, T, S))
    N, L = -(-T // 128), S // PIECE // 2
    starts = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32) * 2 * PIECE, (1, H, N, L))
    lists = KeyLists(starts, jnp.full((1, H, N), L, jnp.int32), 128, PIECE)
    others = np.flatnonzero(np.arange(S) // PIECE % 2)
    places = jnp.broadcast_to(jnp.asarray(others, jnp.int32), (1, H, N, len(others)))

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation):
        options = {"scale": d**-0.5, "implementation": implementation}
        return (
            kernels.sparse_attention(q, k, v, mask, lists, **options),
            kernels.column_attention(q, k[:, :, others], v[:, :, others], mask, places, **options),
        )

    with as_if_on("TPU"):
        got = jax.device_get(both("tpu"))
    for one, other in zip(got, both("reference"), strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    want = exact.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask.k_start_BT, mask.k_end_BT, d**-0.5)
    out, lse = kernels.merge([tuple(map(jnp.asarray, part)) for part in got])
    assert exact.relative(out, want.out) < 5e-6
    np.testing.assert_allclose(lse, want.lse, atol=1e-5)


def shapes(T, S, H, K, d, dtype):
    """Queries, keys, values and intervals."""
    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, T, H, d), (1, K, S, d)))
    return [q, k, k, *[integers(1, T)] * 2]


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.draw(2)
@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "d", "rows"), [("v4", 128, 512), ("v5e", 64, 256), ("v5p", 128, 128), ("v6e", 64, 128), ("7x", 128, 256)]
)
def test_lists_compile(chip, d, rows) -> None:
    """Lists of 8,192 pieces for 2^20 keys stream through scalar memory; the compiler refuses a kernel that needs more
    VMEM than we count."""

    def f(q, k, v, start, end, starts, counts):
        return sparse_tpu.attention(q, k, v, start, end, KeyLists(starts, counts, rows, PIECE), 0.1)

    T, S, H = 1024, 2**20, 4
    arguments = *shapes(T, S, H, 2, d, jnp.bfloat16), integers(1, H, T // rows, S // PIECE), integers(1, H, T // rows)
    assert "list_attention" in compile_for(chip, f, *arguments).as_text()


@needs_libtpu
@pytest.mark.parametrize(("chip", "d", "dtype", "rows"), [("v4", 128, "float32", 128), ("v6e", 128, "bfloat16", 128)])
def test_columns_compile(chip, d, dtype, rows) -> None:
    T, C, H = 1024, 8192, 4
    f = functools.partial(sparse_tpu.columns, scale=0.1, bias=0.0, rows=rows)
    compiled = compile_for(chip, f, *shapes(T, C, H, H, d, dtype), integers(1, H, T // rows, C))
    assert "column_attention" in compiled.as_text()


@pytest.mark.parametrize("chip", [(16, 128), (128, 128), (64, 128), (128, 256), (64, 256)])
def test_tiles_fit_in_vmem(chip) -> None:
    """All sizes and dtypes, with lists of 16,384 pieces of columns."""
    core = Core(chip[0] << 20, chip[1])
    for rows, d, dtype in itertools.product((128, 256, 512), (64, 128), ("bfloat16", "float32")):
        tiles = sparse_tpu.tiling(d, dtype, rows, core)
        assert sparse_tpu.list_bytes(tiles, d, jnp.dtype(dtype).itemsize, 1024) <= core.vmem_bytes * 15 // 16


@pytest.mark.parametrize(
    "change", [{"rows": 64}, {"size": 64}, {"capacity": 1 << 20}, {"head_dim": 32}, {"dtype": "float16"}], ids=str
)
def test_unsupported_arguments_are_refused(change) -> None:
    case = {"rows": 128, "size": 128, "capacity": 4, "head_dim": 64, "dtype": "bfloat16", **change}
    q, k = (jnp.ones((1, n, 128, case["head_dim"]), case["dtype"]) for n in (128, 2))
    lists = KeyLists(
        jnp.zeros((1, 128, 2, case["capacity"]), jnp.int8),
        jnp.zeros((1, 128, 2), jnp.int32),
        case["rows"],
        case["size"],
    )
    i = jnp.ones((1, 128), jnp.int32)
    with pytest.raises(InputError, match="Sparse attention on TPUs needs"):
        sparse_tpu.attention(q, k, k, i, i, lists, 1.0)
