"""Dense Qwen2.5 in float64 NumPy, with dual-chunk attention, written from the definitions. One text, no cache.

No other framework runs dual-chunk attention: `verify` compares with this.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.config import ModelConfig

Array = np.ndarray


def rotated(x_THd: Array, positions_T: Array, theta: float) -> Array:
    """RoPE with plain frequencies."""
    d = x_THd.shape[-1]
    angles = positions_T[:, None, None] * theta ** -(np.arange(0, d, 2) / d)
    a, b = np.split(x_THd, 2, axis=-1)
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def dual_chunk_attention(q_THd: Array, k_TKd: Array, v_TKd: Array, config: ModelConfig) -> Array:
    """Causal attention [T, H, d]: the logits of every pair by its own definition, then one softmax."""
    T, H, d = q_THd.shape
    k, v = (np.repeat(x, H // x.shape[1], axis=1) for x in (k_TKd, v_TKd))
    p, theta, chunks = np.arange(T), config.rope_theta, config.dual_chunk
    size, c, trained = (T, T, T) if chunks is None else (
        chunks.chunk_size, chunks.chunk_len, chunks.original_max_position_embeddings)  # fmt: skip
    factor = max(1.0, 0.1 * np.log(T / trained) + 1.0)
    keys = rotated(k, p % c, theta)
    logits = np.empty((H, T, T))
    for i in range(T):
        # The position of the query, as it is seen from each key.
        apart = i // c - p // c
        seen_as = np.where(apart == 0, i % c, np.where(apart == 1, min(i % c + c, size), min(2 * c - 1, size)))
        q = rotated(np.repeat(q_THd[i : i + 1], T, axis=0), seen_as, theta)
        logits[:, i] = np.einsum("THd,THd->HT", q, keys) * factor**2 / np.sqrt(d)
    logits = np.where(p[None, :] <= p[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("HTS,SHd->THd", weights / weights.sum(axis=-1, keepdims=True), v)


def logits(config: ModelConfig, params: Mapping[str, Any], tokens_T: Array) -> Array:
    """Float64 logits [T, V] of a dense model, or scores [T, 1]; `params` in the unstacked training layout."""

    def weight(module: Mapping[str, Any], name: str = "weight") -> Array:
        return np.asarray(module[name], np.float64)

    def norm(module: Mapping[str, Any], x: Array) -> Array:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * weight(module)

    def project(module: Mapping[str, Any], x: Array) -> Array:
        return np.einsum("TD,HdD->THd", x, weight(module)) + weight(module, "bias")

    x = weight(params["embed"])[tokens_T]
    for layer in params["layers"]:
        attention, mlp = layer["attention"], layer["mlp"]
        h = norm(layer["input_norm"], x)
        q, k, v = (project(attention[name], h) for name in "qkv")
        out = dual_chunk_attention(q, k, v, config)
        x = x + np.einsum("THd,DHd->TD", out, weight(attention["o"]))
        h = norm(layer["post_attention_norm"], x)
        gate, up = (h @ weight(mlp[name]).T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(mlp["down"]).T
    x = norm(params["norm"], x)
    if config.score == "linear":
        return x @ weight(params["score"]).T
    if config.score == "mlp":
        hidden, output = params["score"]["hidden"], params["score"]["output"]
        h = np.maximum(x @ weight(hidden).T + weight(hidden, "bias"), 0)
        return h @ weight(output).T + weight(output, "bias")
    return x @ weight(params["embed" if config.tie_word_embeddings else "lm_head"]).T
