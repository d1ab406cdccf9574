"""Folders of quantised weights: what they compute is what transformers computes with the values of their codes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import convert, load, open_source
from convert.dequantize import DequantizedSource
from convert.names import leaves
from convert.placement import place
from convert.quantize import REPORT, Recipe, quantize
from convert.quantized.awq import Awq
from convert.quantized.compressed_config import Compressed
from convert.quantized.export import export
from convert.quantized.fp8 import Fp8
from convert.quantized.gptq import Gptq
from convert.quantized.info import FormatInfo, is_listed
from convert.source import TreeSource
from qwen_jax.cli import main
from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.inference.weights import fuse
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding, make_mesh
from qwen_jax.quantization import Quantization, Scheme
from tests.helpers.forward import logits
from tests.helpers.hf import hf_logits, make_hf_checkpoint
from tests.helpers.quantized import random_quantized
from tests.helpers.runs import print_seed

# Sizes that the packed layouts divide.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
FORMATS: dict[str, tuple[FormatInfo, Scheme]] = {
    "gptq-4": (Gptq(codes="int4", group=32), Scheme("int4", 32)),
    "gptq-8-asym-order": (
        Gptq(codes="int8", group=32, offset="zero", desc_act=True, version="gptq_v2"),
        Scheme("int8", 32, offset="zero", ordered=True),
    ),
    "compressed-int4": (
        Compressed(codes="int4", group=32, format="pack-quantized", strategy="group", ignore=("lm_head",)),
        Scheme("int4", 32, "bfloat16"),
    ),
    "compressed-int8": (
        Compressed(codes="int8", format="int-quantized", strategy="channel", ignore=("lm_head",)),
        Scheme("int8", 0, "bfloat16"),
    ),
    "fp8": (Fp8(codes="float8_e4m3fn", strategy="channel"), Scheme("float8_e4m3fn", 0, "float32")),
    "awq": (Awq(codes="int4", group=32, offset="zero"), Scheme("int4", 32, offset="zero")),
}


def write(folder: Path, info: FormatInfo, scheme: Scheme, moe: bool, rng: np.random.Generator) -> ModelConfig:
    """Writes a random quantised model; the folder of the original is beside it, for the tokenizer's files."""
    original = folder.parent / "original"
    if not original.exists():
        experts = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96} if moe else {}
        make_hf_checkpoint(original, tie=False, moe=moe, **SIZES, **experts)
    config = dataclasses.replace(load_config(original), quantization=Quantization(scheme))
    params = random_quantized(config, rng)
    export(TreeSource(params, config), info, folder, extra_files_from=original)
    return config


@pytest.mark.draw(6)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str, moe: bool) -> None:
    """The folder is dequantised by `convert`, and transformers runs the result."""
    rng = print_seed()
    config = write(tmp_path / "quantised", *FORMATS[name], moe, rng)
    convert(tmp_path / "quantised", tmp_path / "plain", "hf", "float32")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, attn_implementation="eager")
    text = rng.integers(0, config.vocab_size, (2, 12))
    want = hf_logits(model.eval(), text)
    mesh = make_mesh({}, jax.devices()[:1])
    found, params = load(tmp_path / "quantised", mesh, "float32")
    assert found.quantization is not None
    assert {leaf.stored for leaf in leaves(found)} - {None} == {*FORMATS[name][1].arrays().values()}
    # transformers gets float32 activations.
    found = dataclasses.replace(found, quantization=dataclasses.replace(found.quantization, activations="none"))
    with jax.set_mesh(mesh):
        params = fuse(params, found, Sharding.for_inference(found, mesh))
    got = logits(found, params, mesh, text, Options(stacked=False, fused=True))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", FORMATS)
