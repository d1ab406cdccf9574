"""Sampling of the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty; nothing is sorted."""

import dataclasses
import operator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.inference.vocabulary import Vocabulary

# Up to this top_k, sampling works on a list of candidates; beyond it, on the whole vocabulary.
TOP_K_CAP = 32
PENALTIES = 0.01, 100.0
"""Repetition penalties that leave float32 logits finite. The usual ones are in [1, 2]."""
NOT_FINITE = -1
"""The token of a row whose logits or log-probability are not finite."""
_LOWEST = -float("inf")
_KEEP_ALL = 2**31 - 1
WHOLE = Vocabulary()
"""A device that has all logits."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. They are applied in Hugging Face's order.

    Attributes:
      temperature: divides the logits; 0 means greedy.
      top_k: keep the k most likely tokens; 0 or -1 keeps all.
      top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all, 0 only the
        likeliest.
      min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens that have occurred (Keskar et al.
        2019, arXiv:1909.05858, section 4.1); 1 is none. In `PENALTIES`.
      seed: of the random numbers. Row i of a batch uses seed + i, whatever else is in the batch.
      logprobs: also return each sampled token's log-probability under the model (temperature 1, no filters).

    Raises:
      InputError: a value of another type, or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, as_number(getattr(self, name), name))
        for name in ("top_k", "seed"):
            object.__setattr__(self, name, as_int(getattr(self, name), name))

        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise InputError(f"{name} must be {expected}, got {getattr(self, name)}.")

        # Outside this range, a float32 logit divided by the temperature overflows or underflows.
        need(self.temperature == 0 or 1e-5 <= self.temperature <= 1e5, "temperature", "0 (greedy) or in [1e-5, 1e5]")
        need(self.top_k >= -1, "top_k", "0 or -1 (off) or a positive integer")
        need(0 <= self.top_p <= 1, "top_p", "in [0, 1]")
        need(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        least, most = PENALTIES
        need(least <= self.repetition_penalty <= most, "repetition_penalty", f"in [{least:g}, {most:g}] (1 is none)")
        need(0 <= self.seed < 2**32, "seed", "in [0, 2**32)")

    @property
    def mode(self) -> "SamplingMode":
        """The part of the parameters that is compiled into the program."""
        method: Literal["greedy", "top_k", "full"] = "full"
        if self.temperature == 0 or self.top_p == 0:
            method = "greedy"
        elif 0 < self.top_k <= TOP_K_CAP:
            method = "top_k"
        return SamplingMode(
            method,
            penalty=self.repetition_penalty != 1.0,
            logprobs=self.logprobs,
            top_k=method == "full" and 0 < self.top_k < _KEEP_ALL,
            top_p=method == "full" and self.top_p < 1,
        )


def as_int(value: object, name: str) -> int:
    """Returns an integer of Python, NumPy or JAX as an int. Raises InputError for floats, booleans and other types."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} must be an integer, got {value!r}.") from None


def as_number(value: object, name: str) -> float:
    """Returns a number of Python, NumPy or JAX as a float. Raises InputError for text, booleans and other types."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} must be a number, got {value!r}.") from None


@dataclasses.dataclass(frozen=True)
class SamplingMode:
    """The static part of sampling: parameters with the same mode share one compiled program.

    Attributes:
      method: "greedy", "top_k" (a top_k up to `TOP_K_CAP`) or "full" (the whole vocabulary).
      penalty: whether there is a repetition penalty.
      logprobs: whether log-probabilities are returned.
      top_k, top_p: whether these filters are on, for "full": each takes seconds to compile.
    """

    method: Literal["greedy", "top_k", "full"]
    penalty: bool
    logprobs: bool
    top_k: bool
    top_p: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingValues:
    """The numbers of `SamplingParams` as arrays: changing them compiles nothing.

    Scalars, or [B, 1] where each row has its own.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array

    @classmethod
    def of(cls, params: SamplingParams) -> "SamplingValues":
        top_k, numbers = numbers_of(params)
        temperature, top_p, min_p, penalty = map(jnp.float32, numbers)
        return cls(temperature, jnp.int32(top_k), top_p, min_p, penalty)


def numbers_of(params: SamplingParams) -> tuple[int, tuple[float, float, float, float]]:
    """The values of `SamplingValues`: top_k; temperature, top_p, min_p and repetition penalty."""
    top_k = min(params.top_k, _KEEP_ALL) if params.top_k > 0 else _KEEP_ALL
    # Above any sum of probabilities, so that rounding never drops a token when everything is to be kept.
    top_p = params.top_p if params.top_p < 1 else 2.0
    return top_k, (params.temperature or 1.0, top_p, params.min_p, params.repetition_penalty)


