"""Prompts that are read in chunks, and documents that are read once, give what one prefill gives."""

import contextlib
import dataclasses
import gc
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from qwen_jax.attention.sparse import PooledBlocks, VerticalSlash, block_means
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine, SamplingParams, chunked_prefill
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from tests.helpers.forward import random_unstacked

SMALL = dataclasses.replace(published("tiny"), vocab_size=96, num_layers=2, eos_token_ids=())
CONFIGS = {
    "dense": SMALL,
    "dual chunk": dataclasses.replace(SMALL, dual_chunk=DualChunk(24, 8, 24)),
    "moe": dataclasses.replace(published("tiny-moe"), vocab_size=96, num_layers=2, eos_token_ids=()),
}
GREEDY = SamplingParams(temperature=0, logprobs=True)
MakeEngine = Callable[..., Engine]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def make_engine(rng: np.random.Generator) -> MakeEngine:
    """Engines with the same random weights, large enough for attention to matter."""
    seed = int(rng.integers(2**31))

    def make(config: ModelConfig, mesh: Mesh | None = None, **how: Any) -> Engine:
        mesh = mesh or make_mesh({}, jax.devices()[:1])
        params = random_unstacked(config, mesh, np.random.default_rng(seed))
        return Engine(config, params, mesh, dtype="float32", chunk=4, **how)

    return make


def prompts_of(rng: np.random.Generator, *lengths: int) -> list[list[int]]:
    return [rng.integers(0, 96, n).tolist() for n in lengths]


@pytest.mark.draw(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_chunk_sizes_do_not_matter(name: str, make_engine: MakeEngine, rng: np.random.Generator) -> None:
    """Rows of unequal lengths, some of one token, with and without a repetition penalty."""
    prompts = prompts_of(rng, 50, 1, 33)
    whole = make_engine(CONFIGS[name])
    for sampling in (GREEDY, dataclasses.replace(GREEDY, repetition_penalty=1.3)):
        want = whole.generate(prompts, sampling, max_new_tokens=6)
        for chunk in (7, 49):
            got = make_engine(CONFIGS[name], prefill_chunk=chunk).generate(prompts, sampling, max_new_tokens=6)
            for ours, theirs in zip(got, want, strict=True):
                np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
                assert ours.token_ids == theirs.token_ids


def test_chunks_on_a_mesh(make_engine: MakeEngine, rng: np.random.Generator) -> None:
    """The same texts on data and tensor axes, with dual-chunk attention."""
    config, prompts = CONFIGS["dual chunk"], prompts_of(rng, 45, 20)
    want = make_engine(config).generate(prompts, GREEDY, max_new_tokens=4)
    got = make_engine(config, make_mesh({"data": 2, "tensor": 2}), prefill_chunk=16).generate(
        prompts, GREEDY, max_new_tokens=4
    )
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
        assert ours.token_ids == theirs.token_ids


def test_one_program_reads_all_lengths_and_offsets(make_engine: MakeEngine, rng: np.random.Generator) -> None:
    """After the first long prompt nothing is compiled; every chunk is reported, and the last one is all of it."""
    engine = make_engine(CONFIGS["dual chunk"], prefill_chunk=16)
    engine.generate(prompts_of(rng, 40), GREEDY, max_new_tokens=2)
    compiled, seen = chunked_prefill.compiled_programs(), []
    engine.on_chunk = lambda read, total: seen.append((read, total))
    for length in (17, 33, 100):
        engine.generate(prompts_of(rng, length), GREEDY, max_new_tokens=2)
    assert chunked_prefill.compiled_programs() == compiled
    chunks = (0, 16, 32, 48, 64, 80, 96)
    assert seen == [(n, total) for total in (17, 33, 100) for n in (*(c for c in chunks if c < total), total)]


def test_the_cache_is_not_copied(make_engine: MakeEngine) -> None:
    """The program of a layer writes into the buffers that it is given."""
    engine = make_engine(CONFIGS["dual chunk"], prefill_chunk=16)
    static = engine._static(GREEDY.mode, 256)
    cache = engine._empty([40], static).cache
    with jax.set_mesh(engine.mesh):
        tokens = jax.device_put(np.zeros((1, 16), np.int32), NamedSharding(engine.mesh, engine.sharding.tokens))
        lengths = jax.device_put(np.full(1, 40, np.int32), NamedSharding(engine.mesh, engine.sharding.rows))
        begun = chunked_prefill.begin_chunk(engine.params, cache, tokens, lengths, static=static)
        buffers = cache.keys[0], cache.values[0]
        layer = engine.params["layers"][0], *begun[:3], buffers, None, cache.slot, None, np.int32(0)
        lowered = chunked_prefill.read_layer.lower(*layer, first=0, static=static)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in (begun[0], *buffers))


