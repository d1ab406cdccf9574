"""Reward training: published numbers, PyTorch's loop, and a loss that depends on nothing but the pairs."""

import dataclasses
import functools
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from jax.sharding import Mesh, NamedSharding

import convert
from qwen_jax.config import ModelConfig, MoE
from qwen_jax.errors import InputError
from qwen_jax.inference.scorer import Scorer
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, init_params, param_specs
from qwen_jax.published import published
from tests.helpers.reward import make_reward_checkpoint
from train.data.batch import Batch, place
from train.data.pairs import PairBatch
from train.optimizer import AdamW, OptimizerConfig, Schedule, make_schedule
from train.preference import bradley_terry
from train.reward import Reward, RewardConfig
from train.state import fresh_state, init_state
from train.step import StepConfig, batch_gradient, make_eval_step, make_train_step

MODEL = dataclasses.replace(
    published("tiny"), vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8, num_layers=2, score="linear"
)
LENGTH, SEGMENTS = 32, 8
CONFIG = RewardConfig(centering=0.1, max_segments=SEGMENTS)
STEP = StepConfig(dtype="float32")
Pair = tuple[np.ndarray, np.ndarray, float]


def draw_pairs(rng: np.random.Generator, count: int, vocabulary: int = 64, longest: int = 7) -> list[Pair]:
    """Answers of 1 to `longest` tokens, with margins."""

    def answer() -> np.ndarray:
        return rng.integers(0, vocabulary, rng.integers(1, longest + 1)).astype(np.int32)

    return [(answer(), answer(), float(rng.uniform(0, 2))) for _ in range(count)]


def pack_pairs(
    pairs: Sequence[Pair], rows: int, length: int = LENGTH, per_row: int = SEGMENTS // 2, left: bool = False
) -> PairBatch:
    """Pairs in order into rows of at most `per_row` pairs; the rest of a row is padding, `left` or right of them."""
    tokens, positions, segments, weights = (np.zeros((rows, length), np.int32) for _ in range(4))
    margins = np.zeros((rows, length), np.float32)
    row, at, segment = 0, 0, 0
    used = np.zeros(rows, int)
    for chosen, rejected, margin in pairs:
        if at + len(chosen) + len(rejected) > length or segment == 2 * per_row:
            row, at, segment = row + 1, 0, 0
        for answer in (chosen, rejected):
            segment += 1
            where = row, slice(at, at + len(answer))
            tokens[where], positions[where], segments[where] = answer, np.arange(len(answer)), segment
            weights[where] = 1
            at += len(answer)
        margins[row, at - len(rejected) - 1] = margin
        used[row] = at
    # Padding has tokens, too: nothing may depend on them.
    tokens = np.where(segments > 0, tokens, 5)
    arrays = tokens, positions, segments, weights, margins
    if left:
        arrays = tuple(np.stack([np.roll(r, -n) for r, n in zip(x, used, strict=True)]) for x in arrays)  # type: ignore[assignment]
    tokens, positions, segments, weights, margins = arrays
    return PairBatch(Batch(tokens, positions, segments, weights.astype(np.float32)), np.zeros_like(margins), margins)


def test_the_golden_of_openrlhf() -> None:
    """`orlhf_bt` of OpenRLHF's PairWiseLoss (3c3be623): scores and mean loss; and the margin, in float64 NumPy."""
    chosen, rejected = jnp.array([1.5, 0.2, -0.3]), jnp.array([0.5, 0.4, -1.3])
    assert abs(float(bradley_terry(chosen, rejected).mean()) - 0.4748874148060125) < 1e-6
    margin = np.array([0.5, 1.0, 0.0])
    expected = np.log1p(np.exp(-(np.asarray(chosen, np.float64) - np.asarray(rejected) - margin)))
    np.testing.assert_allclose(bradley_terry(chosen, rejected, jnp.array(margin, jnp.float32)), expected, rtol=1e-6)


# --- invariance ----------------------------------------------------------------------------------------------------


@functools.cache
def case(head: str) -> tuple[ModelConfig, list[Pair], Params]:
    seed = secrets.randbits(32)
    print("seed", seed)
    model = MODEL if head == "moe" else dataclasses.replace(MODEL, score=head)  # type: ignore[arg-type]
    if head == "moe":
        model = dataclasses.replace(model, moe=MoE(4, 2, 16, 32), num_layers=1)
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = init_params(model, jax.random.key(seed), mesh)
    # Weights large enough for attention to matter.
    params = jax.tree.map(lambda x: np.asarray(x) * (5 if x.ndim > 2 else 1), params)
    return model, draw_pairs(np.random.default_rng(seed), 12), params


def on(mesh: Mesh, model: ModelConfig, params: Params) -> Params:
    """The parameters on a mesh."""
    specs = param_specs(model, Sharding.for_training(model, mesh))
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)


