"""Dispatch with a capacity: each expert has a fixed number of slots, and overflowing tokens are dropped.

What is exchanged and multiplied has one size, whatever the router does.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.moe.dispatch import Dispatched, times_scales
from qwen_jax.moe.exchange import AXIS
from qwen_jax.moe.experts import Matrices, as_array
from qwen_jax.moe.router import MoEContext, RouterOutput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CapacityInfo:
    """Where dispatch with a capacity placed the tokens.

    It implements `qwen_jax.moe.dispatch.DispatchInfo`.

    Attributes:
      token_S: int32, the token in each of this device's slots for all experts; `num_tokens` in an empty slot.
      num_tokens: of this device.
    """

    token_S: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})

    def multiply(
        self, context: MoEContext, rows: jax.Array, matrices: Matrices, scales: jax.Array | None = None
    ) -> jax.Array:
        """Batched product of the slots of each expert here, [experts, slots, width]."""
        y = einsum_f32("eck,enk->ecn", rows, as_array(matrices, rows.dtype)).astype(rows.dtype)
        return times_scales(y, scales)

    def combine(self, context: MoEContext, rows: jax.Array) -> jax.Array:
        """Returns the slots to their tokens and sums those of each token. Empty slots are dropped."""
        rows_SD = _to_tokens(context, rows).reshape(self.token_S.shape[0], -1)
        out_ND = jnp.zeros((self.num_tokens, rows_SD.shape[1]), jnp.float32)
        return out_ND.at[self.token_S].add(rows_SD.astype(jnp.float32), mode="drop")


def dispatch_with_capacity(context: MoEContext, routed: RouterOutput) -> Dispatched:
    """Places one device's tokens in the slots of their experts and sends them to the devices of these experts.

    An expert has room for `capacity_factor` times the tokens that the device would send it if loads were even. Tokens
    are placed in their order, and those that find no room are dropped (GShard, arXiv:2006.16668, section 2.2).

    Args:
      context: static settings.
      routed: the router's decisions.
    """
    E, k = context.config.num_experts, context.config.num_experts_per_tok
    N = routed.x_ND.shape[0]
    room = min(math.ceil(context.capacity_factor * N * k / E), N)
    num_slots = E * room

    # Sort: an assignment's slot is the number of earlier assignments to the same expert.
    expert_A = routed.masked_ids_Nk.reshape(-1)
    is_for_AE = expert_A[:, None] == jnp.arange(E)
    before_A = jnp.where(is_for_AE, jnp.cumsum(is_for_AE, axis=0) - 1, 0).sum(1)
    has_room_A = (before_A < room) & is_for_AE.any(1)
    dropped = (is_for_AE.any(1) & ~has_room_A).sum()
    slot_A = jnp.where(has_room_A, expert_A * room + before_A, num_slots)
    token_S = jnp.full((num_slots,), N, jnp.int32).at[slot_A].set(jnp.arange(N * k) // k, mode="drop")
    rows_SD = routed.x_ND.at[token_S].get(mode="fill", fill_value=0)
    weights_A = routed.weights_Nk.reshape(-1)
    weights_S = jnp.zeros((num_slots,), weights_A.dtype).at[slot_A].set(weights_A, mode="drop")

    # Send: every slot, empty or not.
    rows, weights = _to_experts(context, rows_SD), _to_experts(context, weights_S)
    return Dispatched(rows, weights, dropped, CapacityInfo(token_S, N))


def _to_experts(context: MoEContext, x: jax.Array) -> jax.Array:
    """[slots for all experts, ...] -> [experts here, slots of all senders, ...]."""
    n, E = context.sharding.expert, context.config.num_experts
    x = x.reshape(n, E // n, x.shape[0] // E, *x.shape[1:])
    if context.sharding.exchanges:
        return jnp.moveaxis(lax.all_to_all(x, AXIS, 0, 0), 0, 1).reshape(E // n, -1, *x.shape[3:])
    return lax.dynamic_index_in_dim(x, lax.axis_index(AXIS), keepdims=False)


def _to_tokens(context: MoEContext, y: jax.Array) -> jax.Array:
    """The inverse of `_to_experts`: [n devices, experts of each, slots, ...], zeros for what was not computed here."""
    n = context.sharding.expert
    if context.sharding.exchanges:
        y = y.reshape(y.shape[0], n, y.shape[1] // n, *y.shape[2:])
        return lax.all_to_all(jnp.moveaxis(y, 1, 0), AXIS, 0, 0)
    own = jnp.zeros((n, *y.shape), y.dtype)
    return lax.dynamic_update_index_in_dim(own, y, lax.axis_index(AXIS), 0)
