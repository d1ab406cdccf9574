"""The loss, gradient and metrics of an objective for a tiny model: they depend on no layout and on no mesh."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwen_jax.config import ModelConfig
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, init_params, param_specs
from train.data.batch import place
from train.step import StepConfig, batch_gradient

STEP = StepConfig("float32", "none")
# Compiling takes most of the time.
QUICK = {"xla_backend_optimization_level": "0"}
# Loss, gradient and metrics.
Found = tuple[float, Any, dict[str, Any]]


@functools.cache
def weights(model: ModelConfig) -> Params:
    """Initial weights with noise, so that biases and norms matter."""
    mesh, rng = make_mesh({}), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        params = jax.device_get(init_params(model, jax.random.key(0), mesh))
    noisy: Params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    return noisy


def on_mesh(model: ModelConfig, mesh: Mesh, params: Params | None = None) -> Params:
    """The weights, or other parameters, on a mesh."""
    specs = param_specs(model, Sharding.for_training(model, mesh))
    params = weights(model) if params is None else params
    placed: Params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
    return placed


@functools.cache
def _compiled(objective: Any, axes: tuple[tuple[str, int], ...], accumulation: int) -> Any:
    sharding = Sharding.for_training(objective.model, make_mesh(dict(axes)))
    step = dataclasses.replace(STEP, accumulation=accumulation)

    def compute(params: Any, batch: Any) -> Any:
        found = batch_gradient(objective, step, sharding, params, batch)
        return found.means, found.gradient, objective.metrics(found.statistics, found.denominator)

    return jax.jit(compute, compiler_options=QUICK)


def gradient(objective: Any, batch: Any, axes: dict[str, int] | None = None, accumulation: int = 1) -> Found:
    """Loss, gradient and metrics, of which one more is the loss without the balance of experts."""
    axes = axes or {}
    mesh = make_mesh(axes)
    with jax.set_mesh(mesh):
        compute = _compiled(objective, tuple(axes.items()), accumulation)
        means, found, metrics = jax.device_get(compute(on_mesh(objective.model, mesh), place(batch, mesh)))
    return float(means.loss), found, {**metrics, "reported": means.reported}


def agree(got: Found, want: Found, loss_rtol: float = 1e-5, loss_atol: float = 0.0) -> None:
    """float32 sums in another order."""
    np.testing.assert_allclose(got[0], want[0], rtol=loss_rtol, atol=loss_atol)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), got[1], want[1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got[2], want[2])


def assert_experts_are_balanced(objective: Any, batch: Any, loss_atol: float = 0.0) -> None:
    """The balance loss is of the whole batch: no split and no mesh changes it, and it is part of the loss."""
    want = gradient(objective, batch)
    loss, _, metrics = want
    assert metrics["balance_loss"] > 0
    moe = objective.moe
    added = moe.balance_loss * metrics["balance_loss"] + moe.router_z_loss * metrics["router_z_loss"]
    np.testing.assert_allclose(loss - metrics["reported"], added, rtol=1e-3, atol=loss_atol)
    agree(gradient(objective, batch, {"expert": 2}, 2), want, 1e-4 if loss_atol else 1e-5, loss_atol)
