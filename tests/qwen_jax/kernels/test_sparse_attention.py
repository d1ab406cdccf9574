"""Sparse attention over lists and columns: the reference, arguments, visited tiles, and lowering of the GPU kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.kernels import KeyLists, Mask, causal_mask, column_attention, reference, sparse_attention
from qwen_jax.kernels.attention.list_ranges import clean_starts, column_tiles, listed_tiles, work_table
from qwen_jax.kernels.padding import pad_to_multiple
from tests.helpers import exact
from tests.helpers.lists import (
    exact_attention,
    full_lists,
    random_lists,
    random_places,
    seen_columns,
    seen_interval,
)
from tests.helpers.masks import MASKS, causal
from tests.helpers.platforms import as_if_on as on

B, T, S, H, K, D = 2, 75, 140, 4, 2, 16
SEEDS, ANY_MASK = st.integers(0, 2**32), st.sampled_from(MASKS)
# Few shapes, because each is compiled.
LENGTHS, SLOTS = st.sampled_from([1, 70, 300]), st.sampled_from([1, 200, 896, 900])


attend = jax.jit(sparse_attention, static_argnames=("scale", "implementation"))
attend_columns = jax.jit(column_attention, static_argnames=("scale", "bias", "rows"))


def inputs(numbers: np.random.Generator, keys: int = S, kv_heads: int = K, d: int = D) -> list[jax.Array]:
    shapes = (B, T, H, d), (B, kv_heads, keys, d), (B, kv_heads, keys, d)
    return [jnp.asarray(numbers.standard_normal(s), jnp.float32) for s in shapes]


def intervals(mask, numbers: np.random.Generator) -> Mask:
    return Mask(*map(jnp.asarray, mask(numbers, B, T, S)))


def check(got: tuple[jax.Array, jax.Array], want: tuple[np.ndarray, np.ndarray]) -> None:
    """Rows that see nothing have zeros and minus infinity; the others agree with float64 up to float32's rounding."""
    unseen = np.isneginf(want[1])
    assert (np.isneginf(got[1]) == unseen).all()
    assert not np.asarray(got[0])[unseen.swapaxes(1, 2)].any()
    assert exact.relative(got[0], want[0]) < 1e-5
    np.testing.assert_allclose(np.where(unseen, 0, got[1]), np.where(unseen, 0, want[1]), atol=2e-5)


@settings(deadline=None, max_examples=6)
@given(SEEDS, ANY_MASK, st.sampled_from([(128, 64), (32, 16), (50, 40)]), st.sampled_from([1, 8]))
def test_a_query_sees_what_is_listed_and_what_the_mask_lets_it_see(seed, mask, shape, step) -> None:
    """Against float64, for lists that are empty, have odd counts, and reach beyond the keys."""
    numbers = np.random.default_rng(seed)
    (q, k, v), rows = inputs(numbers), intervals(mask, numbers)
    lists, covered = random_lists(numbers, B, H, T, S, rows=shape[0], size=shape[1], step=step)
    seen = covered & seen_interval(rows.k_start_BT, rows.k_end_BT, S)
    check(attend(q, k, v, rows, lists, scale=0.3), exact_attention(q, k, v, seen, 0.3))


@settings(deadline=None, max_examples=6)
@given(SEEDS, ANY_MASK, st.sampled_from([H, K, 1]), st.sampled_from([128, 32]), st.sampled_from([0.0, 2.5]))
def test_a_column_counts_as_a_key_at_its_place(seed, mask, kv_heads, rows, bias) -> None:
    numbers = np.random.default_rng(seed)
    q, k, v = inputs(numbers, keys=30, kv_heads=kv_heads)
    where, places = intervals(mask, numbers), random_places(numbers, B, H, T, 30, S, rows)
    got = attend_columns(q, k, v, where, jnp.asarray(places), scale=0.3, bias=bias, rows=rows)
    seen = seen_columns(places, where.k_start_BT, where.k_end_BT, rows)
    check(got, exact_attention(q, k, v, seen, 0.3, bias))


@settings(deadline=None, max_examples=6)
@given(SEEDS, ANY_MASK)
def test_keys_of_zero_count_the_visible_pairs(seed, mask) -> None:
    """With keys of zero the log-sum-exp is the logarithm of how many keys a row sees; values of one give one."""
    numbers = np.random.default_rng(seed)
    (q, k, v), rows = inputs(numbers), intervals(mask, numbers)
    lists, covered = random_lists(numbers, B, H, T, S, rows=32, size=16)
    out, lse = attend(q, 0 * k, 0 * v + 1, rows, lists, scale=1.0)
    count = (covered & seen_interval(rows.k_start_BT, rows.k_end_BT, S)).sum(axis=3)
    np.testing.assert_allclose(np.exp(lse), count, rtol=1e-5)
    np.testing.assert_allclose(out, np.broadcast_to((count > 0).swapaxes(1, 2)[..., None], out.shape), rtol=1e-5)


