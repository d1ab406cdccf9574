"""What every test shares: eight fake CPU devices, and a mesh of one of them."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test reaches for the network; a Hub id must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from jax.sharding import Mesh

from qwen_jax.parallel.sharding import make_mesh

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and data sets of two lengths, for runs."""
    from tests.helpers.runs import (
        make_material,  # Here, so that kernels can be tested where training's packages are not installed.
    )

    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The folder of `program_cache`, for modules of many runs."""
    from tests.helpers.runs import program_cache

    with program_cache(tmp_path_factory.mktemp("cache")) as folder:
        yield folder
