"""Linear maps with sharded weights, the embedding, and RMSNorm: the parts that hold the dense model's parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels.einsum import einsum_f32
from qwen_jax.kernels.matmul import few_rows, low_precision
from qwen_jax.lora import LoRA
from qwen_jax.parallel.collectives import all_gather_weight, look_up
from qwen_jax.parallel.sharding import Sharding, gathered, mesh_axes


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


class LocalProduct(NamedTuple):
    """How one device multiplies its shards.

    Attributes:
      operands: the arrays that belong to the weight, of all devices.
      specs: their PartitionSpecs.
      multiply: of one device's activations and operands; its result may be a partial sum, in float32 or rounded.
      by_kernel: whether a kernel computes it, whose variance over mesh axes is not known.
    """

    operands: Any
    specs: Any
    multiply: Callable[[jax.Array, Any], jax.Array]
    by_kernel: bool


class Linear(Weight):
    """An einsum of activations with a weight: `y = einsum(x, weight) + bias`, in the dtype of x.

    The weight keeps PyTorch's orientation: dimensions of the output come before those of the input. It is stored
    sharded over `fsdp`, perhaps also over `tensor`, and gathered over `fsdp` where it is used; its gradient is
    reduce-scattered. Where `tensor` shards an input dimension, the results of its shards are summed.

    With LoRA (`add_lora`), `scale (x A^T) B^T` is added, perhaps with dropout on this x. A has the weight's input
    dimensions and their sharding, B its output dimensions. With several adapters (`add_adapters`), A and B are those of
    all of them, and a mask keeps the elements of x A^T that belong to a row's own adapter.

    `products` is how x and the weight are multiplied in training; see `qwen_jax.kernels.matmul.low_precision`.
    """

    products: low_precision.Products = "bfloat16"

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
        self.lora_scale = self.lora_dropout = 0.0

    def add_lora(self, lora: LoRA, key: jax.Array, dropout: bool = False) -> None:
        """Creates A, uniform in +-1/sqrt(inputs) as PEFT initialises it (Kaiming's with a = sqrt(5)), and B = 0.

        Args:
          lora: its settings.
          key: a PRNG key, for A.
          dropout: whether its dropout is on; then there is a seed, uint32.
        """

        def uniform(shape: tuple[int, ...]) -> jax.Array:
            bound = math.prod(shape[1:]) ** -0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        self._add_factors(lora.rank, uniform, lora.scale)
        if dropout and lora.dropout:
            self.lora_dropout = lora.dropout
            self.lora_seed = nnx.Param(jnp.zeros((), jnp.uint32), spec=P())

    def add_adapters(self, ranks: int) -> None:
        """Creates A and B of several adapters, zero, and the mask, bool [B, T or 1, ranks].

        Args:
          ranks: the sum of the adapters' ranks.
        """
        self._add_factors(ranks, jnp.zeros, 1.0)
        self.lora_mask = nnx.Param(jnp.zeros((1, 1, ranks), bool), spec=P(self.x[0], None, None))

    def _add_factors(self, rank: int, make_a: Callable[[tuple[int, ...]], jax.Array], scale: float) -> None:
        letters, shape, out = self.einsum.split("->")[0].split(",")[1], self.weight.shape, self.einsum.split("->")[1]
        dims = list(zip(letters, shape, self.w, strict=True))
        inputs = [(size, axis) for letter, size, axis in dims if letter not in out]
        outputs = [(size, axis) for letter, size, axis in dims if letter in out]
        a_shape, b_shape = (rank, *(n for n, _ in inputs)), (*(n for n, _ in outputs), rank)
        self.lora_a = nnx.Param(make_a(a_shape), spec=P(None, *(axis for _, axis in inputs)))
        self.lora_b = nnx.Param(jnp.zeros(b_shape), spec=P(*(axis for _, axis in outputs), None))
        self.lora_scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """The product, plus the bias if there is one."""
        y = self.product(x)
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y

    def product(self, x: jax.Array) -> jax.Array:
        """The product without the bias."""
        einsum, x_spec, w_spec = self.einsum, self.x, self.w
        inputs, out = einsum.split("->")
        letters = inputs.split(",")[1]
        sums = "tensor" in w_spec and letters[w_spec.index("tensor")] not in out
        operands, operand_specs, multiply, by_kernel = self._local_product(x)
        # A and B of LoRA: their weights, PartitionSpecs and letters. The mask chooses each row's adapter.
        lora: tuple[jax.Array, ...] = ()
        lora_specs: tuple[P, ...] = ()
        mask: jax.Array | None = self.lora_mask[...] if hasattr(self, "lora_mask") else None
        mask_spec = None if mask is None else P(x_spec[0], None, None)
        if self.lora_scale:
            entries = dict(zip(letters, w_spec, strict=True))
            a, b = "".join(c for c in letters if c not in out), "".join(c for c in letters if c in out)
            lora = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
            lora_specs = P(None, *(entries[c] for c in a)), P(*(entries[c] for c in b), None)
            x_letters = inputs.split(",")[0]
            hidden = "".join(c for c in x_letters if c not in a) + "r"
            products = f"{x_letters},r{a}->{hidden}", f"{hidden},{b}r->{out}"

        dropped = self._dropped(x) if self.lora_dropout else None
        specs = x_spec, operand_specs, lora_specs, mask_spec, None if dropped is None else x_spec

        @jax.shard_map(in_specs=specs, out_specs=self.out, check_vma=not by_kernel)
        def local(
            x: jax.Array,
            operands: Any,
            lora: tuple[jax.Array, ...],
            mask: jax.Array | None,
            dropped: jax.Array | None,
        ) -> jax.Array:
            y = multiply(x, operands)
            if lora:
                a, b = (
                    all_gather_weight(matrix, spec.index("fsdp")) if "fsdp" in spec else matrix
                    for spec, matrix in zip(lora_specs, lora, strict=True)
                )
                h = jnp.einsum(products[0], x if dropped is None else dropped, a)
                h = h if mask is None else jnp.where(mask, h, 0)
                y = y + self.lora_scale * jnp.einsum(products[1], h, b)
            return (lax.psum(y, "tensor") if sums else y).astype(x.dtype)

        y: jax.Array = local(x, operands, lora, mask, dropped)
        return y

    def _local_product(self, x: jax.Array) -> LocalProduct:
        """The product of one device's shards. Few rows are multiplied by a kernel of their own where that is faster.

        Args:
          x: the activations, of all devices.
        """
        einsum, spec = self.einsum, self.w
        if self.products != "bfloat16":
            return LocalProduct(self.weight[...].astype(x.dtype), spec, self._low_precision_product, by_kernel=False)
        by_kernel = few_rows.supports(*self._rows(x), x.dtype, *self._local_sizes())

        def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
            w = all_gather_weight(w, spec.index("fsdp"))
            return few_rows.einsum(einsum, x, w) if by_kernel else jnp.einsum(einsum, x, w)

        return LocalProduct(self.weight[...].astype(x.dtype), spec, multiply, by_kernel)

    def _low_precision_product(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product of one device's shards with operands rounded to 8 bits."""
        outputs = len(self.out) - 2
        axes = mesh_axes(self.x), mesh_axes(self.w), mesh_axes(self.out)
        layout = low_precision.Layout(*axes, gathered=0 if self.w.index("fsdp") < outputs else 1)
        x_BTK, w_NK = x.reshape(*x.shape[:2], -1), w.reshape(math.prod(w.shape[:outputs]), -1)
        y_BTN = low_precision.matmul(x_BTK, w_NK, self.products, layout)
        # Of several output dimensions, `fsdp` shards none.
        return y_BTN.reshape(*x.shape[:2], -1, *w.shape[1:outputs])

    def _rows(self, x: jax.Array) -> tuple[int, int]:
        """Rows of activations on one device, and tokens of each."""
        mesh = jax.sharding.get_abstract_mesh()
        return x.shape[0] // math.prod(mesh.shape[axis] for axis in self.x[0]), x.shape[1]

    def _local_sizes(self) -> tuple[int, int]:
        """Outputs and inputs of one device's shard of the weight, when it is gathered over `fsdp`."""
        inputs, out = self.einsum.split("->")
        tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
        outputs = contracted = 1
        for letter, size, axis in zip(inputs.split(",")[1], self.weight.shape, self.w, strict=True):
            size //= tensor if axis == "tensor" else 1
            outputs, contracted = (outputs * size, contracted) if letter in out else (outputs, contracted * size)
        return outputs, contracted

    def _dropped(self, x: jax.Array) -> jax.Array:
        """The input of A in training. It is a function of the seed and of places in x, on any mesh."""
        bits = jax.random.bits(jax.random.key(self.lora_seed[...]), x.shape, jnp.uint32, out_sharding=self.x)
        kept = bits >= jnp.uint32(round(self.lora_dropout * 2**32))
        return jnp.where(kept, x / (1 - self.lora_dropout), 0)


def add_lora(module: nnx.Module, lora: LoRA | None, rngs: nnx.Rngs, dropout: bool) -> None:
    """Adds LoRA to the projections of a module that are targets; does nothing without LoRA.

    Args:
      module: holds `Linear`s under the names of `qwen_jax.lora.TARGETS`.
      lora: its settings.
      rngs: for A.
      dropout: whether its dropout is on.
    """
    for name in lora.targets if lora else ():
        linear = getattr(module, name, None)
        if isinstance(linear, Linear):
            assert lora is not None
            linear.add_lora(lora, rngs.params(), dropout)


def add_adapters(module: nnx.Module, adapter_ranks: tuple[tuple[str, int], ...]) -> None:
    """Adds the factors of several adapters to the projections of a module that are named; see `Options`."""
    for name, ranks in adapter_ranks:
        linear = getattr(module, name, None)
        if isinstance(linear, Linear):
            linear.add_adapters(ranks)


def set_products(module: nnx.Module, products: low_precision.Products) -> None:
    """Sets how the projections of a module are multiplied in training.

    Args:
      module: holds `Linear`s.
      products: see `qwen_jax.kernels.matmul.low_precision`.

    Raises:
      InputError: products of 8 bits with quantised weights.
    """
    for linear in vars(module).values() if products != "bfloat16" else ():
        if isinstance(linear, Linear):
            if type(linear) is not Linear:
                raise InputError(
                    f"products={products!r} needs weights that are not quantised. Use products='bfloat16', or "
                    "dequantise the checkpoint first: qwen-jax convert FOLDER NEW --dtype bfloat16."
                )
            linear.products = products


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
