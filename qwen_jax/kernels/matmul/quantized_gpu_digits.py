"""A vector as four 8-bit digits, so that the tensor cores of Hopper GPUs multiply integer codes by it as integers.

To multiply int4 codes by a vector in bfloat16, each pair of codes takes three instructions; as 8-bit integers, eight
codes take three, and int8 codes none at all. A product with one row has room for this: the tensor cores multiply eight
columns at least, of which the four digits take four.

A block of the vector is `factor * sum(256**c * digit[c])`. The sums are integers below 2^30, and that of the largest
component is 2^29 at least: each component is off by less than 2^-29 of the largest magnitude of its block, which is
far less than what a sum in float32 rounds. Sums of codes times digits over 128 inputs are exact.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.gpu.tiles import ROWS, WGMMA
from qwen_jax.kernels.matmul.quantized_gpu_tiles import TILE, Order, bits, inputs_at_once, place_in
from qwen_jax.kernels.types import Layout, Ref

DIGITS = 4
OPERAND = plgpu.Layout.WGMMA_8BIT
"""Registers of the left operand of a product of 8-bit integers."""
ORDER: Order = (32, ((4, 8, 4), (4, 2, 1), (2, 1, 16)))
"""`permuted` for int4 codes."""
_MOST = 254
_NAN = 0x7FC00000

ENABLED = True
"""Whether decode steps use digits. Only measurements and tests turn them off."""


def supports(codes: jax.typing.DTypeLike, inputs: int, groups: int) -> bool:
    """Whether a matrix is multiplied by digits: integer codes, and scales that 128 inputs always share."""
    whole = inputs % TILE == 0 and inputs_at_once(inputs, groups) == TILE
    return ENABLED and jnp.issubdtype(codes, jnp.integer) and whole


def permuted(x: jax.Array, codes: jax.typing.DTypeLike) -> jax.Array:
    """Vectors [..., K] with their components in the order in which a product with codes has the inputs.

    Args:
      x: the vectors; K is a multiple of 32.
      codes: dtype of the codes.
    """
    if bits(codes) == 8:
        return x
    # Of 32 inputs, lane t of four holds 8 t to 8 t + 7: the even ones are its four of unit 0 of 16, the odd ones of 1.
    *outer, K = x.shape
    return jnp.moveaxis(x.reshape(*outer, K // 32, 4, 4, 2), -1, -3).reshape(x.shape)


def split(x: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Splits a block of a vector. Runs in a kernel.

    Args:
      x: bfloat16 or float32.
      layout: of its registers.

    Returns:
      int32 words in the shape of x, whose bytes, from the lowest, are the digits; and int32 in the shape of x, all
      equal, the bits of the float32 factor. It is NaN if x is not finite everywhere.
    """

    def everywhere(number: jax.Array) -> jax.Array:
        return plgpu.layout_cast(jnp.full(x.shape, number), layout)

    x = x.astype(jnp.float32)
    # The bits of a magnitude are ordered as it is, and NaN is above all.
    top = jnp.max(lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF)
    exponent = lax.shift_right_logical(top, jnp.int32(23))
    kept = jnp.clip(exponent, 30, _MOST)
    scale = lax.bitcast_convert_type(everywhere(lax.shift_left(283 - kept, jnp.int32(23))), jnp.float32)
    # Balanced digits: a byte of the sum counts 128 too much, but for the last.
    words = ((x * scale).astype(jnp.int32) + 0x808080) ^ 0x808080
    factor = jnp.where(exponent > _MOST, jnp.int32(_NAN), lax.shift_left(kept - 29, jnp.int32(23)))
    return words, everywhere(factor)


