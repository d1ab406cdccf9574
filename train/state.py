"""What a training run carries from step to step."""

import dataclasses

import jax
import optax

from qwen_jax.params import Params


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
    """Attributes:
    step: int32 scalar, steps taken, skipped ones too; also the number of the next batch.
    params: float32 master weights, the tree of `qwen_jax.params.init_params`.
    opt_state: of `train.optimizer.make_optimizer`.
    guard: against bad gradients.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    guard: Guard
