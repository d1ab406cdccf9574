"""Decode and prefill speed at true shapes with random weights, beside two yardsticks, on one GPU.

    python -m experiments.decode.benchmark decode --model qwen2.5-7b --batch 1
    python -m experiments.decode.benchmark decode --model qwen2.5-7b --batch 1 --transformers
    python -m experiments.decode.benchmark decode --model qwen2.5-72b --codes int4 --kv-dtype fp8 --prompt 32768
    python -m experiments.decode.benchmark decode --model qwen2.5-7b --codes int4 --transformers    # with torchao
    python -m experiments.decode.benchmark prefill --model qwen2.5-7b --length 8192
    python -m experiments.decode.benchmark prefill --model qwen2.5-7b --codes fp8 --w8a8
    python -m experiments.decode.benchmark start --model qwen2.5-0.5b

`decode` times the engine's own compiled programs (greedy, and with the sampling that Qwen2.5 recommends: temperature
0.7, top-k 20, top-p 0.8, repetition penalty 1.05) and the plain loop of `plain_loop.py`, which knows no experts, after
a 512-token prompt, and prints the bytes floor beside them: weights and live cache, read once a step, at the copy
bandwidth measured in the same process. `--transformers` times transformers' generate with a static cache instead.
`--codes` quantises the projections of the layers: int4 (with zero points) and int8 in groups of 128 inputs, fp8 with
one scale for each output; those of transformers by torchao's weight-only int4 in groups of 128 and int8. `start` writes
a checkpoint and times a fresh process from its start to the first token, without and with a warm compilation cache.
Every line of output is JSON.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode import plain_loop
from qwen_jax.attention.quantized_cache import KVDtype, cache_dtype, kv_bytes_per_token
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.inference.programs import StaticArgs, decoder, prefill
from qwen_jax.inference.sampling import SamplingValues
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.params import Params, abstract_params, param_specs
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme

RECOMMENDED = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
REPEATS = 5


def say(**record: Any) -> None:
    """One JSON line; floats to four digits."""
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}), flush=True)


def median_seconds(run: Callable[[], Any]) -> float:
    """Median of `REPEATS` synchronised runs, after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


SCHEMES = {
    "int4": Scheme("int4", 128, offset="zero"),
    "int4-symmetric": Scheme("int4", 128),
    "int8": Scheme("int8", 128),
    "int8-rows": Scheme("int8"),
    "fp8": Scheme("float8_e4m3fn"),
}
"""What `--codes` names: groups of 128 inputs, or one scale for each output."""


def with_codes(config: ModelConfig, codes: str | None) -> ModelConfig:
    """The architecture with projections that are quantised as a name in `SCHEMES` says, if there is one."""
    return config if codes is None else dataclasses.replace(config, quantization=Quantization(SCHEMES[codes]))


def random_params(config: ModelConfig, mesh: jax.sharding.Mesh, sharding: Sharding | None = None) -> Params:
    """Unstacked bfloat16 or quantised weights, made where they lie: normal with deviation 0.02, or random codes.

    Args:
      config: the architecture.
      mesh: of the devices.
      sharding: by default that of inference.
    """

    @functools.partial(jax.jit, static_argnames=("name", "shape", "dtype", "spec"))
    def random(i: jax.Array, name: str, shape: tuple[int, ...], dtype: Any, spec: jax.P) -> jax.Array:
        key, where = jax.random.key(i), {"out_sharding": spec}
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, shape, -8, 8, jnp.int8, **where).astype(dtype)
        wide = 1.0 if jnp.dtype(dtype).itemsize == 1 else 0.005 if name == "scales" else 0.02
        return (wide * jax.random.normal(key, shape, jnp.bfloat16, **where)).astype(dtype)

    count = iter(range(10**6))

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        return random(next(count), str(getattr(path[-1], "key", path[-1])), x.shape, x.dtype, x.sharding.spec)

    with jax.set_mesh(mesh):
        return jax.tree_util.tree_map_with_path(draw, abstract_weights(config, mesh, sharding))


def abstract_weights(config: ModelConfig, mesh: jax.sharding.Mesh, sharding: Sharding | None = None) -> Params:
    """Shapes and shardings of `random_params`, with its arguments."""
    options, sharding = Options(stacked=False), sharding or Sharding.for_inference(config, mesh)

    def placed(shape: jax.ShapeDtypeStruct, spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=jax.NamedSharding(mesh, spec))

    shapes = abstract_params(config, sharding, options, jnp.bfloat16)
    return jax.tree.map(placed, shapes, param_specs(config, sharding, options))