@pytest.mark.parametrize("size", [16, 128])
def test_a_list_of_all_keys_is_attention(size: int) -> None:
    """Bit for bit. The last piece reaches beyond the keys."""
    numbers = np.random.default_rng()
    q, k, v = inputs(numbers)
    mask = intervals(causal, numbers)
    got = sparse_attention(q, k, v, mask, full_lists(B, H, T, S, size=size), scale=0.3)
    want = reference.attention(q, k, v, mask.k_start_BT, mask.k_end_BT, scale=0.3)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_reference_has_a_gradient_and_the_kernels_refuse_it() -> None:
    numbers = np.random.default_rng()
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(numbers, d=64))
    lists, mask = full_lists(B, H, T, S), intervals(causal, numbers)
    places = jnp.asarray(random_places(numbers, B, H, T, S, S))

    def loss(q, implementation):
        out, _ = sparse_attention(q, k, v, mask, lists, scale=0.3, implementation=implementation)
        return out.astype(jnp.float32).sum()

    def column_loss(q):
        return column_attention(q, k, v, mask, places, scale=0.3)[0].astype(jnp.float32).sum()

    assert jnp.isfinite(jax.grad(loss)(q, "reference").astype(jnp.float32)).all()
    with on("Hopper GPU"):
        for refused in (lambda q: loss(q, "gpu"), column_loss):
            with pytest.raises(InputError, match=r"no gradient\. Use implementation='reference'"):
                jax.eval_shape(jax.grad(refused), q)


# Which key tiles the kernels visit.


def in_parts(seen: np.ndarray, rows: int, parts: int) -> np.ndarray:
    """[B, H, T, n, keys] to [B, H, N, parts, rows, n, keys], where padding rows see nothing."""
    padded = np.pad(seen, ((0, 0), (0, 0), (0, -seen.shape[2] % (rows * parts)), (0, 0), (0, 0)))
    return padded.reshape(*padded.shape[:2], -1, parts, rows, *padded.shape[3:])


