"""The TPU compiler, for tests that compile kernels without a TPU."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}


def compile_for(chip: str, f: Callable[..., Any], *args: jax.ShapeDtypeStruct) -> Any:
    """Compiles `f` for one device of a chip of `TOPOLOGIES`."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), "x")
    here = jax.sharding.NamedSharding(mesh, jax.P())
    args = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in args)
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*args).compile()
