"""Scales that are folded into what comes before: the layer computes what it did."""

from pathlib import Path

import jax
import numpy as np
import pytest

from convert import open_source
from convert.quantize.folding import fold_into_norm, fold_into_up, fold_into_v, shared_by_heads
from convert.quantize.forward import Forward
from convert.quantize.layer import Layer
from qwen_jax.parallel.sharding import make_mesh
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.runs import print_seed


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_layer_with_folded_scales_computes_the_same(moe: bool, tmp_path: Path) -> None:
    """Every fold, with scales from 1/4 to 4; float32 weights, so that only the order of roundings differs."""
    rng = print_seed()
    make_hf_checkpoint(tmp_path / "model", moe=moe)
    source = open_source(tmp_path / "model")
    config = source.config
    forward = Forward(config, make_mesh({}, jax.devices()[:1]))
    layer = Layer(source, 1)
    x_BTD = rng.normal(size=(2, 12, config.hidden_size)).astype(np.float32)

    def output() -> np.ndarray:
        bound = forward.bind(layer)
        return bound.output(bound.after_attention(x_BTD))

    def scales(size: int) -> np.ndarray:
        return np.exp2(rng.uniform(-2, 2, size)).astype(np.float32)

    want = output()
    before = {path: array.copy() for path, array in layer.params.items()}
    for stage in ("qkv", "gate_up"):
        chosen = scales(config.hidden_size)
        np.testing.assert_allclose(fold_into_norm(layer, stage, chosen), chosen, rtol=1e-6)
    heads, kv_heads = config.num_heads, config.num_kv_heads
    fold_into_v(layer, shared_by_heads(scales(heads * config.head_dim), heads, kv_heads))
    for matrix in layer.matrices:
        if matrix.stage == "down":
            fold_into_up(layer, matrix, scales(matrix.shape[1]))
    changed = [path for path, array in layer.params.items() if not np.array_equal(array, before[path])]
    kept = {"attention.q.bias", "attention.k.bias"}
    assert set(changed) == set(layer.params) - kept
    np.testing.assert_allclose(output(), want, atol=2e-5 * np.abs(want).max())


def test_a_folded_norm_is_what_is_stored(tmp_path: Path) -> None:
    """In bfloat16 the norm is rounded, and the weights are multiplied by what it then stands for."""
    rng = print_seed()
    make_hf_checkpoint(tmp_path / "model", dtype="bfloat16")
    layer = Layer(open_source(tmp_path / "model"), 0)
    layer.params["input_norm.weight"][3] = 0
    before = {path: array.copy() for path, array in layer.params.items()}
    used = fold_into_norm(layer, "qkv", np.exp(rng.normal(size=64)).astype(np.float32))
    stored = layer.plain_tensors()["model.layers.0.input_layernorm.weight"].astype(np.float32)
    np.testing.assert_array_equal(stored, layer.params["input_norm.weight"])
    np.testing.assert_allclose(stored * used, before["input_norm.weight"], rtol=1e-6)
    np.testing.assert_array_equal(
        layer.params["attention.q.weight"], (before["attention.q.weight"] * used).astype(np.float32)
    )
