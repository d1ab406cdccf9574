"""The parameters: a plain nested dict of arrays, drawn or abstract, where they lie, and a module of them.

Weights keep PyTorch's orientation, [out, in], with heads as an axis of their own: a conversion never transposes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.model import Qwen2
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding

Params = dict[str, Any]


@functools.lru_cache(maxsize=64)
def _skeleton(config: ModelConfig, sharding: Sharding, options: Options) -> tuple[Any, Any]:
    """Graph definition and abstract parameters, made without computing anything."""
    model = nnx.eval_shape(lambda: Qwen2(config, sharding, nnx.Rngs(0), options))
    graphdef, state = nnx.split(model)
    return graphdef, state


def bind(config: ModelConfig, params: Params, sharding: Sharding, options: Options = Options()) -> Qwen2:
    """A module over existing parameters. Free: nothing is copied. Call it inside the function you jit.

    Args:
      config: the architecture.
      params: as from `init_params`, or a loaded checkpoint; laid out as `options` says.
      sharding: of the current mesh.
      options: layout and dtypes.
    """
    graphdef, state = _skeleton(config, sharding, options)
    paths, treedef = jax.tree.flatten(state)
    leaves = jax.tree.leaves(_with_list_as_dict(params))
    if len(paths) != len(leaves):
        raise ValueError(f"Expected {len(paths)} parameter arrays for {options}, got {len(leaves)}.")
    model: Qwen2 = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
    return model


def _with_list_as_dict(params: Params) -> Params:
    layers = params["layers"]
    return {**params, "layers": dict(enumerate(layers)) if isinstance(layers, (list, tuple)) else layers}


def abstract_params(
    config: ModelConfig,
    sharding: Sharding | None = None,
    options: Options = Options(),
    dtype: Any = None,
) -> Params:
    """The parameter tree with `jax.ShapeDtypeStruct` leaves.

    Args:
      config: the architecture.
      sharding: by default that of one device.
      options: layout.
      dtype: of the leaves; by default the config's own.

    Returns:
      {"embed": {"weight"}, "layers": {...} or [{...}, ...], "norm": {"weight"}, "lm_head": {"weight"} unless tied}.
    """
    sharding = sharding or Sharding(kv_heads=config.num_kv_heads)
    _, state = _skeleton(config, sharding, options)
    pure = nnx.to_pure_dict(state)
    leaf_dtype = jnp.dtype(dtype or config.dtype)
    pure = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf_dtype), pure)
    if not options.stacked:
        pure["layers"] = [pure["layers"][i] for i in range(config.num_layers)]
    return pure


def param_specs(config: ModelConfig, sharding: Sharding, options: Options = Options()) -> Params:
    """The PartitionSpec of every parameter, in the tree of `abstract_params`."""
    s, norm, L = sharding, {"weight": sharding.norm}, config.num_layers
    if options.fused:
        attention: Params = {"qkv": {"weight": s.fused_qkv, "bias": s.fused_qkv_bias}, "o": {"weight": s.o}}
        mlp: Params = {"gate_up": {"weight": s.fused_gate_up}, "down": {"weight": s.down}}
    else:
        kv = {"weight": s.kv, "bias": s.kv_bias}
        attention = {"q": {"weight": s.q, "bias": s.q_bias}, "k": kv, "v": dict(kv), "o": {"weight": s.o}}
        mlp = {"gate": {"weight": s.gate_up}, "up": {"weight": s.gate_up}, "down": {"weight": s.down}}
    layer = {"input_norm": dict(norm), "attention": attention, "post_attention_norm": dict(norm)}
    router = {"weight": s.router}
    moe = {
        "router": router,
        "experts": {"gate_up": s.experts_gate_up, "down": s.experts_down},
        "shared": mlp,
        "shared_gate": dict(router),
    }
    kinds = [{**layer, "moe": moe} if i in config.sparse_layers else {**layer, "mlp": mlp} for i in range(L)]
    if options.stacked:
        every = {name: part for kind in kinds for name, part in kind.items()}
        layers: Any = jax.tree.map(lambda p: P(None, *p), every, is_leaf=lambda p: isinstance(p, P))
    else:
        layers = kinds
    specs = {"embed": {"weight": s.vocab}, "layers": layers, "norm": dict(norm)}
    if not config.tie_word_embeddings:
        specs["lm_head"] = {"weight": s.vocab}
    return specs


def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters for pre-training, stacked, born on their shards.

    Matrices are normal with `config.initializer_range`, those that write to the residual stream smaller by
    sqrt(2 num_layers); biases are zero and norms one.

    Args:
      config: the architecture.
      key: a PRNG key; the same key gives the same weights on every mesh.
      mesh: from `make_mesh`.
      dtype: of the parameters; float32 for training.

    Returns:
      The tree of `abstract_params`.
    """
    sharding = Sharding.for_model(config, mesh, split_rows=True)
    specs = param_specs(config, sharding)
    out = jax.tree.map(lambda p: NamedSharding(mesh, p), specs, is_leaf=lambda p: isinstance(p, P))

    def init(key: jax.Array) -> Params:
        model = Qwen2(config, sharding, nnx.Rngs(params=key), Options())
        params = nnx.to_pure_dict(nnx.split(model)[1])
        return jax.tree.map(lambda x: x.astype(dtype), params)

    result: Params = jax.jit(init, out_shardings=out)(key)
    return result
