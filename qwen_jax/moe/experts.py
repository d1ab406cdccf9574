"""The weights of a layer's experts, and the arithmetic that every way of dispatching rows shares."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from qwen_jax.moe.exchange import AXIS
from qwen_jax.parallel.collectives import all_gather_weight
from qwen_jax.parallel.sharding import Sharding


class Experts(nnx.Module):
    """The SwiGLU weights of all routed experts of a layer, in two arrays."""

    def __init__(self, gate_up_E2FD: jax.Array, down_EDF: jax.Array, sharding: Sharding):
        self.gate_up = nnx.Param(gate_up_E2FD, spec=sharding.experts_gate_up)
        self.down = nnx.Param(down_EDF, spec=sharding.experts_down)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEWeights:
    """One device's shards of the weights that the routed part of a layer uses.

    Attributes:
      norm_D: weight of the norm before the router, replicated.
      router_Ed: weight of the router, sharded over `fsdp`.
      gate_up_e2fd: gate and up matrices of this device's experts, sharded over `tensor` and `fsdp`.
      down_edf: down matrices of this device's experts, sharded over `fsdp` and `tensor`.
    """

    norm_D: jax.Array
    router_Ed: jax.Array
    gate_up_e2fd: jax.Array
    down_edf: jax.Array

    def gathered_router(self) -> jax.Array:
        """The router's weight [E, D], gathered over `fsdp`."""
        return all_gather_weight(self.router_Ed, 1)

    def gathered_gate_up(self) -> jax.Array:
        """Gate and up of each expert as one matrix [e, 2 f, D], gathered over `fsdp`."""
        w = all_gather_weight(self.gate_up_e2fd, 3)
        return w.reshape(w.shape[0], -1, w.shape[-1])

    def gathered_down(self) -> jax.Array:
        """The down matrices [e, D, f], gathered over `fsdp`."""
        return all_gather_weight(self.down_edf, 1)


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
