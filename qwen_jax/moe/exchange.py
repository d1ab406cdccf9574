"""Sends rows to the devices of the expert axis that hold their experts, and back.

There are two exchanges. This module has the exchange of rows; `qwen_jax.moe.gathered` gathers all tokens instead.
`select_exchange` chooses between them.

Each device sorts its rows by expert. One all-gather of the counts tells all devices how many rows go where. The rows of
one device for one expert travel as one contiguous piece, which is placed next to the pieces of other devices for the
same expert, so neither side sorts again. TPUs and GPUs have a collective for pieces of unequal size
(`ragged_all_to_all`). On CPUs all rows are gathered and each device picks the ones it would have received.

The functions work on local arrays, inside `jax.shard_map`.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import platform

AXIS = "expert"

ExpertExchange = Literal["auto", "rows", "gathered"]


def select_exchange(asked: ExpertExchange, axis: int, experts_per_token: int) -> ExpertExchange:
    """Returns the exchange that runs, "rows" or "gathered".

    "auto" takes "gathered" on GPUs if the axis has at most as many devices as a token has experts. Most tokens then go
    to most devices, so that copies of rows are no fewer bytes than all tokens; see `qwen_jax.moe.traffic`.

    Args:
      asked: "auto" or a name.
      axis: size of the expert axis.
      experts_per_token: number of experts of a token.
    """
    if asked != "auto":
        return asked
    return "gathered" if platform.platform() == "gpu" and axis <= experts_per_token else "rows"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """The pieces that this device sends and receives; int32 arrays [n devices of the axis, e experts of a device].

    Attributes:
      sent_ne: number of rows to send to each device for each of its experts.
      starts_ne: index of the first of these rows among this device's sorted rows.
      there_ne: index at which the receiving device places the first of them.
      received_ne: number of rows to receive from each device for each expert of this device.
      places_ne: index at which this device places the first of these.
      back_ne: index of the first of them among the sender's sorted rows.
    """

    sent_ne: jax.Array
    starts_ne: jax.Array
    there_ne: jax.Array
    received_ne: jax.Array
    places_ne: jax.Array
    back_ne: jax.Array

    @property
    def sizes_e(self) -> jax.Array:
        """Number of rows received for each expert of this device."""
        return self.received_ne.sum(0)

    def window(self, begin: int | jax.Array, size: int) -> "ExchangePlan":
        """The plan of a partial exchange: the rows that each device would receive at [begin, begin + size).

        Args:
          begin: first index among the received rows; it becomes index 0.
          size: number of rows that each device has room for.
        """

        def cut(lengths: jax.Array, places: jax.Array, origins: jax.Array) -> tuple[jax.Array, ...]:
            before = jnp.clip(begin - places, 0, lengths)
            kept = jnp.clip(begin + size - places, 0, lengths) - before
            return kept, jnp.clip(places - begin, 0, size), origins + before

        sent_ne, there_ne, starts_ne = cut(self.sent_ne, self.there_ne, self.starts_ne)
        received_ne, places_ne, back_ne = cut(self.received_ne, self.places_ne, self.back_ne)
        return ExchangePlan(sent_ne, starts_ne, there_ne, received_ne, places_ne, back_ne)


def plan_exchange(sizes_E: jax.Array, n: int) -> ExchangePlan:
    """Computes the plan of an exchange from every device's row counts. All devices of the axis must call it.

    Args:
      sizes_E: int32, number of this device's rows for each of all experts. The experts of a device are consecutive.
      n: size of the expert axis; divides the number of experts.
    """
    sizes_nE = lax.all_gather(sizes_E, AXIS)
    starts_nE = jnp.cumsum(sizes_nE, 1) - sizes_nE
    # Axes: sender, receiver, expert of the receiver.
    sizes_nne, starts_nne = (x.reshape(n, n, -1) for x in (sizes_nE, starts_nE))
    # A receiver's rows are ordered by expert, and by sender within an expert.
    by_expert = sizes_nne.transpose(1, 2, 0).reshape(n, -1)
    places = (jnp.cumsum(by_expert, 1) - by_expert).reshape(n, -1, n).transpose(2, 0, 1)
    me = lax.axis_index(AXIS)
    return ExchangePlan(sizes_nne[me], starts_nne[me], places[me], sizes_nne[:, me], places[:, me], starts_nne[:, me])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: jax.Array, plan: ExchangePlan, size: int) -> jax.Array:
    """Sends sorted rows to the devices of their experts. The gradient is sent back.

    Args:
      rows: [M, ...], sorted by expert.
      plan: of these rows.
      size: number of rows that this device has room for.

    Returns:
      [size, ...], sorted by expert, and by sender within an expert. Rows beyond those received are uninitialised and
      may hold NaN.
    """
    return _exchange(rows, size, plan.starts_ne, plan.sent_ne, plan.there_ne, plan.received_ne)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_back(rows: jax.Array, plan: ExchangePlan, size: int) -> jax.Array:
    """Returns received rows to the devices that sent them: the inverse of `send`.

    Args:
      rows: in the order in which `send` returned them.
      plan: the one `send` was given.
      size: number of rows that `send` was given.

    Returns:
      [size, ...] in the sender's order; zeros for rows that were not sent.
    """
    y = _exchange(rows, size, plan.places_ne, plan.received_ne, plan.back_ne, plan.sent_ne)
    # A mask is cheaper than a receive buffer of zeros: the collective's row layout is slow to fill on TPUs.
    used = _in_piece(size, plan.sent_ne, plan.starts_ne).any(1)
    return jnp.where(used.reshape(-1, *(1,) * (y.ndim - 1)), y, 0)


_Residuals = tuple[int, ExchangePlan]

send.defvjp(
    lambda rows, plan, size: (send(rows, plan, size), (rows.shape[0], plan)),
    lambda size, residuals, dy: (send_back(dy, residuals[1], residuals[0]), None),
)
send_back.defvjp(
    lambda rows, plan, size: (send_back(rows, plan, size), (rows.shape[0], plan)),
    lambda size, residuals, dy: (send(dy, residuals[1], residuals[0]), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_scalars(scalars: jax.Array, plan: ExchangePlan, size: int) -> jax.Array:
    """`send` for one number a row. It gathers all numbers, which is cheaper than exchanging rows of width one.

    Args:
      scalars: [M], sorted by expert.
      plan: of these rows.
      size: number of rows that this device has room for.

    Returns:
      [size]; zeros beyond what is received.
    """
    return _pick(scalars, size, plan.received_ne, plan.places_ne, plan.back_ne)


def _send_scalars_backward(size: int, residuals: _Residuals, dy: jax.Array) -> tuple[jax.Array, None]:
    count, plan = residuals
    return _pick(dy, count, plan.sent_ne, plan.starts_ne, plan.there_ne), None


send_scalars.defvjp(lambda x, plan, size: (send_scalars(x, plan, size), (x.shape[0], plan)), _send_scalars_backward)


def _in_piece(size: int, lengths_ne: jax.Array, begins_ne: jax.Array) -> jax.Array:
    """Whether each of `size` indices lies in each piece, bool [size, n e]."""
    within = jnp.arange(size)[:, None] - begins_ne.reshape(-1)
    return (within >= 0) & (within < lengths_ne.reshape(-1))


def _pick(rows: jax.Array, size: int, received_ne: jax.Array, places_ne: jax.Array, from_ne: jax.Array) -> jax.Array:
    """Gathers the rows of all devices and picks those that an exchange would bring to this one.

    Args:
      rows: [M, ...], this device's rows; M is the same on all devices.
      size: number of rows to return; those that receive nothing are zeros.
      received_ne: number of rows in the piece from each device for each expert.
      places_ne: index at which each piece is placed.
      from_ne: index at which it begins among the sender's rows.
    """
    rows_NM = lax.all_gather(rows, AXIS, tiled=True)
    first = jnp.arange(received_ne.shape[0])[:, None] * rows.shape[0] + from_ne
    # A sum over pieces fuses into one kernel; looking up the piece of each index would not.
    is_in = _in_piece(size, received_ne, places_ne)
    used, shift = is_in.any(1), (is_in * (first - places_ne).reshape(-1)).sum(1)
    found = rows_NM[jnp.where(used, jnp.arange(size) + shift, 0)]
    return jnp.where(used.reshape(-1, *(1,) * (rows.ndim - 1)), found, 0)


def _exchange(
    rows: jax.Array, size: int, starts_ne: jax.Array, sent_ne: jax.Array, there_ne: jax.Array, received_ne: jax.Array
) -> jax.Array:
    """Moves pieces of rows between the devices of the axis; the arguments are those of `ragged_all_to_all`."""
    if platform.platform() == "cpu":
        places_ne, from_ne = (lax.all_to_all(x, AXIS, 0, 0) for x in (there_ne, starts_ne))
        return _pick(rows, size, received_ne, places_ne, from_ne)

    # The receive buffer depends on no input, so JAX would move it out of a scan over layers, and every layer would then
    # have to copy it. `sequential_vmap` makes this an opaque call, which keeps the buffer inside.
    @jax.custom_batching.sequential_vmap
    def receive(rows: jax.Array, *pieces: jax.Array) -> jax.Array:
        return lax.ragged_all_to_all(rows, lax.empty((size, *rows.shape[1:]), rows.dtype), *pieces, axis_name=AXIS)

    received: jax.Array = receive(rows, *(x.reshape(-1) for x in (starts_ne, sent_ne, there_ne, received_ne)))
    return received
