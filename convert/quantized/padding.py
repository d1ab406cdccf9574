"""The rows that the quantised versions of Qwen2.5-72B have more than the model."""

import numpy as np

from qwen_jax.errors import InputError


def without_padding(weight: np.ndarray, axis: int, width: int) -> np.ndarray:
    """Drops the zeros that were put between the first rows of a feed-forward projection.

    The GPTQ and AWQ versions of the 72B model have an intermediate size of 29,696 instead of 29,568, so that groups and
    shards divide it: n = 128 zero rows stand after each of the first n rows of gate and up, and zero columns after the
    first n columns of down (QwenLM/Qwen2.5, docs/source/quantization/gptq.md, "Padding").

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
    count = int(np.count_nonzero(np.take(weight, dropped, axis).any(1 - axis)))
    if count:
        raise InputError(
            f"{count} of the {padding} rows of padding (1, 3, ... {dropped[-1]}) are not zero, so that they cannot be "
            f"dropped. Keep the intermediate size {weight.shape[axis]}."
        )
    return np.delete(weight, dropped, axis)
