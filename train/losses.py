"""Next-token cross-entropy over a large vocabulary: chunk by chunk, split over devices, its gradient on the way."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.model import Qwen2
from qwen_jax.parallel.collectives import reduce_scatter
from qwen_jax.parallel.sharding import Sharding
from train.data.batch import Batch


@functools.partial(jax.tree_util.register_dataclass, data_fields=("loss", "weight", "cross_entropy"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Sums:
    """Numerators and denominator of a mean loss. Add them over parts of a batch, then divide once.

    Attributes:
      loss: float32 scalar, what is minimised: the sum of weight x (cross-entropy + z-loss), in nats.
      weight: float32 scalar, sum of weights.
      cross_entropy: float32 scalar, `loss` without z-loss. It carries no gradient.
    """

    loss: jax.Array
    weight: jax.Array
    cross_entropy: jax.Array


def next_token_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What each position predicts: the next token of the same document, with that token's weight.

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
) -> Sums:
    """Weighted cross-entropy; logits exist for a chunk of a device's tokens at a time, and are made once.

    The gradient is linear in that of the loss, a scalar: the pass that makes the logits of a chunk makes its part of
    the gradient too, and keeps only that. Each tensor shard has its own part of the vocabulary; what crosses the tensor
    axis is three numbers a token, and the gradient of the hidden state.

    Args:
      model: for its output head.
      hidden_BTD: normalised hidden states, laid out as `Sharding.hidden`.
      targets_BT: int32 ids, laid out as `Sharding.tokens`.
      weights_BT: float32, likewise. They get no gradient.
      chunk: tokens of one device whose logits exist at one time.
      z_loss: coefficient of the squared log of the softmax's denominator (Chowdhery et al. 2022, arXiv:2204.02311,
        section 5), which keeps the logits from drifting away.
    """
    head = model.embed if model.config.tie_word_embeddings else model.lm_head
    with jax.named_scope("cross_entropy"):
        how = _How(model.sharding, chunk, z_loss)
        sums: Sums = _cross_entropy(how, hidden_BTD, head.weight[...], targets_BT, weights_BT)
        return sums


@dataclasses.dataclass(frozen=True)
class _How:
    sharding: Sharding
    chunk: int
    z_loss: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(how: _How, hidden: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array) -> Sums:
    return _on_mesh(how, False, hidden, head_VD, targets, weights)[0]


def _forward(how: _How, *args: jax.Array) -> tuple[Sums, Any]:
    return _on_mesh(how, True, *args)


def _backward(how: _How, gradients: tuple[jax.Array, jax.Array], by: Sums) -> tuple[Any, ...]:
    hidden, head = gradients
    return (hidden * by.loss).astype(hidden.dtype), head * by.loss, None, None


_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(how: _How, differentiate: bool, *args: jax.Array) -> tuple[Sums, Any]:
    """The sums, and the gradients of `loss` by the hidden states (in their dtype) and the head (float32)."""
    s = how.sharding
    everywhere: Any = P()
    out_specs = Sums(everywhere, everywhere, everywhere), ((s.hidden, s.vocab) if differentiate else None)
    run = jax.shard_map(
        functools.partial(_local, how, differentiate),
        in_specs=(s.hidden, s.vocab, s.tokens, s.tokens),
        out_specs=out_specs,
        check_vma=False,
    )
    result: tuple[Sums, Any] = run(*args)
    return result


def _local(
    how: _How,
    differentiate: bool,
    hidden_BTD: jax.Array,
    head_vD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Sums, Any]:
    """One device's tokens against its part of the vocabulary."""
    dtype, v, D = hidden_BTD.dtype, head_vD.shape[0], hidden_BTD.shape[-1]
    w_vD = jax.lax.all_gather(head_vD.astype(dtype), "fsdp", axis=1, tiled=True)
    first = jax.lax.axis_index("tensor") * v
    count = targets_BT.size
    n = -(-count // how.chunk)
    c = -(-count // n)

    def chunks(x: jax.Array, *rest: int) -> jax.Array:
        x = x.reshape(count, *rest)
        return jnp.pad(x, ((0, n * c - count), *((0, 0),) * len(rest))).reshape(n, c, *rest)

    def body(carry: Any, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array | None]:
        (sums, head_gradient), (x_cD, targets_c, weights_c) = carry, inputs
        logits_cv = einsum_f32("cD,vD->cv", x_cD, w_vD)
        is_target = jnp.arange(v) == (targets_c - first)[:, None]
        top_c, total_c, picked_c = _statistics(logits_cv, is_target)
        highest_c = jax.lax.pmax(top_c, "tensor")
        total_c, picked_c = jax.lax.psum((total_c * jnp.exp(top_c - highest_c), picked_c), "tensor")
        log_total_c = highest_c + jnp.log(total_c)
        cross_entropy = ((log_total_c - picked_c) * weights_c).sum()
        loss = cross_entropy + how.z_loss * (log_total_c**2 * weights_c).sum()
        part = Sums(loss, weights_c.sum(), cross_entropy)
        sums = jax.tree.map(jnp.add, sums, part)
        if not differentiate:
            return (sums, None), None
        by_probability_c = 1.0 + 2.0 * how.z_loss * log_total_c
        probability_cv = jnp.exp(logits_cv - log_total_c[:, None])
        d_cv = ((probability_cv * by_probability_c[:, None] - is_target) * weights_c[:, None]).astype(dtype)
        d_cD = jax.lax.psum(einsum_f32("cv,vD->cD", d_cv, w_vD), "tensor").astype(dtype)
        return (sums, head_gradient + einsum_f32("cv,cD->vD", d_cv, x_cD)), d_cD

    zero = jnp.zeros((), jnp.float32)
    head_zero = jnp.zeros((v, D), jnp.float32) if differentiate else None
    inputs = chunks(hidden_BTD, D), chunks(targets_BT), chunks(weights_BT)
    d_ncD: Any
    (sums, head_gradient), d_ncD = jax.lax.scan(body, (Sums(zero, zero, zero), head_zero), inputs)
    rows = how.sharding.row_axes
    sums = jax.lax.psum(sums, rows)
    if not differentiate:
        return sums, None
    d_BTD = d_ncD.reshape(n * c, D)[:count].reshape(hidden_BTD.shape)
    head_gradient = jax.lax.psum(head_gradient, tuple(axis for axis in rows if axis != "fsdp"))
    return sums, (d_BTD, reduce_scatter(head_gradient, 1))


def _statistics(logits_cv: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The highest logit, the sum of exp(logit - highest), and the target's logit (0 if it is not here), each [c].

    In one reading: the logits are the largest array of a step, and to find the maximum first would read them once more.
    """

    def join(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top), a[2] + b[2]

    zero, lowest = jnp.zeros((), logits_cv.dtype), jnp.array(jnp.finfo(logits_cv.dtype).min)
    operands = logits_cv, jnp.ones_like(logits_cv), jnp.where(is_target, logits_cv, zero)
    top, total, picked = jax.lax.reduce(operands, (lowest, zero, zero), join, (1,))
    return top, total, picked