def test_an_interrupted_prefill_frees_its_memory(make_engine: MakeEngine, rng: np.random.Generator) -> None:
    """Ctrl-C between two chunks leaves no cache behind, and the next prompt is read as ever."""
    engine = make_engine(SMALL, prefill_chunk=16)
    prompts = prompts_of(rng, 60)
    want = engine.generate(prompts, GREEDY, max_new_tokens=3)

    def held() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def interrupt(read: int, total: int) -> None:
        if read:
            raise KeyboardInterrupt

    before, engine.on_chunk = held(), interrupt
    with contextlib.suppress(KeyboardInterrupt):
        engine.generate(prompts, GREEDY, max_new_tokens=3)
        raise AssertionError("not interrupted")
    assert held() == before
    engine.on_chunk = None
    assert engine.generate(prompts, GREEDY, max_new_tokens=3)[0].token_ids == want[0].token_ids


def test_a_document_is_read_once(make_engine: MakeEngine, rng: np.random.Generator) -> None:
    """Questions in any order, one of them left in the middle, each as if document and question were one prompt."""
    config = dataclasses.replace(CONFIGS["dual chunk"], dual_chunk=DualChunk(24, 8, 10**9))
    engine = make_engine(config, prefill_chunk=16)
    ((text,), questions) = prompts_of(rng, 61), prompts_of(rng, 5, 30, 1)
    sampling = dataclasses.replace(GREEDY, repetition_penalty=1.2)
    want = [engine.generate([text + q], sampling, max_new_tokens=5)[0] for q in questions]
    document = engine.read(text, room=64)
    reads: list[int] = []
    engine.on_chunk = lambda read, total: reads.append(total)
    for i in (0, 1, 2, 1, 0):
        (got,) = engine.generate([questions[i]], sampling, max_new_tokens=5, document=document)
        np.testing.assert_allclose(got.logprobs, want[i].logprobs, rtol=0, atol=1e-4)
        assert got.token_ids == want[i].token_ids
        assert got.prompt_token_ids == questions[i]
    both = engine.generate(questions[:2], sampling, max_new_tokens=5, document=document)
    assert [c.token_ids for c in both] == [c.token_ids for c in want[:2]]
    assert not reads, "the document was read again"


def test_a_short_document_is_read_by_a_short_chunk(make_engine: MakeEngine, rng: np.random.Generator) -> None:
    """A chunk of 32,768 tokens takes no more than the document: in its cache, and in the program that reads it."""
    engine = make_engine(CONFIGS["dense"], prefill_chunk=32_768)
    length = int(rng.integers(1, 90))
    (text,), (question,) = prompts_of(rng, length), prompts_of(rng, 9)
    with mock.patch.object(chunked_prefill, "prefill_chunk", wraps=chunked_prefill.prefill_chunk) as calls:
        document = engine.read(text, room=16)
        (got,) = engine.generate([question], GREEDY, max_new_tokens=5, document=document)
    assert document.slots <= 256
    assert [call.args[2].shape[1] for call in calls.call_args_list] == [128, 128]
    (want,) = engine.generate([text + question], GREEDY, max_new_tokens=5)
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-4)
    assert got.token_ids == want.token_ids


