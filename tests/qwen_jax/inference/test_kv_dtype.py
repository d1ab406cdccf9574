"""With keys and values in 8 bits a text depends on its request alone: not on layout, pages, chunks, company or hits."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.attention.quantized_cache import KVDtype, kv_bytes_per_token
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.inference.buckets import Buckets, RunnerConfig
from qwen_jax.inference.completion import Ending
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.page_memory import _other_bytes, pages_that_fit
from qwen_jax.inference.request import Request
from qwen_jax.inference.runner import PrefillInput, RowInput, Runner, SampleRow
from qwen_jax.inference.sampling import NOT_FINITE
from qwen_jax.parallel.sharding import Sharding, make_mesh
from tests.helpers.forward import random_unstacked
from tests.helpers.runs import print_seed
from tests.helpers.runs_of_runner import Text, generate
from tests.qwen_jax.inference.test_runner import DENSE, PAGE, SETTINGS, V

NEW = 6
SMALL = dataclasses.replace(DENSE, num_layers=2)
BUCKETS = Buckets(rows=(4,), slots=(64,), prefill=((3, 48),), prefill_slots=(192,), texts=())
CHOICES: list[KVDtype] = ["int8", "fp8"]
GREEDY = SamplingParams()
LOGPROBS = SamplingParams(logprobs=True)
SIZES: Any = {"max_seqs": 2, "max_length": 64, "page_size": 16, "num_pages": 12, "max_batched_tokens": 32}
# A hidden state of another program may differ in its last bit, so that a number on the edge between two steps of the
# cache is rounded the other way. That moves log-probabilities by less than this, and greedy texts may part at a tie.
TIE = 0.02


def make(kv_dtype: KVDtype, config: ModelConfig = SMALL, axes: dict[str, int] | None = None, **settings: Any) -> Any:
    """The engine of fixed batches and a runner with the same weights, and the same dtype of keys and values."""
    rng = print_seed()
    axes = axes or {}
    mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values()), dtype=int))])
    params = random_unstacked(config, mesh, rng)
    # A large bias of one component, as Qwen2.5 has, so that keys have factors.
    for layer in params["layers"]:
        bias = np.array(layer["attention"]["k"]["bias"])
        bias[:, 3] = 24.0
        layer["attention"]["k"]["bias"] = jax.device_put(bias, layer["attention"]["k"]["bias"].sharding)
    engine = Engine(config, params, mesh, dtype="float32", chunk=NEW, kv_dtype=kv_dtype)
    how = dataclasses.replace(SETTINGS, kv_dtype=kv_dtype, buckets=BUCKETS, **settings)
    return engine, Runner(config, engine.params, mesh, engine.options, engine.vocab_limit, how)


def check_same(engine: Engine, prompt: list[int], tokens: list[int], logprobs: list[float] | None) -> None:
    """The engine's greedy text, token for token up to a tie."""
    (want,) = engine.generate([prompt], LOGPROBS, max_new_tokens=len(tokens))
    assert want.logprobs is not None
    assert logprobs is not None
    for token, logprob, other, wanted in zip(tokens, logprobs, want.token_ids, want.logprobs, strict=True):
        assert abs(logprob - wanted) < TIE
        if token != other:
            return


@pytest.fixture(params=CHOICES)
def kv_dtype(request: pytest.FixtureRequest) -> KVDtype:
    return cast(KVDtype, request.param)


