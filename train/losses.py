"""Losses and log-probabilities of tokens over a large vocabulary: chunked and vocabulary-sharded."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.model import Qwen2
from qwen_jax.parallel.collectives import reduce_scatter
from qwen_jax.parallel.sharding import Sharding
from train.data.batch import Batch
from train.loops import at_most
from train.objective import Sums, zero_sums


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Targets of next-token prediction: the next token of the same document, with that token's weight.

    Args:
      batch: packed rows [B, T].

    Returns:
      Target ids int32 [B, T], and weights float32 [B, T] that are 0 on padding and at the end of a segment.
    """

    def following(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))

    same = (following(batch.segment_ids) == batch.segment_ids) & (batch.segment_ids > 0)
    return following(batch.tokens), jnp.where(same, following(batch.loss_weights), 0.0)


def chunked_cross_entropy(
    model: Qwen2,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    z_loss: float = 0.0,
    compact: bool = False,
) -> Sums:
    """Weighted cross-entropy. Logits exist for one chunk of a device's tokens at a time, and are computed once.

    The loss is a scalar, and the gradients are linear in its cotangent: the pass that computes the logits of a chunk
    also computes the chunk's gradients, and keeps only those. Each tensor shard has its own part of the vocabulary.
    Three numbers per token and the gradient with respect to the hidden states cross the tensor axis.

    Args:
      model: for its output head.
      hidden_BTD: normalised hidden states, sharded as `Sharding.hidden`.
      targets_BT: int32 ids, sharded as `Sharding.tokens`.
      weights_BT: float32, sharded alike. They get no gradient.
      chunk: tokens of one device whose logits exist at one time.
      z_loss: coefficient of the squared log of the softmax denominator (Chowdhery et al. 2022, arXiv:2204.02311,
        section 5), which keeps the logits from drifting.
      compact: compute logits only of tokens whose weight is not 0. The result is the same up to rounding; it saves time
        where many weights are 0.

    Returns:
      Sums over the batch, whose `reported` is the cross-entropy without z-loss.
    """
    with jax.named_scope("cross_entropy"):
        context = LossContext(model.sharding, chunk, z_loss, compact)
        sums: Sums = _cross_entropy(context, hidden_BTD, _head(model), targets_BT, weights_BT)
        return sums


@dataclasses.dataclass(frozen=True)
class LossContext:
    """What is static about a loss; see the arguments of `chunked_cross_entropy`."""

    sharding: Sharding
    chunk: int
    z_loss: float = 0.0
    compact: bool = False


def _head(model: Qwen2) -> jax.Array:
    """The output head [V, D]."""
    head: jax.Array = (model.embed if model.config.tie_word_embeddings else model.lm_head).weight[...]
    return head


# Gradients with respect to the hidden states and the head, in their dtypes; None if not asked for.
_Gradients = tuple[jax.Array, jax.Array] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    context: LossContext, hidden: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array
) -> Sums:
    return _on_mesh(context, False, hidden, head_VD, targets, weights)[0]


def _forward(context: LossContext, *args: jax.Array) -> tuple[Sums, _Gradients]:
    return _on_mesh(context, True, *args)


