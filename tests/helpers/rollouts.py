"""A trainer's weights, engines that get them, and the gap between the log-probabilities of both."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwen_jax.config import ModelConfig, MoE
from qwen_jax.inference import ContinuousEngine
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, abstract_params, param_specs
from qwen_jax.published import published
from train.data.batch import place
from train.data.rollouts import Rollout, pack_rollouts
from train.grpo import Grpo, make_log_prob_pass
from train.handover import InferenceLayout
from train.policy import GrpoConfig
from train.sampler import Prompt
from train.step import StepConfig

DENSE = dataclasses.replace(
    published("tiny"), vocab_size=288, hidden_size=32, intermediate_size=64, head_dim=8, num_layers=2
)
EXPERTS = dataclasses.replace(DENSE, moe=MoE(4, 2, 16, 32, mlp_only_layers=(0,)))
FLOAT32 = StepConfig("float32", "none")


def weights(model: ModelConfig, mesh: Mesh, seed: int = 0, scale: float = 0.2) -> Params:
    """Stacked float32 weights on a trainer's mesh, large enough for attention to matter; the same on every mesh."""
    rng, sharding = np.random.default_rng(seed), Sharding.for_training(model, mesh)

    def draw(path: Any, shape: jax.ShapeDtypeStruct, spec: jax.P) -> jax.Array:
        values = rng.normal("norm" in jax.tree_util.keystr(path), scale, shape.shape).astype(np.float32)
        return jax.device_put(values, jax.NamedSharding(mesh, spec))

    shapes, specs = abstract_params(model, sharding), param_specs(model, sharding)
    found: Params = jax.tree_util.tree_map_with_path(draw, shapes, specs)
    return found


def engine_of(params: Params, model: ModelConfig, mesh: Mesh, target: Mesh, **options: Any) -> ContinuousEngine:
    """A fresh engine with a trainer's weights."""
    dtype = options.pop("dtype", "float32")
    (fused,) = InferenceLayout(model, FLOAT32, mesh, [target], dtype)(params)
    settings = {"max_seqs": 4, "max_length": 96, "page_size": 16, "num_pages": 32, "max_batched_tokens": 32}
    return ContinuousEngine(model, fused, target, dtype=dtype, **{**settings, **options})


@functools.cache
def _log_probs(model: ModelConfig, mesh: Mesh, temperature: float) -> Any:
    return make_log_prob_pass(Grpo(model, GrpoConfig(temperature=temperature)), FLOAT32, mesh)


def gaps(
    params: Params, model: ModelConfig, mesh: Mesh, rollouts: Sequence[Rollout], temperature: float = 1.0
) -> np.ndarray:
    """Absolute differences of the sampler's and the trainer's log-probabilities of all sampled tokens."""
    n, config = len(rollouts), GrpoConfig(temperature=temperature)
    batch = pack_rollouts(rollouts, np.ones(n, np.float32), np.ones(n, bool), config, 8, 256)
    with jax.set_mesh(mesh):
        found = np.asarray(_log_probs(model, mesh, temperature)(params, place(batch, mesh)))
    trained = np.asarray(batch.batch.loss_weights) != 0
    assert trained.sum() == sum(rollout.trained.sum() for rollout in rollouts)
    return np.abs(found - batch.sampler_BT)[trained]


def random_prompts(rng: np.random.Generator, count: int, vocab: int = 256, longest: int = 24) -> list[Prompt]:
    """Prompts of random lengths and different numbers."""
    numbers = rng.choice(10_000, count, replace=False).tolist()
    return [Prompt(n, rng.integers(0, vocab, rng.integers(1, longest + 1)).tolist()) for n in numbers]


def same(a: Rollout, b: Rollout, atol: float = 1e-5) -> None:
    """Asserts that two rollouts have the same tokens, and log-probabilities up to rounding."""
    assert a.ids == b.ids
    np.testing.assert_array_equal(a.trained, b.trained)
    np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=0, atol=atol)
    assert (a.finished, a.version) == (b.finished, b.version)
