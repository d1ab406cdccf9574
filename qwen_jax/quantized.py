"""Linear maps with quantised weights: the same call as `qwen_jax.linear.Linear`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.kernels.matmul import quantized
from qwen_jax.linear import Linear, LocalProduct
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.quantization import Quantization, Scheme, unified


class QuantizedLinear(Linear):
    """A `Linear` whose weight is stored as codes, with scales of groups of its inputs; see `Scheme`.

    Codes are sharded like the weight, scales over `tensor` alone. Where `tensor` shards the inputs, no shard has a part
    of a group: the group is cut into parts that repeat its scale.
    """

    def __init__(
        self,
        linear: Linear,
        scheme: Scheme,
        sharding: Sharding,
        quantization: Quantization | None = None,
        trained: bool = False,
    ):
        """Takes the place of a linear map; codes and scales are zero.

        Args:
          linear: gives the einsum, the shapes, the bias and the PartitionSpecs.
          scheme: of its weight.
          sharding: of the current mesh.
          quantization: says when its inputs are rounded; None for never.
          trained: whether gradients with respect to its inputs are needed, which kernels do not have.
        """
        bias = linear.bias[...] if hasattr(linear, "bias") else None
        bias_spec = linear.bias.get_metadata("spec") if bias is not None else None
        shape, spec = linear.weight.shape, linear.w
        zeros = jnp.zeros(shape, scheme.codes)
        super().__init__(linear.einsum, zeros, x=linear.x, w=spec, out=linear.out, bias=bias, bias_spec=bias_spec)
        self.weight = nnx.Param(zeros, spec=spec, stored=True)
        self.scheme, self.quantization, self.trained = scheme, quantization, trained
        outputs = len(linear.out) - 2
        self.sharded_inputs = "tensor" in spec[outputs:]
        inputs = math.prod(shape[outputs:])
        groups = scheme.groups(inputs, sharding.tensor if self.sharded_inputs else 1)
        group_spec = P(*(_tensor(axis) for axis in spec[:outputs]), "tensor" if self.sharded_inputs else None)
        for name, dtype in scheme.arrays().items():
            if name == "order":
                self.order = nnx.Param(jnp.arange(inputs, dtype=dtype), spec=P(None), stored=True)
            elif name != "weight":
                setattr(
                    self, name, nnx.Param(jnp.zeros((*shape[:outputs], groups), dtype), spec=group_spec, stored=True)
                )

    def _local_product(self, x: jax.Array) -> LocalProduct:
        spec, outputs, names = self.w, len(self.out) - 2, tuple(self.scheme.arrays())
        operands: dict[str, jax.Array] = {name: getattr(self, name)[...] for name in names}
        specs: dict[str, P] = {name: getattr(self, name).get_metadata("spec") for name in names}
        # The kernel, by the sizes on one device.
        rows, (N, K) = math.prod(self._rows(x)), self._local_sizes()
        shards = jax.sharding.get_abstract_mesh().shape["tensor"] if self.sharded_inputs else 1
        rounded = self.quantization is not None and self.quantization.rounds(x.shape[0] * x.shape[1]) != "none"
        chosen = quantized.select_quantized(
            "auto" if not self.trained else "w8a8" if rounded else "plain",
            jax.ShapeDtypeStruct((rows, K), x.dtype),
            jax.ShapeDtypeStruct((N, K), self.weight.dtype),
            jax.ShapeDtypeStruct((N, self.scales.shape[-1] // shards), self.scales.dtype),
            self.scheme.offset != "none",
            rounded,
            self.sharded_inputs,
        )
        how: Any = {"implementation": chosen, "axis": "tensor" if self.sharded_inputs else None}

        def multiply(x: jax.Array, operands: dict[str, jax.Array]) -> jax.Array:
            gathered = lax.all_gather(operands["weight"], "fsdp", axis=spec.index("fsdp"), tiled=True)
            matrices = {name: x.reshape(N, -1) for name, x in operands.items() if name not in ("weight", "order")}
            weight_NK, scales_NG = gathered.reshape(N, K), matrices["scales"]
            x_MK = self._in_order(x, operands.get("order")).reshape(-1, K)
            offsets = matrices.get("zeros"), matrices.get("mins")
            y = quantized.quantized_matmul(x_MK, weight_NK, scales_NG, *offsets, **how)
            return y.reshape(*x.shape[:2], *gathered.shape[:outputs])

        return LocalProduct(operands, specs, multiply, chosen in ("codes", "gpu", "tpu"))

    def _in_order(self, x: jax.Array, order_I: jax.Array | None) -> jax.Array:
        """One device's activations [B, T, inputs] in the order of the codes."""
        if order_I is None:
            return x.reshape(*x.shape[:2], -1)
        if self.sharded_inputs:
            x = lax.all_gather(x, "tensor", axis=2, tiled=True)
            size = order_I.shape[0] // lax.axis_size("tensor")
            order_I = lax.dynamic_slice_in_dim(order_I, lax.axis_index("tensor") * size, size)
        return x.reshape(*x.shape[:2], -1)[:, :, order_I]