@settings(deadline=None, max_examples=12)
@given(SEEDS, ANY_MASK, st.sampled_from([64, 128]), LENGTHS, SLOTS)
def test_visited_tiles_of_a_list_hold_all_visible_pairs_and_unmasked_ones_no_invisible_pair(
    seed, mask, size, length, slots
) -> None:
    numbers = np.random.default_rng(seed)
    start, end = mask(numbers, 1, length, slots)
    lists, _ = random_lists(numbers, 1, 2, length, slots, size=size)
    padded = [pad_to_multiple(jnp.asarray(x), -1, 128) for x in (start, end)]
    ranges = jax.tree.map(np.asarray, listed_tiles(lists, *padded, 64, 128))
    starts = np.asarray(clean_starts(lists, 128 // size, -(-slots // 8) * 8))
    # Tiles of 128 keys at the places of their pieces. One more may be read ahead.
    tiles = starts.shape[3] * size // 128
    places = (starts[..., None] + np.arange(size)).reshape(*starts.shape[:3], 1, tiles, 128)
    places = np.repeat(places, 128, axis=3).reshape(1, 2, -1, tiles, 128)
    low, high = (np.asarray(x)[:, None, :, None, None] for x in padded)
    seen = in_parts((low <= places) & (places < high), 64, 2)
    i = np.arange(tiles)
    visited = (ranges.first_BHN[..., None] <= i) & (i < ranges.last_BHN[..., None])
    unmasked = (ranges.full_first_BHNw[..., None] <= i) & (i < ranges.full_last_BHNw[..., None])
    assert not (seen.any(axis=(3, 4, 6)) & ~visited).any()
    assert not (unmasked & ~(seen.all(axis=(4, 6)) & visited[:, :, :, None])).any()
    # A thread block visits one tile at least, the first is masked, and no read ahead leaves the list.
    assert (ranges.first_BHN < ranges.last_BHN).all()
    assert (ranges.full_first_BHNw > ranges.first_BHN[..., None]).all()
    assert (ranges.last_BHN < tiles).all()
    # All that is visible is in the list, once.
    want = np.pad(seen_interval(start, end, slots), ((0, 0), (0, 0), (0, -length % 128), (0, 0)))
    counted = np.arange(lists.starts_BHNL.shape[3]) < np.asarray(lists.counts_BHN)[..., None]
    covered = np.zeros((1, 2, want.shape[2], slots), np.int64)
    for b, h, n, p in np.argwhere(counted):
        at = int(lists.starts_BHNL[b, h, n, p])
        covered[b, h, 128 * n : 128 * n + 128, at : at + size] += 1
    assert (seen.sum(axis=(5, 6)).reshape(1, 2, -1) == (covered * want).sum(axis=3)).all()


@settings(deadline=None, max_examples=12)
@given(SEEDS, ANY_MASK, LENGTHS, SLOTS)
def test_visited_tiles_of_columns_hold_all_visible_pairs(seed, mask, length, slots) -> None:
    numbers = np.random.default_rng(seed)
    start, end = mask(numbers, 1, length, slots)
    places = random_places(numbers, 1, 3, length, 512, slots)
    padded = [pad_to_multiple(jnp.asarray(x), -1, 128) for x in (start, end)]
    ranges = jax.tree.map(np.asarray, column_tiles(jnp.asarray(places), *padded, 128, 128))
    seen = seen_columns(places, *padded).reshape(1, 3, -1, 4, 128)
    some = in_parts(seen, 128, 1).any(axis=(3, 4, 6))
    i = np.arange(4)
    visited = (ranges.first_BHN[..., None] <= i) & (i < ranges.last_BHN[..., None])
    assert not (some & ~visited).any()
    assert (visited.any(axis=3) & (visited.sum(axis=3) <= np.maximum(4 * some.any(axis=3), 1))).all()
    assert (ranges.full_first_BHNw >= ranges.full_last_BHNw).all()


def test_the_work_table_holds_each_query_tile_once_with_most_work_first() -> None:
    numbers = np.random.default_rng()
    lists, _ = random_lists(numbers, B, H, 500, 2000)
    start, end = (jnp.asarray(x) for x in causal(numbers, B, 512, 2000))
    ranges = listed_tiles(lists, start, end, 64, 128)
    table = np.asarray(work_table(ranges, K))
    assert sorted(table[:, 0]) == list(range(B * H * 4))
    b, h, n = np.unravel_index(table[:, 0], (B, H, 4))
    np.testing.assert_array_equal(table[:, 1], b * K + h // (H // K))
    columns = [ranges.first_BHN, ranges.last_BHN]
    columns += [x[..., part] for part in range(2) for x in (ranges.full_first_BHNw, ranges.full_last_BHNw)]
    for column, x in zip(table[:, 2:].T, columns, strict=True):
        np.testing.assert_array_equal(column, np.asarray(x)[b, h, n])
    work = table[:, 3] - table[:, 2]
    assert (work[1:] <= 1.1 * work[:-1]).all()
    # Tiles of equal work keep their order.
    assert (np.diff(table[:, 0])[work[1:] == work[:-1]] > 0).all()


# Lowering.


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("d", [64, 128])
def test_a_million_keys_lower_to_one_kernel_without_a_dense_mask(size: int, d: int) -> None:
    """7B's heads, a chunk of 32,768 queries over 1,000,064 keys, lists of up to 1,024 pieces."""
    array = jax.ShapeDtypeStruct
    q, cache = array((1, 32768, 28, d), jnp.bfloat16), array((1, 4, 1000064, d), jnp.bfloat16)
    mask = Mask(*[array((1, 32768), jnp.int32)] * 2)
    lists = KeyLists(array((1, 28, 256, 1024), jnp.int32), array((1, 28, 256), jnp.int32), size=size)

    def run(q, k, v, mask, lists):
        return sparse_attention(q, k, v, mask, lists, scale=0.1)

    with on("Hopper GPU"):
        text = jax.jit(run).trace(q, cache, cache, mask, lists).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert "stablehlo.transpose" not in text
    assert "32768x1000064" not in text


@pytest.mark.parametrize(("J", "d"), [(28, 128), (4, 64)])
def test_columns_lower_to_one_kernel(J: int, d: int) -> None:
    array = jax.ShapeDtypeStruct
    q, keys = array((1, 32768, 28, d), jnp.bfloat16), array((1, J, 3920, d), jnp.bfloat16)
    mask = Mask(*[array((1, 32768), jnp.int32)] * 2)

    def run(q, k, v, mask, places):
        return column_attention(q, k, v, mask, places, scale=0.1, bias=4.0)

    with on("Hopper GPU"):
        traced = jax.jit(run).trace(q, keys, keys, mask, array((1, 28, 256, 3920), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert "32768x3920" not in text


# Arguments.


def case() -> dict:
    q, k, v = inputs(np.random.default_rng(0))
    lists, _ = random_lists(np.random.default_rng(0), B, H, T, S, rows=32, size=16)
    return {"q": q, "k": k, "v": v, "mask": intervals(causal, np.random.default_rng(0)), "lists": lists}


def changed(lists: KeyLists, **changes) -> dict:
    return {"lists": dataclasses.replace(lists, **changes)}


BAD_LISTS = {
    "lists for fewer heads": (lambda x: changed(x, starts_BHNL=x.starts_BHNL[:, 1:]), r"starts \(2, 4, 3, 'L'\)"),
    "counts of another shape": (lambda x: changed(x, counts_BHN=x.counts_BHN[..., :1]), r"counts \(2, 4, 3\)"),
    "lists for other tiles": (lambda x: changed(x, rows=128), "tile of 128 queries"),
    "floating-point starts": (lambda x: changed(x, starts_BHNL=x.starts_BHNL * 1.0), "int32 lists.*float32"),
    "counts beyond the list": (lambda x: changed(x, counts_BHN=x.counts_BHN + 1000), "Expected lists of 0 to"),
    "pieces that overlap": (lambda x: changed(x, starts_BHNL=x.starts_BHNL * 0 + 8), "disjoint pieces of 16 keys"),
    "negative starts": (lambda x: changed(x, starts_BHNL=x.starts_BHNL * 0 - 8), "a start of -8"),
    "no queries in a tile": (lambda x: changed(x, rows=0), "at least one token"),
    "queries of another length": (lambda x: {"q": case()["q"][:, :10]}, "mask intervals for the query rows"),
    "another implementation": (lambda x: {"implementation": "cudnn"}, "Unknown sparse attention implementation"),
    "no such device": (lambda x: {"implementation": "gpu"}, "needs a Hopper GPU and .*Use implementation='reference'"),
}


@pytest.mark.parametrize("what", BAD_LISTS)
def test_bad_arguments_of_sparse_attention_are_named(what) -> None:
    change, words = BAD_LISTS[what]
    given = case()
    given |= change(dataclasses.replace(given["lists"], counts_BHN=jnp.maximum(given["lists"].counts_BHN, 2)))
    more = {"implementation": given.pop("implementation")} if "implementation" in given else {}
    with pytest.raises(InputError, match=words):
        sparse_attention(*given.values(), scale=0.3, **more)


@pytest.mark.parametrize(("rows", "size", "words"), [(256, 128, "tiles of 128 queries"), (128, 32, "64 or 128 keys")])
def test_the_kernel_says_which_lists_it_needs(rows: int, size: int, words: str) -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(np.random.default_rng(0), d=64))
    lists = full_lists(B, H, T, S, rows=rows, size=size)
    with on("Hopper GPU"), pytest.raises(InputError, match=f"Sparse attention by gpu needs .*{words}"):
        sparse_attention(q, k, v, causal_mask(B, T), lists, scale=1.0, implementation="gpu")


def test_a_kernel_refuses_pieces_that_it_cannot_copy() -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(np.random.default_rng(0), d=64))
    lists = full_lists(B, H, T, S)
    lists = dataclasses.replace(lists, starts_BHNL=lists.starts_BHNL + 4)
    with on("Hopper GPU"), pytest.raises(InputError, match="multiples of 8 keys; got a start of 4"):
        sparse_attention(q, k, v, causal_mask(B, T), lists, scale=1.0)


def test_bad_arguments_of_column_attention_are_named() -> None:
    q, k, v = inputs(np.random.default_rng(0), keys=30)
    mask, places = causal_mask(B, T), jnp.asarray(random_places(np.random.default_rng(0), B, H, T, 30, S))
    for bad, words in (
        ((q, k[:, :, 1:], v, mask, places), r"k and v \[B, J, C, d\] with H a multiple of J"),
        ((q, k, v, mask, places[..., 1:]), r"int32 places \(2, 4, 1, 30\).*got int32 \(2, 4, 1, 29\)"),
        ((q, k, v, mask, places * 1.0), "got float32"),
        ((q, k, v, Mask(mask.k_start_BT, mask.k_end_BT + 2**30), places), "within the 1073741824 keys"),
    ):
        with pytest.raises(InputError, match=words):
            column_attention(*bad, scale=1.0)
    with pytest.raises(InputError, match="bias of column attention, known while tracing"):
        jax.jit(lambda bias: column_attention(q, k, v, mask, places, scale=1.0, bias=bias))(1.0)
