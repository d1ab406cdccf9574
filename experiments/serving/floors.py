"""What serving cannot do without: bytes over the memory's bandwidth, FLOPs over the rate of matrix products."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.decode.benchmark import copy_bandwidth, matmul_rate, median_seconds
from qwen_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of the device, measured in the same process.

    Attributes:
      bandwidth: bytes read and written per second by a copy.
      flops: bfloat16 FLOP/s of a large product.
    """

    bandwidth: float
    flops: float

    @classmethod
    def measure(cls) -> "Ceilings":
        """Measures them; before the engine takes the memory. On a CPU with small arrays, to try the scripts."""
        if jax.default_backend() != "cpu":
            return cls(copy_bandwidth(), matmul_rate())
        x, y = jnp.ones((2**20,)), jnp.ones((256, 256))
        copy, product = jax.jit(lambda x: x + 1), jax.jit(lambda y: y @ y)
        return cls(2 * x.nbytes / median_seconds(lambda: copy(x)), 2 * 256**3 / median_seconds(lambda: product(y)))

    def record(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {"copy_tb_per_s": self.bandwidth / 1e12, "matmul_tflop_per_s": self.flops / 1e12}


def multiplied(config: ModelConfig) -> tuple[int, int]:
    """Parameters that every token is multiplied with in the layers, and those of the output head (dense models)."""
    params = config.num_params()
    return params["layers"], params["lm_head"] or params["embedding"]


def attention_flops(config: ModelConfig, pairs: int) -> float:
    """FLOPs of attention of so many pairs of query and key."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs


def prefill_seconds(config: ModelConfig, rates: Ceilings, prompts: Iterable[int], cached: int = 0) -> float:
    """Floor of reading prompts, from FLOPs alone: the head only for the last token of each.

    Args:
      config: the architecture.
      rates: of the device.
      prompts: tokens of each.
      cached: tokens at the beginning of each that need not be read.
    """
    layers, head = multiplied(config)
    flops = 0.0
    for tokens in prompts:
        new = max(tokens - cached, 1)
        flops += 2.0 * layers * new + 2.0 * head + attention_flops(config, new * (tokens - new) + new * (new + 1) // 2)
    return flops / rates.flops


def decode_seconds(config: ModelConfig, rates: Ceilings, lengths: Iterable[tuple[int, int]], rows: int) -> float:
    """Floor of all decode steps: the larger one of bytes and FLOPs.

    A step reads every weight but the embedding table, and the live keys and values of its rows. The fewest steps are
    those of the longest answer, or those that are needed with `rows` rows in each. The first token of an answer comes
    from the prefill.

    Args:
      config: the architecture.
      rates: of the device.
      lengths: prompt and answer of each request, in tokens.
      rows: of a step, at most.
    """
    each = list(lengths)
    layers, head = multiplied(config)
    weights = 2 * (layers + head + config.num_params()["norm"])
    tokens = sum(out - 1 for _, out in each)
    steps = max(-(-tokens // rows), max((out - 1 for _, out in each), default=0))
    # Token j of an answer attends to the prompt and to the j tokens before it and itself.
    live = sum((out - 1) * prompt + out * (out - 1) // 2 for prompt, out in each)
    moved = steps * weights + live * config.kv_bytes_per_token()
    flops = 2.0 * (layers + head) * tokens + attention_flops(config, live)
    return max(moved / rates.bandwidth, flops / rates.flops)


def floor_seconds(
    config: ModelConfig, rates: Ceilings, lengths: Iterable[tuple[int, int]], rows: int, cached: int = 0
) -> float:
    """Floor of serving requests that are all there at the beginning: `prefill_seconds` and `decode_seconds`."""
    each = list(lengths)
    prompts = [prompt for prompt, _ in each]
    return prefill_seconds(config, rates, prompts, cached) + decode_seconds(config, rates, each, rows)
