"""The format of a checkpoint is told by its configuration, which must agree with its tensors."""

import contextlib
import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import quantized
from convert.quantized import awq, compressed, fp8, gptq
from qwen_jax.errors import InputError
from tests.convert.quantized import scalar, test_awq, test_compressed, test_fp8, test_gptq
from tests.helpers.runs import print_seed

UP = "model.layers.0.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
INFOS: list[tuple[Any, Any]] = [
    (gptq.Gptq(codes="int4", group=8, offset="zero", desc_act=True), test_gptq),
    (awq.Awq(codes="int4", group=8, offset="zero"), test_awq),
    (compressed.Compressed(codes="int8", format="int-quantized", strategy="channel"), test_compressed),
    (fp8.Fp8(codes="float8_e4m3fn", activations="float8_e4m3fn"), test_fp8),
]


@pytest.mark.parametrize(("info", "format_test"), INFOS)
def test_each_format_is_found_read_and_written(info: Any, format_test: Any, tmp_path: Path) -> None:
    """A configuration leads to its format's functions, with the names of a module."""
    found = quantized.read_format(tmp_path, quantized.write_config(info))
    assert found == info
    tensors, values = format_test.make_file(print_seed(), info, 16, 24)
    named = {f"{UP}.{name}": tensor for name, tensor in tensors.items()}
    assert set(named) <= set(quantized.tensor_names(UP, (16, 24), found))
    codes = quantized.unpack(named, found, UP, (16, 24))
    scalar.assert_same_values(codes, values)
    scalar.assert_same_bytes(quantized.pack(codes, found, UP), named)
    assert quantized.quantized_modules(found, [UP], named, tmp_path) == {UP: info}


def test_old_gptq_folders_have_a_file_of_their_own(tmp_path: Path) -> None:
    """quantize_config.json counts where config.json has nothing, and must agree where it has."""
    assert quantized.read_format(tmp_path, None, ["model.norm.weight", f"{UP}.weight"]) is None
    with pytest.raises(InputError, match=r"up_proj.qweight and 1 more\), but config.json has no quantization_config"):
        quantized.read_format(tmp_path, None, [f"{UP}.qweight", f"{UP}.qzeros", "model.norm.weight"])
    beside = tmp_path / "quantize_config.json"
    beside.write_text(json.dumps({"bits": 8, "group_size": 32, "desc_act": True}))
    expected = gptq.Gptq(codes="int8", group=32, desc_act=True)
    assert quantized.read_format(tmp_path, None) == expected
    same = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True}
    assert quantized.read_format(tmp_path, same) == expected
    with pytest.raises(InputError, match="contradict each other: group_size is 128 and 32"):
        quantized.read_format(tmp_path, {**same, "group_size": 128})
    beside.write_text(json.dumps({**same, "checkpoint_format": "gptq_v2", "desc_act": None}))
    assert quantized.read_format(tmp_path, same) == dataclasses.replace(expected, version="gptq_v2")
    beside.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        quantized.read_format(tmp_path, None)


@pytest.mark.parametrize(
    "method",
    "bitsandbytes eetq hqq quanto torchao higgs exl2 marlin gguf auto-round modelopt aqlm vptq bitnet mxfp4".split(),
)
def test_other_methods_are_refused_by_name_with_those_that_work(method: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"quantised by {method} cannot be read.*gptq .*awq .*compressed-tensors .*fp8"
    ):
        quantized.read_format(tmp_path, {"quant_method": method})


