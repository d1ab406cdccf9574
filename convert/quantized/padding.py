"""The rows that the quantised versions of Qwen2.5-72B have more than the model."""

import dataclasses

import numpy as np

from convert.names import Leaf
from convert.source import Source, Span
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.published import published


def without_padding(weight: np.ndarray, axis: int, width: int) -> np.ndarray:
    """Drops the zeros that were put between the first rows of a feed-forward projection.

    The GPTQ and AWQ versions of the 72B model have an intermediate size of 29,696 instead of 29,568, so that groups and
    shards divide it: n = 128 zero rows stand after each of the first n rows of gate and up, and zero columns after the
    first n columns of down (QwenLM/Qwen2.5, docs/source/quantization/gptq.md, "Padding").

    The columns are not looked at: they multiply the neurons of the zero rows, which are zero.

    Args:
      weight: full precision.
      axis: of the intermediate size: 0 for gate and up, 1 for down.
      width: the intermediate size without padding.

    Returns:
      A copy with `width` rows or columns; weight itself if it has no more.

    Raises:
      InputError: fewer rows than `width`, too many, or rows to drop that are not zero.
    """
    padding = weight.shape[axis] - width
    if padding == 0:
        return weight
    if not 0 < padding <= width:
        raise InputError(
            f"Expected {width} to {2 * width} rows with padding, got {weight.shape[axis]}. Check the intermediate size."
        )
    dropped = np.arange(1, 2 * padding, 2)
    count = 0 if axis else int(np.count_nonzero(np.take(weight, dropped, axis).any(1)))
    if count:
        raise InputError(
            f"{count} of the {padding} rows of padding (1, 3, ... {dropped[-1]}) are not zero, so that they cannot be "
            "dropped. Keep them: give the model's own intermediate size (--intermediate-size)."
        )
    return np.delete(weight, dropped, axis)


def published_width(config: ModelConfig) -> int:
    """The intermediate size of a model without padding: of the 72B model that of the release, of others their own."""
    large = published("qwen2.5-72b")
    names = "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "moe"
    same = all(getattr(config, name) == getattr(large, name) for name in names)
    return large.intermediate_size if same and config.intermediate_size == 29_696 else config.intermediate_size


class UnpaddedSource:
    """A dense checkpoint without the padding of its feed-forward layers, as a `Source`; see `without_padding`."""

    def __init__(self, source: Source, width: int) -> None:
        """
        Args:
          source: in full precision.
          width: the intermediate size without padding.

        Raises:
          InputError: a quantised model, one with experts, or a width that no padding explains.
        """
        config = source.config
        self._padding = config.intermediate_size - width
        if config.quantization is not None or config.moe is not None:
            what = "experts" if config.moe is not None else "quantised weights"
            raise InputError(f"Padding is dropped from dense models in full precision; this one has {what}.")
        if not 0 <= self._padding <= width:
            own = config.intermediate_size
            raise InputError(
                f"Expected an intermediate size from {-(-own // 2)} to {own}, which is that of this model; got {width}."
            )
        self.config = dataclasses.replace(config, intermediate_size=width)
        self.workers, self.folder, self._source = source.workers, source.folder, source

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._source.dtype(self._stored(leaf))

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        return None if _axis(leaf) is not None else self._source.spans(leaf, tensors, rows)

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        axis, count = _axis(leaf), rows.stop - rows.start
        if axis is None:
            return self._source.read(leaf, tensors, rows)
        if axis == 1:
            found = self._source.read(self._stored(leaf), tensors, rows)
            return np.stack([without_padding(one, 1, leaf.shape[1]) for one in found])
        # Row i has min(i, padding) rows of padding before it, so that a block begins as the whole matrix does.
        padded = slice(*(i + min(i, self._padding) for i in (rows.start, rows.stop)))
        found = self._source.read(self._stored(leaf), tensors, padded)
        return np.stack([without_padding(one, 0, count) for one in found])

    def _stored(self, leaf: Leaf) -> Leaf:
        """The leaf of the padded model."""
        axis = _axis(leaf)
        if axis is None:
            return leaf
        shape = tuple(n + self._padding if i == axis else n for i, n in enumerate(leaf.shape))
        return dataclasses.replace(leaf, shape=shape, hf_shape=shape)


def _axis(leaf: Leaf) -> int | None:
    """The axis of the intermediate size in the matrices of a leaf; None if they have none."""
    return {("mlp", "gate"): 0, ("mlp", "up"): 0, ("mlp", "down"): 1}.get(leaf.path[-3:-1])  # type: ignore[arg-type]