def test_what_does_not_fit_is_said_before_anything_runs(make_engine: MakeEngine, rng: np.random.Generator) -> None:
    """Room after a document, two continuations at a time, chunk sizes, and prompts over the context."""
    engine = make_engine(CONFIGS["dual chunk"], prefill_chunk=16)
    ((text,), (question,)) = prompts_of(rng, 40), prompts_of(rng, 10)
    document = engine.read(text, room=16)
    with pytest.raises(InputError, match="room of 16 tokens"):
        engine.generate([question], GREEDY, max_new_tokens=7, document=document)
    chunks = engine._continue(document, question, GREEDY, 4)
    next(chunks)
    with pytest.raises(InputError, match="still running"):
        engine.generate([question], GREEDY, max_new_tokens=4, document=document)
    chunks.close()
    engine.generate([question], GREEDY, max_new_tokens=4, document=document)
    with pytest.raises(InputError, match="prefill_chunk must be at least 1"):
        make_engine(SMALL, prefill_chunk=0)
    with pytest.raises(InputError, match="exceed the model's context"):
        engine.generate([[1] * engine.config.context_length], GREEDY, max_new_tokens=1)
    split = make_engine(CONFIGS["dual chunk"], make_mesh({"data": 2}, jax.devices()[:2]))
    with pytest.raises(InputError, match="divides rows over 2 devices"):
        split.read(text, room=16)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("dual chunk", VerticalSlash),
        ("dual chunk", PooledBlocks(threshold=0.0)),
        ("dense", VerticalSlash),
        ("dense", PooledBlocks(threshold=1.0, sink=0, window=1, last=300)),
        ("moe", PooledBlocks(threshold=0.0)),
    ],
)
def test_sparse_prefill_of_all_keys_is_dense_prefill(
    name: str, pattern: Any, make_engine: MakeEngine, rng: np.random.Generator
) -> None:
    """With budgets for all keys, a threshold of zero, or last queries that are the whole prompt; on rows of unequal
    lengths, in several chunks."""
    config = dataclasses.replace(CONFIGS[name], max_position_embeddings=512, num_layers=1)
    if config.dual_chunk is not None:
        config = dataclasses.replace(config, dual_chunk=DualChunk(130, 30, 130))
    prompts = prompts_of(rng, 300, 211)
    want = make_engine(config, prefill_chunk=128).generate(prompts, GREEDY, max_new_tokens=3)
    all_keys = ((512,) * config.num_heads,) * config.num_layers
    sparse = VerticalSlash(all_keys, all_keys) if pattern is VerticalSlash else pattern
    engine = make_engine(config, prefill_chunk=128, sparse=sparse, sparse_from=200)
    got = engine.generate(prompts, GREEDY, max_new_tokens=3)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
        assert ours.token_ids == theirs.token_ids
    assert len(engine.skipped) == 3
    for chunk in engine.skipped:
        assert chunk.density_BH.shape == (config.num_layers, 2, config.num_heads)
        np.testing.assert_allclose(np.asarray(chunk.density_BH), 1.0, atol=1e-5)
        np.testing.assert_allclose(np.asarray(chunk.audit_recall_BH), 1.0, atol=1e-4)
    # Short prompts are read densely.
    engine.generate([prompts[0][:150]], GREEDY, max_new_tokens=1)
    assert not engine.skipped


