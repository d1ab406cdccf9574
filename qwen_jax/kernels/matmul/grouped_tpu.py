"""Grouped matrix products on TPUs, for mixtures of experts: rows sorted by group, a matrix for each group.

A program has a tile of rows in VMEM and visits it once for each group that has rows in it. Of a tile only blocks that
hold rows of the group are multiplied, so a group that begins inside one costs a part of a block, not another tile; one
that begins at a multiple of a block (256 rows; 128 up to v5p) costs nothing more. The sum of a product is never cut.
Rows that no group has are never multiplied.

`product` holds as many columns of a group's weights in VMEM as fit, so that rows are read few times, and fetches those
of the next group during all visits of one. `weights_gradient` holds a piece of a group's gradient in float32.
experiments/kernels/tpu_grouped.md has what this is worth, and why it isn't `jax.lax.ragged_dot` or megablox.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import InputError
from qwen_jax.kernels.padding import pad_to_multiple
from qwen_jax.kernels.tpu import device as tpu
from qwen_jax.kernels.tpu.device import LANES

# A register holds that many rows of bfloat16 in each lane; cuts are between them.
_PACKED = 16
# Contracted dimensions of x w^T, dy w and dy^T x.
_NT, _NN, _TN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))
# Rows of the table of visits.
_TILE, _GROUP, _LOW, _HIGH, _FIRST, _ORDER, _COUNT, _NEXT = range(8)
# A number that is read counts as that many products, about what a core multiplies meanwhile.
_READ = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's tiles.

    Attributes:
      rows: of a tile.
      block: rows that are multiplied at once where a group has not all rows of a tile; divides `rows`.
      columns: of the result that are in VMEM at once; for the weights' gradient, its rows (outputs).
      inner: all of the dimension that is summed over; for the weights' gradient, its columns (inputs) in VMEM at once.
      cores: that share the parts of the result.
      vmem_bytes: what the kernel may take.
    """

    rows: int
    block: int
    columns: int
    inner: int
    cores: int
    vmem_bytes: int


def product_tiles(inner: int, columns: int, core: tuple[int, int], cores: int = 1) -> Tiles:
    """Sizes for [M, inner] times [inner, columns] of each group.

    Weights are in VMEM twice, because the next are being fetched, and so are rows and results; one block's sums are
    there in float32. All of it may take three quarters. A block has as many rows as the matrix unit is wide: fewer
    would take as long, since loading weights into the unit does. Of what fits, those are taken that multiply and read
    the least: the last part of the columns may be filled up, and each part reads all rows.

    Args:
      inner: length of the sum.
      columns: of the result.
      core: bytes of VMEM and width of the matrix unit, as `tpu.device` has them.
      cores: that are there.

    Raises:
      InputError: a sum too long for VMEM.
    """
    vmem, block = core
    found = []
    for share, rows in itertools.product({cores, 1}, (512, 256)):
        for width, parts in _parts(columns, share, block):
            need = 4 * (width * inner + rows * (inner + width)) + 4 * block * width + _reserve(vmem)
            if need <= vmem * 3 // 4:
                work = parts * (width + _READ)
                found.append(((-share, -rows, work), Tiles(rows, block, width, inner, share, need)))
    if found:
        return min(found, key=lambda x: x[0])[1]
    raise InputError(
        f"Expected matrices of which {LANES} columns fit in the {vmem >> 20} MiB of VMEM; got a product that sums over "
        f"{inner}. Use implementation='tiles', or split that dimension among devices."
    )


