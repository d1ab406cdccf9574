"""Tiles of quantised weights as operands of Hopper's tensor cores.

The left operand of wgmma may come from registers, so a tile of codes is the left operand: 64 outputs, converted to
bfloat16 on the way from shared memory to the tensor cores. Every code is exact in bfloat16, and so is the difference of
an integer code and a zero point.

A thread holds neighbouring codes of an output, 32 bits of them, where the tensor cores expect pairs that are eight
inputs apart. The order of the inputs does not matter for a product, so that x comes in that order (`permuted`) and no
thread exchanges anything.
"""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.hopper import load
from qwen_jax.kernels.gpu.tiles import PER_ROW, ROWS, WGMMA
from qwen_jax.kernels.types import Ref

CODES = tuple(map(jnp.dtype, (jnp.int4, jnp.int8, jnp.float8_e4m3fn)))
"""Dtypes of codes that the kernels read."""
TILE = 128
"""Inputs of a tile of codes in shared memory, and of one product, at most."""
_HELD = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}
"""Registers of a tile of codes, by the bits of a code: each thread holds 8 or 4 neighbours of a row."""


class Operands(NamedTuple):
    """The operands of a kernel in global memory.

    Attributes:
      x: bfloat16 [M, K], permuted; or the digits of one row, int8 [4, K], see `quantized_gpu_digits`.
      codes: [N, K].
      scales: [N, G].
      zeros: [N, G].
      mins: float32 [N, G].
      x_sums: with `mins`, float32 [G, columns]: the sums of x over each group.
      bundles: of a grouped product, else None.
      x_factors: of digits, float32 [K / 128].
    """

    x: Any
    codes: Any
    scales: Any
    zeros: Any = None
    mins: Any = None
    x_sums: Any = None
    bundles: Any = None
    x_factors: Any = None


class Bundles(NamedTuple):
    """The rows of a grouped product, in T bundles of a few rows of one matrix each.

    x of `Operands` has the same number of rows for each bundle, and the matrices follow each other.

    Attributes:
      matrices: int32 [T], the matrix of each bundle; of bundles that are not used, any that exists.
      counts: int32 [T], the rows of each bundle that are there. The others are not written.
      used: int32 [1], how many bundles there are, from the first.
    """

    matrices: Any
    counts: Any
    used: Any


def bits(dtype: jax.typing.DTypeLike) -> int:
    """Bits of a code in memory."""
    return 4 if jnp.dtype(dtype) == jnp.int4 else 8


