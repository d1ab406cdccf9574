"""Formulas of policy optimisation: published numbers, exact enumeration of KL gradients, settings that are refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.policy import (
    GrpoConfig,
    clipped_policy_loss,
    group_advantages,
    kl_estimates,
    kl_loss,
    overlong_penalty,
    varied_groups,
)

GOLDENS = json.loads((Path(__file__).parent / "policy_goldens.json").read_text())


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_equal_the_goldens(scale: Any) -> None:
    got = group_advantages(np.array(GOLDENS["rewards"]), scale)
    np.testing.assert_allclose(got, GOLDENS["advantages"][scale], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(varied_groups(np.array(GOLDENS["rewards"])), [True, False, True])


def test_advantages_are_the_formulas_and_know_nothing_of_missing_rewards() -> None:
    rng = print_seed()
    rewards = rng.normal(size=(3, 6))
    rewards[0, 2] = rewards[1, 0] = rewards[1, 5] = np.nan
    everything = rewards[~np.isnan(rewards)]
    for scale in ("group", "none", "batch"):
        got = group_advantages(rewards, scale, epsilon=0.3)  # type: ignore[arg-type]
        assert not got[np.isnan(rewards)].any()
        for group, found in zip(rewards, got, strict=True):
            known = group[~np.isnan(group)]
            deviation = {"group": known.std(ddof=1) + 0.3, "none": 1.0, "batch": everything.std(ddof=1) + 0.3}[scale]
            np.testing.assert_allclose(found[~np.isnan(group)], (known - known.mean()) / deviation, rtol=1e-5)
        # Nothing of the order of the responses or of the queries.
        order, members = rng.permutation(3), rng.permutation(6)
        again = group_advantages(rewards[order][:, members], scale, epsilon=0.3)  # type: ignore[arg-type]
        np.testing.assert_allclose(again, got[order][:, members], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_groups_without_variance_have_no_advantage(scale: Any, epsilon: float) -> None:
    """Exactly 0, also where a mean of equal numbers is rounded, where one reward is known, and where none is."""
    equal = np.full(7, 0.1, np.float32)
    one, none = (np.where(np.arange(7) < count, 3.0, np.nan) for count in (1, 0))
    rewards = np.stack([equal, one, none, 1e3 * equal, -equal, 0 * equal])
    assert not group_advantages(rewards, scale, epsilon).any()
    assert not varied_groups(rewards).any()


def test_rewards_that_are_no_groups_are_refused() -> None:
    with pytest.raises(InputError, match=r"group size of at least 2, got shape \(3, 1\)"):
        group_advantages(np.ones((3, 1)))
    with pytest.raises(InputError, match=r"reward of response 1 of query 0 is inf"):
        group_advantages(np.array([[0.0, np.inf]]))


def vectors() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of a policy, and log-probabilities of a reference, over a small vocabulary; and a far policy's."""
    rng = print_seed()
    logits, reference, older = rng.normal(size=(3, 20)).astype(np.float32)
    return jnp.array(logits), jax.nn.log_softmax(reference), jax.nn.log_softmax(logits + 0.5 * older)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k3-weighted"])
def test_gradients_of_kl_losses_by_enumeration(kind: Any) -> None:
    """Over all tokens of a vocabulary, each sampled with its probability: 0 for k1, the gradient of KL(policy |
    reference) for k2 and weighted k3, that of KL(reference | policy) for k3."""
    logits, reference, _ = vectors()
    sampled = jax.nn.softmax(logits)

    def expected_loss(logits: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits)
        kl = kl_estimates(log_probs, reference)
        log_ratio = log_probs - jax.lax.stop_gradient(log_probs)
        return (sampled * (kl.k1 if kind == "k1" else kl_loss(kl, log_ratio, kind))).sum()

    def reverse(logits: jax.Array) -> jax.Array:
        return (jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - reference)).sum()

    def forward(logits: jax.Array) -> jax.Array:
        return (jnp.exp(reference) * (reference - jax.nn.log_softmax(logits))).sum()

    gradient = jax.grad(expected_loss)(logits)
    divergence = {"k1": lambda x: 0.0 * x.sum(), "k3": forward}.get(kind, reverse)
    # float32; entries are of about 0.1.
    np.testing.assert_allclose(gradient, jax.grad(divergence)(logits), atol=1e-6)
    if kind in ("k1", "k3"):
        np.testing.assert_allclose((sampled * getattr(kl_estimates(jnp.log(sampled), reference), kind)).sum(),
                                   reverse(logits), rtol=1e-5)  # fmt: skip
        assert np.abs(jax.grad(reverse)(logits)).max() > 1e-2


