"""Integers of 4 and 8 bits in words of 32 bits, low bits first, and the transposes that bring them in place.

A file stores a code c of b bits as c + 2^(b - 1), without a sign. In memory it has a sign. Adding 2^(b - 1) modulo 2^b
flips the highest bit, so that whole words change from one form to the other with one exclusive or.
"""

import ml_dtypes
import numpy as np

INT4, INT8, FLOAT8 = np.dtype(ml_dtypes.int4), np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn)

_SIGNS = {4: 0x88888888, 8: 0x80808080}
_BLOCK = 256  # Rows of a transpose that are written together: they fit a cache.


def count(values: int, bits: int) -> int:
    """The number of words that hold so many values; the last word may be partly empty."""
    return -(-values * bits // 32)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """The transpose of a matrix as a C-contiguous array."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(out), _BLOCK):
        out[start : start + _BLOCK] = matrix[:, start : start + _BLOCK].T
    return out


def unpack(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Takes words apart into codes with a sign.

    Args:
      words: int32 [..., words], C-contiguous, packed along the last axis.
      bits: 4 or 8.
      length: of the last axis of the result; the bits after it are padding.

    Returns:
      int4 or int8 [..., length].
    """
    data = (words.view(np.uint32) ^ np.uint32(_SIGNS[bits])).view(np.uint8)
    if bits == 4:
        values = np.empty((*data.shape, 2), np.uint8)
        np.bitwise_and(data, 15, out=values[..., 0])
        np.right_shift(data, 4, out=values[..., 1])
        data = values.reshape(*data.shape[:-1], 2 * data.shape[-1])
    return np.ascontiguousarray(data[..., :length]).view(INT4 if bits == 4 else INT8)


def pack(codes: np.ndarray) -> np.ndarray:
    """Puts codes with a sign into words along the last axis; the inverse of `unpack`.

    Args:
      codes: int4 or int8 [..., length].

    Returns:
      int32 [..., words]; bits of the last word after the values are zero.
    """
    bits = 4 if codes.dtype == INT4 else 8
    values = unsigned(codes)
    width = 32 // bits
    padding = -values.shape[-1] % width
    if padding:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], padding), np.uint8)], -1)
    if bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    return np.ascontiguousarray(values).view(np.int32)


def unpack_columns(packed: np.ndarray, bits: int, length: int, order: np.ndarray | None = None) -> np.ndarray:
    """Takes words apart that are packed along the first axis, and transposes them.

    Args:
      packed: int32 [words, O].
      bits: 4 or 8.
      length: of the packed axis.
      order: which of the codes each place of the result holds; None if they keep their places.

    Returns:
      int4 or int8 [O, length].
    """
    out = np.empty((packed.shape[1], length), INT4 if bits == 4 else INT8)
    # A part at a time: intermediate results of whole matrices cost more than the work.
    for start in range(0, len(out), _BLOCK):
        part = unpack(np.ascontiguousarray(packed[:, start : start + _BLOCK].T), bits, length)
        out[start : start + _BLOCK] = part if order is None else np.take(part, order, axis=1)
    return out


def pack_columns(codes: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """The inverse of `unpack_columns`: int4 or int8 [O, length] to int32 [words, O]."""
    out = np.empty((count(codes.shape[1], 4 if codes.dtype == INT4 else 8), len(codes)), np.int32)
    places = None if order is None else np.argsort(order)
    for start in range(0, len(codes), _BLOCK):
        part = codes[start : start + _BLOCK]
        out[:, start : start + _BLOCK] = pack(part if places is None else np.take(part, places, axis=1)).T
    return out


def unsigned(codes: np.ndarray) -> np.ndarray:
    """int4 or int8 codes as a file stores them: uint8, with 8 or 128 added."""
    if codes.dtype == INT4:
        # The upper four bits of an int4 of ml_dtypes are undefined.
        return codes.view(np.uint8) & 15 ^ 8
    return codes.view(np.uint8) ^ 128


def integers(codes: np.ndarray) -> np.ndarray:
    """int4 or int8 codes as int8, with their values."""
    if codes.dtype == INT8:
        return codes
    return unsigned(codes).view(np.int8) - np.int8(8)


def from_integers(values: np.ndarray, bits: int) -> np.ndarray:
    """int8 values, which must fit the bits, as int4 or int8 codes."""
    if bits == 8:
        return values
    return (values.view(np.uint8) & 15).view(INT4)
