"""Products with quantised weights on Hopper GPUs."""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.kernels.matmul.quantized_gpu_few import Operands, product, width
from qwen_jax.kernels.matmul.quantized_gpu_tiles import permuted


@jax.jit
def few_rows(x_MK, weight_NK, scales_NG, zeros_NG=None, mins_NG=None):
    M, K = x_MK.shape
    G = scales_NG.shape[1]
    sums = None
    if mins_NG is not None:
        sums = x_MK.astype(jnp.float32).reshape(M, G, K // G).sum(-1).T
        sums = jnp.pad(sums, ((0, 0), (0, width(M) - M)))
    x = permuted(x_MK, weight_NK.dtype)
    if M > 8:
        x = jnp.pad(x, ((0, width(M) - M), (0, 0)))
    return product(Operands(x, weight_NK, scales_NG, zeros_NG, mins_NG, sums), M).sum(0)
