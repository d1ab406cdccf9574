"""Which quantised format a checkpoint has, and the functions of each format behind one name."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from convert.quantized import awq, compressed, fp8, gptq
from convert.quantized.codes import Codes
from convert.quantized.info import FormatInfo, Stored
from qwen_jax.errors import InputError
from qwen_jax.files import read_json

QUANTIZE_CONFIG = "quantize_config.json"
_METHODS: dict[str, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
}
_SUPPORTED = (
    "Supported are gptq (4 and 8 bits), awq (gemm, 4 bits), compressed-tensors (int4, int8 and fp8 weights), fp8, and "
    ".gguf files. Take one of these versions of the model, or the bfloat16 one."
)
# What helps with some methods that cannot be read.
_ADVICE = {
    "bitsandbytes": "transformers writes the weights in bfloat16 after model.dequantize().",
    "auto-round": "auto-round also exports the format auto_gptq.",
    "intel/auto-round": "auto-round also exports the format auto_gptq.",
    "gptq_marlin": "The weights were repacked for one kernel; take the GPTQ files that they were made from.",
    "marlin": "The weights were repacked for one kernel; take the GPTQ files that they were made from.",
    "gguf": "Give the .gguf file itself.",
    "modelopt": "LLM Compressor writes the same quantisation as compressed-tensors.",
}
# Ends of the names of tensors that only quantised modules have.
_MARKS = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv")
_CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".attn.k_scale", ".attn.v_scale", ".prob_scale")
# Keys in which config.json and quantize_config.json must agree.
_COMMON = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")


def read_format(
    folder: Path, quantization_config: Mapping[str, Any] | None, names: Collection[str] = ()
) -> FormatInfo | None:
    """Reads how a checkpoint is quantised.

    Args:
      folder: of the checkpoint, for quantize_config.json, which old GPTQ folders have instead.
      quantization_config: that of config.json; None if there is none.
      names: of the tensors of the checkpoint, for a checkpoint without a configuration.

    Returns:
      The configuration for `tensor_names`, `unpack` and `pack`; None if the checkpoint is not quantised.

    Raises:
      InputError: a method or layout that is not supported, two configurations that contradict each other, or
        quantised tensors without a configuration.
    """
    where, beside = folder / "config.json", folder / QUANTIZE_CONFIG
    if quantization_config is None:
        if beside.is_file():
            return gptq.read_config(beside, _checked(beside, {"quant_method": "gptq", **read_json(beside)}))
        quantized = [name for name in names if name.rpartition(".")[2] in _MARKS]
        if quantized:
            raise InputError(
                f"{folder} holds quantised tensors ({quantized[0]} and {len(quantized) - 1} more), but config.json has "
                f"no quantization_config and there is no {QUANTIZE_CONFIG}. Fetch them again from where the weights "
                "came from."
            )
        return None
    config = _checked(where, quantization_config)
    if config["quant_method"] == "gptq" and beside.is_file():
        old = read_json(beside)
        for key in _COMMON:
            if old.get(key) is not None and config.get(key) not in (None, old[key]):
                raise InputError(
                    f"{where} and {beside} contradict each other: {key} is {config[key]!r} and {old[key]!r}. Remove "
                    "the wrong file or correct it."
                )
        config = {**old, **{key: value for key, value in config.items() if value is not None}}
    return _METHODS[config["quant_method"]].read_config(where, config)


def _checked(where: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of a supported method."""
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str):
        raise InputError(f"{where}: quantization_config has no quant_method. {_SUPPORTED}")
    method = method.lower()
    if method not in _METHODS:
        advice = f" {_ADVICE[method]}" if method in _ADVICE else ""
        raise InputError(f"{where}: weights quantised by {method} cannot be read.{advice} {_SUPPORTED}")
    return {**config, "quant_method": method}


def quantized_modules(
    info: FormatInfo, modules: Iterable[str], names: Collection[str], where: Path
) -> dict[str, FormatInfo | None]:
    """Finds which projections of a checkpoint are quantised; its configuration and its tensors must agree.

    Args:
      info: from `read_format`.
      modules: names of the projections, such as "model.layers.0.self_attn.q_proj", and "lm_head".
      names: of all tensors.
      where: the checkpoint, for messages.

    Returns:
      For each module how it is quantised, or None.

    Raises:
      InputError: quantised tensors of a module that the configuration leaves out, or the reverse.
    """
    found: dict[str, FormatInfo | None] = {}
    names = names if isinstance(names, (set, frozenset, dict)) else set(names)
    for module in modules:
        how = info.of(module)
        marks = [mark for mark in _MARKS if f"{module}.{mark}" in names]
        if how is None and marks:
            raise InputError(
                f"{where} holds {module}.{marks[0]}, but the {info.method} configuration says that {module} is not "
                "quantised. Check that config.json belongs to these weights."
            )
        if how is not None and not marks:
            # Lists of fp8 do not name the head, which transformers never quantises.
            if info.method != "fp8" or module != "lm_head":
                raise InputError(
                    f"{where} holds no quantised tensors of {module}, but the {info.method} configuration says that it "
                    "is quantised. If the module was left out, name it in the configuration "
                    "(modules_to_not_convert, ignore, or dynamic)."
                )
            how = None
        found[module] = how
    return found


def is_cache_scale(name: str) -> bool:
    """Whether a tensor is a scale for the cache of the maker's server, which is not used."""
    return name.endswith(_CACHE_SCALES)


def tensor_names(module: str, shape: tuple[int, int], info: FormatInfo) -> dict[str, Stored]:
    """The tensors of one matrix in the file: `tensor_names` of its format."""
    return _METHODS[info.method].tensor_names(module, shape, info)


def unpack(
    tensors: Mapping[str, np.ndarray], info: FormatInfo, module: str = "", shape: tuple[int, int] | None = None
) -> Codes:
    """Reads one matrix: `unpack` of its format."""
    return _METHODS[info.method].unpack(tensors, info, module, shape)


def pack(codes: Codes, info: FormatInfo, module: str = "") -> dict[str, np.ndarray]:
    """Writes one matrix: `pack` of its format."""
    return _METHODS[info.method].pack(codes, info, module)


def write_config(info: FormatInfo) -> dict[str, Any]:
    """`quantization_config` of config.json: `write_config` of the format."""
    return _METHODS[info.method].write_config(info)
