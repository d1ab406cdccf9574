"""Which experts tokens take, and what both ways to route, dropless and with a capacity, do alike."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.config import MoE as MoEConfig
from qwen_jax.kernels.matmul.grouped import Implementation as Grouped
from qwen_jax.kernels.reference import einsum_f32
from qwen_jax.linear import rms_norm
from qwen_jax.parallel.collectives import all_gather_weight
from qwen_jax.parallel.sharding import Sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a layer's router did, summed over all tokens of the batch, on all devices; float32.

    Attributes:
      load_E: how many tokens took each expert. No gradient.
      probability_E: the router's probabilities.
      z: squared logarithms of the softmax's denominator.
      entropy: of the router's probabilities, in nats. No gradient.
      tokens: how many there were.
      dropped: how often an expert had no room for a token; 0 without a capacity.
    """

    load_E: jax.Array
    probability_E: jax.Array
    z: jax.Array
    entropy: jax.Array
    tokens: jax.Array
    dropped: jax.Array


@dataclasses.dataclass(frozen=True)
class How:
    """What is static about the routed part of a layer.

    Attributes:
      moe: the architecture.
      sharding: of the current mesh.
      eps: of the norm before it.
      capacity_factor: 0, or room in each expert, over what even routing needs; see `Options`.
      grouped: which kernel; see `kernels.grouped`.
      keep_dots: the backward pass keeps the results of products and makes all else again.
      count: sum up a `Routing`.
    """

    moe: MoEConfig
    sharding: Sharding
    eps: float
    capacity_factor: float
    grouped: Grouped
    keep_dots: bool
    count: bool


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What the router said of one device's tokens.

    Attributes:
      x_ND: tokens, normalised.
      weights_Nk: of the experts taken.
      ids_Nk: the experts.
      wanted_Nk: the same, but for padding, which takes one that there is not.
      count: (how many assignments were dropped) -> `Routing`, or None where none is wanted.
    """

    x_ND: jax.Array
    weights_Nk: jax.Array
    ids_Nk: jax.Array
    wanted_Nk: jax.Array
    count: Callable[[Any], Routing | None]


def choose(how: How, params: Any, x_btD: jax.Array, valid: jax.Array | None, ids_Nk: jax.Array | None) -> Chosen:
    """Norm and router.

    Args:
      how: see there.
      params: norm, router, and others.
      x_btD: one device's part of the stream.
      valid: which tokens are not padding, or None for all.
      ids_Nk: see `route`.
    """
    x_ND = rms_norm(x_btD, params[0], how.eps).reshape(-1, x_btD.shape[-1])
    weights, ids, logits = route(x_ND, all_gather_weight(params[1], 1), how.moe, ids_Nk)
    valid_N = None if valid is None else valid.reshape(-1)
    wanted = ids if valid_N is None else jnp.where(valid_N[:, None], ids, how.moe.num_experts)
    return Chosen(x_ND, weights, ids, wanted, functools.partial(_count, how, logits, ids, valid_N))


def route(
    x_ND: jax.Array, router_ED: jax.Array, moe: MoEConfig, ids_Nk: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which experts tokens take, and how much of each.

    Args:
      x_ND: normalised tokens.
      router_ED: the router's weight.
      moe: the architecture.
      ids_Nk: experts that were chosen before; None chooses.

    Returns:
      Weights [N, k] in the dtype of x, expert ids int32 [N, k], logits float32 [N, E]. As in transformers, logits are
      rounded to the dtype of x, and their softmax over all experts is float32.
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


def _count(how: How, logits: jax.Array, ids: jax.Array, valid_N: jax.Array | None, dropped: Any) -> Routing | None:
    """Sums over all tokens on all devices."""
    if valid_N is None:
        return None
    E = how.moe.num_experts
    keep = valid_N.astype(jnp.float32)
    log_p, log_total = jax.nn.log_softmax(logits), jax.nn.logsumexp(logits, -1)
    p = jnp.exp(log_p)
    taken = (ids[:, :, None] == jnp.arange(E)).sum(1)
    sums = Routing(
        load_E=(taken * keep[:, None]).sum(0),
        probability_E=(p * keep[:, None]).sum(0),
        z=(log_total**2 * keep).sum(),
        entropy=lax.stop_gradient((-(p * log_p).sum(-1) * keep).sum()),
        tokens=keep.sum(),
        dropped=jnp.asarray(dropped, jnp.float32),
    )
    total: Routing = lax.psum(sums, how.sharding.row_axes)
    return total


def gated(gate_up: jax.Array, weights: jax.Array) -> jax.Array:
    """SwiGLU times the weight, which goes before the product: then its gradient needs nothing of the result."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up * weights[..., None]


def matrices(gate_up_e2FD: jax.Array) -> jax.Array:
    """Gate and up of each expert as one matrix, gathered."""
    w = all_gather_weight(gate_up_e2FD, 3)
    return w.reshape(w.shape[0], -1, w.shape[-1])
