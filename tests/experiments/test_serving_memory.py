"""The memory that is stated for serving is that of the arrays."""

import dataclasses

import jax
import pytest

from experiments.serving import memory
from qwen_jax.inference.buckets import RunnerConfig
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.published import published
from qwen_jax.quantization import Quantization, Scheme


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("codes", "bits"), [("int4", 4), ("int8", 8), ("float8_e4m3fn", 8)])
def test_bytes_of_weights_and_of_pages(codes, bits, tensor):
    """Codes of a layer, scales of groups of 32 and bfloat16 for the rest; keys and values with a scale for each row."""
    whole = published("tiny")
    config = dataclasses.replace(whole, quantization=Quantization(Scheme(codes, 32)))
    mesh = make_mesh({"tensor": tensor}, jax.devices()[:tensor])
    settings = RunnerConfig(1, 256, 32, 8, 64, rules=False, texts=False, kv_dtype="fp8")
    sizes = memory.sizes(config, settings, mesh)
    D, F, H, K, d = (
        config.hidden_size, config.intermediate_size, config.num_heads, config.num_kv_heads, config.head_dim,
    )  # fmt: skip
    projections = config.num_layers * (D * (H + 2 * K) * d + H * d * D + 3 * D * F)
    others = whole.num_params()["total"] - projections
    expected = projections * bits / 8 + 2 * others
    # Scales take 2 or 4 bytes for each 32 codes; norms and biases are on all devices.
    assert expected / tensor < sizes["weights"] < expected / tensor + projections / 32 * 4 / tensor + 0.02 * expected
    rows = 2 * config.num_layers * 8 * 32 * K
    # And of each key's channel a factor.
    assert rows * (d + 4) / tensor <= sizes["pages"] <= rows * (d + 4) / tensor + config.num_layers * K * d * 4
