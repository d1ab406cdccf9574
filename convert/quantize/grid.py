"""The values that codes can stand for, and rounding weights to them: what all algorithms share."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.quantized import Codes
from convert.quantized.info import CodeType
from convert.quantized.words import from_integers

_LARGEST_FLOAT8 = 448.0  # Of float8_e4m3fn.


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the weights of a group become codes: the value of a code is (code - zero) * scale.

    Attributes:
      codes: int4, int8 or float8_e4m3fn.
      group: inputs that share a scale; 0 if all inputs of an output share one.
      symmetric: the zero is 0. Otherwise it is the code that the value 0 has, and the codes span the weights of a group
        and 0. float8 codes are always symmetric.
      scales: dtype that scales are rounded to, before weights are.
    """

    codes: CodeType = "int4"
    group: int = 128
    symmetric: bool = True
    scales: str = "float16"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if self.codes == "int4" else 8

    @property
    def highest(self) -> int:
        """The highest integer code; the lowest one is -1 minus it."""
        return (1 << (self.bits - 1)) - 1

    def group_of(self, inputs: int) -> int:
        """Inputs that share a scale in a matrix."""
        return self.group or inputs


class Rounded(NamedTuple):
    """A matrix of O outputs and I inputs after rounding.

    Attributes:
      codes_OI: int8 or float8_e4m3fn.
      scales_OG: float32, with values of the dtype of the grid.
      zeros_OG: int8; None on a symmetric grid.
      values_OI: float32, what the codes stand for, with the inputs in their own order.
      order_I: int32, which input each place of the codes holds; None if place i holds input i.
    """

    codes_OI: jax.Array
    scales_OG: jax.Array
    zeros_OG: jax.Array | None
    values_OI: jax.Array
    order_I: jax.Array | None = None


def fit(weights: jax.Array, grid: Grid, shrink: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Chooses scale and zero of groups of weights so that the grid spans them.

    A symmetric grid of b bits spans the largest absolute weight with (2^b - 1) / 2 steps, as GPTQ's implementation
    does; the largest weight is then at most half a step outside.

    Args:
      weights: float32 [..., g].
      grid: the grid.
      shrink: part of the range that is spanned, broadcast against [...]; weights beyond it are clipped.

    Returns:
      Scales and zeros, float32 [...]; zeros are integers.
    """
    if grid.symmetric or grid.codes == "float8_e4m3fn":
        steps = _LARGEST_FLOAT8 if grid.codes == "float8_e4m3fn" else grid.highest + 0.5
        scales = _stored(jnp.abs(weights).max(-1) * shrink / steps, grid)
        return scales, jnp.zeros_like(scales)
    low, high = (jnp.minimum(weights.min(-1), 0) * shrink, jnp.maximum(weights.max(-1), 0) * shrink)
    scales = _stored((high - low) / (2 * grid.highest + 1), grid)
    lowest = -1 - grid.highest
    return scales, jnp.clip(lowest - jnp.round(low / scales), lowest, grid.highest)


def _stored(scales: jax.Array, grid: Grid) -> jax.Array:
    """Scales rounded to the dtype that they are stored in; never zero, so that weights can be divided by them."""
    rounded = scales.astype(grid.scales).astype(jnp.float32)
    return jnp.maximum(rounded, float(jnp.finfo(grid.scales).tiny))


def encode(weights: jax.Array, scales: jax.Array, zeros: jax.Array, grid: Grid) -> jax.Array:
    """The codes nearest to weights, as float32 of the weights' shape; scales and zeros are broadcast against it."""
    ratio = weights / scales
    if grid.codes == "float8_e4m3fn":
        return jnp.clip(ratio, -_LARGEST_FLOAT8, _LARGEST_FLOAT8).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.clip(jnp.round(ratio) + zeros, -1 - grid.highest, grid.highest)


def decode(codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """The values of float32 codes."""
    return (codes - zeros) * scales


def round_to(weight_OI: jax.Array, grid: Grid, shrink_OG: jax.Array | float = 1.0) -> Rounded:
    """Rounds every weight to the nearest value of its group's grid.

    Args:
      weight_OI: float32; the group divides I.
      grid: the grid.
      shrink_OG: as for `fit`.
    """
    outputs, inputs = weight_OI.shape
    grouped = weight_OI.reshape(outputs, -1, grid.group_of(inputs))
    scales, zeros = fit(grouped, grid, shrink_OG)
    codes = encode(grouped, scales[..., None], zeros[..., None], grid)
    return as_rounded(codes.reshape(weight_OI.shape), scales, zeros, grid)


def as_rounded(codes_OI: jax.Array, scales_OG: jax.Array, zeros_OG: jax.Array, grid: Grid) -> Rounded:
    """Brings float32 codes, scales and zeros to the form of `Rounded`."""
    outputs, groups = scales_OG.shape
    values = decode(codes_OI.reshape(outputs, groups, -1), scales_OG[..., None], zeros_OG[..., None])
    dtype = jnp.float8_e4m3fn if grid.codes == "float8_e4m3fn" else jnp.int8
    has_zeros = not grid.symmetric and grid.codes != "float8_e4m3fn"
    zeros = zeros_OG.astype(jnp.int8) if has_zeros else None
    return Rounded(codes_OI.astype(dtype), scales_OG, zeros, values.reshape(codes_OI.shape))


def to_codes(rounded: Rounded, grid: Grid) -> Codes:
    """Brings a matrix to the host, in the form from which all formats are written."""

    def integers(array: jax.Array) -> np.ndarray:
        return from_integers(np.ascontiguousarray(array), grid.bits)

    is_float8 = grid.codes == "float8_e4m3fn"
    return Codes(
        np.asarray(rounded.codes_OI) if is_float8 else integers(rounded.codes_OI),
        np.asarray(rounded.scales_OG).astype(np.dtype(jnp.dtype(grid.scales))),
        None if rounded.zeros_OG is None else integers(rounded.zeros_OG),
        order=None if rounded.order_I is None else np.asarray(rounded.order_I, np.int32),
    )


@jax.jit
def squared_error(weight_OI: jax.Array, values_OI: jax.Array, hessian_II: jax.Array) -> jax.Array:
    """The squared output error of each output, d H d^T for the change d of its weights; float32 [O]."""
    change = values_OI - weight_OI
    return (jnp.matmul(change, hessian_II, precision="highest") * change).sum(-1)


@jax.jit
def relative_error(weight_OI: jax.Array, values_OI: jax.Array, hessian_II: jax.Array) -> jax.Array:
    """Norm of the change of all outputs on the calibration rows, over the norm of the outputs; float32 scalar."""
    norm = squared_error(jnp.zeros_like(weight_OI), weight_OI, hessian_II).sum()
    error = squared_error(weight_OI, values_OI, hessian_II).sum()
    return jnp.sqrt(jnp.maximum(error, 0) / jnp.maximum(norm, 1e-30))
