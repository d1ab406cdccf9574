"""The parameters of a model: a nested dict of arrays, initialised or abstract, their shardings, and a module of them.

Weights keep PyTorch's orientation, [out, in], with heads as a separate axis: a conversion never transposes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig, Score
from qwen_jax.lora import LoRA
from qwen_jax.model import Block, Qwen2
from qwen_jax.options import Options
from qwen_jax.parallel.sharding import Sharding
from qwen_jax.score import make_score_head

Params = dict[str, Any]


@functools.lru_cache(maxsize=64)
def _skeleton(config: ModelConfig, sharding: Sharding, options: Options) -> tuple[Any, Any]:
    """Graph definition and abstract parameters; nothing is computed."""
    model = nnx.eval_shape(lambda: Qwen2(config, sharding, nnx.Rngs(0), options))
    graphdef, state = nnx.split(model)
    return graphdef, state


def bind(config: ModelConfig, params: Params, sharding: Sharding, options: Options = Options()) -> Qwen2:
    """A module over existing parameters, without copies. Call it inside the function that you jit.

    Args:
      config: the architecture.
      params: as from `init_params`, or a loaded checkpoint; in the layout of `options`.
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


@functools.lru_cache(maxsize=64)
def _layer_skeletons(config: ModelConfig, sharding: Sharding, options: Options) -> list[tuple[Any, Any]]:
    """As `_skeleton`, for each layer."""
    model = nnx.merge(*_skeleton(config, sharding, options))
    return [nnx.split(block) for block in model.layers]


def bind_layer(config: ModelConfig, params: Params, sharding: Sharding, options: Options, layer: int) -> Block:
    """One layer over existing parameters, without copies. Call it inside the function that you jit.

    Args:
      config, sharding, options: as for `bind`; layers are unstacked.
      params: of the layer.
      layer: its number.
    """
    graphdef, state = _layer_skeletons(config, sharding, options)[layer]
    block: Block = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params)))
    return block


@functools.lru_cache(maxsize=64)
def first_alike(config: ModelConfig, sharding: Sharding, options: Options) -> tuple[int, ...]:
    """For each unstacked layer the number of the first one that runs the same program, with other parameters."""
    kinds = [graphdef for graphdef, _ in _layer_skeletons(config, sharding, options)]
    return tuple(map(kinds.index, kinds))


def _with_list_as_dict(params: Params) -> Params:
    layers = params["layers"]
    return {**params, "layers": dict(enumerate(layers)) if isinstance(layers, (list, tuple)) else layers}


def union(params: Params, frozen: Params | None) -> Params:
    """The whole tree of parameters, from those that are trained and those that are not.

    Args:
      params: some of the parameters, such as those of LoRA.
      frozen: the others, in the same layout of layers; None for none.

    Raises:
      ValueError: an array is in both trees, or their layers have different layouts.
    """
    if frozen is None:
        return params
    both: Params = dict(params)
    for name, value in frozen.items():
        if name not in both:
            both[name] = value
        elif isinstance(both[name], dict) and isinstance(value, dict):
            both[name] = union(both[name], value)
        elif isinstance(both[name], list) and isinstance(value, list):
            both[name] = [union(*layers) for layers in zip(both[name], value, strict=True)]
        else:
            raise ValueError(f"{name} is among the trained and among the frozen parameters, or in another layout.")
    return both


def without(params: Params, frozen: Params | None) -> Params:
    """The part of a stacked tree of parameters that a tree of frozen ones lacks; `union` is the inverse.

    Args:
      params: all parameters, with stacked layers.
      frozen: some of them, with stacked layers or a list of layers; None for none.
    """
    rest: Params = {}
    for name, value in params.items():
        other = None if frozen is None else frozen.get(name)
        if isinstance(other, list):
            other = functools.reduce(_all_keys, other)
        if other is None:
            rest[name] = value
        elif isinstance(other, dict) and (some := without(value, other)):
            rest[name] = some
    return rest


