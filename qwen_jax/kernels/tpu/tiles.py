"""What the kernels for TPUs share: products of tiles, and tiles of 8-bit numbers in a wider dtype."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.tpu import device

NT, NN, TN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))
"""Dimension numbers of a b^T, a b and a^T b."""


def product(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a b, or a b^T where `transposed`, accumulated in float32. Float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = NT if transposed else NN
    out: jax.Array = lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
    return out


def unit(dtype: jax.typing.DTypeLike) -> float:
    """The factor that makes the numbers of `widened` exactly those of a tile of this dtype."""
    return 16.0 if dtype == jnp.float8_e4m3fn and device.unpacks_e4m3b11() else 1.0


def widened(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A tile of numbers in a wider dtype, divided by `unit` of its own.

    v5 and v6 unpack float8_e4m3b11fnuz by one instruction. Its numbers are a sixteenth of those of float8_e4m3fn, but
    the code of -0 is NaN. The compiler converts float8_e4m3fn by five more instructions for each 32-bit register. Here
    -0 becomes 0 by four for each register of 8-bit numbers, and `unit` is left to the caller; NaN count as 480.

    Args:
      x: [rows, columns], of a float dtype, int8 or float8_e4m3fn; 8-bit numbers have a multiple of 16 rows.
      dtype: bfloat16 or float32.
    """
    if unit(x.dtype) == 1:
        return x.astype(dtype)
    low = jnp.int32(0x7F7F7F7F)
    words = pltpu.bitcast(x, jnp.int32)
    # The addition carries into the sign bit of each number other than 0 and -0.
    words &= ((words & low) + low) | low
    return pltpu.bitcast(words, jnp.float8_e4m3b11fnuz).astype(dtype)
