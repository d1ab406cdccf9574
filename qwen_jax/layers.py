"""What the backward pass keeps of a layer, and layers one by one.

Layers in a loop are one compiled body for any depth. On a GPU that has a price: what the body keeps for the backward
pass is copied into one array over all layers and out of it again, for the library that multiplies matrices writes no
slices. One layer after the other has no such copies, and takes longer to compile.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

Remat = Literal["none", "full", "dots"]


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


def recompute(f: Callable[..., Any], params: Any, *inputs: Any, constants: tuple[Any, ...] = ()) -> Any:
    """`f(params, *inputs, *constants)`, of which the backward pass keeps the inputs and makes all else again.

    What is made again costs little where f is one product of a matrix with something elementwise before or after it:
    the product itself has no part in its own gradient, and the compiler drops it.

    Args:
      f: a function of arrays.
      params: get gradients, and are there for the backward pass anyhow.
      inputs: get gradients; what is kept.
      constants: get none.
    """

    @jax.custom_vjp
    def run(params: Any, inputs: Any, constants: Any) -> Any:
        return f(params, *inputs, *constants)

    def forward(*args: Any) -> Any:
        return run(*args), args

    def backward(kept: Any, by: Any) -> Any:
        params, inputs, constants = kept
        # Without this the compiler would find that it has made these values before, and keep them.
        inputs, by = _fenced((inputs, by))
        _, pull = jax.vjp(lambda params, inputs: f(params, *inputs, *constants), params, inputs)
        return *pull(by), None

    run.defvjp(forward, backward)
    return run(params, inputs, constants)


def _fenced(tree: Any) -> Any:
    """The same values, of which the compiler does not know where they come from."""
    leaves, treedef = jax.tree.flatten(tree)
    real = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]  # Integers have such gradients.
    for i, leaf in zip(real, lax.optimization_barrier([leaves[i] for i in real]), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(treedef, leaves)


_KINDS = ("mlp", "moe")


def index_of(name: str, layer: int, sparse_layers: Sequence[int]) -> int | None:
    """Where a layer's part lies in the stack of its kind; None if the layer has no such part.

    Args:
      name: of the part: "mlp" is in layers without experts, "moe" in those with, and all else in every layer.
      layer: its number.
      sparse_layers: numbers of the layers that have experts.
    """
    before = sum(i < layer for i in sparse_layers)
    if name not in _KINDS:
        return layer
    if (name == "moe") != (layer in sparse_layers):
        return None
    return before if name == "moe" else layer - before


def unstacked(stacked: Any, dtype: Any, sparse_layers: Sequence[int] = ()) -> list[Any]:
    """The parameters of each layer.

    Args:
      stacked: of all layers, with a leading axis.
      dtype: of the result, such as that of compute.
      sparse_layers: numbers of the layers that have experts.
    """

    def layer(i: int) -> Any:
        at = {name: index_of(name, i, sparse_layers) for name in stacked}
        take = lambda name: jax.tree.map(lambda w: w[at[name]].astype(dtype), stacked[name])  # noqa: E731
        return {name: take(name) for name in stacked if at[name] is not None}

    return list(map(layer, range(stacked["input_norm"]["weight"].shape[0])))


def restacked(layers: Sequence[Any], dtype: Any) -> Any:
    """What `unstacked` took apart; into one buffer as they come, so that there is no second copy of them all.

    Args:
      layers: dicts of trees, such as gradients, which come last layer first.
      dtype: of the result.
    """

    def stack(*leaves: jax.Array) -> jax.Array:
        spec = P(None, *jax.typeof(leaves[0]).sharding.spec)
        out = lax.empty((len(leaves), *leaves[0].shape), leaves[0].dtype, out_sharding=spec)
        for i in reversed(range(len(leaves))):
            out = out.at[i].set(leaves[i])
        return out.astype(dtype)

    names = sorted({name for layer in layers for name in layer})
    return {name: jax.tree.map(stack, *(layer[name] for layer in layers if name in layer)) for name in names}
