"""How long the programs that read long prompts take to compile for a GPU that is described, not present.

    python -m experiments.long_context.compile --target h200.txtpb --lengths 131072 1000000

Qwen2.5-7B-1M's shape, chunks of 32,768 tokens, bfloat16: each program of `qwen_jax.inference.chunked_prefill`, once.
A model has one layer program for each kind of layer, however many layers it has. Prints a JSON line for each pattern
and length. Autotuning needs the card: without it XLA takes its default configuration for each matrix product. Needs jax
with its CUDA plugin, and a description of the GPU: a file of xla/backends/gpu/target_config/specs in XLA's repository,
with a line `runtime_version { major: 13 minor: 0 }` for CUDA 13.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax import platform
from qwen_jax.attention.cache import ContiguousCache
from qwen_jax.attention.pooled_blocks import BLOCK
from qwen_jax.attention.sparse import PooledBlocks, SparsePrefill, VerticalSlash
from qwen_jax.attention.sparse_block import SparseChunk
from qwen_jax.config import ModelConfig
from qwen_jax.inference import chunked_prefill
from qwen_jax.inference.programs import StaticArgs
from qwen_jax.inference.sampling import SamplingMode
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import AXES, Sharding
from qwen_jax.params import abstract_params, param_specs
from qwen_jax.published import published

CHUNK, COLUMNS = 32_768, 3968
PATTERNS = ("dense", "pooled", "vertical-slash")


def sparsity(name: str, config: ModelConfig, mesh: Mesh) -> SparsePrefill | None:
    """The pattern of a name, with abstract budgets; None for dense attention."""
    if name == "vertical-slash":
        shape = config.num_layers, config.num_heads, 2
        budgets: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P()))
        return SparsePrefill(budgets, VerticalSlash((), ()), COLUMNS)
    return SparsePrefill.of(PooledBlocks()) if name == "pooled" else None


def compile_programs(
    config: ModelConfig, mesh: Mesh, length: int, pattern: str
) -> tuple[list[jax.stages.Compiled], dict[str, Any]]:
    """Compiles the programs that read a chunk.

    Args:
      config: the architecture.
      mesh: of one device, which may be a description.
      length: of a prompt, in tokens.
      pattern: of `PATTERNS`.

    Returns:
      The programs of a chunk: before the layers, of a layer, after them. Also seconds of the clock and of all cores
      together, and GiB that a layer needs besides its arguments.
    """
    spec = Sharding.for_inference(config, mesh)
    options = Options(stacked=False, fused=True, dtype="bfloat16")
    mode = SamplingMode("greedy", False, logprobs=False, top_k=False, top_p=False)
    slots = -(-length // CHUNK) * CHUNK + 128
    static = StaticArgs(config, spec, options, mode, slots, config.vocab_size)

    def array(shape: tuple[int, ...], dtype: Any, where: P) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, where))

    def made(traced: Any) -> Any:
        """What a program returns."""
        return jax.tree.map(lambda x: array(x.shape, x.dtype, x.sharding.spec), traced.out_info)

    with jax.set_mesh(mesh):
        shapes, specs = (
            f(config, spec, options, *more) for f, *more in ((abstract_params, jnp.bfloat16), (param_specs,))
        )
        params = jax.tree.map(lambda x, where: array(x.shape, x.dtype, where), shapes, specs)
        buffer = array((1, spec.kv_heads, slots, config.head_dim), jnp.bfloat16, spec.cache)
        scalar, row = array((), jnp.int32, P()), array((1,), jnp.int32, spec.rows)
        cache = ContiguousCache((buffer,) * config.num_layers, (buffer,) * config.num_layers, scalar, row)
        tokens = array((1, CHUNK), jnp.int32, spec.tokens)
        pattern_of = sparsity(pattern, config, mesh)
        start, cpu = time.perf_counter(), sum(os.times()[:4])
        begin = chunked_prefill.begin_chunk.trace(params, cache, tokens, row, static=static)
        x, rope, masks, end = made(begin)
        chunk = None if pattern_of is None else SparseChunk(pattern_of, scalar, scalar, end)
        mean = array((1, spec.kv_heads, slots // BLOCK, config.head_dim), jnp.bfloat16, spec.cache)
        means = (mean, mean) if pattern == "pooled" else None
        of_layer = x, rope, masks, (buffer, buffer), means, scalar, chunk, scalar
        layer = chunked_prefill.read_layer.trace(params["layers"][0], *of_layer, first=0, static=static)
        x, *_, skipped = made(layer)
        found = [] if skipped is None else [skipped] * config.num_layers
        last = chunked_prefill.end_chunk.trace(params, x, None, scalar, row, tokens, scalar, found, static=static)
        traced = time.perf_counter() - start
        compiled = [program.lower(lowering_platforms=("cuda",)).compile() for program in (begin, layer, last)]
    memory = compiled[1].memory_analysis()
    return compiled, {
        "trace_seconds": round(traced, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(sum(os.times()[:4]) - cpu, 1),
        "layer_gib": round(memory.temp_size_in_bytes / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="description of the GPU")
    parser.add_argument("--model", default="qwen2.5-7b-instruct-1m")
    parser.add_argument("--lengths", nargs="+", type=int, default=[131_072, 1_000_000])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    args = parser.parse_args()
    from jax.experimental import topologies

    where = topologies.get_topology_desc("", "cuda", target_config=args.target.read_text(), topology="1x1x1")
    mesh = Mesh(np.array(where.devices).reshape((1,) * len(AXES)), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    # The kernels for Hopper ask for GPUs that are there.
    platform.on_hopper = lambda: True
    config = published(args.model)
    for length in args.lengths:
        for pattern in args.patterns:
            _, found = compile_programs(config, mesh, length, pattern)
            print(json.dumps({"jax": jax.__version__, "length": length, "pattern": pattern, **found}), flush=True)


if __name__ == "__main__":
    main()