@pytest.mark.parametrize(
    ("config", "axes"),
    [(SMALL, {}), (dataclasses.replace(SMALL, dual_chunk=DualChunk(24, 8, 24)), {"tensor": 2})],
    ids=["one device", "dual chunks, sharded"],
)
def test_texts_are_those_of_the_fixed_batch(config: ModelConfig, axes: dict[str, int]) -> None:
    """Random chunks, companies, orders and pages, of any size; one text shares pages of another. Then prompts of the
    fixed batch in chunks: they attend to what the cache holds, however they are read."""
    rng = print_seed()
    page = int(rng.choice([PAGE, 2 * PAGE]))
    engine, runner = make(CHOICES[int(rng.integers(2))], config, axes, page_size=page, num_pages=90 * PAGE // page)
    texts = [Text(rng.integers(0, V, n).tolist(), SampleRow(0, GREEDY, 0)) for n in rng.integers(17, 32, 3)]
    if config.dual_chunk is None:
        texts[1].prompt = [*texts[0].prompt[:16], *texts[1].prompt[:9]]
        texts[1].shares, texts[1].shared = texts[0], 16
    for text in generate(runner, texts, NEW, rng):
        check_same(engine, text.prompt, text.tokens, text.logprobs)
    (whole,) = engine.generate([texts[0].prompt], LOGPROBS, max_new_tokens=NEW)
    engine.prefill_chunk = 8
    check_same(engine, texts[0].prompt, whole.token_ids, whole.logprobs)


def test_pages_of_the_prefix_cache_give_the_same_bits(kv_dtype: KVDtype) -> None:
    """Of logits, where the rest of the prompt and the new tokens are read by the same programs."""
    rng = print_seed()
    _, runner = make(kv_dtype)
    prompt, pages = rng.integers(0, V, 21).tolist(), rng.permutation(runner.settings.num_pages).tolist()
    first, shared = pages[:6], 12 // PAGE
    runner.prefill([PrefillInput(0, prompt[:12], 0, first)])
    results = []
    for slot, row in (0, first), (3, [*first[:shared], *pages[6:10]]):
        read = runner.prefill([PrefillInput(slot, prompt[12:], 12, row)])
        runner.sample(read, [SampleRow(slot, GREEDY, 0)])
        results.append([np.asarray(read)[0], np.asarray(runner.decode([RowInput(slot, 21, row)]))[0]])
    np.testing.assert_array_equal(*results)


def test_the_engine_finds_the_bits_of_a_prompt_again_and_takes_other_weights() -> None:
    """Hits of the prefix cache change no bit of log-probabilities; new weights give what an engine of theirs gives."""
    rng = print_seed()
    kv_dtype = CHOICES[int(rng.integers(2))]
    fixed, _ = make(kv_dtype)
    other, _ = make(kv_dtype)
    prompt = rng.integers(0, V, 45).tolist()
    request = Request(tuple(prompt), Ending(frozenset(), (), NEW), GREEDY)
    how: Any = {**SIZES, "dtype": "float32", "kv_dtype": kv_dtype}
    with ContinuousEngine(fixed.config, fixed.params, fixed.mesh, **how) as engine:
        (first,), (again,) = engine.generate([request]), engine.generate([request])
        assert (first.cached_tokens, again.cached_tokens) == (0, 32)
        assert first.token_ids == again.token_ids
        assert [t.logprob for t in first.tokens] == [t.logprob for t in again.tokens]
        check_same(fixed, prompt, first.token_ids, [t.logprob for t in first.tokens])
        name = {"int8": "int8", "fp8": "float8_e4m3fn"}[kv_dtype]
        assert (engine.stats().kv_dtype, engine.stats().page_size) == (name, 16)
        engine.update_weights(other.params)
        (new,) = engine.generate([request])
        assert new.cached_tokens == 0
        check_same(other, prompt, new.token_ids, [t.logprob for t in new.tokens])


def test_pages_of_a_row_that_was_not_finite_are_cleared(kv_dtype: KVDtype) -> None:
    """Scales that are NaN behind the slots of a text make its logits NaN; `clear_pages` leaves nothing of them."""
    rng = print_seed()
    engine, runner = make(kv_dtype)
    pages, prompt = rng.permutation(runner.settings.num_pages)[:6].tolist(), rng.integers(0, V, 5).tolist()

    def spoiled(rows: Any) -> Any:
        scales = np.array(rows.scales_BKS)
        scales[pages] = np.nan
        return dataclasses.replace(rows, scales_BKS=jax.device_put(scales, rows.scales_BKS.sharding))

    runner._pages = runner._pages._replace(
        keys=tuple(map(spoiled, runner._pages.keys)), values=tuple(map(spoiled, runner._pages.values))
    )
    got = []
    for clear in (False, True):
        if clear:
            factors = [np.asarray(rows.channels_Kd) for rows in runner._pages.keys]
            runner.clear_pages(pages)
            for before, rows in zip(factors, runner._pages.keys, strict=True):
                assert before.max() > 1
                np.testing.assert_array_equal(rows.channels_Kd, before)
        first = runner.sample(runner.prefill([PrefillInput(0, prompt, 0, pages)]), [SampleRow(0, GREEDY, 0)])
        sampled = first.read()
        got.append((int(sampled.token_ids[0]), float(sampled.logprobs[0])))
    assert got[0][0] == NOT_FINITE
    check_same(engine, prompt, [got[1][0]], [got[1][1]])


# --- memory and wrong values ---


class Device:
    """A device with so much memory."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": 0}


def test_pages_in_8_bits_are_twice_as_many() -> None:
    """As many as their bytes, with the scales: 132 for 256 where a vector has 128 components."""
    config = dataclasses.replace(SMALL, head_dim=128)
    sharding = Sharding.for_inference(config, make_mesh({}, jax.devices()[:1]))
    found = {}
    for kv_dtype in ("auto", *CHOICES):
        sizes = RunnerConfig(256, 1 << 20, 32, 1, 2048, kv_dtype=kv_dtype)
        device: Any = Device(_other_bytes(config, sizes, sharding, "bfloat16") + (10 << 30))
        found[kv_dtype] = pages_that_fit(config, sizes, sharding, device, "bfloat16", 1.0)
        dtype = {"auto": jnp.bfloat16, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[kv_dtype]
        assert found[kv_dtype] == (10 << 30) // (32 * kv_bytes_per_token(config, dtype))
    assert found["int8"] == found["fp8"] == pytest.approx(found["auto"] * 256 / 132, abs=1)


def test_an_unknown_dtype_is_named_with_the_choices() -> None:
    engine, _ = make("auto")
    wrong: Any = {"kv_dtype": "int4"}
    for refused in (
        lambda: RunnerConfig(2, 64, 16, 12, 32, **wrong),
        lambda: Engine(engine.config, engine.params, engine.mesh, **wrong),
        lambda: ContinuousEngine(engine.config, engine.params, engine.mesh, **SIZES, **wrong),
    ):
        with pytest.raises(InputError, match=r"kv_dtype auto \(the compute dtype\), int8 or fp8; got 'int4'"):
            refused()
