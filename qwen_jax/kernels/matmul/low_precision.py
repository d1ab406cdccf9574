"""Matrix products of training whose operands are rounded to 8 bits.

| products     | operands                                         | one factor for each                           |
|--------------|--------------------------------------------------|-----------------------------------------------|
| "fp8"        | float8_e4m3fn; incoming gradients in float8_e5m2 | tensor, over all devices                      |
| "fp8-blocks" | the same                                         | 128 elements of a token or, for the gradient  |
|              |                                                  | of a weight, of a channel; 128 x 128 of a     |
|              |                                                  | weight                                        |
| "int8"       | int8, but not for the gradient of a weight       | token; output of a weight                     |

With fp8, all three products of a projection have rounded operands (Micikevicius et al. 2022, arXiv:2209.05433):
float8_e5m2 has more exponents and fewer digits than float8_e4m3fn. Before it is rounded, an operand is multiplied by a
power of two, which is exact, such that its largest magnitude comes close to the largest float8. The factor is computed
from the operand itself, in each step anew. The blocks are those of DeepSeek-V3 (arXiv:2412.19437, section 3.3). They
begin at the edge of a device's shard.

With int8, the forward product and the gradient with respect to the activations are as in SwitchBack (Wortsman et al.
2023, arXiv:2304.13013), here with one factor for each output of a weight. The gradient with respect to the weight sums
over tokens, whose gradients differ by orders of magnitude: it multiplies in the compute dtype. A factor makes the
largest magnitude 127. On a mesh a row is a device's part of a row.

On GPUs, XLA computes the products of "fp8" by cuBLASLt in float8. The forward product uses its fast accumulation, in
which Hopper's tensor cores keep some 14 bits of a sum (DeepSeek-V3, section 3.3.2); those of the backward pass move
partial sums to float32 at short intervals. On TPUs, XLA's products use the matrix unit's float8 (from 7x on) and int8
(v5e to v6e). No kernel multiplies blocks: "fp8-blocks" rounds the operands and multiplies them in the compute dtype. It
has the numbers of fp8 and not its speed.

Gradients ignore the rounding: they are those of the plain product, at rounded operands.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from qwen_jax import platform
from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.quantized import quantize_rows
from qwen_jax.kernels.select import log_once
from qwen_jax.kernels.tpu.device import multiplies_codes
from qwen_jax.parallel.collectives import scatter_gradient

Products = Literal["bfloat16", "fp8", "fp8-blocks", "int8"]
"""How projections are multiplied in training; "bfloat16" stands for the compute dtype, whichever it is."""
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""What a step with products of "fp8" needs on a GPU: otherwise XLA takes Triton's products before cuBLASLt's."""
BLOCK = 128
_LEAST_CAPABILITY = (8, 9)
# An operand whose largest magnitude is 0 or tiny is multiplied by no more than 2^63: the product of two scales is then
# a normal float32.
_LARGEST_EXPONENT = 63