def test_written_again_every_tensor_keeps_its_bytes(tmp_path: Path, name: str) -> None:
    write(tmp_path / "first", *FORMATS[name], False, print_seed())
    export(open_source(tmp_path / "first"), FORMATS[name][0], tmp_path / "second")
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("first", "second"))
    assert first == second
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("first", "second")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_scales_of_blocks(tmp_path: Path, method: str) -> None:
    """Outputs and inputs share a scale in blocks, the last of which are smaller; values and bytes are kept."""
    rng, block = print_seed(), (48, 32)
    info: FormatInfo = Fp8(codes="float8_e4m3fn", strategy="block", block=block, scale_name="weight_scale_inv")
    if method != "fp8":
        layout: Any = {"format": "float-quantized", "strategy": "block", "ignore": ("lm_head",)}
        info = Compressed(codes="float8_e4m3fn", block=block, **layout)
    make_hf_checkpoint(tmp_path / "original", tie=False, **SIZES)
    scheme = Scheme("float8_e4m3fn", 32, "float32")
    config = dataclasses.replace(load_config(tmp_path / "original"), quantization=Quantization(scheme))
    params = random_quantized(config, rng)
    for scales in (arrays["scales"] for layer in params["layers"] for arrays in (*layer["attention"].values(),
                   *layer["mlp"].values())):  # fmt: skip
        rows = scales.reshape(-1, scales.shape[-1])
        rows[...] = np.repeat(rows[:: block[0]], block[0], 0)[: len(rows)]
    export(TreeSource(params, config), info, tmp_path / "first", extra_files_from=tmp_path / "original")
    source = open_source(tmp_path / "first")
    assert source.config.quantization == Quantization(scheme)
    again = place(source, make_mesh({}, jax.devices()[:1]), options=Options(stacked=False))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
    export(source, info, tmp_path / "second")
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("first", "second"))
    assert first == second


def test_what_the_configuration_leaves_out_must_not_be_quantised(tmp_path: Path) -> None:
    info, scheme = FORMATS["compressed-int4"]
    assert isinstance(info, Compressed)
    with pytest.raises(InputError, match=r"layers.0.mlp.down_proj is quantised, but the compressed-tensors config"):
        write(
            tmp_path / "out",
            dataclasses.replace(info, ignore=("lm_head", "re:.*down_proj")),
            scheme,
            False,
            print_seed(),
        )
    with pytest.raises(InputError, match="lm_head is not quantised, but the compressed-tensors configuration names it"):
        write(tmp_path / "out", dataclasses.replace(info, ignore=()), scheme, False, print_seed())
    assert not (tmp_path / "out").exists()


def test_some_projections_may_be_left_out(tmp_path: Path) -> None:
    """Their weights are stored as they are, and the rest keeps one scheme."""
    info, scheme = FORMATS["compressed-int4"]
    assert isinstance(info, Compressed)
    skipped = dataclasses.replace(info, ignore=("lm_head", "re:.*layers.1.*(v|o)_proj"))
    make_hf_checkpoint(tmp_path / "original", tie=False, **SIZES)
    exceptions = (("layers.1.attention.v", None), ("layers.1.attention.o", None))
    config = dataclasses.replace(load_config(tmp_path / "original"), quantization=Quantization(scheme, exceptions))
    params = random_quantized(config, print_seed())
    export(TreeSource(params, config), skipped, tmp_path / "out", extra_files_from=tmp_path / "original")
    source = open_source(tmp_path / "out")
    assert source.config.quantization is not None
    assert dict(source.config.quantization.exceptions) == dict(exceptions)
    again = place(source, make_mesh({}, jax.devices()[:1]), options=Options(stacked=False))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


def test_verify_compares_codes_with_their_values(tmp_path: Path) -> None:
    """With transformers and NumPy, and with the same weights in full precision; other codes do not pass."""
    rng = print_seed()
    write(tmp_path / "quantised", *FORMATS["awq"], False, rng)
    convert(tmp_path / "quantised", tmp_path / "plain", "hf", "float32")
    assert main(["verify", str(tmp_path / "quantised"), "--against", "transformers"]) == 0
    assert main(["verify", str(tmp_path / "quantised"), "--against", "numpy"]) == 0
    assert main(["verify", str(tmp_path / "quantised"), str(tmp_path / "plain")]) == 0
    write(tmp_path / "other", *FORMATS["awq"], False, rng)
    assert main(["verify", str(tmp_path / "other"), str(tmp_path / "plain")]) == 1


