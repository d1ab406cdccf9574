"""The layer kernels of one token (`qwen_jax.kernels.decode.layer_gpu`, `layer_gpu_moe`) alone, on one Hopper GPU.

    python -m experiments.kernels.layer
    python -m experiments.kernels.layer --models qwen1.5-moe-a2.7b --runs 5

Everything of a layer between two attentions, with random weights at true sizes, beside the time that the bytes it reads
take at the copy rate measured in the same process. A program runs the kernel about 200 times, each on the stream that
the one before left and with nothing between them, over so many layers that no weight is still in a cache. A number is
the median of `--runs` programs.
"""

import argparse
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode.benchmark import copy_bandwidth
from qwen_jax.config import ModelConfig
from qwen_jax.inference.one_row import COMPILER_OPTIONS
from qwen_jax.kernels.decode import layer_gpu, layer_gpu_moe
from qwen_jax.kernels.decode.layer_gpu_moe import router_and_gate
from qwen_jax.kernels.gpu.device import multiprocessors
from qwen_jax.published import published

MODELS = ["qwen2.5-0.5b", "qwen2.5-7b", "qwen1.5-moe-a2.7b", "qwen2-57b-a14b"]
_CALLS = 200
_CACHE = 2**29
"""Bytes of weights between two uses of the same: ten times the largest cache."""


def shapes(config: ModelConfig) -> tuple[list[tuple[int, ...]], int]:
    """Those of a layer's weights and norms, as the kernel takes them; and how many bytes of weights a token reads."""
    D, I, F, moe = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size, config.moe
    first, last = [(D, I), (D,)], [(D,), (I + 2 * config.num_kv_heads * config.head_dim, D)]
    if moe is None:
        feed_forward: list[tuple[int, ...]] = [(2, F, D), (D, F)]
        of_them = [1, 1]
    else:
        E, F, S = moe.num_experts, moe.intermediate_size, moe.shared_intermediate_size
        feed_forward = [(E + 1, D), (2, S, D), (E, 2, F, D), (D, S), (E, D, F)]
        of_them = [1, 1, E // moe.num_experts_per_tok, 1, E // moe.num_experts_per_tok]
    read = [math.prod(shape) // n for shape, n in zip(feed_forward, of_them, strict=True)]
    return [*first, *feed_forward, *last], 2 * (sum(read) + math.prod(first[0]) + math.prod(last[1]))


def layer(config: ModelConfig, seed: int) -> list[jax.Array]:
    """Random weights of a size that keeps activations near one; the norms' are one."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            return jnp.ones(shape, jnp.bfloat16)
        return jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5

    sizes = shapes(config)[0]
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    weights = [jax.jit(draw, static_argnums=1)(key, shape) for key, shape in zip(keys, sizes, strict=True)]
    if config.moe is not None:
        weights[2] = router_and_gate(weights[2][:-1], weights[2][-1:])
    return weights


def program(config: ModelConfig, blocks: int) -> Any:
    """`_CALLS` layers with nothing between them: (heads, stream, counter, layers) to the last stream and counter."""
    eps = config.rms_norm_eps

    def one(heads: jax.Array, stream: jax.Array, counter: jax.Array, weights: list[jax.Array]) -> Any:
        if config.moe is None:
            return layer_gpu.layer_tail(heads, stream, *weights, counter, eps=eps, blocks=blocks)
        return layer_gpu_moe.layer_tail(heads, stream, *weights, counter, moe=config.moe, eps=eps, blocks=blocks)

    def run(heads: jax.Array, stream: jax.Array, counter: jax.Array, layers: list[list[jax.Array]]) -> Any:
        def turn(_: Any, carry: Any) -> Any:
            stream, counter = carry
            for weights in layers:
                stream, _, counter = one(heads, stream, counter, weights)
            return stream, counter

        return jax.lax.fori_loop(0, _CALLS // len(layers), turn, (stream, counter))

    return jax.jit(run, compiler_options=COMPILER_OPTIONS)


def measure(name: str, runs: int, copy: float) -> None:
    """The table's row of one model."""
    config = published(name)
    size = shapes(config)[1]
    layers = [layer(config, seed) for seed in range(math.ceil(_CACHE / size))]
    keys = jax.random.split(jax.random.key(1), 2)
    heads, stream = (
        jax.random.normal(key, (n,), jnp.bfloat16)
        for key, n in zip(keys, (config.num_heads * config.head_dim, config.hidden_size), strict=True)
    )
    counter = jnp.zeros((1,), jnp.int32)
    run, times = program(config, multiprocessors()), []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        _, counter = jax.block_until_ready(run(heads, stream, counter, layers))
        times.append((time.perf_counter() - begin) / (_CALLS // len(layers) * len(layers)))
    took = float(np.median(times[1:]))
    floor = size / (copy * 1e12)
    print(
        f"| {name} | {size / 1e6:.1f} | {floor * 1e6:.1f} | {took * 1e6:.1f} | {min(times[1:]) * 1e6:.1f} to "
        f"{max(times[1:]) * 1e6:.1f} | {size / took / 1e12:.2f} | {floor / took:.0%} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--runs", type=int, default=5, help="of a program; a number is their median")
    args = parser.parse_args()
    copy = copy_bandwidth() / 1e12
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {copy:.2f} TB/s, {time.strftime('%Y-%m-%d')}\n")
    print("| model | weights read, MB | at the copy rate, us | ours, us | from, to | TB/s | of the copy rate |")
    print("|---" * 7 + "|")
    for name in args.models:
        measure(name, args.runs, copy)


if __name__ == "__main__":
    main()
