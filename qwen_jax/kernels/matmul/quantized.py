"""Products with quantised weights; see `qwen_jax.quantization.Scheme` for what the arrays stand for.

| implementation | where      | what                                                                         |
|----------------|------------|------------------------------------------------------------------------------|
| codes          | Hopper GPU | as w8a8, by the kernel of `grouped_codes`; many bfloat16 rows                |
| w8a8           | anywhere   | rounds the rows; int8 or float8 weights with one scale for each output       |
| gpu            | Hopper GPU | bfloat16 rows; outputs and inputs are multiples of 64, groups of 32          |
| tpu            | TPU        | bfloat16 rows; outputs, inputs: multiples of 16 ("auto": inputs of 128)     |
| plain          | anywhere   | dequantises in float32 and rounds once to the dtype of x, before the product |

"auto" selects the first that supports the call; see `qwen_jax.kernels.select`. It selects codes and w8a8 only where
rows are to be rounded (`qwen_jax.quantization.Quantization`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import platform
from qwen_jax.kernels.select import Candidate, select, unmet
from qwen_jax.kernels.without_gradient import without_gradient

Abstract = jax.Array | jax.ShapeDtypeStruct

# With more rows, writing and reading the dequantised matrix takes a small part of the time of the product, for which
# XLA's kernels are the best. An H200 is faster that way from 1,300 (int8) to 3,000 (int4) rows on, by measurements at 1
# and 8,192 rows.
_MAX_GPU_ROWS = 1024
_NO_GRADIENT = "Quantised products by {} have no gradient. Use implementation='plain'."


def dequantize(
    weight: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    mins: jax.Array | None = None,
) -> jax.Array:
    """The values of quantised weights.

    Args:
      weight: codes [..., K].
      scales: [..., G] of the groups of K / G codes.
      zeros: zero points [..., G].
      mins: float32 [..., G], subtracted after scaling.

    Returns:
      float32 [..., K].
    """
    grouped = weight.astype(jnp.float32).reshape(*scales.shape, -1)
    if zeros is not None:
        grouped -= zeros.astype(jnp.float32)[..., None]
    values = grouped * scales.astype(jnp.float32)[..., None]
    if mins is not None:
        values -= mins[..., None]
    return values.reshape(weight.shape)


def codes_needs(outputs: int, inputs: int) -> dict[str, bool]:
    """What multiplying codes by codes on Hopper GPUs needs: the device, and sizes of a matrix; for `unmet`."""
    return {
        "a Hopper GPU": platform.on_hopper(),
        "outputs that are multiples of 64, inputs of 128": outputs % 64 == 0 and inputs % 128 == 0,
    }


def select_quantized(
    implementation: str,
    x: Abstract,
    weight: Abstract,
    scales: Abstract,
    offset: bool,
    rounded: bool = False,
    sharded: bool = False,
) -> str:
    """Returns the name of the implementation that runs; see `select`.

    Args:
      implementation: "auto" or a name.
      x: activations [M, K]; of this and the others, only shape and dtype are used.
      weight: codes [N, K].
      scales: [N, G].
      offset: whether there are zero points or minima.
      rounded: whether "auto" may round the rows.
      sharded: whether the inputs are those of a shard, so that results are added over a mesh axis.

    Raises:
      InputError: the implementation asked for does not support the call.
    """
    needs = {
        "int8 or float8 weights": weight.dtype in (jnp.int8, jnp.float8_e4m3fn),
        "one scale for each output": scales.shape[1] == 1,
        "no zero points or minima": not offset,
    }
    w8a8 = Candidate("w8a8", unmet(needs), automatic=rounded)
    needs |= {
        "bfloat16 rows": jnp.dtype(x.dtype) == jnp.bfloat16,
        "inputs that are not sharded": not sharded,
        **codes_needs(*weight.shape),
    }
    codes = Candidate("codes", unmet(needs), automatic=rounded and x.shape[0] > _MAX_GPU_ROWS)
    needs = {"a Hopper GPU": platform.on_hopper()}
    if platform.on_hopper():
        from qwen_jax.kernels.matmul import quantized_gpu

        needs |= quantized_gpu.needs(x, weight, scales)
    gpu = Candidate("gpu", unmet(needs), automatic=x.shape[0] <= _MAX_GPU_ROWS)
    needs = {"a TPU": platform.platform() == "tpu"}
    if platform.platform() == "tpu":
        from qwen_jax.kernels.matmul import quantized_tpu

        needs |= quantized_tpu.needs(x, weight, scales)
    # XLA may hold other matrices with outputs as lanes, and would copy them for the kernel.
    tpu = Candidate("tpu", unmet(needs), automatic=weight.shape[1] % 128 == 0)
    candidates = [codes, w8a8, gpu, tpu, Candidate("plain")]
    what = f"{x.shape[0]} rows, matrix {list(weight.shape)} of {weight.dtype}, {scales.shape[1]} groups"
    what += " with offsets" if offset else ""
    return select(candidates, implementation, "quantised product", what)


def quantized_matmul(
    x_MK: jax.Array,
    weight_NK: jax.Array,
    scales_NG: jax.Array,
    zeros_NG: jax.Array | None = None,
    mins_NG: jax.Array | None = None,
    *,
    implementation: str = "auto",
    axis: str | None = None,
) -> jax.Array:
    """The product of rows with a quantised matrix, x W^T. Runs on local arrays.

    Args:
      x_MK: rows, in the order of the inputs of the matrix.
      weight_NK: codes.
      scales_NG, zeros_NG, mins_NG: as for `dequantize`.
      implementation: see the table above; "auto" rounds no rows. Only "plain" and "w8a8" have a gradient, with respect
        to x.
      axis: of the mesh, over which K is sharded; None if it is not.

    Returns:
      float32 [M, N]. "plain" rounds the weight to the dtype of x, as the kernels do for more than 64 rows; for fewer,
      they do not round it.
    """
    offset = zeros_NG is not None or mins_NG is not None
    chosen = select_quantized(implementation, x_MK, weight_NK, scales_NG, offset, sharded=axis is not None)
    if chosen == "codes":
        return without_gradient(_by_codes, (x_MK, weight_NK, scales_NG), _NO_GRADIENT.format(chosen))
    if chosen == "w8a8":
        return row_scaled_matmul(x_MK, weight_NK, scales_NG, axis)
    if chosen == "plain":
        return _plain(x_MK, weight_NK, scales_NG, zeros_NG, mins_NG)
    if chosen == "gpu":
        from qwen_jax.kernels.matmul.quantized_gpu import matmul
    else:
        from qwen_jax.kernels.matmul.quantized_tpu import matmul
    arguments = x_MK, weight_NK, scales_NG, zeros_NG, mins_NG
    return without_gradient(matmul, arguments, _NO_GRADIENT.format(chosen))


def _by_codes(x_MK: jax.Array, weight_NK: jax.Array, scales_N1: jax.Array) -> jax.Array:
    """`row_scaled_matmul`, rounded to bfloat16. XLA would write sums in 32 bits, and scale them in another kernel."""
    from qwen_jax.kernels.matmul.grouped_gpu import product

    codes, x_scales_M1 = quantize_rows(x_MK, weight_NK.dtype)
    sizes, scales = jnp.full(1, len(x_MK), jnp.int32), (x_scales_M1, scales_N1.reshape(1, -1).astype(jnp.float32))
    return product(codes, weight_NK[None], sizes, scales=scales).astype(jnp.float32)


@jax.checkpoint
def _plain(
    x_MK: jax.Array,
    weight_NK: jax.Array,
    scales_NG: jax.Array,
    zeros_NG: jax.Array | None,
    mins_NG: jax.Array | None,
) -> jax.Array:
    # The backward pass dequantises again, so that the values of all layers never exist together.
    w_NK = dequantize(weight_NK, scales_NG, zeros_NG, mins_NG).astype(x_MK.dtype)
    return jnp.einsum("MK,NK->MN", x_MK, w_NK, preferred_element_type=jnp.float32)


def quantize_rows(x: jax.Array, dtype: jax.typing.DTypeLike, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to a narrow dtype, with one scale for each row: its largest magnitude becomes the largest code.

    Args:
      x: rows [..., K].
      dtype: int8 or float8_e4m3fn.
      axis: of the mesh, over which K is sharded; None if it is not.

    Returns:
      Codes [..., K] and float32 scales [..., 1]; a row of zeros has the scale 1, one with a
      number that is not finite has such a scale.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    if axis is not None:
        largest = lax.pmax(largest, axis)
    integer = jnp.issubdtype(dtype, jnp.integer)
    top = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    # NaN and infinity stay in the scale, and so in the product.
    scales = largest / top
    scales = jnp.where(scales == 0, 1.0, scales)
    # One division a row: TPUs take several instructions for each.
    x *= 1 / scales
    codes = jnp.round(x) if integer else jnp.clip(x, -top, top)
    return codes.astype(dtype), scales


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def row_scaled_matmul(
    x_MK: jax.Array, weight_NK: jax.Array, scales_N1: jax.Array, axis: str | None = None
) -> jax.Array:
    """The product of rows and a matrix that are both in int8, or both in float8: the rows are rounded here.

    The gradient with respect to x is that of the product without rounding (straight-through estimator, Bengio et al.
    2013, arXiv:1308.3432); x alone has one.

    Args:
      x_MK: rows, bfloat16 or float32.
      weight_NK: int8 or float8_e4m3fn.
      scales_N1: of the outputs.
      axis: as for `quantize_rows`.

    Returns:
      float32 [M, N].
    """
    codes, x_scales_M1 = quantize_rows(x_MK, weight_NK.dtype, axis)
    wide = jnp.int32 if jnp.issubdtype(weight_NK.dtype, jnp.integer) else jnp.float32
    y = jnp.einsum("MK,NK->MN", codes, weight_NK, preferred_element_type=wide).astype(jnp.float32)
    return y * x_scales_M1 * scales_N1[:, 0].astype(jnp.float32)


@row_scaled_matmul.defjvp
def _row_scaled_jvp(
    axis: str | None, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    x_MK, weight_NK, scales_N1 = primals
    tangent_MN = jax.jvp(lambda x: _plain(x, weight_NK, scales_N1, None, None), (x_MK,), (tangents[0],))[1]
    return row_scaled_matmul(x_MK, weight_NK, scales_N1, axis), tangent_MN


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def rounded_rows(x: jax.Array, dtype: jax.typing.DTypeLike, axis: str | None = None) -> tuple[jax.Array, jax.Array]:
    """`quantize_rows` with codes in the dtype of x, which holds them exactly, for products in that dtype.

    The gradient of codes times scales is that of x (straight-through estimator); scales have none.

    Args:
      x, dtype, axis: as for `quantize_rows`; x is bfloat16 or float32.
    """
    codes, scales = quantize_rows(x, dtype, axis)
    return codes.astype(x.dtype), scales


@rounded_rows.defjvp
def _rounded_rows_jvp(
    dtype: jax.typing.DTypeLike, axis: str | None, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    codes, scales = rounded_rows(primals[0], dtype, axis)
    return (codes, scales), ((tangents[0] / scales).astype(codes.dtype), jnp.zeros_like(scales))
