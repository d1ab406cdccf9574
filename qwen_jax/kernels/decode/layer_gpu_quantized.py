"""One token through a layer with quantised weights on Hopper GPUs: all that lies between two attention steps.

Each product is `quantized_gpu_few`, which adds its partial results in the kernel that follows: a small one that also
adds the residual stream and normalises, or computes SwiGLU, and writes the next input in the order of the codes. No
kernel of XLA lies between, so that all of them overlap: a product reads its first codes, up to all shared memory of the
chip, while the small kernel before it still waits for its own input.

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
from qwen_jax.kernels.matmul.quantized_gpu_tiles import Operands, bits
from qwen_jax.kernels.types import Layout, Ref

UNIT = 128
"""All sizes must be multiples of it: a vector is spread over the threads of a warpgroup."""
ORDERS = {4: (32, ((4, 8, 2), (2, 4, 1), (4, 1, 8))), 8: (16, ((2, 8, 2), (2, 4, 4), (2, 2, 8), (2, 1, 1)))}
"""`quantized_gpu_tiles.permuted` by the bits of a code: the inputs of a unit, and the digits of an input's number in
it, each with its size, its stride, and its stride in the order of the codes."""
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


@functools.partial(jax.jit, static_argnames=("eps",))
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

    Returns:
      The residual stream after the layer, bfloat16 [D], and bfloat16 [N], or None.

    Raises:
      InputError: shapes or dtypes that are not supported.
    """
    _check((heads_I, stream_D, mid_norm_D, next_norm_D), (o, gate_up, down, *([] if next_qkv is None else [next_qkv])))
    # The output projection; the residual stream and the norm of the feed-forward layer.
    attended = _product(in_order(heads_I, o.weight.dtype), o)
    stream_D, x_D = add_norm(stream_D, mid_norm_D, gate_up.weight.dtype, attended, eps=eps)
    # The feed-forward layer; the residual stream and the norm of the next layer.
    inner_F = swiglu(_product(x_D, gate_up), down.weight.dtype)
    codes = down.weight.dtype if next_qkv is None else next_qkv.weight.dtype
    stream_D, x_D = add_norm(stream_D, next_norm_D, codes, _product(inner_F, down), eps=eps)
    return stream_D, None if next_qkv is None else _product(x_D, next_qkv, whole=True)[0]


@functools.partial(jax.jit, static_argnames=("eps",))
def norm_product(stream_D: jax.Array, norm_D: jax.Array, w: Matrix, *, eps: float) -> jax.Array:
    """w times the norm of the stream, bfloat16 [N]: q, k and v of the first layer; arguments as in `layer_tail`."""
    _check((stream_D, norm_D), (w,))
    return _product(add_norm(stream_D, norm_D, w.weight.dtype, eps=eps)[1], w, whole=True)[0]


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


def _product(x_K: jax.Array, w: Matrix, whole: bool = False) -> jax.Array:
    """Partial products, float32 [parts, N]; if `whole`, the rounded product, bfloat16 [1, N].

    Args:
      x_K: in the order of the codes.
      w: the matrix.
      whole: that each result is computed by one thread block.
    """
    parts = quantized_gpu_few.product(Operands(x_K[None], *w), 1, whole=whole, early=True)
    return parts.reshape(-1, w.weight.shape[0])


def _launch(name: str, body: Callable[..., None], blocks: int, *shapes: tuple[int, ...]) -> Callable[..., Any]:
    """A kernel with one warpgroup in each block and bfloat16 results."""
    return pl.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes),
        mesh=plgpu.Mesh(grid=(blocks,), grid_names=("block",)),
        compiler_params=_PARAMS,
        name=name,
    )


def _pieces(length: int) -> int:
    """The part of a vector that a thread block takes."""
    return next(n for n in (1024, 512, 256, 128) if length % n == 0)