def test_info_tells_how_weights_are_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "quantised", *FORMATS["gptq-4"], False, print_seed())
    capsys.readouterr()
    assert main(["info", str(tmp_path / "quantised"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    size = (tmp_path / "quantised" / "model.safetensors").stat().st_size
    assert report["quantization"] == {"method": "gptq", "bits": 4, "group_size": 32, "weights_bytes": size}
    assert main(["info", str(tmp_path / "quantised")]) == 0
    assert "gptq, 4 bits, groups of 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "second"),
    [("awq", "gptq"), ("awq", "compressed-tensors"), ("gptq-4", "awq"), ("gptq-8-asym-order", "compressed-tensors"),
     ("fp8", "compressed-tensors"), ("compressed-int8", "gptq"), ("compressed-int4", "gptq")],
)  # fmt: skip
def test_codes_go_from_one_format_to_another(tmp_path: Path, first: str, second: str) -> None:
    """The values stay the same bit for bit, also of a model with a projection that is not quantised."""
    write(tmp_path / "first", *FORMATS[first], False, print_seed())
    assert main(["convert", str(tmp_path / "first"), str(tmp_path / "second"), "--quantization", second]) == 0
    mesh = make_mesh({}, jax.devices()[:1])
    found = []
    for name in ("first", "second"):
        source = DequantizedSource(open_source(tmp_path / name))
        found.append(place(source, mesh, "float32", Options(stacked=False)))
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_codes_that_a_format_does_not_have_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "first", *FORMATS["gptq-8-asym-order"], False, print_seed())
    with pytest.raises(InputError, match=r"awq files do not hold .*int8 in groups of 32, ordered.*Give gptq or"):
        convert(tmp_path / "first", tmp_path / "second", quantization="awq")
    with pytest.raises(InputError, match=r"not quantised. Quantise it first"):
        convert(tmp_path / "original", tmp_path / "second", quantization="gptq")
    assert not (tmp_path / "second").exists()


def test_dtype_is_needed_to_convert(tmp_path: Path) -> None:
    write(tmp_path / "quantised", *FORMATS["gptq-4"], False, print_seed())
    with pytest.raises(InputError, match="Give the dtype to dequantise them to"):
        convert(tmp_path / "quantised", tmp_path / "out")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantised" / "quantize_config.json").unlink()
    with pytest.raises(InputError, match=r"no quantization_config and there is no quantize_config\.json"):
        open_source(tmp_path / "quantised")


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_are_checked_before_weights_are_read(tmp_path: Path, name: str) -> None:
    """A tensor that is missing or has another shape is found in the header, wherever it is."""
    rng = print_seed()
    write(tmp_path / "good", *FORMATS[name], False, rng)
    tensors = load_file(tmp_path / "good/model.safetensors")
    packed = [name for name in tensors if "scale" in name or name.endswith(("qweight", "qzeros", "weight_packed"))]
    chosen = str(rng.choice(packed))
    for change, message in (
        (None, f"has no {chosen}|holds no quantised tensors|needs weight_scale"),
        (tensors[chosen][None], f"{chosen}: expected .*got"),
    ):
        damaged = {name: tensor for name, tensor in tensors.items() if name != chosen}
        if change is not None:
            damaged[chosen] = change.contiguous()
        save_file(damaged, tmp_path / "good/model.safetensors")
        with pytest.raises(InputError, match=message):
            open_source(tmp_path / "good")


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq", "awq"])
def test_the_configuration_of_a_repacked_model_is_that_of_a_quantised_one(tmp_path: Path, method: str) -> None:
    """All but those of gptq name the routers as left out, which other programs would take for quantised layers."""
    make_hf_checkpoint(tmp_path / "original", tie=False, moe=True, dtype="bfloat16")
    quantize(tmp_path / "original", tmp_path / "first", Recipe("rtn", group=16, format=method))  # type: ignore[arg-type]
    convert(tmp_path / "first", tmp_path / "second", quantization=method)
    names = {path.name for path in (tmp_path / "second").iterdir()}
    assert names == {path.name for path in (tmp_path / "first").iterdir()} - {REPORT}
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    settings = json.loads((tmp_path / "second/config.json").read_text())["quantization_config"]
    names = settings.get("ignore") or settings.get("modules_to_not_convert") or ()
    for name, tensor in load_file(tmp_path / "second/model.safetensors").items():
        module = name.removesuffix(".weight")
        if (
            method != "gptq"
            and module != name
            and tensor.ndim == 2
            and not module.endswith(("embed_tokens", "lm_head"))
        ):
            assert is_listed(module, names), module
