"""Jit-compiled inference: KV cache, sampling, generation, and the engine that ties them together."""

from qwen_jax.inference.engine import Completion, Engine, Piece
from qwen_jax.inference.sampling import SamplingParams
from qwen_jax.inference.settings import GenerationDefaults, load_generation_defaults

__all__ = ["Completion", "Engine", "GenerationDefaults", "Piece", "SamplingParams", "load_generation_defaults"]
