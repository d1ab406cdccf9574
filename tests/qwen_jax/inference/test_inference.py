"""Generation: token for token what transformers generates, whatever the batch, the padding, the mesh and the chunks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import convert
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import Completion, Engine, SamplingParams, load_generation_defaults
from qwen_jax.inference.programs import decode, prefill
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import Tokenizer, train_bpe
from tests.helpers.hf import make_hf_checkpoint

LENGTHS = (3, 17, 64, 40, 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and the transformers model that wrote it. No end-of-text id, so that texts are long."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, make_hf_checkpoint(folder, num_key_value_heads=2, eos_token_id=None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small tokenizer; larger than the vocabulary of `checkpoint`."""
    return train_bpe(["hello world, hello there"] * 4, 300)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 160, length).tolist() for length in LENGTHS]


def load_engine(folder: Path, axes: dict[str, int] | None = None, **options: Any) -> Engine:
    mesh = make_mesh(axes or {})
    config, params = convert.load(folder, mesh, "float32", Options(stacked=False))
    return Engine(config, params, mesh, **{"dtype": "float32", **options})


@pytest.fixture(scope="module")
def engine(checkpoint: tuple[Path, Any]) -> Engine:
    return load_engine(checkpoint[0])


@pytest.fixture(scope="module")
def greedy(engine: Engine, prompts: list[list[int]]) -> list[Completion]:
    return engine.generate(prompts, SamplingParams(logprobs=True), max_new_tokens=64)


def test_greedy_batch_equals_transformers_token_for_token(
    checkpoint: tuple[Path, Any], prompts: list[list[int]], greedy: list[Completion]
) -> None:
    for prompt, completion in zip(prompts, greedy, strict=True):
        with torch.no_grad():
            out = checkpoint[1].generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        assert completion.token_ids == out[0, len(prompt) :].tolist()
        assert completion.finish_reason == "length"


def test_logprobs_are_those_of_transformers(
    checkpoint: tuple[Path, Any], prompts: list[list[int]], greedy: list[Completion]
) -> None:
    for prompt, completion in zip(prompts, greedy, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logp = torch.log_softmax(checkpoint[1](ids).logits[0, len(prompt) - 1 : -1].float(), -1)
        expected = logp[torch.arange(64), ids[0, len(prompt) :]].numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-4)


SAMPLED = SamplingParams(temperature=0.9, top_k=12, top_p=0.9, repetition_penalty=1.1, seed=7)


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED, SamplingParams(temperature=1.0, top_p=0.95, seed=3)])
def test_batch_order_and_company_change_nothing(
    engine: Engine, prompts: list[list[int]], sampling: SamplingParams
) -> None:
    """Row i uses seed + i: alone with that seed, or in any place with it, a prompt's text is the same."""
    together = engine.generate(prompts, sampling, max_new_tokens=24)
    for i, prompt in enumerate(prompts):
        seeded = SamplingParams(**{**sampling.__dict__, "seed": sampling.seed + i})
        (alone,) = engine.generate([prompt], seeded, max_new_tokens=24)
        assert alone.token_ids == together[i].token_ids


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_sharded_equals_one_device(
    checkpoint: tuple[Path, Any], prompts: list[list[int]], engine: Engine, axes: dict[str, int]
) -> None:
    """tensor=4 has twice as many shards as there are key/value heads."""
    sharded = load_engine(checkpoint[0], axes)
    for sampling in (SamplingParams(), SAMPLED):
        expected = engine.generate(prompts, sampling, max_new_tokens=24)
        got = sharded.generate(prompts, sampling, max_new_tokens=24)
        assert [c.token_ids for c in got] == [c.token_ids for c in expected]


def test_same_seed_same_text_and_another_seed_another(engine: Engine, prompts: list[list[int]]) -> None:
    first, again = (engine.generate(prompts[:1], SAMPLED, max_new_tokens=24)[0].token_ids for _ in range(2))
    other = engine.generate(prompts[:1], SamplingParams(**{**SAMPLED.__dict__, "seed": 8}), max_new_tokens=24)
    assert first == again
    assert first != other[0].token_ids