def permuted(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Vectors [..., K] with their components in the order in which `operand` has the inputs.

    Args:
      x: the vectors; K is a multiple of 32.
      dtype: of the codes.
    """
    *outer, K = x.shape
    if bits(dtype) == 4:
        # Of 32 inputs, lane t of four holds 8 t to 8 t + 7. Those at p and p + 4 are its pair in unit p of 8.
        return jnp.moveaxis(x.reshape(*outer, K // 32, 4, 2, 4), -1, -3).reshape(x.shape)
    # Of 16 inputs, lane t holds b to b + 3 with b = 8 (t % 2) + 4 (t // 2): the pairs at 2 t of two units of 8.
    return x.reshape(*outer, K // 16, 2, 2, 2, 2).swapaxes(-4, -2).reshape(x.shape)


Order = tuple[int, tuple[tuple[int, int, int], ...]]
"""An order of inputs: those of a unit, and the digits of an input's number in it, each with its size, its stride, and
its stride in that order."""
ORDERS: dict[int, Order] = {
    4: (32, ((4, 8, 2), (2, 4, 1), (4, 1, 8))),
    8: (16, ((2, 8, 2), (2, 4, 4), (2, 2, 8), (2, 1, 1))),
}
"""`permuted` by the bits of a code."""


def place_in(order: Order, at: Any) -> Any:
    """The place of an input, an index of MLIR. Call it within `plgpu.inline_mgpu`."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith
    from jax.experimental.mosaic.gpu import utils

    def const(n: int) -> Any:
        return utils.c(n, ir.IndexType.get())

    unit, digits = order
    place = arith.muli(arith.divui(at, const(unit)), const(unit))
    for size, here, there in digits:
        digit = arith.remui(arith.divui(at, const(here)), const(size))
        place = arith.addi(place, arith.muli(digit, const(there)))
    return place


def inputs_at_once(k: int, groups: int) -> int:
    """The most inputs, 128, 64 or 32, that always share a scale. 0 if 32 do not.

    Args:
      k: inputs.
      groups: of the inputs of an output.
    """
    if groups == 1:
        return TILE
    return next((n for n in (TILE, 64, 32) if k // groups % n == 0), 0)


def load_codes(ref: Ref) -> jax.Array:
    """Reads a tile of codes [64, K] from shared memory into registers."""
    return load(ref, _HELD[bits(ref.dtype)], optimized=True)


def operand(codes: jax.Array, start: int, width: int, zeros: jax.Array | None = None) -> jax.Array:
    """Some inputs of a tile, as the left operand of a product in bfloat16, in the order of `permuted`.

    Args:
      codes: from `load_codes`.
      start, width: the inputs, multiples of 32.
      zeros: float32 zero points of the rows, to be subtracted from integer codes.

    Returns:
      bfloat16 [64, width].
    """
    dtype, rows, four = codes.dtype, codes.shape[0], bits(codes.dtype) == 4
    result = plgpu.ShapeDtypeStruct((rows, width), jnp.bfloat16, layout=WGMMA)
    held = _HELD[bits(dtype)]

    def convert(x: Any, subtracted: Any = None) -> Any:
        import numpy as np
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith, llvm, vector
        from jax.experimental.mosaic.gpu import fragmented_array, utils

        i32, wanted = ir.IntegerType.get_signless(32), fragmented_array.WGMMA_LAYOUT
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty(wanted.registers_shape((rows, width)), dtype=object)
        # The rows of a thread are eight apart. An integer below 256 as float32 has its bfloat16 in its upper half.
        per_row = []
        for row in [] if subtracted is None else subtracted.registers.flatten():
            row = vector.extract(row, [], [0]) if isinstance(row.type, ir.VectorType) else row
            doubled = llvm.inline_asm(i32, [utils.bitcast(row, i32)], "prmt.b32 $0, $1, $1, 0x3232;", "=r,r")
            per_row.append(doubled)
        for at, word in np.ndenumerate(x.registers):
            column = at[1] * (32 if four else 16) - start
            if not 0 <= column < width:
                continue
            word = utils.bitcast(word, i32)
            for p in range(4 if four else 2):
                operands = [arith.shrui(word, utils.c(4 * p, i32)) if four and p else word]
                operands += [per_row[at[4]]] if per_row else []
                code = _to_bfloat16(dtype, p, bool(per_row))
                two: Any = llvm.inline_asm(i32, operands, f"{{ {code} }}", "=r" + ",r" * len(operands))
                registers[(at[0], column // 8 + p, *at[2 : registers.ndim])] = utils.bitcast(two, pair)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=wanted, _is_signed=None)

    if zeros is None:
        run = plgpu.inline_mgpu(arg_types=(held,), return_type=result)(lambda _, x: convert(x))
        return run(codes)
    run = plgpu.inline_mgpu(arg_types=(held, PER_ROW), return_type=result)(lambda _, x, z: convert(x, z))
    # The conversion of int4 has 136 added to each code.
    return run(codes, zeros + 136.0 if four else zeros)


def as_bfloat16(codes: jax.Array) -> jax.Array:
    """A tile of int8 or float8_e4m3fn in bfloat16, where each thread keeps its four neighbours of a row.

    Args:
      codes: from `load_codes`; NaN of float8 count as 480.
    """
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.bfloat16)
    result = plgpu.ShapeDtypeStruct(codes.shape, jnp.bfloat16, layout=_HELD[8])

    @plgpu.inline_mgpu(arg_types=(_HELD[8],), return_type=result)
    def convert(_: Any, x: Any) -> Any:
        import numpy as np
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import llvm
        from jax.experimental.mosaic.gpu import fragmented_array, utils

        i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty_like(x.registers)
        for at, word in np.ndenumerate(x.registers):
            word = utils.bitcast(word, i32)
            pairs: list[Any] = [
                llvm.inline_asm(i32, [word], f"{{ {_to_bfloat16(codes.dtype, p, False)} }}", "=r,r") for p in range(2)
            ]
            registers[at] = utils.vector_concat([utils.bitcast(two, pair) for two in pairs])
        return fragmented_array.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    out: jax.Array = convert(codes)
    return out


def load_column(ref: Ref, row: jax.Array, group: jax.Array) -> jax.Array:
    """Reads one number of each of 64 rows of a matrix in global memory, for `as_float32`.

    Args:
      ref: scales, zero points or minima, [N, G].
      row: the first of the rows.
      group: the column.

    Returns:
      [64] in the dtype of the matrix; of int4 the bytes that hold the numbers, as int32.
    """
    if jnp.dtype(ref.dtype) != jnp.int4:
        return load(ref.at[pl.ds(row, ROWS), group], PER_ROW)

    # No load of Pallas reads single numbers of 4 bits.
    bytes_type = plgpu.ShapeDtypeStruct((ROWS,), jnp.int32, layout=PER_ROW)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), PER_ROW), return_type=bytes_type)
    def load_bytes(_: Any, ref: Any, places: Any) -> Any:
        import numpy as np
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import llvm, vector
        from jax.experimental.mosaic.gpu import fragmented_array, utils

        i32, begin = ir.IntegerType.get_signless(32), utils.memref_ptr(ref)
        code = "{ .reg .u64 at; cvt.u64.u32 at, $2; add.u64 at, at, $1; ld.global.u8 $0, [at]; }"
        registers = np.empty_like(places.registers)
        for at, place in np.ndenumerate(places.registers):
            in_vector = isinstance(place.type, ir.VectorType)
            place = vector.extract(place, [], [0]) if in_vector else place
            # As a side effect it is not moved to where the byte is used, a step later.
            byte: Any = llvm.inline_asm(i32, [begin, place], code, "=r,l,r", has_side_effects=True)
            registers[at] = vector.broadcast(ir.VectorType.get((1,), i32), byte) if in_vector else byte
        return fragmented_array.FragmentedArray(_registers=registers, _layout=places.layout, _is_signed=True)

    out: jax.Array = load_bytes(ref, lax.shift_right_logical(_places(ref, row, group), jnp.int32(1)))
    return out


def as_float32(column: jax.Array, ref: Ref, row: jax.Array, group: jax.Array) -> jax.Array:
    """What `load_column` has read, as float32. The arguments are those of `load_column`, which may be a step ago."""
    if jnp.dtype(ref.dtype) != jnp.int4:
        return column.astype(jnp.float32)
    # Even places are in the lower half of a byte.
    shift = 28 - (_places(ref, row, group) & 1) * 4
    return lax.shift_right_arithmetic(lax.shift_left(column, shift), jnp.full_like(column, 28)).astype(jnp.float32)


def _places(ref: Ref, row: jax.Array, group: jax.Array) -> jax.Array:
    """The places of the numbers of `load_column` in memory."""
    return (plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW) + row) * ref.shape[1] + group


