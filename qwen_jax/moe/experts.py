"""The weights of a layer's experts, and the arithmetic that every way of dispatching rows shares."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import InputError
from qwen_jax.kernels.matmul.quantized_grouped import QuantizedMatrices
from qwen_jax.moe.exchange import AXIS
from qwen_jax.parallel.collectives import all_gather_weight
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.quantization import Activations, Quantization

Matrices = jax.Array | QuantizedMatrices
"""A matrix [N, K] for each expert of this device: an array [e, N, K], or what stands for it."""


class Experts(nnx.Module):
    """The SwiGLU weights of all routed experts of a layer.

    There are two arrays, `gate_up` and `down`. Of quantised experts these hold the codes; scales and what else belongs
    to them have names such as `gate_up_scales`, with one entry for each expert; see `qwen_jax.quantization.Scheme`.
    """

    def __init__(
        self,
        gate_up_E2FD: jax.Array,
        down_EDF: jax.Array,
        sharding: Sharding,
        quantization: Quantization | None = None,
    ):
        """
        Args:
          gate_up_E2FD, down_EDF: initial weights; of quantised experts only the shapes are used.
          sharding: of the current mesh.
          quantization: of the layer.
        """
        weights = ("gate_up", gate_up_E2FD, sharding.experts_gate_up), ("down", down_EDF, sharding.experts_down)
        self.names: dict[str, tuple[str, ...]] = {}
        self.quantization = quantization
        for name, weight, spec in weights:
            scheme = None if quantization is None else quantization.of(f"moe.experts.{name}")
            if scheme is None:
                self.names[name] = ("weight",)
                setattr(self, name, nnx.Param(weight, spec=spec))
                continue
            self.names[name] = tuple(scheme.arrays())
            *outputs, inputs = weight.shape
            shards = sharding.tensor if spec[-1] == "tensor" else 1
            if scheme.ordered and shards > 1:
                raise InputError(
                    f"moe.experts.{name} has an order of its inputs (desc_act), which a tensor axis of {shards} would "
                    "split. Use an expert axis in its place, or a checkpoint without desc_act."
                )
            group_spec = P(*(None if axis == "fsdp" else axis for axis in spec))
            for array, dtype in scheme.arrays().items():
                shape, array_spec = (*outputs, scheme.groups(inputs, shards)), group_spec
                if array == "weight":
                    shape, array_spec = weight.shape, spec
                if array == "order":
                    shape, array_spec = (*outputs[:-1], inputs), P(spec[0], *(None for _ in outputs[1:]))
                param = nnx.Param(jnp.zeros(shape, dtype), spec=array_spec, stored=True)
                setattr(self, array_name(name, array), param)

    def arrays(self, name: str, dtype: jnp.dtype) -> tuple[dict[str, jax.Array], dict[str, P]]:
        """The arrays of `gate_up` or `down` and their PartitionSpecs; weights that are not quantised in a dtype."""
        params = {array: getattr(self, array_name(name, array)) for array in self.names[name]}
        values = {array: param[...] for array, param in params.items()}
        if len(values) == 1:
            values = {"weight": values["weight"].astype(dtype)}
        return values, {array: param.get_metadata("spec") for array, param in params.items()}

    def activations(self, name: str, tokens: int) -> Activations:
        """What the inputs of `gate_up` or `down` are rounded to in a step of some tokens on all devices."""
        if self.quantization is None or len(self.names[name]) == 1:
            return "none"
        return self.quantization.rounds(tokens)


def array_name(name: str, array: str) -> str:
    """The name of a parameter of `Experts`: of the array of a `Scheme` that belongs to `gate_up` or `down`."""
    return name if array == "weight" else f"{name}_{array}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEWeights:
    """One device's shards of the weights that the routed part of a layer uses.

    Attributes:
      norm_D: weight of the norm before the router, replicated.
      router_Ed: weight of the router, sharded over `fsdp`.
      gate_up: {"weight": gate and up matrices [e, 2, f, d] of this device's experts, sharded over `tensor` and `fsdp`},
        and if they are quantised the further arrays of their scheme.
      down: the same for the down matrices [e, d, f], sharded over `fsdp` and `tensor`.
    """

    norm_D: jax.Array
    router_Ed: jax.Array
    gate_up: dict[str, jax.Array]
    down: dict[str, jax.Array]

    def gathered_router(self) -> jax.Array:
        """The router's weight [E, D], gathered over `fsdp`."""
        return all_gather_weight(self.router_Ed, 1)

    def gathered_gate_up(self) -> Matrices:
        """Gate and up of each expert as one matrix [e, 2 f, D], gathered over `fsdp`."""
        return _gathered(self.gate_up, 3)

    def gathered_down(self) -> Matrices:
        """The down matrices [e, D, f], gathered over `fsdp`."""
        return _gathered(self.down, 1)


def as_array(matrices: Matrices, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrices [e, N, K]; those that are quantised are dequantised to a dtype, all of them."""
    return matrices.values(dtype) if isinstance(matrices, QuantizedMatrices) else matrices


def _gathered(arrays: dict[str, jax.Array], axis: int) -> Matrices:
    """A weight, gathered along an axis over `fsdp`."""
    if len(arrays) == 1:
        w = all_gather_weight(arrays["weight"], axis)
        return w.reshape(w.shape[0], -1, w.shape[-1])
    codes = lax.all_gather(arrays["weight"], "fsdp", axis=axis, tiled=True)
    return QuantizedMatrices(**{**arrays, "weight": codes})


def weighted_swiglu(gate_up: jax.Array, weights: jax.Array) -> jax.Array:
    """SwiGLU of an expert, times the router's weight of each row.

    The weight multiplies the hidden neurons and not the expert's output. The result is the same sum, and the gradient
    with respect to the weight does not need the output.

    Args:
      gate_up: [..., 2 F], gate and up side by side.
      weights: [...], the router's weight of each row.

    Returns:
      [..., F].
    """
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up * weights[..., None]


def sum_partial_results(sharding: Sharding, out_ND: jax.Array) -> jax.Array:
    """Sums over the devices that hold partial results for the same tokens.

    These are the devices of the tensor axis, which split the width of each expert, and those of the expert axis where
    all of them have the same rows and each computes its own experts.
    """
    axes = ["tensor"] * (sharding.tensor > 1)
    axes += [AXIS] * (sharding.expert > 1 and not sharding.exchanges)
    return lax.psum(out_ND, tuple(axes)) if axes else out_ND
