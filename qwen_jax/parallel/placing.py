"""Arrays of the host on a mesh that may span several processes, and back."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts NumPy arrays, the same in every process, on the devices of a mesh.

    `jax.device_put` does the same, but with several processes it compares the arrays of all of them first, by a
    collective.

    Args:
      tree: of arrays.
      sharding: of each.

    Returns:
      The same tree of global `jax.Array`s. Each process transfers the parts of its own devices.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def read(x: jax.Array) -> np.ndarray:
    """The whole array on the host. Waits for it. With several processes, all of its mesh call this together."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, P()))  # type: ignore[attr-defined]
    return np.asarray(x)


def is_shared(mesh: Mesh) -> bool:
    """Whether a mesh has devices of several processes."""
    return len({device.process_index for device in mesh.devices.flat}) > 1
