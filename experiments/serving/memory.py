"""Memory of serving a model with a long text in the cache, compiled for H200s that need not be there.

    python -m experiments.serving.memory --model qwen2.5-72b --codes int4 --kv-dtype fp8 --length 32768
    python -m experiments.serving.memory --model qwen2.5-72b --codes fp8 --kv-dtype fp8 --tensor 2

The engine's decode and prefill programs are compiled with a few of the layers, on a tensor axis of `--tensor` GPUs,
with pages for one text of `--length` tokens. It needs `jax[cuda13]` and no GPU; nothing is run. Weights and pages are
counted for all layers. Temporaries are those of the compiled layers, and are taken to be the same for all, since one
layer runs after the other: compare `--layers 1` and 2. Prints a JSON line for each program, in GB of one GPU. An 80 GB
card has 85.5, of which JAX takes 81 with XLA_CLIENT_MEM_FRACTION=0.95.
"""

import argparse
import dataclasses
import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from experiments.decode.benchmark import SCHEMES, with_codes
from experiments.kernels.operand_starts import slices_off
from experiments.train.fp8_products import described_mesh
from qwen_jax.config import ModelConfig
from qwen_jax.inference.buckets import RunnerConfig
from qwen_jax.inference.runner_lowering import Program, abstract_state, lower
from qwen_jax.inference.runner_programs import StaticArgs
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.params import abstract_params, param_specs
from qwen_jax.published import published

PAGE = 32


def bytes_of_one(tree: Any) -> int:
    """Bytes of arrays, or of their shapes, on one device; two int4 are a byte."""
    bits = [
        math.prod(x.sharding.shard_shape(x.shape)) * (4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    ]
    return sum(bits) // 8


def arguments(config: ModelConfig, settings: RunnerConfig, mesh: Mesh) -> tuple[Any, StaticArgs]:
    """Weights without values, and the settings of programs, in the layout of the engine."""
    sharding, options = Sharding.for_inference(config, mesh), Options(stacked=False, fused=True, dtype="bfloat16")
    params = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        abstract_params(config, sharding, options, jnp.bfloat16),
        param_specs(config, sharding, options),
    )
    return params, StaticArgs(config, sharding, options, config.vocab_size, settings)


def sizes(config: ModelConfig, settings: RunnerConfig, mesh: Mesh) -> dict[str, int]:
    """Bytes of weights and of pages on one device."""
    params, static = arguments(config, settings, mesh)
    return {"weights": bytes_of_one(params), "pages": bytes_of_one(abstract_state(static, mesh)[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-72b")
    parser.add_argument("--codes", choices=SCHEMES, help="of the projections; bfloat16 weights without")
    parser.add_argument("--kv-dtype", choices=("auto", "int8", "fp8"), default="fp8")
    parser.add_argument("--length", type=int, default=32_768, help="tokens of the text")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt that are read at a time")
    parser.add_argument("--tensor", type=int, default=1, help="GPUs")
    parser.add_argument("--layers", type=int, default=1, help="that are compiled")
    parser.add_argument("--programs", nargs="+", choices=("decode", "prefill"), default=("decode", "prefill"))
    args = parser.parse_args()
    whole = with_codes(published(args.model), args.codes)
    few = dataclasses.replace(whole, num_layers=args.layers, max_window_layers=args.layers)
    mesh = described_mesh(tensor=args.tensor)
    settings = RunnerConfig(
        1, args.length, PAGE, -(-args.length // PAGE), args.chunk, rules=False, texts=False, kv_dtype=args.kv_dtype
    )
    whole_sizes = sizes(whole, settings, mesh)
    params, static = arguments(few, settings, mesh)
    for kind in args.programs:
        start = time.perf_counter()
        program = Program("decode", 1, slots=args.length)
        if kind == "prefill":
            program = Program("prefill", 1, args.chunk, args.length)
        compiled = lower(program, static, mesh, params).compile()
        memory = compiled.memory_analysis()
        assert memory is not None, "GPUs report it"
        pages = sizes(few, settings, mesh)["pages"]
        found = {**whole_sizes, "temporaries": memory.temp_size_in_bytes}
        line = {f"{name}_gb": round(size / 1e9, 3) for name, size in {**found, "sum": sum(found.values())}.items()}
        line |= {"pages_in_place": memory.alias_size_in_bytes >= pages, "off_256": slices_off(str(compiled.as_text()))}
        line |= {"program": program.name, "jax": jax.__version__, **vars(args)}
        print(json.dumps({**line, "seconds": round(time.perf_counter() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