def gradient_tiles(outputs: int, inputs: int, core: tuple[int, int], cores: int = 1) -> Tiles:
    """Sizes for [M, outputs]^T times [M, inputs] of each group, as for `product_tiles`.

    A number of the gradient takes 8 bytes: twice in float32, or once and twice in bfloat16. Rows are there twice, and a
    block of them once more, masked and transposed. All of it may take three quarters of VMEM.

    Args:
      outputs, inputs: of the weights.
      core, cores: as for `product_tiles`.

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
                tiles = Tiles(rows, block, width, depth, outer * inner, need)
                found.append(((-tiles.cores, -rows, work, width), tiles))
    if not found:
        raise InputError(f"Expected a TPU with 16 MiB of VMEM or more; got {vmem >> 20} MiB.")
    return min(found, key=lambda x: x[0])[1]


def _parts(size: int, cores: int, unit: int) -> list[tuple[int, int]]:
    """Ways to cut a dimension into parts that so many cores can share, the fewest first: width, and how many.

    A width is a multiple of `unit`, or all there is.
    """
    widths = {-(-size // width): width for width in range(-(-size // unit) * unit, 0, -unit)}
    return [(min(width, size), parts) for parts, width in widths.items() if parts % cores == 0]


def _reserve(vmem: int) -> int:
    """Room for registers that are put away: more where tiles are larger."""
    return max(vmem >> 5, 2 << 20)


def product(
    x_MK: jax.Array,
    w_GNK: jax.Array,
    sizes_G: jax.Array,
    *,
    transposed: bool = False,
    expected: int | None = None,
    fill: bool = True,
) -> jax.Array:
    """Each row times the weights of its group, w x; `transposed`, w^T x, as the gradient of the input is.

    Runs on local arrays. Sums are float32.

    Args:
      x_MK: [M, K] bfloat16, or [M, N] where `transposed`; the first sizes_G[0] rows are of group 0, and so on.
      w_GNK: [G, outputs, inputs] bfloat16, as PyTorch has weights. Groups without rows are not read.
      sizes_G: int32, rows of each group; no more than M together.
      transposed: which dimension of the weights is summed over: inputs, or else outputs.
      expected: about how many rows there will be, for the cost that is stated; by default M.
      fill: rows behind those of the last group become zero. Without it they may hold anything, and are neither read nor
        written, but for those in a tile with others.

    Returns:
      [M, N] bfloat16, or [M, K] where `transposed`, whatever x has behind the rows of the last group.

    Raises:
      InputError: another dtype, shapes that do not fit together, dimensions that are not multiples of 128, or a sum
        that does not fit in VMEM.
    """
    G, N, K = _weights_shape(w_GNK)
    inner, columns = (N, K) if transposed else (K, N)
    _check(x_MK, sizes_G, G, "x", inner)
    M = x_MK.shape[0]
    tiles = product_tiles(inner, columns, tpu.core(), tpu.cores())
    # An array smaller than a tile is filled up; the edge of a larger one is cut by the pipeline of copies.
    x = pad_to_multiple(x_MK, 0, tiles.rows) if tiles.rows > M else x_MK
    with jax.named_scope("grouped_product"):
        visits = _visits(sizes_G, M, tiles.rows, "rest" if fill else "nothing")
        rows = M if expected is None else min(expected, M)
        return _run_product(x, w_GNK, visits, transposed=transposed, tiles=tiles, expected=rows, fill=fill)[:M]


def weights_gradient(
    dy_MN: jax.Array, x_MK: jax.Array, sizes_G: jax.Array, *, dtype: Any = jnp.float32, expected: int | None = None
) -> jax.Array:
    """The sum of dy x^T over the rows of each group. Runs on local arrays; sums are float32.

    Args:
      dy_MN: [M, outputs] bfloat16, gradient of `product`'s result.
      x_MK: [M, inputs] bfloat16, its rows.
      sizes_G: int32, rows of each group; no more than M together. Other rows have no part in anything.
      dtype: of the result, float32 or bfloat16.
      expected: see `product`.

    Returns:
      [G, outputs, inputs], zero for groups without rows.

    Raises:
      InputError: another dtype, shapes that do not fit together, or dimensions that are not multiples of 128.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise InputError(f"Expected float32 or bfloat16 for the gradient of the weights; got {jnp.dtype(dtype)}.")
    _check(dy_MN, sizes_G, sizes_G.size, "dy", dy_MN.shape[-1])
    _check(x_MK, sizes_G, sizes_G.size, "x", x_MK.shape[-1])
    (M, N), K = dy_MN.shape, x_MK.shape[1]
    if len(x_MK) != M:
        raise InputError(f"Expected as many rows of dy as of x; got {dy_MN.shape} and {x_MK.shape}.")
    tiles = gradient_tiles(N, K, tpu.core(), tpu.cores())
    dy, x = (pad_to_multiple(a, 0, tiles.rows) if tiles.rows > M else a for a in (dy_MN, x_MK))
    with jax.named_scope("grouped_gradient"):
        visits = _visits(sizes_G, M, tiles.rows, "empty")
        rows = M if expected is None else min(expected, M)
        return _run_gradient(dy, x, visits, groups=sizes_G.size, dtype=jnp.dtype(dtype), tiles=tiles, expected=rows)


