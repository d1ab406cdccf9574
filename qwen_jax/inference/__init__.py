"""Jit-compiled inference: sampling, generation, and the engine. See docs/inference.md."""

from qwen_jax.inference.completion import Completion, Piece
from qwen_jax.inference.document import Document
from qwen_jax.inference.engine import Engine
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.scorer import Scorer
from qwen_jax.inference.settings import GenerationDefaults, load_generation_defaults

__all__ = [
    "Completion",
    "Document",
    "Engine",
    "GenerationDefaults",
    "Piece",
    "SamplingParams",
    "Scorer",
    "load_generation_defaults",
]
