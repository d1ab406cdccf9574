"""GRPO through the model: REINFORCE on policy, the same whatever the layout and the mesh, experts and LoRA."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import MoE
from qwen_jax.kernels import packed_mask
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import bind, without
from qwen_jax.published import published
from tests.helpers.objectives import QUICK, STEP, Found, agree, assert_experts_are_balanced, gradient, on_mesh
from tests.helpers.random_rollouts import random_rollouts
from tests.train.test_lora import WIDE, base_of, draw, merged
from train.data.batch import place
from train.data.rollouts import Rollout, RolloutBatch, pack_rollouts
from train.grpo import Grpo, make_log_prob_pass
from train.losses import next_token_targets
from train.moe import MoETraining
from train.policy import GrpoConfig
from train.step import batch_gradient

MODEL = dataclasses.replace(
    published("tiny"), vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8, num_layers=1
)
MOE = dataclasses.replace(MODEL, moe=MoE(4, 2, 16, 32))
# Everything that sums over sequences, and a temperature.
CONFIG = GrpoConfig(
    aggregation="token-mean", ratio="sequence", old="trainer", clip_low=0.05, clip_high=0.1, dual_clip=1.2,
    kl_weight=0.3, kl="k3-weighted", importance_cap=1.1, importance_mask=1.5, temperature=0.7, max_segments=4,
    loss_chunk=16,
)  # fmt: skip
SEED = int(np.random.SeedSequence().entropy) % 2**32  # type: ignore[arg-type]
# Compiling takes most of the time: all layouts but one have the same shape.
ROWS, LENGTH, COUNT = 8, 48, 8
GRPO = Grpo(MODEL, CONFIG, rollouts=COUNT)


@dataclasses.dataclass(frozen=True)
class Case:
    """Rollouts; their advantages; log-probabilities of the old policy and of the reference, each of all tokens."""

    rollouts: list[Rollout]
    advantages: np.ndarray
    old: list[np.ndarray]
    reference: list[np.ndarray]


@functools.cache
def case() -> Case:
    """Rollouts whose sampler, old policy and reference are near the policy of the weights."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    rollouts = random_rollouts(rng, COUNT, MODEL.vocab_size)
    plain_BT, _ = plain(laid_out(rollouts, np.zeros(COUNT)).batch)
    policy = []
    for i in range(COUNT):
        marked = laid_out(rollouts, np.arange(COUNT) == i).advantages_BT != 0
        log_probs = np.zeros(len(rollouts[i].ids))
        log_probs[rollouts[i].trained] = plain_BT[marked]
        policy.append(log_probs)

    def near(scale: float) -> list[np.ndarray]:
        noise = [rng.normal(size=len(r.ids)) * r.trained for r in rollouts]
        return [np.minimum(x + scale * e, 0).astype(np.float32) for x, e in zip(policy, noise, strict=True)]

    sampled = [dataclasses.replace(r, log_probs=x) for r, x in zip(rollouts, near(0.2), strict=True)]
    return Case(sampled, rng.normal(size=COUNT), near(0.2), near(0.5))


def laid_out(rollouts: list[Rollout], advantages: np.ndarray, config: GrpoConfig = CONFIG, **size: int) -> RolloutBatch:
    return pack_rollouts(
        rollouts, advantages, np.ones(len(rollouts), bool), config, size.get("rows", ROWS), size.get("length", LENGTH)
    )


def batch_of(order: Any = range(COUNT), config: GrpoConfig = CONFIG, **size: int) -> RolloutBatch:
    """The rollouts of the case in some order, with all their numbers."""
    it, order = case(), list(order)
    rollouts, advantages = [it.rollouts[i] for i in order], it.advantages[order]

    def at_places(numbers: list[np.ndarray]) -> np.ndarray:
        replaced = [dataclasses.replace(r, log_probs=numbers[i]) for r, i in zip(rollouts, order, strict=True)]
        found: np.ndarray = laid_out(replaced, advantages, config, **size).sampler_BT
        return found

    batch = laid_out(rollouts, advantages, config, **size)
    return dataclasses.replace(batch, old_BT=at_places(it.old), reference_BT=at_places(it.reference))


