"""The loss of GRPO given log-probabilities, without a model: published numbers, formulas, and every setting matters."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.grpo
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from tests.helpers.random_rollouts import random_rollouts
from tests.helpers.runs import print_seed
from train.data.batch import place
from train.data.rollouts import Rollout, RolloutBatch, pack_rollouts
from train.grpo import Grpo
from train.losses import following
from train.policy import GrpoConfig, group_advantages, overlong_penalty

MODEL = published("tiny")
GOLDENS = json.loads((Path(__file__).parent / "policy_goldens.json").read_text())
ROWS, LENGTH = 4, 48


def packed(
    rollouts: list[Rollout], advantages: Any, config: GrpoConfig, counted: Any = None, **others: list[np.ndarray]
) -> tuple[RolloutBatch, dict[str, np.ndarray]]:
    """A batch, and further numbers of each rollout's tokens at their places [B, T], by name."""
    counted = np.ones(len(rollouts), bool) if counted is None else counted

    def pack(log_probs: list[np.ndarray]) -> RolloutBatch:
        replaced = [
            dataclasses.replace(r, log_probs=np.asarray(x, np.float32))
            for r, x in zip(rollouts, log_probs, strict=True)
        ]
        return pack_rollouts(replaced, np.asarray(advantages), counted, config, ROWS, LENGTH)

    # A batch is laid out by lengths, so every batch has the same places.
    return pack([r.log_probs for r in rollouts]), {name: pack(x).sampler_BT for name, x in others.items()}


