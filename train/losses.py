"""Next-token cross-entropy over a large vocabulary: chunked, vocabulary-sharded, its gradient computed on the way."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.model import Qwen2
from qwen_jax.parallel.collectives import reduce_scatter
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

    Returns:
      Sums over the batch, whose `reported` is the cross-entropy without z-loss.
    """
    head = model.embed if model.config.tie_word_embeddings else model.lm_head
    with jax.named_scope("cross_entropy"):
        context = LossContext(model.sharding, chunk, z_loss)
        sums: Sums = _cross_entropy(context, hidden_BTD, head.weight[...], targets_BT, weights_BT)
        return sums


@dataclasses.dataclass(frozen=True)
class LossContext:
    """What is static about a cross-entropy; see the arguments of `chunked_cross_entropy`."""

    sharding: Sharding
    chunk: int
    z_loss: float


# Gradients with respect to the hidden states, in their dtype, and the head, in float32; None if not asked for.
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
    hidden, head = gradients
    return (hidden * dsums.loss).astype(hidden.dtype), head * dsums.loss, None, None


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
    dtype, v, D = hidden_BTD.dtype, head_vD.shape[0], hidden_BTD.shape[-1]
    w_vD = jax.lax.all_gather(head_vD.astype(dtype), "fsdp", axis=1, tiled=True)
    chunks = _Chunks.of(targets_BT.size, context.chunk)

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

    dhead_zero = jnp.zeros((v, D), jnp.float32) if differentiate else None
    inputs = chunks.split(hidden_BTD, D), chunks.split(targets_BT), chunks.split(weights_BT)
    (sums, dhead), dx_ncD = jax.lax.scan(body, (zero_sums(), dhead_zero), inputs)
    # Over the devices that have other tokens.
    rows = context.sharding.row_axes
    sums = jax.lax.psum(sums, rows)
    if not differentiate:
        return sums, None
    assert dhead is not None
    assert dx_ncD is not None
    dhidden_BTD = chunks.join(dx_ncD, D).reshape(hidden_BTD.shape)
    dhead = jax.lax.psum(dhead, tuple(axis for axis in rows if axis != "fsdp"))
    return sums, (dhidden_BTD, reduce_scatter(dhead, 1))


def chunked_token_losses(model: Qwen2, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int) -> jax.Array:
    """Cross-entropy of each token, for evaluation. Logits exist for one chunk of a device's tokens at a time.

    It is not meant to be differentiated: that would keep the logits of every chunk.

    Args:
      model: for its output head.
      hidden_BTD: normalised hidden states, sharded as `Sharding.hidden`.
      targets_BT: int32 ids, sharded as `Sharding.tokens`.
      chunk: tokens of one device whose logits exist at one time.

    Returns:
      Float32 [B, T], in nats, sharded as `Sharding.tokens`.
    """
    head, s = model.embed if model.config.tie_word_embeddings else model.lm_head, model.sharding

    @jax.shard_map(in_specs=(s.hidden, s.vocab, s.tokens), out_specs=s.tokens, check_vma=False)
    def local(hidden_BTD: jax.Array, head_vD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        D = hidden_BTD.shape[-1]
        w_vD = jax.lax.all_gather(head_vD.astype(hidden_BTD.dtype), "fsdp", axis=1, tiled=True)
        chunks = _Chunks.of(targets_BT.size, chunk)

        def body(carry: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            x_cD, targets_c = inputs
            _, _, log_total_c, picked_c = _log_totals(x_cD, w_vD, targets_c)
            return None, log_total_c - picked_c

        _, losses_nc = jax.lax.scan(body, None, (chunks.split(hidden_BTD, D), chunks.split(targets_BT)))
        return chunks.join(losses_nc).reshape(targets_BT.shape)

    with jax.named_scope("token_losses"):
        losses_BT: jax.Array = local(hidden_BTD, head.weight[...], targets_BT)
        return losses_BT


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """n chunks of c tokens, the last one padded: with weight 0 where there are weights."""

    count: int
    n: int
    c: int

    @classmethod
    def of(cls, count: int, chunk: int) -> "_Chunks":
        """Chunks of at most `chunk` of `count` tokens."""
        n = -(-count // chunk)
        return cls(count, n, -(-count // n))

    def split(self, x: jax.Array, *rest: int) -> jax.Array:
        """[n, c, ...] from arrays of one number, or of `rest`, for each token."""
        x = x.reshape(self.count, *rest)
        padding = (0, self.n * self.c - self.count), *((0, 0),) * len(rest)
        return jnp.pad(x, padding).reshape(self.n, self.c, *rest)

    def join(self, x: jax.Array, *rest: int) -> jax.Array:
        """[count, ...] from [n, c, ...], without the padding."""
        return x.reshape(self.n * self.c, *rest)[: self.count]


def _log_totals(
    x_cD: jax.Array, w_vD: jax.Array, targets_c: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The logits [c, v] of one tensor shard, where they are the targets' [c, v], and over all tensor shards the log of
    the softmax denominator and the target's logit, each [c]."""
    v = w_vD.shape[0]
    first = jax.lax.axis_index("tensor") * v
    logits_cv = einsum_f32("cD,vD->cv", x_cD, w_vD)
    is_target = jnp.arange(v) == (targets_c - first)[:, None]
    top_c, total_c, picked_c = _statistics(logits_cv, is_target)
    highest_c = jax.lax.pmax(top_c, "tensor")
    total_c, picked_c = jax.lax.psum((total_c * jnp.exp(top_c - highest_c), picked_c), "tensor")
    return logits_cv, is_target, highest_c + jnp.log(total_c), picked_c


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
