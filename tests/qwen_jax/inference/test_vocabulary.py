"""Sampling over tensor shards of the vocabulary gives what it gives on one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwen_jax.inference import row_sampling
from qwen_jax.inference.row_sampling import Rules, SampledRows, SampleRow
from qwen_jax.inference.sampling import SamplingParams, numbers_of
from qwen_jax.inference.vocabulary import Vocabulary
from qwen_jax.parallel.sharding import make_mesh

V, LIMIT, SHARDS = 4096, 4000, 4
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.6, top_p=0.0),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05),
    SamplingParams(temperature=1.3, top_k=32, min_p=0.02),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.9, top_p=0.9),
    SamplingParams(temperature=1.1, top_k=200, top_p=0.95, min_p=0.01),
    SamplingParams(temperature=0.8, min_p=0.05, repetition_penalty=1.2),
]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    print("seed", seed)
    return np.random.default_rng(seed)


def near_a_threshold(logits_V: np.ndarray, params: SamplingParams) -> bool:
    """Whether the order in which probabilities are added could decide which tokens top-p and min-p keep."""
    top_k, (temperature, top_p, min_p, _) = numbers_of(params)
    x = np.sort(logits_V.astype(np.float64) / temperature)[::-1]
    x = x[x >= x[min(top_k, len(x)) - 1]]
    weights = np.exp(x - x[0])
    of_top_p, of_min_p = np.abs(np.cumsum(weights) / weights.sum() - top_p), np.abs(weights - min_p)
    return bool(of_top_p.min() < 1e-5 or (min_p > 0 and of_min_p.min() < 1e-5))


def run(
    shards: int, logits: np.ndarray, packed: np.ndarray, rules: Rules, allowed: np.ndarray
) -> tuple[SampledRows, jax.Array]:
    """The tokens of each row, and the counts with them."""
    mesh, vocabulary = make_mesh({"tensor": shards}, jax.devices()[:shards]), Vocabulary(shards)
    choose = functools.partial(
        row_sampling.sample_rows, variant="all", vocab_limit=LIMIT, top=20, vocabulary=vocabulary
    )

    def local(logits: jax.Array, rules: Rules, packed: jax.Array, allowed: jax.Array) -> Any:
        found = choose(logits, row_sampling.unpack(packed), rules, allowed)
        rows = jnp.arange(len(logits))
        return found, row_sampling.count_tokens(rules.counts_BV, rows, found.next_B, vocabulary=vocabulary)

    sharded = (logits, rules), P(None, "tensor")
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda _: sharded[1], sharded[0])
        arrays = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, sharded[1])), sharded[0])
        sample = jax.shard_map(local, in_specs=(*places, P(), P()), out_specs=(P(), sharded[1]), check_vma=False)
        found, counts = jax.jit(sample)(*arrays, packed, allowed)
        return jax.tree.map(np.asarray, (found, counts))


def test_tokens_and_log_probabilities_do_not_depend_on_the_shards(rng: np.random.Generator) -> None:
    """All methods, penalties, biases and masks in one batch; equal logits abound, and a row is not finite.

    Ids are equal. Log-probabilities are sums in another order, so they differ by float32 rounding.
    """
    samplings = [*SAMPLINGS, SamplingParams(), SamplingParams(temperature=1.0, seed=5)]
    B = len(samplings)
    rows = [
        SampleRow(i, s, int(rng.integers(1000)), float(rng.uniform(0.5, 2)), 0.5, -0.25, rules=True)
        for i, s in enumerate(samplings)
    ]
    packed = row_sampling.pack(rows, B, B)
    packed[::3, row_sampling.MASKED] = 1
    allowed = np.where(packed[:, row_sampling.MASKED, None] > 0, rng.integers(-(2**31), 2**31, (B, V // 32)), -1)
    counts, prompt = rng.poisson(0.5, (B, V)).astype(np.uint16), rng.random((B, V)) < 0.2
    # Multiples of 1/8, so that many are equal.
    bias = (rng.integers(-8, 8, (B, V)) / 8).astype(np.float32)
    rules = Rules(counts, prompt, bias)  # type: ignore[arg-type]
    values = row_sampling.unpack(jnp.asarray(packed))
    while True:
        logits = (np.round(8 * rng.normal(0, 3, (B, V))) / 8).astype(np.float32)
        ruled = row_sampling.apply_rules(jnp.asarray(logits), values, rules, jnp.asarray(allowed, jnp.int32))
        ruled = np.where(np.arange(V) < LIMIT, np.asarray(ruled), -np.inf)
        if not any(near_a_threshold(x, s) for x, s in zip(ruled, samplings, strict=True) if s.mode.method != "greedy"):
            break
    logits[-2, rng.integers(V)] = np.nan
    (want, want_counts), (got, got_counts) = (
        run(shards, logits, packed, rules, allowed.astype(np.int32)) for shards in (1, SHARDS)
    )
    assert want.token_B[-2] < 0 <= min(want.token_B[:-2])
    np.testing.assert_array_equal(got.token_B, want.token_B)
    np.testing.assert_array_equal(got_counts[:-2], want_counts[:-2])
    clean = np.arange(B) != B - 2
    np.testing.assert_array_equal(got.top_ids_BN, want.top_ids_BN)
    np.testing.assert_allclose(got.logprob_B[clean], want.logprob_B[clean], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.top_logprobs_BN[clean], want.top_logprobs_BN[clean], rtol=1e-5, atol=1e-5)


def test_accepted_proposals_do_not_depend_on_the_shards(rng: np.random.Generator) -> None:
    """A token that is sampled at one position is penalised at the next, on the device that has it."""
    B, T = 4, 3
    params = [SAMPLINGS[2], SamplingParams(repetition_penalty=1.3), SAMPLINGS[2], SamplingParams()]
    rows = [SampleRow(i, s, 7, presence=30.0, rules=True) for i, s in enumerate(params)]
    packed = row_sampling.pack(rows, B, B)
    # Peaks, at the same tokens everywhere, so that a presence penalty of 30 decides.
    logits = np.broadcast_to(rng.normal(0, 3, (B, 1, V)), (B, T, V)).astype(np.float32)
    empty = Rules(np.zeros((B, V), np.uint16), np.zeros((B, V), bool), np.zeros((B, V), np.float32))  # type: ignore[arg-type]
    best = np.argsort(-logits[:, 0, :LIMIT], axis=1)[:, : T - 1].astype(np.int32)
    found = []
    for shards in (1, SHARDS):
        mesh = make_mesh({"tensor": shards}, jax.devices()[:shards])

        def local(logits: jax.Array, rules: Rules, shards: int = shards) -> row_sampling.SampledPositions:
            return row_sampling.sample_positions(
                *(logits, jnp.asarray(best), row_sampling.unpack(jnp.asarray(packed)), rules, None),
                **{"variant": "ruled", "vocab_limit": LIMIT, "top": 1, "vocabulary": Vocabulary(shards)},
            )

        with jax.set_mesh(mesh):
            places = P(None, None, "tensor"), P(None, "tensor")
            put = [jax.device_put(x, jax.NamedSharding(mesh, p)) for x, p in zip((logits, empty), places, strict=True)]
            sample = jax.shard_map(local, in_specs=places, out_specs=P(), check_vma=False)
            found.append(jax.tree.map(np.asarray, jax.jit(sample)(*put)))
    one, many = found
    np.testing.assert_array_equal(one.sampled.token_B, many.sampled.token_B)
    np.testing.assert_array_equal(one.count_B, many.count_B)
    # Greedy rows take the likeliest tokens one after the other, so that all proposals are accepted.
    assert many.count_B[3] == T
