"""Mixture of experts, as `Qwen2MoeForCausalLM` has it: a router, the experts it picks, and one for all tokens.

A token's work is that of the experts it takes, and no token is lost: rows are sorted by expert, multiplied in groups,
and put back. Where the expert axis splits the experts, rows travel to them (`qwen_jax.moe.exchange`); where all
devices of that axis have the same rows, as when generating, each does its own experts' share and the shares are summed.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.kernels.matmul.grouped import grouped_matmul
from qwen_jax.kernels.reference import einsum_f32
from qwen_jax.linear import Weight
from qwen_jax.moe.capacity import with_capacity
from qwen_jax.moe.exchange import AXIS, Parcels, parcels, send, send_back, send_numbers
from qwen_jax.moe.router import How, Routing, choose, gated, matrices
from qwen_jax.parallel.collectives import all_gather_weight
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.remat import recompute

# With so few rows each is multiplied by itself: what counts is to read the matrices that are used, once, and no others.
_FEW = 16
ROOM = 1.5
"""Rows that a device has room for, over what it gets if all get as many; those beyond come in further rounds."""
FURTHER_ROUNDS = "further_rounds"
"""Name of the scope of what is not run while devices get about as many rows."""


class Experts(nnx.Module):
    """SwiGLU layers, all experts of a layer in two arrays."""

    def __init__(self, gate_up_E2FD: jax.Array, down_EDF: jax.Array, sharding: Sharding):
        self.gate_up = nnx.Param(gate_up_E2FD, spec=sharding.experts_gate_up)
        self.down = nnx.Param(down_EDF, spec=sharding.experts_down)


class MoE(nnx.Module):
    """The routed experts of a layer, and its shared one, which is an `MLP`.

    The routed part begins with the norm, so that no normalised input need be kept for the backward pass.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs, options: Any, shared: nnx.Module):
        assert config.moe is not None
        self.config, self.sharding, self.options = config, sharding, options
        E, F, D = config.moe.num_experts, config.moe.intermediate_size, config.hidden_size
        normal = nnx.initializers.normal(config.initializer_range)
        residual = nnx.initializers.normal(config.initializer_range / (2 * config.num_layers) ** 0.5)
        self.router = Weight(normal(rngs.params(), (E, D)), sharding.router)
        self.experts = Experts(normal(rngs.params(), (E, 2, F, D)), residual(rngs.params(), (E, D, F)), sharding)
        self.shared = shared
        self.shared_gate = Weight(normal(rngs.params(), (1, D)), sharding.router)

    def __call__(
        self, x_BTD: jax.Array, h_BTD: jax.Array, norm_D: jax.Array, valid_BT: jax.Array | None
    ) -> tuple[jax.Array, Routing | None]:
        """What all experts add.

        Args:
          x_BTD, norm_D, valid_BT: see `routed`.
          h_BTD: the stream, after the norm.

        Returns:
          [B, T, D], and the routing.
        """
        return self.routed(x_BTD, norm_D, valid_BT, self.gated(h_BTD, self.shared(h_BTD)))

    def routed(
        self,
        x_BTD: jax.Array,
        norm_D: jax.Array,
        valid_BT: jax.Array | None,
        shared_BTD: jax.Array,
        keep_dots: bool = False,
    ) -> tuple[jax.Array, Routing | None]:
        """What the routed experts add, and the shared one.

        Nothing but the sum, which is made as soon as rows are back, needs both: a compiler has the products of the
        shared expert to put into the exchanges.

        Args:
          x_BTD: the stream, before the norm.
          norm_D: weight of the norm.
          valid_BT: which tokens are not padding, and with it, that a `Routing` is wanted; None: all, and none.
          shared_BTD: what the shared expert adds.
          keep_dots: see `How`.

        Returns:
          [B, T, D], and the routing.
        """
        spec, options, moe = self.sharding, self.options, self.config.moe
        assert moe is not None
        count = valid_BT is not None
        how = How(moe, spec, self.config.rms_norm_eps, options.capacity_factor, options.grouped, keep_dots, count)
        none: Any = P()
        everywhere = Routing(none, none, none, none, none, none) if count else None
        run: Any = jax.shard_map(
            functools.partial(_local, how),
            in_specs=(
                spec.hidden, spec.norm, spec.router, spec.experts_gate_up, spec.experts_down,
                spec.tokens if count else None, spec.hidden,
            ),
            out_specs=(spec.hidden, everywhere),
            check_vma=False,
        )  # fmt: skip
        dtype = x_BTD.dtype
        weights = self.router.weight[...], self.experts.gate_up[...], self.experts.down[...]
        with jax.named_scope("experts"):
            result: tuple[jax.Array, Routing | None]
            result = run(x_BTD, norm_D, *(w.astype(dtype) for w in weights), valid_BT, shared_BTD)
        return result

    def gated(self, h_BTD: jax.Array, shared_BTD: jax.Array) -> jax.Array:
        """The shared expert's result, times the sigmoid of what its gate says of the normalised input."""
        weight = jax.reshard(self.shared_gate.weight[...].astype(h_BTD.dtype), P(None, None))
        gate = jnp.einsum("BTD,XD->BTX", h_BTD, weight)
        return jax.nn.sigmoid(gate) * shared_BTD