def check_devices(products: Products, mesh: Mesh) -> None:
    """Checks that devices can multiply as asked. On CPUs the products are emulated, and a warning says so.

    Args:
      products: of the step.
      mesh: of the devices that the step is compiled for.

    Raises:
      InputError: they cannot.
    """
    if products == "bfloat16":
        return
    device = mesh.devices.flat[0]
    found, has_float8, has_int8 = device.device_kind, False, False
    if device.platform == "cpu":
        log_once(f"products={products!r} are emulated on CPUs: the same numbers, slowly.", logging.WARNING)
        return
    if device.platform == "tpu":
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            has_float8, has_int8 = multiplies_codes(jnp.float8_e4m3fn), multiplies_codes(jnp.int8)
    elif capability := str(getattr(device, "compute_capability", "")):
        # GPUs that are not NVIDIA's have names there.
        version = re.fullmatch(r"(\d+)\.(\d+)", capability)
        found, has_float8 = (
            f"{found}, {capability}",
            version is not None and tuple(map(int, version.groups())) >= _LEAST_CAPABILITY,
        )
    if not (has_int8 if products == "int8" else has_float8):
        needs = (
            "a TPU v5e, v5p or v6e" if products == "int8" else "a GPU of compute capability 8.9 or later, or a TPU 7x"
        )
        other = "int8" if has_int8 else "fp8" if has_float8 else "bfloat16"
        raise InputError(f"products={products!r} need {needs} (found {found}). Use products={other!r}.")
    if products == "fp8-blocks":
        log_once("products='fp8-blocks' have no kernel: rounded to fp8, multiplied in bfloat16.", logging.WARNING)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the operands of a product lie on a mesh.

    Attributes:
      x_axes, w_axes, y_axes: mesh axes that shard the activations, the weight, and the result once it is summed.
      gathered: axis of the weight [N, K] that is sharded over `fsdp`, and gathered for the product.
    """

    x_axes: tuple[str, ...]
    w_axes: tuple[str, ...]
    y_axes: tuple[str, ...]
    gathered: int


class Rounded(NamedTuple):
    """An array in float8, `codes * scale`.

    Attributes:
      codes: float8.
      scale: float32, broadcast to the codes: a power of two, or NaN where the values are not all finite.
    """

    codes: jax.Array
    scale: jax.Array


def round_scaled(
    x: jax.Array, dtype: jax.typing.DTypeLike, axes: Sequence[int] | None = None, mesh_axes: tuple[str, ...] = ()
) -> Rounded:
    """Rounds to float8 after multiplication by the largest power of two with which nothing overflows.

    Args:
      x: any float dtype.
      dtype: float8_e4m3fn or float8_e5m2.
      axes: of x that share a factor; all by default.
      mesh_axes: of the mesh over which a factor is shared, inside `jax.shard_map`.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=axes is not None)
    if mesh_axes:
        # A maximum over devices may leave NaN out, but not infinity.
        largest = lax.pmax(jnp.where(jnp.isnan(largest), jnp.inf, largest), mesh_axes)
    # largest = (1 + fraction / 2^23) 2^exponent, and the largest float8 = (1 + 3/4) 2^top in both formats.
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    exponent, fraction = (bits >> 23) - 127, bits & 0x7FFFFF
    top = math.frexp(float(jnp.finfo(dtype).max))[1] - 1
    shift = jnp.minimum(top - exponent - (fraction > 0x600000), _LARGEST_EXPONENT)
    codes = (wide * _power_of_two(shift)).astype(dtype)
    return Rounded(codes, jnp.where(jnp.isfinite(largest), _power_of_two(-shift), jnp.nan))


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent in float32, exact for int32 exponents from -126 to 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def round_blocks(x: jax.Array, dtype: jax.typing.DTypeLike, block: tuple[int, ...]) -> jax.Array:
    """Values rounded to float8 in blocks, each with its own factor; in the dtype of x.

    Args:
      x: bfloat16 or float32, which hold the rounded values exactly.
      dtype: as for `round_scaled`.
      block: its size along each axis of x. Blocks at the end of an axis may be smaller.
    """
    padded = jnp.pad(x, [(0, -n % size) for n, size in zip(x.shape, block, strict=True)])
    cut = padded.reshape([part for n, size in zip(padded.shape, block, strict=True) for part in (n // size, size)])
    codes, scale = round_scaled(cut, dtype, axes=range(1, cut.ndim, 2))
    values = (codes.astype(jnp.float32) * scale).astype(x.dtype).reshape(padded.shape)
    return values[tuple(map(slice, x.shape))]


def matmul(x_BTK: jax.Array, w_NK: jax.Array, products: Products, layout: Layout) -> jax.Array:
    """The product x W^T of rounded operands, on one device's shards inside `jax.shard_map`.

    Args:
      x_BTK: activations, bfloat16 or float32.
      w_NK: one device's shard of the weight, in the dtype of x.
      products: "fp8", "fp8-blocks" or "int8".
      layout: of all operands.

    Returns:
      [B, T, N] in the dtype of x, a partial sum where a mesh axis shards K.
    """
    # Both vary over the same mesh axes here, and so do their gradients, which are summed where an operand did not vary.
    both = {*layout.x_axes, *layout.w_axes}
    x_BTK = lax.pcast(x_BTK, tuple(sorted(both - {*layout.x_axes})), to="varying")
    w_NK = lax.pcast(w_NK, tuple(sorted(both - {*layout.w_axes})), to="varying")
    multiply = {"fp8": _tensor_product, "fp8-blocks": _block_product, "int8": _int8_product}[products]
    return multiply(layout, x_BTK, w_NK)


_E4M3, _E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


# One scale for each tensor.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tensor_product(layout: Layout, x_BTK: jax.Array, w_NK: jax.Array) -> jax.Array:
    return _tensor_forward(layout, x_BTK, w_NK)[0]


def _tensor_forward(layout: Layout, x_BTK: jax.Array, w_NK: jax.Array) -> tuple[jax.Array, tuple[Rounded, Rounded]]:
    x = round_scaled(x_BTK, _E4M3, mesh_axes=layout.x_axes)
    shard = round_scaled(w_NK, _E4M3, mesh_axes=layout.w_axes)
    # Codes are gathered, which are half as large as bfloat16.
    w = shard._replace(codes=lax.all_gather(shard.codes, "fsdp", axis=layout.gathered, tiled=True))
    return _scaled_product("BTK,NK->BTN", x, w, x_BTK.dtype), (x, w)


def _tensor_backward(layout: Layout, kept: tuple[Rounded, Rounded], dy_BTN: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, w), dtype = kept, dy_BTN.dtype
    dy = round_scaled(dy_BTN, _E5M2, mesh_axes=layout.y_axes)
    dx_BTK = _scaled_product("BTN,NK->BTK", dy, w, dtype, exact=True)
    dw_NK = _scaled_product("BTN,BTK->NK", dy, x, dtype, exact=True)
    return dx_BTK, scatter_gradient(dw_NK, layout.gathered, "fsdp")


_tensor_product.defvjp(_tensor_forward, _tensor_backward)


def _scaled_product(
    subscripts: str, a: Rounded, b: Rounded, dtype: jax.typing.DTypeLike, exact: bool = False
) -> jax.Array:
    """An einsum of arrays with one scale each. XLA moves the scales into the product (cuBLASLt's scales of A and B).

    Args:
      subscripts: of the einsum, where the operands share all letters that the result lacks.
      a, b: the operands; their float8 dtypes may differ.
      dtype: of the result.
      exact: without cuBLASLt's fast accumulation.
    """
    letters, out = subscripts.split("->")
    left, right = letters.split(",")
    contracted = [letter for letter in left if letter not in out]
    dims = [left.index(c) for c in contracted], [right.index(c) for c in contracted]
    if platform.platform() == "cpu":
        # XLA:CPU multiplies no float8. Wider, they give the same numbers.
        a, b = (x._replace(codes=x.codes.astype(jnp.float32)) for x in (a, b))
        sums = lax.dot_general(a.codes, b.codes, (dims, ([], [])), preferred_element_type=jnp.float32)
        return (sums * (a.scale * b.scale)).astype(dtype)
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    sums = lax.dot_general(a.codes, b.codes, (dims, ([], [])), precision=precision, preferred_element_type=dtype)
    return sums * (a.scale * b.scale).astype(dtype)


# One scale for each block.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_product(layout: Layout, x_BTK: jax.Array, w_NK: jax.Array) -> jax.Array:
    return _block_forward(layout, x_BTK, w_NK)[0]


def _block_forward(layout: Layout, x_BTK: jax.Array, w_NK: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    gathered = lax.all_gather(w_NK, "fsdp", axis=layout.gathered, tiled=True)
    w = round_blocks(gathered, _E4M3, (BLOCK, BLOCK))
    y = jnp.einsum("BTK,NK->BTN", round_blocks(x_BTK, _E4M3, (1, 1, BLOCK)), w)
    return y, (x_BTK, w)


def _block_backward(
    layout: Layout, kept: tuple[jax.Array, jax.Array], dy_BTN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BTK, w_NK = kept
    # A product sums over one axis of its operands, along which their blocks lie.
    dx_BTK = jnp.einsum("BTN,NK->BTK", round_blocks(dy_BTN, _E5M2, (1, 1, BLOCK)), w_NK)
    along_tokens = 1, BLOCK, 1
    dy, x = round_blocks(dy_BTN, _E5M2, along_tokens), round_blocks(x_BTK, _E4M3, along_tokens)
    return dx_BTK, scatter_gradient(jnp.einsum("BTN,BTK->NK", dy, x), layout.gathered, "fsdp")


_block_product.defvjp(_block_forward, _block_backward)


# One scale for each row, in int8.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _int8_product(layout: Layout, x_BTK: jax.Array, w_NK: jax.Array) -> jax.Array:
    return _int8_forward(layout, x_BTK, w_NK)[0]


def _int8_forward(layout: Layout, x_BTK: jax.Array, w_NK: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x_BTK8, scale_BT1 = quantize_rows(x_BTK, jnp.int8)
    # Codes are gathered. Where `fsdp` shards the inputs, its devices have one scale for each output.
    shard_NK8, scale_N1 = quantize_rows(w_NK, jnp.int8, "fsdp" if layout.gathered == 1 else None)
    w_NK8 = lax.all_gather(shard_NK8, "fsdp", axis=layout.gathered, tiled=True)
    if layout.gathered == 0:
        scale_N1 = lax.all_gather(scale_N1, "fsdp", axis=0, tiled=True)
    y_BTN = jnp.einsum("BTK,NK->BTN", x_BTK8, w_NK8, preferred_element_type=jnp.int32)
    return (y_BTN * scale_BT1 * scale_N1[:, 0]).astype(x_BTK.dtype), (x_BTK8, scale_BT1, w_NK8, scale_N1[:, 0])


def _int8_backward(layout: Layout, kept: tuple[jax.Array, ...], dy_BTN: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x_BTK8, scale_BT1, w_NK8, scale_N), dtype = kept, dy_BTN.dtype
    # A scale along the axis that a product sums over is multiplied into the gradient, before this is rounded.
    dy_BTN8, dy_scale_BT1 = quantize_rows(dy_BTN * scale_N, jnp.int8)
    dx_BTK = jnp.einsum("BTN,NK->BTK", dy_BTN8, w_NK8, preferred_element_type=jnp.int32) * dy_scale_BT1
    dw_NK = jnp.einsum("BTN,BTK->NK", (dy_BTN * scale_BT1).astype(dtype), x_BTK8.astype(dtype))
    return dx_BTK.astype(dtype), scatter_gradient(dw_NK, layout.gathered, "fsdp")


_int8_product.defvjp(_int8_forward, _int8_backward)
