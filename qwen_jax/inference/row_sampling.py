"""Sampling where every row has parameters of its own, with penalties, biases and masks of allowed tokens.

The rules change the logits in this order: repetition penalty (prompt and text), presence and frequency penalty (text
alone), bias, mask. Then each row samples by its own method, with the functions and the random numbers of `sampling`:
the seed and the number of tokens sampled before determine a row's token, whatever runs beside it.

There are eight programs for each number of rows, from the cheapest on. A step takes the first that can serve all its
rows. A row gives the same token in each that can serve it. "Open" is the whole vocabulary without top-k, top-p and
min-p, as reinforcement learning samples: it searches for no thresholds.

| variant  | methods             | mask | rules          | top log-probabilities |
|----------|---------------------|------|----------------|-----------------------|
| plain    | greedy              | no   | no             | no                    |
| open     | greedy, open        | no   | no             | no                    |
| listed   | greedy, top-k       | no   | no             | no                    |
| masked   | greedy              | yes  | no             | no                    |
| drawn    | greedy, open, top-k | yes  | no             | no                    |
| ruled    | greedy, top-k       | yes  | yes            | no                    |
| detailed | greedy, top-k       | yes  | yes            | yes                   |
| all      | all                 | yes  | yes            | yes                   |
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.inference.sampling import (
    NOT_FINITE,
    WHOLE,
    SamplingParams,
    SamplingValues,
    comparable,
    numbers_of,
    penalised,
    sample_all,
    sample_top_k,
    sample_unfiltered,
)
from qwen_jax.inference.vocabulary import Vocabulary

Variant = Literal["plain", "open", "listed", "masked", "drawn", "ruled", "detailed", "all"]
# What a row may need, as bits, and what each variant has.
_OPEN, _LIST, _MASK, _RULES, _TOP, _FILTERS = (1 << i for i in range(6))
_HAS: dict[Variant, int] = {
    "plain": 0,
    "open": _OPEN,
    "listed": _LIST,
    "masked": _MASK,
    "drawn": _OPEN | _LIST | _MASK,
    "ruled": _LIST | _MASK | _RULES,
    "detailed": _LIST | _MASK | _RULES | _TOP,
    "all": _OPEN | _LIST | _MASK | _RULES | _TOP | _FILTERS,
}
VARIANTS: tuple[Variant, ...] = tuple(_HAS)
WITH_RULES, WITH_MASKS, WITH_TOP = (
    tuple(variant for variant in VARIANTS if _HAS[variant] & bit) for bit in (_RULES, _MASK, _TOP)
)
_METHODS = ("greedy", "top_k", "full")
_INTS, _FLOATS = 7, 7
FIELDS = _INTS + _FLOATS
"""Numbers of a row that are sent to the device for each step."""
SLOT, STEP, RULES, MASKED = 0, 2, 5, 6
"""Which of them are the slot, the number of tokens that were sampled before, whether there are rules, and one more than
the place of its mask among those of the step; 0 for none."""


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """How the next token of one row is sampled.

    Attributes:
      slot: of the sequence in the device's state.
      sampling: the parameters; `logprobs` has no effect, since log-probabilities are always returned.
      step: tokens of the text that were sampled before.
      logprob_temperature: see `Request`.
      presence, frequency: the penalties of `Request`.
      rules: whether `Runner.set_rules` was called for this sequence. Penalties and biases need it.
      top: whether the most likely tokens are returned, too.
    """

    slot: int
    sampling: SamplingParams
    step: int
    logprob_temperature: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    rules: bool = False
    top: bool = False

    @property
    def needs(self) -> int:
        """What the row needs of a program, as bits for `variant_with`, if it has no mask."""
        params, method = self.sampling, self.sampling.mode.method
        needs = {"greedy": 0, "top_k": _LIST, "full": _OPEN}[method]
        if method == "full" and (params.mode.top_k or params.mode.top_p or params.min_p):
            needs |= _FILTERS
        return needs | (_RULES if self.rules else 0) | (_TOP if self.top else 0)

    def check(self) -> None:
        """Raises ValueError for penalties without rules."""
        if not self.rules and (self.presence or self.frequency or self.sampling.repetition_penalty != 1):
            raise ValueError("A row with penalties needs rules=True, after a call of set_rules.")


def variant_with(needs: int) -> Variant:
    """The first variant that has all these bits of `SampleRow.needs`."""
    return next(variant for variant in VARIANTS if needs & ~_HAS[variant] == 0)


def variant_of(rows: Sequence[SampleRow | None]) -> Variant:
    """The first variant that can serve all these rows, if none has a mask; None is a row that is not sampled."""
    return variant_with(functools.reduce(operator.or_, (row.needs for row in rows if row is not None), 0))


def with_mask(variant: Variant) -> Variant:
    """The first variant that can serve what a variant can, and masks of allowed tokens."""
    return variant_with(_HAS[variant] | _MASK)


def pack(rows: Sequence[SampleRow | None], padded: int, dummy: int) -> np.ndarray:
    """The rows' parameters as int32 [padded, FIELDS], for `unpack`. Floats keep their bits; no row has a mask.

    Args:
      rows: None for a row that is not sampled.
      padded: number of rows of the program.
      dummy: the slot of padding rows.
    """
    ints, floats = np.zeros((padded, _INTS), np.int64), np.zeros((padded, _FLOATS), np.float32)
    ints[:, 0], ints[:, 3] = dummy, 1
    floats[:, [0, 1, 3, 6]] = 1.0
    for i, row in enumerate(rows):
        if row is None:
            continue
        row.check()
        top_k, numbers = numbers_of(row.sampling)
        method = _METHODS.index(row.sampling.mode.method)
        ints[i, :MASKED] = row.slot, row.sampling.seed, row.step, top_k, method, row.rules
        floats[i] = *numbers, row.presence, row.frequency, row.logprob_temperature
    # A seed takes all 32 bits.
    return np.concatenate([ints.astype(np.uint32).view(np.int32), floats.view(np.int32)], axis=1)


class RowValues(NamedTuple):
    """The parameters of each row on the device; those that meet logits are [B, 1].

    Attributes:
      slot_B: int32, place of the row's sequence in the device's state.
      seed_B: uint32.
      step_B: int32, tokens of the text that were sampled before.
      method_B: int32, index into greedy, top-k and full.
      rules_B1: bool, whether the row's bias counts.
      mask_B: int32, place of the row's mask among those of the step; -1 for none.
      values: temperature, top_k, top_p, min_p and repetition penalty.
      presence_B1, frequency_B1, logprob_temperature_B1: float32.
    """

    slot_B: jax.Array
    seed_B: jax.Array
    step_B: jax.Array
    method_B: jax.Array
    rules_B1: jax.Array
    mask_B: jax.Array
    values: SamplingValues
    presence_B1: jax.Array
    frequency_B1: jax.Array
    logprob_temperature_B1: jax.Array


def unpack(packed_BF: jax.Array) -> RowValues:
    """The inverse of `pack`, on the device."""
    slot, seed, step, top_k, method, rules, mask = jnp.split(packed_BF[:, :_INTS], _INTS, axis=1)
    floats_BF = jax.lax.bitcast_convert_type(packed_BF[:, _INTS:], jnp.float32)
    temperature, top_p, min_p, penalty, presence, frequency, of_logprobs = jnp.split(floats_BF, _FLOATS, axis=1)
    values = SamplingValues(temperature, top_k, top_p, min_p, penalty)
    seed_B = jax.lax.bitcast_convert_type(seed[:, 0], jnp.uint32)
    ints = slot[:, 0], seed_B, step[:, 0], method[:, 0], rules > 0, mask[:, 0] - 1
    return RowValues(*ints, values, presence, frequency, of_logprobs)


class Rules(NamedTuple):
    """What the rules of each row depend on; on the device, for every slot.

    Attributes:
      counts_BV: uint16, how often the text has each token.
      prompt_BV: bool, whether the prompt has it.
      bias_BV: float32, added to the logits.
    """

    counts_BV: jax.Array
    prompt_BV: jax.Array
    bias_BV: jax.Array


class SampledRows(NamedTuple):
    """One token for each row.

    Attributes:
      token_B: int32, or `NOT_FINITE` in rows with a logit or log-probability that is not finite, or with a mask that
        allows nothing.
      next_B: int32, an id in every row, to continue with.
      logprob_B: float32, log-probability of the token under the model at the row's `logprob_temperature`, without
        filters and rules.
      top_ids_BN, top_logprobs_BN: the most likely tokens under the model; None for variants without them.
    """

    token_B: jax.Array
    next_B: jax.Array
    logprob_B: jax.Array
    top_ids_BN: jax.Array | None
    top_logprobs_BN: jax.Array | None


def apply_rules(
    logits_BV: jax.Array,
    rows: RowValues,
    rules: Rules | None,
    allowed_BW: jax.Array | None,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """Logits with penalties, bias and mask.

    Args:
      logits_BV: float32.
      rows: parameters; penalties are neutral in rows without rules.
      rules: of the same part of the vocabulary as the logits. None for none.
      allowed_BW: int32 bit masks of the tokens that are allowed: bit i of word j is token 32 j + i, of the whole
        vocabulary. None for all.
      vocabulary: which part of it the device has.
    """
    if rules is not None:
        seen_BV = rules.prompt_BV | (rules.counts_BV > 0)
        logits_BV = penalised(logits_BV, seen_BV, rows.values.repetition_penalty)
        logits_BV = logits_BV - rows.presence_B1 * (rules.counts_BV > 0)
        logits_BV = logits_BV - rows.frequency_B1 * rules.counts_BV.astype(jnp.float32)
        logits_BV = logits_BV + jnp.where(rows.rules_B1, rules.bias_BV, 0.0)
    if allowed_BW is not None:
        bits_BWb = (allowed_BW[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
        bits_BV = bits_BWb.reshape(len(allowed_BW), -1)[:, : logits_BV.shape[1] * vocabulary.shards]
        logits_BV = jnp.where(vocabulary.part(bits_BV) > 0, logits_BV, -jnp.inf)
    return logits_BV


def sample_rows(
    logits_BV: jax.Array,
    rows: RowValues,
    rules: Rules | None,
    allowed_BW: jax.Array | None,
    *,
    variant: Variant,
    vocab_limit: int,
    top: int,
    vocabulary: Vocabulary = WHOLE,
) -> SampledRows:
    """Samples one token for each row.

    Args:
      logits_BV: float32. On a tensor axis, the part of the vocabulary that the device has.
      rows: parameters.
      rules: for penalties and biases, of the same part; used by variants with rules.
      allowed_BW: as for `apply_rules`; used by variants with masks.
      variant: see the table in the module's docstring.
      vocab_limit: ids from here on are padding of the embedding and are never sampled.
      top: how many of the most likely tokens are returned.
      vocabulary: which part of it the device has. The tokens do not depend on it.
    """
    raw_BV, has = logits_BV, _HAS[variant]
    limited_BV = logits_BV = comparable(raw_BV, vocab_limit, vocabulary)
    if not has & _RULES:
        rules = None
    if not has & _MASK:
        allowed_BW = None
    logits_BV = apply_rules(logits_BV, rows, rules, allowed_BW, vocabulary)
    # Each method samples every row, and a row takes the token of its own.
    token_B = vocabulary.argmax(logits_BV)
    if has & (_OPEN | _LIST):
        keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(rows.seed_B), rows.step_B)
        scaled_BV = logits_BV / rows.values.temperature
    if has & _LIST:
        listed_B = sample_top_k(scaled_BV, keys_B, rows.values, vocabulary)
        token_B = jnp.where(rows.method_B == 1, listed_B, token_B)
    if has & _FILTERS:
        token_B = jnp.where(rows.method_B == 2, sample_all(scaled_BV, keys_B, rows.values, vocabulary), token_B)
    elif has & _OPEN:
        token_B = jnp.where(rows.method_B == 2, sample_unfiltered(scaled_BV, keys_B, vocabulary), token_B)
    # Log-probabilities, and with them the check that the whole row is finite.
    model_BV = raw_BV / rows.logprob_temperature_B1
    total_B = vocabulary.logsumexp(model_BV)
    of_model_B, logit_B = vocabulary.at(token_B, model_BV, logits_BV)
    logprob_B = of_model_B - total_B
    marked_B = jnp.where(jnp.isfinite(logprob_B) & jnp.isfinite(logit_B), token_B, NOT_FINITE)
    if not has & _TOP:
        return SampledRows(marked_B, token_B, logprob_B, None, None)
    largest_BN, ids_BN = vocabulary.top_k(limited_BV, top)
    top_BN = largest_BN / rows.logprob_temperature_B1 - total_B[:, None]
    return SampledRows(marked_B, token_B, logprob_B, ids_BN, top_BN)


# --- several positions of each row, for speculation ---


class SampledPositions(NamedTuple):
    """The tokens of a step in which the model has read proposals.

    Attributes:
      sampled: [T, ...] for each position.
      count_B: int32, how many of the T positions count: the accepted proposals, and the model's own token after them.
      last_B: int32 ids, the token at the last position that counts.
    """

    sampled: SampledRows
    count_B: jax.Array
    last_B: jax.Array


def sample_positions(
    logits_BTV: jax.Array,
    proposals_Bk: jax.Array,
    rows: RowValues,
    rules: Rules | None,
    allowed_BTW: jax.Array | None,
    *,
    variant: Variant,
    vocab_limit: int,
    top: int,
    vocabulary: Vocabulary = WHOLE,
) -> SampledPositions:
    """Samples the model's own token at each position, and accepts proposals as long as they are these tokens.

    The random numbers at a position are those that the token would be sampled with anyway, so that a text does not
    depend on what is proposed.

    Args:
      logits_BTV: float32, after the newest token and each of T - 1 proposals.
      proposals_Bk: int32 ids; -1 is never accepted.
      rows: parameters; `step_B` counts for the first position.
      rules, variant, vocab_limit, top, vocabulary: as for `sample_rows`.
      allowed_BTW: as for `sample_rows`, at each position.
    """
    T = logits_BTV.shape[1]
    choose = functools.partial(sample_rows, variant=variant, vocab_limit=vocab_limit, top=top, vocabulary=vocabulary)

    def sample(
        rules: Rules | None, inputs: tuple[jax.Array, jax.Array, jax.Array | None]
    ) -> tuple[Rules | None, SampledRows]:
        i, logits_BV, allowed_BW = inputs
        here = rows._replace(step_B=rows.step_B + i)
        sampled = choose(logits_BV, here, rules, allowed_BW)
        if rules is not None:
            # A later position counts only if this token was proposed, so the text then has it.
            every_B = jnp.arange(len(logits_BV))
            counts_BV = count_tokens(rules.counts_BV, every_B, sampled.next_B, vocabulary=vocabulary)
            rules = rules._replace(counts_BV=counts_BV)
        return rules, sampled

    if T == 1:
        allowed_BW = None if allowed_BTW is None else allowed_BTW[:, 0]
        _, sampled = sample(rules, (jnp.int32(0), logits_BTV[:, 0], allowed_BW))
        sampled = jax.tree.map(lambda x: x[None], sampled)
        return SampledPositions(sampled, jnp.ones_like(rows.slot_B), sampled.next_B[0])
    positions: tuple[jax.Array, jax.Array, jax.Array | None] = (
        jnp.arange(T, dtype=jnp.int32),
        logits_BTV.swapaxes(0, 1),
        None if allowed_BTW is None else allowed_BTW.swapaxes(0, 1),
    )
    _, sampled = jax.lax.scan(sample, rules, positions)
    # A token that is marked as not finite equals no proposal.
    accepted_kB = jnp.cumprod(sampled.token_B[:-1] == proposals_Bk.T, axis=0)
    count_B = 1 + accepted_kB.sum(axis=0, dtype=jnp.int32)
    last_B = jnp.take_along_axis(sampled.next_B, count_B[None] - 1, axis=0)[0]
    return SampledPositions(sampled, count_B, last_B)


def count_tokens(
    counts_SV: jax.Array,
    row_B: jax.Array,
    token_B: jax.Array,
    where_B: jax.Array | bool = True,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """Counts one more token for each row, up to the largest number of the dtype.

    Args:
      counts_SV: uint16.
      row_B: int32, which row of the counts. No two with `where_B` are equal.
      token_B: int32 ids.
      where_B: bool, where a token is counted.
      vocabulary: which part of it the device has. Tokens of other parts are counted there.
    """
    place_B = vocabulary.places(token_B, counts_SV.shape[1])
    old_B = counts_SV.at[row_B, place_B].get(mode="fill", fill_value=0)
    more_B = (old_B < jnp.iinfo(counts_SV.dtype).max) & where_B
    return counts_SV.at[row_B, place_B].set(old_B + more_B.astype(counts_SV.dtype), mode="drop")
