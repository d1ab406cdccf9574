"""The router: which experts each token uses, with which weights, and statistics of these choices."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.config import MoE as MoEConfig
from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.kernels.matmul.grouped import Implementation as Grouped
from qwen_jax.linear import rms_norm
from qwen_jax.moe.exchange import ExpertExchange
from qwen_jax.moe.experts import MoEWeights
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.quantization import Activations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Statistics of a layer's router, summed over all tokens of the batch on all devices; float32.

    Attributes:
      load_E: number of tokens that chose each expert. It has no gradient.
      probability_E: the router's probability of each expert.
      z: squared log of the softmax denominator.
      entropy: entropy of the router's probabilities, in nats. It has no gradient.
      tokens: number of tokens that are not padding.
      dropped: number of assignments for which the expert had no room; 0 without a capacity.
    """

    load_E: jax.Array
    probability_E: jax.Array
    z: jax.Array
    entropy: jax.Array
    tokens: jax.Array
    dropped: jax.Array


@dataclasses.dataclass(frozen=True)
class MoEContext:
    """The static settings of the routed part of a layer.

    Attributes:
      config: the MoE part of the architecture.
      sharding: of the current mesh.
      eps: epsilon of the norm before the router.
      capacity_factor: see `qwen_jax.options.Options`.
      grouped: kernel of the grouped products; see `qwen_jax.kernels.matmul.grouped`.
      keep_dots: the backward pass keeps the results of matrix products and recomputes everything else.
      quantized: implementation of products of few rows with quantised experts; see
        `qwen_jax.kernels.matmul.quantized_grouped`.
      expert_exchange: how tokens reach the devices of their experts; see `qwen_jax.moe.exchange`.
      gate_up_activations, down_activations: what the rows of these products are rounded to, with one scale for each.
    """

    config: MoEConfig
    sharding: Sharding
    eps: float
    capacity_factor: float
    grouped: Grouped
    keep_dots: bool
    quantized: str = "auto"
    expert_exchange: ExpertExchange = "auto"
    gate_up_activations: Activations = "none"
    down_activations: Activations = "none"


@dataclasses.dataclass(frozen=True)
class RouterOutput:
    """The router's decisions for one device's tokens.

    Attributes:
      x_ND: normalised tokens.
      weights_Nk: weights of the chosen experts, in the dtype of x.
      ids_Nk: int32 ids of the chosen experts.
      masked_ids_Nk: `ids_Nk`, where padding has the out-of-range id E and so is sent to no expert.
      logits_NE: float32 router logits.
      valid_N: which tokens are not padding; None if all are valid and no statistics are wanted.
    """

    x_ND: jax.Array
    weights_Nk: jax.Array
    ids_Nk: jax.Array
    masked_ids_Nk: jax.Array
    logits_NE: jax.Array
    valid_N: jax.Array | None


def route_tokens(
    context: MoEContext,
    weights: MoEWeights,
    x_btD: jax.Array,
    valid_bt: jax.Array | None,
    ids_Nk: jax.Array | None = None,
) -> RouterOutput:
    """Normalises one device's tokens and routes them.

    Args:
      context: static settings.
      weights: of the layer; this uses the norm and the router.
      x_btD: one device's part of the residual stream.
      valid_bt: which tokens are not padding; None if all are valid and no statistics are wanted.
      ids_Nk: expert ids of an earlier call; None chooses them.
    """
    x_ND = rms_norm(x_btD, weights.norm_D, context.eps).reshape(-1, x_btD.shape[-1])
    weights_Nk, ids_Nk, logits_NE = route(x_ND, weights.gathered_router(), context.config, ids_Nk)
    valid_N = None if valid_bt is None else valid_bt.reshape(-1)
    masked_ids_Nk = ids_Nk if valid_N is None else jnp.where(valid_N[:, None], ids_Nk, context.config.num_experts)
    return RouterOutput(x_ND, weights_Nk, ids_Nk, masked_ids_Nk, logits_NE, valid_N)


def route(
    x_ND: jax.Array, router_ED: jax.Array, moe: MoEConfig, ids_Nk: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses k experts for each token, as `Qwen2MoeForCausalLM` of transformers does.

    Logits are rounded to the dtype of x. Their softmax over all experts is float32.

    Args:
      x_ND: normalised tokens.
      router_ED: the router's weight, in the dtype of x.
      moe: the MoE part of the architecture.
      ids_Nk: int32 expert ids to use instead of the k most probable ones.

    Returns:
      Weights [N, k] in the dtype of x, expert ids int32 [N, k], logits float32 [N, E].
    """
    logits = einsum_f32("nd,ed->ne", x_ND, router_ED).astype(x_ND.dtype).astype(jnp.float32)
    p = jax.nn.softmax(logits)
    if ids_Nk is None:
        top, ids_Nk = lax.top_k(p, moe.num_experts_per_tok)
    else:
        top = jnp.take_along_axis(p, ids_Nk, axis=1)
    if moe.norm_topk_prob:
        top = top / top.sum(-1, keepdims=True)
    return top.astype(x_ND.dtype), ids_Nk, logits


def router_stats(context: MoEContext, routed: RouterOutput, dropped: jax.Array | float) -> RouterStats | None:
    """Sums statistics over all tokens on all devices.

    Args:
      context: static settings.
      routed: the router's decisions for this device's tokens.
      dropped: number of this device's assignments that were dropped.

    Returns:
      The statistics, or None if `routed.valid_N` is None.
    """
    if routed.valid_N is None:
        return None
    keep = routed.valid_N.astype(jnp.float32)
    log_p, log_total = jax.nn.log_softmax(routed.logits_NE), jax.nn.logsumexp(routed.logits_NE, -1)
    p = jnp.exp(log_p)
    chosen_NE = (routed.ids_Nk[:, :, None] == jnp.arange(context.config.num_experts)).sum(1)
    sums = RouterStats(
        load_E=(chosen_NE * keep[:, None]).sum(0),
        probability_E=(p * keep[:, None]).sum(0),
        z=(log_total**2 * keep).sum(),
        entropy=lax.stop_gradient((-(p * log_p).sum(-1) * keep).sum()),
        tokens=keep.sum(),
        dropped=jnp.asarray(dropped, jnp.float32),
    )
    total: RouterStats = lax.psum(sums, context.sharding.row_axes)
    return total
