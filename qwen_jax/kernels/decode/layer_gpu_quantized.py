"""One token through a layer with quantised weights on Hopper GPUs: all that lies between two attention steps.

Each product is `quantized_gpu_few`, which adds its partial results in the kernel that follows: a small one that also
adds the residual stream and normalises, or computes SwiGLU, and writes the next input in the order of the codes. No
kernel of XLA lies between, so that all of them overlap: a product reads its first codes, up to all shared memory of the
chip, while the small kernel before it still waits for its own input.

Integer codes whose scales are those of 128 inputs or more are multiplied as integers: the small kernels then write a
vector as digits of 8 bits (`quantized_gpu_digits`).

On a tensor axis the partial results of the output projection and of down are first added over the shards.

The numbers are those of the products and norms one by one, with one exception: the inner vector of the feed-forward
layer is rounded once, after the nonlinearity.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError
from qwen_jax.kernels.decode.layer_gpu_products import add_and_norm, strided, total
from qwen_jax.kernels.gpu.hopper import allow_next_kernel, load, wait_for_previous_kernel
from qwen_jax.kernels.matmul import quantized_gpu, quantized_gpu_few
from qwen_jax.kernels.matmul import quantized_gpu_digits as digits
from qwen_jax.kernels.matmul.quantized_gpu_tiles import ORDERS, Operands, bits, place_in
from qwen_jax.kernels.types import Layout, Ref

UNIT = 128
"""All sizes must be multiples of it: a vector is spread over the threads of a warpgroup."""
_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


class Matrix(NamedTuple):
    """A quantised matrix; see `qwen_jax.quantization.Scheme`.

    Attributes:
      weight: codes [N, K], int4, int8 or float8_e4m3fn.
      scales: [N, G].
      zeros: zero points [N, G] of integer codes.
    """

    weight: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, jax.Array], inputs: int) -> "Matrix":
        """The matrix of a projection.

        Args:
          arrays: of the projection; a bias is left out.
          inputs: of the matrix. The outputs, and inputs that are several axes, are joined.
        """
        weight = arrays["weight"].reshape(-1, inputs)
        found = {name: arrays[name].reshape(weight.shape[0], -1) for name in ("scales", "zeros") if name in arrays}
        return cls(weight, **found)


class Vector(NamedTuple):
    """The input of a product, as `quantized_gpu_tiles.Operands` has it.

    Attributes:
      x: bfloat16 [1, K] in the order of the codes, or digits, int8 [4, K].
      factors: of digits, float32 [K / 128].
    """

    x: jax.Array
    factors: jax.Array | None = None


def supports(matrices: Mapping[str, tuple[int, int, int]], codes: str, scales: str) -> bool:
    """Whether the kernels support the products of a layer.

    Args:
      matrices: for each, outputs, inputs and groups.
      codes, scales: dtypes.
    """
    return all(
        n % UNIT == k % UNIT == 0
        and all(
            quantized_gpu.needs(
                jax.ShapeDtypeStruct((1, k), jnp.bfloat16),
                jax.ShapeDtypeStruct((n, k), codes),
                jax.ShapeDtypeStruct((n, groups), scales),
            ).values()
        )
        for n, k, groups in matrices.values()
    )


@functools.partial(jax.jit, static_argnames=("eps", "axis"))
def layer_tail(
    heads_I: jax.Array,
    stream_D: jax.Array,
    o: Matrix,
    mid_norm_D: jax.Array,
    gate_up: Matrix,
    down: Matrix,
    next_norm_D: jax.Array,
    next_qkv: Matrix | None,
    *,
    eps: float,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """From the output of the heads of one layer to the raw q, k and v of the next one.

    Kernels may begin to read weights while the kernel launched before them still runs, so that one must not write them.

    Args:
      heads_I: bfloat16, the output of all heads, concatenated.
      stream_D: bfloat16, the residual stream before the output of attention is added.
      o, gate_up, down: [D, I], [2 F, D] with all gates first, [D, F].
      mid_norm_D: bfloat16 weight of the norm before the feed-forward layer.
      next_norm_D, next_qkv: the norm and the matrix of q, k and v of the next layer, [N, D]. Without a matrix the layer
        is the last one.
      eps: of the norms.
      axis: mesh axis over which heads, feed-forward layer and q, k and v are split, in a `shard_map`; None if they are
        whole.

    Returns:
      The residual stream after the layer, bfloat16 [D], and bfloat16 [N], or None.

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    _check((heads_I, stream_D, mid_norm_D, next_norm_D), (o, gate_up, down, *([] if next_qkv is None else [next_qkv])))

    def of_all_shards(parts_PD: jax.Array) -> jax.Array:
        return parts_PD if axis is None else lax.psum(parts_PD.sum(axis=0, keepdims=True), axis)

    # The output projection; the residual stream and the norm of the feed-forward layer.
    attended = of_all_shards(product(in_order(heads_I, o), o))
    stream_D, x = add_norm(stream_D, mid_norm_D, gate_up, attended, eps=eps)
    assert x is not None
    # The feed-forward layer; the residual stream and the norm of the next layer.
    inner = swiglu(product(x, gate_up), down)
    stream_D, x = add_norm(stream_D, next_norm_D, next_qkv, of_all_shards(product(inner, down)), eps=eps)
    return stream_D, None if x is None or next_qkv is None else product(x, next_qkv, whole=True)[0]