@functools.cache
def _plain() -> Any:
    sharding = Sharding.for_training(MODEL, make_mesh({}))

    def log_probs(params: Any, rows: Any) -> Any:
        module = bind(MODEL, params, sharding)
        hidden = module(rows.tokens, rows.positions, packed_mask(rows.segment_ids)).hidden
        targets, counted = next_token_targets(rows)
        logits = module.logits(hidden) / CONFIG.temperature
        every = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, MODEL.vocab_size), -1)
        return jnp.pad((every * (counted != 0))[:, :-1], ((0, 0), (1, 0)))

    def compute(params: Any, rows: Any, cotangent: Any) -> Any:
        found, pull_back = jax.vjp(lambda x: log_probs(x, rows), params)
        return found, pull_back(cotangent)[0]

    return jax.jit(compute, compiler_options=QUICK)


def plain(rows: Any, cotangent_BT: Any = None) -> tuple[np.ndarray, Any]:
    """Log-probabilities of trained tokens [B, T] from all logits, and their gradient times a cotangent."""
    mesh = make_mesh({})
    with jax.set_mesh(mesh):
        cotangent = np.zeros(rows.shape, np.float32) if cotangent_BT is None else cotangent_BT.astype(np.float32)
        placed = place((rows, cotangent), mesh)
        found, slope = jax.device_get(_plain()(on_mesh(MODEL, mesh), *placed))
    return found.astype(np.float64), slope


@functools.cache
def expected() -> Found:
    return gradient(GRPO, batch_of())


def assert_same(found: Found, order: Any = range(COUNT)) -> None:
    """Advantages have both signs, so that the loss is a small difference."""
    loss, slope, metrics = expected()
    metrics = {**metrics, "rollout_gaps": metrics["rollout_gaps"][list(order)]}
    agree(found, (loss, slope, metrics), loss_rtol=1e-4, loss_atol=1e-5)


def test_on_policy_the_gradient_is_that_of_reinforce_and_the_clip_does_nothing() -> None:
    """-A grad log p, in the mean over a sequence's tokens and over sequences; bit for bit the same under any clip."""
    settings = GrpoConfig(kl_weight=0.0, temperature=0.7, loss_chunk=16)
    batch = batch_of(config=settings)
    cotangent = -batch.advantages_BT * batch.batch.loss_weights / COUNT
    loss, found, metrics = gradient(Grpo(MODEL, settings), batch)
    _, slope = plain(batch.batch, cotangent)
    np.testing.assert_allclose(loss, cotangent.sum(), rtol=1e-4, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, slope)
    clipped = dataclasses.replace(settings, clip_low=0.01, clip_high=0.02, dual_clip=1.5)
    again = gradient(Grpo(MODEL, clipped), batch)
    jax.tree.map(np.testing.assert_array_equal, again, (loss, found, metrics))


def test_metrics_of_a_pass_are_those_of_the_logits() -> None:
    """At the sampling temperature."""
    batch, (_, _, metrics) = batch_of(), expected()
    here = batch.ends_BT + batch.batch.loss_weights > 0
    policy = plain(batch.batch)[0][here]
    d = batch.reference_BT[here] - policy
    np.testing.assert_allclose(metrics["kl/k1"], -d.mean(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["kl/k3"], (np.exp(d) - d - 1).mean(), rtol=1e-3)
    gap = np.abs(batch.old_BT - batch.sampler_BT)[here]
    np.testing.assert_allclose(metrics["sampler_gap/mean"], gap.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["sampler_gap/max"], gap.max(), rtol=1e-4)
    gaps = [np.abs(old - rollout.log_probs).sum() for old, rollout in zip(case().old, case().rollouts, strict=True)]
    np.testing.assert_allclose(metrics["rollout_gaps"], gaps, rtol=1e-4)
    assert 0 < metrics["entropy"] < np.log(MODEL.vocab_size)
    assert metrics["trained_tokens"] == here.sum()
    assert metrics["ratio/min"] < metrics["ratio/mean"] < metrics["ratio/max"]


@pytest.mark.parametrize("layout", ["one per row", "longer rows", "another order", "2 micro-batches"])
def test_loss_and_gradient_do_not_depend_on_the_layout(layout: str) -> None:
    order = np.random.default_rng(SEED).permutation(COUNT)
    batch = {
        "one per row": lambda: batch_of(config=dataclasses.replace(CONFIG, max_segments=1)),
        "longer rows": lambda: batch_of(rows=4, length=96),
        "another order": lambda: batch_of(order),
        # Of unequal numbers of sequences: the last rows are padding.
        "2 micro-batches": lambda: batch_of(),
    }[layout]()
    ordered = order if layout == "another order" else range(COUNT)
    assert_same(gradient(GRPO, batch, accumulation=2 if "micro" in layout else 1), ordered)


@pytest.mark.draw(1)
@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 2, "context": 2}], ids=str)
def test_loss_and_gradient_do_not_depend_on_the_mesh(axes: dict[str, int]) -> None:
    assert_same(gradient(GRPO, batch_of(), axes, accumulation=2))


