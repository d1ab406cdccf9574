"""Folders of compressed-tensors go to and from the package of that name, and every weight keeps its value."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert.quantized.compressed_config import Compressed
from convert.quantized.export import export
from convert.source import TreeSource
from qwen_jax.config import load_config
from qwen_jax.files import read_json
from qwen_jax.quantization import Quantization, Scheme
from tests.helpers.hf import make_hf_checkpoint
from tests.helpers.quantized import random_quantized, weights_of
from tests.helpers.runs import print_seed

pytest.importorskip("compressed_tensors", reason="compressed-tensors comes with the extra dev")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
Name = str

# What we write: the configuration, and the scheme in memory.
INT8 = {"codes": "int8", "format": "int-quantized", "strategy": "channel", "activations": "int8"}
FP8 = {"codes": "float8_e4m3fn", "format": "float-quantized", "activations": "float8_e4m3fn"}
INT4 = {"codes": "int4", "format": "pack-quantized"}
WRITTEN: dict[Name, tuple[dict[str, Any], Scheme]] = {
    "int8": (INT8, Scheme("int8", 0, "bfloat16")),
    "int8 packed": ({**INT8, "format": "pack-quantized", "activations": "none"}, Scheme("int8", 0, "float32")),
    "int4 channel": ({**INT4, "strategy": "channel"}, Scheme("int4", 0, "bfloat16")),
    "int4 group": ({**INT4, "strategy": "group", "group": 32}, Scheme("int4", 32, "bfloat16")),
    "int4 zeros": ({**INT4, "strategy": "group", "group": 32, "offset": "zero"}, Scheme("int4", 32, "float16", "zero")),
    "fp8 channel": ({**FP8, "strategy": "channel"}, Scheme("float8_e4m3fn", 0, "bfloat16")),
}
# What the package writes: arguments for weights and for activations.
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
READ: dict[Name, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "int8": ({"num_bits": 8, "strategy": "channel"}, TOKEN),
    "int8 tensor": ({"num_bits": 8, "strategy": "tensor"}, TOKEN),
    "int8 packed": ({"num_bits": 8, "strategy": "channel", "symmetric": False}, None),
    "int4 group": ({"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "int4 zeros": ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, None),
    "int4 channel": ({"num_bits": 4, "strategy": "channel", "symmetric": False}, None),
    "fp8 channel": ({"num_bits": 8, "type": "float", "strategy": "channel"}, {**TOKEN, "type": "float"}),
    "fp8 tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, {**TOKEN, "type": "float"}),
    "fp8 block": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
        {**TOKEN, "type": "float"},
    ),
}


def projections(model: torch.nn.Module) -> dict[str, Any]:
    """The projections of all layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def assert_same(theirs: dict[str, torch.Tensor], ours: dict[str, np.ndarray]) -> None:
    """The package computes in the dtype of the scales, in which a value of ours is rounded once."""
    assert len(theirs) == 7 * 2
    for module, weight in theirs.items():
        assert torch.equal(torch.from_numpy(ours[f"{module}.weight"]).to(weight.dtype), weight), module


@pytest.mark.parametrize("name", WRITTEN)
def test_the_package_reads_what_is_written(name: Name, tmp_path: Path) -> None:
    how, scheme = WRITTEN[name]
    make_hf_checkpoint(tmp_path / "original", tie=False, **SIZES)
    config = dataclasses.replace(load_config(tmp_path / "original"), quantization=Quantization(scheme))
    source = TreeSource(random_quantized(config, print_seed()), config)
    export(source, Compressed(**how, ignore=("lm_head",)), tmp_path / "out", extra_files_from=tmp_path / "original")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = QuantizationConfig.model_validate(read_json(tmp_path / "out" / "config.json")["quantization_config"])
    compressor, group = BaseCompressor.get_value_from_registry(settings.format), settings.config_groups["group_0"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")}
    found = {}
    for module in modules:
        own = {name.rpartition(".")[2]: x for name, x in tensors.items() if name.rpartition(".")[0] == module}
        found[module] = compressor.decompress(own, group)["weight"]
    assert_same(found, weights_of(tmp_path / "out"))


@pytest.mark.parametrize("name", READ)
def test_what_the_package_writes_is_read(name: Name, tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    weights, inputs = READ[name]
    make_hf_checkpoint(tmp_path / "original", tie=False, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for found in projections(model).values():
        weight, arguments, shape = found.weight, found.quantization_scheme.weights, found.weight_scale.shape
        # The smallest and the largest weight of each scale.
        side = [-(-n // m) for n, m in zip(weight.shape, shape if len(shape) == 2 else (1, 1), strict=True)]
        blocks = weight.reshape(weight.shape[0] // side[0], side[0], weight.shape[1] // side[1], side[1])
        least, most = blocks.amin((1, 3)).reshape(shape), blocks.amax((1, 3)).reshape(shape)
        scale, zero = calculate_qparams(least, most, arguments)
        found.weight_scale.data.copy_(scale)
        if hasattr(found, "weight_zero_point"):
            found.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")
    compressor.decompress_model(model)
    theirs = {name: module.weight.detach() for name, module in projections(model).items()}
    assert_same(theirs, weights_of(tmp_path / "out"))
