"""What every test shares: eight fake CPU devices, a mesh of one of them, and compiled programs."""

import atexit
import collections
import os
import random
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A test runs its small programs a few times, so on a CPU most of its time is that of LLVM: let it optimise little.
if os.environ["JAX_PLATFORMS"] == "cpu":
    quick = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
    # An unknown flag ends the process, and jaxlib 0.11 does not know this one.
    if version("jaxlib").startswith("0.10."):
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"
# No test reaches for the network; a Hub id must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# One compilation cache for the session, its workers and the processes that tests start: many compile the same programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="qwen_jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Which cases of a test are drawn; the same in all workers.
os.environ.setdefault("QWEN_JAX_DRAW", str(random.SystemRandom().randrange(2**32)))

import jax
import pytest
from jax.sharding import Mesh

from qwen_jax.parallel.sharding import make_mesh

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="run all cases of tests that otherwise draw some")


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--all-cases"):
        return "all cases of every test"
    return f"cases drawn with QWEN_JAX_DRAW={os.environ['QWEN_JAX_DRAW']}; --all-cases runs all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test that is marked with `draw(n)`, n cases run, other ones each time."""
    if config.getoption("--all-cases"):
        return
    cases: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("draw") is not None:
            cases[item.nodeid.partition("[")[0]].append(item)
    left: set[pytest.Item] = set()
    for name, found in cases.items():
        marker = found[0].get_closest_marker("draw")
        assert marker is not None
        rng = random.Random(f"{os.environ['QWEN_JAX_DRAW']} {name}")
        left.update(rng.sample(found, max(len(found) - marker.args[0], 0)))
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


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
