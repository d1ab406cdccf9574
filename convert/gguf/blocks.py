"""Blocks of quantised weights in GGUF files: taken apart, computed, and put together.

Each type stores a row of a matrix in blocks of bytes (ggml-common.h of llama.cpp). The simple types and the K types are
affine: a group of values has a scale and some have a minimum, value = q * scale - min. They are taken apart here, all
blocks at once. The other types look values up in tables; the `gguf` package computes those.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

from convert.gguf.package import gguf_library
from convert.quantized.codes import Codes
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import TYPES, TensorType

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""The types that store values as they are."""


class _Parts(NamedTuple):
    """Blocks taken apart: q [blocks, groups, values of a group] int8; scales and mins [blocks, groups]."""

    q: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None = None


# --- Taking blocks apart -----------------------------------------------------------------------------------------


def _fields(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """Cuts the bytes of blocks into fields of given sizes."""
    ends = np.cumsum(sizes)
    return [blocks[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _half(field: np.ndarray) -> np.ndarray:
    """Float16 numbers of a field of two bytes: [blocks, 1]."""
    return np.ascontiguousarray(field).view(np.float16)


def _single(field: np.ndarray) -> np.ndarray:
    return _half(field).astype(np.float32)


def _bits(field: np.ndarray, width: int, run: int) -> np.ndarray:
    """Numbers of `width` bits: the lowest bits of `run` bytes come first, then their next bits, then the next bytes.

    Returns:
      uint8 [blocks, numbers].
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    runs = field.reshape(len(field), -1, 1, run)
    return ((runs >> shifts) & np.uint8(2**width - 1)).reshape(len(field), -1)


def _high_bits(field: np.ndarray) -> np.ndarray:
    """The fifth bits of Q5_0 and Q5_1: bit i of 32 belongs to value i."""
    return np.unpackbits(field, axis=1, bitorder="little")


def _signed(q: np.ndarray, offset: int, groups: int) -> np.ndarray:
    """Unsigned numbers less an offset, as int8 [blocks, groups, values]."""
    return (q.view(np.int8) - np.int8(offset)).reshape(len(q), groups, -1)


def _q4_0(blocks: np.ndarray) -> _Parts:
    d, q = _fields(blocks, 2, 16)
    return _Parts(_signed(_bits(q, 4, 16), 8, 1), _half(d))


def _q4_1(blocks: np.ndarray) -> _Parts:
    d, m, q = _fields(blocks, 2, 2, 16)
    return _Parts(_signed(_bits(q, 4, 16), 0, 1), _half(d), -_single(m))


def _q5_0(blocks: np.ndarray) -> _Parts:
    d, high, low = _fields(blocks, 2, 4, 16)
    return _Parts(_signed(_bits(low, 4, 16) | _high_bits(high) << 4, 16, 1), _half(d))


def _q5_1(blocks: np.ndarray) -> _Parts:
    d, m, high, low = _fields(blocks, 2, 2, 4, 16)
    return _Parts(_signed(_bits(low, 4, 16) | _high_bits(high) << 4, 0, 1), _half(d), -_single(m))


def _q8_0(blocks: np.ndarray) -> _Parts:
    d, q = _fields(blocks, 2, 32)
    return _Parts(np.ascontiguousarray(q).view(np.int8)[:, None], _half(d))


def _q2_k(blocks: np.ndarray) -> _Parts:
    both, q, d, dmin = _fields(blocks, 16, 64, 2, 2)
    scales, mins = (x.astype(np.float32) for x in (both & 15, both >> 4))
    return _Parts(_signed(_bits(q, 2, 32), 0, 16), _single(d) * scales, _single(dmin) * mins)


def _q3_k(blocks: np.ndarray) -> _Parts:
    high, low, packed, d = _fields(blocks, 32, 64, 12, 2)
    # A scale has 6 bits: 4 in the first 8 bytes, 2 in the last 4.
    scales = _bits(packed[:, :8], 4, 8) | _bits(packed[:, 8:], 2, 4) << 4
    q = _bits(low, 2, 32) | _bits(high, 1, 32) << 2
    return _Parts(_signed(q, 4, 16), _single(d) * _signed(scales, 32, 16)[..., 0].astype(np.float32))


def _scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima, 6 bits each, in the 12 bytes of a block of Q4_K or Q5_K: uint8 [blocks, 8]."""
    a, b, c = _fields(packed, 4, 4, 4)
    scales = np.concatenate([a & 63, c & 15 | (a >> 6) << 4], axis=1)
    mins = np.concatenate([b & 63, c >> 4 | (b >> 6) << 4], axis=1)
    return scales, mins


def _q4_k(blocks: np.ndarray) -> _Parts:
    d, dmin, packed, q = _fields(blocks, 2, 2, 12, 128)
    scales, mins = (x.astype(np.float32) for x in _scales_and_mins(packed))
    return _Parts(_signed(_bits(q, 4, 32), 0, 8), _single(d) * scales, _single(dmin) * mins)


def _q5_k(blocks: np.ndarray) -> _Parts:
    d, dmin, packed, high, low = _fields(blocks, 2, 2, 12, 32, 128)
    scales, mins = (x.astype(np.float32) for x in _scales_and_mins(packed))
    q = _bits(low, 4, 32) | _bits(high, 1, 32) << 4
    return _Parts(_signed(q, 0, 8), _single(d) * scales, _single(dmin) * mins)


def _q6_k(blocks: np.ndarray) -> _Parts:
    low, high, scales, d = _fields(blocks, 128, 64, 16, 2)
    q = _bits(low, 4, 64) | _bits(high, 2, 32) << 4
    return _Parts(_signed(q, 32, 16), _single(d) * np.ascontiguousarray(scales).view(np.int8).astype(np.float32))


_TAKE_APART: dict[str, Callable[[np.ndarray], _Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
# Their codes in memory. Types with 5 bits, or with 2, take more room there than in the file.
_INT4 = ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K")
_KEPT = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
_SHIFTED = ("Q4_1", "Q4_K")
"""Types with codes 0 to 15, which int4 holds less 8."""


def code_type(kind: TensorType) -> Literal["int4", "int8"] | None:
    """The dtype of a type's codes in memory, "int4" or "int8"; None if it can only be dequantised."""
    if kind.name not in _TAKE_APART:
        return None
    return "int4" if kind.name in _INT4 else "int8"


def describe(kinds: Iterable[TensorType]) -> str:
    """One line that says in which form the codes of each type stay in memory."""
    names = sorted({kind.name for kind in kinds} - FLOATS.keys())
    forms = {
        "kept as they are": [name for name in names if name in _KEPT],
        "repacked without a change of values": [name for name in names if name in _TAKE_APART and name not in _KEPT],
        "dequantised": [name for name in names if name not in _TAKE_APART],
    }
    return "; ".join(f"{', '.join(found)}: {form}" for form, found in forms.items() if found) or "not quantised"


# --- Values ------------------------------------------------------------------------------------------------------


def dequantize(data: np.ndarray, kind: TensorType) -> np.ndarray:
    """Computes the values of rows, with the roundings of llama.cpp.

    Args:
      data: uint8 [..., bytes of a row].
      kind: how the rows are stored.

    Returns:
      float32 [..., values of a row]; bit for bit `gguf.quants.dequantize`.

    Raises:
      InputError: a type whose values cannot be computed, or the package gguf is needed and not installed.
    """
    shape = (*data.shape[:-1], data.shape[-1] // kind.nbytes * kind.block)
    if kind.name in FLOATS:
        return data.view(FLOATS[kind.name]).astype(np.float32).reshape(shape)
    take_apart = _TAKE_APART.get(kind.name)
    if take_apart is not None:
        with np.errstate(invalid="ignore", over="ignore"):  # The caller checks for what is not finite.
            q, scales, mins = take_apart(data.reshape(-1, kind.nbytes))
            values = q.astype(np.float32)
            values *= scales.astype(np.float32)[..., None]
            if mins is not None:
                values -= mins[..., None]
        return values.reshape(shape)
    library = gguf_library()
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            result: np.ndarray = library.quants.dequantize(data, library.GGMLQuantizationType(kind.number))
    except (NotImplementedError, ValueError):
        raise InputError(f"Tensors of type {kind.name} cannot be read: the package gguf does not compute it.") from None
    return result.reshape(shape)


def unpack(data: np.ndarray, kind: TensorType) -> Codes:
    """Takes rows of a matrix apart, without rounding.

    The values of the codes are those of `dequantize` bit for bit, except for Q4_K and Q4_1. Their codes 0 to 15 are
    stored less 8, and 8 scales are taken from the minimum, which rounds once more: a value differs by at most one unit
    in the last place of the largest of its terms.

    Args:
      data: uint8 [outputs, bytes of a row].
      kind: a type with a `code_type`.

    Raises:
      InputError: a type without one.
    """
    take_apart, codes = _TAKE_APART.get(kind.name), code_type(kind)
    if take_apart is None or codes is None:
        raise InputError(f"Type {kind.name} has no scales of groups; expected one of {', '.join(_TAKE_APART)}.")
    with np.errstate(invalid="ignore", over="ignore"):  # As above.
        q, scales, mins = take_apart(data.reshape(-1, kind.nbytes))
        if kind.name in _SHIFTED:
            assert mins is not None
            q = q - np.int8(8)
            mins = mins - np.float32(8) * scales.astype(np.float32)
    if codes == "int4":
        q = q.astype(ml_dtypes.int4)
    outputs = len(data)
    return Codes(
        q.reshape(outputs, -1), scales.reshape(outputs, -1), mins=None if mins is None else mins.reshape(outputs, -1)
    )


def pack(codes: Codes) -> tuple[TensorType, np.ndarray]:
    """Writes the codes of a matrix as Q4_0 or Q8_0 without quantising anew: `unpack` gives the same values.

    Args:
      codes: int4 or int8, without zero points, minima or an order; scales that float16 holds.

    Returns:
      The type and the rows, uint8 [outputs, bytes of a row].

    Raises:
      InputError: codes of another kind.
    """
    kind = {np.dtype(ml_dtypes.int4): TYPES["Q4_0"], np.dtype(np.int8): TYPES["Q8_0"]}.get(codes.codes.dtype)
    halves = codes.scales.astype(np.float16)
    problem = None
    if kind is None:
        problem = f"codes of {codes.codes.dtype}"
    elif codes.mins is not None or codes.order is not None or _any(codes.zeros):
        problem = "zero points, minima or an order of inputs"
    elif codes.group % kind.block:
        problem = f"groups of {codes.group} inputs"
    elif not (halves.astype(np.float32) == codes.scales.astype(np.float32)).all():
        problem = "scales that float16 does not hold"
    if kind is None or problem is not None:
        raise InputError(
            f"GGUF has no type for {problem}. Symmetric int4 and int8 codes with groups of 32 (or a multiple of it) "
            "and float16 scales are written as they are; give --type to quantise anew."
        )
    d = np.repeat(halves, codes.group // kind.block, axis=1).reshape(-1, 1).view(np.uint8)
    q = codes.codes.astype(np.int8).reshape(-1, kind.block)
    if kind.name == "Q4_0":
        low, high = np.split((q + 8).view(np.uint8), 2, axis=1)
        packed = low | high << 4
    else:
        packed = q.view(np.uint8)
    return kind, np.concatenate([d, packed], axis=1).reshape(len(codes.codes), -1)


def _any(zeros: np.ndarray | None) -> bool:
    return zeros is not None and bool(zeros.astype(np.int8).any())
