"""A loss that is any function of each token's log-probability, in one pass over the logits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.model import Qwen2
from qwen_jax.output_head import HeadContext, gathered_head, head_of, log_totals_of, over_chunks, reduced_head_gradient

TokenFunction = Callable[[jax.Array, Any], jax.Array]
"""Losses of tokens from their log-probabilities and other numbers of theirs, each [n]; it acts on each token alone."""


def chunked_token_loss(
    model: Qwen2,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    function: TokenFunction,
    given: Any,
    chunk: int,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of a function of the log-probability of each target. Logits exist for one chunk at a time, and once.

    The pass that computes the logits of a chunk also computes the chunk's gradients, as in
    `train.losses.chunked_cross_entropy`. A function of several tokens needs `train.losses.chunked_log_probs`, whose
    backward pass computes the logits again.

    Args:
      model: for its output head.
      hidden_BTD: normalised hidden states, sharded as `Sharding.hidden`.
      targets_BT: int32 ids, sharded as `Sharding.tokens`.
      weights_BT: float32, sharded alike: tokens whose weight is 0 have no loss, and never reach the output head.
      function: the loss of a token; differentiable with respect to log-probabilities.
      given: its second argument: a tree of arrays [B, T], sharded as `Sharding.tokens`. They get no gradient.
      chunk: tokens of one device whose logits exist at one time.
      temperature: divides the logits, in float32.

    Returns:
      The sum over the batch, a float32 scalar that is differentiated; and, without gradient, log-probabilities and
      entropies, as from `train.losses.chunked_log_probs_and_entropy`.
    """
    with jax.named_scope("token_loss"):
        context = HeadContext(model.sharding, chunk, compact=True, temperature=temperature, entropy=True)
        found: _Found = _token_loss(context, function, hidden_BTD, head_of(model), targets_BT, given, weights_BT != 0)
        loss, log_probs_BT, entropy_BT = found
        return loss, jax.lax.stop_gradient(log_probs_BT), jax.lax.stop_gradient(entropy_BT)


# The loss, log-probabilities and entropies.
_Found = tuple[jax.Array, jax.Array, jax.Array]
# Gradients with respect to the hidden states and the head, in their dtypes; None if not asked for.
_Gradients = tuple[jax.Array, jax.Array] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_loss(context: HeadContext, function: TokenFunction, *arrays: Any) -> _Found:
    return _on_mesh(context, function, False, *arrays)[0]


def _forward(context: HeadContext, function: TokenFunction, *arrays: Any) -> tuple[_Found, _Gradients]:
    return _on_mesh(context, function, True, *arrays)


def _backward(
    context: HeadContext, function: TokenFunction, gradients: tuple[jax.Array, jax.Array], cotangents: _Found
) -> tuple[jax.Array, jax.Array, None, None, None]:
    hidden, head = ((x * cotangents[0]).astype(x.dtype) for x in gradients)
    return hidden, head, None, None, None


_token_loss.defvjp(_forward, _backward)


def _on_mesh(
    context: HeadContext, function: TokenFunction, differentiate: bool, *arrays: Any
) -> tuple[_Found, _Gradients]:
    s = context.sharding
    run = jax.shard_map(
        functools.partial(_local, context, function, differentiate),
        in_specs=(s.hidden, s.vocab, s.tokens, s.tokens, s.tokens),
        out_specs=((P(), s.tokens, s.tokens), (s.hidden, s.vocab) if differentiate else None),
        check_vma=False,
    )
    result: tuple[_Found, _Gradients] = run(*arrays)
    return result


def _local(
    context: HeadContext,
    function: TokenFunction,
    differentiate: bool,
    hidden_BTD: jax.Array,
    head_vD: jax.Array,
    targets_BT: jax.Array,
    given: Any,
    counts_BT: jax.Array,
) -> tuple[_Found, _Gradients]:
    """One device's tokens against its part of the vocabulary."""
    dtype = hidden_BTD.dtype
    w_vD = gathered_head(head_vD, dtype)

    def body(carry: tuple[jax.Array, jax.Array | None], inputs: Any) -> tuple[Any, Any]:
        (total, dhead), (x_cD, targets_c, given_c, counts_c) = carry, inputs
        logits_cv, is_target, log_total_c, picked_c, entropy_c, _ = log_totals_of(context, x_cD, w_vD, targets_c)
        # The losses. A chunk may end with tokens that do not count.
        log_probs_c = picked_c - log_total_c
        losses_c, pull_back = jax.vjp(lambda x_c: jnp.where(counts_c, function(x_c, given_c), 0.0), log_probs_c)
        total += losses_c.sum()
        if not differentiate:
            return (total, None), (log_probs_c, entropy_c, None)
        # The gradients, from the same logits.
        slope_c = pull_back(jnp.ones_like(losses_c))[0] / context.temperature
        probability_cv = jnp.exp(logits_cv - log_total_c[:, None])
        dlogits_cv = ((is_target - probability_cv) * slope_c[:, None]).astype(dtype)
        dx_cD = jax.lax.psum(einsum_f32("cv,vD->cD", dlogits_cv, w_vD), "tensor").astype(dtype)
        assert dhead is not None
        dhead += einsum_f32("cv,cD->vD", dlogits_cv, x_cD)
        return (total, dhead), (log_probs_c, entropy_c, dx_cD)

    dhead_zero = jnp.zeros(head_vD.shape[:1] + hidden_BTD.shape[-1:], jnp.float32) if differentiate else None
    inputs = hidden_BTD, targets_BT, given, counts_BT
    (total, dhead), (log_probs_BT, entropy_BT, dhidden_BTD) = over_chunks(
        body, (jnp.zeros((), jnp.float32), dhead_zero), inputs, context.chunk, counts_BT
    )
    # Over the devices that have other tokens.
    found = jax.lax.psum(total, context.sharding.row_axes), log_probs_BT, entropy_BT
    if not differentiate:
        return found, None
    assert dhead is not None
    return found, (dhidden_BTD, reduced_head_gradient(dhead, context.sharding).astype(head_vD.dtype))
