"""Further rounds of an exchange, for rows that a device had no room for in the first one.

If the experts' loads are anywhere near even, there are none. A router far from balance costs time and neither memory
nor tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.moe.dispatch import ExchangeInfo, exchange_room, multiply_down, multiply_up
from qwen_jax.moe.experts import MoEWeights, as_array, sum_partial_results, weighted_swiglu
from qwen_jax.moe.router import MoEContext, route_tokens

FURTHER_ROUNDS = "further_rounds"
"""Name of the scope of the further rounds, by which plans and cycle counts leave them out."""

_Inputs = tuple[jax.Array, MoEWeights]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _RoundInputs:
    """What every round uses.

    Attributes:
      rows, weights: the arrays from which the exchange takes the rows and their router weights.
      gate_up_eFD, down_eDF: the matrices of this device's experts, gathered over `fsdp`.
    """

    rows: jax.Array
    weights: jax.Array
    gate_up_eFD: jax.Array
    down_eDF: jax.Array


def add_further_rounds(
    context: MoEContext, out_ND: jax.Array, x_btD: jax.Array, weights: MoEWeights, info: ExchangeInfo
) -> jax.Array:
    """Adds the results of the rows that the first exchange left out.

    Args:
      context: static settings.
      out_ND: result of the first exchange, float32, summed over devices.
      x_btD: one device's part of the residual stream.
      weights: of the layer, in their stored sharding. They are gathered only if there are further rounds.
      info: of the first exchange.
    """
    room, worst = exchange_room(context, out_ND.shape[0])
    if not context.sharding.exchanges or room == worst:
        return out_ND
    return _further_rounds(context, room, out_ND, (x_btD, weights), info)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further_rounds(
    context: MoEContext, room: int, out_ND: jax.Array, inputs: _Inputs, info: ExchangeInfo
) -> jax.Array:
    rounds = _num_rounds(info, room)

    def run(out_ND: jax.Array) -> jax.Array:
        given = _prepare(context, info, *inputs)
        return lax.fori_loop(1, rounds, lambda i, out: out + _run_round(context, room, info, i, given), out_ND)

    with jax.named_scope(FURTHER_ROUNDS):
        result: jax.Array = lax.cond(rounds > 1, run, lambda out: out, out_ND)
    return result


_Residuals = tuple[_Inputs, ExchangeInfo]


def _further_rounds_forward(
    context: MoEContext, room: int, out_ND: jax.Array, inputs: _Inputs, info: ExchangeInfo
) -> tuple[jax.Array, _Residuals]:
    return _further_rounds(context, room, out_ND, inputs, info), (inputs, info)


def _further_rounds_backward(
    context: MoEContext, room: int, residuals: _Residuals, dout: jax.Array
) -> tuple[jax.Array, _Inputs, None]:
    """Recomputes each round: a loop whose number of rounds is not static can keep nothing for the backward pass."""
    inputs, info = residuals
    rounds = _num_rounds(info, room)

    def run() -> _Inputs:
        given, pull = jax.vjp(functools.partial(_prepare, context, info), *inputs)

        def add_round(i: jax.Array, sums: _RoundInputs) -> _RoundInputs:
            gradients = jax.vjp(functools.partial(_run_round, context, room, info, i), given)[1](dout)[0]
            result: _RoundInputs = jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, gradients)
            return result

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), given)
        sums = lax.fori_loop(1, rounds, add_round, zeros)
        result: _Inputs = pull(jax.tree.map(lambda total, x: total.astype(x.dtype), sums, given))
        return result

    with jax.named_scope(FURTHER_ROUNDS):
        # Codes of quantised weights are integers, which have no gradient.
        leaves, treedef = jax.tree.flatten(inputs)
        real = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def run_real() -> list[jax.Array]:
            gradients = jax.tree.leaves(run())
            return [gradients[i] for i in real]

        some: list[jax.Array] = lax.cond(rounds > 1, run_real, lambda: [jnp.zeros_like(leaves[i]) for i in real])
        found = dict(zip(real, some, strict=True))
    gradients = [found.get(i, np.zeros(leaf.shape, jax.dtypes.float0)) for i, leaf in enumerate(leaves)]
    return dout, jax.tree.unflatten(treedef, gradients), None


_further_rounds.defvjp(_further_rounds_forward, _further_rounds_backward)


def _num_rounds(info: ExchangeInfo, room: int) -> jax.Array:
    """Number of rounds including the first: that of the busiest device, since all devices take part in each."""
    most = lax.pmax(info.num_rows(), jax.sharding.get_abstract_mesh().axis_names)
    return (most + room - 1) // room


def _prepare(context: MoEContext, info: ExchangeInfo, x_btD: jax.Array, weights: MoEWeights) -> _RoundInputs:
    """Prepares the rows again, for the experts chosen before, and gathers the weights."""
    routed = route_tokens(context, weights, x_btD, None, info.ids_Nk)
    rows, row_weights = info.sources(context, routed)
    gate_up, down = weights.gathered_gate_up(), weights.gathered_down()
    # The rounds have gradients with respect to all of these, and codes have none.
    return _RoundInputs(rows, row_weights, as_array(gate_up, rows.dtype), as_array(down, rows.dtype))


def _run_round(context: MoEContext, room: int, info: ExchangeInfo, i: jax.Array, given: _RoundInputs) -> jax.Array:
    """The result of the rows of round i, float32 [N, D]."""
    this = info.round(context, i, room)
    # Send.
    rows, weights = this.receive(context, given.rows, given.weights, room)
    # Multiply.
    gate_up = multiply_up(context, this, rows, given.gate_up_eFD)
    y = multiply_down(context, this, weighted_swiglu(gate_up, weights), given.down_eDF)
    # Return.
    return sum_partial_results(context.sharding, this.combine(context, y))
