"""Products with quantised weights on Hopper GPUs: see `quantized_gpu_few` and `quantized_gpu_many`."""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul import quantized_gpu_few, quantized_gpu_many
from qwen_jax.kernels.matmul.quantized_gpu_tiles import CODES, Bundles, Operands, inputs_at_once, permuted
from qwen_jax.kernels.matmul.quantized_gpu_tiling import MAX_ROWS, width

SCALES = tuple(map(jnp.dtype, (jnp.float16, jnp.bfloat16, jnp.float32)))
"""Dtypes of scales that the kernels read."""


def needs(
    x: jax.ShapeDtypeStruct | jax.Array,
    weight: jax.ShapeDtypeStruct | jax.Array,
    scales: jax.ShapeDtypeStruct | jax.Array,
) -> dict[str, bool]:
    """What the kernels need, each a noun phrase and whether it is met; for `qwen_jax.kernels.select.unmet`.

    Args:
      x: [M, K].
      weight: codes [N, K].
      scales: [N, G].
    """
    (N, K), G = weight.shape, scales.shape[1]
    return {
        "bfloat16 rows": jnp.dtype(x.dtype) == jnp.bfloat16,
        "codes of int4, int8 or float8_e4m3fn": jnp.dtype(weight.dtype) in CODES,
        "scales of float16, bfloat16 or float32": jnp.dtype(scales.dtype) in SCALES,
        "outputs that are a multiple of 64": N > 0 and N % 64 == 0,
        "inputs that are a multiple of 64": K > 0 and K % 64 == 0,
        "groups of a multiple of 32 inputs, or one group": K % G == 0 and inputs_at_once(K, G) > 0,
    }


# Jitted so that a model of many layers lowers each shape once.
@jax.jit
def matmul(
    x_MK: jax.Array,
    weight_NK: jax.Array,
    scales_NG: jax.Array,
    zeros_NG: jax.Array | None = None,
    mins_NG: jax.Array | None = None,
) -> jax.Array:
    """Multiplies rows by a quantised matrix, x W^T. Runs on local arrays.

    Up to `MAX_ROWS` rows, the sums over each group are scaled in float32, which is more exact than a weight that is
    rounded to bfloat16. Beyond, the weights are dequantised in float32 and rounded to bfloat16, as "plain" does.

    Args:
      x_MK: bfloat16.
      weight_NK: codes; NaN of float8 count as 480.
      scales_NG: of the groups of inputs.
      zeros_NG: zero points in the dtype of the codes, which are integers then.
      mins_NG: float32, subtracted after scaling.

    Returns:
      float32 [M, N].

    Raises:
      InputError: arguments that `needs` rejects, or shapes that do not match.
    """
    (M, K), (N, inputs), G = x_MK.shape, weight_NK.shape, scales_NG.shape[1]
    fits = M > 0 and inputs == K and all(a is None or a.shape == (N, G) for a in (scales_NG, zeros_NG, mins_NG))
    fits = fits and (zeros_NG is None or (zeros_NG.dtype == weight_NK.dtype and weight_NK.dtype in CODES[:2]))
    fits = fits and (mins_NG is None or mins_NG.dtype == jnp.float32)
    if not fits or not all(needs(x_MK, weight_NK, scales_NG).values()):
        arrays = (x_MK, weight_NK, scales_NG, zeros_NG, mins_NG)
        got = ", ".join("none" if a is None else f"{a.dtype} {a.shape}" for a in arrays)
        raise InputError(
            "The kernels for quantised weights need bfloat16 x [M, K], codes [N, K] of int4, int8 or float8_e4m3fn, N "
            "and K multiples of 64, and scales, integer zeros in the dtype of the codes and float32 mins [N, G] of "
            f"groups of a multiple of 32 inputs, or one group; got {got}. Use implementation='plain'."
        )
    x = permuted(x_MK, weight_NK.dtype)
    if M > MAX_ROWS:
        x = jnp.pad(x, ((0, -M % 8), (0, 0)))
        return quantized_gpu_many.product(Operands(x, weight_NK, scales_NG, zeros_NG, mins_NG))[:M]
    sums = None if mins_NG is None else _sums(jnp.pad(x_MK, ((0, width(M) - M), (0, 0))), G)
    if M > 8:  # The copy engine pads fewer rows with zeros by itself, but needs a longer axis to be a multiple of 8.
        x = jnp.pad(x, ((0, width(M) - M), (0, 0)))
    return quantized_gpu_few.product(Operands(x, weight_NK, scales_NG, zeros_NG, mins_NG, sums), M).sum(axis=0)