def _backward(
    context: LossContext, gradients: tuple[jax.Array, jax.Array], dsums: Sums
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden, head = ((x * dsums.loss).astype(x.dtype) for x in gradients)
    return hidden, head, None, None


_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(context: LossContext, differentiate: bool, *args: jax.Array) -> tuple[Sums, _Gradients]:
    """The sums, and if asked for the gradients of `loss`."""
    s, replicated = context.sharding, P()
    sums_specs = Sums(replicated, replicated, replicated)  # type: ignore[arg-type]
    run = jax.shard_map(
        functools.partial(_local, context, differentiate),
        in_specs=(s.hidden, s.vocab, s.tokens, s.tokens),
        out_specs=(sums_specs, (s.hidden, s.vocab) if differentiate else None),
        check_vma=False,
    )
    result: tuple[Sums, _Gradients] = run(*args)
    return result


def _local(
    context: LossContext,
    differentiate: bool,
    hidden_BTD: jax.Array,
    head_vD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Sums, _Gradients]:
    """One device's tokens against its part of the vocabulary."""
    dtype = hidden_BTD.dtype
    w_vD = _gathered_head(head_vD, dtype)

    def body(
        carry: tuple[Sums, jax.Array | None], inputs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[Sums, jax.Array | None], jax.Array | None]:
        (sums, dhead), (x_cD, targets_c, weights_c) = carry, inputs
        logits_cv, is_target, log_total_c, picked_c = _log_totals(x_cD, w_vD, targets_c)
        # The sums.
        cross_entropy = ((log_total_c - picked_c) * weights_c).sum()
        loss = cross_entropy + context.z_loss * (log_total_c**2 * weights_c).sum()
        part = Sums(loss, weights_c.sum(), cross_entropy)
        sums = jax.tree.map(jnp.add, sums, part)
        if not differentiate:
            return (sums, None), None
        # The gradients, from the same logits.
        dlog_total_c = 1.0 + 2.0 * context.z_loss * log_total_c
        probability_cv = jnp.exp(logits_cv - log_total_c[:, None])
        dlogits_cv = ((probability_cv * dlog_total_c[:, None] - is_target) * weights_c[:, None]).astype(dtype)
        dx_cD = jax.lax.psum(einsum_f32("cv,vD->cD", dlogits_cv, w_vD), "tensor").astype(dtype)
        assert dhead is not None
        return (sums, dhead + einsum_f32("cv,cD->vD", dlogits_cv, x_cD)), dx_cD

    dhead_zero = jnp.zeros(head_vD.shape[:1] + hidden_BTD.shape[-1:], jnp.float32) if differentiate else None
    inputs = hidden_BTD, targets_BT, weights_BT
    counts = weights_BT != 0 if context.compact else None
    (sums, dhead), dhidden_BTD = _over_chunks(body, (zero_sums(), dhead_zero), inputs, context.chunk, counts)
    # Over the devices that have other tokens.
    sums = jax.lax.psum(sums, context.sharding.row_axes)
    if not differentiate:
        return sums, None
    assert dhead is not None
    return sums, (dhidden_BTD, _reduced_head_gradient(dhead, context.sharding).astype(head_vD.dtype))


def chunked_log_probs(
    model: Qwen2, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array | None, chunk: int
) -> jax.Array:
    """Log-probability of each target. Logits exist for one chunk of a device's tokens at a time.

    The backward pass computes the logits of each chunk again, from the softmax denominators that the forward pass kept.
    Tokens whose weight is 0 never reach the output head.

    Args:
      model: for its output head.
      hidden_BTD: normalised hidden states, sharded as `Sharding.hidden`.
      targets_BT: int32 ids, sharded as `Sharding.tokens`.
      weights_BT: float32, sharded alike: which tokens are computed. They get no gradient. None for all tokens.
      chunk: tokens of one device whose logits exist at one time.

    Returns:
      Float32 [B, T], in nats, sharded as `Sharding.tokens`; 0 where the weight is 0.
    """
    with jax.named_scope("log_probs"):
        counts_BT = None if weights_BT is None else weights_BT != 0
        context = LossContext(model.sharding, chunk, compact=weights_BT is not None)
        log_probs_BT: jax.Array = _log_probs(context, hidden_BTD, _head(model), targets_BT, counts_BT)
        return log_probs_BT


# Hidden states, head, targets, which tokens count, and the logs of the softmax denominators.
_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(
    context: LossContext, hidden: jax.Array, head: jax.Array, targets: jax.Array, counts: jax.Array | None
) -> jax.Array:
    return _log_probs_forward(context, hidden, head, targets, counts)[0]


def _log_probs_forward(
    context: LossContext, hidden: jax.Array, head: jax.Array, targets: jax.Array, counts: jax.Array | None
) -> tuple[jax.Array, _Residuals]:
    s = context.sharding

    @jax.shard_map(in_specs=(s.hidden, s.vocab, s.tokens, s.tokens), out_specs=(s.tokens, s.tokens), check_vma=False)
    def local(
        hidden_BTD: jax.Array, head_vD: jax.Array, targets_BT: jax.Array, counts_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        w_vD = _gathered_head(head_vD, hidden_BTD.dtype)

        def body(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            x_cD, targets_c = inputs
            _, _, log_total_c, picked_c = _log_totals(x_cD, w_vD, targets_c)
            return None, (picked_c - log_total_c, log_total_c)

        _, found = _over_chunks(body, None, (hidden_BTD, targets_BT), context.chunk, counts_BT)
        result: tuple[jax.Array, jax.Array] = found
        return result

    log_probs, log_totals = local(hidden, head, targets, counts)
    return log_probs, (hidden, head, targets, counts, log_totals)


def _log_probs_backward(
    context: LossContext, kept: _Residuals, dlog_probs: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    s = context.sharding

    @jax.shard_map(
        in_specs=(s.hidden, s.vocab, s.tokens, s.tokens, s.tokens, s.tokens),
        out_specs=(s.hidden, s.vocab),
        check_vma=False,
    )
    def local(
        hidden_BTD: jax.Array,
        head_vD: jax.Array,
        targets_BT: jax.Array,
        counts_BT: jax.Array | None,
        log_totals_BT: jax.Array,
        dlog_probs_BT: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        dtype = hidden_BTD.dtype
        w_vD = _gathered_head(head_vD, dtype)

        def body(dhead: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            x_cD, targets_c, log_total_c, dlog_probs_c = inputs
            logits_cv, is_target = _logits(x_cD, w_vD, targets_c)
            probability_cv = jnp.exp(logits_cv - log_total_c[:, None])
            dlogits_cv = ((is_target - probability_cv) * dlog_probs_c[:, None]).astype(dtype)
            dx_cD = jax.lax.psum(einsum_f32("cv,vD->cD", dlogits_cv, w_vD), "tensor").astype(dtype)
            return dhead + einsum_f32("cv,cD->vD", dlogits_cv, x_cD), dx_cD

        dhead = jnp.zeros(head_vD.shape[:1] + hidden_BTD.shape[-1:], jnp.float32)
        inputs = hidden_BTD, targets_BT, log_totals_BT, dlog_probs_BT
        dhead, dhidden_BTD = _over_chunks(body, dhead, inputs, context.chunk, counts_BT)
        return dhidden_BTD, _reduced_head_gradient(dhead, s).astype(head_vD.dtype)

    dhidden, dhead = local(*kept, dlog_probs)
    return dhidden, dhead, None, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def segment_sums(x_BT: jax.Array, segment_ids_BT: jax.Array, max_segments: int, sharding: Sharding) -> jax.Array:
    """Sums over the segments of packed rows; differentiable with respect to x.

    Args:
      x_BT: float32, sharded as `Sharding.tokens`, in any order of tokens.
      segment_ids_BT: int32, in the same order; segments are counted from 1 in each row, 0 is padding.
      max_segments: segments after that many are left out.
      sharding: of the current mesh.

    Returns:
      Float32 [B, max_segments], sharded over rows: element s is the sum over segment s + 1 of the row, 0 where there is
      none.
    """

    @jax.shard_map(in_specs=(sharding.tokens, sharding.tokens), out_specs=P(sharding.tokens[0], None))
    def local(x_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        # The comparison is fused into the sum: no array [B, T, max_segments] exists.
        here_BTs = segment_ids_BT[:, :, None] == jnp.arange(1, max_segments + 1)
        return jax.lax.psum(jnp.where(here_BTs, x_BT[:, :, None], 0.0).sum(1), "context")

    with jax.named_scope("segment_sums"):
        sums_Bs: jax.Array = local(x_BT, segment_ids_BT)
        return sums_Bs


def _over_chunks(
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


def _gathered_head(head_vD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A tensor shard's part of the head, in the compute dtype."""
    w_vD: jax.Array = jax.lax.all_gather(head_vD.astype(dtype), "fsdp", axis=1, tiled=True)
    return w_vD


def _reduced_head_gradient(dhead_vD: jax.Array, sharding: Sharding) -> jax.Array:
    """The gradient of the head over all devices that have other tokens, as the head is sharded."""
    dhead_vD = jax.lax.psum(dhead_vD, tuple(axis for axis in sharding.row_axes if axis != "fsdp"))
    return reduce_scatter(dhead_vD, 1)


def _log_totals(
    x_cD: jax.Array, w_vD: jax.Array, targets_c: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The logits [c, v] of one tensor shard, where they are the targets' [c, v], and over all tensor shards the log of
    the softmax denominator and the target's logit, each [c]."""
    logits_cv, is_target = _logits(x_cD, w_vD, targets_c)
    top_c, total_c, picked_c = _statistics(logits_cv, is_target)
    highest_c = jax.lax.pmax(top_c, "tensor")
    total_c, picked_c = jax.lax.psum((total_c * jnp.exp(top_c - highest_c), picked_c), "tensor")
    return logits_cv, is_target, highest_c + jnp.log(total_c), picked_c


def _logits(x_cD: jax.Array, w_vD: jax.Array, targets_c: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits of one tensor shard, and where they are the targets', each [c, v]."""
    v = w_vD.shape[0]
    first = jax.lax.axis_index("tensor") * v
    return einsum_f32("cD,vD->cv", x_cD, w_vD), jnp.arange(v) == (targets_c - first)[:, None]


def _statistics(logits_cv: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The highest logit, the sum of exp(logit - highest), and the target's logit (0 if another shard has it), each [c].

    One pass computes all three: the logits are the largest array of a step, and finding the maximum first would read
    them twice.
    """

    def join(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top), a[2] + b[2]

    zero, lowest = jnp.zeros((), logits_cv.dtype), jnp.array(jnp.finfo(logits_cv.dtype).min)
    operands = logits_cv, jnp.ones_like(logits_cv), jnp.where(is_target, logits_cv, zero)
    top, total, picked = jax.lax.reduce(operands, (lowest, zero, zero), join, (1,))
    return top, total, picked