def copy_bandwidth() -> float:
    """Bytes read and written per second by passes over 4 GiB, 16 in one program."""
    # Fewer than 2^31 elements: beyond that XLA indexes in 64 bits, which costs a third of the speed.
    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.float32)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, 16, lambda _, x: x + 1, x), donate_argnums=0)

    def run() -> jax.Array:
        nonlocal x
        x = copy(x)
        return x

    return 16 * 2 * x.nbytes / median_seconds(run)


def matmul_rate() -> float:
    """bfloat16 FLOP/s of an 8192-cubed product of random numbers, 16 in one program."""
    x, y = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    # Scaled, so that the numbers stay as random ones are.
    run = jax.jit(lambda x, y: jax.lax.fori_loop(0, 16, lambda _, x: (x @ y) * (8192**-0.5), x))
    return 16 * 2 * 8192**3 / median_seconds(lambda: run(x, y))


def step_bytes(
    params: Params, config: ModelConfig, sharding: Sharding, batch: int, live: int, kv_dtype: KVDtype = "auto"
) -> float:
    """What one device reads in a decode step: its part of the weights but the embedding table, and of the live cache.

    Of experts, as many as rows that choose evenly and independently take on average.

    Args:
      params: on their devices, or from `abstract_weights`.
      config: the architecture.
      sharding: of the mesh. Key/value heads that are repeated count on each device.
      batch: rows.
      live: tokens of each row that are in the cache.
      kv_dtype: of the cache; "auto" is bfloat16.
    """
    read = params if config.tie_word_embeddings else {k: x for k, x in params.items() if k != "embed"}
    moe, used, weights = config.moe, 1.0, 0.0
    if moe is not None:
        used = 1 - (1 - moe.num_experts_per_tok / moe.num_experts) ** batch
    for path, x in jax.tree_util.tree_leaves_with_path(read):
        bits = 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
        share = used if any(getattr(key, "key", None) == "experts" for key in path) else 1.0
        weights += share * math.prod(x.sharding.shard_shape(x.shape)) * bits / 8
    heads = sharding.kv_heads / config.num_kv_heads / sharding.tensor
    return weights + batch * live * kv_bytes_per_token(config, cache_dtype(kv_dtype, "bfloat16")) * heads


