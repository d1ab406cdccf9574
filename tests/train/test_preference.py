"""Preference losses against numbers of another implementation, and against their formulas in float64."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.preference import bradley_terry, dpo_loss

GOLDENS = json.loads((Path(__file__).parent / "preference_goldens.json").read_text())


@pytest.mark.parametrize("golden", GOLDENS["dpo"], ids=lambda golden: f"{golden['kind']} {golden['label_smoothing']}")
def test_dpo_equals_the_goldens(golden: dict[str, Any]) -> None:
    inputs = {name: jnp.array(x, jnp.float32) for name, x in GOLDENS["dpo_inputs"].items() if name != "beta"}
    beta = GOLDENS["dpo_inputs"]["beta"]
    losses = dpo_loss(**inputs, beta=beta, kind=golden["kind"], label_smoothing=golden["label_smoothing"])
    np.testing.assert_allclose(losses.mean(), golden["loss"], rtol=1e-6)
    for answer in ("chosen", "rejected"):
        rewards = beta * (inputs[answer] - inputs[f"reference_{answer}"])
        np.testing.assert_allclose(rewards, golden[f"{answer}_rewards"], atol=1e-6)


def test_bradley_terry_equals_the_golden() -> None:
    golden = GOLDENS["bradley_terry"]
    losses = bradley_terry(*(jnp.array(golden[name], jnp.float32) for name in ("chosen", "rejected")))
    np.testing.assert_allclose(losses.mean(), golden["loss"], atol=1e-6)


def test_margin_and_centering_are_the_formula() -> None:
    seed = int(np.random.SeedSequence().entropy) % 2**32  # type: ignore[arg-type]
    print(f"seed {seed}")
    chosen, rejected, margin = np.random.default_rng(seed).normal(size=(3, 50))
    expected = np.logaddexp(0, -(chosen - rejected - margin)) + 0.01 * (chosen + rejected) ** 2
    got = bradley_terry(*(jnp.array(x, jnp.float32) for x in (chosen, rejected, margin)), centering=0.01)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # float32.


@pytest.mark.parametrize("distance", [-1e4, -100.0, 100.0, 1e4])
def test_losses_and_gradients_are_finite_far_from_the_reference(distance: float) -> None:
    def loss(chosen: jax.Array) -> jax.Array:
        return dpo_loss(chosen, jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), 0.1, label_smoothing=0.1)

    value, gradient = jax.value_and_grad(loss)(jnp.float32(distance))
    z = 0.1 * distance
    np.testing.assert_allclose(value, 0.9 * np.logaddexp(0, -z) + 0.1 * np.logaddexp(0, z), rtol=1e-5)
    # -0.1 (0.9 sigmoid(-z) - 0.1 sigmoid(z)), at one of its limits.
    np.testing.assert_allclose(gradient, 0.01 if distance > 0 else -0.09, rtol=2e-3)
