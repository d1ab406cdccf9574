"""Grouped matrix products on TPUs, for MoE layers: rows sorted by group, each group with its own matrix.

A program has a tile of rows in VMEM and visits it once for each group that has rows in it. Only those blocks of a tile
are multiplied that hold rows of the group, so a group that begins inside a tile costs a part of a block, not another
tile; one that begins at a multiple of a block (256 rows; 128 up to v5p) costs nothing more. The sum of a product is
never split. Rows that belong to no group are never multiplied.

Rows and weights are bfloat16; those of `product` may also be codes of 8 bits with scales, which chips multiply faster.

`product` holds as many columns of the weights of a group in VMEM as fit, so that rows are read few times, and copies
those of the next group during the visits of this one. `weights_gradient` holds a piece of the gradient of a group in
float32. experiments/kernels/tpu_grouped.md measures both beside `jax.lax.ragged_dot` and megablox.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.tpu import device
from qwen_jax.kernels.tpu.device import LANES, PACKED_ROWS, SUBLANES, Core
from qwen_jax.kernels.tpu.tiles import NN, NT, TN
from qwen_jax.kernels.types import Ref

# Rows of the table of visits.
_TILE, _GROUP, _LOW, _HIGH, _FIRST, _ORDER, _COUNT, _NEXT = range(8)
# Reading a number costs as much as this many multiplications, about what a core does in that time.
_READ = 128


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of a kernel.

    Attributes:
      rows: rows of a tile.
      block: rows that are multiplied at once where a group does not have all rows of a tile; divides `rows`.
      columns: columns of the result that are in VMEM at once; for the gradient, its rows (outputs).
      inner: the whole dimension that is summed over; for the gradient, its columns (inputs) in VMEM at once.
      cores: cores that share the parts of the result.
      vmem_bytes: what the kernel may use.
    """

    rows: int
    block: int
    columns: int
    inner: int
    cores: int
    vmem_bytes: int


def product_tiling(inner: int, columns: int, core: Core, cores: int = 1, itemsize: int = 2) -> Tiling:
    """Sizes for [M, inner] times [inner, columns] of each group.

    Weights, rows and results have two buffers, because the next ones are copied meanwhile; the sums of one block are in
    float32. Together they may take three quarters of VMEM. A block has as many rows as the matrix unit is wide: fewer
    would take as long, because loading weights into the unit does. Of the sizes that fit, those that multiply and read
    the least are chosen: the last part of the columns may need padding, and each part reads all rows.

    Args:
      inner: length of the sum.
      columns: of the result.
      core: that runs the kernel.
      cores: cores of the chip that share a kernel.
      itemsize: bytes of a number of the rows and weights; codes of one byte have scales beside them.

    Raises:
      InputError: a sum too long for VMEM.
    """
    vmem, block = core
    found = []
    for share, rows in itertools.product({cores, 1}, (512, 256)):
        for width, parts in _parts(columns, share, block):
            need = 2 * itemsize * inner * (width + rows) + 4 * width * (rows + block) + _reserve(vmem)
            if itemsize == 1:
                # A register row for each row's scale, and a register column for those of the columns.
                need += 8 * (rows * LANES + width * SUBLANES)
            if need <= vmem * 3 // 4:
                work = parts * (width + _READ)
                found.append(((-share, -rows, work), Tiling(rows, block, width, inner, share, need)))
    if found:
        return min(found, key=lambda x: x[0])[1]
    raise InputError(
        f"Expected matrices of which {LANES} columns fit in the {vmem >> 20} MiB of VMEM; got a product that sums over "
        f"{inner}. Use implementation='tiles', or shard that dimension over devices."
    )


