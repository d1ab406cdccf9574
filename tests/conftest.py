"""What every test shares: eight fake CPU devices, and a mesh of one of them."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test reaches for the network; a Hub id must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from jax.sharding import Mesh

from qwen_jax.sharding import make_mesh

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh({}, jax.devices()[:1])
