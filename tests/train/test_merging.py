"""Online merging: the published numbers, its limits, and masks that depend on nothing but seed, step and weight."""

import dataclasses
import functools
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from qwen_jax.config import MoE
from qwen_jax.errors import InputError
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, init_params, param_specs, without
from qwen_jax.tokenizer import train_bpe
from tests.helpers.runs import assert_same_weights, stop_after
from tests.train.test_lora import DENSE, rows
from tests.train.test_objective import Silent
from train.data.batch import Batch
from train.launch import Job, Phase, launch
from train.loop import CheckpointConfig
from train.merging import Merging, MergingState, online_merging
from train.optimizer import AdamW, OptimizerConfig, Schedule, make_optimizer
from train.pretrain import NextToken
from train.state import TrainState, fresh_state
from train.step import StepConfig

# Computed by the code in github.com/QwenLM/online_merging_optimizers (9d411b82), in PyTorch: three steps from REF.
BASE, REF = [0.1, -0.2, 0.3, 0.4, -0.5], [0.12, -0.23, 0.3, 0.39, -0.45]
GRADIENTS = [[0.5, -0.1, 0.2, -0.3, 0.05], [0.4, 0.2, 0.1, -0.3, -0.05], [-0.6, 0.1, 0.0, 0.2, 0.3]]
DARE = [
    [0.11003, -0.22004004, 0.29001004, 0.39997995, -0.45993993],
    [0.10017863, -0.22372741, 0.28069758, 0.40995994, -0.45936415],
    [0.09899812, -0.22894461, 0.27349901, 0.41421118, -0.46543273],
]
TIES = [
    [0.12001999, -0.23003, 0.29001004, 0.39998996, -0.44994998],
    [0.12003999, -0.23006, 0.28069758, 0.40997997, -0.44989997],
    [0.12005999, -0.23527721, 0.27349901, 0.40997997, -0.44984996],
]
SEED = random.SystemRandom().randrange(2**31)


@pytest.fixture(autouse=True)
def _seed() -> None:
    print("seed", SEED)  # Shown where a test fails.


def merging(config: Merging, inner: optax.GradientTransformation, tau: Any) -> optax.GradientTransformationExtraArgs:
    return online_merging(inner, tau, **dataclasses.asdict(config))


def released_adam(lr: float, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """The inner optimiser of the released code: epsilon is not bias-corrected."""

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros((), jnp.int32), zeros, zeros

    def update(g: Any, state: Any, params: Any = None) -> Any:
        t, m, v = state[0] + 1, b1 * state[1] + (1 - b1) * g, b2 * state[2] + (1 - b2) * g * g
        size = lr * jnp.sqrt(1 - b2**t) / (1 - b1**t)
        return -size * m / (jnp.sqrt(v) + eps), (t, m, v)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    ("want", "config"),
    [
        (DARE, Merging.released("dare", p=1.0, alpha=1e-3)),
        (TIES, Merging.released("ties", p=0.6, alpha=1e-3)),
    ],
    ids=["dare", "ties"],
)
def test_numbers_of_the_released_code(want: list[list[float]], config: Merging) -> None:
    params = jnp.asarray(REF, jnp.float32)
    optimizer = merging(config, released_adam(0.01, 0.9, 0.999, 1e-8), params - jnp.asarray(BASE, jnp.float32))
    state = optimizer.init(params)
    for gradient, after in zip(GRADIENTS, want, strict=True):
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, after, rtol=0, atol=1e-6)


