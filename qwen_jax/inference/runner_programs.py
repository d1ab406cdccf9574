"""The programs of the runner, as pure functions of arrays. `runner_lowering` makes executables of them.

Forward programs read tokens into pages and give logits; sampling programs choose tokens. They are separate, so that the
next forward pass can start before the host knows a token, and so that the host can make masks during a forward pass.
On a tensor axis logits stay where the output head computes them, each device with its part of the vocabulary.
Small integers of all rows travel in one packed array for each step. Padding rows use the slot `max_seqs` of the state,
and write to no page. Where rows choose from adapters (`Options.adapter_ranks`), the packed arrays of programs that run
the model end with the number of each row's adapter, or of each token's where a row has several texts; 0 is none.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention import quantized_cache
from qwen_jax.attention.packed_cache import PackedCache
from qwen_jax.attention.paged_cache import PagedCache
from qwen_jax.attention.quantized_cache import Buffer
from qwen_jax.config import ModelConfig
from qwen_jax.inference import one_row, row_sampling
from qwen_jax.inference.adapters import with_masks
from qwen_jax.inference.buckets import RunnerConfig
from qwen_jax.inference.row_sampling import FIELDS, Rules, Variant
from qwen_jax.inference.vocabulary import Vocabulary
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, bind

CLEARED = 64
"""Pages that one call of `clear_pages` takes."""
MAX_SEGMENTS = 64
"""Texts that share a row of `read_texts`."""
# Logits that exist at one time when whole texts are scored, at most: 128 MiB in float32.
_MAX_LOGITS = 2**25


@dataclasses.dataclass(frozen=True)
class StaticArgs:
    """Everything static that the programs depend on, besides shapes."""

    config: ModelConfig
    sharding: Sharding
    options: Options
    vocab_limit: int
    """Ids from here on are padding and never sampled."""
    settings: RunnerConfig

    @property
    def words(self) -> int:
        """Length of a bit mask over the vocabulary."""
        return -(-self.config.vocab_size // 32)

    @property
    def tops(self) -> int:
        """How many of the most likely tokens are returned."""
        return min(self.settings.max_top_logprobs, self.config.vocab_size)


def logits_spec(ndim: int) -> P:
    """The PartitionSpec of logits and rules [..., V]: all rows on every device, the vocabulary over tensor shards."""
    return P(*(None,) * (ndim - 1), "tensor")


class Pages(NamedTuple):
    """Keys and values of all sequences, [N, K, P, d] for each layer, arrays or `QuantizedRows`."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


class State(NamedTuple):
    """What the device knows of each sequence, by slot; the last slot is for padding rows.

    Attributes:
      tokens_S: int32, newest token, not in the cache yet. Always an id.
      rules: None for a runner without rules.
    """

    tokens_S: jax.Array
    rules: Rules | None


# --- forward ---


def decode(
    static: StaticArgs, params: Params, pages: Pages, tokens_S: jax.Array, packed_BN: jax.Array, *, proposed: int
) -> tuple[jax.Array, Pages]:
    """Reads the newest token of each row, and proposed tokens after it.

    Args:
      static: settings that are compiled in.
      params: in the layout of `static.options`.
      pages: updated in place.
      tokens_S: newest token of each slot.
      packed_BN: int32: page table, `proposed` ids, slot, tokens in the cache, new tokens. The table comes first: with
        one row XLA for GPUs passes a kernel the slice of this array instead of a copy, and kernels of Mosaic GPU refuse
        arrays that do not begin at a multiple of 256 bytes.
      proposed: how many tokens are proposed for each row.

    Returns:
      Float32 logits [B, 1 + proposed, V] after each token, in `logits_spec`; [B, V] if none is proposed. The pages.
    """
    params, packed_BN = _choose_adapters(static, params, packed_BN, axis=1)
    slot_B, length_B, new_B = packed_BN[:, -3], packed_BN[:, -2], packed_BN[:, -1]
    table_BM, proposals_Bk = jnp.split(packed_BN[:, :-3], [packed_BN.shape[1] - 3 - proposed], axis=1)
    newest_B1 = tokens_S.at[slot_B].get(out_sharding=P(None))[:, None]
    tokens_BT = jnp.concatenate([newest_B1, jnp.maximum(proposals_Bk, 0)], axis=1)
    s, T = static.sharding, 1 + proposed
    model = bind(static.config, params, s, static.options)
    tokens_BT, table_BM = (jax.reshard(x, s.tokens) for x in (tokens_BT, table_BM))
    length_B, new_B = (jax.reshard(x, s.rows) for x in (length_B, new_B))
    cache = PagedCache(pages.keys, pages.values, table_BM, length_B, new_B)
    if not proposed and one_row.supports(static.config, s, static.options, len(packed_BN), cache):
        params, token_1 = one_row.prepare(params, tokens_BT[:, 0])
        logits_1V, cache, _ = one_row.step(params, static.config, s, token_1, cache, jnp.zeros((1,), jnp.int32))
        return logits_1V, Pages(cache.keys, cache.values)
    output = model(tokens_BT, cache.positions(T), cache.mask(T), cache=cache)
    logits_BTV = jax.reshard(model.logits(output.hidden), logits_spec(3))
    return logits_BTV if proposed else logits_BTV[:, 0], Pages(output.cache.keys, output.cache.values)