def _tensor(axis: Any) -> str | None:
    return "tensor" if axis == "tensor" else None


# Projections that the inference layout joins.
_JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def quantize_projections(
    module: nnx.Module, path: str, quantization: Quantization | None, sharding: Sharding, trained: bool
) -> None:
    """Replaces the projections of a module that are quantised; does nothing without quantisation.

    Args:
      module: holds `Linear`s.
      path: of the module within its layer, such as "mlp".
      quantization: of the layer.
      sharding: of the current mesh.
      trained: whether gradients with respect to activations are needed.
    """
    if quantization is None:
        return
    for name, linear in list(vars(module).items()):
        if isinstance(linear, Linear):
            parts = _JOINED.get(name, (name,))
            scheme = functools.reduce(unified, (quantization.of(f"{path}.{part}") for part in parts))
            if scheme is not None:
                setattr(module, name, QuantizedLinear(linear, scheme, sharding, quantization, trained))


def in_scheme(arrays: dict[str, jax.Array], scheme: Scheme | None, target: Scheme | None) -> dict[str, jax.Array]:
    """The arrays of a projection with one axis of inputs, in a wider scheme; see `qwen_jax.quantization.unified`.

    Args:
      arrays: of the projection; a bias is kept.
      scheme: that they have.
      target: that they get. None dequantises them, to the dtype of the bias, or bfloat16 without one.
    """
    if scheme == target or scheme is None:
        return arrays
    rest = {"bias": arrays["bias"]} if "bias" in arrays else {}
    if target is None:
        values = quantized.dequantize(*(arrays.get(name) for name in ("weight", "scales", "zeros", "mins")))  # type: ignore[arg-type]
        if scheme.ordered:
            values = values[..., jnp.argsort(arrays["order"])]
        return {"weight": values.astype(rest["bias"].dtype if rest else jnp.bfloat16), **rest}
    # Cut the groups into those of the target, and give them the offsets that it has.
    scales = arrays["scales"].astype(jnp.float32)
    found: dict[str, jax.Array] = {"scales": scales, **({"zeros": arrays["zeros"]} if "zeros" in arrays else {})}
    if target.offset == "zero":
        found.setdefault("zeros", jnp.zeros(scales.shape, target.codes))
    if target.offset == "min":
        zeros = found.pop("zeros", None)
        found["mins"] = arrays.get("mins", scales * (0.0 if zeros is None else zeros.astype(jnp.float32)))
    inputs = arrays["weight"].shape[-1]
    parts = target.groups(inputs) // scales.shape[-1]
    found = {name: jnp.repeat(x, parts, axis=-1) if parts > 1 else x for name, x in found.items()}
    found["weight"] = arrays["weight"]
    if target.ordered:
        found["order"] = arrays.get("order", jnp.arange(inputs))
    return {**{name: found[name].astype(dtype) for name, dtype in target.arrays().items()}, **rest}
