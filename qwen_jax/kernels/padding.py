"""Padding to whole tiles."""

import jax
import jax.numpy as jnp


def pad_to_multiple(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Pads an axis with zeros to a multiple.

    A padding row of an interval mask is the empty interval (0, 0), so it sees nothing; no row sees padding keys.
    """
    axis %= x.ndim
    return jnp.pad(x, [(0, -n % multiple if a == axis else 0) for a, n in enumerate(x.shape)])