def tree(rng: np.random.Generator, scale: float) -> Params:
    """Layers and experts as in a model, and a plain matrix."""
    shapes = {"layers": {"mlp": {"up": (3, 20, 30)}, "experts": {"gate_up": (2, 4, 2, 9, 8)}}, "embed": (50, 8)}
    draw = lambda shape: jnp.asarray(rng.normal(0, scale, shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def tensors(params: Params) -> list[np.ndarray]:
    """Each tensor by itself, flat."""
    layers = params["layers"]
    stacks = [(layers["mlp"]["up"], 1), (layers["experts"]["gate_up"], 3), (params["embed"], 0)]
    return [t for x, stack in stacks for t in np.asarray(x).reshape(int(np.prod(x.shape[:stack])), -1)]


def steps(config: Merging, count: int, scale: float = 1e-2) -> tuple[Params, list[Params], list[Params], Params]:
    """tau, the updates of an inner optimiser that returns its gradients, the merged updates, and F(tau) at the end."""
    rng = np.random.default_rng(SEED)
    tau, gradients = tree(rng, 1e-2), [tree(rng, scale) for _ in range(count)]
    optimizer = merging(config, optax.identity(), tau)
    state = optimizer.init(tau)
    merged = []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state)
        merged.append(updates)
    return tau, gradients, merged, state.tau


@pytest.mark.parametrize("mode", ["dare", "ties"])
@pytest.mark.parametrize("every", [1, 3])
def test_p_1_and_alpha_0_are_the_inner_optimiser_bit_for_bit(mode: Any, every: int) -> None:
    rng = np.random.default_rng(SEED)
    params, tau = tree(rng, 0.02), tree(rng, 1e-3)
    inner = optax.adamw(1e-3)
    outer = merging(Merging(p=1.0, alpha=0.0, mode=mode, merge_every=every), inner, tau)
    states, weights = [inner.init(params), outer.init(params)], [params, params]
    for _ in range(5):
        gradient = tree(rng, 1.0)
        for i, optimizer in enumerate((inner, outer)):
            updates, states[i] = optimizer.update(gradient, states[i], weights[i])
            weights[i] = optax.apply_updates(weights[i], updates)
    jax.tree.map(np.testing.assert_array_equal, *weights)


@pytest.mark.parametrize("rescale", ["inverse_p", "none", "l1"])
def test_dare_keeps_a_fraction_p_and_rescales_it(rescale: Any) -> None:
    config = Merging(p=0.3, alpha=0.0, rescale=rescale)
    _, (delta, _), (first, second), kept = steps(config, 2)
    for before, after in zip(tensors(delta), tensors(first), strict=True):
        share = before[after != 0]
        assert abs(len(share) / len(before) - 0.3) < 5 * (0.21 / len(before)) ** 0.5
        factor = {"none": 1.0, "inverse_p": 1 / 0.3, "l1": np.abs(before).sum() / np.abs(share).sum()}[rescale]
        np.testing.assert_allclose(after[after != 0], share * factor, rtol=1e-5)
    # Masks of steps, of layers, and of tau are different.
    masks = [tensors(x)[0] != 0 for x in (first, second, kept)] + [tensors(first)[1] != 0]
    assert all((a != b).any() for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.parametrize("p", [0.6, 0.01])
def test_ties_keeps_the_largest_of_each_tensor(p: float) -> None:
    _, (delta,), (merged,), kept_tau = steps(Merging.paper("ties", p=p, alpha=0.0), 1)
    for before, after in zip(tensors(delta), tensors(merged), strict=True):
        count = max(1, int(p * len(before)))
        largest = np.argsort(-np.abs(before))[:count]
        assert set(np.flatnonzero(after)) == set(largest)
        np.testing.assert_array_equal(after[largest], before[largest])
    del kept_tau


@pytest.mark.parametrize("consensus", ["weighted", "unweighted"])
def test_consensus_of_ties_is_the_formula(consensus: Any) -> None:
    config = Merging(p=1.0, alpha=0.4, mode="ties", rescale="none", consensus=consensus)
    tau, (delta,), (merged,), _ = steps(config, 1)
    for t, d, got in zip(*(map(np.float64, x) for x in map(tensors, (tau, delta, merged))), strict=True):
        a, b = 0.6 * d, 0.4 * t
        if consensus == "weighted":
            want = np.where(a * b >= 0, a + b, np.where(abs(a) > abs(b), a, b))
        else:
            sign = np.sign(d + t)
            want = a * (np.sign(d) == sign) + b * (np.sign(t) == sign)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("mode", ["dare", "ties"])
def test_merging_every_k_steps_moves_all_weights_as_algorithm_2(mode: Any) -> None:
    """After K steps the weights are where one merge of the summed updates puts them; until then where AdamW does."""
    config = Merging(p=1.0, alpha=0.25, mode=mode, merge_every=3)
    tau, delta, merged, _ = steps(config, 6)
    plain, moved = np.zeros(1), np.zeros(1)
    for t, *both in zip(tensors(tau), *map(tensors, delta), *map(tensors, merged), strict=True):
        d, m = np.float64(both[:6]), np.float64(both[6:])
        for first in (0, 3):
            np.testing.assert_allclose(m[first : first + 2], d[first : first + 2], rtol=1e-6)
            plain, moved = d[first : first + 3].sum(0), m[first : first + 3].sum(0)
            a, b = 0.75 * plain, 0.25 * np.float64(t)
            summed = a + b
            if mode == "ties":
                summed = np.where(a * b >= 0, a + b, np.where(abs(a) > abs(b), a, b))
            np.testing.assert_allclose(moved, summed, rtol=1e-4, atol=1e-8)
            assert (m[first] != 0).all()


def test_the_drift_of_tau_survives_float32() -> None:
    """1000 Adam-size steps with alpha tau of 1e-10: at least 0.85 of alpha tau N arrives in float32 weights."""
    rng = np.random.default_rng(SEED)
    n, alpha, count = 200_000, 1e-7, 1000
    weights, signs = jnp.asarray(rng.normal(0, 0.02, n), jnp.float32), jax.random.key(SEED)
    tau = jnp.full(n, 1e-3, jnp.float32)

    def run(alpha: float) -> np.ndarray:
        optimizer = merging(Merging(p=1.0, alpha=alpha), optax.identity(), tau)

        def step(carry: Any, i: jax.Array) -> Any:
            weights, state = carry
            delta = 7e-7 * jax.random.normal(jax.random.fold_in(signs, i), (n,))
            updates, state = optimizer.update(delta, state)
            return (optax.apply_updates(weights, updates), state), None

        (after, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), jnp.arange(count))
        return np.asarray(after, np.float64)

    # (1 - alpha) d itself moves the weights less; a run with tau = 0 has that too, so only tau is compared.
    drift = (run(alpha) - run(0.0)).mean()
    assert 0.85 < drift / (alpha * 1e-3 * count) < 1.15


MODEL = dataclasses.replace(DENSE, num_layers=2, moe=MoE(4, 2, 16, 32))
OMITTED = {
    "norm": True,
    "layers": {
        **dict.fromkeys(("input_norm", "post_attention_norm"), True),
        "attention": dict.fromkeys("qkv", True),
        "moe": dict.fromkeys(("router", "shared", "shared_gate"), True),
    },
}


@pytest.mark.parametrize("mode", ["dare", "ties"])
def test_masks_do_not_depend_on_the_mesh(mode: Any) -> None:
    """The updates of two steps on 8 devices are those of one device, bit for bit."""
    config = Merging(p=0.2, alpha=0.3, mode=mode, rescale="none", tau_mask="resample", seed=SEED)

    def updates(axes: dict[str, int]) -> list[Params]:
        mesh = make_mesh(axes)
        specs = without(param_specs(MODEL, Sharding.for_training(MODEL, mesh)), OMITTED)
        at = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, jax.P))
        rng = np.random.default_rng(SEED)
        with jax.set_mesh(mesh):
            # Without most of the parameters, to compile less.
            shapes = without(jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0), mesh)), OMITTED)
            draw = lambda: jax.device_put(  # noqa: E731
                jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), shapes), at
            )
            tau, gradients = draw(), [draw(), draw()]
            optimizer = merging(config, optax.identity(), tau)
            state = jax.jit(lambda tau: merging(config, optax.identity(), tau).init(tau))(tau)
            found, update = [], jax.jit(optimizer.update)
            for gradient in gradients:
                one, state = update(gradient, state)
                assert jax.tree.map(lambda x: x.sharding.spec, one) == jax.tree.map(lambda x: x.sharding.spec, tau)
                found.append(jax.tree.map(np.asarray, one))
        return found

    one = updates({})
    several = updates({"fsdp": 2, "tensor": 2, "expert": 2})
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), several, one)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), several, one)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, one), strict=True))


