"""Shards of a feed-forward layer that are filled up with zeros compute what the model computes."""

import dataclasses

import jax
import numpy as np

from qwen_jax.inference import Engine, SamplingParams
from qwen_jax.inference.adapters import adapter_ranks, place_factors
from qwen_jax.lora import AdapterFactors
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import TILE, Sharding, make_mesh, padded_width
from qwen_jax.params import abstract_params
from qwen_jax.published import published
from tests.helpers.forward import random_unstacked
from tests.helpers.runs import print_seed

# 1,040 columns on each of two devices become 1,152.
CONFIG = dataclasses.replace(published("tiny"), intermediate_size=2 * 1040, vocab_size=96, eos_token_ids=())
PADDED = 2 * 1152


def test_widths_of_published_models() -> None:
    """Only those that tiles do not divide are padded, by less than an eighth."""
    for name in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"):
        width = published(f"qwen2.5-{name}").intermediate_size
        assert padded_width(width, 1, quantized=False) == width
        for shards in (2, 4, 8):
            padded = padded_width(width, shards, quantized=False)
            assert width <= padded <= width * 9 / 8
            assert padded_width(width, shards, quantized=True) == width
            if width // shards >= 8 * TILE:
                assert padded == width if width % (shards * TILE) == 0 else padded % (shards * TILE) == 0
    assert padded_width(29_568, 4, quantized=False) == 4 * 7_424


def test_text_is_that_of_one_device() -> None:
    seed = int(print_seed().integers(2**31))
    prompts = [np.random.default_rng(seed).integers(0, 96, n).tolist() for n in (3, 17)]
    found = []
    for shards in (1, 2):
        mesh = make_mesh({"tensor": shards}, jax.devices()[:shards])
        params = random_unstacked(CONFIG, mesh, np.random.default_rng(seed), scale=0.1)
        down = params["layers"][0]["mlp"]["down"]["weight"]
        engine = Engine(CONFIG, params, mesh, dtype="float32")
        mlp, width = engine.params["layers"][0]["mlp"], PADDED if shards == 2 else CONFIG.intermediate_size
        assert mlp["gate_up"]["weight"].shape == (shards, 2, width // shards, CONFIG.hidden_size)
        assert mlp["down"]["weight"].shape == (CONFIG.hidden_size, width)
        # The matrix without padding is freed.
        assert down.is_deleted() == (shards == 2)
        found.append(engine.generate(prompts, SamplingParams(logprobs=True), max_new_tokens=8))
    for one, two in zip(*found, strict=True):
        assert one.token_ids == two.token_ids
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


def test_factors_of_adapters_have_zeros_at_the_same_places() -> None:
    rng, D, F, rank = print_seed(), CONFIG.hidden_size, CONFIG.intermediate_size, 3
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, F), (F, rank)))
    into, out = np.ones((rank, D), np.float32), np.ones((D, rank), np.float32)
    adapters = [AdapterFactors(rank, {0: {"down": (a, out), "up": (into, b)}})]
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    options = Options(stacked=False, fused=True, adapter_ranks=adapter_ranks(adapters))
    placed = place_factors(adapters, CONFIG, mesh, options)["layers"][0]["mlp"]
    expected = abstract_params(CONFIG, Sharding.for_inference(CONFIG, mesh), options)["layers"][0]["mlp"]
    for name in ("gate_up", "down"):
        for factor in ("lora_a", "lora_b"):
            assert placed[name][factor].shape == expected[name][factor].shape
    found_a = np.asarray(placed["down"]["lora_a"]).reshape(rank, 2, -1)
    found_b = np.asarray(placed["gate_up"]["lora_b"])[:, 1]
    np.testing.assert_array_equal(found_a[:, :, : F // 2].reshape(rank, F), a)
    np.testing.assert_array_equal(found_b[:, : F // 2].reshape(F, rank), b)
    assert not found_a[:, :, F // 2 :].any()
    assert not found_b[:, F // 2 :].any()