def store(
    digit_refs: list[Ref], factors_ref: Ref, words: jax.Array, factor: jax.Array, codes: jax.typing.DTypeLike,
    layout: Layout,
) -> None:  # fmt: skip
    """Writes a block of a vector to global memory, in the order of `permuted`.

    Args:
      digit_refs: int8, for each of the digits, of the length of the block, a multiple of 128.
      factors_ref: float32, one for each 128 inputs of the block, at most 128.
      words, factor: from `split`.
      codes: dtype of the codes of the product.
      layout: of the registers, as from `strided`.
    """

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * (len(digit_refs) + 1), layout, layout))
    def write(_: Any, *args: Any) -> None:
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith, llvm, memref, vector
        from jax.experimental.mosaic.gpu import utils

        *refs, factors, words, factor = args
        i8, i32, index = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.IndexType.get()

        def const(n: int, kind: Any = i32) -> Any:
            return utils.c(n, kind)

        def put(ref: Any, place: Any, numbers: list[Any], byte: int) -> None:
            """Writes a byte of one to four words side by side."""
            packed: Any = None
            for i, word in enumerate(numbers):
                one = arith.shrui(word, const(8 * byte)) if byte else word
                one = arith.shli(arith.andi(one, const(255)), const(8 * i))
                packed = one if packed is None else arith.ori(packed, one)
            width = ir.IntegerType.get_signless(8 * len(numbers))
            packed = packed if width == i32 else arith.trunci(width, packed)
            at = utils.getelementptr(utils.memref_ptr(ref), [arith.index_cast(i32, place)], i8)
            llvm.store(packed, at)

        # A register has one, two, four or eight neighbours. With int4, its even ones go side by side, and so do its odd
        # ones.
        for first, register in zip(words.layout.linear_thread_idxs(), words.registers.flat, strict=True):
            numbers = [vector.extract(register, [], [i]) for i in range(ir.VectorType(register.type).shape[0])]
            if bits(codes) == 4:
                pieces = [
                    (place_in(ORDER, arith.addi(first, const(odd, index))), numbers[odd::2])
                    for odd in range(min(2, len(numbers)))
                ]
            else:
                pieces = [(arith.addi(first, const(n, index)), numbers[n : n + 4]) for n in range(0, len(numbers), 4)]
            for byte, ref in enumerate(refs):
                for place, some in pieces:
                    put(ref, place, some, byte)
        thread = arith.remui(utils.thread_idx(), const(128))
        blocks = ir.MemRefType(factors.type).shape[0]
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, const(blocks))):
            value = arith.bitcast(ir.F32Type.get(), vector.extract(factor.registers.flat[0], [], [0]))
            memref.store(value, factors, [arith.index_cast(index, thread)])

    write(*digit_refs, factors_ref, words, factor)


def operand(codes: jax.Array, start: int) -> jax.Array:
    """128 inputs of a tile of int4 codes, times 16, as the left operand of a product, in the order of `permuted`.

    Args:
      codes: from `quantized_gpu_tiles.load_codes`.
      start: the first of the inputs.

    Returns:
      int8 [64, 128].
    """
    held, shape = plgpu.Layout.WGMMA_UPCAST_4X, (codes.shape[0], TILE)

    @plgpu.inline_mgpu(arg_types=(held,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=OPERAND))
    def convert(_: Any, x: Any) -> Any:
        import numpy as np
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith
        from jax.experimental.mosaic.gpu import fragmented_array, utils

        i32, wanted = ir.IntegerType.get_signless(32), fragmented_array.WGMMA_LAYOUT_8BIT
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        registers = np.empty(wanted.registers_shape(shape), dtype=object)
        for at, word in np.ndenumerate(x.registers):
            column = at[1] * 32 - start
            if not 0 <= column < TILE:
                continue
            word = utils.bitcast(word, i32)
            # A code in the upper half of a byte is 16 times itself, with its sign.
            for p, upper in enumerate((arith.shli(word, utils.c(4, i32)), word)):
                eights = arith.andi(upper, utils.c(-0x0F0F0F10, i32))
                registers[(at[0], column // 16 + p, *at[2 : registers.ndim])] = utils.bitcast(eights, four)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=wanted, _is_signed=True)

    out: jax.Array = convert(codes)
    return out


def ones() -> jax.Array:
    """An operand of ones, int8 [64, 128], in four registers: the compiler must not see that they are equal."""
    shape = (ROWS, TILE)

    @plgpu.inline_mgpu(arg_types=(), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=OPERAND))
    def make(_: Any) -> Any:
        import numpy as np
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import llvm
        from jax.experimental.mosaic.gpu import fragmented_array, utils

        i32, wanted = ir.IntegerType.get_signless(32), fragmented_array.WGMMA_LAYOUT_8BIT
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        some: list[Any] = [
            llvm.inline_asm(i32, [], "mov.b32 $0, 0x01010101;", "=r", has_side_effects=True) for _ in range(4)
        ]
        registers = np.empty(wanted.registers_shape(shape), dtype=object)
        # A product takes four registers: two units of 16 inputs, and within each two rows.
        for n, at in enumerate(np.ndindex(registers.shape)):
            registers[at] = utils.bitcast(some[n % 4], four)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=wanted, _is_signed=True)

    out: jax.Array = make()
    return out


def combined(sums: jax.Array) -> jax.Array:
    """The sums of all digits, in units of the lowest, in each of the columns.

    Args:
      sums: float32 [64, 8] in the WGMMA layout; column c has those of digit c, and those beyond are not used.
    """
    column = plgpu.broadcasted_iota(jnp.int32, sums.shape, 1, layout=WGMMA)
    weight = jnp.zeros_like(sums)
    for c in range(DIGITS):
        weight = jnp.where(column == c, jnp.full_like(sums, 256.0**c), weight)
    total = jnp.sum(sums * weight, axis=1)
    return lax.broadcast_in_dim(total, sums.shape, [0])
