"""Data, checkpoints and data sets that the recorder makes; nothing here imports the project."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.regression.adapter import make_data_set, make_tokenizer


def rows_of(lengths: Sequence[Sequence[int]], size: int, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of random tokens: for each row the lengths of its documents, the rest is padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (len(lengths), size), dtype=np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    weights = rng.choice(np.array([0, 0.5, 1], np.float32), tokens.shape) * (segments > 0)
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "loss_weights": weights.astype(np.float32),
    }


def moved(params: Any) -> Any:
    """Initial parameters with everything moved away from zero and one, so that no term can hide."""

    def move(path: Any, leaf: Any) -> np.ndarray:
        seed = zlib.crc32(jax.tree_util.keystr(path, simple=True, separator=".").encode())
        noise = np.random.default_rng(seed).standard_normal(leaf.shape, dtype=np.float32)
        return np.asarray(leaf) + np.float32(0.05) * noise

    return jax.tree_util.tree_map_with_path(move, params)


def counting(vocabulary: int) -> list[np.ndarray]:
    """Documents that can be learned: counting, from anywhere, in one of three strides."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 40, 400)
    return [(rng.integers(vocabulary) + rng.integers(1, 4) * np.arange(n)) % vocabulary for n in lengths]


def make_checkpoint(folder: Path, moe: bool = False, **settings: Any) -> None:
    """A tiny checkpoint that transformers writes, with random values everywhere, biases and norms too."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    other = dict(num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None)
    experts = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, shared_expert_intermediate_size=80)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    kind = "Qwen2Moe" if moe else "Qwen2"
    config = getattr(transformers, f"{kind}Config")(
        **{**sizes, **other, **(experts if moe else {}), **settings, "rms_norm_eps": 1e-6, "rope_parameters": rope}
    )
    made = getattr(transformers, f"{kind}ForCausalLM")(config)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in sorted(made.named_parameters()):
            scale = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            values = scale * rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
            if name.endswith("norm.weight"):
                values = rng.uniform(0.5, 1.5, tuple(parameter.shape)).astype(np.float32)
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
    made.tie_weights()
    made.save_pretrained(folder)


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "tied": dict(tie_word_embeddings=True),
    "untied": dict(tie_word_embeddings=False),
    "moe": dict(moe=True, tie_word_embeddings=False),
    "mixed": dict(moe=True, tie_word_embeddings=True, num_hidden_layers=4, decoder_sparse_step=2),
}


def make_material(folder: Path) -> Path:
    """A tokenizer, and data sets of two lengths, for runs."""
    fingerprint = make_tokenizer(["some text of no importance " * 9], 300, folder / "tokenizer")
    rng = np.random.default_rng(0)
    for name, length in (("a", 16), ("b", 16), ("long", 32), ("held", 16)):
        left, documents = 24 * length - int(rng.integers(length)), []
        while left:
            size = min(int(rng.integers(1, 2 * length)), left)
            documents.append(rng.integers(0, 1000, size).tolist())
            left -= size
        make_data_set(folder / name, documents, length, fingerprint)
    return folder
