"""A stack of layers.

Layers in a loop are one compiled body for any depth. On a GPU that has a price: what the body keeps for the backward
pass is copied into one array over all layers and out of it again, for the library that multiplies matrices writes no
slices. One layer after the other has no such copies, and takes longer to compile.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

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
