"""Training steps that are traced or compiled and not run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from train.data.batch import Batch
from train.optimizer import OptimizerConfig, Schedule
from train.pretrain import NextToken
from train.state import abstract_state
from train.step import StepConfig, make_train_step


def abstract_step(
    axes: dict[str, int],
    remat: str,
    devices: Any = None,
    dtype: str = "bfloat16",
    length: int = 64,
    products: str = "bfloat16",
    **sizes: Any,
) -> Any:
    """A training step of a tiny model, with its state and a batch of 8 rows as shapes with shardings.

    Args:
      axes: sizes of the mesh axes.
      remat: remat policy.
      devices: devices of the mesh; by default those of this machine.
      dtype: compute dtype.
      length: tokens in a row.
      products: of `StepConfig`.
      **sizes: changes of the model.

    Returns:
      Objective, mesh, jitted step, state and batch.
    """
    model = dataclasses.replace(published("tiny"), **{"num_layers": 3, "vocab_size": 512, **sizes})
    mesh = make_mesh(axes, devices)
    objective, optimizer = NextToken(model), OptimizerConfig(Schedule(10))
    config = StepConfig(dtype, remat, products=products)  # type: ignore[arg-type]
    tokens = NamedSharding(mesh, Sharding.tokens)
    ints, floats = (jax.ShapeDtypeStruct((8, length), dtype, sharding=tokens) for dtype in (jnp.int32, jnp.float32))
    state = abstract_state(model, optimizer, mesh)
    step = make_train_step(objective, optimizer, config, mesh)
    return objective, mesh, step, state, Batch(ints, ints, ints, floats)
