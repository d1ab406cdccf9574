"""What every test shares: eight fake CPU devices, a mesh of one of them, and compiled programs."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A test runs its small programs a few times, so on a CPU most of its time is that of LLVM: let it optimise little.
if os.environ["JAX_PLATFORMS"] == "cpu":
    quick = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"
# No test reaches for the network; a Hub id must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# One compilation cache for the session, its workers and the processes that tests start: many compile the same programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="qwen_jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

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
