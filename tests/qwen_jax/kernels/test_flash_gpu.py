"""Attention on Hopper GPUs: visited tiles and lowering anywhere, numerics where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import InputError
from qwen_jax.kernels.attention import flash_gpu, tile_ranges
from qwen_jax.kernels.padding import pad_to_multiple
from tests.helpers import exact
from tests.helpers.masks import MASKS, anything, causal, packed, window


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from(MASKS), st.integers(1, 400), st.integers(1, 400))
def test_visited_tiles_cover_all_visible_pairs_and_unmasked_ones_have_no_invisible_pair(seed, mask, T, S):
    """In both directions, for key tiles of query tiles and the reverse."""
    start, end = mask(np.random.default_rng(seed), 2, T, S)
    padded = [np.asarray(pad_to_multiple(jnp.asarray(x), -1, 128)) for x in (start, end)]
    keys, rows, tiles = 128, 64, -(-S // 128)
    place = np.arange(tiles * keys)
    seen = (padded[0][:, :, None] <= place) & (place < padded[1][:, :, None])
    seen = seen.reshape(2, -1, rows, tiles, keys)
    some, every = seen.any(axis=(2, 4)), seen.all(axis=(2, 4))
    there = np.asarray(tile_ranges.key_tiles(*map(jnp.asarray, padded), rows, keys))
    back = np.asarray(tile_ranges.query_tiles(*map(jnp.asarray, padded), rows, keys, tiles))
    for found, some_, every_ in ((there, some, every), (back, some.swapaxes(1, 2), every.swapaxes(1, 2))):
        other = np.arange(some_.shape[2])
        visited = (found[..., :1] <= other) & (other < found[..., 1:2])
        bare = (found[..., 2:3] <= other) & (other < found[..., 3:])
        assert not (some_ & ~visited).any()
        assert not (bare & ~(every_ & visited)).any()
        assert (found[..., 0] <= found[..., 2]).all()
        assert (found[..., 3] <= np.maximum(found[..., 1], found[..., 0])).all()
        assert (found[..., 1] <= some_.shape[2]).all()


def test_a_causal_mask_visits_half_of_the_tiles_and_masks_only_the_diagonal():
    start, end = causal(np.random.default_rng(0), 1, 4096, 4096)
    there = np.asarray(tile_ranges.key_tiles(jnp.asarray(start), jnp.asarray(end), 64, 128))
    assert (there[0, :, 1] - there[0, :, 0]).sum() == sum(i // 2 + 1 for i in range(64))
    assert ((there[..., 1] - there[..., 0]) - (there[..., 3] - there[..., 2]) == 1).all()
    back = np.asarray(tile_ranges.query_tiles(jnp.asarray(start), jnp.asarray(end), 64, 128, 32))
    assert ((back[..., 1] - back[..., 0]) - (back[..., 3] - back[..., 2]) == 2).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from(MASKS), st.integers(1, 400), st.integers(1, 400))
def test_visit_order_numbers_the_key_tiles_of_each_query_tile(seed, mask, T, S):
    start, end = mask(np.random.default_rng(seed), 2, T, S)
    start, end = (pad_to_multiple(jnp.asarray(x), -1, 128) for x in (start, end))
    there = tile_ranges.query_tiles(start, end, 128, 128, -(-S // 128))
    tiles = start.shape[1] // 128
    i = np.arange(tiles)
    visited = (np.asarray(there)[..., :1] <= i) & (i < np.asarray(there)[..., 1:2])
    for row_visited, row_ranks in zip(visited, np.asarray(tile_ranges.visit_order(there, tiles)), strict=True):
        for n in range(tiles):
            turns = row_ranks[row_visited[:, n], n]
            np.testing.assert_array_equal(turns, np.arange(len(turns)))


@pytest.mark.parametrize(("H", "K", "d", "kernels"), [(28, 4, 128, 3), (14, 2, 64, 2)])
def test_lowers_to_few_kernels_without_a_square_array(H: int, K: int, d: int, kernels: int) -> None:
    """One kernel for the forward pass, and one or two for the gradient."""
    q, k = (jax.ShapeDtypeStruct((2, 1000, n, d), jnp.bfloat16) for n in (H, K))
    i = jax.ShapeDtypeStruct((2, 1000), jnp.int32)

    def loss(q, k, v, start, end):
        out, lse = flash_gpu.attention(q, k, v, start, end, d**-0.5)
        return out.astype(jnp.float32).sum() + lse.sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = grad.trace(q, k, k, i, i).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == kernels
    assert "1000x1000" not in text


@pytest.mark.parametrize(("d", "kernels"), [(128, 2), (64, 1)])
def test_the_gradient_over_a_part_uses_the_kernels_of_the_gradient(d: int, kernels: int) -> None:
    q, k = (jax.ShapeDtypeStruct((1, n, 2, d), jnp.bfloat16) for n in (200, 136))
    i, lse = jax.ShapeDtypeStruct((1, 200), jnp.int32), jax.ShapeDtypeStruct((1, 2, 200), jnp.float32)
    run = jax.jit(functools.partial(flash_gpu.gradient, scale=0.1))
    text = run.trace(q, k, k, i, i, q, lse, q).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == kernels
    assert [x.shape for x in jax.eval_shape(run, q, k, k, i, i, q, lse, q)] == [q.shape, k.shape, k.shape]


def test_a_head_major_cache_is_not_transposed_and_has_no_gradient() -> None:
    """A chunk of queries over a longer cache [B, K, S, d]: one kernel and no transpose; a gradient is refused."""
    q, cache = (
        jax.ShapeDtypeStruct((2, 256, 14, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 2, 4096, 64), jnp.bfloat16),
    )
    i = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    run = lambda q, k, v, start, end: flash_gpu.attention(q, k, v, start, end, 0.125, head_major=True)[0]  # noqa: E731
    text = jax.jit(run).trace(q, cache, cache, i, i).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert "stablehlo.transpose" not in text
    with pytest.raises(InputError, match="no gradient"):
        jax.eval_shape(jax.grad(lambda *x: run(*x).astype(jnp.float32).sum()), q, cache, cache, i, i)


def test_layers_of_one_shape_share_a_kernel() -> None:
    q, i = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def layers(q, start, end):
        for _ in range(3):
            q = flash_gpu.attention(q, q, q, start, end, 0.125)[0]
        return q

    text = jax.jit(layers).trace(q, i, i).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1


def test_unsupported_arguments_are_refused() -> None:
    q, i = jnp.ones((1, 64, 2, 32), jnp.bfloat16), jnp.ones((1, 64), jnp.int32)
    with pytest.raises(InputError, match="head_dim 64 or 128"):
        flash_gpu.attention(q, q, q, i, i, 1.0)
    q = jnp.ones((1, 64, 2, 64))
    with pytest.raises(InputError, match="bfloat16"):
        flash_gpu.attention(q, q, q, i, i, 1.0)


CASES = (
    (packed, 2, 512, 512, 4, 2, 128),
    (packed, 1, 1000, 1000, 14, 2, 64),
    (packed, 2, 640, 640, 7, 1, 128),
    (causal, 1, 192, 1024, 4, 4, 128),
    (causal, 2, 130, 130, 4, 2, 64),
    (window, 1, 777, 777, 6, 2, 128),
    (window, 1, 777, 900, 6, 2, 64),
    (anything, 2, 300, 500, 4, 2, 128),
    (anything, 2, 500, 300, 4, 1, 64),
    (anything, 1, 1, 1, 2, 1, 64),
    (causal, 1, 4096, 4096, 2, 1, 128),
)


def drawn(case):
    mask, B, T, S, H, K, d = case
    numbers = np.random.default_rng()
    q, k, v, dout = (
        jnp.asarray(numbers.standard_normal(shape), jnp.bfloat16)
        for shape in ((B, T, H, d), (B, S, K, d), (B, S, K, d), (B, T, H, d))
    )
    start, end = mask(numbers, B, T, S)
    # The gradient of a row without keys may be NaN (a guard that divides zero by zero). It must not spread.
    dlse = jnp.asarray(np.where((start < end)[:, None], numbers.standard_normal((B, H, T)), np.nan), jnp.float32)
    return q, k, v, jnp.asarray(start), jnp.asarray(end), dout, dlse


@functools.partial(jax.jit, static_argnames="scale")
def run(q, k, v, start, end, dout, dlse, scale):
    """Output, log-sum-exp and gradients."""
    (out, lse), pull = jax.vjp(lambda q, k, v: flash_gpu.attention(q, k, v, start, end, scale), q, k, v)
    return out, lse, *pull((dout, dlse))


def errors(got, want) -> dict[str, float]:
    """Relative errors of output and gradients, absolute error of the log-sum-exp."""
    names = ("out", "lse", "dq", "dk", "dv")
    found = {n: exact.relative(g, w) for n, g, w in zip(names, got, want, strict=True) if n != "lse"}
    unseen = np.isneginf(want.lse)
    assert (np.isneginf(got[1]) == unseen).all()
    return found | {"lse": float(np.abs(np.where(unseen, 0, got[1] - np.where(unseen, 0, want.lse))).max())}


def check(case) -> dict[str, float]:
    """Errors against float64. Also checks that rows that see nothing are zero."""
    args = drawn(case)
    scale = args[0].shape[-1] ** -0.5
    got = jax.device_get(run(*args, scale=scale))
    assert not np.asarray(got[0], np.float32)[~np.asarray(args[3] < args[4])].any()
    return errors(got, exact.attention(*args[:5], scale, args[5], jnp.nan_to_num(args[6])))


if jax.default_backend() == "gpu":

    @pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(getattr(x, "__name__", x)) for x in c))
    def test_numerics_on_the_gpu(case) -> None:
        """Errors come from rounding the result, the probabilities and their gradients to bfloat16."""
        found = check(case)
        assert found.pop("lse") < 1e-3
        assert max(found.values()) < 1e-2, found

    @settings(deadline=None, max_examples=40)
    @given(st.sampled_from(MASKS), st.sampled_from([(300, 500), (257, 129), (640, 640)]), st.sampled_from([64, 128]))
    def test_any_intervals_on_the_gpu(mask, lengths, d) -> None:
        found = check((mask, 1, *lengths, 4, 2, d))
        assert found.pop("lse") < 1e-3
        assert max(found.values()) < 1e-2, found

    @pytest.mark.parametrize(("T", "H", "K", "d"), [(2048, 4, 2, 128), (2048, 4, 1, 64), (1000, 7, 1, 128)])
    def test_errors_are_at_most_those_of_cudnn(T, H, K, d) -> None:
        """Against float64 with the same inputs, causal, up to the scatter of single roundings."""
        args = drawn((causal, 1, T, T, H, K, d))
        scale = d**-0.5
        dout = args[5]

        @jax.jit
        def theirs(q, k, v):
            def f(q, k, v):
                return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")

            out, pull = jax.vjp(f, q, k, v)
            return out, *pull(dout)

        none = jnp.zeros_like(args[6])
        want = exact.attention(*args[:5], scale, dout, none)
        ours = errors(jax.device_get(run(*args[:6], none, scale=scale)), want)
        out, *grads = jax.device_get(theirs(*args[:3]))
        cudnn = {"out": exact.relative(out, want.out)}
        cudnn |= {n: exact.relative(g, w) for n, g, w in zip(("dq", "dk", "dv"), grads, want[2:], strict=True)}
        assert all(ours[n] <= 1.02 * cudnn[n] for n in cudnn), (ours, cudnn)

    @pytest.mark.parametrize("d", [64, 128])
    def test_other_documents_change_no_bit(d) -> None:
        """Changing one document changes no bit of outputs and gradients of the others; a second run is identical."""
        T, cut = 512, 200
        numbers = np.random.default_rng()
        q, k, v = (jnp.asarray(numbers.standard_normal((1, T, n, d)), jnp.bfloat16) for n in (4, 2, 2))
        place = np.arange(T)
        start, end = (jnp.asarray(x[None], jnp.int32) for x in (np.where(place < cut, 0, cut), place + 1))

        @jax.jit
        def run(q, k, v):
            out, pull = jax.vjp(lambda *x: flash_gpu.attention(*x, start, end, 0.1)[0], q, k, v)
            return out, *pull(jnp.ones_like(out))

        first = run(q, k, v)
        changed = run(*(x.at[:, :cut].multiply(-3) for x in (q, k, v)))
        for a, b, c in zip(first, changed, run(q, k, v), strict=True):
            np.testing.assert_array_equal(np.asarray(a[:, cut:], np.float32), np.asarray(b[:, cut:], np.float32))
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(c, np.float32))
            assert (np.asarray(a[:, :cut], np.float32) != np.asarray(b[:, :cut], np.float32)).any()

    @pytest.mark.parametrize("d", [64, 128])
    def test_gradients_over_parts_of_the_keys_sum_to_the_gradient(d) -> None:
        """Given output and log-sum-exp over all keys."""
        q, k, v, start, end, dout, _ = drawn((window, 1, 500, 400, 4, 2, d))
        want = exact.attention(q, k, v, start, end, 0.1, dout)
        out, lse = flash_gpu.attention(q, k, v, start, end, 0.1)
        parts = []
        for at in (slice(0, 136), slice(136, 400)):
            ends = (jnp.clip(x - at.start, 0, at.stop - at.start) for x in (start, end))
            parts.append(flash_gpu.gradient(q, k[:, at], v[:, at], *ends, out, lse, dout, 0.1))
        (dq, dk, dv), (dq_more, dk_more, dv_more) = jax.device_get(parts)
        got = dq.astype(np.float32) + dq_more, np.concatenate([dk, dk_more], 1), np.concatenate([dv, dv_more], 1)
        assert max(exact.relative(g, w) for g, w in zip(got, want[2:], strict=True)) < 1e-2

    @pytest.mark.parametrize("d", [64, 128])
    def test_a_head_major_cache_gives_the_same_bits(d) -> None:
        """A chunk at an offset. Slots that no row sees have no effect while they are finite."""
        numbers = np.random.default_rng()
        written, S = 700, 1024
        q, k, v = (
            jnp.asarray(numbers.standard_normal((2, T, n, d)), jnp.bfloat16) for T, n in ((200, 4), (S, 2), (S, 2))
        )
        end = jnp.broadcast_to(jnp.arange(written - 200, written, dtype=jnp.int32) + 1, (2, 200))
        here = lambda x: x.at[:, written:].set(0)  # noqa: E731
        want = flash_gpu.attention(q, here(k), here(v), 0 * end, end, 0.1)
        k, v = (x.at[:, written:].multiply(1e30).swapaxes(1, 2) for x in (k, v))
        for a, b in zip(want, flash_gpu.attention(q, k, v, 0 * end, end, 0.1, True), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
