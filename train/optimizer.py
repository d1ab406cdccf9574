"""AdamW, its learning rate, and what it does not decay."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from qwen_jax.errors import InputError

Rate = Callable[[jax.Array | int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate over a stretch of steps: warm-up, then decay.

    Attributes:
      steps: length of the stretch.
      learning_rate: the peak.
      warmup_steps: linear up to the peak.
      schedule: after the warm-up, "cosine" or "linear" down to the final rate, or "wsd": stay at the peak, then
        linear decay over the last `decay_steps` (Hu et al. 2024, arXiv:2404.06395).
      decay_steps: of "wsd" only.
      final_fraction: final rate as a fraction of the peak.
    """

    steps: int
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "linear", "wsd"):
            raise InputError(f"schedule must be cosine, linear or wsd, got {self.schedule!r}.")
        if self.decay_steps and self.schedule != "wsd":
            raise InputError(
                f"decay_steps belongs to schedule 'wsd'; {self.schedule!r} decays from the warm-up to the end."
            )
        if min(self.warmup_steps, self.decay_steps) < 0 or not self.warmup_steps + self.decay_steps < self.steps:
            raise InputError(
                f"warmup_steps ({self.warmup_steps}) and decay_steps ({self.decay_steps}) must fit into "
                f"steps ({self.steps}) with at least one step between them."
            )
        if not self.learning_rate > 0 or not 0 <= self.final_fraction <= 1:
            raise InputError(
                "learning_rate must be positive and final_fraction between 0 and 1, got "
                f"{self.learning_rate} and {self.final_fraction}."
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with global-norm clipping.

    Attributes:
      schedule: the learning rate; several stretches follow one another, and the last one's final rate stays.
      beta1, beta2, eps: Adam's.
      weight_decay: times the learning rate, taken off every weight but norms and biases.
      clip_norm: the largest global norm of a gradient.
    """

    schedule: Schedule | tuple[Schedule, ...]
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.stretches:
            raise InputError("An optimizer needs at least one Schedule, got none.")
        if not self.clip_norm > 0 or not self.eps > 0 or self.weight_decay < 0:
            raise InputError(
                "clip_norm and eps must be positive and weight_decay at least 0, got "
                f"{self.clip_norm}, {self.eps} and {self.weight_decay}."
            )
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise InputError(f"beta1 and beta2 must be at least 0 and below 1, got {self.beta1} and {self.beta2}.")

    @property
    def stretches(self) -> tuple[Schedule, ...]:
        """`schedule` as a tuple."""
        return self.schedule if isinstance(self.schedule, tuple) else (self.schedule,)


def make_schedule(config: OptimizerConfig) -> Rate:
    """The learning rate of each step, counted from 0: a function of an int32 scalar to a float32 scalar."""
    rates, ends = [_stretch(schedule) for schedule in config.stretches], [0]
    for schedule in config.stretches:
        ends.append(ends[-1] + schedule.steps)
    joined = optax.join_schedules(rates, ends[1:-1]) if len(rates) > 1 else rates[0]
    return lambda step: jnp.asarray(joined(step), jnp.float32)


def _stretch(config: Schedule) -> optax.Schedule:
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    # Step i of the warm-up takes (i + 1) / warmup_steps of the peak: no step is wasted at a rate of 0.
    rise = peak / max(config.warmup_steps, 1)
    warmup = optax.linear_schedule(rise, peak + rise, config.warmup_steps) if config.warmup_steps else None
    rest = config.steps - config.warmup_steps
    if config.schedule == "cosine":
        pieces = [optax.cosine_decay_schedule(peak, rest, config.final_fraction)]
        starts = [config.warmup_steps]
    elif config.schedule == "linear":
        pieces, starts = [optax.linear_schedule(peak, final, rest)], [config.warmup_steps]
    else:
        last = final if config.decay_steps else peak
        pieces = [optax.constant_schedule(peak), optax.linear_schedule(peak, last, max(config.decay_steps, 1))]
        starts = [config.warmup_steps, config.steps - config.decay_steps]
    if warmup is None:
        return pieces[0] if len(pieces) == 1 else optax.join_schedules(pieces, starts[1:])
    return optax.join_schedules([warmup, *pieces], starts)


def decay_mask(params: Any) -> Any:
    """The tree of `params` with True where weight decay applies: everywhere but in norms and biases."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] != "bias" and not any(name.endswith("norm") for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping, Adam's moments in the dtype of the weights, decoupled weight decay, and the learning rate.

    `update` takes `norm=`, the global norm of the gradient, which the caller has at hand, and `step=`, an int32 scalar:
    the learning rate follows the run's steps, also where one was skipped.
    """
    rate = make_schedule(config)

    def clip(updates: Any, state: Any, params: Any = None, *, norm: jax.Array, **_: Any) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, config.clip_norm / norm)
        return jax.tree.map(lambda update: update * factor, updates), state

    def by_rate(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda update: -rate(step) * update, updates), state

    return optax.chain(
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), clip),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), by_rate),
    )