def test_the_training_step_carries_tau_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe(["some text of no importance " * 9], 300)
    optimizer = OptimizerConfig(
        Schedule(6, 1e-3), AdamW(), Merging(p=0.5, alpha=0.1, merge_every=2, tau_mask="fixed", seed=SEED)
    )

    class Data:
        def batch(self, step: int, state: TrainState) -> Batch:
            return rows(step)

    def job(name: str) -> Job[Batch]:
        def weights(seed: int, like: Params) -> Params:
            mesh = jax.tree.leaves(like)[0].sharding.mesh
            return init_params(DENSE, jax.random.key(seed), mesh)

        phases = (Phase(6, NextToken(DENSE), StepConfig("float32"), make_mesh({"fsdp": 2}), lambda step: Data()),)
        return Job(
            tmp_path / name / "checkpoints", DENSE, tokenizer, optimizer, phases, lambda step: Silent(),
            checkpoints=CheckpointConfig(every=1), initial=functools.partial(weights, 0),
            base=functools.partial(weights, 1),
        )  # fmt: skip

    straight = launch(job("straight"))
    state = straight.state.opt_state
    assert isinstance(state, MergingState)
    assert int(state.steps) == 6
    kept = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(state.tau["layers"]["mlp"])])
    assert 0.4 < (kept != 0).mean() < 0.6
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert launch(job("run")).step == 4
    assert launch(job("run")).steps_taken == 2
    assert_same_weights(tmp_path / "run", tmp_path / "straight", step=6)