def gradient_tiling(outputs: int, inputs: int, core: Core, cores: int = 1) -> Tiling:
    """Sizes for [M, outputs]^T times [M, inputs] of each group; see `product_tiling`.

    An element of the gradient takes 8 bytes: two buffers in float32, or one in float32 and two in bfloat16. Rows have
    two buffers, and one block of them is there once more, masked and transposed. Together they may take three quarters
    of VMEM.

    Args:
      outputs, inputs: of the weights.
      core, cores: as for `product_tiling`.

    Raises:
      InputError: VMEM is too small.
    """
    vmem, block = core
    found = []
    for outer, inner in {(cores, 1), (1, cores), (1, 1)}:
        for (width, n), (depth, k), rows in itertools.product(
            _parts(outputs, outer, LANES), _parts(inputs, inner, block), (512, 256)
        ):
            need = 8 * width * depth + 4 * (rows + block) * (width + depth) + _reserve(vmem)
            if need <= vmem * 3 // 4:
                work = n * width * k * depth + _READ * (n * inputs + k * outputs)
                tiles = Tiling(rows, block, width, depth, outer * inner, need)
                found.append(((-tiles.cores, -rows, work, width), tiles))
    if not found:
        raise InputError(f"Expected a TPU with 16 MiB of VMEM or more; got {vmem >> 20} MiB.")
    return min(found, key=lambda x: x[0])[1]


