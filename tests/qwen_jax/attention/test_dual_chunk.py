"""Dual-chunk attention is its definition in float64, in every path through the model."""

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from convert import numpy_model
from qwen_jax import kernels, platform
from qwen_jax.attention import dual_chunk
from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.attention.paged_cache import PagedCache
from qwen_jax.config import DualChunk, ModelConfig, Yarn
from qwen_jax.errors import InputError
from qwen_jax.inference import one_row
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, bind, param_specs
from qwen_jax.published import published
from tests.helpers.forward import logits as forward_logits
from tests.helpers.forward import random_unstacked
from tests.helpers.layer_cases import one_layer_cache

CONFIG = dataclasses.replace(published("tiny"), vocab_size=96, num_layers=2, dual_chunk=DualChunk(12, 4, 12))
"""Chunks of 8 tokens."""
OPTIONS = Options(stacked=False)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


def on_rows(x: np.ndarray, mesh: Mesh, sharding: Sharding) -> jax.Array:
    """Numbers of rows, sharded as rows are."""
    return jax.device_put(np.asarray(x, np.int32), NamedSharding(mesh, sharding.rows))


def one_device() -> Mesh:
    return make_mesh({}, jax.devices()[:1])


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def step(
    config: ModelConfig, sharding: Sharding, params: Params, tokens_BT: jax.Array, cache: Any, options: Options,
    length_B: jax.Array,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Logits of the next tokens, and the cache with them in it, which has not advanced yet."""
    model, T = bind(config, params, sharding, options), tokens_BT.shape[1]
    output = model(tokens_BT, cache.positions(T), cache.mask(T), cache=cache, length_BT=length_B[:, None])
    return model.logits(output.hidden), output.cache


@pytest.mark.parametrize("length", [8, 9, 16, 17, 37])
def test_the_forward_pass_is_the_definition(length: int, rng: np.random.Generator) -> None:
    """Against float64 NumPy, from one chunk to five, with the length factor beyond 12 tokens."""
    mesh, tokens = one_device(), rng.integers(0, CONFIG.vocab_size, (1, length))
    params = random_unstacked(CONFIG, mesh, rng)
    got = forward_logits(CONFIG, params, mesh, tokens, OPTIONS)[0]
    want = numpy_model.logits(CONFIG, params, tokens[0])
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())
    # The test would notice plain attention, and attention without the length factor.
    plain = numpy_model.logits(dataclasses.replace(CONFIG, dual_chunk=None), params, tokens[0])
    cold = dataclasses.replace(CONFIG, dual_chunk=DualChunk(12, 4, 10**9))
    assert (length <= 12) == bool(np.allclose(plain, want, atol=1e-9))
    assert (length <= 12) == bool(np.allclose(numpy_model.logits(cold, params, tokens[0]), want, atol=1e-9))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_chunk_is_plain_attention_bit_for_bit(dtype: str, rng: np.random.Generator) -> None:
    """Without a cache, in a prompt, and step by step in a long cache that could hold more chunks."""
    mesh, tokens = one_device(), rng.integers(0, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    plain, options = dataclasses.replace(CONFIG, dual_chunk=None), dataclasses.replace(OPTIONS, dtype=dtype)
    params, sharding = random_unstacked(CONFIG, mesh, rng), Sharding.for_inference(CONFIG, mesh)
    want = forward_logits(plain, params, mesh, tokens, options)
    np.testing.assert_array_equal(forward_logits(CONFIG, params, mesh, tokens, options), want)
    with jax.set_mesh(mesh):
        got = []
        for config in (CONFIG, plain):
            lengths = on_rows(np.full(2, 5), mesh, sharding)
            cache = ContiguousCache.for_prompts(config, sharding, lengths, 64, jnp.dtype(dtype))
            parts, cache = step(config, sharding, params, tokens[:, :5], cache, options, lengths)
            got.append([parts])
            cache = cache.advanced(5)
            for t in range(5, 8):
                parts, cache = step(config, sharding, params, tokens[:, t : t + 1], cache, options, lengths + t - 4)
                got[-1].append(parts)
                cache = cache.advanced(1)
    for ours, theirs in zip(*got, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_prompts_chunks_and_steps_give_the_row_of_the_forward_pass(kind: str, rng: np.random.Generator) -> None:
    """Rows of unequal lengths; a prompt, a chunk at an offset, then single tokens, all at one final length."""
    mesh, B, T = one_device(), 3, 41
    config = dataclasses.replace(CONFIG, dual_chunk=DualChunk(12, 4, 10**9))  # One length factor for all calls.
    params, sharding = random_unstacked(config, mesh, rng), Sharding.for_inference(config, mesh)
    first = rng.integers(1, 20, B).astype(np.int32)
    tokens = rng.integers(0, config.vocab_size, (B, T)).astype(np.int32)
    want = [numpy_model.logits(config, params, row) for row in tokens]
    atol = 2e-4 * max(np.abs(w).max() for w in want)
    with jax.set_mesh(mesh):
        lengths = on_rows(first, mesh, sharding)
        if kind == "contiguous":
            cache: Any = ContiguousCache.for_prompts(config, sharding, lengths, 64, jnp.dtype("float32"))
        else:
            table = rng.permutation(3 * 16).reshape(3, 16).astype(np.int32)
            pages = jax.device_put(table, NamedSharding(mesh, sharding.tokens))
            sizes: Any = {"num_pages": 48, "page_size": 4, "dtype": jnp.dtype("float32")}
            cache = PagedCache.empty(config, sharding, pages, lengths, **sizes)
        longest = int(first.max())
        out, cache = step(config, sharding, params, tokens[:, :longest], cache, OPTIONS, lengths)
        for b, n in enumerate(first):
            np.testing.assert_allclose(np.asarray(out)[b, :n], want[b][:n], rtol=0, atol=atol)
        # A chunk of nine tokens, then one at a time.
        done, before = first.copy(), longest
        for n in (9, 1, 1, 1):
            if kind == "contiguous":
                cache = cache.advanced(before)
            else:
                cache = cache.advanced(on_rows(np.full(B, n), mesh, sharding))
            part = np.stack([tokens[b, done[b] : done[b] + n] for b in range(B)])
            out, cache = step(config, sharding, params, part, cache, OPTIONS, on_rows(done + n, mesh, sharding))
            for b in range(B):
                np.testing.assert_allclose(np.asarray(out)[b], want[b][done[b] : done[b] + n], rtol=0, atol=atol)
            done, before = done + n, n


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"context": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_sharding_does_not_matter(axes: dict[str, int], rng: np.random.Generator) -> None:
    """Heads on a tensor axis, tokens on a context axis (which training and scoring have)."""
    from qwen_jax.attention.sequence import zigzag_shard

    mesh, tokens = make_mesh(axes), rng.integers(0, CONFIG.vocab_size, (2, 40)).astype(np.int32)
    seed = int(rng.integers(2**31))
    params = random_unstacked(CONFIG, one_device(), np.random.default_rng(seed))
    want = forward_logits(CONFIG, params, one_device(), tokens, OPTIONS)
    sharding = Sharding.for_training(CONFIG, mesh)
    specs = param_specs(CONFIG, sharding, OPTIONS)
    sharded = jax.tree.map(lambda x, spec: jax.device_put(np.asarray(x), NamedSharding(mesh, spec)), params, specs)

    @jax.jit
    def run(params: Params, tokens_BT: jax.Array) -> jax.Array:
        model = bind(CONFIG, params, sharding, OPTIONS)
        positions = jnp.broadcast_to(jnp.arange(40), tokens_BT.shape)
        tokens_BT, positions, mask = jax.tree.map(
            lambda x: zigzag_shard(jax.reshard(x, jax.P(*sharding.rows, None)), sharding),
            (tokens_BT, positions, kernels.causal_mask(2, 40)),
        )
        return model.logits(model(tokens_BT, positions, kernels.Mask(mask.k_start_BT, mask.k_end_BT)).hidden)

    with jax.set_mesh(mesh):
        order = np.asarray(jax.jit(lambda x: zigzag_shard(x, sharding))(np.tile(np.arange(40, dtype=np.int32), (2, 1))))
        got = np.asarray(run(sharded, tokens))
    np.testing.assert_allclose(got, want[:, order[0]], rtol=0, atol=2e-4 * np.abs(want).max())


@hypothesis.given(st.integers(2, 40), st.data())
@hypothesis.settings(max_examples=30, deadline=None)
def test_the_parts_are_the_row_and_no_position_is_too_far(size: int, data: st.DataObject) -> None:
    """Every visible key is in one part; relative positions are at most chunk_size, and exact up to local_size."""
    local = data.draw(st.integers(1, size // 2))
    n, chunks = data.draw(st.integers(1, 90)), DualChunk(size, local, size)
    c, p = chunks.chunk_len, np.arange(n)
    positions = jnp.asarray(p[None], jnp.int32)
    masks = dual_chunk.split_mask(chunks, kernels.causal_mask(1, n), positions)
    seen = np.stack([
        (p >= np.asarray(m.k_start_BT)[0][:, None]) & (p < np.asarray(m.k_end_BT)[0][:, None]) for m in masks
    ])  # fmt: skip
    np.testing.assert_array_equal(seen.sum(axis=0), (p[None] <= p[:, None]).astype(int))
    query = np.stack([p % c, np.minimum(p % c + c, size), np.full(n, min(2 * c - 1, size))])
    relative = query[:, :, None] - (p % c)[None, None]
    true = p[:, None] - p[None]
    for part in range(3):
        assert (relative[part][seen[part]] <= size).all()
        assert (relative[part][seen[part]] >= 0).all()
        near = seen[part] & (true <= local)
        np.testing.assert_array_equal(relative[part][near], true[near])


def test_the_length_factor_is_one_up_to_the_trained_length() -> None:
    """Exactly one, then it grows; at a million tokens of a model trained on 262,144 it is 1.1339."""
    chunks = DualChunk(262144, 8192, 262144)
    lengths = jnp.asarray([1, 1000, 262143, 262144, 262145, 500_000, 1_000_000], jnp.int32)
    factor = np.asarray(dual_chunk.length_factor(chunks, lengths))
    assert (factor[:4] == 1).all()
    assert (np.diff(factor[3:]) > 0).all()
    assert abs(factor[-1] - 1.1339) < 1e-4


def test_what_is_not_defined_is_refused() -> None:
    """YaRN frequencies beside dual chunks; chunks without room; a second extension; an unknown scaling."""
    with pytest.raises(InputError, match="not defined"):
        dataclasses.replace(CONFIG, yarn=Yarn(4.0, 64))
    for wrong in ((8, 8, 8), (8, 0, 8), (8, 4, 0)):
        with pytest.raises(InputError, match="0 < local_size < chunk_size"):
            DualChunk(*wrong)
    base = published("qwen2.5-7b-instruct")
    with pytest.raises(InputError, match="already"):
        base.with_dual_chunk().with_rope_scaling("yarn:4")
    with pytest.raises(InputError, match="already"):
        base.with_rope_scaling("yarn:4").with_dual_chunk()
    for text in ("yarn", "linear:2", "yarn:x", "yarn:nan"):
        with pytest.raises(InputError, match="yarn:4"):
            base.with_rope_scaling(text)


@pytest.mark.parametrize("name", ["qwen2.5-7b-instruct-1m", "qwen2-57b-a14b"])
def test_the_fast_step_of_one_row_declines_more_than_one_chunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels rotate plainly. It is used as long as the cache has room for one chunk only."""
    monkeypatch.setattr(platform, "on_hopper", lambda: True)
    options = Options(stacked=False, fused=True, dtype="bfloat16")

    def takes(chunk_len: int) -> bool:
        config = dataclasses.replace(published(name), dual_chunk=DualChunk(chunk_len + 32, 32, 1024))
        cache = one_layer_cache(config)
        assert cache.slots == 128
        with jax.set_mesh(one_device()):
            return one_row.supports(config, Sharding(kv_heads=config.num_kv_heads), options, 1, cache)

    assert takes(128)
    assert takes(1000)
    assert not takes(127)


def test_a_model_trained_shorter_is_extended_four_times() -> None:
    """32,768 tokens become 131,072 by either way; the chunk is the trained length and 1/32 of it is local."""
    base = published("qwen2.5-7b-instruct")
    assert base.with_dual_chunk().dual_chunk == DualChunk(32768, 1024, 32768)
    assert base.with_dual_chunk().context_length == base.with_rope_scaling("yarn:4").context_length == 131072
    # The base model's config has a longer length than its training.
    extended = published("qwen2.5-7b").with_dual_chunk(trained_length=32768)
    assert (extended.dual_chunk, extended.context_length) == (DualChunk(32768, 1024, 32768), 131072)
    with pytest.raises(InputError, match="length of training"):
        base.with_dual_chunk(trained_length=0)
    million = published("qwen2.5-7b-instruct-1m")
    assert million.dual_chunk == DualChunk(262144, 8192, 262144)
    assert million.context_length == 1_010_000
