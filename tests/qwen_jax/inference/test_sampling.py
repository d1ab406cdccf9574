"""Sampling: the same set of tokens as Hugging Face's warpers, the right distribution, and sort-free helpers that agree
with sorting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from qwen_jax.errors import InputError
from qwen_jax.inference.sampling import Knobs, SamplingParams, sample, top_k

V = 4000


def random_logits(seed: int, rows: int = 4, vocab: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


def hf_probabilities(logits: np.ndarray, params: SamplingParams, seen: np.ndarray | None = None) -> np.ndarray:
    """The distribution transformers would sample from, by its own processors in its own order."""
    scores = torch.tensor(logits)
    rows = len(logits)
    if params.repetition_penalty != 1.0:
        assert seen is not None
        for b in range(rows):
            ids = torch.tensor(np.flatnonzero(seen[b]))[None]
            penalise = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
            scores[b : b + 1] = penalise(ids, scores[b : b + 1])
    dummy = torch.zeros((rows, 1), dtype=torch.long)
    warpers = [hf.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    for warper in warpers:
        scores = warper(dummy, scores)
    return torch.softmax(scores, dim=-1).numpy()


def draw(logits: np.ndarray, params: SamplingParams, draws: int, seen: np.ndarray | None = None) -> np.ndarray:
    """[draws, rows] tokens, each with random numbers of its own."""

    def one(seed: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(logits)))
        seen_BV = None if seen is None else jnp.asarray(seen)
        return sample(jnp.asarray(logits), seen_BV, keys, jnp.int32(0), Knobs.of(params), params.plan, logits.shape[1])[
            0
        ]

    return np.asarray(jax.jit(lambda: jax.lax.map(one, jnp.arange(draws), batch_size=200))())


CASES = [
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    SamplingParams(temperature=1.3, top_k=5),
    SamplingParams(temperature=1.0, top_k=30, min_p=0.1),
    SamplingParams(temperature=0.4, top_p=0.9),
    SamplingParams(temperature=1.0, top_k=200, top_p=0.95),
    SamplingParams(temperature=0.8, min_p=0.2),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3),
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_distribution_is_that_of_transformers(params: SamplingParams) -> None:
    """Support exactly equal where it can be reached; frequencies within five standard deviations."""
    logits = random_logits(1, vocab=300)
    seen = np.random.default_rng(2).random(logits.shape) < 0.3
    expected = hf_probabilities(logits, params, seen)
    draws = 2000
    tokens = draw(logits, params, draws, seen if params.repetition_penalty != 1 else None)
    for b in range(len(logits)):
        counts = np.bincount(tokens[:, b], minlength=logits.shape[1])
        assert not counts[expected[b] == 0].any(), "sampled a token that transformers filters out"
        deviation = 5 * np.sqrt(expected[b] * (1 - expected[b]) * draws) + 1e-9
        assert (np.abs(counts - expected[b] * draws) <= deviation + 3).all()


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = random_logits(3)
    logits[:, 17] = logits[:, 2500] = 100.0
    params = SamplingParams()
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    token, _ = sample(jnp.asarray(logits), None, keys, jnp.int32(0), Knobs.of(params), params.plan, V)
    assert token.tolist() == [17] * 4


@pytest.mark.parametrize("params", [SamplingParams(), *CASES[:4]], ids=str)
def test_padding_ids_are_never_chosen(params: SamplingParams) -> None:
    limit = 250
    logits = random_logits(4, vocab=300)
    logits[:, limit:] = 50.0
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    knobs, plan = Knobs.of(params), params.plan
    choose = jax.jit(lambda step: sample(jnp.asarray(logits), None, keys, step, knobs, plan, limit)[0])
    for step in range(50):
        assert (np.asarray(choose(jnp.int32(step))) < limit).all()


def test_logprob_is_that_of_the_model_whatever_the_filters() -> None:
    logits = random_logits(5)
    params = SamplingParams(temperature=0.3, top_k=3, logprobs=True)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    token, logprob = sample(jnp.asarray(logits), None, keys, jnp.int32(0), Knobs.of(params), params.plan, V)
    expected = torch.log_softmax(torch.tensor(logits), -1).numpy()[np.arange(4), np.asarray(token)]
    np.testing.assert_allclose(np.asarray(logprob), expected, rtol=1e-5)


@pytest.mark.parametrize("vocab", [33, 1000, 4000, 151936])
def test_top_k_by_groups_equals_top_k(vocab: int) -> None:
    x = jnp.asarray(random_logits(6, rows=3, vocab=vocab))
    values, ids = top_k(x, 32)
    expected, _ = jax.lax.top_k(x, 32)
    assert (values == expected).all()
    assert (jnp.take_along_axis(x, ids, axis=1) == values).all()


def test_row_does_not_depend_on_the_others() -> None:
    """A row's key fixes its random numbers, wherever the row stands in the batch."""
    logits = random_logits(7)
    for params in CASES[:5]:
        keys = jax.vmap(jax.random.key)(jnp.arange(4))
        knobs, order = Knobs.of(params), np.array([2, 0, 3, 1])
        run = jax.jit(lambda x, k, knobs=knobs, plan=params.plan: sample(x, None, k, jnp.int32(5), knobs, plan, V)[0])
        assert (run(logits[order], keys[order]) == run(logits, keys)[order]).all()


def test_numbers_do_not_recompile() -> None:
    run = jax.jit(sample, static_argnames=("plan", "vocab_limit"))
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    for params in (SamplingParams(0.5, 20, 0.9), SamplingParams(0.9, 3, 0.1, 0.4), SamplingParams(2.0, 32)):
        run(random_logits(8), None, keys, jnp.int32(0), Knobs.of(params), plan=params.plan, vocab_limit=V)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"temperature": 1e39},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        dataclasses.replace(SamplingParams(), **wrong)  # type: ignore[arg-type]
