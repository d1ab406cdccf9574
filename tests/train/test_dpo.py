"""DPO: its value and gradient at the reference, invariance to how pairs are laid out, parity with a PyTorch loop."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import MoE
from qwen_jax.errors import InputError
from qwen_jax.kernels import packed_mask
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import bind
from qwen_jax.published import published
from tests.helpers.objectives import QUICK, STEP, Found, agree, assert_experts_are_balanced, gradient, on_mesh
from tests.helpers.pairs import TokenPair, pack_pairs, random_pairs
from train.data.batch import place
from train.data.pairs import PairBatch
from train.dpo import Dpo, DpoConfig, check_pairs, make_reference_pass
from train.losses import next_token_targets
from train.moe import MoETraining

MODEL = dataclasses.replace(
    published("tiny"), vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8, num_layers=2
)
MOE = dataclasses.replace(MODEL, num_layers=1, moe=MoE(4, 2, 16, 32))
CONFIG = DpoConfig(beta=0.3, label_smoothing=0.1, nll_weight=0.2, max_segments=8, loss_chunk=16)
DPO = Dpo(MODEL, CONFIG)
SEED = int(np.random.SeedSequence().entropy) % 2**32  # type: ignore[arg-type]
# Compiling takes most of the time: all layouts but one have the same shape.
ROWS, LENGTH = 4, 128


@functools.cache
def pairs() -> list[TokenPair]:
    print(f"seed {SEED}")
    return random_pairs(np.random.default_rng(SEED), 4, MODEL.vocab_size)


def one_per_row(length: int = LENGTH, padding: str = "right") -> PairBatch:
    return pack_pairs([[pair] for pair in pairs()], length, padding)


@functools.cache
def expected() -> Found:
    return gradient(DPO, one_per_row())


@functools.cache
def _plain() -> Any:
    mesh, batch = make_mesh({}), one_per_row()
    rows, sharding = batch.batch, Sharding.for_training(MODEL, mesh)

    def log_probs(params: Any) -> Any:
        module = bind(MODEL, params, sharding)
        hidden = module(rows.tokens, rows.positions, packed_mask(jnp.asarray(rows.segment_ids))).hidden
        targets, counted = next_token_targets(jax.tree.map(jnp.asarray, rows))
        every = jnp.sum(jax.nn.log_softmax(module.logits(hidden)) * jax.nn.one_hot(targets, MODEL.vocab_size), -1)
        return jnp.stack([(every * counted * (rows.segment_ids == s)).sum(1) for s in (1, 2)], 1)

    def compute(params: Any, cotangent: Any) -> Any:
        found, pull_back = jax.vjp(log_probs, params)
        return found, pull_back(cotangent)[0]

    return jax.jit(compute, compiler_options=QUICK)


def plain(cotangent: Any = None) -> tuple[np.ndarray, Any]:
    """Log-probabilities [pairs, 2] of chosen and rejected answers from all logits, and their gradient times a cotangent
    of that shape."""
    mesh = make_mesh({})
    with jax.set_mesh(mesh):
        cotangent = np.zeros((ROWS, 2)) if cotangent is None else cotangent
        found, slope = jax.device_get(_plain()(on_mesh(MODEL, mesh), cotangent.astype(np.float32)))
    return found.astype(np.float64), slope


def reference() -> np.ndarray:
    return np.array([pair.reference for pair in pairs()])


def test_loss_gradient_and_metrics_are_the_formulas() -> None:
    """All terms, in float64 from the log-probabilities that all logits give."""
    found, _ = plain()
    lengths = np.array([len(pair.chosen) for pair in pairs()])
    rewards = CONFIG.beta * (found - reference())
    z = rewards[:, 0] - rewards[:, 1]
    nll = -found[:, 0] / lengths
    loss = (0.9 * np.logaddexp(0, -z) + 0.1 * np.logaddexp(0, z) + 0.2 * nll).mean()
    # The derivative with respect to z, and with it those with respect to both log-probabilities.
    slope = -0.9 / (1 + np.exp(z)) + 0.1 / (1 + np.exp(-z))
    cotangent = np.stack([CONFIG.beta * slope - 0.2 / lengths, -CONFIG.beta * slope], 1) / len(lengths)
    metrics = {
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).mean(),
        "rewards/margins": z.mean(),
        "logps/chosen": found[:, 0].mean(),
        "logps/rejected": found[:, 1].mean(),
        "nll_loss": nll.mean(),
        "reported": loss,
    }
    agree(expected(), (loss, plain(cotangent)[1], metrics))


def test_at_the_reference_the_loss_is_ln_2_and_the_gradient_raises_chosen_over_rejected() -> None:
    """The gradient is -beta/2 (grad log p(chosen) - grad log p(rejected)), in the mean over pairs."""
    objective, mesh = Dpo(MODEL, DpoConfig(beta=0.3, max_segments=8, loss_chunk=16)), make_mesh({})
    with jax.set_mesh(mesh):
        run = make_reference_pass(objective, STEP, mesh)
        filled = jax.device_get(run(on_mesh(MODEL, mesh), place(one_per_row(), mesh)))
    log_probs, slope = plain(-0.15 * np.array([[1.0, -1.0]] * ROWS) / ROWS)
    # The reference is at the last token of each segment, and nowhere else.
    given = one_per_row().reference_BT
    np.testing.assert_array_equal(filled.reference_BT != 0, given != 0)
    np.testing.assert_allclose(filled.reference_BT[given != 0].reshape(-1, 2), log_probs, rtol=1e-5, atol=1e-4)
    loss, found, metrics = gradient(objective, filled)
    # Log-probabilities of about 50 have an error of 4e-6 in float32.
    np.testing.assert_allclose(loss, math.log(2), atol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.0, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), found, slope)


@pytest.mark.parametrize(
    "layout", ["left padding", "less padding", "two in a row", "all in one row", "another order", "micro-batches"]
)
def test_loss_and_gradient_do_not_depend_on_the_layout(layout: str) -> None:
    a, b, c, d = pairs()
    batch = {
        "left padding": lambda: one_per_row(padding="left"),
        "less padding": lambda: one_per_row(32),
        "two in a row": lambda: pack_pairs([[a, b], [], [c], [d]], LENGTH, "left"),
        "all in one row": lambda: pack_pairs([[], [a, b, c, d], [], []], LENGTH),
        "another order": lambda: pack_pairs([[d], [b], [a], [c]], LENGTH),
        # Unequal micro-batches: rows 0 and 2, with three pairs, and rows 1 and 3, with one.
        "micro-batches": lambda: pack_pairs([[a, b], [], [c], [d]], LENGTH),
    }[layout]()
    check_pairs(batch, CONFIG.max_segments)
    agree(gradient(DPO, batch, accumulation=2 if layout == "micro-batches" else 1), expected())


MESHES = [{"data": 2}, {"fsdp": 2, "tensor": 2}, {"context": 2}, {"fsdp": 2, "context": 2}]


@pytest.mark.draw(1)
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_loss_and_gradient_do_not_depend_on_the_mesh(axes: dict[str, int]) -> None:
    a, b, c, d = pairs()
    agree(gradient(DPO, pack_pairs([[a, b], [], [c], [d]], LENGTH), axes), expected())


def test_the_reference_pass_does_not_depend_on_the_mesh() -> None:
    a, b, c, d = pairs()
    batch, found = pack_pairs([[a, b], [], [c], [d]], LENGTH, "left"), []
    for axes in ({}, {"context": 2, "tensor": 2}):
        mesh = make_mesh(axes)
        with jax.set_mesh(mesh):
            run = make_reference_pass(DPO, STEP, mesh)
            found.append(jax.device_get(run(on_mesh(MODEL, mesh), place(batch, mesh))).reference_BT)
    np.testing.assert_array_equal(found[0] != 0, batch.reference_BT != 0)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_experts_are_balanced_as_in_pre_training() -> None:
    moe = MoETraining(balance_loss=0.05, router_z_loss=1e-3)
    a, b, c, d = pairs()
    batch = pack_pairs([[a, b], [], [c], [d]], LENGTH)
    assert_experts_are_balanced(Dpo(MOE, dataclasses.replace(CONFIG, moe=moe)), batch)


@pytest.mark.parametrize("changes", [{"loss": "ipo", "length_normalised": True}, {"length_normalised": True}], ids=str)
def test_length_normalised_losses_are_the_formulas(changes: dict[str, Any]) -> None:
    config = DpoConfig(beta=0.3, max_segments=8, loss_chunk=16, **changes)
    loss, _, metrics = gradient(Dpo(MODEL, config), one_per_row())
    found, _ = plain()
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs()])
    ratios = (found - reference()) / lengths
    h = ratios[:, 0] - ratios[:, 1]
    each = (h - 1 / 0.6) ** 2 if "loss" in changes else np.logaddexp(0, -0.3 * h)
    np.testing.assert_allclose(loss, each.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.3 * h.mean(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["logps/chosen"], found[:, 0].mean(), rtol=1e-4)


def test_rows_that_are_not_pairs_are_refused() -> None:
    a, b, c, d = pairs()
    batch = pack_pairs([[a, b, c, d], [a]], LENGTH)
    check_pairs(batch, 8)
    with pytest.raises(InputError, match=r"Row 0 has 8 segments; max_segments is 6"):
        check_pairs(batch, 6)
    ids = batch.batch.segment_ids.copy()
    ids[1][ids[1] == 2] = 0
    with pytest.raises(InputError, match=r"Row 1 has 1 segments; expected two"):
        check_pairs(dataclasses.replace(batch, batch=dataclasses.replace(batch.batch, segment_ids=ids)), 8)
    trained = batch.batch.loss_weights * (batch.batch.segment_ids != 4)
    with pytest.raises(InputError, match=r"Segment 4 of row 0 has no trained token"):
        check_pairs(dataclasses.replace(batch, batch=dataclasses.replace(batch.batch, loss_weights=trained)), 8)
    # And in a step the loss is NaN, which skips it: nothing is left out in silence.
    short = TokenPair(*(np.array([1]),) * 3)
    loss, _, _ = gradient(DPO, pack_pairs([[short] * 5, [], [], []], LENGTH))
    assert math.isnan(loss)
    assert "max_segments" in DPO.explain({"loss": loss})
    assert not DPO.explain({"loss": 1.0})


def test_bad_settings_are_refused() -> None:
    for name, value in {
        "beta": 0.0, "loss": "hinge", "label_smoothing": 0.5, "nll_weight": -1.0, "max_segments": 3, "loss_chunk": 0,
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=name):
            DpoConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="label_smoothing belongs to loss 'sigmoid'"):
        DpoConfig(loss="ipo", label_smoothing=0.1)
