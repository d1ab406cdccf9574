"""The two compiled programs of generation: prefill of a batch of prompts, and a chunk of decode steps."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax.attention import quantized_cache
from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.attention.quantized_cache import KVDtype
from qwen_jax.config import ModelConfig
from qwen_jax.inference import one_row
from qwen_jax.inference.sampling import Sampled, SamplingMode, SamplingValues, sample_token
from qwen_jax.inference.vocabulary import Vocabulary
from qwen_jax.model import Qwen2
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, bind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch in the middle of generation.

    Attributes:
      cache: keys and values of the tokens so far.
      token_B: int32 [B], the newest token, not in the cache yet. Always an id.
      keys_B: one PRNG key a row.
      step: int32 scalar, tokens sampled so far.
      seen_BV: bool [B, V], tokens in the prompt or the text; None unless the mode has a penalty.
    """

    cache: ContiguousCache
    token_B: jax.Array
    keys_B: jax.Array
    step: jax.Array
    seen_BV: jax.Array | None


@dataclasses.dataclass(frozen=True)
class StaticArgs:
    """Everything static that the compiled functions depend on, besides shapes."""

    config: ModelConfig
    sharding: Sharding
    options: Options
    mode: SamplingMode
    slots: int
    """Length of the cache."""
    vocab_limit: int
    """Ids from here on are padding and never sampled."""
    kv_dtype: KVDtype = "auto"
    """Of keys and values."""


def empty_cache(params: Params, lengths_B: jax.Array, static: StaticArgs) -> ContiguousCache:
    """A cache without tokens, for prompts of these lengths, which end at the same slot."""
    config, spec = static.config, static.sharding
    dtype = quantized_cache.cache_dtype(static.kv_dtype, static.options.dtype)
    channels = None
    if quantized_cache.in_8_bits(dtype):
        channels = quantized_cache.channels_of_keys(params, config, spec)
    return ContiguousCache.for_prompts(config, spec, lengths_B, static.slots, dtype, channels)


@functools.partial(jax.jit, static_argnames=("static",))
def prefill(
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    seeds_B: jax.Array,
    values: SamplingValues,
    *,
    static: StaticArgs,
) -> tuple[DecodeState, jax.Array, jax.Array | None]:
    """Reads the prompts and samples the first token of each row.

    Args:
      params: in the layout of `static.options`.
      tokens_BT: int32, right-padded; T at most `static.slots`.
      lengths_B: int32, tokens of each prompt, at least 1.
      seeds_B: uint32, one for each row.
      values: sampling parameters.
      static: settings that are compiled in.

    Returns:
      The state; int32 [B, 1] tokens, or `NOT_FINITE`; float32 [B, 1] log-probabilities, or None if the mode has none.
    """
    spec, config = static.sharding, static.config
    B, T = tokens_BT.shape
    model = bind(config, params, spec, static.options)
    # The prompts, into a fresh cache.
    cache = empty_cache(params, lengths_B, static)
    output = model(tokens_BT, cache.positions(T), cache.mask(T), cache=cache, length_BT=lengths_B[:, None])
    cache = output.cache.advanced(lengths_B.max())
    x_BTD = output.hidden
    x_BD = x_BTD.at[jnp.arange(B), lengths_B - 1].get(out_sharding=P(*spec.rows, None))
    seen_BV = None
    if static.mode.penalty:
        seen_BV = jnp.zeros((B, config.vocab_size), bool, out_sharding=spec.vocab_rows)
        real_BT = jax.reshard(jnp.arange(T) < lengths_B[:, None], spec.tokens)
        seen_BV = mark_seen(seen_BV, tokens_BT, real_BT, static)
    return sample_first(model, cache, x_BD, seen_BV, seeds_B, values, static)