def gradient(
    head: str, batch: PairBatch, axes: dict[str, int], config: StepConfig = STEP
) -> tuple[float, Params, dict[str, float]]:
    """Loss, gradient and metrics of a batch on a mesh."""
    model, _, params = case(head)
    mesh, objective = make_mesh(axes), Reward(model, dataclasses.replace(CONFIG, head=model.score))
    sharding = Sharding.for_training(model, mesh)
    with jax.set_mesh(mesh):
        placed = on(mesh, model, params)

        @jax.jit
        def run(params: Params, batch: PairBatch) -> Any:
            found = batch_gradient(objective, config, sharding, params, batch)
            return found.means, found.gradient, objective.metrics(found.statistics, found.denominator)

        means, gradient, metrics = run(placed, place(batch, mesh))
    return (
        float(means.loss),
        jax.tree.map(np.asarray, gradient),
        {k: float(v) for k, v in metrics.items() if v.ndim == 0},
    )


@functools.cache
def expected(head: str) -> tuple[float, Params, dict[str, float]]:
    """One pair a row, on one device."""
    return gradient(head, pack_pairs(case(head)[1], 12, 16, per_row=1), {})


def assert_same(got: tuple[float, Params, dict[str, float]], head: str) -> None:
    loss, gradients, metrics = expected(head)
    # float32 sums in another order.
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), got[1], gradients)
    assert got[2].keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(got[2][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.draw(2)
@pytest.mark.parametrize(
    ("head", "axes", "accumulation", "layout"),
    [
        ("linear", {}, 1, "packed"),
        ("linear", {}, 1, "padded left, in another order"),
        ("linear", {}, 4, "packed"),
        ("mlp", {"data": 2, "fsdp": 2}, 2, "packed"),
        ("mlp", {"fsdp": 2, "tensor": 2}, 1, "padded left, in another order"),
        ("linear", {"context": 2}, 1, "padded left, in another order"),
        ("mlp", {"fsdp": 2, "context": 2, "tensor": 2}, 2, "packed"),
        ("moe", {"expert": 2}, 2, "packed"),
    ],
    ids=str,
)
def test_loss_and_gradient_depend_on_the_pairs_alone(
    head: str, axes: dict[str, int], accumulation: int, layout: str
) -> None:
    """Not on packing, padding, order, the number of micro-batches or the mesh. Experts are balanced over all pairs."""
    pairs = case(head)[1]
    if layout == "packed":
        batch = pack_pairs(pairs, 8)
    else:
        batch = pack_pairs(pairs[::-1], 8, left=True)
    assert (batch.batch.segment_ids > 0).sum() == sum(len(a) + len(b) for a, b, _ in pairs)
    assert_same(gradient(head, batch, axes, dataclasses.replace(STEP, accumulation=accumulation)), head)


def test_the_loss_is_the_formula_and_counts_each_pair_once() -> None:
    """From scores of single answers, in float64; accuracy, margin and mean score too."""
    model, pairs, params = case("linear")
    mesh = make_mesh({}, jax.devices()[:1])
    scorer = Scorer(model, on(mesh, model, params), mesh, dtype="float32")
    chosen, rejected = (scorer.score([p[i] for p in pairs]).astype(np.float64) for i in (0, 1))
    difference = chosen - rejected
    terms = np.log1p(np.exp(-(difference - np.array([p[2] for p in pairs]))))
    loss, _, metrics = expected("linear")
    np.testing.assert_allclose(loss, (terms + 0.1 * (chosen + rejected) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (difference > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], difference.mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["mean_reward"], np.concatenate([chosen, rejected]).mean(), rtol=1e-4, atol=1e-6)
    # An evaluation reports the likelihood alone.
    with jax.set_mesh(mesh):
        evaluate = make_eval_step(Reward(model, CONFIG), STEP, mesh)
        sums, _ = evaluate(on(mesh, model, params), place(pack_pairs(pairs, 8), mesh))
    assert float(sums.weight) == len(pairs)
    np.testing.assert_allclose(float(sums.loss), terms.sum(), rtol=1e-5)


# --- parity and learning -------------------------------------------------------------------------------------------


@pytest.mark.draw(1)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_twenty_steps_are_those_of_a_pytorch_loop(head: Any, tmp_path: Path) -> None:
    """transformers' class, or a torch module, one answer at a time, and torch's AdamW."""
    steps, seed = 20, secrets.randbits(32)
    print("seed", seed)
    model = make_reward_checkpoint(tmp_path, head, seed=seed % 1000, num_hidden_layers=1)
    rng = np.random.default_rng(seed)
    # Ids from 2 on: 1 is transformers' padding, at which it does not score.
    batches = [[(a % 150 + 2, b % 150 + 2, m) for a, b, m in draw_pairs(rng, 6, 10_000)] for _ in range(steps)]
    adamw = AdamW(weight_decay=0.1, clip_norm=1.0)
    optimizer = OptimizerConfig(Schedule(steps, 3e-4, warmup_steps=3), adamw)

    # Ours, on packed rows.
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    config, params = convert.load(tmp_path, mesh, "float32", Options())
    objective, ours = Reward(config, dataclasses.replace(CONFIG, head=head)), []
    with jax.set_mesh(mesh):
        state = fresh_state(optimizer, params, mesh)
        step = make_train_step(objective, optimizer, STEP, mesh)
        for pairs in batches:
            state, metrics = step(state, place(pack_pairs(pairs, 4), mesh))
            ours.append([float(metrics[name]) for name in ("loss", "grad_norm", "accuracy", "mean_reward")])

    # Theirs.
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1]
    others = [p for n, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": adamw.weight_decay}, {"params": others, "weight_decay": 0.0}]
    torch_optimizer = torch.optim.AdamW(groups, betas=(adamw.beta1, adamw.beta2), eps=adamw.eps)
    rate, theirs = make_schedule(optimizer), []

    def scored(answer: np.ndarray) -> torch.Tensor:
        ids = torch.as_tensor(answer, dtype=torch.long)[None]
        return model(input_ids=ids).logits[0, 0] if head == "linear" else model(ids)[0]

    for i, pairs in enumerate(batches):
        chosen, rejected = (torch.stack([scored(p[side]) for p in pairs]) for side in (0, 1))
        margin = torch.tensor([p[2] for p in pairs], dtype=torch.float32)
        likelihood = -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()
        loss = likelihood + CONFIG.centering * ((chosen + rejected) ** 2).mean()
        torch_optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), adamw.clip_norm)
        for group in torch_optimizer.param_groups:
            group["lr"] = float(rate(i))
        torch_optimizer.step()
        accuracy = (chosen > rejected).float().mean()
        theirs.append([x.item() for x in (likelihood, norm, accuracy, torch.cat([chosen, rejected]).mean())])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len({round(x[0], 3) for x in theirs}) > 10


def test_known_strengths_are_recovered() -> None:
    """Items of one token; pairs drawn by the Bradley-Terry law. A tiny model finds the strengths' order and scale."""
    seed = secrets.randbits(32)
    print("seed", seed)
    rng, items, steps, rows = np.random.default_rng(seed), 24, 150, 32
    model = dataclasses.replace(MODEL, num_layers=1, hidden_size=32, vocab_size=32)
    strengths = rng.permutation(np.linspace(-2.5, 2.5, items))
    optimizer = OptimizerConfig(Schedule(steps, 1e-2, warmup_steps=5, final_fraction=0.0), AdamW(weight_decay=0.0))
    mesh = make_mesh({}, jax.devices()[:1])
    objective = Reward(model, RewardConfig(max_segments=64))

    def batch() -> PairBatch:
        a, b = rng.integers(0, items, (2, rows, 32))
        wins = rng.random(a.shape) < 1 / (1 + np.exp(strengths[b] - strengths[a]))
        tokens = np.stack([np.where(wins, a, b), np.where(wins, b, a)], axis=-1).reshape(rows, 64).astype(np.int32)
        segments = np.tile(np.arange(1, 65, dtype=np.int32), (rows, 1))
        zeros = np.zeros((rows, 64), np.float32)
        return PairBatch(Batch(tokens, np.zeros_like(tokens), segments, zeros + 1), zeros, zeros)

    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, seed, mesh)
        step = make_train_step(objective, optimizer, STEP, mesh)
        for _ in range(steps):
            state, metrics = step(state, place(batch(), mesh))
    scores = Scorer(model, state.params, mesh, dtype="float32").score([[i] for i in range(items)])
    assert scipy.stats.spearmanr(scores, strengths).statistic > 0.99
    slope = np.polyfit(strengths, scores, 1)[0]
    assert 0.8 < slope < 1.2
    assert float(metrics["accuracy"]) > 0.6


# --- bad input -----------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"no score head.*with_fresh_score_head"):
        Reward(published("tiny"))
    with pytest.raises(InputError, match=r"score head 'linear'.*expects 'mlp'"):
        Reward(MODEL, RewardConfig(head="mlp"))
    for bad in ({"max_segments": 3}, {"max_segments": 0}, {"centering": -1.0}, {"head": "cubic"}):
        with pytest.raises(InputError, match=next(iter(bad))):
            RewardConfig(**bad)  # type: ignore[arg-type]


def test_rows_with_too_many_segments_stop_the_run_and_are_explained() -> None:
    model, pairs, _ = case("linear")
    objective, mesh = Reward(model, RewardConfig(max_segments=2)), make_mesh({}, jax.devices()[:1])
    optimizer = OptimizerConfig(Schedule(4))
    with jax.set_mesh(mesh):
        step = make_train_step(objective, optimizer, STEP, mesh)
        _, metrics = step(init_state(model, optimizer, 0, mesh), place(pack_pairs(pairs, 8), mesh))
    assert float(metrics["skipped"]) == 1
    explanation = objective.explain({name: float(value) for name, value in metrics.items()})
    assert f"{int(metrics['beyond'])} pairs of the batch are in rows with more than max_segments=2" in explanation