def _weights_shape(w: jax.Array) -> tuple[int, int, int]:
    if w.ndim != 3 or w.dtype != jnp.bfloat16 or w.shape[1] % LANES or w.shape[2] % LANES:
        raise InputError(
            f"Expected bfloat16 weights [groups, outputs, inputs], both multiples of {LANES}; got {w.dtype} {w.shape}. "
            "Fill them up with zeros."
        )
    G, N, K = w.shape
    return G, N, K


def _check(x: jax.Array, sizes: jax.Array, groups: int, name: str, width: int) -> None:
    if x.ndim != 2 or x.dtype != jnp.bfloat16 or x.shape[1] != width or width % LANES or not len(x):
        raise InputError(
            f"Expected {name} to be bfloat16 [rows, {width}], a multiple of {LANES}; got {x.dtype} {x.shape}."
        )
    if sizes.shape != (groups,) or sizes.dtype != jnp.int32 or not groups:
        raise InputError(f"Expected int32 sizes of {groups} groups; got {sizes.dtype} {sizes.shape}.")


def _visits(sizes: jax.Array, M: int, rows: int, too: Literal["rest", "empty", "nothing"]) -> jax.Array:
    """Which group is at which tile of rows when: [8, tiles + G] int32.

    Args:
      sizes: [G].
      M: rows there are.
      rows: of a tile.
      too: what is visited beside the rows of groups: those behind the last one, by a group G; groups without rows,
        once each; or nothing.

    Returns:
      For each visit its tile and group; the rows of the tile that are the group's, from `_LOW` to before `_HIGH`;
      whether it is the group's first; how many groups with rows come before, how many there are, and which one is next
      (behind the last, the first one). Visits that are not needed repeat the last one without any rows.
    """
    G, count = sizes.size, -(-M // rows)
    ends = jnp.minimum(jnp.cumsum(sizes, dtype=jnp.int32), M)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    held = ends > starts
    which = jnp.where(held, jnp.arange(G, dtype=jnp.int32), G)
    after = jnp.append(lax.cummin(which, reverse=True)[1:], G)
    after = jnp.where(after == G, which.min(), after)
    order = jnp.cumsum(held, dtype=jnp.int32) - held
    if too == "rest":
        starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, M)
        order, after = jnp.append(order, 0), jnp.append(after, G)
    first = jnp.minimum(starts // rows, count - 1)
    visits = jnp.where(ends > starts, (ends - 1) // rows - first + 1, int(too == "empty"))
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


def _blocks(low: Any, high: Any, tiles: Tiles, step: Any) -> None:
    """Calls `step(rows, mask, i)` for blocks of a tile that hold all rows from `low` to before `high`.

    Blocks are `pl.ds` of rows. The last may begin before the end of the one before, where the tile ends; `mask`, of
    one column, is true for rows that are asked for and were not in a block before.
    """
    begin = lax.div(low, _PACKED) * _PACKED

    def one(i: Any, _: None) -> None:
        wanted = begin + i * tiles.block
        at = pl.multiple_of(jnp.minimum(wanted, tiles.rows - tiles.block), _PACKED)
        row = lax.broadcasted_iota(jnp.int32, (tiles.block, 1), 0) + at
        step(pl.ds(at, tiles.block), (row >= jnp.maximum(low, wanted)) & (row < high), i)

    lax.fori_loop(0, lax.div(high - begin + tiles.block - 1, tiles.block), one, None)


def _kept(mask: jax.Array, x: jax.Array, other: jax.Array | float) -> jax.Array:
    """Rows of x where `mask` is, else of `other`."""
    # In float32: v5 and before don't compare or select numbers of 16 bits.
    f32 = jnp.float32
    return jnp.where(mask, x.astype(f32), other.astype(f32) if isinstance(other, jax.Array) else other).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("transposed", "tiles", "expected", "fill"))
def _run_product(
    x: jax.Array, w: jax.Array, visits: jax.Array, *, transposed: bool, tiles: Tiles, expected: int, fill: bool
) -> jax.Array:
    """`product` of whole tiles or more."""
    M, (G, N, K), columns = x.shape[0], w.shape, tiles.columns
    out = K if transposed else N
    parts = -(-out // columns)
    turns = parts // tiles.cores
    return pl.pallas_call(
        functools.partial(_product_program, transposed=transposed, groups=G, size=out, turns=turns, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles.cores, turns, visits.shape[1]),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.inner), lambda c, j, i, v: (v[_TILE, i], 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((tiles.rows, columns), lambda c, j, i, v: (v[_TILE, i], c * turns + j)),
            scratch_shapes=[
                pltpu.VMEM((2, tiles.inner, columns) if transposed else (2, columns, tiles.inner), w.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((M, out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * expected * N * K,
            transcendentals=0,
            bytes_accessed=2 * (parts * expected * tiles.inner + w.size + (M if fill else expected) * out),
        ),
        name="grouped_product",
    )(visits, x, w)


def _product_program(
    visits_ref: Any, x_ref: Any, w_ref: Any, out_ref: Any, weights: Any, arrived: Any, *, transposed: bool,
    groups: int, size: int, turns: int, tiles: Tiles,
) -> None:  # fmt: skip
    """One visit: a tile of rows, a group, and a part of the columns."""
    turn, i, columns = pl.program_id(1), pl.program_id(2), tiles.columns
    part = pl.program_id(0) * turns + turn
    low, high, group = (visits_ref[n, i] for n in (_LOW, _HIGH, _GROUP))
    order, count = visits_ref[_ORDER, i], visits_ref[_COUNT, i]
    # Weights come in the order in which they are needed; those of two parts are never of the same one.
    slot = lax.rem(turn * count + order, 2)
    last, rest = -(-size // columns) - 1, (size - 1) % columns + 1

    def copy(then: str, part: Any, group: Any, slot: Any) -> None:
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

    def multiply(rows: Any, mask: jax.Array, _: Any) -> None:
        dims = _NN if transposed else _NT
        y = lax.dot_general(x_ref[rows, :], weights[slot], dims, preferred_element_type=jnp.float32)
        out_ref[rows, :] = _kept(mask, y, out_ref[rows, :]).astype(out_ref.dtype)

    @pl.when(group < groups)
    def go() -> None:
        _blocks(low, high, tiles, multiply)

    @pl.when((group == groups) & (low < high))
    def zero() -> None:
        row = lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0)
        out_ref[...] = _kept((row < low) | (row >= high), out_ref[...], 0.0)


@functools.partial(jax.jit, static_argnames=("groups", "dtype", "tiles", "expected"))
def _run_gradient(
    dy: jax.Array, x: jax.Array, visits: jax.Array, *, groups: int, dtype: Any, tiles: Tiles, expected: int
) -> jax.Array:
    """`weights_gradient` of whole tiles or more."""
    N, K = dy.shape[1], x.shape[1]
    n_parts, k_parts = -(-N // tiles.columns), -(-K // tiles.inner)
    turns = n_parts * k_parts // tiles.cores

    def part(core: Any, turn: Any) -> tuple[Any, Any]:
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


def _gradient_program(visits_ref: Any, dy_ref: Any, x_ref: Any, out_ref: Any, *scratch: Any, tiles: Tiles) -> None:
    """One visit: a tile of rows, a group, and a piece of its gradient."""
    i = pl.program_id(2)
    low, high, first = (visits_ref[n, i] for n in (_LOW, _HIGH, _FIRST))
    total = scratch[0] if scratch else out_ref

    def add(dy: jax.Array, x: jax.Array, fresh: Any) -> None:
        y = lax.dot_general(dy, x, _TN, preferred_element_type=jnp.float32)
        y += jnp.where(fresh, 0.0, total[...])
        total[...] = y
        if scratch:
            # Each time: stores are free beside products, and another pass at the end would not be.
            out_ref[...] = y.astype(out_ref.dtype)

    def masked(rows: Any, mask: jax.Array, n: Any) -> None:
        dy, x = (_kept(mask, ref[rows, :], 0.0) for ref in (dy_ref, x_ref))
        add(dy, x, (first == 1) & (n == 0))

    whole = high - low == tiles.rows
    pl.when(whole)(lambda: add(dy_ref[...], x_ref[...], first == 1))
    pl.when(~whole & (low < high))(lambda: _blocks(low, high, tiles, masked))

    @pl.when((first == 1) & (low == high))
    def zero() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)
