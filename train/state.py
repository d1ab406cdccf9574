"""What a training run carries from step to step: weights, optimiser state, guard, and how they begin."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from qwen_jax.config import ModelConfig
from qwen_jax.lora import LoRA
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, abstract_params, init_params, param_specs, without
from train.optimizer import OptimizerConfig, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What tells a spiking gradient from a usual one.

    Attributes:
      mean_norm: float32 scalar, running mean of the gradient norms of accepted steps.
      accepted: int32 scalar, steps that moved the weights.
      skipped: int32 scalar, steps that did not.
    """

    mean_norm: jax.Array
    accepted: jax.Array
    skipped: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run between two steps; a checkpoint holds exactly this.

    Attributes:
      step: int32 scalar, steps taken, skipped ones included; also the number of the next batch.
      params: float32 master weights of what is trained: the tree of `qwen_jax.params.init_params`, without frozen ones.
      opt_state: of `train.optimizer.make_optimizer`.
      guard: against bad gradients.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    guard: Guard


def init_state(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    seed: int | jax.Array,
    mesh: Mesh,
    lora: LoRA | None = None,
    frozen: Params | None = None,
) -> TrainState:
    """Random weights and zero moments, created on their shards.

    Args:
      model: the architecture.
      optimizer: of the run.
      seed: of the weights.
      mesh: the current mesh, from `make_mesh`.
      lora, frozen: as for `init_params`.
    """
    params = init_params(model, jax.random.key(seed), mesh, lora=lora, frozen=frozen)
    return fresh_state(optimizer, params, mesh)


def fresh_state(optimizer: OptimizerConfig, params: Params, mesh: Mesh, base: Params | None = None) -> TrainState:
    """The state before the first step, from given weights.

    Args:
      optimizer: of the run.
      params: float32, on the mesh.
      mesh: the current mesh, from `make_mesh`.
      base: for online merging, the weights that tau is counted from, float32, as `params`.

    Raises:
      ValueError: online merging without `base`, or `base` without it.
    """
    if (optimizer.merging is None) != (base is None):
        raise ValueError("Online merging needs the base weights, and nothing else does.")

    def scalar(dtype: DTypeLike) -> jax.Array:
        # Each needs a buffer of its own, because the state is donated.
        return jax.device_put(jnp.zeros((), dtype), NamedSharding(mesh, P()))

    def init(params: Params, base: Params | None) -> optax.OptState:
        tau = None if base is None else jax.tree.map(jnp.subtract, params, base)
        return make_optimizer(optimizer, tau).init(params)

    opt_state = jax.jit(init)(params, base)
    guard = Guard(scalar(jnp.float32), scalar(jnp.int32), scalar(jnp.int32))
    return TrainState(scalar(jnp.int32), params, opt_state, guard)


def abstract_state(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    lora: LoRA | None = None,
    frozen: Params | None = None,
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with shardings: the target that a checkpoint is restored to.

    Args:
      model: the architecture.
      optimizer: of the run.
      mesh: from `make_mesh`.
      lora, frozen: as for `init_params`.
    """
    sharding, options = Sharding.for_training(model, mesh), Options(lora=lora)

    def struct(leaf: jax.Array | jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    # Weights, and moments in the same shardings.
    specs = without(param_specs(model, sharding, options), frozen)
    shapes = without(abstract_params(model, sharding, options, jnp.float32), frozen)
    params = jax.tree.map(struct, shapes, specs)
    transformation = make_optimizer(optimizer)
    opt_state = optax.tree.map_params(
        transformation,
        struct,
        jax.eval_shape(transformation.init, params),
        specs,
        transform_non_params=lambda leaf: struct(leaf, P()),
    )
    # Step and guard.
    dtypes = jnp.int32, jnp.float32, jnp.int32, jnp.int32
    step, *guard = (struct(jax.ShapeDtypeStruct((), dtype), P()) for dtype in dtypes)
    # Structs stand where arrays will be.
    return TrainState(step, params, opt_state, Guard(*guard))  # type: ignore[arg-type]
