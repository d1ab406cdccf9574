"""Prefill of long prompts, chunk by chunk: one compiled program for all lengths and offsets.

A chunk of C tokens is written to the cache and attends to everything in it: activations are bounded by the chunk, and
only the cache grows with the prompt. The cache is donated from chunk to chunk and never copied. Rows of unequal
length end at the same slot: shorter ones begin later, and what is before them is masked. What the last chunk writes
beyond the end of the prompt is overwritten by the tokens that follow.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.attention.sparse import Diagnostics, SparsePrefill
from qwen_jax.attention.sparse_block import SparseChunk
from qwen_jax.inference.programs import DecodeState, StaticArgs, empty_cache, mark_seen, sample_first
from qwen_jax.inference.sampling import SamplingMode, SamplingValues
from qwen_jax.params import Params, bind

Progress = Callable[[int, int], None]
"""Called with the tokens of the prompt that were read so far, first none, and with all its tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillState:
    """A batch of prompts of which a part has been read.

    Attributes:
      cache: keys and values of the tokens so far.
      hidden_BD: normalised hidden state of the newest token of each row.
      seen_BV: bool [B, V], tokens so far; None unless the mode has a penalty.
    """

    cache: ContiguousCache
    hidden_BD: jax.Array
    seen_BV: jax.Array | None


@functools.partial(jax.jit, static_argnames=("static",))
def empty_state(params: Params, start_B: jax.Array, *, static: StaticArgs) -> PrefillState:
    """A state without tokens.

    Args:
      params: in the layout of `static.options`.
      start_B: int32, the first slot of each row.
      static: settings that are compiled in.
    """
    config, spec, dtype = static.config, static.sharding, jnp.dtype(static.options.dtype)
    # `fresh` is for prompts that are read in one piece.
    cache = dataclasses.replace(empty_cache(params, start_B, static), start_B=start_B, fresh=False)
    wide, rows = P(*spec.rows, None), len(start_B)
    hidden_BD = jnp.zeros((rows, config.hidden_size), dtype, out_sharding=wide)
    seen_BV = jnp.zeros((rows, config.vocab_size), bool, out_sharding=spec.vocab_rows) if static.mode.penalty else None
    return PrefillState(cache, hidden_BD, seen_BV)


def resume(cache: ContiguousCache, tokens: Sequence[int], *, static: StaticArgs) -> PrefillState:
    """The state of one row after these tokens, which are in the cache."""
    config, wide = static.config, P(*static.sharding.rows, None)
    mesh = jax.sharding.get_mesh()
    seen_BV = None
    if static.mode.penalty:
        seen = np.zeros((1, config.vocab_size), bool)
        seen[0, list(tokens)] = True
        seen_BV = jax.device_put(seen, NamedSharding(mesh, static.sharding.vocab_rows))
    hidden = np.zeros((1, config.hidden_size), jnp.dtype(static.options.dtype))
    return PrefillState(cache, jax.device_put(hidden, NamedSharding(mesh, wide)), seen_BV)


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("state",))
def prefill_chunk(
    params: Params,
    state: PrefillState,
    tokens_BC: jax.Array,
    count: jax.Array,
    length_B: jax.Array,
    sparsity: SparsePrefill | None = None,
    *,
    static: StaticArgs,
) -> tuple[PrefillState, Diagnostics | None]:
    """Reads the next tokens of the prompts.

    Args:
      params: in the layout of `static.options`.
      state: from `empty_state` or the previous call; its buffers are reused.
      tokens_BC: int32; what is before a row's first slot, or beyond `count`, may be any ids.
      count: int32 scalar, how many of the C slots belong to the prompts.
      length_B: int32, tokens of each prompt when all of it has been read.
      sparsity: for sparse attention; None for attention to all keys.
      static: settings that are compiled in.

    Returns:
      The state, and what sparse attention left out, for each layer.
    """
    model, cache = bind(static.config, params, static.sharding, static.options), state.cache
    C = tokens_BC.shape[1]
    positions_BC = cache.positions(C)
    sparse = None
    if sparsity is not None:
        # The prompts end at one slot.
        sparse = SparseChunk(sparsity, cache.slot, count, (cache.start_B + length_B).max())
    output = model(
        tokens_BC, jnp.maximum(positions_BC, 0), cache.mask(C), cache=cache, length_BT=length_B[:, None], sparse=sparse
    )
    hidden_BD = jax.lax.dynamic_index_in_dim(output.hidden, count - 1, axis=1, keepdims=False)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        real_BC = (positions_BC >= 0) & (jnp.arange(C) < count)
        seen_BV = mark_seen(seen_BV, tokens_BC, real_BC, static)
    return PrefillState(output.cache.advanced(count), hidden_BD, seen_BV), output.skipped


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("cache", "seen_BV"))
def begin_text(
    params: Params,
    cache: ContiguousCache,
    hidden_BD: jax.Array,
    seen_BV: jax.Array | None,
    seeds_B: jax.Array,
    values: SamplingValues,
    *,
    static: StaticArgs,
) -> tuple[DecodeState, jax.Array, jax.Array | None]:
    """Samples the first token after the prompts.

    Args:
      params: in the layout of `static.options`.
      cache, hidden_BD, seen_BV: of the `PrefillState`; the first and the last are reused.
      seeds_B: uint32, one for each row.
      values: sampling parameters.
      static: settings that are compiled in.

    Returns:
      As `programs.prefill`.
    """
    model = bind(static.config, params, static.sharding, static.options)
    return sample_first(model, cache, hidden_BD, seen_BV, seeds_B, values, static)