def test_nothing_compiles_after_warm_up(checkpoint: tuple[Path, Any], prompts: list[list[int]]) -> None:
    """Nor for other lengths in the bucket, other numbers of new tokens, other sampling numbers."""
    engine = load_engine(checkpoint[0], chunk=8)
    engine.warm_up(batch_size=4, prompt_length=64, max_new_tokens=64, sampling=SAMPLED)
    before = prefill._cache_size(), decode._cache_size()
    engine.generate(prompts[:4], SAMPLED, max_new_tokens=64)
    engine.generate(prompts[:3], SamplingParams(temperature=0.1, top_k=1, repetition_penalty=2.0), max_new_tokens=9)
    assert (prefill._cache_size(), decode._cache_size()) == before


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunk_size_changes_nothing(
    checkpoint: tuple[Path, Any], prompts: list[list[int]], greedy: list[Completion], chunk: int
) -> None:
    engine = load_engine(checkpoint[0], chunk=chunk)
    for n in (1, 2, 11):
        got = engine.generate(prompts, max_new_tokens=n)
        assert [c.token_ids for c in got] == [c.token_ids[:n] for c in greedy]


def test_steps_beyond_the_end_of_the_cache_are_harmless(checkpoint: tuple[Path, Any]) -> None:
    """200 + 56 tokens fill a cache of 256 exactly; a chunk of 64 steps runs past its end."""
    prompt = [np.random.default_rng(1).integers(0, 160, 200).tolist()]
    texts = [
        load_engine(checkpoint[0], chunk=chunk).generate(prompt, max_new_tokens=56)[0].token_ids for chunk in (1, 64)
    ]
    assert texts[0] == texts[1]


def test_each_end_of_text_id_ends_its_row(engine: Engine, prompts: list[list[int]], greedy: list[Completion]) -> None:
    eos = [greedy[0].token_ids[10], greedy[1].token_ids[20]]
    for completion, full in zip(engine.generate(prompts, max_new_tokens=64, eos_token_ids=eos), greedy, strict=True):
        hits = [i for i, token in enumerate(full.token_ids) if token in eos]
        assert completion.token_ids == full.token_ids[: hits[0] + 1 if hits else 64]
        assert completion.finish_reason == ("stop" if hits else "length")


# --- text ---