def _parts(size: int, cores: int, unit: int) -> list[tuple[int, int]]:
    """The ways to cut a dimension into parts that cores can share evenly, fewest parts first.

    Args:
      size: of the dimension.
      cores: that share the parts.
      unit: of the width of a part, unless it is the whole dimension.

    Returns:
      Pairs of width and number of parts.
    """
    widths = {-(-size // width): width for width in range(-(-size // unit) * unit, 0, -unit)}
    return [(min(width, size), parts) for parts, width in widths.items() if parts % cores == 0]


def _reserve(vmem: int) -> int:
    """Bytes for spilled registers: more where tiles are larger."""
    return max(vmem >> 5, 2 << 20)


def product(
    x_MK: jax.Array,
    w_GNK: jax.Array,
    sizes_G: jax.Array,
    *,
    transposed: bool = False,
    expected: int | None = None,
    fill: bool = True,
    scales: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Each row times the weights of its group, w x, or w^T x where `transposed`. Runs on local arrays.

    Args:
      x_MK: [M, K] bfloat16, or [M, N] where `transposed`; the first sizes_G[0] rows are of group 0, and so on.
      w_GNK: [G, outputs, inputs] bfloat16, as in PyTorch. Matrices of groups without rows are not read.
      sizes_G: int32, rows of each group; their sum is at most M.
      transposed: sum over the outputs instead of the inputs, as the gradient with respect to x needs.
      expected: about how many rows there will be, for the cost estimate; by default M.
      fill: write zeros into the rows after the last group. Without it these rows are undefined, and are neither read
        nor written, except those in a tile with other rows.
      scales: float32 [M, 1] of the rows and [G, N] of the outputs, where x and w hold codes, both int8 or both
        float8_e4m3fn. Not with `transposed`.

    Returns:
      [M, N] bfloat16, or [M, K] where `transposed`; sums are float32. Sums of products of int8 are int32, so exact, and
      are scaled in float32 before they are rounded. It does not depend on the rows of x after the last group.

    Raises:
      InputError: another dtype, shapes that do not match, dimensions that are not multiples of 128, or a sum that does
        not fit in VMEM.
    """
    dtype = jnp.dtype(jnp.bfloat16) if scales is None else w_GNK.dtype
    G, N, K = _weights_shape(w_GNK, dtype)
    inner, columns = (N, K) if transposed else (K, N)
    _check(x_MK, sizes_G, G, "x", inner, dtype)
    M = x_MK.shape[0]
    if scales is not None:
        _check_scales(dtype, scales, M, G, N, transposed)
    tiles = product_tiling(inner, columns, device.core(), device.cores(), dtype.itemsize)

    def whole(rows: jax.Array) -> jax.Array:
        # An array smaller than a tile is padded. The pipeline clips the last tile of a larger one.
        return pad_to_multiple(rows, 0, tiles.rows) if tiles.rows > M else rows

    of_both = () if scales is None else (whole(scales[0]), scales[1][:, None])
    with jax.named_scope("grouped_product"):
        visits = _visits(sizes_G, M, tiles.rows, "rest" if fill else "nothing")
        rows = M if expected is None else min(expected, M)
        how = {"transposed": transposed, "tiles": tiles, "expected": rows, "fill": fill}
        return _run_product(whole(x_MK), w_GNK, visits, *of_both, **how)[:M]


def weights_gradient(
    dy_MN: jax.Array,
    x_MK: jax.Array,
    sizes_G: jax.Array,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    expected: int | None = None,
) -> jax.Array:
    """The gradient of `product` with respect to the weights: dy x^T summed over the rows of each group.

    Runs on local arrays; sums are float32.

    Args:
      dy_MN: [M, outputs] bfloat16, the gradient with respect to the product.
      x_MK: [M, inputs] bfloat16, the rows.
      sizes_G: int32, rows of each group; their sum is at most M. Other rows have no effect.
      dtype: of the result, float32 or bfloat16.
      expected: see `product`.

    Returns:
      [G, outputs, inputs], zero for groups without rows.

    Raises:
      InputError: another dtype, shapes that do not match, or dimensions that are not multiples of 128.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise InputError(f"Expected float32 or bfloat16 for the gradient of the weights; got {jnp.dtype(dtype)}.")
    _check(dy_MN, sizes_G, sizes_G.size, "dy", dy_MN.shape[-1])
    _check(x_MK, sizes_G, sizes_G.size, "x", x_MK.shape[-1])
    (M, N), K = dy_MN.shape, x_MK.shape[1]
    if len(x_MK) != M:
        raise InputError(f"Expected as many rows of dy as of x; got {dy_MN.shape} and {x_MK.shape}.")
    tiles = gradient_tiling(N, K, device.core(), device.cores())
    dy, x = (pad_to_multiple(a, 0, tiles.rows) if tiles.rows > M else a for a in (dy_MN, x_MK))
    with jax.named_scope("grouped_gradient"):
        visits = _visits(sizes_G, M, tiles.rows, "empty")
        rows = M if expected is None else min(expected, M)
        return _run_gradient(dy, x, visits, groups=sizes_G.size, dtype=jnp.dtype(dtype), tiles=tiles, expected=rows)


def _weights_shape(w: jax.Array, dtype: jnp.dtype) -> tuple[int, int, int]:
    if w.ndim != 3 or w.dtype != dtype or w.shape[1] % LANES or w.shape[2] % LANES:
        raise InputError(
            f"Expected {dtype} weights [groups, outputs, inputs], both multiples of {LANES}; got {w.dtype} {w.shape}. "
            "Pad them with zeros."
        )
    G, N, K = w.shape
    return G, N, K


def _check(
    x: jax.Array, sizes: jax.Array, groups: int, name: str, width: int, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> None:
    if x.ndim != 2 or x.dtype != dtype or x.shape[1] != width or width % LANES or not len(x):
        raise InputError(
            f"Expected {name} to be {jnp.dtype(dtype)} [rows, {width}], a multiple of {LANES}; got {x.dtype} {x.shape}."
        )
    if sizes.shape != (groups,) or sizes.dtype != jnp.int32 or not groups:
        raise InputError(f"Expected int32 sizes of {groups} groups; got {sizes.dtype} {sizes.shape}.")


def _check_scales(
    dtype: jnp.dtype, scales: tuple[jax.Array, jax.Array], M: int, G: int, N: int, transposed: bool
) -> None:
    if dtype not in (jnp.int8, jnp.float8_e4m3fn) or transposed:
        raise InputError(f"Expected int8 or float8_e4m3fn codes beside scales, not transposed; got {dtype}.")
    shapes = [(M, 1), (G, N)]
    if [x.shape for x in scales] != shapes or any(x.dtype != jnp.float32 for x in scales):
        raise InputError(f"Expected float32 scales {shapes}; got {[(x.dtype, x.shape) for x in scales]}.")


def _visits(sizes: jax.Array, M: int, rows: int, extra: Literal["rest", "empty", "nothing"]) -> jax.Array:
    """The table of visits of row tiles by groups, int32 [8, tiles + G].

    Args:
      sizes: rows of each group, [G].
      M: length of the array of rows.
      rows: rows of a tile.
      extra: what is visited besides the rows of groups: "rest" is the rows after the last group, as a group G; "empty"
        is each group without rows, once.

    Returns:
      For each visit its tile and group; the range of rows of the group in the tile, from `_LOW` to before `_HIGH`;
      whether it is the first visit of the group; how many groups with rows come before, how many there are, and which
      one is next (after the last, the first one). Visits that are not needed repeat the last one without rows.
    """
    G, count = sizes.size, -(-M // rows)
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), M)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    held = ends > starts
    which = jnp.where(held, jnp.arange(G, dtype=jnp.int32), G)
    after = jnp.append(lax.cummin(which, reverse=True)[1:], G)
    after = jnp.where(after == G, which.min(), after)
    order = jnp.cumsum(held, dtype=jnp.int32) - held
    if extra == "rest":
        starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, M)
        order, after = jnp.append(order, 0), jnp.append(after, G)
    first = jnp.minimum(starts // rows, count - 1)
    visits = jnp.where(ends > starts, (ends - 1) // rows - first + 1, int(extra == "empty"))
    until = jnp.cumsum(visits, dtype=jnp.int32)
    i = jnp.arange(count + G, dtype=jnp.int32)
    at = jnp.minimum(i, jnp.maximum(until[-1] - 1, 0))
    group = jnp.minimum((until[:, None] <= at[None]).sum(0, dtype=jnp.int32), len(ends) - 1)
    place = at - (until - visits)[group]
    tile, live = first[group] + place, i < until[-1]
    low, high = (jnp.where(live, jnp.clip(x[group] - tile * rows, 0, rows), 0) for x in (starts, ends))
    fresh = (live & (place == 0)).astype(jnp.int32)
    total = jnp.broadcast_to(held.sum(dtype=jnp.int32), i.shape)
    return jnp.stack([tile, group, low, high, fresh, order[group], total, after[group]])


def _over_blocks(
    low: jax.Array,
    high: jax.Array,
    tiles: Tiling,
    step: Callable[[slice | pl.Slice, jax.Array, jax.Array], None],
    packed: int = PACKED_ROWS,
) -> None:
    """Calls `step(rows, mask, i)` for the blocks of a tile that together hold the rows from `low` to before `high`.

    `rows` is a slice that begins at a multiple of `packed`, the rows of a register. At the end of the tile a block may
    overlap the previous one; `mask`, of one column, is true for the rows in the range that no previous block had.
    """
    begin = lax.div(low, packed) * packed

    def one(i: jax.Array, _: None) -> None:
        wanted = begin + i * tiles.block
        at = pl.multiple_of(jnp.minimum(wanted, tiles.rows - tiles.block), packed)
        row = lax.broadcasted_iota(jnp.int32, (tiles.block, 1), 0) + at
        step(pl.ds(at, tiles.block), (row >= jnp.maximum(low, wanted)) & (row < high), i)

    lax.fori_loop(0, lax.div(high - begin + tiles.block - 1, tiles.block), one, None)


def _where_rows(mask: jax.Array, x: jax.Array, other: jax.Array | float) -> jax.Array:
    """Rows of x where the mask is true, otherwise of `other`."""
    # In float32: chips up to v5 do not compare or select 16-bit numbers.
    f32 = jnp.float32
    return jnp.where(mask, x.astype(f32), other.astype(f32) if isinstance(other, jax.Array) else other).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("transposed", "tiles", "expected", "fill"))
def _run_product(
    x: jax.Array,
    w: jax.Array,
    visits: jax.Array,
    *scales: jax.Array,
    transposed: bool,
    tiles: Tiling,
    expected: int,
    fill: bool,
) -> jax.Array:
    """`product` of at least one whole tile; `scales` are [M, 1] and [G, 1, N], or none."""
    M, (G, N, K), columns = x.shape[0], w.shape, tiles.columns
    out = K if transposed else N
    parts = -(-out // columns)
    turns = parts // tiles.cores
    of_scales = [
        pl.BlockSpec((tiles.rows, 1), lambda c, j, i, v: (v[_TILE, i], 0)),
        pl.BlockSpec((None, 1, columns), lambda c, j, i, v: (jnp.minimum(v[_GROUP, i], G - 1), 0, c * turns + j)),
    ]
    return pl.pallas_call(
        lambda visits, x, w, *refs: _product_program(
            _ProductRefs(visits, x, w, refs[:-3], *refs[-3:]),
            transposed=transposed,
            groups=G,
            size=out,
            turns=turns,
            tiles=tiles,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles.cores, turns, visits.shape[1]),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.inner), lambda c, j, i, v: (v[_TILE, i], 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                *of_scales[: len(scales)],
            ],
            out_specs=pl.BlockSpec((tiles.rows, columns), lambda c, j, i, v: (v[_TILE, i], c * turns + j)),
            scratch_shapes=[
                pltpu.VMEM((2, tiles.inner, columns) if transposed else (2, columns, tiles.inner), w.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((M, out), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * expected * N * K,
            transcendentals=0,
            bytes_accessed=w.dtype.itemsize * (parts * expected * tiles.inner + w.size)
            + 2 * (M if fill else expected) * out,
        ),
        name="grouped_product",
    )(visits, x, w, *scales)


class _ProductRefs(NamedTuple):
    """References of a program.

    Attributes:
      visits: the table of visits.
      x, w: rows, and weights in HBM.
      scales: of the rows and of the columns of the result, or none.
      out: the result.
      weights: buffers for the weights of two groups.
      arrived: semaphores of their copies.
    """

    visits: Ref
    x: Ref
    w: Ref
    scales: tuple[Ref, ...]
    out: Ref
    weights: Ref
    arrived: Ref


def _product_program(
    refs: _ProductRefs, *, transposed: bool, groups: int, size: int, turns: int, tiles: Tiling
) -> None:
    """One visit of a row tile by a group, for a part of the columns.

    Args:
      refs: of the program.
      transposed: see `product`.
      groups: number of groups; a visit by this group writes zeros.
      size: columns of the result.
      turns: parts of the columns of each core.
      tiles: sizes.
    """
    visits_ref, x_ref, w_ref, scales, out_ref, weights, arrived = refs
    wide = jnp.int32 if jnp.issubdtype(w_ref.dtype, jnp.integer) else jnp.float32
    turn, i, columns = pl.program_id(1), pl.program_id(2), tiles.columns
    part = pl.program_id(0) * turns + turn
    low, high, group = (visits_ref[n, i] for n in (_LOW, _HIGH, _GROUP))
    order, count = visits_ref[_ORDER, i], visits_ref[_COUNT, i]
    # The weights are copied in the order in which they are needed, into alternating buffers.
    slot = lax.rem(turn * count + order, 2)
    last, rest = -(-size // columns) - 1, (size - 1) % columns + 1

    def copy(then: Literal["start", "wait"], part: jax.Array, group: jax.Array, slot: jax.Array) -> None:
        """Starts the copy of a part of the weights of a group, or waits for it. The last part may be narrower."""

        def one(length: int) -> None:
            there, here = pl.ds(pl.multiple_of(part * columns, LANES), length), pl.ds(0, length)
            source = w_ref.at[group, :, there] if transposed else w_ref.at[group, there, :]
            target = weights.at[slot, :, here] if transposed else weights.at[slot, here, :]
            getattr(pltpu.make_async_copy(source, target, arrived.at[slot]), then)()

        if rest == columns:
            one(columns)
        else:
            pl.when(part < last)(lambda: one(columns))
            pl.when(part == last)(lambda: one(rest))

    # At the first visit of a group: start the copy for the next group (or part), and wait for this one.
    @pl.when((visits_ref[_FIRST, i] == 1) & (group < groups))
    def fetch() -> None:
        @pl.when((turn == 0) & (order == 0))
        def begin() -> None:
            copy("start", part, group, slot)

        around = order == count - 1

        @pl.when(~around | (turn < turns - 1))
        def following() -> None:
            copy("start", part + around.astype(jnp.int32), visits_ref[_NEXT, i], 1 - slot)

        copy("wait", part, group, slot)

    def multiply(rows: slice | pl.Slice, mask: jax.Array, _: jax.Array) -> None:
        dims = NN if transposed else NT
        y = lax.dot_general(x_ref[rows, :], weights[slot], dims, preferred_element_type=wide).astype(jnp.float32)
        if scales:
            y = y * scales[0][rows, :] * scales[1][...]
        out_ref[rows, :] = _where_rows(mask, y, out_ref[rows, :]).astype(out_ref.dtype)

    @pl.when(group < groups)
    def run() -> None:
        _over_blocks(low, high, tiles, multiply, PACKED_ROWS * 2 // x_ref.dtype.itemsize)

    @pl.when((group == groups) & (low < high))
    def zero() -> None:
        row = lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0)
        out_ref[...] = _where_rows((row < low) | (row >= high), out_ref[...], 0.0)


@functools.partial(jax.jit, static_argnames=("groups", "dtype", "tiles", "expected"))
def _run_gradient(
    dy: jax.Array, x: jax.Array, visits: jax.Array, *, groups: int, dtype: jnp.dtype, tiles: Tiling, expected: int
) -> jax.Array:
    """`weights_gradient` of at least one whole tile."""
    N, K = dy.shape[1], x.shape[1]
    n_parts, k_parts = -(-N // tiles.columns), -(-K // tiles.inner)
    turns = n_parts * k_parts // tiles.cores

    def part(core: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Row and column of the piece of the gradient that a core computes in a turn."""
        i = core * turns + turn
        return lax.div(i, k_parts), lax.rem(i, k_parts)

    piece = (tiles.columns, tiles.inner)
    return pl.pallas_call(
        functools.partial(_gradient_program, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles.cores, turns, visits.shape[1]),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.columns), lambda c, j, i, v: (v[_TILE, i], part(c, j)[0])),
                pl.BlockSpec((tiles.rows, tiles.inner), lambda c, j, i, v: (v[_TILE, i], part(c, j)[1])),
            ],
            out_specs=pl.BlockSpec((None, *piece), lambda c, j, i, v: (v[_GROUP, i], *part(c, j))),
            scratch_shapes=[] if dtype == jnp.float32 else [pltpu.VMEM(piece, jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((groups, N, K), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * expected * N * K,
            transcendentals=0,
            bytes_accessed=2 * expected * (k_parts * N + n_parts * K) + groups * N * K * dtype.itemsize,
        ),
        name="grouped_gradient",
    )(visits, dy, x)


def _gradient_program(visits_ref: Ref, dy_ref: Ref, x_ref: Ref, out_ref: Ref, *scratch: Ref, tiles: Tiling) -> None:
    """One visit of a row tile by a group, for a piece of the gradient; `scratch` is a float32 sum for other dtypes."""
    i = pl.program_id(2)
    low, high, first = (visits_ref[n, i] for n in (_LOW, _HIGH, _FIRST))
    total = scratch[0] if scratch else out_ref

    def add(dy: jax.Array, x: jax.Array, fresh: jax.Array) -> None:
        y = lax.dot_general(dy, x, TN, preferred_element_type=jnp.float32)
        y += jnp.where(fresh, 0.0, total[...])
        total[...] = y
        if scratch:
            # At every visit, because stores beside products cost nothing and a pass at the end would.
            out_ref[...] = y.astype(out_ref.dtype)

    def add_block(rows: slice | pl.Slice, mask: jax.Array, n: jax.Array) -> None:
        dy, x = (_where_rows(mask, ref[rows, :], 0.0) for ref in (dy_ref, x_ref))
        add(dy, x, (first == 1) & (n == 0))

    whole = high - low == tiles.rows
    pl.when(whole)(lambda: add(dy_ref[...], x_ref[...], first == 1))
    pl.when(~whole & (low < high))(lambda: _over_blocks(low, high, tiles, add_block))

    @pl.when((first == 1) & (low == high))
    def zero() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