def decode_options(static: StaticArgs, pages: Pages, rows: int, slots: int) -> dict[str, Any] | None:
    """The compiler options of `decode` without proposals: those of the kernels for one row where it uses them.

    Args:
      static: settings that are compiled in.
      pages: arrays, or their shapes.
      rows: of a step.
      slots: of the page table.
    """

    def int32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    table = int32(rows, -(-slots // static.settings.page_size))
    cache = PagedCache(pages.keys, pages.values, table, int32(rows), int32(rows))
    used = one_row.supports(static.config, static.sharding, static.options, rows, cache)
    return one_row.compiler_options(static.config, static.sharding) if used else None


def prefill(
    static: StaticArgs, params: Params, pages: Pages, packed_4T: jax.Array, packed_N: jax.Array, *, chunks: int
) -> tuple[jax.Array, Pages]:
    """Reads the next chunks of prompts, which share a row and do not see one another.

    Args:
      static: settings that are compiled in.
      params: in the layout of `static.options`.
      pages: updated in place.
      packed_4T: int32, for each token: id, slot and first slot of its text, as in `PackedCache`, and tokens of its
        whole prompt.
      packed_N: int32: where the last token of each chunk is, page table.
      chunks: the most chunks, E.

    Returns:
      Float32 logits [E, V] after the last token of each chunk, in `logits_spec`; the pages.
    """
    s = static.sharding
    params, packed_4T = _choose_adapters(static, params, packed_4T, axis=0)
    tokens_1T, slot_1T, start_1T, length_1T = (jax.reshard(x[None], s.tokens) for x in packed_4T)
    last_E, pages_1M = packed_N[:chunks], jax.reshard(packed_N[None, chunks:], s.tokens)
    model = bind(static.config, params, s, static.options)
    cache = PackedCache(pages.keys, pages.values, pages_1M, slot_1T, start_1T)
    output = model(tokens_1T, cache.positions_1T, cache.mask, cache=cache, length_BT=length_1T)
    hidden_ED = output.hidden[0].at[last_E].get(out_sharding=P(None, None))
    logits_EV = jax.reshard(model.logits(hidden_ED[:, None]), logits_spec(3))[:, 0]
    return logits_EV, Pages(output.cache.keys, output.cache.values)


def _choose_adapters(static: StaticArgs, params: Params, packed: jax.Array, axis: int) -> tuple[Params, jax.Array]:
    """The parameters with the masks of the adapters at the end of `packed` along an axis, and the rest of `packed`."""
    if not static.options.adapter_ranks:
        return params, packed
    rest, adapter_BT = jnp.split(packed, [packed.shape[axis] - 1], axis)
    return with_masks(params, jax.reshard(adapter_BT, static.sharding.tokens)), rest


# --- sampling ---


def sampled_state(state: State, variant: Variant) -> tuple[jax.Array | None, ...]:
    """What `sample` takes of the state, for its arguments of these names; None for what its variant does not read."""
    counts_SV, prompt_SV, bias_SV = state.rules if state.rules and variant in row_sampling.WITH_RULES else (None,) * 3
    return state.tokens_S, counts_SV, prompt_SV, bias_SV


def sample(
    static: StaticArgs,
    logits: jax.Array,
    tokens_S: jax.Array,
    counts_SV: jax.Array | None,
    prompt_SV: jax.Array | None,
    bias_SV: jax.Array | None,
    packed_BN: jax.Array,
    masks: jax.Array | None = None,
    *,
    variant: Variant,
    proposed: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Samples a token for each row, or accepts proposed ones, and makes it the newest of its slot.

    Args:
      static: settings that are compiled in.
      logits: float32 [B, V], or [B, 1 + proposed, V], in `logits_spec`.
      tokens_S, counts_SV: of the state, updated in place; see `sampled_state`.
      prompt_SV, bias_SV: of the state, only read.
      packed_BN: int32: the fields of `row_sampling.pack`, then `proposed` ids.
      masks: int32 [M, W], or [M, 1 + proposed, W], for variants with masks: bit masks of the tokens that the rows that
        name them may have.
      variant: see `row_sampling`.
      proposed: how many tokens are proposed for each row.

    Returns:
      int32 [1 + proposed, B, 3 or 3 + 2 N] for each position: token or `NOT_FINITE`, number of positions that count,
      log-probability; and for variants with masks ids and log-probabilities of the N most likely tokens. Floats keep
      their bits. The new `tokens_S` and `counts_SV`.
    """
    dummy, vocabulary = static.settings.max_seqs, Vocabulary(static.sharding.tensor)

    def local(
        logits: jax.Array,
        tokens_S: jax.Array,
        all_rules: Rules | None,
        masks: jax.Array | None,
        packed_BN: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        if not proposed:
            logits = logits[:, None]
        rows, proposals_Bk = row_sampling.unpack(packed_BN[:, :FIELDS]), packed_BN[:, FIELDS:]
        rules = None if all_rules is None else Rules(*(x_SV[rows.slot_B] for x_SV in all_rules))
        allowed_BTW: jax.Array | None = None
        if masks is not None:
            masks_MTW = masks if proposed else masks[:, None]
            of_row_BTW = masks_MTW[jnp.maximum(rows.mask_B, 0)]
            allowed_BTW = jnp.where(rows.mask_B[:, None, None] >= 0, of_row_BTW, -1)
        found = row_sampling.sample_positions(
            *(logits, proposals_Bk, rows, rules, allowed_BTW),
            variant=variant,
            vocab_limit=static.vocab_limit,
            top=static.tops,
            vocabulary=vocabulary,
        )
        # What was emitted enters the state.
        tokens_S = tokens_S.at[rows.slot_B].set(found.last_B)
        counts_SV = None
        if all_rules is not None:
            counts_SV = all_rules.counts_BV
            for i in range(1 + proposed):
                counted_B = (i < found.count_B) & (rows.slot_B < dummy)
                counted = rows.slot_B, found.sampled.next_B[i], counted_B, vocabulary
                counts_SV = row_sampling.count_tokens(counts_SV, *counted)
        return _pack_sampled(found), tokens_S, counts_SV

    rules = None
    if counts_SV is not None and prompt_SV is not None and bias_SV is not None:
        rules = Rules(counts_SV, prompt_SV, bias_SV)
    # Every device samples every row, over its part of the vocabulary.
    of_rules = jax.tree.map(lambda _: logits_spec(2), rules)
    run = jax.shard_map(
        local,
        in_specs=(logits_spec(logits.ndim), P(), of_rules, jax.tree.map(lambda _: P(), masks), P()),
        out_specs=(P(), P(), None if rules is None else logits_spec(2)),
        check_vma=False,  # It is not known of an all-gather that its result is the same everywhere.
    )
    result: tuple[jax.Array, jax.Array, jax.Array | None] = run(logits, tokens_S, rules, masks, packed_BN)
    return result


def _pack_sampled(found: row_sampling.SampledPositions) -> jax.Array:
    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    sampled = found.sampled
    counts_TB = jnp.broadcast_to(found.count_B, sampled.token_B.shape)
    fields = [jnp.stack([sampled.token_B, counts_TB, bits(sampled.logprob_B)], axis=2)]
    if sampled.top_ids_BN is not None and sampled.top_logprobs_BN is not None:
        fields += [sampled.top_ids_BN, bits(sampled.top_logprobs_BN)]
    return jnp.concatenate(fields, axis=2)


def set_rules(rules: Rules, slot_1: jax.Array, counts_V: jax.Array, prompt_V: jax.Array, bias_V: jax.Array) -> Rules:
    """Replaces what the rules of one slot depend on, in place."""

    def local(rules: Rules, slot_1: jax.Array, *new: jax.Array) -> Rules:
        return Rules(*(x_SV.at[slot_1[0]].set(x_V) for x_SV, x_V in zip(rules, new, strict=True)))

    of_slots, of_slot = logits_spec(2), logits_spec(1)
    run = jax.shard_map(local, in_specs=(of_slots, P(), of_slot, of_slot, of_slot), out_specs=of_slots)
    result: Rules = run(rules, slot_1, *(jax.reshard(x_V, of_slot) for x_V in (counts_V, prompt_V, bias_V)))
    return result


def clear_pages(static: StaticArgs, pages: Pages, ids_n: jax.Array) -> Pages:
    """Fills pages with zeros, in place. An id that is no page has no effect."""

    def is_buffer(x: Any) -> bool:
        return isinstance(x, kernels.QuantizedRows)

    def local(pages: Pages, ids_n: jax.Array) -> Pages:
        def cleared(x: jax.Array) -> jax.Array:
            return x.at[ids_n].set(0, mode="drop")

        def cleared_buffer(x: Buffer) -> Buffer:
            if not isinstance(x, kernels.QuantizedRows):
                return cleared(x)
            # The factors of channels are not of pages.
            return kernels.QuantizedRows(cleared(x.values_BKSd), cleared(x.scales_BKS), x.channels_Kd)

        return jax.tree.map(cleared_buffer, pages, is_leaf=is_buffer)

    specs = jax.tree.map(lambda x: quantized_cache.specs(x, static.sharding), pages, is_leaf=is_buffer)
    result: Pages = jax.shard_map(local, in_specs=(specs, P()), out_specs=specs)(pages, ids_n)
    return result


# --- whole texts, without a cache ---


def read_texts(
    static: StaticArgs, params: Params, packed_3T: jax.Array, last_E: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Reads a row of texts that do not see one another.

    Args:
      static: settings that are compiled in.
      params: in the layout of `static.options`.
      packed_3T: int32: ids, positions, number of each token's text from 1 on; 0 is padding.
      last_E: int32, where the last token of each text is; E is `MAX_SEGMENTS`.

    Returns:
      Normalised hidden states [1, T, D] in the compute dtype; float32 [2, E, D], the mean of each text's hidden states
      and the last of them.
    """
    s = static.sharding
    params, packed_3T = _choose_adapters(static, params, packed_3T, axis=0)
    tokens_1T, positions_1T, segments_1T = (jax.reshard(x[None], s.tokens) for x in packed_3T)
    model = bind(static.config, params, s, static.options)
    mask = kernels.packed_mask(segments_1T)
    hidden_1TD = model(tokens_1T, positions_1T, mask, valid_BT=segments_1T > 0).hidden

    def local(hidden_1TD: jax.Array, segments_1T: jax.Array, last_E: jax.Array) -> jax.Array:
        wide_TD = hidden_1TD[0].astype(jnp.float32)
        of_text_ET = segments_1T == jnp.arange(1, len(last_E) + 1)[:, None]
        sums_ED = jnp.einsum("ET,TD->ED", of_text_ET.astype(jnp.float32), wide_TD, precision="highest")
        means_ED = sums_ED / jnp.maximum(of_text_ET.sum(axis=1, keepdims=True), 1)
        return jnp.stack([means_ED, wide_TD[last_E]])

    pooled: jax.Array = jax.shard_map(local, in_specs=(s.hidden, s.tokens, P()), out_specs=P(), check_vma=False)(
        hidden_1TD, segments_1T, last_E
    )
    return hidden_1TD, pooled


def score_texts(static: StaticArgs, params: Params, hidden_1TD: jax.Array, packed_3T: jax.Array) -> jax.Array:
    """Log-probabilities of the tokens of a row of texts. Logits exist for a part of the tokens at a time.

    Args:
      static: settings that are compiled in.
      params: in the layout of `static.options`.
      hidden_1TD, packed_3T: of `read_texts`.

    Returns:
      int32 [T, 1 + 2 N]: the log-probability of the next token, ids and log-probabilities of the N most likely tokens.
      Floats keep their bits. Meaningless where a text ends.
    """
    s = static.sharding
    params, packed_3T = _choose_adapters(static, params, packed_3T, axis=0)
    model = bind(static.config, params, s, static.options)
    T, V = hidden_1TD.shape[1], static.config.vocab_size
    chunk = min(T, 1 << (_MAX_LOGITS // V).bit_length() - 1)
    chunks = -(-T // chunk)
    next_T = jnp.pad(packed_3T[0, 1:], (0, chunks * chunk - T + 1))
    x_1TD = jnp.pad(hidden_1TD, ((0, 0), (0, chunks * chunk - T), (0, 0)))

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)

    vocabulary = Vocabulary(s.tensor)

    @jax.shard_map(in_specs=(logits_spec(2), P()), out_specs=P(), check_vma=False)
    def local(logits_cV: jax.Array, next_c: jax.Array) -> jax.Array:
        total_c1 = vocabulary.logsumexp(logits_cV)[:, None]
        of_next_c1 = vocabulary.at(next_c, logits_cV)[0][:, None] - total_c1
        comparable_cV = row_sampling.comparable(logits_cV, static.vocab_limit, vocabulary)
        largest_cN, ids_cN = vocabulary.top_k(comparable_cV, static.tops)
        return jnp.concatenate([bits(of_next_c1), ids_cN, bits(largest_cN - total_c1)], axis=1)

    def score(i: jax.Array) -> jax.Array:
        x_1cD = jax.lax.dynamic_slice_in_dim(x_1TD, i * chunk, chunk, axis=1)
        next_c = jax.lax.dynamic_slice_in_dim(next_T, i * chunk, chunk)
        scored: jax.Array = local(jax.reshard(model.logits(x_1cD), logits_spec(3))[0], next_c)
        return scored

    parts = jax.lax.map(score, jnp.arange(chunks, dtype=jnp.int32))
    return parts.reshape(chunks * chunk, -1)[:T]
