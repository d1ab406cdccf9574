"""Formulas of what is reported, and the log they go to."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from train.data.batch import Batch


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Compression of a text by a model; unlike the loss of a token, it does not depend on the tokenizer.

    Args:
      nats: summed cross-entropy of the predicted tokens.
      num_bytes: UTF-8 bytes that those tokens stand for.

    Returns:
      nats / ln 2 / num_bytes, which is loss / ln 2 * tokens / bytes.
    """
    return nats / math.log(2) / num_bytes


def scored_bytes(rows: Batch, bytes_of_id: np.ndarray) -> int:
    """UTF-8 bytes of the tokens that a loss over these rows predicts: all but the first token of each segment.

    Args:
      rows: NumPy arrays [rows, length].
      bytes_of_id: length of each token id's bytes; 0 for control tokens, which stand for no text.
    """
    same = (rows.segment_ids[:, 1:] == rows.segment_ids[:, :-1]) & (rows.segment_ids[:, 1:] > 0)
    scored = same & (rows.loss_weights[:, 1:] > 0)
    return int(bytes_of_id[rows.tokens[:, 1:][scored]].sum())


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of one training token, forward and backward.

    6 for each weight of a matrix product, the head among them and the embedding look-up not, of experts those that a
    token takes, and 6 x layers x heads x head_dim x length for causal attention.

    Args:
      config: the architecture.
      length: tokens in a row. Documents packed into it see less, so that this counts more attention than is done.
    """
    d, sparse = config.hidden_size, len(config.sparse_layers)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.num_layers * (2 * q * d + 2 * kv * d) + config.vocab_size * d
    weights += (config.num_layers - sparse) * 3 * d * config.intermediate_size
    if config.moe is not None:
        moe = config.moe
        width = moe.num_experts_per_tok * moe.intermediate_size + moe.shared_intermediate_size
        weights += sparse * d * (3 * width + moe.num_experts + 1)
    return 6.0 * weights + 6.0 * config.num_layers * q * length


def mfu(tokens_per_second: float, config: ModelConfig, length: int, peak_flops: float) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), between 0 and 1.

    Args:
      tokens_per_second: of all devices together.
      config: the architecture.
      length: tokens in a row.
      peak_flops: of all devices together, per second.
    """
    return tokens_per_second * flops_per_token(config, length) / peak_flops


class MetricsLog:
    """One JSON object a line, appended as they come.

    A run that goes on from a checkpoint continues its log: lines of later steps, which will be run again, are taken
    away first.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        """Opens the log.

        Args:
          path: of the `.jsonl` file.
          resume_step: steps already taken; lines up to this step are kept.

        Raises:
          InputError: the existing file is not such a log.
        """
        kept = []
        lines = path.read_text(encoding="utf-8").splitlines() if resume_step and path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                # A killed process may leave half of a last line; its step is run again.
                if number == len(lines):
                    break
                raise InputError(
                    f"{path}, line {number} is not a metrics record. Move the file away to go on."
                ) from None
            if step <= resume_step:
                kept.append(line + "\n")
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, float]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Nothing to do: every line is handed over when it is written."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """All lines of a metrics log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
