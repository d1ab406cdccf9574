"""Grouped matrix products on any device, as a loop over tiles of rows, each multiplied by the matrix of its group.

No tile has rows of two groups, so there are at most M / tile + G of them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.einsum import einsum_f32

_TILE = 64


def product(
    x_MK: jax.Array,
    w_GNK: jax.Array,
    sizes_G: jax.Array,
    *,
    transposed: bool = False,
    scales: tuple[jax.Array, jax.Array] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Each row times the transposed matrix of its group, or times the matrix itself where `transposed`.

    Args:
      x_MK, w_GNK, sizes_G, transposed: as for `qwen_jax.kernels.matmul.grouped.grouped_matmul`.
      scales: float32 [M, 1] of the rows and [G, N] of the outputs, where x and w hold codes.
      dtype: of the result; by default that of x.
    """
    dtype = x_MK.dtype if dtype is None else dtype
    group_T, rows_TR, used_TR = _tiles(sizes_G, x_MK.shape[0])
    subscripts = "rn,nk->rk" if transposed else "rk,nk->rn"

    def one(tile: tuple[jax.Array, ...]) -> jax.Array:
        group, rows_R, used_R = tile
        x = jnp.where(used_R[:, None], x_MK[rows_R], 0)
        if scales is None:
            return einsum_f32(subscripts, x, w_GNK[group]).astype(dtype)
        wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
        y = jnp.einsum(subscripts, x, w_GNK[group], preferred_element_type=wide).astype(jnp.float32)
        return (y * scales[0][rows_R] * scales[1][group]).astype(dtype)

    y_TRN = lax.map(one, (group_T, rows_TR, used_TR))
    # Unused rows of a tile get an index beyond the end, which drops them.
    places = jnp.where(used_TR, rows_TR, x_MK.shape[0])
    zeros = jnp.zeros((x_MK.shape[0], y_TRN.shape[-1]), dtype)
    return zeros.at[places].set(y_TRN, mode="drop")


def weights_gradient(
    dy_MN: jax.Array, x_MK: jax.Array, sizes_G: jax.Array, *, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The gradient of `product` with respect to the matrices: dy^T x over the rows of each group, in `dtype`."""

    def one(total_GNK: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        group, rows_R, used_R = tile
        dy, x = (jnp.where(used_R[:, None], z[rows_R], 0) for z in (dy_MN, x_MK))
        return total_GNK.at[group].add(einsum_f32("rn,rk->nk", dy, x)), None

    zeros = jnp.zeros((sizes_G.shape[0], dy_MN.shape[1], x_MK.shape[1]), jnp.float32)
    return lax.scan(one, zeros, _tiles(sizes_G, x_MK.shape[0]))[0].astype(dtype)


def _tiles(sizes_G: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The group of each tile [T], the indices of its rows [T, R], and which of them are used [T, R]."""
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
