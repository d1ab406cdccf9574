"""The two compiled programs of generation: prefill of a batch of prompts, and a chunk of decode steps."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax import kernels
from qwen_jax.attention.block import CacheWrite, KVCache
from qwen_jax.config import ModelConfig
from qwen_jax.inference import one_row as single
from qwen_jax.inference.sampling import Knobs, Plan, sample
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import Params, bind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch in the middle of generation.

    Attributes:
      cache: keys and values; row b's tokens are in slots start_B[b] to slot - 1.
      slot: int32 scalar, where the next token goes, the same for every row.
      start_B: int32 [B], the first slot in use. A token's position is its slot minus this.
      token_B: int32 [B], the newest token, not in the cache yet.
      keys_B: one PRNG key a row.
      step: int32 scalar, tokens chosen so far.
      seen_BV: bool [B, V], tokens in the prompt or the text; None unless the plan has a penalty.
    """

    cache: KVCache
    slot: jax.Array
    start_B: jax.Array
    token_B: jax.Array
    keys_B: jax.Array
    step: jax.Array
    seen_BV: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static that the compiled functions depend on, besides shapes."""

    config: ModelConfig
    sharding: Sharding
    options: Options
    plan: Plan
    slots: int
    """Length of the cache."""
    vocab_limit: int
    """Ids from here on are padding and never chosen."""


@functools.partial(jax.jit, static_argnames=("program",))
def prefill(
    params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, seeds_B: jax.Array, knobs: Knobs, *, program: Program
) -> tuple[DecodeState, jax.Array, jax.Array | None]:
    """Reads the prompts and chooses each row's first token.

    Args:
      params: in the layout of `program.options`.
      tokens_BT: int32, right-padded; T at most `program.slots`.
      lengths_B: int32, tokens of each prompt, at least 1.
      seeds_B: uint32, one a row.
      knobs: sampling numbers.
      program: static settings.

    Returns:
      The state; int32 [B, 1] tokens; float32 [B, 1] log-probabilities, or None if the plan has none.
    """
    spec, config = program.sharding, program.config
    B, T = tokens_BT.shape
    model = bind(config, params, spec, program.options)
    shape = (B, spec.kv_heads, program.slots, config.head_dim)
    dtype = jnp.dtype(program.options.dtype)

    def empty() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype, out_sharding=spec.cache) for _ in range(config.num_layers))

    end = lengths_B.max()
    shift_B = end - lengths_B
    # A single row always ends where it should.
    write = CacheWrite(slot=jnp.int32(0), shift_B=shift_B if B > 1 else None, fresh=True)
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    cache: KVCache | None = KVCache(empty(), empty())
    x_BTD, cache = model(tokens_BT, positions_BT, kernels.causal_mask(B, T), cache=cache, write=write)
    x_BD = x_BTD.at[jnp.arange(B), lengths_B - 1].get(out_sharding=P(*spec.rows, None))

    def start(tokens_BT: jax.Array, lengths_B: jax.Array, seeds_B: jax.Array) -> Any:
        keys_B = jax.vmap(jax.random.key)(seeds_B)
        if not program.plan.penalty:
            return keys_B, None
        # The last column takes the padding and is cut off.
        ids_BT = jnp.where(jnp.arange(T) < lengths_B[:, None], tokens_BT, config.vocab_size)
        rows = jnp.arange(ids_BT.shape[0])[:, None]
        return keys_B, jnp.zeros((ids_BT.shape[0], config.vocab_size + 1), bool).at[rows, ids_BT].set(True)[:, :-1]

    rows = spec.rows
    seen_spec = P(*rows, None) if program.plan.penalty else None
    start = jax.shard_map(start, in_specs=(P(*rows, None), rows, rows), out_specs=(rows, seen_spec))
    keys_B, seen_BV = start(jax.reshard(tokens_BT, P(*rows, None)), lengths_B, seeds_B)
    logits_BV = model.logits(x_BD[:, None])[:, 0]
    token_B, logprob_B, seen_BV = _choose(logits_BV, seen_BV, keys_B, jnp.int32(0), knobs, program)
    state = DecodeState(cache, end, shift_B, token_B, keys_B, jnp.int32(1), seen_BV)  # type: ignore[arg-type]
    return state, token_B[:, None], None if logprob_B is None else logprob_B[:, None]


def _decode(
    params: Params, state: DecodeState, knobs: Knobs, *, program: Program, steps: int
) -> tuple[DecodeState, jax.Array, jax.Array | None]:
    """Runs decode steps on the device.

    Rows whose text has ended go on; the caller cuts what follows. Steps beyond the end of the cache are harmless and
    give nothing of use.

    Args:
      params: in the layout of `program.options`.
      state: from `prefill` or the previous call; its buffers are reused.
      knobs: sampling numbers.
      program: static settings.
      steps: how many.

    Returns:
      The new state; int32 [B, steps] tokens; float32 [B, steps] log-probabilities, or None if the plan has none.
    """
    spec = program.sharding
    B = state.token_B.shape[0]
    model = bind(program.config, params, spec, program.options)
    by_single = single.takes(program.config, spec, program.options, B, state.cache)
    if by_single:
        prepared, token_B = single.prepare(params, state.token_B)
        state = dataclasses.replace(state, token_B=token_B)

    def column(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (B,))[:, None]

    def logits(state: DecodeState, slot: jax.Array, counter: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        if by_single:
            return single.step(prepared, program.config, state.token_B, state.start_B, slot, state.cache, counter)
        mask = kernels.Mask(column(state.start_B), column(slot + 1))
        positions_B1 = column(slot - state.start_B)
        write = CacheWrite(slot=slot)
        x_B1D, cache = model(column(state.token_B), positions_B1, mask, cache=state.cache, write=write)
        return model.logits(x_B1D)[:, 0], cache, counter

    def step(carry: tuple[DecodeState, jax.Array], _: None) -> Any:
        state, counter = carry
        # Steps that nobody asked for stay inside the cache.
        slot = jnp.minimum(state.slot, program.slots - 1)
        logits_BV, cache, counter = logits(state, slot, counter)
        token_B, logprob_B, seen_BV = _choose(logits_BV, state.seen_BV, state.keys_B, state.step, knobs, program)
        new = DecodeState(
            cache,
            state.slot + 1,
            state.start_B,
            token_B,
            state.keys_B,
            state.step + 1,
            seen_BV,
        )
        return (new, counter), (token_B, logprob_B)

    begin = state, jnp.zeros((1,), jnp.int32)
    (state, _), (tokens_NB, logprobs_NB) = jax.lax.scan(step, begin, length=steps)
    return state, tokens_NB.swapaxes(0, 1), None if logprobs_NB is None else logprobs_NB.swapaxes(0, 1)


_jit = functools.partial(jax.jit, static_argnames=("program", "steps"), donate_argnames=("state",))
decode = _jit(_decode)
_decode_single = _jit(_decode, compiler_options=single.COMPILER_OPTIONS)


def decoder(program: Program, state: DecodeState) -> Any:
    """`decode`, or where `single` takes the step, `decode` compiled with the options that it wants.

    Args:
      program: static settings.
      state: what will be given to it.
    """
    rows = state.token_B.shape[0]
    takes = single.takes(program.config, program.sharding, program.options, rows, state.cache)
    return _decode_single if takes else decode


def _choose(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, step: jax.Array, knobs: Knobs, program: Program
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Samples on each shard's own rows, and notes what was chosen."""
    rows = program.sharding.rows
    plan = program.plan

    def local(logits_BV: jax.Array, seen_BV: Any, keys_B: jax.Array, step: jax.Array, knobs: Knobs) -> Any:
        token_B, logprob_B = sample(logits_BV, seen_BV, keys_B, step, knobs, plan, program.vocab_limit)
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(seen_BV.shape[0]), token_B].set(True)
        return token_B, logprob_B, seen_BV

    wide = P(*rows, None)
    seen = wide if plan.penalty else None
    run = jax.shard_map(
        local,
        in_specs=(wide, seen, rows, P(), jax.tree.map(lambda _: P(), knobs)),
        out_specs=(rows, rows if plan.logprobs else None, seen),
    )
    result: tuple[jax.Array, jax.Array | None, jax.Array | None] = run(
        jax.reshard(logits_BV, wide), seen_BV, keys_B, step, knobs
    )
    return result
