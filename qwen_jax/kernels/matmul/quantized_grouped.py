"""Products of few rows with the quantised matrices of their groups, as in decoding with a mixture of experts.

Only codes of matrices that have rows are read, and no two matrices are dequantised at the same time. For many rows,
dequantise all matrices and use `qwen_jax.kernels.matmul.grouped`.

| implementation | where      | what                                                                                |
|----------------|------------|-------------------------------------------------------------------------------------|
| gpu            | Hopper GPU | bfloat16 rows; outputs and inputs are multiples of 64, groups of 32, no desc_act    |
| tpu            | TPU        | bfloat16 rows; outputs, inputs: multiples of 16; groups of at least 32, no desc_act |
| plain          | anywhere   | dequantises a matrix in float32 and rounds it once to the dtype of the rows         |

"auto" selects the first that supports the call; see `qwen_jax.kernels.select`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import platform
from qwen_jax.kernels.matmul import quantized
from qwen_jax.kernels.select import Candidate, select, unmet
from qwen_jax.kernels.without_gradient import without_gradient

MAX_ROWS = 1024
"""Rows up to which the matrices are not dequantised together. An estimate that no device has confirmed yet."""
_BUNDLE = 64
# Rows of a bundle relative to the mean rows of a group: a larger bundle has idle columns, a smaller one reads the codes
# of some groups twice.
_OF_MEAN = 1.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrices:
    """The quantised matrices of G groups on one device; see `qwen_jax.quantization.Scheme`.

    Attributes:
      weight: codes [G, outputs..., K].
      scales: [G, outputs..., groups of inputs].
      zeros, mins: like the scales, or None.
      order: [G, K], or [G, outputs..., K] without the last axis of outputs, or None.
    """

    weight: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    mins: jax.Array | None = None
    order: jax.Array | None = None

    def __len__(self) -> int:
        return int(self.weight.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of a matrix."""
        return math.prod(self.weight.shape[1:-1]), self.weight.shape[-1]

    def values(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """All matrices [G, N, K], dequantised in float32 and rounded to a dtype."""
        w = quantized.dequantize(self.weight, self.scales, self.zeros, self.mins)
        if self.order is not None:
            places = jnp.argsort(self.order, axis=-1)
            w = jnp.take_along_axis(w, places if places.ndim == w.ndim else places[..., None, :], axis=-1)
        return w.reshape(len(self), *self.shape).astype(dtype)

    def value(self, group: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The matrix [N, K] of one group."""
        one: QuantizedMatrices = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, group, 1), self)
        return one.values(dtype)[0]


class _Bundles(NamedTuple):
    """Rows in T bundles of at most C rows of a group.

    Attributes:
      group_T: int32, the group of each bundle; of bundles that are not used, any.
      count_T: int32, its rows.
      used: int32, the number of bundles; those that are used come first.
      rows_TC: int32, the rows of each bundle; what is beyond `count_T` is any row.
      place_M: int32, the place of each row among those of all bundles; of rows of no group, any.
    """

    group_T: jax.Array
    count_T: jax.Array
    used: jax.Array
    rows_TC: jax.Array
    place_M: jax.Array


def _bundles(sizes_G: jax.Array, M: int, size: int) -> _Bundles:
    """Bundles of at most `size` of M rows that are sorted by group."""
    G = sizes_G.shape[0]
    T = min(M, M // size + G)
    count_G = -(-sizes_G // size)
    last_row_G, last_G = jnp.cumsum(sizes_G), jnp.cumsum(count_G)
    first_row_G, first_G = last_row_G - sizes_G, last_G - count_G
    # The bundles of a group follow each other.
    t = jnp.arange(T, dtype=jnp.int32)
    group_T = jnp.minimum((t[:, None] >= last_G).sum(1, dtype=jnp.int32), G - 1)
    within_T = (t - first_G[group_T]) * size
    count_T = jnp.clip(sizes_G[group_T] - within_T, 0, size)
    rows_TC = jnp.clip((first_row_G[group_T] + within_T)[:, None] + jnp.arange(size), 0, M - 1)
    # Rows find their group, and the bundle within it.
    m = jnp.arange(M, dtype=jnp.int32)
    group_M = jnp.minimum((m[:, None] >= last_row_G).sum(1, dtype=jnp.int32), G - 1)
    place_M = jnp.clip(first_G[group_M] * size + m - first_row_G[group_M], 0, T * size - 1)
    return _Bundles(group_T, count_T.astype(jnp.int32), last_G[-1].astype(jnp.int32), rows_TC, place_M)


def select_grouped_quantized(
    implementation: str, rows: int, dtype: jax.typing.DTypeLike, matrices: QuantizedMatrices
) -> str:
    """Returns the name of the implementation that runs; see `select`.

    Args:
      implementation: "auto" or a name.
      rows: of the product.
      dtype: of the rows.
      matrices: only their shapes and dtypes are used.

    Raises:
      InputError: the implementation asked for does not support the call.
    """
    (N, K), G = matrices.shape, matrices.scales.shape[-1]
    codes, scales = (jax.ShapeDtypeStruct((N, n), x.dtype) for n, x in ((K, matrices.weight), (G, matrices.scales)))
    few = {
        f"at most {MAX_ROWS} rows": 0 < rows <= MAX_ROWS,
        "inputs in their own order (without desc_act)": matrices.order is None,
    }
    needs = {"a Hopper GPU": platform.on_hopper()}
    if platform.on_hopper():
        from qwen_jax.kernels.matmul import quantized_gpu

        needs |= quantized_gpu.needs(jax.ShapeDtypeStruct((rows, K), dtype), codes, scales) | few
    gpu = Candidate("gpu", unmet(needs))
    needs = {"a TPU": platform.platform() == "tpu"}
    if platform.platform() == "tpu":
        from qwen_jax.kernels.matmul import quantized_tpu, quantized_tpu_grouped

        needs |= quantized_tpu.needs(jax.ShapeDtypeStruct((rows, K), dtype), codes, scales)
        needs["groups of at least 32 inputs"] = quantized_tpu_grouped.supports_bundles(K, G)
        needs |= few
    # As for products with one matrix, XLA would copy others.
    candidates = [gpu, Candidate("tpu", unmet(needs), automatic=K % 128 == 0), Candidate("plain")]
    what = f"{rows} rows, {len(matrices)} matrices {[N, K]} of {matrices.weight.dtype}, {G} groups of inputs"
    return select(candidates, implementation, "grouped quantised product", what)


def grouped_quantized_matmul(
    x_MK: jax.Array, matrices: QuantizedMatrices, sizes_G: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """Each row times the transposed matrix of its group. Runs on local arrays.

    Args:
      x_MK: rows sorted by group: the first sizes[0] belong to group 0, and so on.
      matrices: of the groups.
      sizes_G: int32, the number of rows of each group; may be 0. Their sum is at most M.
      implementation: see the table above. Only "plain" has a gradient, with respect to x.

    Returns:
      [M, N] in the dtype of x; zeros for rows after the last group. "plain" rounds the matrices to the dtype of x, and
      the kernels do not round them.

    Raises:
      InputError: the implementation asked for does not support the call.
    """
    M, G = x_MK.shape[0], len(matrices)
    chosen = select_grouped_quantized(implementation, M, x_MK.dtype, matrices)
    rows = min(_BUNDLE, M) if chosen == "plain" else min(_BUNDLE, math.ceil(_OF_MEAN * M / G))
    size = _width(chosen, rows)
    bundles = _bundles(sizes_G, M, size)
    x_TCK = x_MK[bundles.rows_TC]
    run = _plain if chosen == "plain" else functools.partial(_by_kernel, chosen)
    y_TCN = run(x_TCK, matrices, bundles, rows, -(-M // size))
    y_MN = y_TCN.reshape(-1, y_TCN.shape[-1])[bundles.place_M].astype(x_MK.dtype)
    there_M = jnp.arange(M) < sizes_G.sum()
    return jnp.where(there_M[:, None], y_MN, 0)


def selected_quantized_matmul(
    x_MK: jax.Array, matrices: QuantizedMatrices, group_M: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """Each row times the transposed matrix that is selected for it, row by row. For so few rows that sorting is slower.

    Args:
      x_MK: rows.
      matrices: of the groups.
      group_M: int32, the group of each row.
      implementation: as for `grouped_quantized_matmul`.

    Returns:
      [M, N] in the dtype of x.

    Raises:
      InputError: the implementation asked for does not support the call.
    """
    M = x_MK.shape[0]
    chosen = select_grouped_quantized(implementation, M, x_MK.dtype, matrices)
    t = jnp.arange(M, dtype=jnp.int32)
    bundles = _Bundles(group_M.astype(jnp.int32), jnp.ones_like(t), jnp.int32(M), t[:, None], t)
    if chosen == "plain":
        return _plain(x_MK[:, None], matrices, bundles, 1, M)[:, 0]
    x_TCK = jnp.pad(x_MK[:, None], ((0, 0), (0, _width(chosen, 1) - 1), (0, 0)))
    return _by_kernel(chosen, x_TCK, matrices, bundles, 1, M)[:, 0].astype(x_MK.dtype)


def _width(chosen: str, rows: int) -> int:
    """The rows of a bundle in the arrays of an implementation."""
    if chosen == "plain":
        return rows
    if chosen == "gpu":
        from qwen_jax.kernels.matmul.quantized_gpu import width

        return width(rows)
    from qwen_jax.kernels.matmul.quantized_tpu_grouped import bundle_rows

    return bundle_rows(rows)


def _by_kernel(
    chosen: str, x_TCK: jax.Array, matrices: QuantizedMatrices, bundles: _Bundles, rows: int, least: int
) -> jax.Array:
    """The product of each bundle, float32 [T, C, N]; undefined for rows that are not there."""
    G, N = len(matrices), matrices.shape[0]
    arrays = (matrices.weight, matrices.scales, matrices.zeros, matrices.mins)
    flat = [None if a is None else a.reshape(G, N, -1) for a in arrays]
    message = f"Grouped quantised products by {chosen} have no gradient. Use implementation='plain'."
    if chosen == "tpu":
        from qwen_jax.kernels.matmul import quantized_tpu_grouped

        arguments = x_TCK, bundles.group_T, bundles.used, *flat
        return without_gradient(quantized_tpu_grouped.grouped_matmul, arguments, message)
    from qwen_jax.kernels.matmul import quantized_gpu

    which = quantized_gpu.Bundles(bundles.group_T, bundles.count_T, bundles.used[None])

    def run(x: jax.Array, which: quantized_gpu.Bundles, *arrays: jax.Array) -> jax.Array:
        out: jax.Array = quantized_gpu.grouped_matmul(x, which, *arrays, rows=rows, least=least)
        return out

    return without_gradient(run, (x_TCK, which, *flat), message)


def _plain(x_TCK: jax.Array, matrices: QuantizedMatrices, bundles: _Bundles, rows: int, least: int) -> jax.Array:
    """The product of each bundle, [T, C, N] in the dtype of x; zeros for bundles that are not used."""
    (_, C, _), N = x_TCK.shape, matrices.shape[0]

    # The backward pass dequantises again, so that the values of all matrices never exist together.
    @jax.checkpoint
    def multiply(x_CK: jax.Array, group: jax.Array) -> jax.Array:
        w_NK = matrices.value(group, x_CK.dtype)
        return jnp.einsum("CK,NK->CN", x_CK, w_NK, preferred_element_type=jnp.float32).astype(x_CK.dtype)

    def one(bundle: tuple[jax.Array, ...]) -> jax.Array:
        t, x_CK, group = bundle
        result: jax.Array = lax.cond(t < bundles.used, multiply, lambda x, _: jnp.zeros((C, N), x.dtype), x_CK, group)
        return result

    result: jax.Array = lax.map(one, (jnp.arange(x_TCK.shape[0]), x_TCK, bundles.group_T))
    return result
