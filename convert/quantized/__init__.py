"""Quantised weights of Hugging Face folders: GPTQ, AWQ, compressed-tensors and fp8, to and from one form."""

from convert.quantized.codes import Codes
from convert.quantized.formats import (
    is_cache_scale,
    pack,
    quantized_modules,
    read_format,
    tensor_names,
    unpack,
    write_config,
)
from convert.quantized.info import FormatInfo, Stored
from convert.quantized.padding import without_padding

__all__ = [
    "Codes",
    "FormatInfo",
    "Stored",
    "is_cache_scale",
    "pack",
    "quantized_modules",
    "read_format",
    "tensor_names",
    "unpack",
    "without_padding",
    "write_config",
]
