"""Decode speed on a tensor axis at true shapes, beside the floor of bytes and the bytes of collectives.

    python -m experiments.decode.tensor --model qwen2.5-7b --devices 1,2
    python -m experiments.decode.tensor --model qwen2.5-72b --devices 4 --batch 1,64 --json
    python -m experiments.decode.tensor --model qwen2.5-72b --devices 2 --codes int4
    python -m experiments.decode.tensor --model qwen2.5-7b --devices 1 --batch 1 --codes int4 --one-row graphs
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 python -m experiments.decode.tensor --model tiny --prompt 16 --steps 4

Weights are random and made on the devices. Each case times the engine's own compiled decode loop, greedy and with the
sampling that Qwen2.5 recommends (temperature 0.7, top-k 20, top-p 0.8, repetition penalty 1.05). The floor is what one
device cannot help reading in a step, at the copy bandwidth of one device, measured in the same process: its part of
every weight but the embedding table, and of the live cache. Bytes of collectives are those that one device sends in a
step, from the compiled program. `--one-row` says how one row on one device is decoded: by kernels that are launched
one by one and overlap, by the same kernels in CUDA graphs, by these kernels with integer codes that are converted to
bfloat16 and not multiplied as integers (`converted`), or by the model's general path.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode.benchmark import RECOMMENDED, Loop, copy_bandwidth, median_seconds
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine, SamplingParams, one_row
from qwen_jax.inference.programs import StaticArgs
from qwen_jax.inference.sampling import SamplingValues
from qwen_jax.kernels.matmul import quantized_gpu_digits
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, abstract_params, param_specs
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme
from train.plan.programs import collectives

SCHEMES = {
    "int4": Scheme("int4", 128, offset="zero"),
    "int4-symmetric": Scheme("int4", 128),
    "int8": Scheme("int8", 128),
    "fp8": Scheme("float8_e4m3fn"),
}
"""What `--codes` names: groups of 128 inputs, or one scale for each output in fp8."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
      model, devices, batch, sampling: which.
      step_ms: median time of a decode step.
      tokens_per_s: of the whole batch.
      floor_ms: the floor of bytes.
      of_floor: the share of it that is reached.
      collective_kb: kilobytes that one device sends in a step.
      collectives: how many of them a step has.
    """

    model: str
    devices: int
    batch: int
    sampling: str
    step_ms: float
    tokens_per_s: float
    floor_ms: float
    of_floor: float
    collective_kb: float
    collectives: float


def random_params(config: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """Unstacked bfloat16 or quantised weights of a magnitude of 0.02, made where they lie."""
    options, sharding = Options(stacked=False), Sharding.for_inference(config, mesh)
    shapes, specs = abstract_params(config, sharding, options, jnp.bfloat16), param_specs(config, sharding, options)

    @functools.partial(jax.jit, static_argnames=("name", "shape", "dtype", "spec"))
    def random(i: jax.Array, name: str, shape: tuple[int, ...], dtype: Any, spec: jax.P) -> jax.Array:
        key, where = jax.random.key(i), {"out_sharding": spec}
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, shape, -8, 8, jnp.int8, **where).astype(dtype)
        wide = 1.0 if jnp.dtype(dtype).itemsize == 1 else 0.005 if name == "scales" else 0.02
        return (wide * jax.random.normal(key, shape, jnp.bfloat16, **where)).astype(dtype)

    count = iter(range(10**6))

    def draw(path: Any, shape: jax.ShapeDtypeStruct, spec: jax.P) -> jax.Array:
        return random(next(count), str(getattr(path[-1], "key", path[-1])), shape.shape, shape.dtype, spec)

    with jax.set_mesh(mesh):
        return jax.tree_util.tree_map_with_path(draw, shapes, specs)


def bytes_of_a_step(params: Params, config: ModelConfig, sharding: Sharding, batch: int, live: int) -> float:
    """What one device reads in a decode step: its part of the weights but the embedding table, and of the live cache.

    Args:
      params: on their devices.
      config: the architecture, dense.
      sharding: of the mesh. Key/value heads that are repeated count on each device.
      batch: rows.
      live: tokens of each row that are in the cache.
    """
    read = params if config.tie_word_embeddings else {k: x for k, x in params.items() if k != "embed"}
    weights = 0.0
    for x in jax.tree.leaves(read):
        bits = 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
        weights += math.prod(x.sharding.shard_shape(x.shape)) * bits / 8
    heads = sharding.kv_heads / config.num_kv_heads / sharding.tensor
    return weights + batch * live * config.kv_bytes_per_token() * heads


def measure(
    config: ModelConfig, name: str, devices: int, batches: list[int], prompt: int, steps: int, bandwidth: float
) -> Iterator[Result]:
    """Times all cases of one number of devices.

    Args:
      config: the architecture, dense.
      name: of the model.
      devices: size of the tensor axis.
      batches: rows.
      prompt: tokens of each prompt.
      steps: tokens that are decoded after it.
      bandwidth: bytes that one device reads in a second.
    """
    mesh = make_mesh({"tensor": devices}, jax.devices()[:devices])
    engine = Engine(config, random_params(config, mesh), mesh, dtype="bfloat16")
    slots = -(-(prompt + steps) // 128) * 128
    for batch in batches:
        floor = bytes_of_a_step(engine.params, config, engine.sharding, batch, prompt + steps // 2) / bandwidth
        tokens = np.random.default_rng(0).integers(0, engine.vocab_limit, (batch, prompt), dtype=np.int32)
        with jax.set_mesh(mesh):
            rows = jax.NamedSharding(mesh, engine.sharding.rows)
            tokens_BT = jax.device_put(tokens, jax.NamedSharding(mesh, engine.sharding.tokens))
            lengths, seeds = jax.device_put((np.full(batch, prompt, np.int32), np.arange(batch, dtype=np.uint32)), rows)
            for how, sampling in (("greedy", SamplingParams()), ("sampled", RECOMMENDED)):
                static = StaticArgs(config, engine.sharding, engine.options, sampling.mode, slots, engine.vocab_limit)
                loop = Loop(engine, static, SamplingValues.of(sampling), (tokens_BT, lengths, seeds), prompt, steps)
                seconds = median_seconds(loop) / steps
                found = collectives(loop.compiled.as_text(), devices) if devices > 1 else []
                yield Result(
                    *(name, devices, batch, how, 1e3 * seconds, batch / seconds, 1e3 * floor, floor / seconds),
                    sum(c.bytes * c.times for c in found) / steps / 1e3,
                    sum(c.times for c in found) / steps,
                )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    """Runs the command. Raises InputError for a model with experts or too few devices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b", help="a published dense model")
    parser.add_argument(
        "--devices", type=_numbers, help="sizes of the tensor axis, such as 1,2; by default all devices"
    )
    parser.add_argument("--batch", type=_numbers, default=[1, 64], help="rows, by default 1,64")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=128, help="tokens that are decoded")
    parser.add_argument("--codes", choices=sorted(SCHEMES), help="quantise the projections")
    parser.add_argument("--one-row", choices=("overlap", "graphs", "converted", "general"), default="overlap")
    parser.add_argument("--bandwidth", type=float, help="TB/s that a device reads; by default it is measured")
    parser.add_argument("--json", action="store_true", help="one JSON object for each case")
    args = parser.parse_args(argv)
    config = published(args.model)
    if config.moe is not None:
        raise InputError(
            f"{args.model} has experts; the floor of bytes here is that of dense models. Choose a dense one."
        )
    if args.one_row == "graphs":
        one_row.compiler_options = lambda sharding: None
    elif args.one_row == "converted":
        quantized_gpu_digits.ENABLED = False
    elif args.one_row == "general":
        one_row.supports = lambda *_: False
    if args.codes:
        config = dataclasses.replace(config, quantization=Quantization(SCHEMES[args.codes]))
    bandwidth = 1e12 * args.bandwidth if args.bandwidth else copy_bandwidth()
    name = " ".join([args.model, *filter(None, [args.codes, args.one_row if args.one_row != "overlap" else None])])
    if not args.json:
        print(f"{jax.devices()[0].device_kind}, {bandwidth / 1e12:.3g} TB/s, jax {jax.__version__}\n")
        heads = ["model", "devices", "batch", "sampling", "step, ms", "tokens/s", "floor, ms", "of the floor"]
        heads += ["sent, KB", "collectives"]
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for devices in args.devices or [jax.device_count()]:
        for r in measure(config, name, devices, args.batch, args.prompt, args.steps, bandwidth):
            if args.json:
                print(json.dumps({**dataclasses.asdict(r), "bandwidth_tb_per_s": bandwidth / 1e12}), flush=True)
                continue
            numbers = f"{r.step_ms:.3f} | {r.tokens_per_s:,.0f} | {r.floor_ms:.3f} | {r.of_floor:.0%}"
            sent = f"{r.collective_kb:,.1f} | {r.collectives:.1f}"
            print(f"| {r.model} | {r.devices} | {r.batch} | {r.sampling} | {numbers} | {sent} |", flush=True)


if __name__ == "__main__":
    main()
