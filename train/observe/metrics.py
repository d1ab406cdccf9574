"""Formulas of reported metrics (bits per byte, FLOPs, MFU), and the log `metrics.jsonl`."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.files import to_json
from train.data.batch import Batch
from train.files import read_records, write_file


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits per byte of a text under a model; unlike the loss per token, it does not depend on the tokenizer.

    Args:
      nats: summed cross-entropy of the predicted tokens.
      num_bytes: number of UTF-8 bytes that these tokens encode.

    Returns:
      nats / ln 2 / num_bytes, which is loss / ln 2 * tokens / bytes.
    """
    return nats / math.log(2) / num_bytes


def scored_bytes(rows: Batch, bytes_of_id: np.ndarray) -> int:
    """Counts the UTF-8 bytes of the predicted tokens of some rows: all but the first token of each segment.

    Args:
      rows: NumPy arrays [rows, length].
      bytes_of_id: int [vocabulary], number of bytes of each token; 0 for control tokens, which are not text.
    """
    same = (rows.segment_ids[:, 1:] == rows.segment_ids[:, :-1]) & (rows.segment_ids[:, 1:] > 0)
    scored = same & (rows.loss_weights[:, 1:] > 0)
    return int(bytes_of_id[rows.tokens[:, 1:][scored]].sum())


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of one training token, forward and backward.

    6 for each weight in a matrix product, which includes the head, excludes the embedding look-up, and includes of the
    experts those that a token is routed to; and 6 x layers x heads x head_dim x length for causal attention.

    Args:
      config: the architecture.
      length: tokens in a row. Tokens of packed documents attend to fewer, so that this overestimates attention.
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
      tokens_per_second: speed of all devices together.
      config: the architecture.
      length: tokens in a row.
      peak_flops: FLOP/s of all devices together.
    """
    return tokens_per_second * flops_per_token(config, length) / peak_flops


class MetricsLog:
    """The log `metrics.jsonl`: one JSON object a line. Numbers that are not finite are written as null.

    A run that resumes from a checkpoint continues its log. Records of later steps are removed, because these steps are
    run again.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        """Opens the log. Lines that a crash has damaged are removed, with a warning.

        Args:
          path: of the `.jsonl` file.
          resume_step: number of steps already taken; records up to this step are kept.
        """
        records = read_records(path, "step") if resume_step and path.exists() else []
        kept = [to_json(record) + "\n" for record in records if record["step"] <= resume_step]
        write_file(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, float]) -> None:
        """Appends a record.

        Args:
          record: numbers by name; `step` is one of them.
        """
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Does nothing: `write` hands every line to the system."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: Path, warn: bool = True) -> list[dict[str, float]]:
    """Reads `metrics.jsonl`. A null is NaN, and damaged lines are skipped.

    Args:
      path: of the file.
      warn: log one sentence on the lines that were skipped.
    """
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in read_records(path, "step", warn)
    ]
