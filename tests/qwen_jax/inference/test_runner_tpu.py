"""The runner's programs, compiled for TPUs that need not be here: pages stay where they are, and memory is bounded."""

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from qwen_jax.inference.buckets import RunnerConfig
from qwen_jax.inference.runner_lowering import Program, lower
from qwen_jax.inference.runner_programs import StaticArgs
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import abstract_params, param_specs
from qwen_jax.published import published
from tests.helpers.tpu_compiler import TOPOLOGIES, needs_libtpu

CONFIG = dataclasses.replace(published("qwen2.5-7b"), num_layers=1)
SETTINGS = RunnerConfig(64, 4096, page_size=64, num_pages=4096, max_batched_tokens=2048, speculate=3)


def compile_for(chip: str, program: Program, axes: dict[str, int]) -> Any:
    """Compiles a program of a runner for chips of `TOPOLOGIES`."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    mesh = make_mesh(axes, devices[: math.prod(axes.values())])
    options, sharding = Options(stacked=False, fused=True, dtype="bfloat16"), Sharding.for_inference(CONFIG, mesh)
    params = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)),
        abstract_params(CONFIG, sharding, options),
        param_specs(CONFIG, sharding, options),
    )
    return lower(program, StaticArgs(CONFIG, sharding, options, 151_665, SETTINGS), mesh, params).compile()


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "program", "axes"),
    [
        ("v5e", Program("decode", 16, slots=4096), {"tensor": 1}),
        ("v6e", Program("verify", 16, slots=4096), {"tensor": 1}),
        ("v5p", Program("decode", 16, slots=4096), {"tensor": 4}),
        ("v5e", Program("prefill", 64, 512, 4096), {"tensor": 1}),
    ],
    ids=str,
)
def test_programs_compiled_for_tpus_update_pages_in_place(chip: str, program: Program, axes: dict[str, int]) -> None:
    """A layer of the 7B model: its pages are aliased, and less is held beside them than a copy of its keys."""
    memory = compile_for(chip, program, axes).memory_analysis()
    keys = SETTINGS.num_pages * SETTINGS.page_size * CONFIG.num_kv_heads * CONFIG.head_dim * 2 // axes["tensor"]
    mib = {name: getattr(memory, f"{name}_size_in_bytes") >> 20 for name in ("argument", "output", "alias", "temp")}
    print(chip, program.name, axes, mib, "MiB; keys", keys >> 20)
    assert memory.alias_size_in_bytes >= 2 * keys
    assert memory.temp_size_in_bytes < keys