def in_order(x_K: jax.Array, codes: jax.typing.DTypeLike) -> jax.Array:
    """A bfloat16 vector in the order in which a product with codes of a dtype has its inputs."""
    (K,) = x_K.shape
    size = _pieces(K)

    def body(x_ref: Ref, out_ref: Ref) -> None:
        wait_for_previous_kernel()
        allow_next_kernel()
        at = pl.ds(pl.multiple_of(lax.axis_index("block") * size, size), size)
        store_in_order(out_ref.at[at], load(x_ref.at[at], strided(size)), codes, strided(size))

    out: jax.Array = _launch("order_of_codes", body, K // size, (K,))(x_K)[0]
    return out


def swiglu(parts_P2F: jax.Array, codes: jax.typing.DTypeLike) -> jax.Array:
    """`silu(gate) * up`, bfloat16 [F], in the order of codes of a dtype, from partial products, all gates first."""
    P, F = parts_P2F.shape[0], parts_P2F.shape[1] // 2
    size = _pieces(F)

    def body(parts_ref: Ref, out_ref: Ref) -> None:
        wait_for_previous_kernel()
        allow_next_kernel()
        first, layout = pl.multiple_of(lax.axis_index("block") * size, size), strided(size)

        def summed(begin: int) -> jax.Array:
            places = [pl.ds(pl.multiple_of(p * 2 * F + begin + first, UNIT), size) for p in range(P)]
            return functools.reduce(jnp.add, [load(parts_ref.at[at], layout) for at in places])

        gate, up = summed(0), summed(F)
        inner = (gate / (1 + jnp.exp(-gate)) * up).astype(jnp.bfloat16)
        store_in_order(out_ref.at[pl.ds(first, size)], inner, codes, layout)

    out: jax.Array = _launch("swiglu", body, F // size, (F,))(parts_P2F.reshape(-1))[0]
    return out


def add_norm(
    stream_D: jax.Array,
    norm_D: jax.Array,
    codes: jax.typing.DTypeLike,
    parts_PD: jax.Array | None = None,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with a product added, and its RMSNorm in the order of codes of a dtype; bfloat16 [D] each.

    Args:
      stream_D: the residual stream.
      norm_D: weight of the norm.
      codes: dtype of the matrix that follows.
      parts_PD: partial products; their sum is rounded before it is added. None adds nothing.
      eps: of the norm.
    """
    (D,), layout = stream_D.shape, strided(stream_D.shape[0])

    def body(stream_ref: Ref, norm_ref: Ref, *refs: Ref) -> None:
        *parts_refs, stream_out_ref, x_out_ref = refs
        norm = load(norm_ref, layout)
        wait_for_previous_kernel()
        allow_next_kernel()
        added = total(parts_refs[0], parts_PD.shape[0], layout) if parts_PD is not None else None
        stream, x = add_and_norm(load(stream_ref, layout), norm, eps, added)
        stream_out_ref[...] = stream
        store_in_order(x_out_ref, x, codes, layout)

    parts = [] if parts_PD is None else [parts_PD.reshape(-1)]
    stream_D, x_D = _launch("add_norm", body, 1, (D,), (D,))(stream_D, norm_D, *parts)
    return stream_D, x_D


def store_in_order(ref: Ref, x: jax.Array, codes: jax.typing.DTypeLike, layout: Layout) -> None:
    """Writes a vector to global memory in the order of `quantized_gpu_tiles.permuted`.

    Args:
      ref: bfloat16, of the length of the vector.
      x: bfloat16, in registers.
      codes: dtype of the codes.
      layout: of the registers.
    """
    unit, digits = ORDERS[bits(codes)]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_: Any, ref: Any, x: Any) -> None:
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith, memref
        from jax.experimental.mosaic.gpu import utils

        def const(n: int) -> Any:
            return utils.c(n, ir.IndexType.get())

        def put(number: Any, at: tuple[Any, ...]) -> None:
            place = arith.muli(arith.divui(at[0], const(unit)), const(unit))
            for size, here, there in digits:
                digit = arith.remui(arith.divui(at[0], const(here)), const(size))
                place = arith.addi(place, arith.muli(digit, const(there)))
            memref.store(number, ref, [place])

        x.foreach(put)

    store(ref, x)
