"""Grouped matrix products on Hopper GPUs, for MoE layers: rows sorted by group, each group with its own matrix.

One thread block per multiprocessor stays resident and claims the next tile of the result whenever it has started all
copies of the previous one (`grouped_gpu_schedule`). In a block one warpgroup copies what the next steps need into a
ring in shared memory, and two multiply, each 64 rows of the tile by 256 columns. The ring continues across tiles: while
the end of one tile is written, the next one is being copied.

Only rows that exist cost anything. A tile of `product` has rows of one group. It begins at the last multiple of 8
before them, because the copy engine works in units of 8 rows; the few rows of the previous group are multiplied but not
written. Units of 64 rows without a row of the group are skipped. Zeros after the last group are written between copies.

Rows and matrices are bfloat16; those of `product` may also be codes of 8 bits, which the tensor cores multiply twice as
fast, with scales that are applied to the sums.

In `weights_gradient` the rows are summed over, and rows of another group must not count, whatever they hold: the
copying warpgroup overwrites them with zeros in shared memory before the tensor cores may read them.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from qwen_jax.errors import InputError
from qwen_jax.kernels.gpu.device import MULTIPROCESSORS, TILE_SHARED_BYTES
from qwen_jax.kernels.gpu.hopper import tiled
from qwen_jax.kernels.gpu.tiles import ROWS, kernel
from qwen_jax.kernels.matmul.grouped_gpu_blocks import GradientMemory, ProductMemory, gradient_block, product_block
from qwen_jax.kernels.matmul.grouped_gpu_schedule import queue_scratch
from qwen_jax.kernels.matmul.grouped_gpu_tiles import (
    CHUNK,
    COLUMNS,
    PIECE_BYTES,
    PIECES,
    TILE_ROWS,
    WARPGROUPS,
    ZERO_ROWS,
)
from qwen_jax.kernels.types import Ref


def supports(dtype: jax.typing.DTypeLike, outputs: int, inputs: int, codes: bool = False) -> bool:
    """Whether the kernels support groups whose matrices are [outputs, inputs], or those of codes do."""
    dtypes, length = ((jnp.int8, jnp.float8_e4m3fn), 2 * CHUNK) if codes else ((jnp.bfloat16,), CHUNK)
    return jnp.dtype(dtype) in dtypes and not any(n < m or n % m for n, m in ((outputs, 64), (inputs, length)))


def row_tiles(sizes_G: jax.Array, rows: int, warpgroups: int = WARPGROUPS) -> tuple[jax.Array, jax.Array]:
    """Cuts the rows of every group into tiles of about equal length, in units of 64 rows.

    Args:
      sizes_G: int32, rows of each group; together at most `rows`.
      rows: length of the array of rows.
      warpgroups: units of a tile, at most.

    Returns:
      int32 [T, 4], for each tile its group, the row at which it begins (a multiple of 8), and first and end of the rows
      of the group in it; T is the maximal number of tiles. And int32 [2]: the number of tiles, and the sum of `sizes`.
    """
    G, most_rows = sizes_G.shape[0], ROWS * warpgroups
    most = max(1, (rows + min(G, rows) * (most_rows + 6)) // most_rows)
    end_G = jnp.cumsum(sizes_G)
    first_G = end_G - sizes_G
    start_G = first_G // 8 * 8
    units_G = jnp.where(sizes_G > 0, -((start_G - end_G) // ROWS), 0)
    tiles_G = -(-units_G // warpgroups)
    last_G = jnp.cumsum(tiles_G)
    t = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum((last_G <= t[:, None]).sum(axis=1, dtype=jnp.int32), G - 1)
    start, first, end, units, tiles, last = (x[group] for x in (start_G, first_G, end_G, units_G, tiles_G, last_G))
    n, tiles = t - (last - tiles), jnp.maximum(tiles, 1)
    begin, stop = (start + ROWS * (i * units // tiles) for i in (n, n + 1))
    table = jnp.stack([group, begin, jnp.maximum(first, begin), jnp.minimum(end, stop)], axis=1)
    return table, jnp.stack([last_G[-1], end_G[-1]])


# Jitted, as the gradient is, so that a model of many layers lowers it once.
@functools.partial(jax.jit, static_argnames="transposed")
def product(
    x_MK: jax.Array,
    w_GNK: jax.Array,
    sizes_G: jax.Array,
    *,
    transposed: bool = False,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Each row times the matrix of its group: x W_g^T, or x W_g. Runs on local arrays.

    Args:
      x_MK: bfloat16 rows, sorted by group: the first sizes[0] belong to group 0, and so on. With `transposed`, [M, N].
      w_GNK: bfloat16; N and K are multiples of 64. Multiples of 256 waste nothing.
      sizes_G: int32, how many rows each group has; any may be 0. Together at most M.
      transposed: multiply by W_g instead of its transpose, as the gradient with respect to x needs.
      scales: float32 [M, 1] of the rows and [G, N] of the outputs, where x and w hold codes, both int8 or both
        float8_e4m3fn; K is then a multiple of 128. Not with `transposed`.

    Returns:
      bfloat16 [M, N], or with `transposed` [M, K]: sums in float32, rounded once. Sums of products of int8 are int32,
      so exact; in those of float8 the tensor cores keep some 14 bits (arXiv:2412.19437, section 3.3.2). Both are scaled
      in float32. Rows that belong to no group are zero, whatever x holds there.

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    G, N, K = w_GNK.shape if w_GNK.ndim == 3 else (0, 0, 0)
    length, width = (N, K) if transposed else (K, N)
    if not G or x_MK.ndim != 2 or x_MK.shape[1] != length or sizes_G.shape != (G,):
        raise InputError(
            f"A grouped product needs x [M, {'N' if transposed else 'K'}], w [G, N, K] and sizes [G]; got "
            f"{x_MK.shape}, {w_GNK.shape} and {sizes_G.shape}."
        )
    _check(N, K, sizes_G, x_MK, w_GNK, codes=scales is not None)
    M, x = x_MK.shape[0], _pad_rows(x_MK)
    columns, chunk = min(COLUMNS, width), CHUNK * 2 // x.dtype.itemsize
    w_tile = (chunk, columns) if transposed else (columns, chunk)
    stages = _stages(columns, 2 * ZERO_ROWS * columns)
    of_both: tuple[jax.Array, ...] = ()
    if scales is not None:
        if transposed or [a.shape for a in scales] != [(M, 1), (G, N)] or any(a.dtype != jnp.float32 for a in scales):
            raise InputError(
                f"A grouped product of codes, not transposed, needs float32 scales {(M, 1)} and {(G, N)}; got "
                f"{[(a.dtype, a.shape) for a in scales]}."
            )
        # Scales of tiles that reach beyond the rows or the outputs are read.
        of_rows = jnp.pad(scales[0][:, 0], (0, x.shape[0] - M + ROWS))
        of_both = of_rows, jnp.pad(scales[1], ((0, 0), (0, -N % columns)))
    table, counts = row_tiles(sizes_G, x.shape[0])

    def block(*refs: Ref, **scratch: Ref) -> None:
        product_block(ProductMemory.of(scratch), *refs, transposed=transposed)

    launch = kernel(
        "grouped_product",
        block,
        (jax.ShapeDtypeStruct((x.shape[0], width), jnp.bfloat16),),
        {"block": MULTIPROCESSORS},
        WARPGROUPS + 1,
        x_smem=tiled((stages, TILE_ROWS, chunk), x.dtype, chunk),
        w_smem=tiled((stages, *w_tile), x.dtype, chunk),
        out_smem=tiled((WARPGROUPS, PIECES, ROWS, PIECE_BYTES // ROWS // 2), jnp.bfloat16),
        zeros_smem=plgpu.SMEM((ZERO_ROWS, columns), jnp.bfloat16),
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        **queue_scratch(WARPGROUPS),
    )
    out: jax.Array = launch(table, jnp.append(counts, 0), x, w_GNK, *of_both)[0]
    return out[:M]


@functools.partial(jax.jit, static_argnames="dtype")
def weights_gradient(
    dy_MN: jax.Array, x_MK: jax.Array, sizes_G: jax.Array, *, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The gradient of `product` with respect to the matrices: for each group, dy^T x over its rows. On local arrays.

    Args:
      dy_MN: bfloat16 gradient with respect to the product; N is a multiple of 64.
      x_MK: bfloat16 rows, the argument of `product`; K is a multiple of 64.
      sizes_G: int32, how many rows each group has. Rows beyond their sum may hold anything.
      dtype: of the result, float32 or bfloat16.

    Returns:
      [G, N, K], zero for a group without rows: sums in float32, rounded once.

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    if dy_MN.ndim != 2 or x_MK.ndim != 2 or dy_MN.shape[0] != x_MK.shape[0] or sizes_G.ndim != 1 or not sizes_G.size:
        raise InputError(
            f"The gradient of grouped matrices needs dy [M, N], x [M, K] and sizes [G]; got {dy_MN.shape}, "
            f"{x_MK.shape} and {sizes_G.shape}."
        )
    (G,), N, K = sizes_G.shape, dy_MN.shape[1], x_MK.shape[1]
    _check(N, K, sizes_G, dy_MN, x_MK)
    dtype, size = jnp.dtype(dtype), jnp.dtype(dtype).itemsize
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise InputError(f"The gradient of grouped matrices is float32 or bfloat16; asked for {dtype}.")
    columns = min(COLUMNS, K)
    stages = _stages(columns)
    end_G = jnp.cumsum(sizes_G)

    def block(*refs: Ref, **scratch: Ref) -> None:
        gradient_block(GradientMemory.of(scratch), *refs)

    launch = kernel(
        "grouped_weights_gradient",
        block,
        (jax.ShapeDtypeStruct((G, N, K), dtype),),
        {"block": MULTIPROCESSORS},
        WARPGROUPS + 1,
        dy_smem=tiled((stages, CHUNK, TILE_ROWS), x_MK.dtype),
        x_smem=tiled((stages, CHUNK, columns), x_MK.dtype),
        out_smem=tiled((WARPGROUPS, PIECES, ROWS, PIECE_BYTES // ROWS // size), dtype, 128 // size),
        # The second half is for steps whose rows must be cleared first.
        ready=plgpu.Barrier(num_arrivals=2, num_barriers=2 * stages),
        free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        **queue_scratch(WARPGROUPS),
    )
    if N < TILE_ROWS:
        dy_MN = jnp.pad(dy_MN, [(0, 0), (0, TILE_ROWS - N)])
    # The last row holds the counter.
    bounds = jnp.append(jnp.stack([end_G - sizes_G, end_G], axis=1), jnp.zeros((1, 2), jnp.int32), axis=0)
    out: jax.Array = launch(bounds, _pad_rows(dy_MN), _pad_rows(x_MK))[0]
    return out


def _check(N: int, K: int, sizes_G: jax.Array, *arrays: jax.Array, codes: bool = False) -> None:
    alike = len({x.dtype for x in arrays}) == 1 or not codes
    if sizes_G.dtype != jnp.int32 or not alike or not all(supports(x.dtype, N, K, codes) for x in arrays):
        needed = "int8 or float8_e4m3fn, K a multiple of 128" if codes else "bfloat16"
        raise InputError(
            f"Grouped products on Hopper need {needed}, matrices [N, K] whose N and K are multiples of 64, and int32 "
            f"sizes; got {' and '.join(str(x.dtype) for x in arrays)}, [{N}, {K}] and {sizes_G.dtype}. Pad the "
            "matrices with zeros, convert, or use another implementation."
        )


def _stages(columns: int, more: int = 0) -> int:
    """Steps of the ring that fit in shared memory beside the results in flight and `more` bytes."""
    room = TILE_SHARED_BYTES - WARPGROUPS * PIECES * PIECE_BYTES - more
    return min(8, room // ((TILE_ROWS + columns) * CHUNK * 2))


def _pad_rows(x: jax.Array) -> jax.Array:
    """Pads to the rows of one copy, and to a multiple of 8, which the copy engine needs for tiled shared memory."""
    missing = max(TILE_ROWS, -(-x.shape[0] // 8) * 8) - x.shape[0]
    return jnp.pad(x, [(0, missing), (0, 0)]) if missing else x
