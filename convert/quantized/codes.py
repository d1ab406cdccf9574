"""One quantised matrix on the host, in the form that all formats share."""

import dataclasses
import math

import ml_dtypes
import numpy as np

from convert.quantized.words import FLOAT8, INT4, INT8, integers
from qwen_jax.errors import InputError

SCALES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32))
_BLOCK = 64  # Outputs that are dequantised together: they fit a cache.


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A matrix [O, I] of O outputs and I inputs as codes; g = I / G consecutive places share a scale.

    The value of output o and input order[j] is (codes[o, j] - zeros[o, j // g]) * scales[o, j // g] - mins[o, j // g],
    computed in float32.

    Attributes:
      codes: [O, I]: int4, int8 or float8_e4m3fn.
      scales: [O, G]: float16, bfloat16 or float32.
      zeros: [O, G] in the dtype of codes: zero points; None if they are 0.
      mins: float32 [O, G]; None if they are 0.
      order: int32 [I]: which input each place holds, a permutation; None if place j holds input j.

    Raises:
      InputError: shapes or dtypes that do not fit together.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    mins: np.ndarray | None = None
    order: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype not in (INT4, INT8, FLOAT8):
            raise _expected("codes int4, int8 or float8_e4m3fn [outputs, inputs]", self.codes)
        outputs, inputs = self.codes.shape
        groups = self.scales.shape[-1] if self.scales.ndim == 2 else 0
        if self.scales.dtype not in SCALES or self.scales.shape != (outputs, groups) or not groups or inputs % groups:
            raise _expected(f"scales float16, bfloat16 or float32 [{outputs}, a divisor of {inputs}]", self.scales)
        if self.zeros is not None and self.codes.dtype == FLOAT8:
            raise InputError("float8 codes have no zero points.")
        if self.zeros is not None and (self.zeros.shape, self.zeros.dtype) != (self.scales.shape, self.codes.dtype):
            raise _expected(f"zero points {self.codes.dtype} {list(self.scales.shape)}", self.zeros)
        if self.mins is not None and (self.mins.shape, self.mins.dtype) != (self.scales.shape, np.float32):
            raise _expected(f"minima float32 {list(self.scales.shape)}", self.mins)
        if self.order is not None:
            if (self.order.shape, self.order.dtype) != ((inputs,), np.int32):
                raise _expected(f"an order int32 [{inputs}]", self.order)
            if not np.array_equal(np.sort(self.order), np.arange(inputs)):
                raise InputError(f"The order of inputs must hold each of 0 to {inputs - 1} once.")

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> np.ndarray:
        """The values, float32 [O, I], with the inputs in their own order."""
        out = np.empty(self.codes.shape, np.float32)
        places = None if self.order is None else np.argsort(self.order)
        # A part at a time: intermediate results of whole matrices cost more than the work.
        for start in range(0, len(out), _BLOCK):
            values = self._values(slice(start, start + _BLOCK))
            out[start : start + _BLOCK] = values if places is None else np.take(values, places, axis=1)
        return out

    def outputs(self, rows: slice) -> "Codes":
        """Some of the outputs; views of the arrays."""
        zeros, mins = (x if x is None else x[rows] for x in (self.zeros, self.mins))
        return dataclasses.replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros, mins=mins)

    def _values(self, rows: slice) -> np.ndarray:
        """The values of some outputs, with the inputs in the places that they have in codes."""
        codes = self.codes[rows]
        if codes.dtype == FLOAT8:
            # A look-up is several times faster than the conversion of ml_dtypes.
            values = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)[codes.view(np.uint8)]
        else:
            values = integers(codes).astype(np.float32)
        grouped = values.reshape(*self.scales[rows].shape, self.group)
        if self.zeros is not None:
            grouped -= integers(self.zeros[rows]).astype(np.float32)[..., None]
        grouped *= self.scales[rows].astype(np.float32)[..., None]
        if self.mins is not None:
            grouped -= self.mins[rows][..., None]
        return values

    def regrouped(self, group: int) -> "Codes":
        """The same values with smaller groups, which repeat the scale of the group that they were cut from.

        Args:
          group: inputs of a group; must divide those of a group now.

        Raises:
          InputError: the group does not divide the present one.
        """
        if group < 1 or self.group % group:
            raise InputError(f"Groups of {self.group} inputs can be cut into groups of a divisor, got {group}.")
        times = self.group // group
        return dataclasses.replace(
            self,
            scales=np.repeat(self.scales, times, 1),
            zeros=None if self.zeros is None else np.repeat(self.zeros, times, 1),
            mins=None if self.mins is None else np.repeat(self.mins, times, 1),
        )

    def in_own_order(self) -> np.ndarray:
        """The codes [O, I] with the inputs in their own order."""
        return self.codes if self.order is None else np.take(self.codes, np.argsort(self.order), axis=1)


def cut(grouped: np.ndarray, inputs: int, group: int) -> np.ndarray:
    """Brings scales or zero points of a file, whose last group may be shorter, to groups of equal size.

    Args:
      grouped: [O, ceil(inputs / group)].
      inputs: of the matrix.
      group: inputs of all groups but the last.

    Returns:
      [O, inputs / g] with g = gcd(group, inputs).
    """
    size = math.gcd(group, inputs)
    return grouped if grouped.shape[1] * size == inputs else grouped[:, np.arange(0, inputs, size) // group]


def joined(grouped: np.ndarray, inputs: int, group: int, what: str) -> np.ndarray:
    """Undoes `cut` and `Codes.regrouped`: brings scales or zero points to the groups of a file.

    Args:
      grouped: [O, G], G groups of equal size.
      inputs, group: as for `cut`.
      what: the array has, for messages.

    Returns:
      [O, ceil(inputs / group)].

    Raises:
      InputError: the groups differ where the file has one value.
    """
    size = inputs // grouped.shape[1]
    if group < inputs and group % size:
        raise InputError(
            f"Expected groups of {group} inputs or of a divisor, got groups of {size}. Write groups of {size}."
        )
    firsts = np.minimum(np.arange(0, inputs, group) // size, grouped.shape[1] - 1)
    result = np.ascontiguousarray(grouped[:, firsts])
    places = np.arange(grouped.shape[1]) * size
    if not np.array_equal(comparable(result[:, places // group]), comparable(grouped)):
        raise InputError(
            f"The {what} of groups of {size} inputs differ within groups of {group}. Write groups of {size} inputs."
        )
    return result


def comparable(array: np.ndarray) -> np.ndarray:
    """A view or copy of an array that is equal where its values are the same bit for bit.

    An int4 of ml_dtypes has four bits that mean nothing.
    """
    if array.dtype == INT4:
        return integers(array)
    return np.ascontiguousarray(array).view(np.uint8)


def _expected(what: str, found: np.ndarray) -> InputError:
    return InputError(f"Expected {what}, got {found.dtype} {list(found.shape)}.")
