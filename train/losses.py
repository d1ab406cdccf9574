"""Losses and log-probabilities of tokens over a large vocabulary: chunked and vocabulary-sharded."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.model import Qwen2
from qwen_jax.output_head import (
    HeadContext,
    gathered_head,
    head_of,
    log_totals_of,
    logits_of,
    over_chunks,
    reduced_head_gradient,
)
from qwen_jax.parallel.sharding import Sharding
from train.data.batch import Batch
from train.objective import Sums, zero_sums


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Targets of next-token prediction: the next token of the same document, with that token's weight.

    Args:
      batch: packed rows [B, T].

    Returns:
      Target ids int32 [B, T], and weights float32 [B, T] that are 0 on padding and at the end of a segment.
    """

    same = (following(batch.segment_ids) == batch.segment_ids) & (batch.segment_ids > 0)
    return following(batch.tokens), jnp.where(same, following(batch.loss_weights), 0.0)


def following(x_BT: jax.Array) -> jax.Array:
    """What the next token of each row has, which is the target at this one; 0 at the end of the row.

    Args:
      x_BT: one number for each token, in the order of the rows.
    """
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


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
        context = HeadContext(model.sharding, chunk, z_loss, compact)
        found: _Found = _cross_entropy(context, hidden_BTD, head_of(model), targets_BT, weights_BT)
        return found[0]


class Predictions(NamedTuple):
    """How good predictions of tokens are, as weighted sums over the tokens. They carry no gradient.

    Attributes:
      correct: float32 scalar, of tokens whose logit is the highest; where several are equally high, each is.
      entropy: float32 scalar, of the entropies of the distributions, in nats.
    """

    correct: jax.Array
    entropy: jax.Array


def chunked_cross_entropy_and_predictions(
    model: Qwen2,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    z_loss: float = 0.0,
    compact: bool = False,
) -> tuple[Sums, Predictions]:
    """`chunked_cross_entropy`, and from the same pass over the logits how good the predictions are.

    Args:
      model, hidden_BTD, targets_BT, weights_BT, chunk, z_loss, compact: as for `chunked_cross_entropy`.
    """
    with jax.named_scope("cross_entropy"):
        context = HeadContext(model.sharding, chunk, z_loss, compact, entropy=True)
        found: _Found = _cross_entropy(context, hidden_BTD, head_of(model), targets_BT, weights_BT)
        sums, predictions = found
        assert predictions is not None
        return sums, jax.lax.stop_gradient(predictions)


# Sums, and with `HeadContext.entropy` those of predictions.
_Found = tuple[Sums, Predictions | None]
# Gradients with respect to the hidden states and the head, in their dtypes; None if not asked for.
_Gradients = tuple[jax.Array, jax.Array] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    context: HeadContext, hidden: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array
) -> _Found:
    return _on_mesh(context, False, hidden, head_VD, targets, weights)[0]


def _forward(context: HeadContext, *args: jax.Array) -> tuple[_Found, _Gradients]:
    return _on_mesh(context, True, *args)


