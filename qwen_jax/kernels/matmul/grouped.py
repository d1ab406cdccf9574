"""Grouped matrix products for MoE layers: each row times the matrix of its group.

Rows are sorted by group. The cost is that of the rows that exist, whatever the size of the array that holds them, and
only matrices of groups with rows are read.

| implementation | where      | dtype    | sizes of a matrix |
|----------------|------------|----------|-------------------|
| gpu            | Hopper GPU | bfloat16 | multiples of 64   |
| tpu            | TPU        | bfloat16 | multiples of 128  |
| tiles          | anywhere   | any      | any               |

"auto" selects the first that supports the call (see `qwen_jax.kernels.select`) and warns if that is `tiles` on an
accelerator: a loop over tiles of rows, each multiplied by the matrix of its group.
"""

import functools
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qwen_jax import platform
from qwen_jax.errors import InputError
from qwen_jax.kernels.select import Candidate, select, unmet

Implementation = Literal["auto", "gpu", "tpu", "tiles"]


def select_grouped(implementation: str, dtype: jax.typing.DTypeLike, outputs: int, inputs: int) -> str:
    """Returns the name of the implementation that runs; see `select`.

    Args:
      implementation: "auto" or a name.
      dtype: of rows and matrices.
      outputs, inputs: size of a matrix.

    Raises:
      InputError: the implementation asked for does not support the call.
    """
    dtype, on = jnp.dtype(dtype), platform.platform()
    needs = {
        "gpu": {
            "a Hopper GPU": platform.on_hopper(),
            "bfloat16": dtype == jnp.bfloat16,
            "sizes that are multiples of 64": outputs % 64 == 0 and inputs % 64 == 0,
        },
        "tpu": {
            "a TPU": on == "tpu",
            "bfloat16": dtype == jnp.bfloat16,
            "sizes that are multiples of 128": outputs % 128 == 0 and inputs % 128 == 0,
        },
        "tiles": {},
    }
    candidates = [Candidate(name, unmet(own), slow=name == "tiles") for name, own in needs.items()]
    return select(candidates, implementation, "grouped product", f"matrices [{outputs}, {inputs}], {dtype}")


def grouped_matmul(
    x_MK: jax.Array,
    w_GNK: jax.Array,
    sizes_G: jax.Array,
    *,
    expected: int | None = None,
    fill: bool = True,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Each row times the transposed matrix of its group.

    Args:
      x_MK: rows sorted by group: the first sizes[0] belong to group 0, and so on.
      w_GNK: matrices, [outputs, inputs], in the dtype of x.
      sizes_G: int32, the number of rows of each group; may be 0. Their sum is at most M. They have no gradient.
      expected: about how many rows there will be, for cost estimates; by default M.
      fill: write zeros into the rows after the last group, in the result and in the gradient with respect to x. Without
        it these rows are undefined and may be NaN, and on TPUs they cost nothing.
      implementation: see the table above.

    Returns:
      [M, N] in the dtype of x. It does not depend on the rows of x after the last group. The gradient with respect to
      a matrix is summed in float32 and returned in the dtype of the matrix.

    Raises:
      InputError: shapes or dtypes that do not match, or an implementation that does not support the call.
    """
    if x_MK.ndim != 2 or w_GNK.ndim != 3 or x_MK.shape[1] != w_GNK.shape[2] or sizes_G.shape != w_GNK.shape[:1]:
        raise InputError(
            f"Grouped products need rows [M, K], matrices [G, N, K] and sizes [G]; got {x_MK.shape}, {w_GNK.shape} and "
            f"{sizes_G.shape}."
        )
    if x_MK.dtype != w_GNK.dtype or sizes_G.dtype != jnp.int32:
        raise InputError(
            f"Grouped products need rows and matrices of one dtype, and int32 sizes; got {x_MK.dtype}, {w_GNK.dtype} "
            f"and {sizes_G.dtype}."
        )
    chosen = select_grouped(implementation, x_MK.dtype, *w_GNK.shape[1:])
    return _grouped(chosen, x_MK.shape[0] if expected is None else expected, fill, x_MK, w_GNK, sizes_G)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped(implementation: str, expected: int, fill: bool, *args: jax.Array) -> jax.Array:
    # Only the TPU kernels state their cost, and can leave rows undefined.
    options = {"expected": expected, "fill": fill} if implementation == "tpu" else {}
    result: jax.Array = module_of(implementation).product(*args, **options)
    return result


def _forward(implementation: str, expected: int, fill: bool, *args: jax.Array) -> tuple[jax.Array, Any]:
    return _grouped(implementation, expected, fill, *args), args


def _backward(
    implementation: str, expected: int, fill: bool, residuals: tuple[jax.Array, jax.Array, jax.Array], dout: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = residuals
    module, options = module_of(implementation), {"expected": expected} if implementation == "tpu" else {}
    dw = module.weights_gradient(dout, x, sizes, dtype=w.dtype, **options)
    if implementation == "tpu":
        options["fill"] = fill
    return module.product(dout, w, sizes, transposed=True, **options), dw, None


_grouped.defvjp(_forward, _backward)


def module_of(implementation: str) -> ModuleType:
    """The module with `product` and `weights_gradient` of an implementation."""
    if implementation == "gpu":
        from qwen_jax.kernels.matmul import grouped_gpu

        return grouped_gpu
    if implementation == "tpu":
        from qwen_jax.kernels.matmul import grouped_tpu

        return grouped_tpu
    from qwen_jax.kernels.matmul import grouped_tiles

    return grouped_tiles
