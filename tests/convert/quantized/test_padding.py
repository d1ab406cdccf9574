"""The zero rows that the quantised 72B models have between their first rows are dropped, and nothing else."""

import ml_dtypes
import numpy as np
import pytest

from convert.quantized import without_padding
from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed


def padded(weight: np.ndarray, padding: int) -> np.ndarray:
    """The recipe of QwenLM/Qwen2.5: [w0, 0, w1, 0, ...] for the first rows, the rest unchanged."""
    rows = []
    for i, row in enumerate(weight):
        rows += [row, np.zeros_like(row)] if i < padding else [row]
    return np.stack(rows)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("width", "padding"), [(29568, 128), (40, 7), (5, 5), (6, 0)])
def test_dropping_undoes_the_published_padding(width: int, padding: int, dtype: type) -> None:
    """Rows of gate and up, and columns of down, bit for bit; also where the matrix has zero rows of its own."""
    weight = print_seed().standard_normal((width, 3)).astype(dtype)
    weight[[1, width - 1]] = 0
    full = padded(weight, padding)
    assert full.shape[0] == width + padding
    assert without_padding(full, 0, width).tobytes() == weight.tobytes()
    columns = without_padding(np.ascontiguousarray(full.T), 1, width)
    assert np.ascontiguousarray(columns).tobytes() == np.ascontiguousarray(weight.T).tobytes()


def test_rows_that_are_no_padding_are_kept() -> None:
    """Rows with values where padding should be, and sizes that no padding explains, are refused."""
    weight = print_seed().standard_normal((20, 3)).astype(np.float32)
    full = padded(weight, 4)
    full[3, 1] = 1e-6
    with pytest.raises(InputError, match=r"1 of the 4 rows of padding \(1, 3, ... 7\) are not zero"):
        without_padding(full, 0, 20)
    with pytest.raises(InputError, match="Expected 9 to 18 rows with padding, got 20"):
        without_padding(weight, 0, 9)
    with pytest.raises(InputError, match="Expected 21 to 42 rows with padding, got 20"):
        without_padding(weight, 0, 21)
