"""GGUF, the single-file format of llama.cpp: reading and writing of weights (format: ggml's docs/gguf.md)."""

from convert.gguf.blocks import describe, pack, unpack
from convert.gguf.quantized import QuantizedGGUF
from convert.gguf.reader import GGUFSource
from convert.gguf.recipes import RECIPES
from convert.gguf.writer import export

__all__ = ["RECIPES", "GGUFSource", "QuantizedGGUF", "describe", "export", "pack", "unpack"]