def evaluated(
    monkeypatch: pytest.MonkeyPatch, config: GrpoConfig, batch: RolloutBatch, log_probs_BT: np.ndarray
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Mean loss, its gradient with respect to the log-probabilities at their tokens [B, T], and metrics."""
    mesh = make_mesh({}, jax.devices()[:1])
    objective = Grpo(MODEL, config)
    model: Any = SimpleNamespace(
        in_model_order=lambda x: x,
        hidden=lambda rows, count_routing: (None, None),
        module=SimpleNamespace(sharding=Sharding.for_training(MODEL, mesh)),
    )

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(log_probs_BT: jax.Array, batch: RolloutBatch) -> Any:
        def log_probs(*args: Any) -> Any:
            found = jnp.where(args[3] != 0, following(log_probs_BT), 0.0)
            return found, jnp.zeros_like(found)

        def token_loss(*args: Any) -> Any:
            found, entropy = log_probs(*args)
            return args[4](found, args[5]).sum(), jax.lax.stop_gradient(found), entropy

        monkeypatch.setattr(train.grpo, "chunked_log_probs_and_entropy", log_probs)
        monkeypatch.setattr(train.grpo, "chunked_token_loss", token_loss)
        sums, statistics = objective.sums(model, batch, None)
        denominator = objective.denominator(batch)
        return sums.loss / denominator, objective.metrics(statistics, denominator)

    with jax.set_mesh(mesh):
        placed, log_probs = place((batch, np.asarray(log_probs_BT, np.float32)), mesh)
        (value, metrics), slope = jax.device_get(jax.jit(loss)(log_probs, placed))
    return float(value), slope, metrics


@pytest.mark.parametrize("name", GOLDENS["policy_loss"])
def test_policy_losses_and_metrics_equal_the_goldens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregation, _, constant = name.partition(" ")
    config = GrpoConfig(
        aggregation=aggregation,  # type: ignore[arg-type]
        constant=float(constant) if constant else None,
        old="trainer",
        dual_clip=3.0,
        kl_weight=1e-30,  # So that the metrics have it.
    )
    mask = np.array(GOLDENS["mask"])
    i, t = np.indices(mask.shape)
    # Only differences matter: less 1, all are below 0, as log-probabilities are.
    old = -(((i * 5 + t) % 7) + 1) / 5 - 1
    numbers = {"old": old, "policy": old + 0.4 * np.sin(i * 5 + t), "reference": old + 0.05 * np.cos(i * 5 + t)}
    # A prompt of one token, and the responses.
    counts = mask.sum(1).astype(int)
    rollouts = [Rollout([1] * (n + 1), np.arange(n + 1) > 0, np.zeros(n + 1, np.float32), True, 0) for n in counts]
    others = {
        name: [np.concatenate([[0], x_T[:n]]) for x_T, n in zip(x, counts, strict=True)] for name, x in numbers.items()
    }
    advantages = group_advantages(np.array(GOLDENS["rewards"]))[0]
    batch, found = packed(rollouts, advantages, config, **others)
    batch = dataclasses.replace(batch, old_BT=found["old"], reference_BT=found["reference"])
    loss, _, metrics = evaluated(monkeypatch, config, batch, found["policy"])
    np.testing.assert_allclose(loss, GOLDENS["policy_loss"][name], rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["clip/low"] + metrics["clip/high"], GOLDENS["clip_fraction"], atol=1e-6)
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(metrics[f"kl/{kind}"], GOLDENS["kl"][kind][0], rtol=0, atol=1e-6)
    for kind in ("k2", "k3"):
        # The loss with the KL term, less the loss without it.
        weighted = dataclasses.replace(config, kl=kind, kl_weight=1.0)  # type: ignore[arg-type]
        if aggregation == "token-mean":
            added = evaluated(monkeypatch, weighted, batch, found["policy"])[0] - loss
            np.testing.assert_allclose(added, GOLDENS["kl"][kind], rtol=0, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Case:
    """Rollouts, and what is known of each of their tokens, 0 where it is not trained."""

    rollouts: list[Rollout]
    advantages: np.ndarray
    policy: list[np.ndarray]
    old: list[np.ndarray]
    reference: list[np.ndarray]


def drawn(rng: np.random.Generator) -> Case:
    """Log-probabilities that differ by about as much as clips, caps and masks of the tests allow."""
    rollouts = random_rollouts(rng, 8, 100)

    def near(scale: float) -> list[np.ndarray]:
        return [np.minimum(r.log_probs + scale * rng.normal(size=len(r.ids)) * r.trained, 0.0) for r in rollouts]

    case = Case(rollouts, (0.1 + rng.random(8)) * (-1.0) ** np.arange(8), near(0.4), near(0.2), near(0.5))
    # Ratios and importance weights far above 1 with advantages of both signs, and far below 1 with a negative one.
    for i, difference in ((1, 0.4), (2, 0.4), (3, -0.4)):
        case.old[i] = rollouts[i].log_probs
        case.policy[i] = rollouts[i].log_probs + difference * rollouts[i].trained
    return case


def formula(policy: list[jax.Array], case: Case, config: GrpoConfig) -> jax.Array:
    """The loss, one sequence after the other."""
    stop, total, tokens = jax.lax.stop_gradient, jnp.zeros(()), 0
    numbers = zip(case.rollouts, case.advantages, policy, case.old, case.reference, strict=True)
    used = [x for x in numbers if x[0].finished or not config.mask_unfinished]
    for rollout, advantage, log_probs, old, reference in used:
        here, n = rollout.trained, int(rollout.trained.sum())
        l, sampler, ref = log_probs[here], rollout.log_probs[here], reference[here]
        behind = {"current": stop(l), "trainer": old[here], "sampler": sampler}[config.old]
        ratio = jnp.exp(l - behind)
        if config.ratio == "sequence":
            mean = jnp.exp((l - behind).mean())
            ratio = stop(mean) * jnp.exp(l - stop(l)) if config.importance_cap else jnp.full(n, mean)
        low, high = 1 - config.clip_low, 1 + config.clip_high
        losses = -jnp.minimum(ratio * advantage, jnp.clip(ratio, low, high) * advantage)
        if config.dual_clip is not None and advantage < 0:
            losses = jnp.minimum(losses, -config.dual_clip * advantage)
        d = ref - l
        k3 = jnp.exp(d) - d - 1
        losses += config.kl_weight * {"k2": d**2 / 2, "k3": k3, "k3-weighted": jnp.exp(l - behind) * k3}[config.kl]
        if config.importance_cap is not None:
            losses *= jnp.minimum(jnp.exp(stop(behind) - sampler), config.importance_cap)
        if config.importance_mask is not None:
            losses *= jnp.exp((stop(behind) - sampler).sum()) <= config.importance_mask
        total += losses.sum() / (n if config.aggregation == "sequence-mean-token-mean" else 1)
        tokens += n
    return (
        total
        / {
            "sequence-mean-token-mean": len(used),
            "token-mean": tokens,
            "constant": len(used) * (config.constant or 1.0),
        }[config.aggregation]
    )


SETTINGS: list[dict[str, Any]] = [
    {},
    {"old": "trainer", "kl": "k2", "aggregation": "token-mean", "clip_low": 0.1, "clip_high": 0.3},
    {"old": "sampler", "aggregation": "constant", "constant": 5.0, "dual_clip": 1.2, "mask_unfinished": True},
    {"old": "trainer", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    {"old": "trainer", "ratio": "sequence", "clip_low": 0.05, "aggregation": "token-mean", "dual_clip": 1.1,
     "importance_cap": 1.1, "importance_mask": 1.3, "kl": "k3-weighted"},
    {"old": "current", "importance_cap": 1.2, "importance_mask": 1.5, "kl": "k3-weighted"},
]  # fmt: skip


@pytest.mark.draw(2)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda x: " ".join(map(str, x.values())) or "default")
def test_losses_and_gradients_are_the_formulas(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, case = GrpoConfig(max_segments=4, **{"kl_weight": 0.3, **settings}), drawn(print_seed())
    batch, found = packed(
        case.rollouts, case.advantages, config, policy=case.policy, old=case.old, reference=case.reference
    )
    batch = dataclasses.replace(batch, old_BT=found["old"], reference_BT=found["reference"])
    loss, slope, _ = evaluated(monkeypatch, config, batch, found["policy"])
    policy = [jnp.asarray(x, jnp.float32) for x in case.policy]
    want, slopes = jax.jit(jax.value_and_grad(functools.partial(formula, case=case, config=config)))(policy)
    # float32 sums in another order.
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
    # The gradient in the layout of the batch. What is packed has the range of log-probabilities, so it is packed as
    # -|x| and -max(x, 0).
    _, expected = packed(case.rollouts, case.advantages, config, above=[-jnp.abs(x) for x in slopes],
                         positive=[-jnp.maximum(x, 0.0) for x in slopes])  # fmt: skip
    np.testing.assert_allclose(slope, expected["above"] - 2 * expected["positive"], rtol=1e-4, atol=1e-6)


# Of each setting: others with which it matters, and another value of it.
MATTERS: dict[str, tuple[dict[str, Any], Any]] = {
    "aggregation": ({}, "token-mean"),
    "constant": ({"aggregation": "constant", "constant": 5.0}, 6.0),
    "ratio": ({"old": "trainer"}, "sequence"),
    "old": ({}, "sampler"),
    "clip_low": ({"old": "trainer"}, 0.05),
    "clip_high": ({"old": "trainer"}, 0.05),
    "dual_clip": ({"old": "trainer"}, 1.05),
    "kl_weight": ({}, 0.07),
    "kl": ({}, "k2"),
    "importance_cap": ({}, 1.1),
    "importance_mask": ({}, 1.01),
    "mask_unfinished": ({}, True),
}


def test_every_setting_changes_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are not here: the model applies temperature, loss_chunk, and moe; max_segments packs."""
    case = drawn(print_seed())
    case.rollouts[0] = dataclasses.replace(case.rollouts[0], finished=False)
    rest = {
        "scale",
        "epsilon",
        "overlong_tokens",
        "overlong_weight",
        "temperature",
        "loss_chunk",
        "moe",
        "max_segments",
    }
    assert {field.name for field in dataclasses.fields(GrpoConfig)} == MATTERS.keys() | rest

    def loss(settings: dict[str, Any]) -> float:
        config = GrpoConfig(**settings)
        batch, found = packed(
            case.rollouts, case.advantages, config, policy=case.policy, old=case.old, reference=case.reference
        )
        batch = dataclasses.replace(batch, old_BT=found["old"], reference_BT=found["reference"])
        return evaluated(monkeypatch, config, batch, found["policy"])[0]

    for name, (where, value) in MATTERS.items():
        before, after = loss(where), loss({**where, name: value})
        assert abs(after - before) > 1e-5, name
    rewards = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 0.5]])
    kinds = [group_advantages(rewards, scale) for scale in ("group", "none", "batch")]  # type: ignore[arg-type]
    assert all(np.abs(a - b).max() > 0.01 for a, b in itertools.pairwise(kinds))
    assert np.abs(kinds[0] - group_advantages(rewards, "group", 0.5)).max() > 0.01
    penalties = [
        overlong_penalty(95, 100, GrpoConfig(overlong_tokens=n, overlong_weight=w))
        for n, w in ((10, 1), (20, 1), (10, 3))
    ]
    assert len({float(x) for x in penalties}) == 3


