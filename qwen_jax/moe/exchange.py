"""Rows to the devices of the expert axis that have their experts, and back.

Every device sorts its rows by expert; how many go where is known after one gather of small numbers. The rows of one
device for one expert travel as a piece and come to lie beside those of other devices for that expert, so that nothing
has to be put in order on either side. TPUs and GPUs have a collective for unequal pieces. Elsewhere all rows are
gathered, and the same ones are taken to the same places.

Functions here run on local arrays, inside `jax.shard_map`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.platform import platform

AXIS = "expert"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parcels:
    """Which rows go where; all int32 [n devices of the axis, e experts of one].

    Attributes:
      sent_ne, starts_ne: rows for each expert of each device, and where they begin among the sorted ones.
      there_ne: where they begin among what that device receives.
      received_ne, places_ne: rows of each device for each expert here, and where they begin among what is received.
      back_ne: where they began among that device's sorted ones.
    """

    sent_ne: jax.Array
    starts_ne: jax.Array
    there_ne: jax.Array
    received_ne: jax.Array
    places_ne: jax.Array
    back_ne: jax.Array

    @property
    def sizes_e(self) -> jax.Array:
        """Rows received for each expert here."""
        return self.received_ne.sum(0)

    def part(self, begin: int | jax.Array, size: int) -> "Parcels":
        """Of all rows those that every device would receive at so many places, which become the first ones."""

        def cut(lengths: jax.Array, places: jax.Array, origins: jax.Array) -> tuple[jax.Array, ...]:
            before = jnp.clip(begin - places, 0, lengths)
            kept = jnp.clip(begin + size - places, 0, lengths) - before
            return kept, jnp.clip(places - begin, 0, size), origins + before

        sent_ne, there_ne, starts_ne = cut(self.sent_ne, self.there_ne, self.starts_ne)
        received_ne, places_ne, back_ne = cut(self.received_ne, self.places_ne, self.back_ne)
        return Parcels(sent_ne, starts_ne, there_ne, received_ne, places_ne, back_ne)


def parcels(sizes_E: jax.Array, n: int) -> Parcels:
    """Tells all devices of the axis how many rows go where.

    Args:
      sizes_E: int32, this device's rows for each expert of all; those of one device are neighbours.
      n: size of the axis; divides the number of experts.

    Returns:
      What `send` and its like need.
    """
    sizes_nE = lax.all_gather(sizes_E, AXIS)
    starts_nE = jnp.cumsum(sizes_nE, 1) - sizes_nE
    sizes_nne, starts_nne = (x.reshape(n, n, -1) for x in (sizes_nE, starts_nE))  # from, to, expert there
    by_expert = sizes_nne.transpose(1, 2, 0).reshape(n, -1)  # to; expert there and from
    places = (jnp.cumsum(by_expert, 1) - by_expert).reshape(n, -1, n).transpose(2, 0, 1)
    me = lax.axis_index(AXIS)
    return Parcels(sizes_nne[me], starts_nne[me], places[me], sizes_nne[:, me], places[:, me], starts_nne[:, me])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: jax.Array, p: Parcels, size: int) -> jax.Array:
    """Sorted rows to the devices of their experts.

    Args:
      rows: [M, ...], sorted by expert.
      p: of them.
      size: the most that may be received.

    Returns:
      [size, ...]: by expert, and by origin within. Beyond what is received anything may be, not only numbers.
    """
    return _exchange(rows, size, p.starts_ne, p.sent_ne, p.there_ne, p.received_ne)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_back(rows: jax.Array, p: Parcels, size: int) -> jax.Array:
    """What became of received rows, to where they came from.

    Args:
      rows: as `send` gave them.
      p: as for `send`.
      size: rows that `send` was given.

    Returns:
      [size, ...], sorted as they were; zeros where a row went nowhere.
    """
    y = _exchange(rows, size, p.places_ne, p.received_ne, p.back_ne, p.sent_ne)
    # Cheaper than zeros to begin with: the collective wants rows in a layout that TPUs are slow to fill.
    used = _pieces(size, p.sent_ne, p.starts_ne).any(1)
    return jnp.where(used.reshape(-1, *(1,) * (y.ndim - 1)), y, 0)


send.defvjp(
    lambda rows, p, size: (send(rows, p, size), (rows.shape[0], p)),
    lambda size, kept, by: (send_back(by, kept[1], kept[0]), None),
)
send_back.defvjp(
    lambda rows, p, size: (send_back(rows, p, size), (rows.shape[0], p)),
    lambda size, kept, by: (send(by, kept[1], kept[0]), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_numbers(numbers: jax.Array, p: Parcels, size: int) -> jax.Array:
    """As `send`, for one number a row: all are gathered, which costs less than rows of one number each would.

    Args:
      numbers: [M], sorted by expert.
      p, size: see `send`.
    """
    return _pick(numbers, size, p.received_ne, p.places_ne, p.back_ne)


def _numbers_back(size: int, kept: Any, by: jax.Array) -> tuple[jax.Array, None]:
    count, p = kept
    return _pick(by, count, p.sent_ne, p.starts_ne, p.there_ne), None


send_numbers.defvjp(lambda x, p, size: (send_numbers(x, p, size), (x.shape[0], p)), _numbers_back)


def _pieces(size: int, lengths_ne: jax.Array, begins_ne: jax.Array) -> jax.Array:
    """Whether each place belongs to each piece, [size, n e]."""
    within = jnp.arange(size)[:, None] - begins_ne.reshape(-1)
    return (within >= 0) & (within < lengths_ne.reshape(-1))


def _pick(rows: jax.Array, size: int, received_ne: jax.Array, places_ne: jax.Array, from_ne: jax.Array) -> jax.Array:
    """Rows of all devices of the axis.

    Args:
      rows: [M, ...], this device's.
      size: places for them; those that nothing is for get zeros.
      received_ne: how many come from each device in each piece.
      places_ne: where they go.
      from_ne: where they begin among that device's.
    """
    rows_NM = lax.all_gather(rows, AXIS, tiled=True)
    first = jnp.arange(received_ne.shape[0])[:, None] * rows.shape[0] + from_ne
    # Sums over pieces, which a compiler fuses, instead of look-ups place by place.
    is_of = _pieces(size, received_ne, places_ne)
    used, shift = is_of.any(1), (is_of * (first - places_ne).reshape(-1)).sum(1)
    found = rows_NM[jnp.where(used, jnp.arange(size) + shift, 0)]
    return jnp.where(used.reshape(-1, *(1,) * (rows.ndim - 1)), found, 0)


def _exchange(
    rows: jax.Array, size: int, starts_ne: jax.Array, sent_ne: jax.Array, there_ne: jax.Array, received_ne: jax.Array
) -> jax.Array:
    if platform() == "cpu":
        places_ne, from_ne = (lax.all_to_all(x, AXIS, 0, 0) for x in (there_ne, starts_ne))
        return _pick(rows, size, received_ne, places_ne, from_ne)

    # A call that JAX does not look into: else it would move the buffer, which depends on nothing, out of a loop over
    # layers, and each layer would have to copy it.
    @jax.custom_batching.sequential_vmap
    def receive(rows: jax.Array, *pieces: jax.Array) -> jax.Array:
        return lax.ragged_all_to_all(rows, lax.empty((size, *rows.shape[1:]), rows.dtype), *pieces, axis_name=AXIS)

    received: jax.Array = receive(rows, *(x.reshape(-1) for x in (starts_ne, sent_ne, there_ne, received_ne)))
    return received