def mark_seen(seen_BV: jax.Array, tokens_BT: jax.Array, real_BT: jax.Array, static: StaticArgs) -> jax.Array:
    """Marks the tokens of prompts in `seen_BV`.

    Args:
      seen_BV: bool, tokens seen before.
      tokens_BT: int32.
      real_BT: bool, which of them are not padding.
      static: settings that are compiled in.
    """
    rows, seen = P(*static.sharding.rows, None), static.sharding.vocab_rows
    vocabulary = Vocabulary(static.sharding.tensor)

    def local(seen_BV: jax.Array, tokens_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        v = seen_BV.shape[1]
        # Padding goes to a column that does not exist, where the write is dropped.
        places_BT = jnp.where(real_BT, vocabulary.places(tokens_BT, v), v)
        return seen_BV.at[jnp.arange(seen_BV.shape[0])[:, None], places_BT].set(True, mode="drop")

    mark = jax.shard_map(local, in_specs=(seen, rows, rows), out_specs=seen)
    result: jax.Array = mark(seen_BV, jax.reshard(tokens_BT, rows), jax.reshard(real_BT, rows))
    return result


def sample_first(
    model: Qwen2,
    cache: ContiguousCache,
    x_BD: jax.Array,
    seen_BV: jax.Array | None,
    seeds_B: jax.Array,
    values: SamplingValues,
    static: StaticArgs,
) -> tuple[DecodeState, jax.Array, jax.Array | None]:
    """Samples the first token of each row from the hidden states x_BD of the last tokens of the prompts."""
    rows = static.sharding.rows
    keys_B = jax.shard_map(jax.vmap(jax.random.key), in_specs=(rows,), out_specs=rows)(seeds_B)
    logits_BV = model.logits(x_BD[:, None])[:, 0]
    (token_B, logprob_B, next_B), seen_BV = _sample(logits_BV, seen_BV, keys_B, jnp.int32(0), values, static)
    state = DecodeState(cache, next_B, keys_B, jnp.int32(1), seen_BV)
    return state, token_B[:, None], None if logprob_B is None else logprob_B[:, None]


def _decode(
    params: Params, state: DecodeState, values: SamplingValues, *, static: StaticArgs, steps: int
) -> tuple[DecodeState, jax.Array, jax.Array | None]:
    """Runs decode steps on the device.

    Rows whose text has ended go on; the caller cuts what follows. Steps beyond the end of the cache are harmless and
    give nothing of use.

    Args:
      params: in the layout of `static.options`.
      state: from `prefill` or the previous call; its buffers are reused.
      values: sampling parameters.
      static: settings that are compiled in.
      steps: how many.

    Returns:
      The new state; int32 [B, steps] tokens, or `NOT_FINITE`; float32 [B, steps] log-probabilities, or None if the mode
      has none.
    """
    spec = static.sharding
    B = state.token_B.shape[0]
    model = bind(static.config, params, spec, static.options)
    one_row_kernels = one_row.supports(static.config, spec, static.options, B, state.cache)
    if one_row_kernels:
        prepared, token_B = one_row.prepare(params, state.token_B)
        state = dataclasses.replace(state, token_B=token_B)

    def logits(
        token_B: jax.Array, cache: ContiguousCache, counter: jax.Array
    ) -> tuple[jax.Array, ContiguousCache, jax.Array]:
        if one_row_kernels:
            return one_row.step(prepared, static.config, spec, token_B, cache, counter)
        output = model(token_B[:, None], cache.positions(1), cache.mask(1), cache=cache)
        return model.logits(output.hidden)[:, 0], output.cache, counter

    def step(carry: tuple[DecodeState, jax.Array], _: None) -> Any:
        state, counter = carry
        # Steps that nobody asked for stay inside the cache.
        cache = dataclasses.replace(state.cache, slot=jnp.minimum(state.cache.slot, static.slots - 1))
        logits_BV, cache, counter = logits(state.token_B, cache, counter)
        sampled, seen_BV = _sample(logits_BV, state.seen_BV, state.keys_B, state.step, values, static)
        new = DecodeState(cache.advanced(1), sampled.next_B, state.keys_B, state.step + 1, seen_BV)
        return (new, counter), (sampled.token_B, sampled.logprob_B)

    begin = state, jnp.zeros((1,), jnp.int32)
    (state, _), (tokens_NB, logprobs_NB) = jax.lax.scan(step, begin, length=steps)
    return state, tokens_NB.swapaxes(0, 1), None if logprobs_NB is None else logprobs_NB.swapaxes(0, 1)


_jit = functools.partial(jax.jit, static_argnames=("static", "steps"), donate_argnames=("state",))
decode = _jit(_decode)
_decode_one_row = _jit(_decode, compiler_options=one_row.COMPILER_OPTIONS)


def decoder(static: StaticArgs, state: DecodeState) -> Any:
    """`decode`; where the kernels for one row are used, `decode` compiled with the options that they need.

    Args:
      static: settings that are compiled in.
      state: that it will be called with.
    """
    rows = state.token_B.shape[0]
    supported = one_row.supports(static.config, static.sharding, static.options, rows, state.cache)
    return _decode_one_row if supported and one_row.compiler_options(static.config, static.sharding) else decode


def _sample(
    logits_BV: jax.Array,
    seen_BV: jax.Array | None,
    keys_B: jax.Array,
    step: jax.Array,
    values: SamplingValues,
    static: StaticArgs,
) -> tuple[Sampled, jax.Array | None]:
    """Samples on each shard's own rows and part of the vocabulary; returns the tokens and `seen_BV` with them."""
    rows, wide = static.sharding.rows, static.sharding.vocab_rows
    mode, vocabulary = static.mode, Vocabulary(static.sharding.tensor)

    def local(logits_BV: jax.Array, seen_BV: Any, keys_B: jax.Array, step: jax.Array, values: SamplingValues) -> Any:
        sampled = sample_token(logits_BV, seen_BV, keys_B, step, values, mode, static.vocab_limit, vocabulary)
        if seen_BV is not None:
            places_B = vocabulary.places(sampled.next_B, seen_BV.shape[1])
            seen_BV = seen_BV.at[jnp.arange(seen_BV.shape[0]), places_B].set(True, mode="drop")
        return sampled, seen_BV

    seen = wide if mode.penalty else None
    run = jax.shard_map(
        local,
        in_specs=(wide, seen, rows, P(), jax.tree.map(lambda _: P(), values)),
        out_specs=(Sampled(rows, rows if mode.logprobs else None, rows), seen),  # type: ignore[arg-type]
        # What is gathered over the tensor axis is the same there, which is not known of an all-gather.
        check_vma=False,
    )
    result: tuple[Sampled, jax.Array | None] = run(jax.reshard(logits_BV, wide), seen_BV, keys_B, step, values)
    return result
