"""Checksums of a training state, for checkpoints."""

import jax
import jax.numpy as jnp

from train.state import TrainState


def checksums(state: TrainState) -> dict[str, int]:
    """One number for each array, the same on every mesh; a change of any single element changes it.

    Orbax stores no checksums, and without them a flipped bit would pass for a weight.
    """
    numbers = jax.device_get(_sums(state))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): int(x) for path, x in jax.tree.leaves_with_path(numbers)
    }


@jax.jit
def _sums(tree: TrainState) -> TrainState:
    def weighted(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        # The index of each element, modulo 2^32.
        place, stride = jnp.zeros((), jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place = place + jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            stride *= x.shape[axis]
        # An odd factor: the difference of a single element cannot vanish modulo 2^32.
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)

    return jax.tree.map(weighted, tree)
