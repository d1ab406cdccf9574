"""Policy optimisation as published: settings of GRPO, advantages of groups, the clipped loss, estimators of the KL.

Functions on arrays, without a model; `train.grpo` applies them to packed rows. Advantages are in NumPy: they are
computed on the host, from rewards.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import InputError
from train.fields import at_least
from train.moe import MoETraining

Scale = Literal["group", "none", "batch"]
Aggregation = Literal["sequence-mean-token-mean", "token-mean", "constant"]
_CHOICES = {
    "scale": ("group", "none", "batch"),
    "aggregation": ("sequence-mean-token-mean", "token-mean", "constant"),
    "ratio": ("token", "sequence"),
    "old": ("current", "trainer", "sampler"),
    "kl": ("k3", "k2", "k3-weighted"),
}
# Rewards of a group that differ by less than this part of their size are equal.
_EQUAL = 1e-6


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Settings of GRPO (Shao et al. 2024, arXiv:2402.03300) and of its descendants.

    The loss of a token with advantage A and ratio r of the policy to the old policy is

        w (-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight KL)

    where w is the importance weight, 1 unless it is asked for.

    Attributes:
      scale: what the advantages of a group are divided by, after its mean is subtracted; see `group_advantages`.
      epsilon: is added to that standard deviation.
      aggregation: of tokens. "sequence-mean-token-mean": the mean over a sequence's tokens, then over sequences
        (DeepSeekMath). "token-mean": the mean over all tokens (DAPO, Yu et al. 2025, arXiv:2503.14476). "constant": the
        sum over a sequence's tokens divided by `constant`, then the mean over sequences (Dr. GRPO, Liu et al. 2025,
        arXiv:2503.20783). Means are over the global batch.
      constant: tokens; of aggregation "constant", such as the most tokens that a response may have.
      ratio: "token", or "sequence": the geometric mean of a sequence's ratios (GSPO, Zheng et al. 2025,
        arXiv:2507.18071), whose clips are of about 3e-4.
      old: whose log-probabilities the ratio divides by. "current": those of the policy itself, without gradient, for
        one step on each batch; the ratio is 1 and never clipped. "trainer": `RolloutBatch.old_BT`, which
        `train.grpo.make_log_prob_pass` computes before the first of several steps. "sampler": `sampler_BT`.
      clip_low, clip_high: how far below and above 1 the ratio may go before its gradient is cut.
      dual_clip: a bound c above 1 of the loss of negative advantages, at -c A (Ye et al. 2020, arXiv:1912.09729).
      kl_weight: coefficient of the KL divergence from the reference; 0 needs no reference.
      kl: its estimator, see `kl_estimates`. In expectation the gradient of "k3" is that of KL(reference | policy). For
        "k2" and for "k3-weighted" it is that of KL(policy | reference). "k1" is refused: its gradient is 0.
      importance_cap: C of truncated importance sampling: the loss of a token has the weight w = min(p / q, C), where q
        is the sampler's probability of the token and p that of the old policy. It corrects for rollouts by older
        weights.
      importance_mask: sequences whose product of p / q is above this carry no gradient. They count in denominators.
      mask_unfinished: leave out responses that were cut by a length, of denominators too.
      overlong_tokens: length of the interval before the longest length in which `overlong_penalty` falls from 0 to
        its lowest; 0 is no penalty.
      overlong_weight: the largest penalty.
      temperature: divides logits before the softmax; that of the sampler.
      max_segments: sequences in a row, at most.
      loss_chunk: tokens of one device whose logits exist at one time.
      moe: for a model with experts.

    Raises:
      InputError: a value out of range, or values that contradict each other.
    """

    scale: Scale = "group"
    epsilon: float = 1e-6
    aggregation: Aggregation = "sequence-mean-token-mean"
    constant: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    old: Literal["current", "trainer", "sampler"] = "current"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_weight: float = 0.04
    kl: Literal["k3", "k2", "k3-weighted"] = "k3"
    importance_cap: float | None = None
    importance_mask: float | None = None
    mask_unfinished: bool = False
    overlong_tokens: int = 0
    overlong_weight: float = 1.0
    temperature: float = 1.0
    max_segments: int = 64
    loss_chunk: int = 2048
    moe: MoETraining = MoETraining()

    def __post_init__(self) -> None:
        at_least(self, overlong_tokens=0, max_segments=1, loss_chunk=1)
        if self.kl == "k1":
            raise InputError(
                "kl='k1' is no loss: its gradient is 0 in expectation, so it regularises nothing. Use k3, k2 or "
                "k3-weighted; k1 is among the metrics in any case."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("epsilon", "kl_weight"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}.")
        positive = "clip_low", "clip_high", "overlong_weight", "temperature", "constant", "importance_cap"
        for name in (*positive, "importance_mask"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be positive, got {value}.")
        if self.clip_low > 1:
            raise InputError(f"clip_low must be at most 1, since a ratio is never below 0; got {self.clip_low}.")
        if self.dual_clip is not None and not (self.dual_clip > 1 and math.isfinite(self.dual_clip)):
            raise InputError(f"dual_clip must be above 1, got {self.dual_clip}.")
        if (self.aggregation == "constant") != (self.constant is not None):
            raise InputError(
                f"constant is the divisor of aggregation='constant', and of no other; got {self.constant} for "
                f"{self.aggregation!r}."
            )
        if self.old == "sampler" and self.corrected:
            raise InputError(
                "old='sampler' makes the ratio that of the policy to the sampler, so there is no importance weight. "
                "Leave importance_cap and importance_mask out, or use old='current' or 'trainer'."
            )

    @property
    def corrected(self) -> bool:
        """Whether the loss has importance weights."""
        return self.importance_cap is not None or self.importance_mask is not None

    @property
    def by_sequence(self) -> bool:
        """Whether the loss of a token depends on the other tokens of its sequence."""
        return self.ratio == "sequence" or self.importance_mask is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the batch must have log-probabilities of the reference."""
        return self.kl_weight > 0


def group_advantages(rewards_QG: np.ndarray, scale: Scale = "group", epsilon: float = 1e-6) -> np.ndarray:
    """Advantages of the responses to each query: rewards less the mean of their group, over a standard deviation.

    "group": of the group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2). "batch": of the rewards of the whole
    batch. "none": they are not divided (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). Standard deviations have Bessel's
    correction.

    Args:
      rewards_QG: of each response, a group a query; NaN is no signal, and is left out of means and deviations.
      scale: what they are divided by.
      epsilon: is added to the standard deviation.

    Returns:
      Float32 [Q, G]; 0 without a signal, and in groups whose rewards are all equal or of which only one is known.

    Raises:
      InputError: groups of one response, or an infinite reward.
    """
    known, total, varied = _groups(rewards_QG)
    rewards = np.where(known, total, 0.0)
    count_Q1 = np.maximum(known.sum(1, keepdims=True), 1)
    centred = np.where(known & varied[:, None], rewards - rewards.sum(1, keepdims=True) / count_Q1, 0.0)
    if scale == "group":
        deviation = np.sqrt((centred**2).sum(1, keepdims=True) / np.maximum(count_Q1 - 1, 1))
    elif scale == "batch":
        deviation = np.array(rewards[known].std(ddof=1) if known.sum() > 1 else 0.0)
    else:
        return centred.astype(np.float32)
    divisor = deviation + epsilon
    return np.divide(centred, divisor, out=np.zeros_like(centred), where=divisor > 0).astype(np.float32)


def varied_groups(rewards_QG: np.ndarray) -> np.ndarray:
    """Whether the known rewards of each group differ: the other groups have no gradient but that of the KL.

    Args:
      rewards_QG: as for `group_advantages`, which has the same tolerance.

    Returns:
      Bool [Q].

    Raises:
      InputError: groups of one response, or an infinite reward.
    """
    return _groups(rewards_QG)[2]


def _groups(rewards_QG: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rewards are known [Q, G], the rewards in float64 [Q, G], and which groups differ in theirs [Q]."""
    rewards = np.asarray(rewards_QG, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise InputError(
            f"Advantages compare responses to the same query: expected rewards [queries, group size] with a group "
            f"size of at least 2, got shape {rewards.shape}."
        )
    if np.isinf(rewards).any():
        q, g = np.argwhere(np.isinf(rewards))[0]
        raise InputError(f"The reward of response {g} of query {q} is {rewards[q, g]}; expected a finite number.")
    known = ~np.isnan(rewards)
    spread_Q = np.where(known, rewards, -np.inf).max(1) - np.where(known, rewards, np.inf).min(1)
    size_Q = np.abs(np.where(known, rewards, 0.0)).max(1)
    return known, rewards, spread_Q > _EQUAL * size_Q  # Where nothing is known, the spread is minus infinity.


class Clipped(NamedTuple):
    """Where a clip holds the loss of a token, bool: the ratio is too low, too high, or the dual clip bounds it."""

    low: jax.Array
    high: jax.Array
    dual: jax.Array


def clipped_policy_loss(
    log_ratio: jax.Array,
    advantages: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[jax.Array, Clipped]:
    """The clipped surrogate loss, for each token.

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): Schulman et al. 2017, arXiv:1707.06347, equation 7; with two
    bounds, Yu et al. 2025, arXiv:2503.14476. With a dual clip c it is at most -c A where A is negative (Ye et al. 2020,
    arXiv:1912.09729).

    Args:
      log_ratio: float32, log of the ratio r of the policy to the old policy.
      advantages: A, in the same shape.
      clip_low, clip_high: how far r may go.
      dual_clip: c, above 1, or None.

    Returns:
      Losses in the same shape, and where they are clipped.
    """
    ratio = jnp.exp(log_ratio)
    loss = jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    dual = jnp.zeros(loss.shape, bool)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        dual = (advantages < 0) & (loss > bound)
        loss = jnp.where(dual, bound, loss)
    low, high = (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)
    return loss, Clipped(low, high, dual)


class KL(NamedTuple):
    """Estimates of the KL divergence of the policy from the reference, one a token."""

    k1: jax.Array
    k2: jax.Array
    k3: jax.Array


def kl_estimates(log_probs: jax.Array, reference: jax.Array) -> KL:
    """Estimators of KL(policy | reference) from samples of the policy (Schulman 2020, "Approximating KL Divergence").

    With d the log-probability under the reference less that under the policy: k1 = -d, k2 = d^2 / 2, and
    k3 = e^d - d - 1. As losses they differ. The gradient of k1 is 0 in expectation; that of k2 is the gradient of
    KL(policy | reference), and that of k3 is the gradient of KL(reference | policy).

    Args:
      log_probs: float32 log-probabilities of tokens under the policy that sampled them.
      reference: under the reference, in the same shape.
    """
    d = reference - log_probs
    return KL(-d, jnp.square(d) / 2, jnp.expm1(d) - d)


def kl_loss(kl: KL, log_ratio: jax.Array, kind: Literal["k3", "k2", "k3-weighted"] = "k3") -> jax.Array:
    """The KL term of the loss, for each token.

    Args:
      kl: from `kl_estimates`.
      log_ratio: of the token under the policy to that under the old policy; differentiated for "k3-weighted".
      kind: "k3-weighted" is k3 times the ratio, so that also the change of what is sampled has its gradient.
    """
    if kind == "k2":
        return kl.k2
    return kl.k3 if kind == "k3" else jnp.exp(log_ratio) * kl.k3


def overlong_penalty(length: int | np.ndarray, longest: int, config: GrpoConfig) -> np.ndarray:
    """What is added to the reward of a long response (soft overlong punishment of Yu et al. 2025, arXiv:2503.14476).

    It falls linearly over the last `overlong_tokens` tokens before the longest length, from 0 to -`overlong_weight`.

    Args:
      length: of responses, in tokens that the policy sampled.
      longest: the most tokens that a response may have.
      config: `overlong_tokens` and `overlong_weight` of it.

    Returns:
      Float32, at most 0, in the shape of `length`.

    Raises:
      InputError: the interval is longer than the longest response.
    """
    if config.overlong_tokens > longest:
        raise InputError(
            f"overlong_tokens must be at most the {longest} tokens of the longest response, got "
            f"{config.overlong_tokens}."
        )
    over = np.maximum(np.asarray(length) - (longest - config.overlong_tokens), 0)
    share = np.minimum(over / max(config.overlong_tokens, 1), 1.0) if config.overlong_tokens else over * 0.0
    return np.asarray(0.0 - config.overlong_weight * share, np.float32)
