"""Products of a few rows with a weight matrix: when our kernel is used, and how. It runs on local arrays."""

import math

import jax
import jax.numpy as jnp

from qwen_jax.platform import on_hopper

# From experiments/kernels/skinny_matmul.md: XLA's own products are as good for a single row of a small matrix.
_MIN_BYTES_ONE_ROW, _MIN_BYTES = 20 << 20, 1 << 20


def supports(rows: int, length: int, dtype: jnp.dtype, outputs: int, inputs: int) -> bool:
    """Whether the kernel computes a product: one token a row, bfloat16, a Hopper GPU, a matrix that is large enough.

    Args:
      rows: of the batch, on one device.
      length: tokens in a row.
      dtype: of the activations.
      outputs, inputs: size of one device's part of the matrix.
    """
    return (
        length == 1
        and dtype == jnp.bfloat16
        and rows <= 128
        and outputs % 8 == 0
        and inputs % 64 == 0
        and inputs >= 128
        and 2 * outputs * inputs >= (_MIN_BYTES_ONE_ROW if rows < 16 else _MIN_BYTES)
        and on_hopper()
    )


def einsum(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """An einsum of one token a row with a whole weight.

    Args:
      subscripts: such as "BTD,FD->BTF".
      x: [B, 1, inputs...].
      w: [outputs..., inputs...].

    Returns:
      float32 [B, 1, outputs...].
    """
    from qwen_jax.kernels.matmul.few_rows_gpu import skinny_matmul

    outputs = w.shape[: len(subscripts.split("->")[1]) - 2]
    y = skinny_matmul(x.reshape(x.shape[0], -1), w.reshape(math.prod(outputs), -1)).sum(axis=0)
    return y.reshape(x.shape[0], 1, *outputs)


def swiglu(x_B1D: jax.Array, gate_up_2FD: jax.Array) -> jax.Array:
    """silu(gate) * up of one token a row, [B, 1, F], by one kernel."""
    from qwen_jax.kernels.matmul.few_rows_gpu import skinny_swiglu

    return skinny_swiglu(x_B1D[:, 0], gate_up_2FD)[:, None]