@pytest.mark.draw(1)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_means_of_blocks_are_kept(
    kv_dtype: Any, make_engine: MakeEngine, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooled blocks read means that each chunk has written. They are those of the cache, as attention reads it."""
    config = dataclasses.replace(CONFIGS["dual chunk"], max_position_embeddings=512, dual_chunk=DualChunk(130, 30, 130))
    sparse = PooledBlocks(threshold=1.0, sink=0, window=1, last=0)
    engine = make_engine(config, prefill_chunk=128, sparse=sparse, sparse_from=1, kv_dtype=kv_dtype)
    prompts, read, chunks = prompts_of(rng, 300, 211), chunked_prefill.prefill_chunk, []

    def checked(*args: Any, **static: Any) -> Any:
        state, skipped = read(*args, **static)
        chunks.append(int(state.cache.slot))
        for layer, means in zip(state.cache.layers, state.means, strict=True):
            for x, mean in zip(layer.keys_values(jnp.float32), means, strict=True):
                np.testing.assert_allclose(mean, block_means(x), rtol=1e-6, atol=1e-6)
                assert (np.asarray(mean)[:, :, : chunks[-1] // 128] != 0).any(axis=(1, 3)).all()
        return state, skipped

    monkeypatch.setattr(chunked_prefill, "prefill_chunk", checked)
    got = engine.generate(prompts, GREEDY, max_new_tokens=2)
    assert chunks == [128, 256, 300]
    # Without them the means of all blocks are computed for each chunk.
    monkeypatch.setattr(chunked_prefill, "prefill_chunk", read)
    monkeypatch.setattr(chunked_prefill, "empty_means", lambda rows, static: None)
    want = engine.generate(prompts, GREEDY, max_new_tokens=2)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("sparse", [None, PooledBlocks()], ids=str)
def test_memory_is_counted_to_the_byte(
    sparse: PooledBlocks | None, kv_dtype: Any, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, values and scales, and the means of pooled blocks beside them: a device with as many bytes takes the
    prompt, and one with a byte less refuses it and says how many tokens a row may have."""
    engine = make_engine(SMALL, prefill_chunk=128, kv_dtype=kv_dtype, sparse=sparse, sparse_from=200)
    slots, static = 512, engine._static(GREEDY.mode, 512)
    cache = engine._empty([300, 200], static).cache
    with jax.set_mesh(engine.mesh):
        means = chunked_prefill.empty_means(2, static=static) if sparse else ()
    # Not the factors of a key's components in 8 bits, [K, d], which no token adds to.
    held = sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values, means)) if x.ndim > 2)
    device: Any = types.SimpleNamespace()
    monkeypatch.setattr(engine, "mesh", types.SimpleNamespace(local_devices=[device]))
    device.memory_stats = lambda: {"bytes_limit": held + 5, "bytes_in_use": 5}
    engine._check_memory(2, slots, 300)
    device.memory_stats = lambda: {"bytes_limit": held + 4, "bytes_in_use": 5}
    with pytest.raises(InputError, match=r"2 rows of 512 tokens .* room for 511 tokens a row"):
        engine._check_memory(2, slots, 300)


def test_sparse_prefill_on_a_mesh_and_with_other_budgets(make_engine: MakeEngine, rng: np.random.Generator) -> None:
    """Heads on a tensor axis: the same texts and recall. Other budgets compile nothing, and larger ones see more."""
    config = dataclasses.replace(CONFIGS["dual chunk"], max_position_embeddings=512, dual_chunk=DualChunk(130, 30, 130))
    config = dataclasses.replace(config, num_layers=1)
    (prompt,) = prompts_of(rng, 300)
    shape = config.num_layers, config.num_heads
    budgets = [
        VerticalSlash(*(tuple(map(tuple, rng.integers(*r, shape).tolist())) for _ in "cs")) for r in ((8, 20), (60, 90))
    ]
    found = []
    for mesh in (None, make_mesh({"tensor": 2})):
        engine = make_engine(config, mesh, prefill_chunk=128, sparse_from=1)
        for pattern in budgets:
            engine.use_sparse(pattern, max_columns=128)
            compiled = chunked_prefill.compiled_programs()
            (got,) = engine.generate([prompt], GREEDY, max_new_tokens=3)
            last = engine.skipped[-1]
            found.append((got, np.asarray(last.audit_recall_BH), np.asarray(last.density_BH)))
        assert chunked_prefill.compiled_programs() == compiled
    for ours, theirs in ((found[0], found[2]), (found[1], found[3])):
        np.testing.assert_allclose(ours[0].logprobs, theirs[0].logprobs, rtol=0, atol=1e-3)
        for x, y in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-3)
    assert (found[1][2] >= found[0][2]).all()
    assert (found[0][1] < 1).any()
