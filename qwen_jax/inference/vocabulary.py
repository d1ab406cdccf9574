"""Reductions over the vocabulary on devices that each have the logits of all tokens, or of their tensor shard.

On a tensor axis the output head leaves each device with the logits of V / n tokens. Sampling does not gather them. Each
device reduces its own part, and only the results are exchanged: its likeliest tokens, sums and maxima. Ids are those of
the whole vocabulary, and equal values are ordered by their ids, so that the result does not depend on the number of
shards.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

_GROUP = 32
_LOWEST = -float("inf")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The part of the vocabulary that a device has. Use its methods inside `jax.shard_map`, or with one shard anywhere.

    Arrays [B, v] are the device's part, and results are the same on every device of the tensor axis.

    Attributes:
      shards: size of the tensor axis, which divides the vocabulary into equal parts.
    """

    shards: int = 1

    def _first(self, v: int) -> jax.Array | int:
        """The first id of a device's part of v tokens."""
        return lax.axis_index("tensor") * v if self.shards > 1 else 0

    def ids(self, v: int) -> jax.Array:
        """int32 [v], the ids of a device's part of v tokens."""
        return self._first(v) + jnp.arange(v, dtype=jnp.int32)

    def places(self, ids: jax.Array, v: int) -> jax.Array:
        """Where ids are in a device's part of v tokens; v, which is out of bounds, if they are in another one."""
        if self.shards == 1:
            return ids
        at = ids - self._first(v)
        return jnp.where((at >= 0) & (at < v), at, v)

    def part(self, x_BV: jax.Array) -> jax.Array:
        """A device's part [B, v] of what is known for the whole vocabulary."""
        v = x_BV.shape[1] // self.shards
        return x_BV if self.shards == 1 else lax.dynamic_slice_in_dim(x_BV, self._first(v), v, axis=1)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of what each device has."""
        return lax.psum(x, "tensor") if self.shards > 1 else x

    def max(self, x: jax.Array) -> jax.Array:
        """The maximum of what each device has."""
        return lax.pmax(x, "tensor") if self.shards > 1 else x

    def at(self, ids_B: jax.Array, *arrays_Bv: jax.Array) -> jax.Array:
        """The numbers of float32 arrays at one id in each row, [arrays, B]."""
        rows_B = jnp.arange(len(ids_B))
        places_B = self.places(ids_B, arrays_Bv[0].shape[1])
        return self.sum(jnp.stack([x_Bv.at[rows_B, places_B].get(mode="fill", fill_value=0) for x_Bv in arrays_Bv]))

    def logsumexp(self, x_Bv: jax.Array) -> jax.Array:
        """The log of the sum of exponentials of each row, float32 [B]."""
        total_B = jax.nn.logsumexp(x_Bv, axis=1)
        return total_B if self.shards == 1 else jax.nn.logsumexp(lax.all_gather(total_B, "tensor"), axis=0)

    def softmax(self, x_Bv: jax.Array) -> jax.Array:
        """The probabilities of a device's part."""
        weights_Bv = jnp.exp(x_Bv - self.max(x_Bv.max(axis=1, keepdims=True)))
        return weights_Bv / self.sum(weights_Bv.sum(axis=1, keepdims=True))

    def argmax(self, x_Bv: jax.Array) -> jax.Array:
        """int32 ids [B] of the largest number of each row, the lowest of equals."""
        at_B = jnp.argmax(x_Bv, axis=1).astype(jnp.int32)
        if self.shards == 1:
            return at_B
        largest_B1 = jnp.take_along_axis(x_Bv, at_B[:, None], axis=1)
        largest_Bn, ids_Bn = self._gathered(largest_B1, at_B[:, None] + self._first(x_Bv.shape[1]))
        best_B1 = jnp.argmax(largest_Bn, axis=1, keepdims=True)
        return jnp.take_along_axis(ids_Bn, best_B1, axis=1)[:, 0]

    def top_k(self, x_Bv: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The k largest numbers of each row, or all if there are fewer, largest first, and their int32 ids."""
        v = x_Bv.shape[1]
        values_Bk, at_Bk = top_k(x_Bv, min(k, v))
        if self.shards == 1:
            return values_Bk, at_Bk
        values_BN, ids_BN = self._gathered(values_Bk, at_Bk + self._first(v))
        # Candidates are in the order of shards, and those of a shard in that of `top_k`: of equals, the first has the
        # lowest id.
        values_Bk, at_Bk = lax.top_k(values_BN, min(k, v * self.shards))
        return values_Bk, jnp.take_along_axis(ids_BN, at_Bk, axis=1)

    def _gathered(self, values_Bk: jax.Array, ids_Bk: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Float32 values and int32 ids of all devices, [B, shards x k], in one all-gather."""
        packed_2Bk = jnp.stack([lax.bitcast_convert_type(values_Bk, jnp.int32), ids_Bk])
        values_BN, ids_BN = lax.all_gather(packed_2Bk, "tensor", axis=2, tiled=True)
        return lax.bitcast_convert_type(values_BN, jnp.float32), ids_BN


def top_k(x_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest entries of each row, largest first, and their int32 indices.

    Equal entries are in the order of their indices. The k largest entries are in the k groups with the largest maxima,
    so only those groups are sorted.
    """
    B, V = x_BV.shape
    if max(4 * k, 1024) >= V:
        values_Bk, at_Bk = lax.top_k(x_BV, min(k, V))
        return values_Bk, at_Bk.astype(jnp.int32)
    groups = -(-V // _GROUP)
    x_BGg = jnp.pad(x_BV, ((0, 0), (0, groups * _GROUP - V)), constant_values=_LOWEST).reshape(B, groups, _GROUP)
    _, best_Bk = top_k(x_BGg.max(axis=2), k)
    # In the order of their indices, so that of equal entries the first has the lowest index.
    best_Bk = jnp.sort(best_Bk, axis=1)
    candidates = jnp.take_along_axis(x_BGg, best_Bk[:, :, None], axis=1).reshape(B, k * _GROUP)
    values_Bk, at_Bk = lax.top_k(candidates, k)
    group_Bk = jnp.take_along_axis(best_Bk, at_Bk // _GROUP, axis=1)
    return values_Bk, (group_Bk * _GROUP + at_Bk % _GROUP).astype(jnp.int32)