@functools.partial(jax.jit, static_argnames=("eps",))
def norm_product(stream_D: jax.Array, norm_D: jax.Array, w: Matrix, *, eps: float) -> jax.Array:
    """w times the norm of the stream, bfloat16 [N]: q, k and v of the first layer; arguments as in `layer_tail`."""
    _check((stream_D, norm_D), (w,))
    x = add_norm(stream_D, norm_D, w, eps=eps)[1]
    assert x is not None
    return product(x, w, whole=True)[0]


def _check(vectors: tuple[jax.Array, ...], matrices: tuple[Matrix, ...]) -> None:
    fits = all(x.ndim == 1 and x.dtype == jnp.bfloat16 and x.size % UNIT == 0 for x in vectors)
    for w in matrices:
        (N, K), G = w.weight.shape, w.scales.shape[-1]
        fits = fits and supports({"": (N, K, G)}, w.weight.dtype.name, w.scales.dtype.name)
        fits = fits and w.scales.shape == (N, G) and (w.zeros is None or w.zeros.shape == (N, G))
    if not fits:
        got = ", ".join(f"{x.dtype} {x.shape}" for x in jax.tree.leaves((vectors, matrices)))
        raise InputError(
            "A layer with quantised weights needs bfloat16 vectors and matrices of int4, int8 or float8_e4m3fn whose "
            f"sizes are multiples of {UNIT}; got {got}."
        )


def product(vector: Vector, w: Matrix, whole: bool = False) -> jax.Array:
    """Partial products, float32 [parts, N]; if `whole`, the rounded product, bfloat16 [1, N].

    Args:
      vector: for the matrix.
      w: the matrix.
      whole: that each result is computed by one thread block.
    """
    operands = Operands(vector.x, *w, x_factors=vector.factors)
    return quantized_gpu_few.product(operands, 1, whole=whole, early=True).reshape(-1, w.weight.shape[0])


def _launch(
    name: str, body: Callable[..., None], blocks: int, shapes: list[jax.ShapeDtypeStruct]
) -> Callable[..., Any]:
    """A kernel with one warpgroup in each block."""
    mesh = plgpu.Mesh(grid=(blocks,), grid_names=("block",))
    return pl.kernel(body, out_type=tuple(shapes), mesh=mesh, compiler_params=_PARAMS, name=name)


def _pieces(length: int) -> int:
    """The part of a vector that a thread block takes."""
    return next(n for n in (1024, 512, 256, 128) if length % n == 0)


