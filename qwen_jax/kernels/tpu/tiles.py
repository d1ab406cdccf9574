"""What the kernels for TPUs share: matrix products of tiles."""

import jax
import jax.numpy as jnp
from jax import lax

NT, NN, TN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))
"""Dimension numbers of a b^T, a b and a^T b."""


def product(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """a b, or a b^T where `transposed`, accumulated in float32. Float32 operands are not rounded to bfloat16."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = NT if transposed else NN
    out: jax.Array = lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
    return out