def run_decode(args: argparse.Namespace) -> None:
    config, B, prompt, steps = with_codes(published(args.model), args.codes), args.batch, args.prompt, args.steps
    slots = -(-(prompt + steps) // 128) * 128
    mesh = make_mesh({}, jax.devices()[:1])
    bandwidth = copy_bandwidth()
    weights, sharding = abstract_weights(config, mesh), Sharding.for_inference(config, mesh)
    floor = step_bytes(weights, config, sharding, B, prompt + steps // 2, args.kv_dtype) / bandwidth
    common = {"model": args.model, "codes": args.codes, "kv_dtype": args.kv_dtype, "batch": B, "prompt": prompt}
    common["steps"] = steps
    say(**common, copy_tb_per_s=bandwidth / 1e12, floor_ms=floor * 1e3, floor_tokens_per_s=B / floor)

    def report(what: str, seconds: float, **more: Any) -> None:
        say(**common, what=what, step_ms=seconds * 1e3, tokens_per_s=B / seconds, of_floor=floor / seconds, **more)

    if not args.no_plain and config.moe is None and config.quantization is None:
        params = plain_loop.random_params(config, jax.random.key(0))
        shape = (B, config.num_kv_heads, slots, config.head_dim)
        cache = [tuple(jnp.zeros(shape, jnp.bfloat16) for _ in range(2)) for _ in range(config.num_layers)]
        run = jax.jit(functools.partial(plain_loop.decode_loop, config, steps=steps), donate_argnums=1)
        token = jnp.ones((B,), jnp.int32)

        def plain() -> jax.Array:
            nonlocal cache
            cache, tokens = run(params, cache, token, jnp.int32(prompt))
            return tokens

        report("plain loop", median_seconds(plain) / steps)
        del params, cache

    engine = Engine(config, random_params(config, mesh), mesh, kv_dtype=args.kv_dtype)
    # Of a long prompt only a part is read: the time of a step depends on how many slots it attends to, not on their
    # contents.
    read = min(prompt, 4096)
    tokens = np.random.default_rng(0).integers(0, engine.vocab_limit, (B, read), dtype=np.int32)
    rows = jax.NamedSharding(mesh, engine.sharding.rows)
    with jax.set_mesh(mesh):
        tokens_BT = jax.device_put(tokens, jax.NamedSharding(mesh, engine.sharding.tokens))
        lengths, seeds = jax.device_put((np.full(B, read, np.int32), np.arange(B, dtype=np.uint32)), rows)
        for name in args.sampling:
            sampling = RECOMMENDED if name == "sampled" else SamplingParams()
            sizes = (sampling.mode, slots, engine.vocab_limit, engine.kv_dtype)
            static = StaticArgs(config, engine.sharding, engine.options, *sizes)
            loop = Loop(engine, static, SamplingValues.of(sampling), (tokens_BT, lengths, seeds), prompt, steps)
            report(f"qwen_jax {name}", median_seconds(loop) / steps, **loop.compile_seconds)


class Loop:
    """Prefill once, then the compiled decode loop from the end of the prompt as often as it is called."""

    def __init__(
        self,
        engine: Engine,
        static: StaticArgs,
        values: SamplingValues,
        inputs: tuple[jax.Array, ...],
        prompt: int,
        steps: int,
    ):
        self.params, self.values, self.prompt = engine.params, values, prompt
        start = time.perf_counter()
        self.state, *_ = jax.block_until_ready(prefill(engine.params, *inputs, values, static=static))
        prefilled = time.perf_counter()
        # The jitted function is called, which compiles nothing again: what is compiled refuses int4 on a mesh.
        decode, sizes = decoder(static, self.state), {"static": static, "steps": steps}
        self.compiled = decode.lower(engine.params, self.state, values, **sizes).compile()
        self.decode = functools.partial(decode, **sizes)
        ready = time.perf_counter()
        self.compile_seconds = {"prefill_compile_s": prefilled - start, "decode_compile_s": ready - prefilled}

    def __call__(self) -> Any:
        # Back to the end of the prompt, so that every repetition reads the same amount of cache.
        cache = dataclasses.replace(self.state.cache, slot=jnp.int32(self.prompt))
        state = dataclasses.replace(self.state, cache=cache)
        self.state, *out = self.decode(self.params, state, self.values)
        return out


def run_prefill(args: argparse.Namespace) -> None:
    config, mesh = with_codes(published(args.model), args.codes), make_mesh({}, jax.devices()[:1])
    config = config.with_w8a8() if args.w8a8 else config
    rate = matmul_rate()
    engine = Engine(config, random_params(config, mesh), mesh)
    B, T = args.batch, args.length
    params = config.num_params()
    # One position's logits only; causal attention sees half of the keys; of experts, those that a token takes.
    layers = params["active"] - params["norm"] - params["embedding"]
    per_token = 2 * layers + 2 * config.num_layers * config.num_heads * config.head_dim * T
    flops = B * T * per_token + 2 * B * config.vocab_size * config.hidden_size
    tokens = np.random.default_rng(0).integers(0, engine.vocab_limit, (B, T), dtype=np.int32)
    static = StaticArgs(config, engine.sharding, engine.options, SamplingParams().mode, T + 128, engine.vocab_limit)
    with jax.set_mesh(mesh):
        tokens_BT = jax.device_put(tokens, jax.NamedSharding(mesh, engine.sharding.tokens))
        rows = jax.NamedSharding(mesh, engine.sharding.rows)
        lengths, seeds = jax.device_put((np.full(B, T, np.int32), np.arange(B, dtype=np.uint32)), rows)
        values = SamplingValues.of(SamplingParams())
        run = functools.partial(prefill, engine.params, tokens_BT, lengths, seeds, values, static=static)
        seconds = median_seconds(lambda: run()[1])
    say(
        model=args.model,
        codes=args.codes,
        w8a8=args.w8a8,
        batch=B,
        length=T,
        what="prefill",
        ms=seconds * 1e3,
        tokens_per_s=B * T / seconds,
        tflop_per_s=flops / seconds / 1e12,
        matmul_tflop_per_s=rate / 1e12,
        of_matmul=flops / seconds / rate,
    )


def run_transformers(args: argparse.Namespace) -> None:
    """transformers' generate with a static cache (which compiles the decode step), greedy.

    Raises:
      InputError: codes that torchao is not asked for here.
    """
    import torch
    import transformers

    config, B = published(args.model), args.batch
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        if config.moe is None:
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config.to_hf())).eval()
        else:  # Experts by PyTorch's grouped products.
            settings = transformers.Qwen2MoeConfig(**config.to_hf(), experts_implementation="grouped_mm")
            model = transformers.Qwen2MoeForCausalLM(settings).eval()
    if args.codes:
        _quantise_by_torchao(model, args.codes)
    model.generation_config.eos_token_id = None
    ids = torch.randint(0, 150_000, (B, args.prompt), device="cuda")

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            cache_implementation="static",
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(2):
        seconds(args.steps + 1)
    # One new token is the prefill alone.
    seconds(1)
    step = (
        np.median([seconds(args.steps + 1) for _ in range(3)]) - np.median([seconds(1) for _ in range(3)])
    ) / args.steps
    say(
        model=args.model,
        codes=args.codes,
        batch=B,
        prompt=args.prompt,
        steps=args.steps,
        what=f"transformers {transformers.__version__} static cache, torch {torch.__version__}",
        step_ms=float(step) * 1e3,
        tokens_per_s=float(B / step),
    )


