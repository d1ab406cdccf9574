"""The dense model that an MoE equals, and the MoE models that equal a dense one."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq

from qwen_jax.errors import InputError
from train.scaling.moe import MoeLaw, one_run, percentiles

# Factor around the active size within which a dense equivalent is looked for.
_FAR = 1e4


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """An MoE model and the dense model of the same loss after the same tokens.

    Attributes:
      active: parameters of the MoE that a token uses.
      total: its parameters; NaN for the forms `bilinear` and `saturated`, which know experts only.
      experts: of an MoE layer; NaN for the other forms.
      tokens: training tokens of both.
      loss: of both.
      dense: parameters of the dense model, N_eff.
      warnings: quantities outside the range of the fit.
    """

    active: float
    total: float
    experts: float
    tokens: float
    loss: float
    dense: float
    warnings: list[str]

    @property
    def leverage(self) -> float:
        """Efficiency leverage, N_eff / active: how many times fewer operations a token than the dense model."""
        return self.dense / self.active


def counts_experts(law: MoeLaw) -> bool:
    """Whether the law knows an MoE by its experts, not by its total size."""
    return law.form in ("bilinear", "saturated")


def dense_equivalent(
    law: MoeLaw,
    active: float,
    tokens: float,
    *,
    total: float | None = None,
    experts: float | None = None,
    granularity: float | None = None,
) -> Equivalent:
    """The dense size N_eff with L_dense(N_eff, D) = L_moe(N_act, N_tot, D).

    Args:
      law: a fitted law.
      active: parameters of the MoE that a token uses.
      tokens: training tokens.
      total: its parameters; needed by all forms but `bilinear` and `saturated`.
      experts: of an MoE layer; needed by those two.
      granularity: size of the dense feed-forward layer / size of an expert; 1 where nothing is said.

    Raises:
      InputError: a needed argument is missing, or no dense model reaches the loss.
    """
    given = {"active": active, "tokens": tokens, "total": total, "experts": experts, "granularity": granularity}
    for name, number in given.items():
        if number is not None and not (number > 0 and np.isfinite(number)):
            raise InputError(f"Expected a positive number for {name}, got {number:g}.")
    by_experts = counts_experts(law)
    if by_experts and experts is None:
        raise InputError(f"The form {law.form} needs the number of experts.")
    if not by_experts and total is None:
        raise InputError(f"The form {law.form} needs the total number of parameters.")
    if total is not None and total < active:
        raise InputError(f"Expected total parameters of at least the {active:.4g} active ones, got {total:.4g}.")
    size = active if total is None else total
    run = one_run(active, size, tokens, experts, granularity)
    loss = float(law.loss(run)[0])
    found = {"active": active, "tokens": tokens}
    if by_experts:
        found["experts"] = float(experts or 1)
    else:
        found |= {"total": size, "ratio": size / active}
    if granularity is not None:
        found["granularity"] = granularity
    warnings = []
    for name, value in found.items():
        low, high = law.ranges[name]
        if not low * 0.98 <= value <= high * 1.02:
            warnings.append(f"{name} {value:.4g} is outside the fit's {low:.4g} to {high:.4g}")

    def excess(log_size: float) -> float:
        return law.dense_loss(float(np.exp(log_size)), tokens) - loss

    low, high = np.log(active / _FAR), np.log(active * _FAR)
    if not excess(low) > 0 > excess(high):
        raise InputError(
            f"No dense model within a factor {_FAR:.0e} of {active:.4g} parameters reaches loss {loss:.4f} after "
            f"{tokens:.4g} tokens by this law. The MoE is too far outside the range of the fit."
        )
    dense = float(np.exp(brentq(excess, low, high, xtol=1e-10)))
    nan = float("nan")
    return Equivalent(active, nan if by_experts else size, found.get("experts", nan), tokens, loss, dense, warnings)


def equivalent_interval(
    law: MoeLaw, one: Equivalent, granularity: float | None = None, level: float = 0.9
) -> tuple[float, float]:
    """Percentile interval of `dense`; NaN without a bootstrap. Samples without an equivalent count as infinite."""
    sizes = []
    for sample in law.samples():
        try:
            total = None if counts_experts(law) else one.total
            experts = one.experts if counts_experts(law) else None
            found = dense_equivalent(
                sample, one.active, one.tokens, total=total, experts=experts, granularity=granularity
            )
            sizes.append(found.dense)
        except InputError:
            sizes.append(np.inf)
    if not sizes:
        return float("nan"), float("nan")
    return percentiles(sizes, level)


def equal_to_dense(
    law: MoeLaw,
    dense: float,
    tokens: float,
    ratios: Sequence[float] = (2, 4, 8, 16, 32),
    granularity: float | None = None,
) -> list[Equivalent]:
    """The MoE models that equal a dense one: for each ratio, the active size with N_eff = `dense`.

    Args:
      law: a fitted law.
      dense: parameters of the dense model.
      tokens: training tokens of both.
      ratios: total / active parameters of each answer; for `bilinear` and `saturated`, numbers of experts.
      granularity: of the MoE.

    Returns:
      One model for each ratio that has one, in the order of `ratios`.
    """
    answers = []
    target = law.dense_loss(dense, tokens)
    for ratio in ratios:

        def excess(log_active: float, ratio: float = ratio) -> float:
            active = float(np.exp(log_active))
            total, experts = (active, ratio) if counts_experts(law) else (ratio * active, None)
            return float(law.loss(one_run(active, total, tokens, experts, granularity))[0]) - target

        low, high = np.log(dense / _FAR), np.log(dense * _FAR)
        if not excess(low) > 0 > excess(high):
            continue
        active = float(np.exp(brentq(excess, low, high, xtol=1e-10)))
        total, experts = (None, ratio) if counts_experts(law) else (ratio * active, None)
        answers.append(dense_equivalent(law, active, tokens, total=total, experts=experts, granularity=granularity))
    return answers
