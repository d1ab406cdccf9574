"""Qwen2.5 in JAX and Flax NNX: see README.md."""

__version__ = "0.1.0"
