"""Layouts agree: the loss curve of any mesh, accumulation and remat policy is that of one device."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import init_params, param_specs
from qwen_jax.published import published
from tests.helpers.processes import run
from train.data.batch import place
from train.data.loader import batches
from train.data.packing import pack
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import fresh_state
from train.step import StepConfig, make_train_step

STEPS = 50
# Two key/value heads: a tensor axis of four replicates them.
MODEL = dataclasses.replace(published("tiny"), vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8)
# float32 sums in another order, over 50 steps in which the loss falls to a fifth.
TOLERANCE = 1e-3


def rows():
    """Documents that can be learned: numbers counted up from a random start, by 1, 2 or 3."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 400)
    return pack([(rng.integers(64) + rng.integers(1, 4) * np.arange(n)) % 64 for n in lengths], 16)


@functools.cache
def weights() -> Any:
    mesh = make_mesh({}, jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(init_params(MODEL, jax.random.key(0), mesh))


def curve(
    axes: dict[str, int], accumulation: int, remat: Any, params: Any, scan_layers: bool = True, ring: bool = False
) -> np.ndarray:
    """Loss and gradient norm of each step."""
    optimizer = OptimizerConfig(Schedule(STEPS, 1e-2, warmup_steps=5))
    objective = NextToken(MODEL, PretrainConfig(loss_chunk=16, z_loss=1e-3))
    config = StepConfig("float32", remat, accumulation, scan_layers, ring=ring)
    mesh, data = make_mesh(axes), batches(rows(), 32, seed=0)
    specs = param_specs(MODEL, Sharding.for_training(MODEL, mesh))
    with jax.set_mesh(mesh):
        on_mesh = jax.tree.map(
            lambda x, spec: jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), lambda i: x[i]),
            params,
            specs,
        )
        state = fresh_state(optimizer, on_mesh, mesh)
        # Compiling takes most of the time; LLVM's optimisations do not matter here.
        lowered = make_train_step(objective, optimizer, config, mesh).lower(  # type: ignore[attr-defined]
            state, place(data[0], mesh)
        )
        step = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
        if jax.distributed.is_initialized():
            # Gloo's are wrong at times (qwen_jax/parallel/collectives.py).
            assert "reduce-scatter(" not in step.as_text()
        metrics = []
        for i in range(STEPS):
            state, numbers = step(state, place(data[i], mesh))
            # JAX's CPU client lets 32 programs of a device wait; the next one waits in a thread that a device needs for
            # the program whose collective all others are in.
            metrics.append(jax.block_until_ready(numbers))
        return np.array([[m["loss"], m["grad_norm"]] for m in jax.device_get(metrics)])


@functools.cache
def one_device() -> np.ndarray:
    return curve({}, 1, "none", weights())


def test_the_curve_that_all_are_compared_with_learns() -> None:
    loss = one_device()[:, 0]
    assert loss[0] > 4
    assert loss[-5:].mean() < 1.5


@pytest.mark.draw(3)
@pytest.mark.parametrize(
    ("axes", "accumulation", "remat"),
    [
        ({}, 4, "none"),
        ({"data": 8}, 1, "dots"),
        ({"fsdp": 8}, 4, "full"),
        ({"tensor": 4}, 4, "dots"),
        ({"data": 2, "fsdp": 4}, 4, "none"),
        ({"fsdp": 4, "tensor": 2}, 1, "full"),
        ({"data": 2, "tensor": 4}, 1, "none"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 4, "dots"),
        ({"context": 8}, 1, "none"),
        ({"fsdp": 2, "context": 2, "tensor": 2}, 4, "full"),
    ],
    ids=str,
)
def test_layouts_agree(axes: dict[str, int], accumulation: int, remat: str) -> None:
    np.testing.assert_allclose(curve(axes, accumulation, remat, weights()), one_device(), rtol=TOLERANCE)


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("axes", "remat"),
    [({"context": 8}, "none"), ({"context": 4}, "dots"), ({"fsdp": 2, "context": 2, "tensor": 2}, "full")],
    ids=str,
)
def test_keys_that_go_round_are_keys_that_are_gathered(axes: dict[str, int], remat: str) -> None:
    np.testing.assert_allclose(curve(axes, 1, remat, weights(), ring=True), one_device(), rtol=TOLERANCE)


@pytest.mark.draw(1)
@pytest.mark.parametrize(
    ("axes", "accumulation", "remat"),
    [({}, 1, "dots"), ({"data": 2, "fsdp": 2, "tensor": 2}, 4, "dots"), ({"fsdp": 2, "context": 2}, 2, "full")],
    ids=str,
)
def test_layers_one_after_the_other_are_a_loop(axes: dict[str, int], accumulation: int, remat: str) -> None:
    got = curve(axes, accumulation, remat, weights(), scan_layers=False)
    np.testing.assert_allclose(got, one_device(), rtol=TOLERANCE)


def on_eight(params: Any) -> np.ndarray:
    """In one of several processes."""
    return curve({"data": 2, "fsdp": 2, "tensor": 2}, 1, "none", params)


def round_eight(params: Any) -> np.ndarray:
    """Keys and values go from process to process."""
    return curve({"context": 8}, 1, "none", params, ring=True)


@pytest.mark.draw(1)
@pytest.mark.parametrize("job", [on_eight, round_eight])
def test_two_processes_of_four_devices_are_one(job: Any) -> None:
    first, second = run(job, weights(), processes=2, devices=4)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, one_device(), rtol=TOLERANCE)
