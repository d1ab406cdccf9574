"""A stack of layers: how it is initialised, split into single layers, and run.

Stacked layers are one tree of parameters with a leading layer axis, run by `jax.lax.scan`: one compiled body for any
depth. On a GPU that has a price: what the body keeps for the backward pass is copied into one array over all layers and
out of it again, since the matrix-product library cannot write into a slice. Unrolled layers have no such copies, and
take longer to compile.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.remat import Remat, recompute

Stats = TypeVar("Stats")
# What layers may have instead of one another; every other part is in every layer.
_KINDS = ("mlp", "moe")
MakeBlock = Callable[[jax.Array, tuple[str, ...]], nnx.Module]
"""Makes a block from a PRNG key and the kinds of feed-forward parts that it has."""


def layer_kinds(config: ModelConfig) -> list[str]:
    """The feed-forward part of each layer: "mlp" or "moe"."""
    return ["moe" if i in config.sparse_layers else "mlp" for i in range(config.num_layers)]


def stacked_layers(block: MakeBlock, keys_L: jax.Array, kinds: Sequence[str]) -> nnx.Module:
    """One module with the stacked parameters of all layers; of "mlp" and "moe" only those layers have one that use it.

    Args:
      block: makes one layer.
      keys_L: a PRNG key for each layer.
      kinds: of each layer.
    """
    graphdef = nnx.split(nnx.eval_shape(lambda: block(jax.random.key(0), tuple(kinds))))[0]

    def initialise(keys: jax.Array, kinds: tuple[str, ...]) -> nnx.State:
        return jax.vmap(lambda key: nnx.split(block(key, kinds))[1])(keys)

    layers_of = {kind: np.array([i for i, k in enumerate(kinds) if k == kind]) for kind in set(kinds)}
    parts = {kind: initialise(keys_L[layers], (kind,))[kind] for kind, layers in layers_of.items()}
    return nnx.merge(graphdef, nnx.State({**initialise(keys_L, ()), **parts}))


def index_of(name: str, layer: int, sparse_layers: Sequence[int]) -> int | None:
    """The position of a layer's part in the stack of such parts; None if the layer has no such part.

    Args:
      name: of the part: "mlp" is in layers without experts, "moe" in layers with experts, all others in every layer.
      layer: number of the layer.
      sparse_layers: numbers of the layers that have experts.
    """
    sparse_before = sum(i < layer for i in sparse_layers)
    if name not in _KINDS:
        return layer
    if (name == "moe") != (layer in sparse_layers):
        return None
    return sparse_before if name == "moe" else layer - sparse_before


def unstack(stacked: Mapping[str, Any], dtype: jnp.dtype | str, sparse_layers: Sequence[int] = ()) -> list[Any]:
    """The parameters of each layer, from stacked ones.

    Args:
      stacked: parameters of all layers with a leading axis, or some of them, such as those of LoRA.
      dtype: of the result, such as the compute dtype.
      sparse_layers: numbers of the layers that have experts.
    """

    def layer(i: int) -> dict[str, Any]:
        at = {name: index_of(name, i, sparse_layers) for name in stacked}
        return {
            name: jax.tree.map(lambda w, at=at[name]: w[at].astype(dtype), part)
            for name, part in stacked.items()
            if at[name] is not None
        }

    lengths = {name: jax.tree.leaves(part)[0].shape[0] for name, part in stacked.items()}
    common = [length for name, length in lengths.items() if name not in _KINDS]
    return list(map(layer, range(common[0] if common else sum(lengths.values()))))


def restack(layers: Sequence[Mapping[str, Any]], dtype: jnp.dtype | str) -> dict[str, Any]:
    """The inverse of `unstack`. Layers are written into one buffer as they come: there is no second copy of them all.

    Args:
      layers: trees of arrays, such as gradients, of which the last layer's come first.
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


def run_layers(
    layers: nnx.Module,
    layer: Callable[[nnx.Module, jax.Array], tuple[jax.Array, Stats | None]],
    x_BTD: jax.Array,
    block: MakeBlock,
    config: ModelConfig,
    remat: Remat,
) -> tuple[jax.Array, Stats | None]:
    """Runs layers one after the other, without a cache.

    Args:
      layers: a list of blocks, or one block with stacked parameters.
      layer: runs one block: its output, and statistics of layers with experts.
      x_BTD: input of the first layer.
      block: makes a block.
      config: the architecture.
      remat: "full" recomputes everything but the input of a layer; other values are the block's business.

    Returns:
      The output of the last layer, and the statistics, with a leading axis over the layers that have any.
    """
    stats: list[Stats] = []
    if isinstance(layers, nnx.List):
        for i, one in enumerate(layers):
            with jax.named_scope(f"layer{i}"):
                graphdef, params = nnx.split(one)

                def run(params: nnx.State, x: jax.Array, graphdef: Any = graphdef) -> tuple[jax.Array, Stats | None]:
                    return layer(nnx.merge(graphdef, params), x)

                # Not jax.checkpoint: outside a loop its barrier would copy the weights too.
                x_BTD, found = recompute(run, params, x_BTD) if remat == "full" else run(params, x_BTD)
            stats += [jax.tree.map(lambda s: s[None], found)] if found is not None else []
    else:
        for graphdef, stacked in _runs(layers, block, config):

            def body(x: jax.Array, params: nnx.State, graphdef: Any = graphdef) -> tuple[jax.Array, Stats | None]:
                return layer(nnx.merge(graphdef, params), x)

            x_BTD, found = lax.scan(jax.checkpoint(body) if remat == "full" else body, x_BTD, stacked)
            stats += [found] if found is not None else []
    return x_BTD, jax.tree.map(lambda *s: jnp.concatenate(s), *stats) if stats else None


def _runs(layers: nnx.Module, block: MakeBlock, config: ModelConfig) -> list[tuple[Any, nnx.State]]:
    """Consecutive layers of one kind, each as graph definition and stacked parameters."""
    graphdef, stacked = nnx.split(layers)
    kinds = layer_kinds(config)
    if len(set(kinds)) == 1:
        return [(graphdef, stacked)]
    runs, first = [], 0
    while first < len(kinds):
        kind = kinds[first]
        last = next((i for i in range(first, len(kinds)) if kinds[i] != kind), len(kinds))
        parts = {}
        for name, part in stacked.items():
            at = index_of(name, first, config.sparse_layers)
            if at is not None:
                parts[name] = jax.tree.map(lambda w, at=at, n=last - first: w[at : at + n], part)
        abstract = nnx.eval_shape(lambda kind=kind: block(jax.random.key(0), (kind,)))
        runs.append((nnx.split(abstract)[0], nnx.State(parts)))
        first = last
    return runs
