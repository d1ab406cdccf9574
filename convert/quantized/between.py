"""From one quantised format to another: the same codes, packed differently."""

import dataclasses
import re
from typing import Any, Literal, get_args

from convert.names import leaves
from convert.quantized.awq import Awq
from convert.quantized.compressed_config import NOT_PROJECTIONS, Compressed
from convert.quantized.fp8 import Fp8
from convert.quantized.gptq import Gptq
from convert.quantized.info import FormatInfo
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError

Method = Literal["gptq", "awq", "compressed-tensors", "fp8"]
METHODS: tuple[Method, ...] = get_args(Method)


def format_of(method: Method, config: ModelConfig) -> FormatInfo:
    """The configuration of a format that holds the codes of a quantised model as they are.

    Args:
      method: the format.
      config: of the model.

    Raises:
      InputError: the model is not quantised, or its codes are not among those of the format.
    """
    quantization = config.quantization
    if quantization is None:
        raise InputError("The model is not quantised. Quantise it first, with qwen-jax quantize.")
    scheme = quantization.scheme
    others = [path for path, other in quantization.exceptions if other is not None]
    if others:
        raise InputError(
            f"{others[0]} is quantised in another way than most projections; {method} files are written with one way. "
            "Convert the model to bfloat16 (--dtype bfloat16)."
        )
    skipped = _hf_modules(config, {path for path, _ in quantization.exceptions})
    common: dict[str, Any] = {"codes": scheme.codes, "group": scheme.group, "offset": scheme.offset}
    integers, whole = scheme.codes != "float8_e4m3fn", scheme.group == 0
    holds = {
        "gptq": integers,
        "awq": scheme.codes == "int4" and not scheme.ordered,
        "compressed-tensors": True,
        "fp8": not integers and whole,
    }
    if scheme.offset == "min" or not holds[method]:
        possible = [name for name, possible in holds.items() if possible and scheme.offset != "min"]
        raise InputError(
            f"{method} files do not hold codes of this model ({scheme}). "
            + (f"Give {' or '.join(possible)}, or" if possible else "Give")
            + " --dtype bfloat16 to dequantise them."
        )
    if method == "gptq":
        rules = tuple((rf"-:^{re.escape(module)}$", None) for module in skipped)
        # Version 1 holds symmetric zero points, which all programs read alike; the others are stored as they are.
        version: Literal["gptq", "gptq_v2"] = "gptq" if scheme.offset == "none" else "gptq_v2"
        return Gptq(**common, desc_act=scheme.ordered, version=version, dynamic=rules)
    if method == "awq":
        return Awq(**common, skipped=(*routers(config), *skipped))
    activations = quantization.activations
    if method == "fp8":
        return Fp8(
            codes=scheme.codes, strategy="channel", activations=activations, skipped=(*routers(config), *skipped)
        )
    packed = "float-quantized" if not integers else "int-quantized" if activations != "none" else "pack-quantized"
    return Compressed(
        **common,
        activations=activations,
        format=packed,  # type: ignore[arg-type]
        strategy="channel" if whole else "group",
        act_order=scheme.ordered,
        ignore=(*NOT_PROJECTIONS, *skipped),
    )


def routers(config: ModelConfig) -> tuple[str, ...]:
    """Hugging Face's routers and gates of shared experts, which awq and fp8 files name as not quantised.

    Whole names: some programs look for names in others, and "mlp.gate" is in "mlp.gate_proj".
    """
    paths = ("moe", "router", "weight"), ("moe", "shared_gate", "weight")
    found = [name for leaf in leaves(config) if leaf.path[1:] in paths for name in leaf.names]
    return tuple(name.removesuffix(".weight") for name in found)


def _hf_modules(config: ModelConfig, paths: set[str]) -> tuple[str, ...]:
    """The Hugging Face modules of projections that are given by their paths in the parameter tree."""
    found = []
    for leaf in leaves(dataclasses.replace(config, quantization=None)):
        for i, layer in enumerate(leaf.layers):
            if f"layers.{layer}." + ".".join(leaf.path[1:]).removesuffix(".weight") in paths:
                names = leaf.names[i * leaf.per_layer : (i + 1) * leaf.per_layer]
                found += [name.removesuffix(".weight") for name in names]
    return tuple(found)
