"""Rows to the devices of the expert axis that have their experts, and back.

Every device sorts its rows by expert, and so by device; how many go where is known after one gather of small numbers.
TPUs and GPUs have a collective for unequal parts. Elsewhere every part is padded to the longest there could be, and an
equal exchange carries the same rows to the same places.

Functions here run on local arrays, inside `jax.shard_map`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import kernels

AXIS = "expert"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("sent_n", "starts_n", "there_n", "received_n", "origins_n", "back_n", "runs_ne"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Parcels:
    """Which rows go where; all int32, one number for each of the n devices of the axis.

    Attributes:
      sent_n, starts_n: rows for each device, and where they begin among the sorted ones.
      there_n: where they begin among what that device receives.
      received_n, origins_n: rows of each device, and where they begin among what is received.
      back_n: where the rows received from each device begin among that device's sorted ones.
      runs_ne: of the rows received from each device, how many belong to each expert here.
    """

    sent_n: jax.Array
    starts_n: jax.Array
    there_n: jax.Array
    received_n: jax.Array
    origins_n: jax.Array
    back_n: jax.Array
    runs_ne: jax.Array


def parcels(sizes_E: jax.Array, n: int) -> Parcels:
    """Tells all devices of the axis how many rows go where.

    Args:
      sizes_E: int32, this device's rows for each expert of all; those of one device are neighbours.
      n: size of the axis; divides the number of experts.

    Returns:
      What `send` and its like need.
    """
    sizes_nne = lax.all_gather(sizes_E, AXIS).reshape(n, n, -1)  # from, to, expert there
    from_to = sizes_nne.sum(2)
    me = lax.axis_index(AXIS)
    sent, received = from_to[me], from_to[:, me]

    def before(x: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.cumsum(x, axis) - x

    return Parcels(
        sent, before(sent), before(from_to)[me], received, before(received), before(from_to, 1)[:, me],
        sizes_nne[:, me],
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: jax.Array, p: Parcels, size: int) -> jax.Array:
    """Sorted rows to the devices of their experts.

    Args:
      rows: [M, ...], sorted by expert.
      p: of them.
      size: the most that may be received.

    Returns:
      [size, ...]: by origin, and by expert within; zeros where there is none.
    """
    return _exchange(rows, size, p.starts_n, p.sent_n, p.there_n, p.received_n)


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
    return _exchange(rows, size, p.origins_n, p.received_n, p.back_n, p.sent_n)


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
    return _pick(numbers, size, p.received_n, p.back_n)


def _numbers_back(size: int, kept: Any, by: jax.Array) -> tuple[jax.Array, None]:
    count, p = kept
    return _pick(by, count, p.sent_n, p.there_n), None


send_numbers.defvjp(lambda x, p, size: (send_numbers(x, p, size), (x.shape[0], p)), _numbers_back)


def _pick(numbers: jax.Array, size: int, received_n: jax.Array, from_n: jax.Array) -> jax.Array:
    """Numbers of other devices.

    Args:
      numbers: this device's.
      size: places for them; those beyond all that is received get zeros.
      received_n: how many come from each device.
      from_n: where they begin among that device's.
    """
    numbers_nM = lax.all_gather(numbers, AXIS)
    origin, within, used = _origins(size, received_n)
    return jnp.where(used, numbers_nM[origin, jnp.where(used, from_n[origin] + within, 0)], 0)


def _origins(size: int, received_n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each place: which device its row comes from, which of that device's it is, and whether there is one."""
    ends, place = jnp.cumsum(received_n), jnp.arange(size)
    origin = jnp.minimum((place[:, None] >= ends).sum(1), ends.shape[0] - 1)
    return origin, place - (ends - received_n)[origin], place < ends[-1]


def _exchange(
    rows: jax.Array, size: int, starts_n: jax.Array, sent_n: jax.Array, places_n: jax.Array, received_n: jax.Array
) -> jax.Array:
    empty = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
    if kernels.platform() != "cpu":
        return lax.ragged_all_to_all(rows, empty, starts_n, sent_n, places_n, received_n, axis_name=AXIS)
    # The longest part: no device has more rows to send, or room for more.
    longest = min(rows.shape[0], size)
    index = jnp.clip(starts_n[:, None] + jnp.arange(longest), 0, rows.shape[0] - 1)
    parts = lax.all_to_all(rows[index], AXIS, 0, 0)
    origin, within, used = _origins(size, received_n)
    found = parts[origin, jnp.clip(within, 0, longest - 1)]
    return jnp.where(used.reshape(-1, *(1,) * (rows.ndim - 1)), found, empty)
