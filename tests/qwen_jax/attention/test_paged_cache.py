"""A paged cache holds what a contiguous one holds, wherever its pages are."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.attention.paged_cache import PagedCache, PagedLayer
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, bind
from qwen_jax.published import published
from tests.helpers.forward import random_unstacked

CONFIG = dataclasses.replace(published("tiny"), vocab_size=96, num_layers=2)
OPTIONS = Options(stacked=False)


@functools.partial(jax.jit, static_argnums=0)
def step(sharding: Sharding, params: Params, tokens_BT: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
    """Float32 logits of the next tokens, and the cache with them in it, which has not advanced yet."""
    model, T = bind(CONFIG, params, sharding, OPTIONS), tokens_BT.shape[1]
    output = model(tokens_BT, cache.positions(T), cache.mask(T), cache=cache)
    return model.logits(output.hidden), output.cache


def page_table(rng: np.random.Generator, rows: int, pages: int, shards: int, size: int) -> np.ndarray:
    """A table in which no two rows share a page, in random order; entries count the pages of a row's own shard."""
    per_shard = size // shards
    parts = [rng.permutation(per_shard)[: rows // shards * pages].reshape(-1, pages) for _ in range(shards)]
    return np.concatenate(parts).astype(np.int32)


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_pages_hold_what_one_buffer_holds(axes: dict[str, int]) -> None:
    """Prompts of unequal lengths, then single tokens: the same logits for every real token."""
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    rng = np.random.default_rng(seed)
    mesh = make_mesh(axes) if axes else make_mesh({}, jax.devices()[:1])
    sharding = Sharding.for_inference(CONFIG, mesh)
    B, T, steps, page = 4, 13, 5, 4
    lengths = rng.integers(1, T + 1, B).astype(np.int32)
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T + steps), np.int32)
    pages, num_pages = -(-(T + steps) // page), 64
    shards = sharding.batch_shards
    table = page_table(rng, B, pages, shards, num_pages)
    rows, wide = NamedSharding(mesh, sharding.rows), NamedSharding(mesh, sharding.tokens)
    with jax.set_mesh(mesh):
        params = random_unstacked(CONFIG, mesh, rng)
        on_rows = functools.partial(jax.device_put, device=rows)
        contiguous = ContiguousCache.for_prompts(CONFIG, sharding, on_rows(lengths), 32, jnp.dtype("float32"))
        paged = PagedCache.empty(
            *(CONFIG, sharding, jax.device_put(table, wide), on_rows(lengths)),
            num_pages=num_pages,
            page_size=page,
            dtype=jnp.dtype("float32"),
        )

        # The prompts: padding on the right may differ, real tokens may not.
        prompt = jax.device_put(tokens[:, :T], wide)
        want, contiguous = step(sharding, params, prompt, contiguous)
        got, paged = step(sharding, params, prompt, paged)
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(np.asarray(got)[b, :length], np.asarray(want)[b, :length], rtol=0, atol=1e-5)
        contiguous, paged = contiguous.advanced(lengths.max()), paged.advanced(on_rows(np.ones(B, np.int32)))

        # Single tokens.
        for i in range(steps):
            one = jax.device_put(tokens[:, T + i : T + i + 1], wide)
            want, contiguous = step(sharding, params, one, contiguous)
            got, paged = step(sharding, params, one, paged)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
            contiguous, paged = contiguous.advanced(1), paged.advanced(on_rows(np.ones(B, np.int32)))


def test_a_chunk_at_an_offset_sees_the_tokens_before_it_and_padding_is_not_written(mesh: Mesh) -> None:
    """A prompt in chunks, rows with unequal numbers of new tokens: logits of one pass over each row."""
    rng = np.random.default_rng(7)
    sharding = Sharding.for_inference(CONFIG, mesh)
    B, page, pages, num_pages = 2, 4, 5, 16
    tokens = rng.integers(0, CONFIG.vocab_size, (B, 16), np.int32)
    # New tokens of each row in each chunk; the rest of a chunk is padding.
    chunks = np.array([[5, 3], [2, 6], [0, 4], [6, 1]], np.int32)
    wide = functools.partial(jax.device_put, device=NamedSharding(mesh, sharding.tokens))
    on_rows = functools.partial(jax.device_put, device=NamedSharding(mesh, sharding.rows))
    with jax.set_mesh(mesh):
        params = random_unstacked(CONFIG, mesh, rng)
        table = wide(page_table(rng, B, pages, 1, num_pages))
        paged = PagedCache.empty(
            *(CONFIG, sharding, table, on_rows(chunks[0])),
            num_pages=num_pages,
            page_size=page,
            dtype=jnp.dtype("float32"),
        )
        got: list[list[np.ndarray]] = [[], []]
        done = np.zeros(B, int)
        for i, new in enumerate(chunks):
            chunk = np.zeros((B, 6), np.int32)
            for b in range(B):
                chunk[b, : new[b]] = tokens[b, done[b] : done[b] + new[b]]
            logits, paged = step(sharding, params, wide(chunk), paged)
            for b in range(B):
                got[b].append(np.asarray(logits)[b, : new[b]])
            done += new
            paged = paged.advanced(on_rows(chunks[i + 1] if i + 1 < len(chunks) else np.zeros(B, np.int32)))
        np.testing.assert_array_equal(paged.lengths_B, chunks.sum(0))

        for b in range(B):
            length = int(done[b])
            whole = ContiguousCache.for_prompts(
                CONFIG, sharding, on_rows(np.array([length], np.int32)), 32, jnp.dtype("float32")
            )
            want, _ = step(sharding, params, wide(tokens[b : b + 1, :length]), whole)
            np.testing.assert_allclose(np.concatenate(got[b]), np.asarray(want)[0], rtol=0, atol=1e-5)


def test_writes_beyond_the_table_are_dropped() -> None:
    """A row whose pages are full does not write into pages of other rows."""
    pages, numbers = jnp.zeros((4, 2, 4, 8)), jnp.asarray([2], jnp.int32)
    layer = PagedLayer(pages, pages, numbers[None], numbers, jnp.asarray([3], jnp.int32), fresh=False)
    k = jnp.arange(1.0, 4.0)[None, :, None, None] * jnp.ones((1, 3, 2, 8))
    want = np.zeros((4, 4))
    want[2, 2:] = 1.0, 2.0
    np.testing.assert_array_equal(layer.write(k, k).k_NKPd[:, 0, :, 0], want)