class Sampled(NamedTuple):
    """One token for each row.

    Attributes:
      token_B: int32, or `NOT_FINITE` in rows with a NaN or an infinite maximum among the logits, or with a
        log-probability that is not finite.
      logprob_B: float32 log-probabilities, if the mode asks for them.
      next_B: int32 ids to continue with: `token_B`, but an id in every row. The next step needs only this, so the check
        for finite numbers does not delay it.
    """

    token_B: jax.Array
    logprob_B: jax.Array | None
    next_B: jax.Array


def sample_token(
    logits_BV: jax.Array,
    seen_BV: jax.Array | None,
    keys_B: jax.Array,
    step: jax.Array,
    values: SamplingValues,
    mode: SamplingMode,
    vocab_limit: int,
    vocabulary: Vocabulary = WHOLE,
) -> Sampled:
    """Samples one token for each row.

    Args:
      logits_BV: float32. On a tensor axis, the part of the vocabulary that the device has.
      seen_BV: bool, tokens that the penalty applies to; needed if the mode has one. Of the same part.
      keys_B: one PRNG key for each row.
      step: int32, how many tokens were sampled before; with the row's key it determines the random numbers.
      values, mode: the sampling parameters.
      vocab_limit: ids from here on are padding of the embedding and are never sampled.
      vocabulary: which part of it the device has. The tokens do not depend on it.
    """
    with jax.named_scope("sample"):
        raw_BV = logits_BV
        logits_BV = comparable(logits_BV, vocab_limit, vocabulary)
        if mode.penalty:
            if seen_BV is None:
                raise ValueError("A repetition penalty needs seen_BV.")
            logits_BV = penalised(logits_BV, seen_BV, values.repetition_penalty)
        if mode.method == "greedy":
            token_B = vocabulary.argmax(logits_BV)
        else:
            draw_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            logits_BV = logits_BV / values.temperature
            if mode.method == "top_k":
                token_B = sample_top_k(logits_BV, draw_keys_B, values, vocabulary)
            else:
                filters = {"use_top_k": mode.top_k, "use_top_p": mode.top_p}
                token_B = sample_all(logits_BV, draw_keys_B, values, vocabulary, **filters)
        # The logit of the sampled token tells about its whole row, so nothing else of the vocabulary is read.
        (logit_B,) = vocabulary.at(token_B, raw_BV)
        if not mode.logprobs:
            return Sampled(jnp.where(jnp.isfinite(logit_B), token_B, NOT_FINITE), None, token_B)
        logprob_B = logit_B - vocabulary.logsumexp(raw_BV)
        return Sampled(jnp.where(jnp.isfinite(logprob_B), token_B, NOT_FINITE), logprob_B, token_B)


