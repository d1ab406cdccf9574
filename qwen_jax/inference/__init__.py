"""Jit-compiled inference: sampling, generation, and the engine. See docs/inference.md."""

from qwen_jax.inference.completion import Completion, Ending, Piece
from qwen_jax.inference.continuous import ContinuousEngine
from qwen_jax.inference.document import Document
from qwen_jax.inference.engine import Engine
from qwen_jax.inference.outputs import Finished, Step
from qwen_jax.inference.request import Request
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.scorer import Scorer
from qwen_jax.inference.settings import GenerationDefaults, load_generation_defaults

__all__ = [
    "Completion",
    "ContinuousEngine",
    "Document",
    "Ending",
    "Engine",
    "Finished",
    "GenerationDefaults",
    "Piece",
    "Request",
    "SamplingParams",
    "Scorer",
    "Step",
    "load_generation_defaults",
]
