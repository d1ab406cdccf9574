"""Counts the products of a training step that cuBLASLt computes in float8, compiled for an H200 that need not be there.

    python -m experiments.train.fp8_products --layers 2
    python -m experiments.train.fp8_products --products bfloat16 --moments 8bit --remat full \\
        --model qwen2.5-7b --layers 28 --batch 1 --length 4096

It needs `jax[cuda13]` and no GPU. Nothing is run, and the compiler has no card to time its choices on, which does not
decide what is a product of float8. A layer has 15 of them: XLA joins products that share an operand, so there are 4 in
the forward pass (query, key and value; output; gate and up; down), and in the backward pass 7 gradients with respect to
inputs and 4 with respect to weights. With `--remat full` the forward ones are computed twice. The last line is JSON;
`other` counts products of projections that are not of float8. The status is 1 if there are any and fp8 was asked for.
`state_gb` and `temporaries_gb` are the memory that the step needs, with any products and moments.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwen_jax import platform
from qwen_jax.kernels.matmul.low_precision import Products
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.published import published
from train.data.batch import Batch
from train.moments import MOMENTS, Moments
from train.optimizer import AdamW, OptimizerConfig, Schedule
from train.pretrain import NextToken, PretrainConfig
from train.state import abstract_state
from train.step import StepConfig, make_train_step

# What XLA asks of a card, for an H200 (SXM). cuBLASLt has float8 from a runtime version on, which is stated too.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  core_count: 132  fpus_per_core: 128  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 151397597184
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
# Lines of a compiled program that are products of projections; those of attention itself are in the scope "attend".
_PRODUCT = re.compile(r'custom_call_target="__cublas|(?: |-)dot\(|__triton_(?:nested_)?gemm')
_PROJECTION = re.compile(r'op_name="[^"]*/(?:attention|mlp)/(?!attend)[^"]*"')
_FLOAT8 = 'custom_call_target="__cublas$lt$matmul$f8"'


def described_mesh(**axes: int) -> Mesh:
    """A mesh of H200s of one host to compile for, with axes such as fsdp=2."""
    from jax.experimental import topologies

    # The kernels for Hopper ask for GPUs that are there.
    platform.on_hopper = lambda: True
    topology = f"1x{math.prod(axes.values())}x1"
    described = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H200, topology=topology)
    return make_mesh(axes, described.devices)


def abstract_rows(batch: int, length: int, mesh: Mesh) -> Batch:
    """A batch of rows without values."""
    tokens = NamedSharding(mesh, Sharding.tokens)
    ints, floats = (jax.ShapeDtypeStruct((batch, length), kind, sharding=tokens) for kind in (jnp.int32, jnp.float32))
    return Batch(ints, ints, ints, floats)


def compile_for_gpu(program: Any, mesh: Mesh, *inputs: Any) -> jax.stages.Compiled:
    """Compiles a jitted function of abstract inputs for the GPUs of `described_mesh`."""
    with jax.set_mesh(mesh):
        lowered = program.trace(*inputs).lower(lowering_platforms=("cuda",))
    compiled: jax.stages.Compiled = lowered.compile()
    return compiled


def compile_step(
    config: StepConfig, model: str, layers: int, batch: int, length: int, moments: Moments
) -> jax.stages.Compiled:
    """The compiled program of a training step.

    Args:
      config: of the step.
      model: a published size.
      layers: how many of its layers.
      batch, length: of the rows.
      moments: of AdamW.
    """
    architecture = dataclasses.replace(published(model), num_layers=layers, max_window_layers=layers)
    mesh, optimizer = described_mesh(), OptimizerConfig(Schedule(10), AdamW(moments=moments))
    step = make_train_step(NextToken(architecture, PretrainConfig(loss_chunk=4096)), optimizer, config, mesh)
    state = abstract_state(architecture, optimizer, mesh)
    return compile_for_gpu(step, mesh, state, abstract_rows(batch, length, mesh))


def count_products(text: str) -> tuple[int, int]:
    """Products of projections in a compiled program: of float8, and others.

    Args:
      text: of the program.
    """
    products = [line for line in text.splitlines() if _PRODUCT.search(line) and _PROJECTION.search(line)]
    float8 = sum(_FLOAT8 in line for line in products)
    return float8, len(products) - float8


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the size of a training step that is compiled: model, layers, batch and length."""
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--products", choices=get_args(Products), default="fp8")
    parser.add_argument("--moments", choices=MOMENTS, default="float32")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--text", metavar="FILE", help="leave the compiled program there")
    args = parser.parse_args()
    start = time.perf_counter()
    # Unrolled, so that each layer's products are in the program.
    config = StepConfig(products=args.products, remat=args.remat, scan_layers=False)
    compiled = compile_step(config, args.model, args.layers, args.batch, args.length, args.moments)
    text, memory = str(compiled.as_text()), compiled.memory_analysis()
    assert memory is not None, "GPUs report it"
    if args.text:
        with open(args.text, "w", encoding="utf-8") as file:
            file.write(text)
    float8, other = count_products(text)
    sizes = {"state_gb": memory.argument_size_in_bytes / 1e9, "temporaries_gb": memory.temp_size_in_bytes / 1e9}
    line = {"float8": float8, "other": other, **sizes, "jax": jax.__version__, **vars(args)}
    print(json.dumps({**line, "seconds": round(time.perf_counter() - start, 1)}))
    return int(args.products == "fp8" and (other > 0 or float8 == 0))


if __name__ == "__main__":
    sys.exit(main())
