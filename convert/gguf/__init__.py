"""GGUF, the single-file format of llama.cpp: reading and writing of weights (format: ggml's docs/gguf.md)."""

from convert.gguf.blocks import Codes, describe, pack, unpack
from convert.gguf.reader import GGUFSource
from convert.gguf.recipes import RECIPES
from convert.gguf.writer import export

__all__ = ["RECIPES", "Codes", "GGUFSource", "describe", "export", "pack", "unpack"]