def read(
    params: Params,
    state: PrefillState,
    prompts: Sequence[Sequence[int]],
    length_B: np.ndarray,
    chunk: int,
    mesh: Mesh,
    static: StaticArgs,
    on_chunk: Progress | None = None,
    sparsity: SparsePrefill | None = None,
) -> tuple[PrefillState, list[Diagnostics]]:
    """Reads prompts that all end at the same slot.

    Args:
      params: in the layout of `static.options`.
      state: whose cache begins early enough for the longest prompt; its buffers are reused.
      prompts: token ids of each row; of the rest of a prompt, if a part was read before.
      length_B: int32, tokens of each whole prompt.
      chunk: tokens that are read at a time.
      mesh: of the parameters.
      static: settings that are compiled in.
      on_chunk: called at the beginning and after each chunk.
      sparsity: for sparse attention; None for attention to all keys.

    Returns:
      The state, and what sparse attention left out of each chunk.
    """
    longest = max(map(len, prompts))
    tokens_BT = np.zeros((len(prompts), -(-longest // chunk) * chunk), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[longest - len(prompt) : longest] = prompt
    spec = static.sharding
    # The program does not depend on how tokens are sampled, only on whether seen tokens are marked.
    mode = SamplingMode("greedy", static.mode.penalty, logprobs=False, top_k=False, top_p=False)
    reading = dataclasses.replace(static, mode=mode)
    with jax.set_mesh(mesh):
        lengths = jax.device_put(length_B, NamedSharding(mesh, spec.rows))
        if on_chunk is not None:
            on_chunk(0, longest)
        waiting: jax.Array | None = None
        skipped: list[Diagnostics] = []
        if sparsity is not None:
            sparsity = jax.device_put(sparsity, NamedSharding(mesh, P()))
        for start in range(0, longest, chunk):
            tokens = jax.device_put(tokens_BT[:, start : start + chunk], NamedSharding(mesh, spec.tokens))
            count = jnp.int32(min(chunk, longest - start))
            state, found = prefill_chunk(params, state, tokens, count, lengths, sparsity, static=reading)
            skipped += [found] if found is not None else []
            if on_chunk is not None:
                # This chunk is running, and the one before it is what we wait for: the device never waits for us.
                if waiting is not None:
                    waiting.block_until_ready()
                    on_chunk(start, longest)
                waiting = state.cache.slot + 0
        if on_chunk is not None and waiting is not None:
            waiting.block_until_ready()
            on_chunk(longest, longest)
    return state, skipped
