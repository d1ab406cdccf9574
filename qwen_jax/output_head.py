"""The output head on chunks of tokens: logits of a vocabulary that tensor shards divide, and what is summed over them.

Losses are made of these; see `train.losses` and `train.token_loss`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.loops import at_most
from qwen_jax.model import Qwen2
from qwen_jax.parallel.collectives import reduce_scatter
from qwen_jax.parallel.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class HeadContext:
    """What is static about a loss; see the arguments of `chunked_cross_entropy` and of `chunked_log_probs`."""

    sharding: Sharding
    chunk: int
    z_loss: float = 0.0
    compact: bool = False
    temperature: float = 1.0
    entropy: bool = False


def head_of(model: Qwen2) -> jax.Array:
    """The output head [V, D]."""
    head: jax.Array = (model.embed if model.config.tie_word_embeddings else model.lm_head).weight[...]
    return head


def over_chunks(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any, chunk: int, counts_BT: jax.Array | None
) -> tuple[Any, Any]:
    """Calls a function on one chunk of a device's tokens after the other. Not differentiable.

    Args:
      body: of a carry and a chunk of the inputs; returns the next carry, and arrays [c, ...] or None.
      carry: the first one.
      inputs: arrays [B, T, ...]. Behind the last token they are padded with 0.
      chunk: tokens in a chunk, at most.
      counts_BT: which tokens are computed; None for all. The number of chunks then depends on how many count. A
        collective in `body` is for devices that have the same tokens: others may do another number of chunks.

    Returns:
      The last carry, and what the body returned as arrays [B, T, ...], 0 for tokens that do not count.
    """
    B, T = jax.tree.leaves(inputs)[0].shape[:2]
    count = B * T
    n = -(-count // chunk)
    c = -(-count // n)
    inputs = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), inputs)

    if counts_BT is None:

        def split(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, ((0, n * c - count), *((0, 0),) * (x.ndim - 1)))
            return x.reshape(n, c, *x.shape[1:])

        carry, out = jax.lax.scan(body, carry, jax.tree.map(split, inputs))
        return carry, jax.tree.map(lambda x: x.reshape(n * c, *x.shape[2:])[:count].reshape(B, T, *x.shape[2:]), out)

    # The indices of the tokens that count, in order; then others, each out of bounds: reading there gives 0, and
    # writing does nothing.
    counts = counts_BT.reshape(count)
    place = jnp.where(counts, jnp.cumsum(counts) - 1, n * c + jnp.arange(count))
    beyond = count + jnp.arange(n * c)
    index = beyond.at[place].set(jnp.arange(count), mode="drop", unique_indices=True)
    distinct: Any = {"unique_indices": True, "indices_are_sorted": True}

    def gather(i: jax.Array | int) -> tuple[jax.Array, Any]:
        index_c = jax.lax.dynamic_slice_in_dim(index, i * c, c)
        return index_c, jax.tree.map(lambda x: x.at[index_c].get(mode="fill", fill_value=0, **distinct), inputs)

    def one_chunk(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, out = state
        index_c, parts = gather(i)
        carry, found = body(carry, parts)
        return carry, jax.tree.map(lambda into, x: into.at[index_c].set(x, mode="drop", **distinct), out, found)

    shapes = jax.eval_shape(lambda carry: body(carry, gather(0)[1])[1], carry)
    out = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), shapes)
    trips = (counts.sum() + c - 1) // c
    with jax.named_scope(at_most(n)):
        carry, out = jax.lax.fori_loop(0, trips, one_chunk, (carry, out))
    return carry, jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), out)


def gathered_head(head_vD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A tensor shard's part of the head, in the compute dtype."""
    w_vD: jax.Array = jax.lax.all_gather(head_vD.astype(dtype), "fsdp", axis=1, tiled=True)
    return w_vD


def reduced_head_gradient(dhead_vD: jax.Array, sharding: Sharding) -> jax.Array:
    """The gradient of the head over all devices that have other tokens, as the head is sharded."""
    dhead_vD = jax.lax.psum(dhead_vD, tuple(axis for axis in sharding.row_axes if axis != "fsdp"))
    return reduce_scatter(dhead_vD, 1)


def log_totals_of(
    context: HeadContext, x_cD: jax.Array, w_vD: jax.Array, targets_c: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """The logits [c, v] of one tensor shard, where they are the targets' [c, v], and over all tensor shards the log of
    the softmax denominator, the target's logit, if the context asks for it the entropy, and the highest logit, each
    [c]."""
    logits_cv, is_target = logits_of(context, x_cD, w_vD, targets_c)
    top_c, total_c, picked_c, *rest = statistics_of(logits_cv, is_target, context.entropy)
    highest_c = jax.lax.pmax(top_c, "tensor")
    below_c = top_c - highest_c
    # What was summed relative to the shard's highest logit becomes relative to the highest of all.
    rest = [(weighted_c + total_c * below_c) * jnp.exp(below_c) for weighted_c in rest]
    total_c, picked_c, rest = jax.lax.psum((total_c * jnp.exp(below_c), picked_c, rest), "tensor")
    entropy_c = jnp.log(total_c) - rest[0] / total_c if rest else None
    return logits_cv, is_target, highest_c + jnp.log(total_c), picked_c, entropy_c, highest_c


def logits_of(
    context: HeadContext, x_cD: jax.Array, w_vD: jax.Array, targets_c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The logits of one tensor shard, and where they are the targets', each [c, v]."""
    v = w_vD.shape[0]
    first = jax.lax.axis_index("tensor") * v
    logits_cv = einsum_f32("cD,vD->cv", x_cD, w_vD)
    if context.temperature != 1.0:
        logits_cv = logits_cv / context.temperature
    return logits_cv, jnp.arange(v) == (targets_c - first)[:, None]


def statistics_of(logits_cv: jax.Array, is_target: jax.Array, entropy: bool = False) -> tuple[jax.Array, ...]:
    """The highest logit, the sum of exp(logit - highest), the target's logit (0 if another shard has it), and for the
    entropy the sum of exp(logit - highest) (logit - highest), each [c].

    One pass computes all: the logits are the largest array of a step, and finding the maximum first would read them
    twice.
    """

    def join(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top = jnp.maximum(a[0], b[0])
        below_a, below_b = a[0] - top, b[0] - top
        scale_a, scale_b = jnp.exp(below_a), jnp.exp(below_b)
        joined = top, a[1] * scale_a + b[1] * scale_b, a[2] + b[2]
        if not entropy:
            return joined
        return *joined, (a[3] + a[1] * below_a) * scale_a + (b[3] + b[1] * below_b) * scale_b

    zero, lowest = jnp.zeros((), logits_cv.dtype), jnp.array(jnp.finfo(logits_cv.dtype).min)
    operands = [logits_cv, jnp.ones_like(logits_cv), jnp.where(is_target, logits_cv, zero)]
    start = [lowest, zero, zero]
    if entropy:
        operands.append(jnp.zeros_like(logits_cv))
        start.append(zero)
    found: tuple[jax.Array, ...] = jax.lax.reduce(tuple(operands), tuple(start), join, (1,))
    return found
