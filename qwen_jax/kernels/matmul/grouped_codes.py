"""Grouped products of rounded rows with quantised matrices (W8A8), codes times codes, for MoE layers.

| implementation | where      | codes                                       | sizes of a matrix                        |
|----------------|------------|---------------------------------------------|------------------------------------------|
| gpu            | Hopper GPU | int8, float8                                | outputs: multiples of 64, inputs: of 128 |
| tpu            | TPU        | int8 from v5e to v6e, float8 on 7x; as many | multiples of 128                         |
| tiles          | anywhere   | int8, float8; "auto" selects it on CPUs     | any                                      |
| wide           | anywhere   | any; they are multiplied in the rows' dtype | any                                      |

"auto" selects the first that supports the call; see `qwen_jax.kernels.select`. With few rows the time is that of
reading the matrices, for which there are other kernels. "wide" stands for them (`quantized_grouped`), and for
`grouped` with dequantised matrices where there are many rows. The kernels are those of `grouped`, with other operands.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import platform
from qwen_jax.kernels.matmul.grouped import module_of
from qwen_jax.kernels.matmul.quantized import codes_needs
from qwen_jax.kernels.matmul.quantized_grouped import MAX_ROWS, QuantizedMatrices
from qwen_jax.kernels.select import Candidate, select, unmet
from qwen_jax.kernels.without_gradient import without_gradient


def select_grouped_codes(
    implementation: str, rows: int, dtype: jax.typing.DTypeLike, matrices: QuantizedMatrices
) -> str:
    """Returns the name of the implementation that runs; see `select`.

    Args:
      implementation: "auto" or a name.
      rows: of the product.
      dtype: of the rows before they were rounded, and of the result.
      matrices: only their shapes and dtypes are used.

    Raises:
      InputError: the implementation asked for does not support the call.
    """
    (N, K), codes, on = matrices.shape, matrices.weight.dtype, platform.platform()
    scaled = {
        "int8 or float8 weights": codes in (jnp.int8, jnp.float8_e4m3fn),
        "one scale for each output": matrices.scales.shape[-1] == 1,
        "no zero points or minima": matrices.zeros is None and matrices.mins is None,
        "inputs in their own order (without desc_act)": matrices.order is None,
    }
    narrow = {"bfloat16 rows": jnp.dtype(dtype) == jnp.bfloat16}
    tpu = {"a TPU": on == "tpu", "sizes that are multiples of 128": N % 128 == 0 and K % 128 == 0}
    if on == "tpu":
        from qwen_jax.kernels.tpu.device import multiplies_codes

        tpu[f"a TPU that multiplies {codes}"] = multiplies_codes(codes)
    many = rows > MAX_ROWS
    candidates = [
        Candidate("gpu", unmet(codes_needs(N, K) | narrow | scaled), automatic=many),
        Candidate("tpu", unmet(tpu | narrow | scaled), automatic=many),
        Candidate("tiles", unmet(scaled), automatic=on == "cpu"),
        Candidate("wide"),
    ]
    what = f"{rows} rows of {jnp.dtype(dtype)}, {len(matrices)} matrices {[N, K]} of {codes}"
    return select(candidates, implementation, "grouped product of rounded rows", what)


def grouped_code_matmul(
    codes_MK: jax.Array,
    scales_M1: jax.Array,
    matrices: QuantizedMatrices,
    sizes_G: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    implementation: str,
    expected: int | None = None,
    fill: bool = True,
) -> jax.Array:
    """Each row of codes times the transposed codes of its group's matrix, scaled. Runs on local arrays; no gradient.

    Args:
      codes_MK: rows sorted by group, in any dtype that holds codes of that of the matrices exactly; see
        `qwen_jax.kernels.matmul.quantized.rounded_rows`.
      scales_M1: float32, of the rows.
      matrices: of the groups, with one scale for each output.
      sizes_G: int32, the number of rows of each group; may be 0. Their sum is at most M.
      dtype: of the result; bfloat16, or for "tiles" any.
      implementation: from `select_grouped_codes`, and not "wide".
      expected, fill: as for `qwen_jax.kernels.matmul.grouped.grouped_matmul`.

    Returns:
      [M, N]. Products of int8 are summed in int32, so exactly, and those of float8 in float32 (on Hopper GPUs in 14
      bits). Sums are scaled in float32 and rounded once.
    """
    module, (N, K) = module_of(implementation), matrices.shape
    options: dict[str, Any] = {}
    if implementation == "tpu":
        options = {"expected": expected, "fill": fill}
    if implementation == "tiles":
        options = {"dtype": dtype}

    def run(x: jax.Array, w: jax.Array, sizes: jax.Array, *scales: jax.Array) -> jax.Array:
        # Converted here: outside, to int8, it would be a gradient of zero.
        y: jax.Array = module.product(x.astype(w.dtype), w, sizes, scales=scales, **options)
        return y

    scales_GN = matrices.scales.reshape(-1, N).astype(jnp.float32)
    arguments = codes_MK, matrices.weight.reshape(-1, N, K), sizes_G, scales_M1, scales_GN
    message = f"Grouped products of codes by {implementation} have no gradient. Use implementation='wide'."
    with jax.named_scope("grouped_codes"):
        return without_gradient(run, arguments, message)