class _Written:
    """How a kernel writes a vector for a matrix, piece by piece."""

    def __init__(self, w: Matrix | None):
        """Vectors for `w`; None is not written."""
        self.w = w
        self.in_digits = w is not None and digits.supports(w.weight.dtype, w.weight.shape[1], w.scales.shape[1])

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays that hold the vector."""
        if self.w is None:
            return []
        K = self.w.weight.shape[1]
        if not self.in_digits:
            return [jax.ShapeDtypeStruct((K,), jnp.bfloat16)]
        of_digits = jax.ShapeDtypeStruct((digits.DIGITS * K,), jnp.int8)
        return [of_digits, jax.ShapeDtypeStruct((K // digits.TILE,), jnp.float32)]

    def vector(self, arrays: list[jax.Array]) -> Vector | None:
        """The vector in these arrays."""
        if self.w is None:
            return None
        x, *factors = arrays
        return Vector(x.reshape(-1, self.w.weight.shape[1]), *factors)

    def store(self, refs: list[Ref], block: jax.Array, x: jax.Array, layout: Layout) -> None:
        """Writes a piece.

        Args:
          refs: the arrays.
          block: number of the piece; the others have its length.
          x: bfloat16, in registers.
          layout: of the registers.
        """
        if self.w is None:
            return
        (size,), codes, K = x.shape, self.w.weight.dtype, self.w.weight.shape[1]
        first = block * size
        if not self.in_digits:
            store_in_order(refs[0].at[pl.ds(pl.multiple_of(first, UNIT), size)], x, codes, layout)
            return
        pieces = [refs[0].at[pl.ds(pl.multiple_of(first + c * K, digits.TILE), size)] for c in range(digits.DIGITS)]
        factors = refs[1].at[pl.ds(block * (size // digits.TILE), size // digits.TILE)]
        digits.store(pieces, factors, *digits.split(x, layout), codes, layout)


def in_order(x_K: jax.Array, w: Matrix) -> Vector:
    """A bfloat16 vector as the input of a product with w."""
    (K,), written = x_K.shape, _Written(w)
    size = _pieces(K)

    def body(x_ref: Ref, *out_refs: Ref) -> None:
        wait_for_previous_kernel()
        allow_next_kernel()
        block, layout = lax.axis_index("block"), strided(size)
        x = load(x_ref.at[pl.ds(pl.multiple_of(block * size, size), size)], layout)
        written.store(list(out_refs), block, x, layout)

    found = written.vector(_launch("order_of_codes", body, K // size, written.shapes())(x_K))
    assert found is not None
    return found


def swiglu(parts_P2F: jax.Array, w: Matrix) -> Vector:
    """`silu(gate) * up` as the input of a product with w, from partial products, all gates first."""
    P, F, written = parts_P2F.shape[0], parts_P2F.shape[1] // 2, _Written(w)
    size = _pieces(F)

    def body(parts_ref: Ref, *out_refs: Ref) -> None:
        wait_for_previous_kernel()
        allow_next_kernel()
        block, layout = lax.axis_index("block"), strided(size)
        first = pl.multiple_of(block * size, size)

        def summed(begin: int) -> jax.Array:
            places = [pl.ds(pl.multiple_of(p * 2 * F + begin + first, UNIT), size) for p in range(P)]
            return functools.reduce(jnp.add, [load(parts_ref.at[at], layout) for at in places])

        gate, up = summed(0), summed(F)
        inner = (gate / (1 + jnp.exp(-gate)) * up).astype(jnp.bfloat16)
        written.store(list(out_refs), block, inner, layout)

    found = written.vector(_launch("swiglu", body, F // size, written.shapes())(parts_P2F.reshape(-1)))
    assert found is not None
    return found


def add_norm(
    stream_D: jax.Array, norm_D: jax.Array, w: Matrix | None, parts_PD: jax.Array | None = None, *, eps: float
) -> tuple[jax.Array, Vector | None]:
    """The residual stream with a product added, bfloat16 [D], and its RMSNorm as the input of a product with w.

    Args:
      stream_D: the residual stream.
      norm_D: weight of the norm.
      w: the matrix that follows, or None.
      parts_PD: partial products; their sum is rounded before it is added. None adds nothing.
      eps: of the norm.
    """
    (D,), layout, written = stream_D.shape, strided(stream_D.shape[0]), _Written(w)

    def body(stream_ref: Ref, norm_ref: Ref, *refs: Ref) -> None:
        left = list(refs)
        parts_ref = left.pop(0) if parts_PD is not None else None
        stream_out_ref, *out_refs = left
        norm = load(norm_ref, layout)
        wait_for_previous_kernel()
        allow_next_kernel()
        added = total(parts_ref, parts_PD.shape[0], layout) if parts_ref is not None and parts_PD is not None else None
        stream, x = add_and_norm(load(stream_ref, layout), norm, eps, added)
        stream_out_ref[...] = stream
        written.store(out_refs, lax.axis_index("block"), x, layout)

    parts = [] if parts_PD is None else [parts_PD.reshape(-1)]
    shapes = [jax.ShapeDtypeStruct((D,), jnp.bfloat16), *written.shapes()]
    stream_D, *arrays = _launch("add_norm", body, 1, shapes)(stream_D, norm_D, *parts)
    return stream_D, written.vector(arrays)


def store_in_order(ref: Ref, x: jax.Array, codes: jax.typing.DTypeLike, layout: Layout) -> None:
    """Writes a vector to global memory in the order of `quantized_gpu_tiles.permuted`.

    Args:
      ref: bfloat16, of the length of the vector.
      x: bfloat16, in registers.
      codes: dtype of the codes.
      layout: of the registers.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_: Any, ref: Any, x: Any) -> None:
        from jax._src.lib.mlir.dialects import memref

        x.foreach(lambda number, at: memref.store(number, ref, [place_in(ORDERS[bits(codes)], at[0])]))

    store(ref, x)
