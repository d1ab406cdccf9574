"""Linear maps with sharded weights, the embedding, and RMSNorm: the parts that hold the dense model's parameters."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.kernels.matmul import few_rows
from qwen_jax.parallel.collectives import all_gather_weight, look_up
from qwen_jax.parallel.sharding import Sharding, gathered


def initializers(config: ModelConfig) -> tuple[nnx.Initializer, nnx.Initializer]:
    """Initialisers of matrices, and of the matrices that write to the residual stream.

    The latter start smaller, so that the stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    std = config.initializer_range
    return nnx.initializers.normal(std), nnx.initializers.normal(std / (2 * config.num_layers) ** 0.5)


class Weight(nnx.Module):
    """A weight, perhaps a bias, and the PartitionSpecs that they are stored with."""

    def __init__(self, weight: jax.Array, spec: P, bias: jax.Array | None = None, bias_spec: P | None = None):
        self.weight = nnx.Param(weight, spec=spec)
        if bias is not None:
            self.bias = nnx.Param(bias, spec=bias_spec)


class Linear(Weight):
    """An einsum of activations with a weight: `y = einsum(x, weight) + bias`, in the dtype of x.

    The weight keeps PyTorch's orientation: dimensions of the output come before those of the input. It is stored
    sharded over `fsdp`, perhaps also over `tensor`, and gathered over `fsdp` where it is used; its gradient is
    reduce-scattered. Where `tensor` shards an input dimension, the results of its shards are summed.
    """

    def __init__(
        self,
        einsum: str,
        weight: jax.Array,
        *,
        x: P,
        w: P,
        out: P,
        bias: jax.Array | None = None,
        bias_spec: P | None = None,
    ):
        """Creates the parameters.

        Args:
          einsum: such as "BTD,FD->BTF".
          weight: initial weight.
          x, w, out: PartitionSpecs of the activations, the stored weight and the result.
          bias, bias_spec: initial bias, in the shape of the output dimensions, and its PartitionSpec.
        """
        super().__init__(weight, w, bias, bias_spec)
        self.einsum, self.x, self.w, self.out = einsum, x, w, out

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product, plus the bias if there is one."""
        y = self.product(x)
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y

    def product(self, x: jax.Array) -> jax.Array:
        """The product without the bias. Few rows are multiplied by a kernel of their own where that is faster."""
        einsum, x_spec, w_spec = self.einsum, self.x, self.w
        inputs, out = einsum.split("->")
        letters, mesh = inputs.split(",")[1], jax.sharding.get_abstract_mesh()
        tensor_axis = letters[w_spec.index("tensor")] if "tensor" in w_spec else ""
        sums = bool(tensor_axis) and tensor_axis not in out
        # Rows, outputs and inputs on one device decide about the kernel.
        sizes = {letter: size for letter, size in zip(letters, self.weight.shape, strict=True)}
        if tensor_axis:
            sizes[tensor_axis] //= mesh.shape["tensor"]
        rows = x.shape[0] // math.prod(mesh.shape[axis] for axis in x_spec[0])
        outputs = math.prod(size for letter, size in sizes.items() if letter in out)
        contracted = math.prod(size for letter, size in sizes.items() if letter not in out)
        by_kernel = few_rows.supports(rows, x.shape[1], x.dtype, outputs, contracted)

        @jax.shard_map(in_specs=(x_spec, w_spec), out_specs=self.out, check_vma=not by_kernel)
        def local(x: jax.Array, w: jax.Array) -> jax.Array:
            w = all_gather_weight(w, w_spec.index("fsdp"))
            y = few_rows.einsum(einsum, x, w) if by_kernel else jnp.einsum(einsum, x, w)
            return (lax.psum(y, "tensor") if sums else y).astype(x.dtype)

        y: jax.Array = local(x, self.weight[...].astype(x.dtype))
        return y


class Embedding(Weight):
    """The table of token embeddings, or an output head of the same shape; sharded over the vocabulary."""

    def __init__(self, weight_VD: jax.Array, sharding: Sharding):
        super().__init__(weight_VD, sharding.vocab)
        self.sharding = sharding

    def __call__(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The rows of int32 token ids, [B, T, D] in `dtype`."""
        return look_up(self.weight[...], tokens_BT, dtype, self.sharding)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 products of hidden states with every row, [B, T, V]."""
        w_VD = jax.reshard(self.weight[...].astype(x_BTD.dtype), gathered(self.sharding.vocab))
        return einsum_f32("BTD,VD->BTV", x_BTD, w_VD, self.sharding.logits)


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467) of the last axis, with Hugging Face's casts.

    Args:
      x: [..., D]; the result has its dtype.
      weight_D: multiplies the normalised values, which are rounded to the dtype of x first.
      eps: added to the mean square.
    """
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight_D.astype(x.dtype)


class RMSNorm(Weight):
    """`rms_norm` with its weight."""

    def __init__(self, size: int, eps: float, spec: P):
        super().__init__(jnp.ones((size,)), spec)
        self.eps = eps

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.weight[...], self.eps)