@pytest.fixture(scope="module")
def text_engine(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Engine:
    folder = tmp_path_factory.mktemp("text")
    make_hf_checkpoint(folder, vocab_size=tokenizer.vocab_size + 30, eos_token_id=None, seed=4)
    return load_engine(folder, tokenizer=tokenizer, chunk=3)


def test_padding_ids_of_the_vocabulary_are_never_sampled(text_engine: Engine, tokenizer: Tokenizer) -> None:
    hot = SamplingParams(temperature=50.0)
    for completion in text_engine.generate(["hello"] * 8, hot, max_new_tokens=60):
        assert max(completion.token_ids) < tokenizer.vocab_size


def test_stream_gives_the_text_of_generate(text_engine: Engine) -> None:
    sampling = SamplingParams(temperature=1.0, seed=1)
    (whole,) = text_engine.generate(["hello"], sampling, max_new_tokens=40)
    pieces = list(text_engine.stream("hello", sampling, max_new_tokens=40))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].completion == whole
    assert len(pieces) > 5
    assert all(piece.completion is None for piece in pieces[:-1])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_stop_string_is_cut_off_and_never_streamed(text_engine: Engine, size: int) -> None:
    sampling = SamplingParams(temperature=1.0, seed=2)
    (whole,) = text_engine.generate(["hello"], sampling, max_new_tokens=40)
    assert whole.text is not None
    stop = whole.text[9 : 9 + size]
    expected = whole.text[: whole.text.index(stop)]
    (cut,) = text_engine.generate(["hello"], sampling, max_new_tokens=40, stop=[stop, "never there"])
    assert (cut.text, cut.finish_reason) == (expected, "stop")
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    streamed = "".join(piece.text for piece in text_engine.stream("hello", sampling, max_new_tokens=40, stop=[stop]))
    assert streamed == expected


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[]]}, "empty"),
        ({"prompts": [[1], [160]]}, r"Prompt 1 has token id 160; ids must be in \[0, 160\)"),
        ({"prompts": ["text"]}, "no tokenizer"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "at least 1"),
        ({"prompts": [[1] * 500], "max_new_tokens": 13}, "context of 512"),
        ({"prompts": [[1]], "stop": ["x"]}, "need a tokenizer"),
    ],
    ids=str,
)
def test_bad_arguments_say_what_to_do(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.generate(**arguments)


def test_stream_refuses_before_the_first_piece(engine: Engine, text_engine: Engine) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        engine.stream([1])
    with pytest.raises(InputError, match="context"):
        text_engine.stream("hello", max_new_tokens=512)
    with pytest.raises(InputError, match="empty"):
        text_engine.stream("hello", stop=[""])


def test_tokenizer_larger_than_the_model_is_refused(checkpoint: tuple[Path, Any], tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="do not belong together"):
        load_engine(checkpoint[0], tokenizer=tokenizer)


def test_cache_that_cannot_fit_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 10_000, "bytes_in_use": 9_000}

    class Stub:
        shape = engine.mesh.shape
        local_devices = (Small(),)

    monkeypatch.setattr(engine, "mesh", Stub())
    with pytest.raises(InputError, match="GiB are free"):
        engine.generate([[1]], max_new_tokens=8)


# --- generation_config.json ---


@pytest.fixture
def config(checkpoint: tuple[Path, Any]) -> ModelConfig:
    return convert.open_source(checkpoint[0]).config


def test_published_defaults_are_read(tmp_path: Path, config: ModelConfig) -> None:
    instruct = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "eos_token_id": [151, 143],
        "pad_token_id": 143,
        "bos_token_id": 143,
        "transformers_version": "4.43.1",
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(instruct))
    defaults = load_generation_defaults(tmp_path, config)
    assert defaults.sampling == SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
    assert defaults.eos_token_ids == (151, 143)
    base = {"do_sample": False, "max_new_tokens": 2048, "eos_token_id": 143}
    (tmp_path / "generation_config.json").write_text(json.dumps(base))
    defaults = load_generation_defaults(tmp_path, config)
    assert (defaults.sampling, defaults.max_new_tokens) == (SamplingParams(), 2048)


def test_no_end_of_text_id_means_the_full_length(
    tmp_path: Path, config: ModelConfig, engine: Engine, prompts: list[list[int]]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    defaults = load_generation_defaults(tmp_path, config)
    assert defaults.eos_token_ids == ()
    (one,) = engine.generate(prompts[:1], max_new_tokens=20, eos_token_ids=defaults.eos_token_ids)
    assert (len(one.token_ids), one.finish_reason) == (20, "length")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": [0, 1.5]}, "eos_token_id"),
        ({"eos_token_id": "0"}, "eos_token_id"),
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"presence_penalty": 1.5}, "presence_penalty=1.5"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beam_groups": 2}, "num_beam_groups"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"stop_strings": ["a"]}, "stop_strings"),
        ({"do_sample": True, "top_k": 50.7}, "whole number"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number"),
        ({"do_sample": True, "top_k": -2}, r"generation_config.json: top_k must be"),
        ({"max_new_tokens": -5}, "at least 1"),
    ],
    ids=str,
)
def test_unsupported_defaults_are_refused(
    tmp_path: Path, config: ModelConfig, content: dict[str, Any], message: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_generation_defaults(tmp_path, config)
