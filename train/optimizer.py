"""AdamW with learning-rate schedules, gradient clipping, and weight decay of matrices only."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import InputError
from train.fields import at_least
from train.merging import Merging, online_merging
from train.moments import LEAST_ROOT, MOMENTS, Moments, store_moments

Rate = Callable[[jax.Array | int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate over some steps: warm-up, then decay.

    Attributes:
      steps: how many.
      learning_rate: the peak.
      warmup_steps: linear up to the peak.
      schedule: after the warm-up, "cosine" or "linear" down to the final rate, or "wsd": stay at the peak, then
        linear decay over the last `decay_steps` (Hu et al. 2024, arXiv:2404.06395).
      decay_steps: of "wsd" only.
      final_fraction: final rate as a fraction of the peak.

    Raises:
      InputError: a value out of range, or phases that do not fit into the steps.
    """

    steps: int
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, steps=1, warmup_steps=0, decay_steps=0)
        if self.schedule not in ("cosine", "linear", "wsd"):
            raise InputError(f"schedule must be cosine, linear or wsd, got {self.schedule!r}.")
        if self.decay_steps and self.schedule != "wsd":
            raise InputError(
                f"decay_steps belongs to schedule 'wsd'; {self.schedule!r} decays from the warm-up to the end."
            )
        if not self.warmup_steps + self.decay_steps < self.steps:
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
class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with clipping by the global norm; its learning rate is apart.

    Attributes:
      beta1, beta2, eps: Adam's.
      weight_decay: times the learning rate, the fraction of a weight that a step subtracts from it; norms and biases
        are not decayed.
      clip_norm: the largest global norm of a gradient.
      moments: how both moments are stored between steps; see `train.moments`. "bfloat16" takes half the memory, and
        needs beta1 and beta2 of at most 0.99: a moment that changes by less than 1/256 in a step may stay as it is when
        it is rounded, and would never decay. "8bit" takes a quarter. It needs beta1^2 below beta2, which bounds the
        ratio of the moments, and clip_norm of at most 3.6e9 eps sqrt(1 - beta2): a gradient whose second moment is
        stored as 0 must be below eps.

    Raises:
      InputError: a value out of range.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments: Moments = "float32"

    def __post_init__(self) -> None:
        if not self.clip_norm > 0 or not self.eps > 0 or not self.weight_decay >= 0:
            raise InputError(
                "clip_norm and eps must be positive and weight_decay at least 0, got "
                f"{self.clip_norm}, {self.eps} and {self.weight_decay}."
            )
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise InputError(f"beta1 and beta2 must be at least 0 and below 1, got {self.beta1} and {self.beta2}.")
        if self.moments not in MOMENTS:
            raise InputError(f"moments must be one of {', '.join(MOMENTS)}, got {self.moments!r}.")
        if self.moments == "bfloat16" and max(self.beta1, self.beta2) > 0.99:
            raise InputError(
                f"moments='bfloat16' needs beta1 and beta2 of at most 0.99, got {self.beta1} and {self.beta2}: "
                "rounding would keep a moment from decaying. Lower them, or use moments='float32'."
            )
        if self.moments == "8bit" and not self.beta1**2 < self.beta2:
            raise InputError(
                f"moments='8bit' needs beta1^2 below beta2, got {self.beta1} and {self.beta2}: only then is the first "
                "moment bounded by the root of the second. Lower beta1, raise beta2, or use moments='float32'."
            )
        most = self.eps * (1 - self.beta2) ** 0.5 / LEAST_ROOT
        if self.moments == "8bit" and self.clip_norm > most:
            raise InputError(
                f"moments='8bit' needs clip_norm of at most 2^31.75 eps sqrt(1 - beta2) = {most:.3g}, got "
                f"{self.clip_norm:.3g}: second moments that are small beside it are stored as 0, and eps alone would "
                "divide the update. Lower clip_norm, raise eps, or use moments='float32'."
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with its learning rate.

    Attributes:
      schedule: the learning rate; several schedules follow one another, and the final rate of the last one stays.
      adamw: all else.
      merging: merge each update with that of the SFT model; see `train.merging`. None for plain AdamW.

    Raises:
      InputError: no schedule.
    """

    schedule: Schedule | tuple[Schedule, ...]
    adamw: AdamW = AdamW()
    merging: Merging | None = None

    def __post_init__(self) -> None:
        if not self.schedules:
            raise InputError("An optimizer needs at least one Schedule, got none.")

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """`schedule` as a tuple."""
        return self.schedule if isinstance(self.schedule, tuple) else (self.schedule,)


def make_schedule(config: OptimizerConfig) -> Rate:
    """The learning rate as a function of the step: an int32 scalar, counted from 0, to a float32 scalar."""
    rates = [_rate(schedule) for schedule in config.schedules]
    ends = list(itertools.accumulate(schedule.steps for schedule in config.schedules))
    joined = optax.join_schedules(rates, ends[:-1]) if len(rates) > 1 else rates[0]
    return lambda step: jnp.asarray(joined(step), jnp.float32)


# Entries of a table of rates: a multiple of this, so that runs of up to so many steps share its shape.
_TABLE_STEPS = 1 << 14


def rate_table(config: OptimizerConfig) -> np.ndarray:
    """The learning rate of each step of a run, as an array for `train.step.train_step`.

    Args:
      config: of the run.

    Returns:
      Float32 [a multiple of 16,384], at least as many as there are steps; the final rate fills the rest.
    """
    rate, steps = make_schedule(config), sum(schedule.steps for schedule in config.schedules)
    starts = range(0, steps + 1, _TABLE_STEPS)
    # Blocks of one shape, so that this compiles once.
    return np.concatenate([np.asarray(rate(jnp.arange(_TABLE_STEPS) + start)) for start in starts])


def read_rates(rates: jax.Array) -> Rate:
    """The learning rate as a function of the step, from a table that is on every device.

    Args:
      rates: float32 [steps], of `rate_table`.
    """
    return lambda step: rates.at[step].get(mode="clip", out_sharding=P())


def _rate(config: Schedule) -> optax.Schedule:
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    # Step i of the warm-up has (i + 1) / warmup_steps of the peak: no step is wasted at a rate of 0.
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


def decay_mask(params: optax.Params) -> optax.Params:
    """The tree of `params` with True where weight decay applies: everywhere but in norms and biases."""

    def decays(path: tuple[object, ...], _: jax.Array) -> bool:
        names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return names[-1] != "bias" and not any(name.endswith("norm") for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    config: OptimizerConfig, tau: optax.Params | None = None, rate: Rate | None = None
) -> optax.GradientTransformationExtraArgs:
    """AdamW by optax: clipping, moments, decoupled weight decay, and the learning rate.

    `update` needs `norm=`, the global norm of the gradient, which the caller has computed already, and `step=`, an
    int32 scalar: the learning rate follows the steps of the run, skipped ones included.

    With `config.merging`, all of that is the inner optimiser of `train.merging.online_merging`.

    Args:
      config: of the run.
      tau: for `init` with online merging: what is kept of it is a part of the state, where `update` finds it.
      rate: the learning rate of a step; by default the schedule of `config`.
    """
    rate, adamw = rate or make_schedule(config), config.adamw

    def clip(
        updates: optax.Updates, state: optax.OptState, params: optax.Params = None, *, norm: jax.Array, **_: object
    ) -> tuple[optax.Updates, optax.OptState]:
        factor = jnp.minimum(1.0, adamw.clip_norm / norm)
        return jax.tree.map(lambda update: update * factor, updates), state

    def scale_by_rate(
        updates: optax.Updates, state: optax.OptState, params: optax.Params = None, *, step: jax.Array, **_: object
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(lambda update: -rate(step) * update, updates), state

    chain = optax.chain(
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), clip),
        # The root of a second moment is no larger than a gradient, and that is no larger than its clipped norm.
        store_moments(
            optax.scale_by_adam(b1=adamw.beta1, b2=adamw.beta2, eps=adamw.eps), adamw.moments, adamw.clip_norm
        ),
        optax.add_decayed_weights(adamw.weight_decay, decay_mask),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale_by_rate),
    )
    if config.merging is None:
        return chain
    return online_merging(chain, tau, **dataclasses.asdict(config.merging))