def test_configurations_without_a_method_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantised by bitsandbytes"):
        quantized.read_format(tmp_path, {"load_in_4bit": True})
    with pytest.raises(InputError, match=r"no quant_method. Supported are gptq"):
        quantized.read_format(tmp_path, {"bits": 4})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.sampled_from(["gptq", "int", "group", "128x128", "("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["bits", "a", "weights"]), inner),
    max_leaves=4,
)
CONFIGS: list[dict[str, Any]] = [
    {**GPTQ, "meta": {"quantizer": ["gptqmodel:1"]}, "dynamic": {"a": {"bits": 8}}, "static_groups": True},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["lm_head"], "zero_point": True},
    test_compressed.group({"actorder": "group"}, input_activations=test_compressed.TOKEN),
    {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["lm_head"], "fmt": "e4m3"},
]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(CONFIGS), st.data())
def test_configurations_with_wrong_values_are_read_or_refused_with_a_message(
    config: dict[str, Any], data: st.DataObject
) -> None:
    """Any value at any depth may be replaced by any other: there is no other failure than `InputError`."""
    config = copy.deepcopy(config)
    inside: Any = config
    while True:
        key = data.draw(st.sampled_from(sorted(inside)))
        if not isinstance(inside[key], dict) or not inside[key] or data.draw(st.booleans()):
            break
        inside = inside[key]
    inside[key] = data.draw(JSON)
    with contextlib.suppress(InputError):
        info = quantized.read_format(Path("/nonexistent"), config)
        assert info is not None
        info.of(UP)
        assert quantized.read_format(Path("/nonexistent"), quantized.write_config(info)) == info


def test_configuration_and_tensors_must_agree(tmp_path: Path) -> None:
    """Modules that are quantised on one side only are refused, but for the head of fp8, which lists do not name."""
    info = quantized.read_format(tmp_path, {**GPTQ, "dynamic": {r"-:.*\.1\.": {}}})
    assert info is not None
    one, other = UP, UP.replace(".0.", ".1.")
    names = [f"{one}.qweight", f"{one}.scales", f"{other}.weight", "lm_head.weight"]
    found = quantized.quantized_modules(info, [one, other, "lm_head"], names, tmp_path)
    assert found == {one: gptq.Gptq(codes="int4", group=128), other: None, "lm_head": None}
    with pytest.raises(InputError, match=r"holds model.layers.1.mlp.up_proj.qweight, but the gptq configuration"):
        quantized.quantized_modules(info, [other], [*names, f"{other}.qweight"], tmp_path)
    with pytest.raises(InputError, match=r"holds no quantised tensors of model.layers.0.mlp.up_proj"):
        quantized.quantized_modules(info, [one], [f"{one}.weight"], tmp_path)
    float8 = quantized.read_format(tmp_path, {"quant_method": "fp8"})
    assert float8 is not None
    names = [f"{one}.weight", f"{one}.weight_scale", "lm_head.weight"]
    assert quantized.quantized_modules(float8, ["lm_head"], names, tmp_path) == {"lm_head": None}
    names.append("lm_head.weight_scale")
    assert quantized.quantized_modules(float8, ["lm_head"], names, tmp_path) == {"lm_head": float8}
    with pytest.raises(InputError, match="holds no quantised tensors of"):
        quantized.quantized_modules(float8, [other], [f"{other}.weight"], tmp_path)


def test_scales_of_a_cache_are_told_from_scales_of_weights() -> None:
    layer = "model.layers.0.self_attn"
    assert [
        name
        for name in ("k_scale", "v_scale", "attn.k_scale", "k_proj.weight_scale", "k_proj.input_scale", "k_proj.scales")
        if quantized.is_cache_scale(f"{layer}.{name}")
    ] == ["k_scale", "v_scale", "attn.k_scale"]


def test_unpacking_takes_no_time_to_speak_of() -> None:
    """A matrix of 8 million weights is unpacked by whole-array operations: a loop over words would take seconds."""
    info = gptq.Gptq(codes="int4", group=128, offset="zero")
    rng = print_seed()
    outputs, inputs = 4096, 2048
    tensors = {
        "qweight": rng.integers(-(2**31), 2**31, (inputs // 8, outputs), dtype=np.int32),
        "qzeros": rng.integers(-(2**31), 2**31, (inputs // 128, outputs // 8), dtype=np.int32),
        "scales": rng.standard_normal((inputs // 128, outputs)).astype(np.float16),
    }
    start = time.process_time()
    gptq.unpack(tensors, info)
    assert time.process_time() - start < 1
