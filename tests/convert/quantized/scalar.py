"""The published formulas of quantised files, one number at a time, in Python's integers and float64."""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from convert.quantized.codes import Codes
from convert.quantized.info import Stored

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
Matrix = list[list[int]]


def integers(rng: np.random.Generator, rows: int, columns: int, bits: int) -> Matrix:
    """Random codes without a sign; the least and the greatest are among them in larger matrices."""
    codes = rng.integers(0, 1 << bits, (rows, columns))
    codes.flat[0], codes.flat[-1] = 0, (1 << bits) - 1
    return codes.tolist()


def floats(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random scales of both signs and of many sizes."""
    values = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 4, shape))
    return np.asarray(values, np.float64).astype(DTYPES[dtype])


def word(values: Sequence[int], bits: int, places: Sequence[int] | None = None) -> int:
    """Codes in one word of 32 bits, as a signed integer.

    Args:
      values: the codes; codes that are not there are 0.
      bits: of a code.
      places: which of the values stands in each group of bits, from the low ones; by default in their order.
    """
    total = 0
    for i, place in enumerate(places or range(32 // bits)):
        if place < len(values):
            total |= values[place] << (bits * i)
    return total - (1 << 32) if total >> 31 else total


def words(rows: Matrix, bits: int, places: Sequence[int] | None = None) -> np.ndarray:
    """Packs each row of a matrix."""
    width = 32 // bits
    return np.array(
        [[word(row[start : start + width], bits, places) for start in range(0, len(row), width)] for row in rows],
        np.int32,
    )


def transpose(rows: Matrix) -> Matrix:
    return [list(column) for column in zip(*rows, strict=True)]


def published(
    outputs: int, inputs: int, code: Callable[[int, int], float], scale: Callable[[int, int], float]
) -> np.ndarray:
    """W[o, i] = scale(o, i) * code(o, i), code less zero point, in float64 and rounded once to float32."""
    return np.array([[scale(o, i) * code(o, i) for i in range(inputs)] for o in range(outputs)]).astype(np.float32)


def canonical(codes: Codes) -> np.ndarray:
    """The values of a matrix by the definition of `Codes`, in float64 and rounded once to float32."""
    outputs, inputs = codes.codes.shape
    group = inputs // codes.scales.shape[1]
    result = np.empty((outputs, inputs), np.float32)
    for o in range(outputs):
        for j in range(inputs):
            value = float(codes.codes[o, j])
            if codes.zeros is not None:
                value -= float(codes.zeros[o, j // group])
            value *= float(codes.scales[o, j // group])
            if codes.mins is not None:
                value = float(np.float32(value)) - float(codes.mins[o, j // group])
            result[o, j if codes.order is None else codes.order[j]] = value
    return result


def assert_same_values(codes: Codes, expected: np.ndarray) -> None:
    """Both the arrays of a matrix, by their definition, and `dequantize` give the expected values bit for bit."""
    for found in (canonical(codes), codes.dequantize()):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def assert_same_bytes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].flags.c_contiguous, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_asked_for(expected: dict[str, Stored], module: str, tensors: dict[str, np.ndarray]) -> None:
    """The tensors of a matrix are asked for by name, in their dtypes and shapes; only optional ones are absent."""
    absent = dict(expected)
    for name, array in tensors.items():
        stored = absent.pop(f"{module}.{name}")
        assert array.dtype in stored.dtypes
        assert array.shape in stored.shapes
    assert all(stored.optional for stored in absent.values())
