"""Products of a few rows with a weight matrix, as in decoding: by a kernel where it is faster than XLA's product."""

import math

import jax
import jax.numpy as jnp

from qwen_jax import platform
from qwen_jax.kernels.select import Candidate, select, unmet

# From experiments/kernels/skinny_matmul.md: for fewer rows, XLA is as fast for all but large matrices.
_MANY_ROWS, _MIN_BYTES_FEWER_ROWS, _MIN_BYTES = 16, 20 << 20, 1 << 20
_MAX_ROWS = 128


def supports(rows: int, tokens_per_row: int, dtype: jax.typing.DTypeLike, outputs: int, inputs: int) -> bool:
    """Whether the kernel computes a product: one token per row, bfloat16, a Hopper GPU, a matrix that is large enough.

    Logs the outcome once on a Hopper GPU. Everywhere else, and for prefill, the product is an einsum.

    Args:
      rows: on one device.
      tokens_per_row: 1 for decoding.
      dtype: of rows and matrix.
      outputs, inputs: size of one device's part of the matrix.
    """
    if tokens_per_row != 1 or not platform.on_hopper():
        return False
    min_bytes = _MIN_BYTES_FEWER_ROWS if rows < _MANY_ROWS else _MIN_BYTES
    needs = {
        "bfloat16": jnp.dtype(dtype) == jnp.bfloat16,
        f"at most {_MAX_ROWS} rows": rows <= _MAX_ROWS,
        "outputs that are a multiple of 8": outputs % 8 == 0,
        "inputs that are a multiple of 64, at least 128": inputs % 64 == 0 and inputs >= 128,
        f"a matrix of {min_bytes >> 20} MiB": 2 * outputs * inputs >= min_bytes,
    }
    kernel, plain = Candidate("few_rows", unmet(needs)), Candidate("einsum")
    arguments = f"{rows} rows, matrix [{outputs}, {inputs}], {jnp.dtype(dtype)}"
    return select([kernel, plain], "auto", "product of few rows", arguments) == kernel.name


def einsum(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """An einsum of one token per row with a weight, by the kernel for few rows. Runs on local arrays.

    Args:
      subscripts: such as "BTD,FD->BTF"; the outputs of the weight come first, then its inputs, as in x.
      x: bfloat16 [B, 1, inputs...].
      w: bfloat16 [outputs..., inputs...].

    Returns:
      float32 [B, 1, outputs...].
    """
    from qwen_jax.kernels.matmul.few_rows_gpu import skinny_matmul

    out = subscripts.split("->")[1]
    kept = w.shape[: len(out) - 2]
    y = skinny_matmul(x.reshape(x.shape[0], -1), w.reshape(math.prod(kept), -1)).sum(axis=0)
    return y.reshape(x.shape[0], 1, *kept)


def swiglu(x_B1D: jax.Array, gate_up_2FD: jax.Array) -> jax.Array:
    """silu(gate) * up of one token per row, [B, 1, F], by one kernel. Runs on local arrays.

    Args:
      x_B1D: bfloat16 rows.
      gate_up_2FD: bfloat16, the gate and the up matrix.
    """
    from qwen_jax.kernels.matmul.few_rows_gpu import skinny_swiglu

    out: jax.Array = skinny_swiglu(x_B1D[:, 0], gate_up_2FD)[:, None]
    return out