def _quantise_by_torchao(model: Any, codes: str) -> None:
    """Replaces the projections of the layers by torchao's weight-only ones."""
    import torch
    from torchao import quantization

    if codes == "int4":
        # The format whose product is PyTorch's own, tuned for few rows.
        settings = quantization.Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d")
    elif codes in ("int8", "int8-rows"):
        settings = quantization.Int8WeightOnlyConfig()
    else:
        raise InputError(f"Expected codes int4 or int8 for transformers with torchao; got {codes}.")
    quantization.quantize_(
        model, settings, filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name
    )


_FIRST_TOKEN = """
import os, time
with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
    ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
    lived = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
began = time.perf_counter() - lived
import sys, jax
from pathlib import Path
from convert import load_params
from qwen_jax.config import load_config
from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import make_mesh
folder = Path(sys.argv[1])
config, mesh = load_config(folder), make_mesh({}, jax.devices()[:1])
imported = time.perf_counter() - began
params = jax.block_until_ready(load_params(folder, config, mesh, "bfloat16", Options(stacked=False)))
loaded = time.perf_counter() - began
engine = Engine(config, params, mesh)
for tokens, _ in engine.token_chunks([[1] * 256], SamplingParams(), 64):
    break
print(imported, loaded, time.perf_counter() - began)
"""


def run_start(args: argparse.Namespace) -> None:
    from convert.huggingface import export

    config, mesh = published(args.model), make_mesh({}, jax.devices()[:1])
    with tempfile.TemporaryDirectory(dir=args.disk) as place:
        folder = Path(place) / "model"
        export(random_params(config, mesh), config, folder)
        # The child needs the memory that this process holds.
        for array in jax.live_arrays():
            array.delete()
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(Path(place) / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        for what in ("first start", "second start, compiled programs cached"):
            command = [sys.executable, "-c", _FIRST_TOKEN, str(folder)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            imported, loaded, first = map(float, done.stdout.split()[-3:])
            say(model=args.model, what=what, imported_s=imported, loaded_s=loaded, first_token_s=first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("decode", "prefill", "start"):
        command = commands.add_parser(name)
        command.add_argument("--model", default="qwen2.5-7b")
        command.add_argument("--batch", type=int, default=1)
        if name != "start":
            command.add_argument("--codes", choices=sorted(SCHEMES), help="quantise the projections")
        if name == "decode":
            command.add_argument("--prompt", type=int, default=512)
            command.add_argument("--steps", type=int, default=128)
            command.add_argument("--kv-dtype", choices=("auto", "int8", "fp8"), default="auto", help="of the cache")
            command.add_argument("--sampling", nargs="+", choices=("greedy", "sampled"), default=["greedy", "sampled"])
            command.add_argument("--no-plain", action="store_true")
            command.add_argument("--transformers", action="store_true", help="time transformers instead")
        if name == "prefill":
            command.add_argument("--length", type=int, default=8192)
            command.add_argument("--w8a8", action="store_true", help="round activations, too")
        if name == "start":
            command.add_argument("--disk", default=None, help="folder for the checkpoint")
    args = parser.parse_args()
    if args.command == "decode" and args.transformers:
        run_transformers(args)
        return
    device = jax.devices()[0]
    say(jax=jax.__version__, device=device.device_kind, date=time.strftime("%Y-%m-%d"))
    {"decode": run_decode, "prefill": run_prefill, "start": run_start}[args.command](args)


if __name__ == "__main__":
    main()
