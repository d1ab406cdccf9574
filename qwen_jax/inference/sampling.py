"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty; no sort of the vocabulary."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError

# Candidates that are kept when top_k is at most this many; beyond it the whole vocabulary is weighed.
TOP_K_CAP = 32
_GROUP = 32
_LOWEST = -float("inf")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The order of operations is Hugging Face's.

    Attributes:
      temperature: divides the logits; 0 means greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
      min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens that have occurred (Keskar et al.
        2019, arXiv:1909.05858, section 4.1); 1 is none.
      seed: of the random numbers. Row i of a batch uses seed + i, whatever else is in the batch.
      logprobs: also return each chosen token's log-probability under the model (temperature 1, no filters).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {expected}, got {getattr(self, name)}.")

        # Beyond these a float32 logit over the temperature overflows, or is lost.
        need(self.temperature == 0 or 1e-5 <= self.temperature <= 1e5, "temperature", "0 (greedy) or in [1e-5, 1e5]")
        need(self.top_k >= 0, "top_k", "0 (off) or a positive integer")
        need(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        need(self.repetition_penalty > 0, "repetition_penalty", "positive (1 is none)")
        need(0 <= self.seed < 2**32, "seed", "in [0, 2**32)")

    @property
    def plan(self) -> "Plan":
        """What has to be compiled for these parameters."""
        mode: Literal["greedy", "top_k", "full"] = "full"
        if self.temperature == 0:
            mode = "greedy"
        elif 0 < self.top_k <= TOP_K_CAP:
            mode = "top_k"
        return Plan(mode, penalty=self.repetition_penalty != 1.0, logprobs=self.logprobs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of sampling: parameters that agree on it share one compiled program."""

    mode: Literal["greedy", "top_k", "full"]
    penalty: bool
    logprobs: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """The numbers of `SamplingParams`, as arrays: changing them compiles nothing."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array

    @classmethod
    def of(cls, params: SamplingParams) -> "Knobs":
        return cls(
            temperature=jnp.float32(params.temperature or 1.0),
            top_k=jnp.int32(params.top_k or 2**31 - 1),
            # Above any sum of probabilities, so that rounding never drops a token when everything is to be kept.
            top_p=jnp.float32(params.top_p if params.top_p < 1 else 2.0),
            min_p=jnp.float32(params.min_p),
            repetition_penalty=jnp.float32(params.repetition_penalty),
        )


def sample(
    logits_BV: jax.Array,
    seen_BV: jax.Array | None,
    keys_B: jax.Array,
    step: jax.Array,
    knobs: Knobs,
    plan: Plan,
    vocab_limit: int,
) -> tuple[jax.Array, jax.Array | None]:
    """Chooses one token a row.

    Args:
      logits_BV: float32.
      seen_BV: bool, tokens that the penalty applies to; needed if the plan has one.
      keys_B: one PRNG key a row.
      step: int32, how many tokens were chosen before; with the row's key it fixes the random numbers.
      knobs, plan: what to do.
      vocab_limit: ids from here on are padding of the embedding and are never chosen.

    Returns:
      int32 [B] tokens, and float32 [B] log-probabilities if the plan asks for them.
    """
    with jax.named_scope("sample"):
        raw_BV = logits_BV
        V = logits_BV.shape[1]
        if vocab_limit < V:
            logits_BV = jnp.where(jnp.arange(V) < vocab_limit, logits_BV, _LOWEST)
        if plan.penalty:
            if seen_BV is None:
                raise ValueError("A repetition penalty needs seen_BV.")
            p = knobs.repetition_penalty
            penalised = jnp.where(logits_BV > 0, logits_BV / p, logits_BV * p)
            logits_BV = jnp.where(seen_BV, penalised, logits_BV)
        if plan.mode == "greedy":
            token_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
        else:
            draw_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            choose = _among_top_k if plan.mode == "top_k" else _among_all
            token_B = choose(logits_BV / knobs.temperature, draw_keys_B, knobs)
        if not plan.logprobs:
            return token_B, None
        chosen_B = jnp.take_along_axis(raw_BV, token_B[:, None], axis=1)[:, 0]
        return token_B, chosen_B - jax.nn.logsumexp(raw_BV, axis=1)


def top_k(x_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of each row, largest first, and their indices.

    The k largest entries lie in the k groups with the largest maxima, so only those groups are sorted.
    """
    B, V = x_BV.shape
    if max(4 * k, 1024) >= V:
        return jax.lax.top_k(x_BV, min(k, V))
    groups = -(-V // _GROUP)
    x_BGg = jnp.pad(x_BV, ((0, 0), (0, groups * _GROUP - V)), constant_values=_LOWEST).reshape(B, groups, _GROUP)
    _, best_Bk = top_k(x_BGg.max(axis=2), k)
    candidates = jnp.take_along_axis(x_BGg, best_Bk[:, :, None], axis=1).reshape(B, k * _GROUP)
    values_Bk, at_Bk = jax.lax.top_k(candidates, k)
    group_Bk = jnp.take_along_axis(best_Bk, at_Bk // _GROUP, axis=1)
    return values_Bk, group_Bk * _GROUP + at_Bk % _GROUP


def _among_top_k(logits_BV: jax.Array, keys_B: jax.Array, knobs: Knobs) -> jax.Array:
    """Samples where top_k is small: everything happens among the candidates, largest first."""
    values, ids = top_k(logits_BV, TOP_K_CAP)
    k = jnp.minimum(knobs.top_k, values.shape[1])
    kth = jnp.take_along_axis(values, jnp.full((values.shape[0], 1), k - 1), axis=1)
    values = jnp.where(values >= kth, values, _LOWEST)
    probs = jax.nn.softmax(values, axis=1)
    # What stands before each candidate. A masked sum is one small kernel, a cumulative sum is several.
    before = jnp.tri(probs.shape[1], k=-1, dtype=bool)
    larger = jnp.where(before, probs[:, None, :], 0.0).sum(axis=2)
    keep = (larger < knobs.top_p) & (probs >= knobs.min_p * probs[:, :1])
    return _draw(jnp.where(keep, values, _LOWEST), keys_B, ids)


def _among_all(logits_BV: jax.Array, keys_B: jax.Array, knobs: Knobs) -> jax.Array:
    """Samples over the whole vocabulary. Filters are thresholds on the logit, found by bisection on its bits."""
    order = _ordered_bits(logits_BV)
    in_top_k = order >= _threshold(order, jnp.ones_like(logits_BV), jnp.minimum(knobs.top_k, logits_BV.shape[1]))
    logits_BV = jnp.where(in_top_k, logits_BV, _LOWEST)
    probs = jax.nn.softmax(logits_BV, axis=1)
    in_nucleus = order >= _threshold(order, probs, knobs.top_p)
    keep = in_nucleus & (probs >= knobs.min_p * probs.max(axis=1, keepdims=True))
    # The likeliest token always stays, whatever rounding did to the sums.
    keep |= probs == probs.max(axis=1, keepdims=True)
    return _draw(jnp.where(keep, logits_BV, _LOWEST), keys_B, None)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that order as the float32 do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order_BV: jax.Array, mass_BV: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest threshold t, [B, 1], such that the entries with order >= t have at least the wanted mass.

    Finds four bits of t in each of eight passes. If all the mass is less than wanted, t is 0.
    """
    nibbles = jnp.arange(16, dtype=jnp.uint32)

    def find(i: jax.Array, t_B1: jax.Array) -> jax.Array:
        shift = jnp.uint32(28) - 4 * i.astype(jnp.uint32)
        tries_B16 = t_B1 | (nibbles << shift)
        reached = jnp.stack(
            [jnp.sum(jnp.where(order_BV >= tries_B16[:, n, None], mass_BV, 0), axis=1) >= wanted for n in range(16)],
            axis=1,
        )
        # The first try keeps the bits found so far, which did reach it (or nothing does).
        best = jnp.maximum(jnp.sum(reached, axis=1, keepdims=True) - 1, 0).astype(jnp.uint32)
        return t_B1 | (best << shift)

    zeros = jnp.zeros_like(order_BV[:, :1])
    return jax.lax.fori_loop(0, 8, find, zeros)


def _draw(logits_BN: jax.Array, keys_B: jax.Array, ids_BN: jax.Array | None) -> jax.Array:
    """One sample a row by the Gumbel-max trick."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_BN.shape[1:], jnp.float32))(keys_B)
    at_B = jnp.argmax(logits_BN + noise, axis=1).astype(jnp.int32)
    if ids_BN is None:
        return at_B
    return jnp.take_along_axis(ids_BN, at_B[:, None], axis=1)[:, 0].astype(jnp.int32)
