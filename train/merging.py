"""The online merging optimiser (Lu et al. 2024, arXiv:2405.17931): each update is merged with the SFT model's own.

With tau = theta_SFT - theta_base, fixed, and the update d of any inner optimiser, a step is theta += F(d) (+) F(tau). F
drops most of a tensor and (+) adds up what is left, weighted by 1 - alpha and alpha. It keeps preference training near
what the SFT model has learned.

* OnDARE (equations 3 and 4): F keeps each number with probability p; (+) is the sum.
* OnTIES (equations 5 to 7): F keeps the fraction p of largest magnitude of each tensor; where the two signs differ, (+)
  keeps only one of the two.

alpha x tau is about 1e-10, far below the spacing of float32 weights, so the merged update is summed first and added to
the weights once; the weights must be float32.
"""

import dataclasses
import math
import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qwen_jax.errors import InputError
from train.fields import at_least

Mode = Literal["dare", "ties"]
Rescale = Literal["inverse_p", "none", "l1"]
TauMask = Literal["fixed", "resample"]
Consensus = Literal["weighted", "unweighted"]


@dataclasses.dataclass(frozen=True)
class Merging:
    """Settings of online merging. `paper` and `released` are the two published forms, which differ.

    Attributes:
      alpha: weight of tau; that of the inner update is 1 - alpha. It is not portable between values of `rescale`.
      p: fraction that F keeps of a tensor.
      mode: "dare" keeps numbers at random, "ties" those of largest magnitude.
      rescale: what F multiplies the kept numbers by: "inverse_p" 1/p, so that DARE is unbiased; "l1" what restores the
        sum of magnitudes of the tensor; "none" nothing.
      tau_mask: "fixed" draws the mask of tau once; "resample" in each merge. TIES has only one.
      consensus: of "ties". "weighted" is equation 7: the larger of (1 - alpha) F(d) and alpha F(tau) wins. "unweighted"
        compares signs with that of F(d) + F(tau), as the released code does: an inner update that opposes a larger
        number of F(tau) is dropped.
      merge_every: merge every so many steps, with the sum of the updates since the last merge (algorithm 2).
      clip: the numbers of F(tau) are limited to this magnitude; None does not limit them.
      seed: of the masks.
      tau_dtype: that tau is stored in. bfloat16 halves its memory and rounds it by 2^-9.

    Raises:
      InputError: a value out of range.
    """

    alpha: float = 1e-7
    p: float = 0.01
    mode: Mode = "dare"
    rescale: Rescale = "inverse_p"
    tau_mask: TauMask = "fixed"
    consensus: Consensus = "weighted"
    merge_every: int = 1
    clip: float | None = None
    seed: int = 0
    tau_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        at_least(self, merge_every=1)
        if not 0 <= self.alpha <= 1 or not 0 < self.p <= 1:
            raise InputError(
                f"Online merging needs alpha from 0 to 1 and p above 0 and at most 1, got {self.alpha} and {self.p}."
            )
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip of online merging must be positive, got {self.clip}.")
        for name, allowed in (
            ("mode", ("dare", "ties")),
            ("rescale", ("inverse_p", "none", "l1")),
            ("tau_mask", ("fixed", "resample")),
            ("consensus", ("weighted", "unweighted")),
            ("tau_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} of online merging must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )

    @classmethod
    def paper(cls, mode: Mode = "dare", **changes: Any) -> "Merging":
        """Equations 3 to 7 as they stand: nothing is rescaled, both masks are drawn in each merge.

        Args:
          mode: "dare" or "ties".
          **changes: other attributes.
        """
        return dataclasses.replace(cls(mode=mode, rescale="none", tau_mask="resample"), **changes)

    @classmethod
    def released(cls, mode: Mode = "dare", **changes: Any) -> "Merging":
        """What the authors' code computes (github.com/QwenLM/online_merging_optimizers) with `online_step=1`.

        DARE is PyTorch's dropout, which multiplies by 1/p, with one mask for tau, limited to +-1. TIES compares signs
        without weights. Its script uses alpha 1e-7 and p 0.01. That code applies weight decay after the merge; here it
        is a part of the inner update.

        Args:
          mode: "dare" or "ties".
          **changes: other attributes.
        """
        if mode == "dare":
            return dataclasses.replace(cls(mode="dare", clip=1.0), **changes)
        return dataclasses.replace(cls(mode="ties", rescale="none", consensus="unweighted"), **changes)


class MergingState(NamedTuple):
    """State of `online_merging`.

    Attributes:
      inner: of the inner optimiser.
      steps: int32 scalar, accepted steps; masks depend on it.
      tau: in the tree and the shardings of the weights; F(tau) if its mask is fixed.
      since_merge: summed updates since the last merge, as the weights; None if every step merges.
    """

    inner: optax.OptState
    steps: jax.Array
    tau: optax.Params
    since_merge: optax.Params | None


def online_merging(
    inner: optax.GradientTransformation,
    tau: optax.Params | None,
    *,
    alpha: float,
    p: float,
    mode: Mode = "dare",
    rescale: Rescale = "inverse_p",
    tau_mask: TauMask = "fixed",
    consensus: Consensus = "weighted",
    merge_every: int = 1,
    clip: float | None = None,
    seed: int = 0,
    tau_dtype: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Merges the updates of an optimiser with tau; see `Merging` for the settings.

    With p = 1 and alpha = 0 (and weighted consensus) the updates are those of the inner optimiser, bit for bit.

    Args:
      inner: the optimiser, with its learning rate: its updates are added to the weights.
      tau: theta_SFT - theta_base, in the tree of the weights. None leaves it at 0, as a target to restore a state to.
      alpha, p, mode, rescale, tau_mask, consensus, merge_every, clip, seed, tau_dtype: as in `Merging`.

    Returns:
      A transformation whose updates are float32. It passes further arguments of `update` to the inner optimiser.

    Raises:
      InputError: a value out of range.
    """
    config = Merging(alpha, p, mode, rescale, tau_mask, consensus, merge_every, clip, seed, tau_dtype)
    optimizer = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> MergingState:
        kept = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=config.tau_dtype), params)
        if tau is not None:
            fixed = tau if config.tau_mask == "resample" else _masked_tau(config, tau, None)
            kept = jax.tree.map(lambda x: x.astype(config.tau_dtype), fixed)
        since = None
        if config.merge_every > 1:
            since = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), params)
        return MergingState(optimizer.init(params), jnp.zeros((), jnp.int32), kept, since)

    def update(
        updates: optax.Updates, state: MergingState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, MergingState]:
        delta, inner_state = optimizer.update(updates, state.inner, params, **extra)
        steps, since = state.steps + 1, state.since_merge
        if _is_identity(config):
            return delta, MergingState(inner_state, steps, state.tau, since)
        if since is None:
            merged = _merge(config, delta, state.tau, state.steps)
            return merged, MergingState(inner_state, steps, state.tau, None)

        # The weights have the updates since the last merge already: a merge replaces them by the merged sum.
        def replace(delta: optax.Updates, total: optax.Updates) -> tuple[optax.Updates, optax.Updates]:
            merged = _merge(config, total, state.tau, state.steps)
            return jax.tree.map(lambda d, m, t: d + (m - t), delta, merged, total), jax.tree.map(jnp.zeros_like, total)

        due = steps % config.merge_every == 0
        delta, since = lax.cond(due, replace, lambda *kept: kept, delta, jax.tree.map(jnp.add, since, delta))
        return delta, MergingState(inner_state, steps, state.tau, since)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_identity(config: Merging) -> bool:
    unweighted = config.mode == "ties" and config.consensus == "unweighted"
    return config.p == 1 and config.alpha == 0 and not unweighted


def _merge(config: Merging, delta: optax.Updates, tau: optax.Params, count: jax.Array) -> optax.Updates:
    """F(delta) (+) F(tau), float32."""
    if config.tau_mask == "resample":
        tau = _masked_tau(config, tau, count)

    def merge(path: Any, delta: jax.Array, tau: jax.Array) -> jax.Array:
        d = _keep(config, path, "delta", delta.astype(jnp.float32), count)
        t = tau.astype(jnp.float32)
        a, b = (1 - config.alpha) * d, config.alpha * t
        if config.mode == "dare":
            return a + b
        if config.consensus == "unweighted":
            positive = d + t >= 0
            return jnp.where((d > 0) == positive, a, 0.0) + jnp.where((t > 0) == positive, b, 0.0)
        larger = jnp.where(jnp.abs(a) >= jnp.abs(b), a, b)
        return jnp.where(jnp.sign(a) * jnp.sign(b) < 0, larger, a + b)

    with jax.named_scope("merging"):
        return jax.tree_util.tree_map_with_path(merge, delta, tau)


def _masked_tau(config: Merging, tau: optax.Params, count: jax.Array | None) -> optax.Params:
    """F(tau), float32; with the mask of a step, or with the fixed one."""

    def mask(path: Any, tau: jax.Array) -> jax.Array:
        kept = _keep(config, path, "tau", tau.astype(jnp.float32), count)
        return kept if config.clip is None else jnp.clip(kept, -config.clip, config.clip)

    return jax.tree_util.tree_map_with_path(mask, tau)


def _keep(config: Merging, path: Any, stream: str, x: jax.Array, count: jax.Array | None) -> jax.Array:
    """F: a part of each tensor, rescaled.

    Args:
      config: settings.
      path: of the weight in the tree.
      stream: masks of other streams are independent.
      x: float32; one weight, or those of all layers with a leading axis.
      count: of the step; None for a mask that no step has.
    """
    if config.p == 1:
        return x
    stack = _stack_axes(path)
    if config.mode == "dare":
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(f"{stream} {name}".encode()))
        key = jax.random.fold_in(key, 0 if count is None else count + 1)
        kept = jnp.where(uniform_like(key, x, layers=stack > 0) < config.p, x, 0.0)
    else:
        kept = jnp.where(_largest(x, config.p, stack), x, 0.0)
    if config.rescale == "inverse_p":
        return kept / config.p
    if config.rescale == "l1":
        axes = tuple(range(stack, x.ndim))
        before, after = (jnp.abs(y).sum(axes, keepdims=True) for y in (x, kept))
        return kept * jnp.where(after > 0, before / jnp.maximum(after, jnp.finfo(jnp.float32).tiny), 1.0)
    return kept


def _stack_axes(path: Any) -> int:
    """Leading axes of a parameter that count tensors: layers, and experts with gate and up."""
    names = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    if names[:1] != ["layers"]:
        return 0
    return {"gate_up": 3, "down": 2}.get(names[-1], 1) if "experts" in names else 1


def uniform_like(key: jax.Array, x: jax.Array, layers: bool) -> jax.Array:
    """Uniform numbers from 0 to 1 in the shape and the sharding of x. They do not depend on the sharding."""
    sharding: Any = jax.typeof(x).sharding

    def draw(key: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, out_sharding=None if sharding.mesh.empty else jax.P(*spec))

    if not layers:
        return draw(key, x.shape, sharding.spec)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(x.shape[0]))
    return jax.vmap(lambda key: draw(key, x.shape[1:], sharding.spec[1:]))(keys)


# Bits of a float32 that one pass of `_largest` decides.
_DIGIT = 4


def _largest(x: jax.Array, p: float, stack: int) -> jax.Array:
    """True for the floor(p n) numbers of largest magnitude, at least one, of each tensor of n numbers.

    The threshold is the magnitude of the last number that is kept: magnitudes are ordered as their bits are, and each
    pass over the tensor decides four bits of the threshold by counting. There is no sort, and shards exchange only
    counts. It is exact: more are kept only where others have exactly the magnitude of the last one.

    Args:
      x: float32.
      p: fraction to keep.
      stack: leading axes that count tensors.
    """
    axes = tuple(range(stack, x.ndim))
    wanted = max(1, int(p * math.prod(x.shape[stack:])))
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    digits = jnp.arange(1, 2**_DIGIT, dtype=jnp.uint32)
    threshold = jnp.zeros((1,) * x.ndim, jnp.uint32)
    for shift in reversed(range(0, 32, _DIGIT)):
        candidates = threshold[..., None] + (digits << shift)
        counts = (bits[..., None] >= candidates).sum(axes, keepdims=True, dtype=jnp.uint32)
        digit = (counts >= wanted).sum(-1, dtype=jnp.uint32)
        threshold = threshold + (digit << shift)
    return bits >= threshold