def _all_keys(a: Params, b: Params) -> Params:
    """A tree with the keys of both."""
    shared = {key: _all_keys(a[key], b[key]) for key in a.keys() & b.keys() if isinstance(a[key], dict)}
    return {**a, **b, **shared}


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
      dtype: of the leaves; by default the dtype of `config`. The arrays of quantised weights have dtypes of their own.

    Returns:
      {"embed": {"weight"}, "layers": {...} or [{...}, ...], "norm": {"weight"}, "lm_head": {"weight"} unless tied}. A
      reward model has "score" and no "lm_head": {"weight"}, or {"hidden": {"weight", "bias"}, "output": {...}}.
    """
    sharding = sharding or Sharding(kv_heads=config.num_kv_heads)
    _, state = _skeleton(config, sharding, options)
    leaf_dtype = jnp.dtype(dtype or config.dtype)

    def abstract(variable: Any) -> jax.ShapeDtypeStruct:
        value = variable.get_value()
        return jax.ShapeDtypeStruct(value.shape, value.dtype if _keeps_dtype(variable) else leaf_dtype)

    pure = nnx.to_pure_dict(state, extract_fn=abstract)
    if not options.stacked:
        pure["layers"] = [pure["layers"][i] for i in range(config.num_layers)]
    return pure


def param_specs(config: ModelConfig, sharding: Sharding, options: Options = Options()) -> Params:
    """The PartitionSpec that every parameter is stored with, in the tree of `abstract_params`.

    Modules state them where they create the parameters; stacked layers have a leading axis that is not sharded.
    """
    _, state = _skeleton(config, sharding, options)
    specs = nnx.to_pure_dict(state, extract_fn=lambda variable: variable.get_metadata("spec"))
    if options.stacked:
        specs["layers"] = jax.tree.map(lambda spec: P(None, *spec), specs["layers"], is_leaf=_is_spec)
    else:
        specs["layers"] = [specs["layers"][i] for i in range(config.num_layers)]
    return specs


def _keeps_dtype(variable: Any) -> bool:
    """Whether a parameter has a dtype of its own, as codes and scales of quantised weights have."""
    return bool(variable.get_metadata().get("stored", False))


def _is_spec(x: object) -> bool:
    return isinstance(x, P)


def init_params(
    config: ModelConfig,
    key: jax.Array,
    mesh: Mesh,
    dtype: Any = jnp.float32,
    lora: LoRA | None = None,
    frozen: Params | None = None,
) -> Params:
    """Initialises parameters for pre-training, stacked, directly in their shardings.

    Matrices are normal with standard deviation `config.initializer_range`, divided by sqrt(2 num_layers) for those that
    write to the residual stream; biases are zero and norms one. For LoRA see `qwen_jax.linear.Linear.add_lora`.

    Args:
      config: the architecture.
      key: a PRNG key; the same key gives the same weights on every mesh.
      mesh: from `make_mesh`.
      dtype: of the parameters; float32 for training.
      lora: with it, the parameters of LoRA are made too.
      frozen: parameters that exist already and are left out.

    Returns:
      The tree of `abstract_params`, without `frozen`.
    """
    sharding, options = Sharding.for_training(config, mesh), Options(lora=lora)
    specs = without(param_specs(config, sharding, options), frozen)
    out = jax.tree.map(lambda p: NamedSharding(mesh, p), specs, is_leaf=_is_spec)

    def in_dtype(variable: Any) -> jax.Array:
        x: jax.Array = variable.get_value()
        return x if _keeps_dtype(variable) else x.astype(dtype)

    def init(key: jax.Array) -> Params:
        model = Qwen2(config, sharding, nnx.Rngs(params=key), options)
        state = nnx.split(model)[1]
        return without(nnx.to_pure_dict(state, extract_fn=in_dtype), frozen)

    result: Params = jax.jit(init, out_shardings=out)(key)
    return result


def with_fresh_score_head(
    params: Params, config: ModelConfig, key: jax.Array, kind: Score = "linear"
) -> tuple[ModelConfig, Params]:
    """Makes a reward model of a language model: a new score head in place of the output head.

    Matrices of the head are normal with standard deviation 1 / sqrt(D + 1), biases zero.

    Args:
      params: of the language model, on a mesh, stacked or not. The arrays are shared, not copied.
      config: its architecture; the score head of a reward model is replaced.
      key: a PRNG key; the same key gives the same head on every mesh.
      kind: "linear" or "mlp"; see `qwen_jax.score`.

    Returns:
      The architecture of the reward model, and its parameters; the head has the dtype of the last norm.
    """
    config = dataclasses.replace(config, score=kind)
    norm = params["norm"]["weight"]
    mesh = norm.sharding.mesh
    sharding = Sharding.for_training(config, mesh)
    out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(config, sharding)["score"], is_leaf=_is_spec)

    def init(key: jax.Array) -> Params:
        head = make_score_head(kind, config.hidden_size, sharding, key)
        return jax.tree.map(lambda x: x.astype(norm.dtype), nnx.to_pure_dict(nnx.split(head)[1]))

    with jax.set_mesh(mesh):
        score = jax.jit(init, out_shardings=out)(key)
    return config, {**{name: value for name, value in params.items() if name != "lm_head"}, "score": score}