def test_experts_are_balanced_as_in_pre_training() -> None:
    """Here the loss takes each token alone."""
    moe = MoETraining(balance_loss=0.05, router_z_loss=1e-3)
    tokens = dataclasses.replace(CONFIG, ratio="token", importance_mask=None, moe=moe)
    assert_experts_are_balanced(Grpo(MOE, tokens), batch_of(), loss_atol=1e-5)


@pytest.mark.parametrize(("axes", "accumulation"), [({}, 2), ({"context": 2, "fsdp": 2}, 1)], ids=str)
def test_log_probs_of_a_pass_are_those_of_all_logits(axes: dict[str, int], accumulation: int) -> None:
    """Each at its own token; and taken as the old ones, they are those of the step: its ratio is 1."""
    mesh, batch = make_mesh(axes), batch_of()
    with jax.set_mesh(mesh):
        run = make_log_prob_pass(GRPO, dataclasses.replace(STEP, accumulation=accumulation), mesh)
        found = np.asarray(jax.device_get(run(on_mesh(MODEL, mesh), place(batch, mesh))))
    want, _ = plain(batch.batch)
    np.testing.assert_array_equal(found != 0, batch.batch.loss_weights != 0)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)
    _, _, metrics = gradient(GRPO, dataclasses.replace(batch, old_BT=found))
    np.testing.assert_allclose([metrics[f"ratio/{kind}"] for kind in ("mean", "min", "max")], 1.0, atol=2e-5)


def test_adapters_are_trained_beside_frozen_weights() -> None:
    """The gradient of LoRA is that where everything is trained, and the pass has the adapters that it is given."""
    mesh, batch = make_mesh({"fsdp": 2, "tensor": 2}), batch_of()
    sharding, step = Sharding.for_training(MODEL, mesh), dataclasses.replace(STEP, lora=WIDE)
    with jax.set_mesh(mesh):
        everything, placed = draw(MODEL, mesh, WIDE), place(batch, mesh)
        frozen = base_of(everything)
        adapters = without(everything, frozen)
        compute = jax.jit(functools.partial(batch_gradient, GRPO, step, sharding), compiler_options=QUICK)
        whole = dict(jax.tree.leaves_with_path(compute(everything, placed).gradient))
        some = compute(adapters, placed, frozen=frozen).gradient
        assert jax.tree.structure(some) == jax.tree.structure(adapters)
        for path, got in jax.tree.leaves_with_path(some):
            np.testing.assert_allclose(got, whole[path], rtol=1e-3, atol=1e-6, err_msg=str(path))
        # The pass with adapters, and without them as for a reference.
        with_adapters = make_log_prob_pass(GRPO, step, mesh)(adapters, placed, frozen)
        base = make_log_prob_pass(GRPO, STEP, mesh)
        plain_model = on_mesh(MODEL, mesh, merged(everything, WIDE))
        np.testing.assert_allclose(with_adapters, base(plain_model, placed), rtol=1e-4, atol=1e-4)
        assert np.abs(np.asarray(with_adapters - base(frozen, placed))).max() > 1e-2