def test_the_optimiser_of_a_run_with_p_1_and_alpha_0_is_adamw() -> None:
    plain, rng = OptimizerConfig(Schedule(4, 1e-3)), np.random.default_rng(SEED)
    merged = dataclasses.replace(plain, merging=Merging(p=1.0, alpha=0.0, merge_every=2))
    params, tau = tree(rng, 0.02), tree(rng, 1e-3)
    optimizers = make_optimizer(plain), make_optimizer(merged, tau)
    states, weights = [optimizer.init(params) for optimizer in optimizers], [params, params]
    for step in range(3):
        gradient = tree(rng, 1.0)
        for i, optimizer in enumerate(optimizers):
            how = {"step": jnp.int32(step), "norm": optax.tree.norm(gradient)}
            updates, states[i] = optimizer.update(gradient, states[i], weights[i], **how)
            weights[i] = optax.apply_updates(weights[i], updates)
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_a_run_needs_the_base_weights() -> None:
    optimizer = OptimizerConfig(Schedule(4, 1e-3), merging=Merging())
    with pytest.raises(ValueError, match="base weights"):
        fresh_state(optimizer, tree(np.random.default_rng(SEED), 0.02), make_mesh({}))


@pytest.mark.parametrize(
    "bad", [{"alpha": 1.5}, {"p": 0.0}, {"mode": "sum"}, {"merge_every": 0}, {"clip": 0.0}], ids=str
)
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Merging(**bad)


def test_presets_differ_where_the_paper_and_the_code_do() -> None:
    assert Merging.paper() == Merging(rescale="none", tau_mask="resample")
    assert Merging.released().clip == 1.0
    assert Merging.released("ties").consensus == "unweighted"