@functools.partial(jax.jit, static_argnames=("rows", "least"))
def grouped_matmul(
    x_TCK: jax.Array,
    bundles: Bundles,
    weight_ENK: jax.Array,
    scales_ENG: jax.Array,
    zeros_ENG: jax.Array | None = None,
    mins_ENG: jax.Array | None = None,
    *,
    rows: int,
    least: int,
) -> jax.Array:
    """Multiplies bundles of a few rows by one of several quantised matrices each, x W^T. Runs on local arrays.

    Only codes and scales of matrices that have rows are read, once for each of their bundles. The numerics are those of
    `matmul` up to `MAX_ROWS` rows, for any number of bundles.

    Args:
      x_TCK: bfloat16, the rows of each bundle; C is `width(rows)`.
      bundles: which matrix each is multiplied by, and how many rows it has.
      weight_ENK, scales_ENG, zeros_ENG, mins_ENG: of each matrix, as for `matmul`.
      rows: about the most that a bundle has, 1 to `MAX_ROWS`.
      least: the fewest bundles that there can be, for the division of the work.

    Returns:
      float32 [T, C, N]. Rows that are not there are undefined, and may be NaN.

    Raises:
      InputError: arguments that `needs` rejects, or shapes that do not match.
    """
    (T, C, K), (E, N, inputs), G = x_TCK.shape, weight_ENK.shape, scales_ENG.shape[-1]
    arrays = (weight_ENK, scales_ENG, zeros_ENG, mins_ENG)
    fits = inputs == K and 1 <= rows <= MAX_ROWS and width(rows) == C and 1 <= least <= T
    fits = fits and all(a is None or a.shape == (E, N, G) for a in arrays[1:])
    fits = fits and (zeros_ENG is None or (zeros_ENG.dtype == weight_ENK.dtype and weight_ENK.dtype in CODES[:2]))
    fits = fits and (mins_ENG is None or mins_ENG.dtype == jnp.float32)
    fits = fits and [a.shape for a in bundles] == [(T,), (T,), (1,)] and all(a.dtype == jnp.int32 for a in bundles)
    flat = [None if a is None else a.reshape(E * N, -1) for a in arrays]
    if not fits or not all(needs(x_TCK[:, 0], weight_ENK[0], scales_ENG[0]).values()):
        got = ", ".join("none" if a is None else f"{a.dtype} {a.shape}" for a in (x_TCK, *arrays, *bundles))
        raise InputError(
            f"The kernel for groups of quantised weights needs bfloat16 x [T, {width(rows)}, K] for {rows} rows, codes "
            "[E, N, K] of int4, int8 or float8_e4m3fn, N and K multiples of 64, scales, integer zeros in the dtype of "
            "the codes and float32 mins [E, N, G] of groups of a multiple of 32 inputs, or one group, int32 matrices "
            f"and counts [T] and used [1], and 1 to T bundles at least; got {got} and {least}. Use "
            "implementation='plain'."
        )
    x = x_TCK.reshape(T * C, K)
    sums = None if mins_ENG is None else _sums(x, G)
    codes, scales, zeros, mins = flat
    operands = Operands(permuted(x, weight_ENK.dtype), codes, scales, zeros, mins, sums, bundles)
    return quantized_gpu_few.product(operands, rows, N, least).sum(axis=0).reshape(T, C, N)


def _sums(x_MK: jax.Array, groups: int) -> jax.Array:
    """The sums of rows over each group of inputs, float32 [G, M]."""
    return x_MK.astype(jnp.float32).reshape(x_MK.shape[0], groups, -1).sum(axis=2).T