def _local(
    how: How, x_btD: jax.Array, norm_D: jax.Array, router: jax.Array, gate_up: jax.Array, down: jax.Array, valid: Any,
    shared_btD: jax.Array,
) -> tuple[jax.Array, Routing | None]:  # fmt: skip
    """One device's tokens."""
    first, second, further = (with_capacity if how.capacity_factor else _dropless)(how, x_btD)
    params = norm_D, router, gate_up, down
    if how.keep_dots:
        # Chosen once: a second choice could be another one by a rounding, and its rows would be in another order.
        ids = choose(how, *lax.stop_gradient((params, x_btD)), None, None).ids_Nk
        kept, rows, routing = recompute(first, params, x_btD, constants=(valid, ids))
        out = recompute(second, params, kept, rows[0], constants=(rows[1],))
    else:
        kept, rows, routing = first(params, x_btD, valid, None)
        out = second(params, kept, rows[0], rows[1])
    # Summed before further rounds: of what is needed after them only, the TPU compiler puts nothing into the exchanges.
    out = _sum(how, out) + shared_btD.reshape(out.shape)
    out = further(out, (x_btD, *params), rows[1])
    return out.astype(x_btD.dtype).reshape(x_btD.shape), routing


def _sum(how: How, out_ND: jax.Array) -> jax.Array:
    """The sum over devices that have parts of it."""
    axes = ["tensor"] * (how.sharding.tensor > 1)
    axes += [AXIS] * (how.sharding.expert > 1 and not how.sharding.exchanges)
    return lax.psum(out_ND, tuple(axes)) if axes else out_ND


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sorted(x_ND: jax.Array, order_A: jax.Array, inverse_A: jax.Array, k: int) -> jax.Array:
    """A copy of its token for each assignment, in the order given. Its gradient gathers, too, instead of scattering."""
    return x_ND[order_A // k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed(y_AD: jax.Array, order_A: jax.Array, inverse_A: jax.Array, k: int) -> jax.Array:
    """The sum, float32, of each token's assignments; the counterpart of `_sorted`."""
    return y_AD[inverse_A].reshape(-1, k, y_AD.shape[-1]).astype(jnp.float32).sum(1)


_sorted.defvjp(
    lambda x, order, inverse, k: (_sorted(x, order, inverse, k), (order, inverse)),
    lambda k, kept, by: (_summed(by, *kept, k).astype(by.dtype), None, None),
)
_summed.defvjp(
    # Of the rows only the dtype is kept.
    lambda y, order, inverse, k: (_summed(y, order, inverse, k), (order, inverse, y[:0])),
    lambda k, kept, by: (_sorted(by.astype(kept[2].dtype), *kept[:2], k), None, None),
)


@functools.partial(jax.custom_vjp)
def _permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows in another order, and their gradient in the one before."""
    return x[order]


_permuted.defvjp(
    lambda x, order, inverse: (x[order], (order, inverse)),
    lambda kept, by: (by[kept[1]], None, None),
)


def _dropless(how: How, x_btD: jax.Array) -> tuple[Any, Any, Any]:
    """The routed part in pieces: up to the first products; the others; and what comes after all is summed."""
    moe, spec = how.moe, how.sharding
    E, k, n = moe.num_experts, moe.num_experts_per_tok, spec.expert
    N = x_btD.shape[0] * x_btD.shape[1]
    A, e = N * k, E // n
    most = n * N * min(k, e)  # All tokens of all devices may want experts of one.
    room = min(math.ceil(ROOM * A), most)
    few = A <= _FEW and n == 1 and not how.count

    def first(params: Any, x_btD: jax.Array, valid: jax.Array | None, ids: jax.Array | None) -> Any:
        chosen = choose(how, params, x_btD, valid, ids)
        x_ND, weights, ids, routing = chosen.x_ND, chosen.weights_Nk, chosen.ids_Nk, chosen.count(0.0)
        w = matrices(params[2])
        if few:
            ids_A = ids.reshape(-1)
            rows = [_one(w, ids_A[a], x_ND[a // k]) for a in range(A)]
            return jnp.stack(rows), (weights.reshape(-1), (ids_A,)), routing
        here_A = chosen.wanted_Nk.reshape(-1)
        if n > 1 and not spec.exchanges:
            here_A = here_A - lax.axis_index(AXIS) * e
            here_A = jnp.where((here_A >= 0) & (here_A < e), here_A, e)
        # Those of no expert here are last.
        order = jnp.argsort(here_A, stable=True)
        inverse = jnp.zeros_like(order).at[order].set(jnp.arange(A, dtype=order.dtype), unique_indices=True)
        sizes = (here_A[:, None] == jnp.arange(E if spec.exchanges else e)).sum(0, dtype=jnp.int32)
        rows_AD = _sorted(x_ND, order, inverse, k)
        weights_A = _permuted(weights.reshape(-1), order, inverse)
        plan: Any = None
        if spec.exchanges:
            plan = parcels(sizes, n)
            now = plan.part(0, room)
            rows_AD, weights_A, sizes = send(rows_AD, now, room), send_numbers(weights_A, now, room), now.sizes_e
        gate_up = grouped_matmul(rows_AD, w, sizes, expected=A, fill=not spec.exchanges, implementation=how.grouped)
        return gate_up, (weights_A, (order, inverse, sizes, plan, ids)), routing

    def second(params: Any, gate_up: jax.Array, weights_A: jax.Array, where: Any) -> jax.Array:
        down = all_gather_weight(params[3], 1)
        h = gated(gate_up, weights_A)
        if few:
            (ids_A,) = where
            y = jnp.stack([_one(down, ids_A[a], h[a]) for a in range(A)])
            return y.reshape(N, k, -1).astype(jnp.float32).sum(1)
        order, inverse, sizes, plan, _ = where
        y = grouped_matmul(h, down, sizes, expected=A, fill=plan is None, implementation=how.grouped)
        if plan is not None:
            y = send_back(y, plan.part(0, room), A)
        return _summed(y, order, inverse, k)

    def further(out_ND: jax.Array, of: Any, where: Any) -> jax.Array:
        if not spec.exchanges or room == most:
            return out_ND
        order, inverse, _, plan, ids = where
        return _further_rounds(how, room, out_ND, of, (order, inverse, plan, ids))

    return first, second, further


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further_rounds(how: How, room: int, out_ND: jax.Array, of: Any, where: Any) -> jax.Array:
    """Adds results of rows that a device had no room for at first: none, if experts are anything like balanced.

    The backward pass makes all of a round again.

    Args:
      how, room: static: see there, and rows of a round.
      out_ND: what the first round has come to, float32.
      of: tokens; weights of norm, router and experts, as they lie.
      where: order and its inverse, all parcels, and the experts chosen.
    """
    rounds = _rounds(where[2], room)

    def run(out_ND: jax.Array) -> jax.Array:
        given = _to_exchange(how, where, *of)
        return lax.fori_loop(1, rounds, lambda i, out: out + _round(how, room, where, i, *given), out_ND)

    # Weights are gathered for it, too: only where it is needed.
    with jax.named_scope(FURTHER_ROUNDS):
        result: jax.Array = lax.cond(rounds > 1, run, lambda out: out, out_ND)
    return result


def _further_rounds_backward(how: How, room: int, kept: Any, by: jax.Array) -> Any:
    of, where = kept
    rounds = _rounds(where[2], room)

    def run() -> Any:
        given, back = jax.vjp(functools.partial(_to_exchange, how, where), *of)

        def one(i: jax.Array, sums: Any) -> Any:
            parts = jax.vjp(functools.partial(_round, how, room, where, i), *given)[1](by)
            return jax.tree.map(lambda sum, x: sum + x.astype(jnp.float32), sums, parts)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), given)
        sums = lax.fori_loop(1, rounds, one, zeros)
        return back(jax.tree.map(lambda sum, x: sum.astype(x.dtype), sums, given))

    with jax.named_scope(FURTHER_ROUNDS):
        return by, lax.cond(rounds > 1, run, lambda: jax.tree.map(jnp.zeros_like, of)), None


_further_rounds.defvjp(
    lambda how, room, y, of, where: (_further_rounds(how, room, y, of, where), (of, where)), _further_rounds_backward
)


def _rounds(plan: Parcels, room: int) -> jax.Array:
    """How many are needed; the same on all devices, which must take part in each."""
    most = lax.pmax(plan.received_ne.sum(), jax.sharding.get_abstract_mesh().axis_names)
    return (most + room - 1) // room


def _to_exchange(
    how: How, where: Any, x_btD: jax.Array, norm_D: jax.Array, router_ED: jax.Array, gate_up: jax.Array, down: jax.Array
) -> tuple[jax.Array, ...]:
    """Rows and their weights, by expert, and all matrices, gathered."""
    order, inverse, _, ids = where
    chosen = choose(how, (norm_D, router_ED), x_btD, None, ids)
    rows_AD = _sorted(chosen.x_ND, order, inverse, how.moe.num_experts_per_tok)
    return (
        rows_AD,
        _permuted(chosen.weights_Nk.reshape(-1), order, inverse),
        matrices(gate_up),
        all_gather_weight(down, 1),
    )


def _round(
    how: How, room: int, where: Any, i: jax.Array, rows_AD: jax.Array, weights_A: jax.Array, gate_up: jax.Array,
    down: jax.Array,
) -> jax.Array:  # fmt: skip
    """What the rows of one round come to, [N, D]."""
    order, inverse, plan, _ = where
    now = plan.part(i * room, room)
    rows, weights = send(rows_AD, now, room), send_numbers(weights_A, now, room)
    multiply = functools.partial(
        grouped_matmul, sizes_G=now.sizes_e, expected=len(rows_AD), fill=False, implementation=how.grouped
    )
    y = send_back(multiply(gated(multiply(rows, gate_up), weights), down), now, len(rows_AD))
    return _sum(how, _summed(y, order, inverse, how.moe.num_experts_per_tok))


def _one(w_ENK: jax.Array, group: jax.Array, x_K: jax.Array) -> jax.Array:
    """A row times the matrix of its group."""
    return einsum_f32("nk,k->n", lax.dynamic_index_in_dim(w_ENK, group, keepdims=False), x_K).astype(x_K.dtype)