def comparable(logits_BV: jax.Array, vocab_limit: int, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """Logits with infinity for NaN, and minus infinity for ids from `vocab_limit` on.

    A NaN compares as neither larger nor smaller. As infinity it is sampled by every method, and the log-probability
    of the sampled token shows it.
    """
    v = logits_BV.shape[1]
    logits_BV = jnp.where(jnp.isnan(logits_BV), jnp.inf, logits_BV)
    if vocab_limit >= v * vocabulary.shards:
        return logits_BV
    return jnp.where(vocabulary.ids(v) < vocab_limit, logits_BV, _LOWEST)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits with the repetition penalty, a scalar or [B, 1], on the tokens of `seen_BV`."""
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def sample_top_k(
    logits_BV: jax.Array, keys_B: jax.Array, values: SamplingValues, vocabulary: Vocabulary = WHOLE
) -> jax.Array:
    """Samples where top_k is small: all filters work on the list of candidates, largest first.

    On a tensor axis each device finds the candidates of its part, and those of all devices are gathered: `TOP_K_CAP`
    numbers and ids of each.

    Args:
      logits_BV: float32, divided by the temperature.
      keys_B: one PRNG key for each row and step.
      values: with a top_k up to `TOP_K_CAP`.
      vocabulary: which part of it the device has.
    """
    logits_Bk, ids_Bk = vocabulary.top_k(logits_BV, TOP_K_CAP)
    k = jnp.minimum(values.top_k, logits_Bk.shape[1])
    kth = jnp.take_along_axis(logits_Bk, jnp.broadcast_to(k - 1, (logits_Bk.shape[0], 1)), axis=1)
    logits_Bk = jnp.where(logits_Bk >= kth, logits_Bk, _LOWEST)
    probs = jax.nn.softmax(logits_Bk, axis=1)
    # The probability before each candidate. A masked sum is one small kernel, a cumulative sum is several.
    before = jnp.tri(probs.shape[1], k=-1, dtype=bool)
    larger = jnp.where(before, probs[:, None, :], 0.0).sum(axis=2)
    keep = (larger < values.top_p) & (probs >= values.min_p * probs[:, :1])
    at_B = jnp.argmax(jnp.where(keep, logits_Bk, _LOWEST) + _noise(keys_B, logits_Bk.shape[1]), axis=1)
    return jnp.take_along_axis(ids_Bk, at_B[:, None], axis=1)[:, 0]


def sample_all(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    values: SamplingValues,
    vocabulary: Vocabulary = WHOLE,
    *,
    use_top_k: bool = True,
    use_top_p: bool = True,
) -> jax.Array:
    """Samples over the whole vocabulary. Filters are thresholds on the logit, found by bisection on its bits.

    On a tensor axis the sums of the bisection are added over the devices, 16 numbers a row in each of its passes. So
    the thresholds are those of the whole vocabulary, however many tokens they keep; sums of probabilities are rounded
    in another order, which matters where one of them equals `top_p` to float32 rounding.

    Args:
      logits_BV: float32, divided by the temperature.
      keys_B: one PRNG key for each row and step.
      values: the filters; with the values of `SamplingValues.of` for "off", a filter keeps all tokens exactly.
      vocabulary: which part of it the device has.
      use_top_k, use_top_p: without these filters the program compiles faster.
    """
    order = _ordered_bits(logits_BV)
    if use_top_k:
        count = jnp.minimum(values.top_k, logits_BV.shape[1] * vocabulary.shards)
        kth = _threshold(order, jnp.ones_like(logits_BV), count, vocabulary)
        logits_BV = jnp.where(order >= kth, logits_BV, _LOWEST)
    probs = vocabulary.softmax(logits_BV)
    largest = vocabulary.max(probs.max(axis=1, keepdims=True))
    keep = probs >= values.min_p * largest
    if use_top_p:
        keep &= order >= _threshold(order, probs, values.top_p, vocabulary)
    # The likeliest token always stays, whatever the rounding of the sums; and so does an infinite logit, which makes
    # every probability NaN.
    keep |= ~(probs < largest)
    return sample_unfiltered(jnp.where(keep, logits_BV, _LOWEST), keys_B, vocabulary)


def sample_unfiltered(logits_BV: jax.Array, keys_B: jax.Array, vocabulary: Vocabulary = WHOLE) -> jax.Array:
    """The tokens of `sample_all` where all filters are off, without its search for thresholds.

    Args:
      logits_BV: float32, divided by the temperature.
      keys_B: one PRNG key for each row and step.
      vocabulary: which part of it the device has. Each token has the random number that it has on one device.
    """
    noise_BV = vocabulary.part(_noise(keys_B, logits_BV.shape[1] * vocabulary.shards))
    return vocabulary.argmax(logits_BV + noise_BV)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Maps float32 to uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order_BV: jax.Array, mass_BV: jax.Array, wanted: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Returns the largest threshold t, [B, 1], such that the entries with order >= t have at least the wanted mass.

    The wanted mass is a scalar or [B, 1]. Each of eight passes finds four bits of t. If the total mass is less than
    wanted, t is 0.
    """
    nibbles = jnp.arange(16, dtype=jnp.uint32)
    wanted = jnp.reshape(wanted, (-1, 1))

    def find(i: jax.Array, t_B1: jax.Array) -> jax.Array:
        shift = jnp.uint32(28) - 4 * i.astype(jnp.uint32)
        tries_B16 = t_B1 | (nibbles << shift)
        masses = [jnp.sum(jnp.where(order_BV >= tries_B16[:, n, None], mass_BV, 0), axis=1) for n in range(16)]
        reached = vocabulary.sum(jnp.stack(masses, axis=1)) >= wanted
        # The first try keeps the bits found so far, which reach the wanted mass unless nothing does.
        best = jnp.maximum(jnp.sum(reached, axis=1, keepdims=True) - 1, 0).astype(jnp.uint32)
        return t_B1 | (best << shift)

    zeros = jnp.zeros_like(order_BV[:, :1])
    return jax.lax.fori_loop(0, 8, find, zeros)


def _noise(keys_B: jax.Array, count: int) -> jax.Array:
    """Float32 [B, count]: the largest of logits with this noise is a sample of their softmax (Gumbel-max trick)."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32))(keys_B)