def test_on_policy_the_gradient_is_that_of_reinforce_and_the_clip_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the trainer's own log-probabilities as the old ones. Groups of equal rewards only count."""
    rng = print_seed()
    case = drawn(rng)
    rewards = rng.normal(size=(2, 4))
    rewards[1] = 0.7
    advantages = group_advantages(rewards).ravel()
    counted = rng.permutation(8) > 0
    results = []
    for changes in ({}, {"clip_low": 0.01, "clip_high": 0.03, "dual_clip": 1.5}, {"old": "trainer"}):
        config = GrpoConfig(kl_weight=0.0, **changes)  # type: ignore[arg-type]
        batch, found = packed(case.rollouts, advantages, config, counted, policy=case.policy)
        batch = dataclasses.replace(batch, old_BT=found["policy"])
        results.append(evaluated(monkeypatch, config, batch, found["policy"]))
        assert not any(results[-1][2][f"clip/{side}"] for side in ("low", "high", "dual"))
    # The mean over sequences of the mean of -A over their tokens.
    want = -batch.advantages_BT * batch.batch.loss_weights / counted.sum()
    for _, slope, _ in results:
        np.testing.assert_allclose(slope, want, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[0][0], want.sum(), rtol=1e-4, atol=1e-6)


def test_metrics_are_those_of_the_trained_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GrpoConfig(old="trainer", importance_cap=1.1, importance_mask=1.2)
    case = drawn(print_seed())
    batch, found = packed(
        case.rollouts, case.advantages, config, policy=case.policy, old=case.old, reference=case.reference
    )
    batch = dataclasses.replace(batch, old_BT=found["old"], reference_BT=found["reference"])
    _, _, metrics = evaluated(monkeypatch, config, batch, found["policy"])
    here = [r.trained for r in case.rollouts]
    policy, old, reference, sampler, advantages = (
        np.concatenate([x[at] for x, at in zip(numbers, here, strict=True)])
        for numbers in (
            case.policy, case.old, case.reference, [r.log_probs for r in case.rollouts],
            [np.full(len(at), a) for a, at in zip(case.advantages, here, strict=True)],
        )
    )  # fmt: skip
    ratio, weight, d = np.exp(policy - old), np.exp(old - sampler), reference - policy
    products = [np.exp((o - r.log_probs).sum()) for o, r in zip(case.old, case.rollouts, strict=True)]
    want = {
        "ratio/mean": ratio.mean(), "ratio/min": ratio.min(), "ratio/max": ratio.max(),
        "clip/low": ((ratio < 0.8) & (advantages < 0)).mean(),
        "clip/high": ((ratio > 1.2) & (advantages > 0)).mean(),
        "clip/dual": 0.0,
        "kl/k1": -d.mean(), "kl/k3": (np.exp(d) - d - 1).mean(),
        "sampler_gap/mean": np.abs(old - sampler).mean(), "sampler_gap/max": np.abs(old - sampler).max(),
        "sampler_gap/perplexity_ratio": np.exp(-old.mean()) / np.exp(-sampler.mean()),
        "importance/mean": np.minimum(weight, 1.1).mean(), "importance/capped": (weight > 1.1).mean(),
        "importance/masked": np.mean([product > 1.2 for product in products]),
        "entropy": 0.0, "trained_tokens": len(policy), "trained_sequences": 8,
    }  # fmt: skip
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_batch_of_nothing_has_loss_0_and_finite_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no reward is known: the step divides by at least 1e-8."""
    case, config = drawn(print_seed()), GrpoConfig(old="trainer")
    batch, _ = packed(case.rollouts, case.advantages, config, np.zeros(8, bool))
    monkeypatch.setattr(Grpo, "denominator", lambda self, batch: jnp.maximum(batch.ends_BT.sum(), 1e-8))
    loss, slope, metrics = evaluated(monkeypatch, config, batch, batch.sampler_BT)
    assert loss == 0
    assert not slope.any()
    assert all(np.isfinite(x) for x in metrics.values())


def test_rows_with_too_many_sequences_are_not_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn(print_seed())
    batch, found = packed(case.rollouts, case.advantages, GrpoConfig(), policy=case.policy)
    most = int(batch.batch.segment_ids.max())
    assert most > 1
    for changes, finite in (({"ratio": "sequence"}, False), ({"importance_mask": 1.5}, False), ({}, True)):
        config = GrpoConfig(max_segments=most - 1, **changes)  # type: ignore[arg-type]
        loss, _, metrics = evaluated(monkeypatch, config, batch, found["policy"])
        assert np.isfinite(loss) == finite
        assert ("max_segments" in Grpo(MODEL, config).explain({**metrics, "loss": loss})) == (not finite)
