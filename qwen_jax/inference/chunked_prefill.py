"""Prefill of long prompts, chunk by chunk: the same compiled programs for all lengths and offsets.

A chunk of C tokens is written to the cache and attends to everything in it: activations are bounded by the chunk, and
only the cache grows with the prompt. The cache is donated from chunk to chunk and never copied. Rows of unequal
length end at the same slot: shorter ones begin later, and what is before them is masked. What the last chunk writes
beyond the end of the prompt is overwritten by the tokens that follow.

Each layer is a call of a program of its own, so that layers of one kind are compiled once. In one program the compiler
would work on a copy of the layer for each call. A chunk takes a layer far longer than the host takes to call it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.attention.cache import Buffer, ContiguousCache, ContiguousLayer
from qwen_jax.attention.pooled_blocks import BLOCK
from qwen_jax.attention.rope import Rope
from qwen_jax.attention.sparse import Diagnostics, PooledBlocks, SparsePrefill
from qwen_jax.attention.sparse_block import SparseChunk
from qwen_jax.inference.programs import DecodeState, StaticArgs, empty_cache, mark_seen, sample_first
from qwen_jax.inference.sampling import SamplingMode, SamplingValues
from qwen_jax.kernels import Mask
from qwen_jax.params import Params, bind, bind_layer, first_alike

Means = tuple[jax.Array, jax.Array]
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
      means: of the keys and values of each layer, for pooled blocks; see `ContiguousLayer`.
    """

    cache: ContiguousCache
    hidden_BD: jax.Array
    seen_BV: jax.Array | None
    means: tuple[Means, ...] | None = None


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


@functools.partial(jax.jit, static_argnames=("rows", "static"))
def empty_means(rows: int, *, static: StaticArgs) -> tuple[Means, ...]:
    """The means of an empty cache of some rows; see `PrefillState`."""
    config, spec = static.config, static.sharding
    shape = rows, spec.kv_heads, static.slots // BLOCK, config.head_dim

    def zeros() -> jax.Array:
        return jnp.zeros(shape, jnp.dtype(static.options.dtype), out_sharding=spec.cache)

    return tuple((zeros(), zeros()) for _ in range(config.num_layers))


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


@functools.partial(jax.jit, static_argnames=("static",))
def begin_chunk(
    params: Params, cache: ContiguousCache, tokens_BC: jax.Array, length_B: jax.Array, *, static: StaticArgs
) -> tuple[jax.Array, Rope, tuple[Mask, ...], jax.Array]:
    """What the first layer takes, as of `Qwen2.begin`, and the slot at which the prompts end, int32 scalar."""
    model, C = bind(static.config, params, static.sharding, static.options), tokens_BC.shape[1]
    positions_BC = jnp.maximum(cache.positions(C), 0)
    begun = model.begin(tokens_BC, positions_BC, cache.mask(C), cache.slots, length_B[:, None])
    return *begun, (cache.start_B + length_B).max()


@functools.partial(jax.jit, static_argnames=("first", "static"), donate_argnames=("x_BCD", "keys_values", "means"))
def read_layer(
    params: Params,
    x_BCD: jax.Array,
    rope: Rope,
    masks: tuple[Mask, ...],
    keys_values: tuple[Buffer, Buffer],
    means: Means | None,
    slot: jax.Array,
    sparse: SparseChunk | None,
    layer: jax.Array,
    *,
    first: int,
    static: StaticArgs,
) -> tuple[jax.Array, tuple[Buffer, Buffer], Means | None, Diagnostics | None]:
    """Runs one layer on a chunk.

    Args:
      params: of the layer.
      x_BCD: the residual stream; its buffer is reused.
      rope, masks: of `begin_chunk`.
      keys_values, means: the cache of the layer; its buffers are reused.
      slot: int32 scalar, where the chunk is written.
      sparse: for sparse attention; with the budgets of all layers.
      layer: int32 scalar, the number of the layer.
      first: the first layer that is like this one.
      static: settings that are compiled in.

    Returns:
      The residual stream, the cache of the layer and its means, and what sparse attention left out.
    """
    block = bind_layer(static.config, params, static.sharding, static.options, first)
    cache = ContiguousLayer(*keys_values, slot, None, fresh=False, means=means)
    output = block(x_BCD, rope, masks, cache, sparse=None if sparse is None else sparse.layer(layer))
    assert isinstance(output.cache, ContiguousLayer)
    return output.x_BTD, (output.cache.k_BKSd, output.cache.v_BKSd), output.cache.means, output.skipped


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("seen_BV",))
def end_chunk(
    params: Params,
    x_BCD: jax.Array,
    seen_BV: jax.Array | None,
    slot: jax.Array,
    start_B: jax.Array,
    tokens_BC: jax.Array,
    count: jax.Array,
    skipped: list[Diagnostics],
    *,
    static: StaticArgs,
) -> tuple[jax.Array, jax.Array | None, jax.Array, Diagnostics | None]:
    """The last hidden state, the tokens that were seen, the next slot, and what was left out of each layer."""
    model, C = bind(static.config, params, static.sharding, static.options), tokens_BC.shape[1]
    with jax.named_scope("norm"):
        hidden_BD = jax.lax.dynamic_index_in_dim(model.norm(x_BCD), count - 1, axis=1, keepdims=False)
    if seen_BV is not None:
        index_C = jnp.arange(C, dtype=jnp.int32)
        real_BC = (slot + index_C >= start_B[:, None]) & (index_C < count)
        seen_BV = mark_seen(seen_BV, tokens_BC, real_BC, static)
    return hidden_BD, seen_BV, slot + count, jax.tree.map(lambda *x: jnp.stack(x), *skipped) if skipped else None


def compiled_programs() -> int:
    """How many programs that read chunks this process has compiled."""
    return sum(program._cache_size() for program in (begin_chunk, read_layer, end_chunk))  # type: ignore[attr-defined]


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
    cache = state.cache
    x_BCD, rope, masks, end = begin_chunk(params, cache, tokens_BC, length_B, static=static)
    sparse = None if sparsity is None else SparseChunk(sparsity, cache.slot, count, end)
    written, means, skipped = [], [], []
    alike = first_alike(static.config, static.sharding, static.options)
    for i, params_of_layer in enumerate(params["layers"]):
        buffers = (cache.keys[i], cache.values[i]), state.means[i] if state.means is not None else None
        x_BCD, *new, found = read_layer(
            params_of_layer,
            x_BCD,
            rope,
            masks,
            *buffers,
            cache.slot,
            sparse,
            np.int32(i),
            first=alike[i],
            static=static,
        )
        written.append(new[0])
        means.append(new[1])
        skipped += [found] if found is not None else []
    hidden_BD, seen_BV, slot, left_out = end_chunk(
        params, x_BCD, state.seen_BV, cache.slot, cache.start_B, tokens_BC, count, skipped, static=static
    )
    keys, values = zip(*written, strict=True)
    cache = dataclasses.replace(cache, keys=keys, values=values, slot=slot)
    return PrefillState(cache, hidden_BD, seen_BV, tuple(means) if state.means is not None else None), left_out


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
            if isinstance(sparsity.pattern, PooledBlocks):
                state = dataclasses.replace(state, means=empty_means(len(prompts), static=reading))
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
    return dataclasses.replace(state, means=None), skipped
