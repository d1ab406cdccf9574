"""Which keys sparse prefill visits: the two patterns, per-head budgets, and the file in which budgets are published."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import to_json, why_unusable, write_atomic

FILE_NAME = "sparse_attention_config.json"
"""The sparsity file in the repository of a published 1M-context checkpoint."""

_PATTERN = "vertical_and_slash"
# Budgets of a head for which nothing was searched, columns and slashes (MInference's default).
_DEFAULT = 1000, 6096


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """Whole columns and whole diagonals ("slashes") of the attention matrix, a fixed number of each per query head.

    Attributes:
      columns, slashes: budgets [layer][query head]: keys that all queries see, and distances to the key that is seen.
      scores: [layer][query head], recall or another measure of how good the budgets are. Recorded, not used.

    Source: Jiang et al. 2024 (MInference, arXiv:2407.02490); Qwen2.5-1M report (arXiv:2501.15383) section 5.2.
    """

    columns: tuple[tuple[int, ...], ...]
    slashes: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        shape = [len(layer) for layer in self.columns]
        for name, value in (("slashes", self.slashes), ("scores", self.scores)):
            if value is not None and [len(layer) for layer in value] != shape:
                raise InputError(f"Expected {name} for the layers and heads that have columns, {shape}; got {value}.")

    @classmethod
    def default(cls, config: ModelConfig) -> "VerticalSlash":
        """The budgets (1000, 6096) for every head, or the context length where that is less."""
        n_v, n_s = (min(n, config.context_length) for n in _DEFAULT)
        L, H = config.num_layers, config.num_heads
        return cls(((n_v,) * H,) * L, ((n_s,) * H,) * L)

    def budgets(self, layer: int) -> np.ndarray:
        """Columns and slashes of each query head of a layer, int32 [H, 2], for `sparse.attend`."""
        return np.stack([self.columns[layer], self.slashes[layer]], axis=1).astype(np.int32)

    @property
    def most_columns(self) -> int:
        """The largest number of columns of any head, as `sparse.attend` counts them: 30 count as 130."""
        return max(130 if n == 30 else n for layer in self.columns for n in layer)

    def check(self, config: ModelConfig, source: str = "The vertical-slash pattern") -> None:
        """Raises `InputError` if these are not budgets for a model.

        Args:
          config: of the model.
          source: where the budgets come from, the subject of the message.
        """
        L, H, longest = config.num_layers, config.num_heads, config.context_length
        if len(self.columns) != L:
            raise InputError(
                f"{source} is for another model: it has {len(self.columns)} layers, this model has {L}. "
                "Use the file of this model, or make one with `qwen-jax sparsity tune`."
            )
        for i, layer in enumerate(self.columns):
            if len(layer) != H:
                raise InputError(
                    f"{source} is for another model: layer {i} has {len(layer)} query heads, this model has {H}. "
                    "Use the file of this model, or make one with `qwen-jax sparsity tune`."
                )
            for h, both in enumerate(zip(layer, self.slashes[i], strict=True)):
                if not all(1 <= n <= longest for n in both):
                    raise InputError(
                        f"{source}: layer {i}, head {h} has {both[0]} columns and {both[1]} slashes; expected 1 to "
                        f"{longest} of each, the context length of this model."
                    )

    @classmethod
    def from_file(cls, path: Path, config: ModelConfig) -> "VerticalSlash":
        """Reads a sparsity file: `sparse_attention_config.json` of a checkpoint, or a configuration of MInference.

        The file is a JSON list over layers of {head: [pattern, columns, slashes, score]}.

        Args:
          path: of the file.
          config: of the model that it is for.

        Raises:
          InputError: no such file, another format, a pattern other than vertical_and_slash, a file for another model,
            or budgets of zero or beyond the context length.
        """
        problem = why_unusable(path)
        if problem is not None:
            raise InputError(problem)
        try:
            layers = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not valid JSON: {error}.") from None
        if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
            raise InputError(f"{path} must hold a JSON list with an object for each layer, from head to budgets.")
        rows = [[_entry(path, i, layer, h) for h in range(len(layer))] for i, layer in enumerate(layers)]
        columns = tuple(tuple(entry[0] for entry in row) for row in rows)
        slashes = tuple(tuple(entry[1] for entry in row) for row in rows)
        scores = tuple(tuple(entry[2] for entry in row) for row in rows)
        pattern = cls(columns, slashes, scores)
        pattern.check(config, str(path))
        return pattern

    def to_file(self, path: Path) -> None:
        """Writes a sparsity file. A score that is not known is written as 1.0."""
        scores = self.scores or tuple((1.0,) * len(layer) for layer in self.columns)
        rows = zip(self.columns, self.slashes, scores, strict=True)
        layers = [
            {str(h): [_PATTERN, *entry] for h, entry in enumerate(zip(*row, strict=True))} for row in rows
        ]  # fmt: skip
        write_atomic(path, to_json(layers))


@dataclasses.dataclass(frozen=True)
class PooledBlocks:
    """Blocks of 128 keys, chosen for each tile of 128 queries by the products of the queries with each block's mean.

    A block is visited if its score is at least `threshold` times the largest score of the tile.

    Attributes:
      threshold: share of the largest score; 0 keeps every block.
      sink: tokens at the beginning of a row that every query sees.
      window: latest tokens that every query sees.
      correct_means: whether a block that is not visited counts as 128 keys that equal its mean.
      stride: only every stride-th query of a tile scores blocks, which saves time and memory; divides 128. The
        published method uses all queries.
      last: queries at the end of a prompt that attend to all keys, as do others in their tiles; 0 for none.

    Source: FlashPrefill V2 (arXiv:2608.19758).
    """

    threshold: float = 0.1
    sink: int = 256
    window: int = 512
    correct_means: bool = True
    stride: int = 8
    last: int = 1024

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise InputError(f"Expected a threshold of pooled blocks from 0 to 1; got {self.threshold}.")
        if self.sink < 0 or self.window < 1 or self.last < 0:
            raise InputError(
                "Expected a sink of at least 0 tokens, a window of at least 1 and at least 0 last queries; got "
                f"{self.sink}, {self.window} and {self.last}."
            )
        if self.stride < 1 or 128 % self.stride:
            raise InputError(f"Expected a stride that divides the 128 queries of a tile; got {self.stride}.")


def refine(
    recall_LH: np.ndarray, pattern: VerticalSlash, threshold: float, step: int = 2048, longest: int | None = None
) -> VerticalSlash:
    """Raises both budgets of the heads whose recall is too low, and records the recall as the score.

    Args:
      recall_LH: float, recall of each layer and query head with the present budgets.
      pattern: the present budgets.
      threshold: the least recall.
      step: what is added to columns and to slashes.
      longest: the largest budget; None for no bound.

    Returns:
      The new budgets. Heads at or above the threshold keep theirs.

    Raises:
      InputError: recall for other layers or heads, or not a number.

    Source: Qwen2.5-1M report (arXiv:2501.15383) algorithm 1.
    """
    recall_LH = np.asarray(recall_LH, np.float64)
    shape = len(pattern.columns), len(pattern.columns[0])
    if recall_LH.shape != shape or not np.isfinite(recall_LH).all():
        raise InputError(f"Expected a finite recall for {shape[0]} layers of {shape[1]} heads; got {recall_LH}.")

    def raised(budgets: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        now_LH = np.asarray(budgets)
        more_LH = now_LH + step if longest is None else np.maximum(np.minimum(now_LH + step, longest), now_LH)
        return tuple(map(tuple, np.where(recall_LH < threshold, more_LH, now_LH).tolist()))

    scores = tuple(map(tuple, recall_LH.tolist()))
    return VerticalSlash(raised(pattern.columns), raised(pattern.slashes), scores)


def _entry(path: Path, i: int, layer: dict[str, Any], h: int) -> tuple[int, int, float]:
    """Columns, slashes and score of head `h` in layer `i` of a sparsity file."""
    where = f"{path}: layer {i}"
    if str(h) not in layer:
        raise InputError(f"{where} has {len(layer)} heads, expected the names 0 to {len(layer) - 1}; {h} is missing.")
    entry = layer[str(h)]
    if not isinstance(entry, list) or len(entry) != 4:
        raise InputError(f"{where}, head {h}: expected [pattern, columns, slashes, score]; got {entry!r}.")
    if entry[0] != _PATTERN:
        raise InputError(
            f"{where}, head {h} has the pattern {entry[0]!r}; only {_PATTERN!r} is supported. "
            f"MInference itself runs other patterns of such files as {_PATTERN} with {_DEFAULT}: write that."
        )
    n_v, n_s, score = entry[1:]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (n_v, n_s)):
        raise InputError(f"{where}, head {h}: expected whole numbers of columns and slashes; got {n_v!r}, {n_s!r}.")
    if not isinstance(score, (int, float)) or isinstance(score, bool):
        raise InputError(f"{where}, head {h}: expected a number as the score; got {score!r}.")
    return n_v, n_s, score
