"""Products of rows with one of many matrices: what a mixture of experts is made of.

Rows come sorted by group, and every group has a matrix of its own. The cost is that of the rows there are, whatever
bound the caller's array has, and only matrices of groups that have rows are read.

| implementation | where      | dtype    | sizes of a matrix |
|----------------|------------|----------|-------------------|
| gpu            | Hopper GPU | bfloat16 | multiples of 64   |
| tpu            | TPU        | bfloat16 | multiples of 128  |
| tiles          | anywhere   | any      | any               |

"auto" takes the first that does what is asked, says once what it took, and warns where that is `tiles` on an
accelerator: a loop over tiles of rows, each with its group's matrix.
"""

import functools
import logging
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import kernels
from qwen_jax.errors import InputError
from qwen_jax.kernels.reference import einsum_f32
from qwen_jax.platform import on_hopper, platform

Implementation = Literal["auto", "gpu", "tpu", "tiles"]
_TILE = 64


def choose(implementation: str, dtype: Any, outputs: int, inputs: int) -> str:
    """Names the implementation that runs, or raises `InputError` if the one asked for cannot do it.

    Args:
      implementation: "auto" or a name.
      dtype: of rows and matrices.
      outputs, inputs: size of a matrix.
    """
    dtype, here = jnp.dtype(dtype), platform()
    lacks = {
        "gpu": {
            "a Hopper GPU": on_hopper(),
            "bfloat16": dtype == jnp.bfloat16,
            "sizes that are multiples of 64": outputs % 64 == 0 and inputs % 64 == 0,
        },
        "tpu": {
            "a TPU": here == "tpu",
            "bfloat16": dtype == jnp.bfloat16,
            "sizes that are multiples of 128": outputs % 128 == 0 and inputs % 128 == 0,
        },
        "tiles": {},
    }
    able = [name for name, needs in lacks.items() if all(needs.values())]
    asked, of = implementation, f"matrices [{outputs}, {inputs}] of {dtype} on {here}"
    if asked == "auto":
        implementation = able[0]
    elif asked not in lacks:
        raise InputError(f"Unknown implementation of grouped products {asked!r}: use auto, {', '.join(lacks)}.")
    elif asked not in able:
        needs = " and ".join(need for need, met in lacks[asked].items() if not met)
        raise InputError(f"Grouped products by {asked} need {needs}; got {of}. Use {' or '.join(map(repr, able))}.")
    slow = asked == "auto" and implementation == "tiles" and here != "cpu"
    message = f"grouped products, {of}: {implementation}"
    kernels.say_once(message + (", which is slow here" if slow else ""), logging.WARNING if slow else logging.INFO)
    return implementation


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
      w_GNK: matrices, [out, in], in the dtype of x.
      sizes_G: int32, how many rows each group has; any may be 0. Together at most M. They get no gradient.
      expected: about how many rows there will be, for those who plan with the cost; by default M.
      fill: zeros beyond the last group's rows, in the result and in the gradient of x. Without it they may hold
        anything, not only numbers, and on TPUs they cost nothing.
      implementation: see the table above.

    Returns:
      [M, N] in the dtype of x, whatever x has beyond the last group's rows. The gradient by a matrix is summed in
      float32 and returned in its dtype.

    Raises:
      InputError: shapes that do not match, or an implementation that cannot do this.
    """
    if x_MK.ndim != 2 or w_GNK.ndim != 3 or x_MK.shape[1] != w_GNK.shape[2] or sizes_G.shape != w_GNK.shape[:1]:
        raise InputError(
            f"Grouped products take rows [M, K], matrices [G, N, K] and sizes [G]; got {x_MK.shape}, {w_GNK.shape} and "
            f"{sizes_G.shape}."
        )
    if x_MK.dtype != w_GNK.dtype or sizes_G.dtype != jnp.int32:
        raise InputError(
            f"Grouped products take rows and matrices of one dtype, and int32 sizes; got {x_MK.dtype}, {w_GNK.dtype} "
            f"and {sizes_G.dtype}."
        )
    chosen = choose(implementation, x_MK.dtype, *w_GNK.shape[1:])
    return _grouped(chosen, x_MK.shape[0] if expected is None else expected, fill, x_MK, w_GNK, sizes_G)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped(implementation: str, expected: int, fill: bool, *args: jax.Array) -> jax.Array:
    # Only TPU kernels state their cost, or leave rows as they are.
    options = {"expected": expected, "fill": fill} if implementation == "tpu" else {}
    result: jax.Array = _module(implementation).product(*args, **options)
    return result


def _forward(implementation: str, expected: int, fill: bool, *args: jax.Array) -> tuple[jax.Array, Any]:
    return _grouped(implementation, expected, fill, *args), args


def _backward(
    implementation: str, expected: int, fill: bool, kept: Any, by: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = kept
    of, options = _module(implementation), {"expected": expected} if implementation == "tpu" else {}
    dw = of.weights_gradient(by, x, sizes, dtype=w.dtype, **options)
    if implementation == "tpu":
        options["fill"] = fill
    return of.product(by, w, sizes, transposed=True, **options), dw, None


_grouped.defvjp(_forward, _backward)


def _module(implementation: str) -> Any:
    """What has `product` and `weights_gradient`."""
    if implementation == "gpu":
        from qwen_jax.kernels.matmul import grouped_gpu

        return grouped_gpu
    if implementation == "tpu":
        from qwen_jax.kernels.matmul import grouped_tpu

        return grouped_tpu
    return _Tiles


class _Tiles:
    """A loop over tiles of rows. No tile has rows of two groups; there are at most M / tile + G of them."""

    @staticmethod
    def product(x_MK: jax.Array, w_GNK: jax.Array, sizes_G: jax.Array, *, transposed: bool = False) -> jax.Array:
        group_T, rows_TR, used_TR = _tiles(sizes_G, x_MK.shape[0])
        subscripts = "rn,nk->rk" if transposed else "rk,nk->rn"

        def one(tile: tuple[jax.Array, ...]) -> jax.Array:
            group, rows_R, used_R = tile
            x = jnp.where(used_R[:, None], x_MK[rows_R], 0)
            return einsum_f32(subscripts, x, w_GNK[group]).astype(x_MK.dtype)

        y_TRN = lax.map(one, (group_T, rows_TR, used_TR))
        # Rows of no tile go beyond the end, and are dropped.
        places = jnp.where(used_TR, rows_TR, x_MK.shape[0])
        zeros = jnp.zeros((x_MK.shape[0], y_TRN.shape[-1]), x_MK.dtype)
        return zeros.at[places].set(y_TRN, mode="drop")

    @staticmethod
    def weights_gradient(dy_MN: jax.Array, x_MK: jax.Array, sizes_G: jax.Array, *, dtype: Any) -> jax.Array:
        def one(total_GNK: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            group, rows_R, used_R = tile
            dy, x = (jnp.where(used_R[:, None], z[rows_R], 0) for z in (dy_MN, x_MK))
            return total_GNK.at[group].add(einsum_f32("rn,rk->nk", dy, x)), None

        zeros = jnp.zeros((sizes_G.shape[0], dy_MN.shape[1], x_MK.shape[1]), jnp.float32)
        return lax.scan(one, zeros, _tiles(sizes_G, x_MK.shape[0]))[0].astype(dtype)


def _tiles(sizes_G: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group of each tile [T], its rows [T, R], and which of them it has [T, R]."""
    G, size = sizes_G.shape[0], min(_TILE, rows)
    tiles_G = -(-sizes_G // size)
    T = rows // size + G
    first_tile_G, first_row_G = (jnp.cumsum(x_G) - x_G for x_G in (tiles_G, sizes_G))
    t = jnp.arange(T)
    group_T = jnp.minimum((t[:, None] >= jnp.cumsum(tiles_G)).sum(1), G - 1)
    offset_T = (t - first_tile_G[group_T]) * size
    within_TR = offset_T[:, None] + jnp.arange(size)
    used_TR = within_TR < sizes_G[group_T][:, None]
    rows_TR = jnp.where(used_TR, first_row_G[group_T][:, None] + within_TR, 0)
    return group_T, rows_TR, used_TR