def _to_bfloat16(dtype: jax.typing.DTypeLike, pair: int, subtract: bool) -> str:
    """PTX that converts a pair of the codes in a register to two bfloat16.

    Args:
      dtype: of the codes.
      pair: which of the register; a register of int4 is shifted by it.
      subtract: the last operand is subtracted.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.int4:
        # The word is shifted so that the pair is last in both halves. A code whose sign is flipped is the code plus 8,
        # and in the last bits of 128 it counts as an integer.
        return f"""
            .reg .b32 n, s;
            lop3.b32 n, $1, 0x000F000F, 0x43084308, 0x6a;
            mov.b32 s, {"$2" if subtract else "0x43084308"};
            sub.bf16x2 $0, n, s;"""
    low, high = 2 * pair, 2 * pair + 1
    if dtype == jnp.int8:
        # In the last bits of 128, with the sign in the exponent: 128 plus the lower 7 bits, minus 128 or 256.
        return f"""
            .reg .b32 n, s;
            prmt.b32 n, $1, 0x43, 0x4{high}4{low};
            and.b32 s, n, 0xff80ff80;
            and.b32 n, n, 0xff7fff7f;
            sub.bf16x2 {"n, n, s; sub.bf16x2 $0, n, $2" if subtract else "$0, n, s"};"""
    # Sign, exponent and mantissa at the places of a bfloat16, whose exponent is 120 too small: 0x7b80 is 2^120. The
    # product is exact, for subnormal numbers too.
    return f"""
        .reg .b32 n, s, f;
        prmt.b32 n, $1, 0, 0x{high}4{low}4;
        and.b32 s, n, 0x80008000;
        shr.u32 n, n, 4;
        and.b32 n, n, 0x07f007f0;
        or.b32 n, n, s;
        mov.b32 f, 0x7b807b80;
        mul.bf16x2 $0, n, f;"""


def store_transposed(ref: Ref, x: jax.Array, count_ref: Ref | None = None) -> None:
    """Writes those columns of a tile [64, columns] that exist to global memory [columns, 64].

    Each thread writes its own numbers; eight threads write 32 bytes that follow each other.

    Args:
      ref: global memory.
      x: the tile.
      count_ref: int32 [1] in global memory, how many columns exist; by default those of `ref`.
    """
    if count_ref is None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA))(_store_transposed)(ref, x)
    else:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA, plgpu.RefType()))(_store_transposed)(ref, x, count_ref)


def _store_transposed(_: Any, ref: Any, x: Any, count_ref: Any = None) -> None:
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, memref, vector
    from jax.experimental.mosaic.gpu import utils

    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    exist = ir.MemRefType(ref.type).shape[0] if count_ref is None else 0
    count = utils.c(exist, i32) if count_ref is None else memref.load(count_ref, [utils.c(0, index)])
    thread = arith.remui(utils.thread_idx(), utils.c(128, i32))
    warp, lane = arith.divui(thread, utils.c(32, i32)), arith.remui(thread, utils.c(32, i32))
    row = arith.addi(arith.muli(warp, utils.c(16, i32)), arith.divui(lane, utils.c(4, i32)))
    column = arith.muli(arith.remui(lane, utils.c(4, i32)), utils.c(2, i32))
    # The registers alternate between rows 0 to 7 and rows 8 to 15 of eight columns; each has two columns.
    for at, two in enumerate(x.registers.flatten()):
        first = at // 2 * 8
        at_row = arith.index_cast(index, arith.addi(row, utils.c(at % 2 * 8, i32)))
        for n in range(2):
            at_column = arith.addi(column, utils.c(first + n, i32))

            def put(two: Any = two, n: int = n, at_row: Any = at_row, at_column: Any = at_column) -> None:
                memref.store(vector.extract(two, [], [n]), ref, [arith.index_cast(index, at_column), at_row])

            if first + 8 <= exist:
                put()
            elif first < exist or count_ref is not None:
                with utils.when(arith.cmpi(arith.CmpIPredicate.ult, at_column, count)):
                    put()
