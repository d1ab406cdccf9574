"""Scales of a whole tensor, of its outputs, of groups of inputs and of blocks, as arrays [outputs, groups] and back."""

from typing import Literal

import numpy as np

from convert.quantized.codes import comparable, joined
from qwen_jax.errors import InputError

Strategy = Literal["tensor", "channel", "group", "block"]


def scale_shapes(
    strategy: Strategy, shape: tuple[int, int], group: int, block: tuple[int, int] | None
) -> tuple[tuple[int, ...], ...]:
    """The shapes that files give to scales; the first one is written.

    Args:
      strategy: what shares a scale.
      shape: outputs and inputs.
      group: inputs of a group or block.
      block: outputs and inputs of a block, with the strategy "block".
    """
    outputs, inputs = shape
    if strategy == "tensor":
        return (1,), (), (1, 1)
    if strategy == "channel":
        return (outputs, 1), (outputs,)
    rows = outputs if block is None else -(-outputs // block[0])
    return ((rows, -(-inputs // group)),)


def spread(scales: np.ndarray, outputs: int, block: tuple[int, int] | None) -> np.ndarray:
    """Scales of any strategy for each output: [outputs, groups].

    Args:
      scales: in a shape of `scale_shapes`.
      outputs: of the matrix.
      block: as for `scale_shapes`.
    """
    if scales.ndim < 2:
        scales = scales.reshape(-1, 1)
    if block is not None:
        return np.repeat(scales, block[0], 0)[:outputs]
    return np.repeat(scales, outputs, 0) if len(scales) == 1 else np.ascontiguousarray(scales)


def folded(
    grouped: np.ndarray, inputs: int, group: int, strategy: Strategy, block: tuple[int, int] | None, what: str
) -> np.ndarray:
    """The inverse of `spread` and `cut`: scales or zero points as a file has them.

    Args:
      grouped: [outputs, groups].
      inputs: of the matrix.
      group, strategy, block: as for `scale_shapes`.
      what: the array has, for messages.

    Raises:
      InputError: values differ that share one in the file.
    """
    result = joined(grouped, inputs, group, what)
    rows = len(grouped) if strategy == "tensor" else 1 if block is None else block[0]
    if rows > 1:
        kept = np.ascontiguousarray(result[::rows])
        if not np.array_equal(comparable(np.repeat(kept, rows, 0)[: len(result)]), comparable(result)):
            raise InputError(f"The {what} differ between outputs that share one in the file ({strategy}).")
        result = kept
    return result.reshape(1) if strategy == "tensor" else result
