"""Sampling: the same set of tokens as Hugging Face's warpers, the right distribution, and sort-free helpers that agree
with sorting."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from qwen_jax.errors import InputError
from qwen_jax.inference.sampling import NOT_FINITE, SamplingParams, SamplingValues, sample_token
from qwen_jax.inference.vocabulary import top_k

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
        return sample_token(
            jnp.asarray(logits), seen_BV, keys, jnp.int32(0), SamplingValues.of(params), params.mode, logits.shape[1]
        )[0]

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
    token, *_ = sample_token(jnp.asarray(logits), None, keys, jnp.int32(0), SamplingValues.of(params), params.mode, V)
    assert token.tolist() == [17] * 4


@pytest.mark.parametrize(
    ("off", "same"),
    [
        (SamplingParams(temperature=1.0, top_k=-1), SamplingParams(temperature=1.0)),
        (SamplingParams(temperature=1.0, top_k=3_000_000_000), SamplingParams(temperature=1.0)),
        (SamplingParams(temperature=1.0, top_k=10**30), SamplingParams(temperature=1.0)),
        (SamplingParams(temperature=1.0, top_k=300), SamplingParams(temperature=1.0)),
        (SamplingParams(temperature=1.0, top_k=300, top_p=0.7), SamplingParams(temperature=1.0, top_p=0.7)),
        (SamplingParams(temperature=2.0, top_k=60, top_p=1 - 1e-7), SamplingParams(temperature=2.0, top_k=60)),
        (SamplingParams(temperature=1.0, top_p=0.0), SamplingParams()),
        (SamplingParams(temperature=np.float32(1.0), top_k=np.int64(7)), SamplingParams(temperature=1.0, top_k=7)),
    ],
    ids=str,
)
def test_off_values_and_other_spellings(off: SamplingParams, same: SamplingParams) -> None:
    """A top_k of -1 or beyond the vocabulary is off. With top_p 0 only the likeliest stays, as in transformers."""
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    tokens = [
        sample_token(
            jnp.asarray(random_logits(3, vocab=300)), None, keys, jnp.int32(1), SamplingValues.of(p), p.mode, 300
        )[0]
        for p in (off, same)
    ]
    assert tokens[0].tolist() == tokens[1].tolist()


NEGATIVE_NAN = np.uint32(0xFFC00000).view(np.float32)


@pytest.mark.parametrize("bad", [np.float32("nan"), NEGATIVE_NAN, np.float32("inf")], ids=["nan", "-nan", "inf"])
@pytest.mark.parametrize("params", [SamplingParams(), *CASES], ids=str)
@pytest.mark.parametrize("places", [[0], [V - 1], [5, 1234, 2000], range(V)], ids=["first", "last", "some", "all"])
def test_rows_with_nan_or_infinity_are_marked_and_the_others_are_not(
    bad: np.float32, params: SamplingParams, places: Sequence[int]
) -> None:
    """One bad logit anywhere marks its row, in every method; and changes nothing in other rows."""
    clean = random_logits(9)
    logits = clean.copy()
    logits[1, list(places)] = logits[3, list(places)] = bad
    seen = jnp.zeros(logits.shape, bool).at[:, ::7].set(True)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    run = jax.jit(lambda x: sample_token(x, seen, keys, jnp.int32(0), SamplingValues.of(params), params.mode, V)[0])
    got, expected = run(logits).tolist(), run(clean).tolist()
    assert got == [expected[0], NOT_FINITE, expected[2], NOT_FINITE]


def test_logits_of_minus_infinity_are_tokens_of_probability_zero() -> None:
    logits = random_logits(10)
    logits[:, 1:] = -np.inf
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    for params in (SamplingParams(), *CASES[:4]):
        seen = jnp.zeros(logits.shape, bool)
        token, *_ = sample_token(
            jnp.asarray(logits), seen, keys, jnp.int32(0), SamplingValues.of(params), params.mode, V
        )
        assert token.tolist() == [0] * 4
        token, *_ = sample_token(
            jnp.full_like(logits, -jnp.inf), seen, keys, jnp.int32(0), SamplingValues.of(params), params.mode, V
        )
        assert token.tolist() == [NOT_FINITE] * 4


def test_a_log_probability_that_is_not_finite_marks_the_row() -> None:
    """Also where only the padding of the vocabulary, which is never sampled, is not finite."""
    logits = random_logits(11)
    logits[2, 300:] = np.nan
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    for logprobs, marked in ((False, False), (True, True)):
        params = SamplingParams(logprobs=logprobs)
        token, *_ = sample_token(
            jnp.asarray(logits), None, keys, jnp.int32(0), SamplingValues.of(params), params.mode, 300
        )
        assert (np.asarray(token) == NOT_FINITE).tolist() == [False, False, marked, False]


@pytest.mark.parametrize("params", [SamplingParams(), *CASES[:4]], ids=str)
def test_padding_ids_are_never_sampled(params: SamplingParams) -> None:
    limit = 250
    logits = random_logits(4, vocab=300)
    logits[:, limit:] = 50.0
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    values, mode = SamplingValues.of(params), params.mode
    choose = jax.jit(lambda step: sample_token(jnp.asarray(logits), None, keys, step, values, mode, limit)[0])
    for step in range(50):
        assert (np.asarray(choose(jnp.int32(step))) < limit).all()


def test_logprob_is_that_of_the_model_whatever_the_filters() -> None:
    logits = random_logits(5)
    params = SamplingParams(temperature=0.3, top_k=3, logprobs=True)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    token, logprob, _ = sample_token(
        jnp.asarray(logits), None, keys, jnp.int32(0), SamplingValues.of(params), params.mode, V
    )
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
        values, order = SamplingValues.of(params), np.array([2, 0, 3, 1])
        run = jax.jit(
            lambda x, k, values=values, mode=params.mode: sample_token(x, None, k, jnp.int32(5), values, mode, V)[0]
        )
        assert (run(logits[order], keys[order]) == run(logits, keys)[order]).all()


def test_numbers_do_not_recompile() -> None:
    run = jax.jit(sample_token, static_argnames=("mode", "vocab_limit"))
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    for params in (SamplingParams(0.5, 20, 0.9), SamplingParams(0.9, 3, 0.1, 0.4), SamplingParams(2.0, 32)):
        run(random_logits(8), None, keys, jnp.int32(0), SamplingValues.of(params), mode=params.mode, vocab_limit=V)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"temperature": 1e39},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": True},
        {"top_k": -2},
        {"top_k": 50.0},
        {"top_k": "20"},
        {"top_p": -0.1},
        {"top_p": float("nan")},
        {"repetition_penalty": float("inf")},
        {"seed": 1.5},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e38},
        {"seed": -1},
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        dataclasses.replace(SamplingParams(), **wrong)
