"""Experts with a capacity: what is exchanged and multiplied has one size, and what finds no room is dropped."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.reference import einsum_f32
from qwen_jax.moe.exchange import AXIS
from qwen_jax.moe.router import How, choose, gated, matrices
from qwen_jax.parallel.collectives import all_gather_weight


def with_capacity(how: How, x_btD: jax.Array) -> tuple[Any, Any, Any]:
    """The routed part in pieces, as those without a capacity. There is room for so many of a device's tokens in each
    expert, first come, first served (GShard, arXiv:2006.16668, section 2.2).
    """
    moe, spec = how.moe, how.sharding
    E, k, n = moe.num_experts, moe.num_experts_per_tok, spec.expert
    N = x_btD.shape[0] * x_btD.shape[1]
    room = min(math.ceil(how.capacity_factor * N * k / E), N)
    e = E // n

    def first(params: Any, x_btD: jax.Array, valid: jax.Array | None, ids: jax.Array | None) -> Any:
        chosen = choose(how, params, x_btD, valid, ids)
        wanted, weights = chosen.wanted_Nk, chosen.weights_Nk
        is_for_AE = wanted.reshape(-1)[:, None] == jnp.arange(E)
        before_A = jnp.where(is_for_AE, jnp.cumsum(is_for_AE, axis=0) - 1, 0).sum(1)
        has_room = (before_A < room) & is_for_AE.any(1)
        dropped = (is_for_AE.any(1) & ~has_room).sum()
        slots = E * room
        slot_A = jnp.where(has_room, wanted.reshape(-1) * room + before_A, slots)
        token_S = jnp.full((slots,), N, jnp.int32).at[slot_A].set(jnp.arange(N * k) // k, mode="drop")
        rows = chosen.x_ND.at[token_S].get(mode="fill", fill_value=0)
        weight_S = jnp.zeros((slots,), weights.dtype).at[slot_A].set(weights.reshape(-1), mode="drop")
        w = matrices(params[2])
        rows, weight_S = _mine(rows), _mine(weight_S)
        gate_up = einsum_f32("ecd,efd->ecf", rows, w).astype(rows.dtype)
        return gate_up, (weight_S, (token_S,)), chosen.count(dropped)

    def second(params: Any, gate_up: jax.Array, weight_ec: jax.Array, where: Any) -> jax.Array:
        h = gated(gate_up, weight_ec)
        y = _given_back(einsum_f32("ecf,edf->ecd", h, all_gather_weight(params[3], 1)).astype(h.dtype))
        out = jnp.zeros((N, y.shape[-1]), jnp.float32)
        return out.at[where[0]].add(y.reshape(E * room, -1).astype(jnp.float32), mode="drop")

    def _mine(x: jax.Array) -> jax.Array:
        """[slots of all experts, ...] -> [experts here, slots of all origins, ...]."""
        x = x.reshape(n, e, room, *x.shape[1:])
        if spec.exchanges:
            return jnp.moveaxis(lax.all_to_all(x, AXIS, 0, 0), 0, 1).reshape(e, n * room, *x.shape[3:])
        return lax.dynamic_index_in_dim(x, lax.axis_index(AXIS), keepdims=False)

    def _given_back(y: jax.Array) -> jax.Array:
        if spec.exchanges:
            parts = jnp.moveaxis(y.reshape(e, n, room, *y.shape[2:]), 1, 0)
            return lax.all_to_all(parts, AXIS, 0, 0)
        own = jnp.zeros((n, *y.shape), y.dtype)
        return lax.dynamic_update_index_in_dim(own, y, lax.axis_index(AXIS), 0)

    return first, second, lambda out, of, where: out