def _backward(
    context: HeadContext, gradients: tuple[jax.Array, jax.Array], cotangents: _Found
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden, head = ((x * cotangents[0].loss).astype(x.dtype) for x in gradients)
    return hidden, head, None, None


_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(context: HeadContext, differentiate: bool, *args: jax.Array) -> tuple[_Found, _Gradients]:
    """The sums, and if asked for the gradients of `loss`."""
    s = context.sharding
    sums_specs = jax.tree.map(lambda _: P(), _zero(context))
    run = jax.shard_map(
        functools.partial(_local, context, differentiate),
        in_specs=(s.hidden, s.vocab, s.tokens, s.tokens),
        out_specs=(sums_specs, (s.hidden, s.vocab) if differentiate else None),
        check_vma=False,
    )
    result: tuple[_Found, _Gradients] = run(*args)
    return result


def _zero(context: HeadContext) -> _Found:
    zero = jnp.zeros((), jnp.float32)
    return zero_sums(), Predictions(zero, zero) if context.entropy else None


def _local(
    context: HeadContext,
    differentiate: bool,
    hidden_BTD: jax.Array,
    head_vD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[_Found, _Gradients]:
    """One device's tokens against its part of the vocabulary."""
    dtype = hidden_BTD.dtype
    w_vD = gathered_head(head_vD, dtype)

    def body(
        carry: tuple[_Found, jax.Array | None], inputs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[_Found, jax.Array | None], jax.Array | None]:
        (sums, dhead), (x_cD, targets_c, weights_c) = carry, inputs
        logits_cv, is_target, log_total_c, picked_c, entropy_c, highest_c = log_totals_of(
            context, x_cD, w_vD, targets_c
        )
        # The sums.
        cross_entropy = ((log_total_c - picked_c) * weights_c).sum()
        loss = cross_entropy + context.z_loss * (log_total_c**2 * weights_c).sum()
        predictions: Predictions | None = None
        if entropy_c is not None:
            correct_c = picked_c >= highest_c
            predictions = Predictions((correct_c * weights_c).sum(), (entropy_c * weights_c).sum())
        sums = jax.tree.map(jnp.add, sums, (Sums(loss, weights_c.sum(), cross_entropy), predictions))
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
    (sums, dhead), dhidden_BTD = over_chunks(body, (_zero(context), dhead_zero), inputs, context.chunk, counts)
    # Over the devices that have other tokens.
    sums = jax.lax.psum(sums, context.sharding.row_axes)
    if not differentiate:
        return sums, None
    assert dhead is not None
    return sums, (dhidden_BTD, reduced_head_gradient(dhead, context.sharding).astype(head_vD.dtype))


def chunked_log_probs(
    model: Qwen2,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None,
    chunk: int,
    temperature: float = 1.0,
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
      temperature: divides the logits, in float32.

    Returns:
      Float32 [B, T], in nats, sharded as `Sharding.tokens`; 0 where the weight is 0.
    """
    with jax.named_scope("log_probs"):
        counts_BT = None if weights_BT is None else weights_BT != 0
        context = HeadContext(model.sharding, chunk, compact=weights_BT is not None, temperature=temperature)
        found: _LogProbs = _log_probs(context, hidden_BTD, head_of(model), targets_BT, counts_BT)
        return found[0]


def chunked_log_probs_and_entropy(
    model: Qwen2,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None,
    chunk: int,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """`chunked_log_probs`, and from the same pass over the logits the entropy of the distribution of each target.

    Args:
      model, hidden_BTD, targets_BT, weights_BT, chunk, temperature: as for `chunked_log_probs`.

    Returns:
      Log-probabilities as there; and entropies, float32 [B, T], in nats, 0 where the weight is 0. Entropies carry no
      gradient.
    """
    with jax.named_scope("log_probs"):
        counts_BT = None if weights_BT is None else weights_BT != 0
        context = HeadContext(model.sharding, chunk, 0.0, weights_BT is not None, temperature, entropy=True)
        log_probs_BT, entropy_BT = _log_probs(context, hidden_BTD, head_of(model), targets_BT, counts_BT)
        assert entropy_BT is not None
        return log_probs_BT, jax.lax.stop_gradient(entropy_BT)


# Log-probabilities and entropies; None if they are not asked for.
_LogProbs = tuple[jax.Array, jax.Array | None]
# Hidden states, head, targets, which tokens count, and the logs of the softmax denominators.
_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(
    context: HeadContext, hidden: jax.Array, head: jax.Array, targets: jax.Array, counts: jax.Array | None
) -> _LogProbs:
    return _log_probs_forward(context, hidden, head, targets, counts)[0]


def _log_probs_forward(
    context: HeadContext, hidden: jax.Array, head: jax.Array, targets: jax.Array, counts: jax.Array | None
) -> tuple[_LogProbs, _Residuals]:
    s = context.sharding

    @jax.shard_map(
        in_specs=(s.hidden, s.vocab, s.tokens, s.tokens), out_specs=(s.tokens, s.tokens, s.tokens), check_vma=False
    )
    def local(
        hidden_BTD: jax.Array, head_vD: jax.Array, targets_BT: jax.Array, counts_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        w_vD = gathered_head(head_vD, hidden_BTD.dtype)

        def body(
            carry: None, inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[None, tuple[jax.Array, jax.Array, jax.Array | None]]:
            x_cD, targets_c = inputs
            _, _, log_total_c, picked_c, entropy_c, _ = log_totals_of(context, x_cD, w_vD, targets_c)
            return None, (picked_c - log_total_c, log_total_c, entropy_c)

        _, found = over_chunks(body, None, (hidden_BTD, targets_BT), context.chunk, counts_BT)
        result: tuple[jax.Array, jax.Array, jax.Array | None] = found
        return result

    log_probs, log_totals, entropies = local(hidden, head, targets, counts)
    return (log_probs, entropies), (hidden, head, targets, counts, log_totals)


def _log_probs_backward(
    context: HeadContext, kept: _Residuals, cotangents: _LogProbs
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
        w_vD = gathered_head(head_vD, dtype)

        def body(dhead: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            x_cD, targets_c, log_total_c, dlog_probs_c = inputs
            logits_cv, is_target = logits_of(context, x_cD, w_vD, targets_c)
            probability_cv = jnp.exp(logits_cv - log_total_c[:, None])
            slope_c = dlog_probs_c / context.temperature
            dlogits_cv = ((is_target - probability_cv) * slope_c[:, None]).astype(dtype)
            dx_cD = jax.lax.psum(einsum_f32("cv,vD->cD", dlogits_cv, w_vD), "tensor").astype(dtype)
            return dhead + einsum_f32("cv,cD->vD", dlogits_cv, x_cD), dx_cD

        dhead = jnp.zeros(head_vD.shape[:1] + hidden_BTD.shape[-1:], jnp.float32)
        inputs = hidden_BTD, targets_BT, log_totals_BT, dlog_probs_BT
        dhead, dhidden_BTD = over_chunks(body, dhead, inputs, context.chunk, counts_BT)
        return dhidden_BTD, reduced_head_gradient(dhead, s).astype(head_vD.dtype)

    dhidden, dhead = local(*kept, cotangents[0])
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


def at_segments(x_BS: jax.Array, segment_ids_BT: jax.Array, sharding: Sharding) -> jax.Array:
    """Gives each token the number of its segment.

    Args:
      x_BS: of each segment, as from `segment_sums`.
      segment_ids_BT: int32, sharded as `Sharding.tokens`, in any order of tokens.
      sharding: of the current mesh.

    Returns:
      [B, T], sharded as `Sharding.tokens`; 0 where there is no such segment.
    """

    @jax.shard_map(in_specs=(P(sharding.tokens[0], None), sharding.tokens), out_specs=sharding.tokens)
    def local(x_BS: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        # Segment 0 is none: it reads the number in front of those of the segments.
        return jnp.take_along_axis(jnp.pad(x_BS, ((0, 0), (1, 0))), segment_ids_BT, 1, mode="fill", fill_value=0)

    x_BT: jax.Array = local(x_BS, segment_ids_BT)
    return x_BT
