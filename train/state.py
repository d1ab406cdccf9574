"""What a training run carries from step to step."""

import dataclasses
import functools

import jax
import optax

from qwen_jax.model import Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=("step", "params", "opt_state"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Attributes:
    step: int32 scalar, optimiser steps taken; also the number of the next batch.
    params: float32 master weights, the tree of `qwen_jax.model.init_params`.
    opt_state: of `train.optimizer.make_optimizer`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
