"""Dropout of LoRA: PEFT's definition, a function of seed, step and micro-batch alone, and nothing where it is off."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.linear import Linear
from qwen_jax.lora import LoRA, with_dropout
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, without
from qwen_jax.stack import unstack
from tests.helpers.runs import print_seed
from tests.train.test_lora import DENSE, EXPERTS, STEP, WIDE, base_of, draw, rows
from train.data.batch import place
from train.pretrain import NextToken
from train.step import batch_gradient, make_eval_step

DROPPED = dataclasses.replace(WIDE, dropout=0.3, dropout_seed=11)


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    """Programs run once or twice here: compiling them takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_inputs_of_a_are_zero_or_scaled() -> None:
    """With A and B the identity: of the update, a part of `dropout` is 0 and the rest is x / (1 - dropout)."""
    rng, D, T, p = print_seed(), 16, 4096, 0.25
    mesh, lora = make_mesh({"fsdp": 2, "tensor": 2}), LoRA(rank=D, alpha=D, dropout=p)
    s = Sharding.for_training(DENSE, mesh)
    x = rng.normal(size=(2, T, D)).astype(np.float32)
    with jax.set_mesh(mesh):

        @jax.jit
        def update(x: Any, seed: Any) -> Any:
            weight = jax.reshard(jnp.zeros((D, D)), s.gate_up)
            linear = Linear("BTD,FD->BTF", weight, x=s.hidden, w=s.gate_up, out=s.feed_forward)
            linear.add_lora(lora, jax.random.key(0), dropout=True)
            linear.lora_a = nnx.Param(jax.reshard(jnp.eye(D), P(None, "fsdp")))
            linear.lora_b = nnx.Param(jax.reshard(jnp.eye(D), P("tensor", None)))
            linear.lora_seed = nnx.Param(seed)
            return linear(jax.reshard(x, s.hidden))

        first, same, other = (np.asarray(update(x, jnp.uint32(seed))) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, same)
    kept = first != 0
    np.testing.assert_allclose(first[kept], (x / (1 - p))[kept], rtol=1e-5)
    for found in (first, other):
        zeros, n = (found == 0).mean(), found.size
        assert abs(zeros - p) < 6 * np.sqrt(p * (1 - p) / n)
        # Its expectation is x.
        assert abs((found - x).mean()) < 6 * np.sqrt(p / (1 - p) / n)
    # Draws of two seeds agree by chance alone.
    assert abs((kept == (other != 0)).mean() - (p**2 + (1 - p) ** 2)) < 0.02


@functools.cache
def compute(axes: tuple[tuple[str, int], ...], lora: LoRA, **changes: Any) -> tuple[Any, Mesh, ModelConfig]:
    """The jitted gradient of a batch, its mesh and model."""
    model, mesh = DENSE, make_mesh(dict(axes))
    config = dataclasses.replace(STEP, lora=lora, **changes)
    sharding = Sharding.for_training(model, mesh)
    return jax.jit(functools.partial(batch_gradient, NextToken(model), config, sharding)), mesh, model


def arguments(mesh: Mesh, model: ModelConfig) -> tuple[Params, Any, Params]:
    """What is trained, a batch, and what is frozen."""
    everything = draw(model, mesh, WIDE)
    frozen = base_of(everything)
    return without(everything, frozen), place(rows(), mesh), frozen


def gradient(
    axes: tuple[tuple[str, int], ...] = (),
    step: int = 4,
    lora: LoRA = DROPPED,
    **changes: Any,
) -> tuple[float, Params]:
    """Loss and gradient of a batch at a step."""
    run, mesh, model = compute(axes, lora, **changes)
    with jax.set_mesh(mesh):
        found = run(*arguments(mesh, model), jnp.int32(step))
        layers = found.gradient["layers"]
        if isinstance(layers, list):
            found.gradient["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return float(found.means.loss), jax.tree.map(np.asarray, found.gradient)


def test_what_is_dropped_depends_neither_on_the_mesh_nor_on_how_layers_run() -> None:
    """What the backward pass recomputes is dropped as it was in the forward pass."""
    axes = ("fsdp", 2), ("tensor", 2)
    (loss, got), (want_loss, want) = gradient(axes, scan_layers=False, remat="full"), gradient()
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float32 sums in another order.
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


def test_seed_step_and_micro_batch_decide() -> None:
    """And nothing is drawn where there is no dropout: in evaluation, and with a dropout of 0."""
    base, again = gradient()[0], gradient()[0]
    assert base == again
    assert len({base, gradient(step=5)[0], gradient(accumulation=2)[0]}) == 3
    # From the programs.
    run, mesh, model = compute((), DROPPED)
    off, *_ = compute((), dataclasses.replace(DROPPED, dropout=0.0))
    evaluate: Any = make_eval_step(NextToken(model), dataclasses.replace(STEP, lora=DROPPED), mesh)
    with jax.set_mesh(mesh):
        given = arguments(mesh, model)
        programs = run.lower(*given, jnp.int32(4)), off.lower(*given), evaluate.lower(*given)
        assert ["threefry" in program.as_text() for program in programs] == [True, False, False]
        with pytest.raises(ValueError, match="number of the step"):
            run.lower(*given)


def test_each_projection_of_each_layer_has_a_seed_of_its_own() -> None:
    """The same in a list of layers and in stacks; another seed, step or micro-batch changes all of them."""
    model, lora, step = EXPERTS, DROPPED, jnp.int32(7)

    def seeds(params: Params, *given: Any) -> list[int]:
        found = jax.tree.leaves_with_path(with_dropout(params, *given))
        return [int(n) for path, x in found if "lora_seed" in str(path) for n in np.atleast_1d(x)]

    stacked = arguments(make_mesh({}), model)[0]
    listed = {**stacked, "layers": unstack(stacked["layers"], jnp.float32, model.sparse_layers)}
    first = seeds(stacked, lora, step)
    # Attention has 4 projections in 2 layers; the MLP of one layer and the shared expert of the other have 3 each.
    assert len(set(first)) == len(first) == 4 * 2 + 3 + 3
    assert sorted(seeds(listed, lora, step)) == sorted(first)
    for other in ((dataclasses.replace(lora, dropout_seed=12), step), (lora, step + 1), (lora, step, 1)):
        assert not {*seeds(stacked, *other)} & {*first}


def test_values_out_of_range() -> None:
    for changes, message in (
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": -0.1}, "at least 0"),
        ({"dropout_seed": -1}, "2"),
    ):
        with pytest.raises(InputError, match=message):
            LoRA(**changes)