def test_weighted_kl_of_an_older_sampler_by_enumeration() -> None:
    """Tokens of another policy: with the ratio to it, k3 still has the gradient of KL(policy | reference)."""
    logits, reference, older = vectors()

    def expected_loss(logits: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits)
        return (jnp.exp(older) * kl_loss(kl_estimates(log_probs, reference), log_probs - older, "k3-weighted")).sum()

    def reverse(logits: jax.Array) -> jax.Array:
        return (jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - reference)).sum()

    np.testing.assert_allclose(jax.grad(expected_loss)(logits), jax.grad(reverse)(logits), atol=2e-6)


def test_clipped_loss_and_its_gradient_are_the_formula() -> None:
    rng = print_seed()
    log_ratio, advantages = (rng.normal(size=500).astype(np.float32) for _ in range(2))
    ratio = np.exp(log_ratio.astype(np.float64))
    for dual in (None, 1.5):
        loss, clipped = clipped_policy_loss(jnp.array(log_ratio), jnp.array(advantages), 0.3, 0.6, dual)
        want = -np.minimum(ratio * advantages, np.clip(ratio, 0.7, 1.6) * advantages)
        held = np.zeros(500, bool)
        if dual is not None:
            held = (advantages < 0) & (want > -dual * advantages)
            want = np.where(held, -dual * advantages, want)
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
        # A gradient is cut exactly where the metrics say so.
        slope = jax.grad(lambda x: clipped_policy_loss(x, jnp.array(advantages), 0.3, 0.6, dual)[0].sum())(log_ratio)  # noqa: B023
        stopped = np.asarray(clipped.low | clipped.high | clipped.dual)
        np.testing.assert_array_equal(clipped.dual, held)
        assert all(np.asarray(part).any() for part in (clipped.low, clipped.high, clipped.dual if dual else True))
        np.testing.assert_allclose(slope, np.where(stopped, 0.0, -ratio * advantages), rtol=1e-5, atol=1e-6)


def test_overlong_penalty_falls_over_the_last_tokens() -> None:
    config = GrpoConfig(overlong_tokens=20, overlong_weight=3.0)
    got = overlong_penalty(np.array([0, 80, 90, 100, 101]), 100, config)
    np.testing.assert_allclose(got, [0, 0, -1.5, -3, -3], rtol=1e-6)
    assert not overlong_penalty(np.array([0, 100, 200]), 100, GrpoConfig()).any()
    with pytest.raises(InputError, match="overlong_tokens must be at most the 10 tokens"):
        overlong_penalty(5, 10, config)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"kl='k1' is no loss: its gradient is 0"):
        GrpoConfig(kl="k1")  # type: ignore[arg-type]
    for name, value in {
        "scale": "std", "aggregation": "mean", "ratio": "text", "old": "new", "kl": "k4", "epsilon": -1.0,
        "clip_low": 0.0, "clip_high": float("nan"), "dual_clip": 1.0, "kl_weight": -0.1, "importance_cap": 0.0,
        "importance_mask": float("inf"), "overlong_tokens": -1, "overlong_weight": 0.0, "temperature": 0.0,
        "max_segments": 0, "loss_chunk": 0,
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=name):
            GrpoConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="clip_low must be at most 1"):
        GrpoConfig(clip_low=1.5)
    for changes in ({"aggregation": "constant"}, {"constant": 5.0}):
        with pytest.raises(InputError, match="constant is the divisor of aggregation='constant'"):
            GrpoConfig(**changes)  # type: ignore[arg-type]
    for changes in ({"importance_cap": 2.0}, {"importance_mask": 2.0}):
        with pytest.raises(InputError, match="there is no importance weight"):
            GrpoConfig(old="sampler", **changes)  # type: ignore[arg-type]
