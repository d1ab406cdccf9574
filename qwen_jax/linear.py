"""Weights that multiply activations, and the norm."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.kernels import on_mesh
from qwen_jax.parallel.collectives import gather


class Projection(nnx.Module):
    """A weight and perhaps a bias; whoever holds it knows the einsum."""

    def __init__(self, weight: jax.Array, bias: jax.Array | None = None):
        self.weight = nnx.Param(weight)
        if bias is not None:
            self.bias = nnx.Param(bias)


def product(subscripts: str, x: jax.Array, w: jax.Array, x_spec: P, w_spec: P, out_spec: P) -> jax.Array:
    """An einsum of activations with a weight, by the kernel for a few rows where `on_mesh.takes` says so.

    Args:
      subscripts: such as "BTD,FD->BTF"; the weight's outputs come first, then its inputs, as they do in x.
      x: activations.
      w: weight, split over `fsdp` along an axis of its own, and perhaps over `tensor`.
      x_spec, w_spec, out_spec: where they lie.

    Returns:
      The result in x's dtype, summed over `tensor` where that splits a contracted axis.
    """
    inputs, out = subscripts.split("->")
    letters = inputs.split(",")[1]
    split = letters[w_spec.index("tensor")] if "tensor" in w_spec else ""
    sums = bool(split) and split not in out
    mesh = jax.sharding.get_abstract_mesh()
    outputs, contracted = (
        math.prod(size for letter, size in zip(letters, w.shape, strict=True) if (letter in out) == kept)
        // (mesh.shape["tensor"] if split and (split in out) == kept else 1)
        for kept in (True, False)
    )
    by_kernel = on_mesh.takes(x, math.prod(mesh.shape[axis] for axis in x_spec[0]), outputs, contracted)

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        w = gather(w, w_spec.index("fsdp"))
        y = on_mesh.few_rows(subscripts, x, w) if by_kernel else jnp.einsum(subscripts, x, w)
        return (lax.psum(y, "tensor") if sums else y).astype(x.dtype)

    run = jax.shard_map(local, in_specs=(x_spec, w_spec), out_specs=out_spec, check_vma=not by_kernel)
    result: jax.Array = run(x, w.astype(x.dtype))
    return result


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467) of the last axis, cast as Hugging Face casts.

    Args:
      x: [..., D]; the result is in its dtype.
      weight_D: multiplies the normalised values, which are rounded first.
      eps: added to the mean square.
    """
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight_D.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` and its weight."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((size,)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.weight[...], self.eps)
