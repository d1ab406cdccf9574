"""LoRA adapters that each row of a batch chooses from, beside the inference layout of the weights.

Every adapted projection has the factors of all adapters, concatenated along their ranks: A [R, inputs...] and B
[outputs..., R]. A row's `x A^T` is set to zero outside the ranks of the row's own adapter, so that one program computes
`x W^T + (x A^T * mask) B^T` for rows of any adapters, or of none. In a fused projection A is the concatenation over its
parts (q, k and v, or gate and up), and B is block-diagonal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.lora import AdapterFactors
from qwen_jax.options import Options
from qwen_jax.parallel import placing
from qwen_jax.parallel.sharding import Sharding, padded_width
from qwen_jax.params import Params, param_specs

# The projections of the inference layout, and those of the training layout that each is made of.
_PARTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


def check_adapters(adapters: Mapping[str, AdapterFactors], config: ModelConfig) -> None:
    """Refuses adapters that do not fit a model.

    Args:
      adapters: by name.
      config: of the model.

    Raises:
      InputError: another shape, layer or projection than the model has, a factor that is not finite, or no factors.
    """
    for name, adapter in adapters.items():
        if not any(adapter.layers.values()):
            raise InputError(f"Adapter {name!r} has no factors. Expected those of at least one projection.")
        for i, factors in adapter.layers.items():
            shapes = _shapes(config, i) if 0 <= i < config.num_layers else {}
            for target, (a, b) in factors.items():
                inputs, outputs = shapes.get(target, ((), ()))
                want = (adapter.rank, *inputs), (*outputs, adapter.rank)
                if target not in shapes or (a.shape, b.shape) != want:
                    expected = f"A {list(want[0])} and B {list(want[1])}" if target in shapes else "no such projection"
                    raise InputError(
                        f"Adapter {name!r} has A {list(a.shape)} and B {list(b.shape)} for {target} of layer {i}; this "
                        f"model of {config.num_layers} layers has {expected}. Give an adapter of this base model."
                    )
                # The factors of one adapter are multiplied by zero for rows of another, which must give zero.
                if not (np.isfinite(a).all() and np.isfinite(b).all()):
                    raise InputError(
                        f"Adapter {name!r} has a factor of {target} in layer {i} that is not finite. Train it again."
                    )


def _shapes(config: ModelConfig, layer: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The dimensions of the inputs and of the outputs of each projection of a layer."""
    H, K, d, D, F = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size, config.intermediate_size
    if config.moe is not None and layer in config.sparse_layers:
        F = config.moe.shared_intermediate_size
    attention = {"q": ((D,), (H, d)), "k": ((D,), (K, d)), "v": ((D,), (K, d)), "o": ((H, d), (D,))}
    return {**attention, "gate": ((D,), (F,)), "up": ((D,), (F,)), "down": ((F,), (D,))}


def adapter_ranks(adapters: Sequence[AdapterFactors]) -> tuple[tuple[str, int], ...]:
    """What `Options.adapter_ranks` is for adapters.

    Args:
      adapters: in the order of their numbers, which begin with 1.
    """
    ranks = {name: sum(adapters[n - 1].rank for _, n in _blocks(name, adapters)) for name in _PARTS}
    return tuple((name, rank) for name, rank in ranks.items() if rank)


def _blocks(name: str, adapters: Sequence[AdapterFactors]) -> list[tuple[str, int]]:
    """The blocks of ranks of a projection: part, and the number of the adapter that adapts it in any layer."""
    numbered = list(enumerate(adapters, 1))
    return [(part, n) for part in _PARTS[name] for n, x in numbered if any(part in f for f in x.layers.values())]


def place_factors(adapters: Sequence[AdapterFactors], config: ModelConfig, mesh: Mesh, options: Options) -> Params:
    """The factors of adapters in the inference layout, on a mesh, for `union` with the fused parameters.

    Args:
      adapters: in the order of their numbers.
      config: of the model.
      mesh: of the parameters.
      options: of the model, with the `adapter_ranks` of these adapters. The factors have its dtype.

    Returns:
      {"layers": [...]}, with "lora_a", "lora_b" and "lora_owner", the number of each rank's adapter, beside the weight
      of each adapted projection. `with_masks` brings it into the form that `bind` takes.
    """
    sharding = Sharding.for_inference(config, mesh)
    layers = []
    for i, specs in enumerate(param_specs(config, sharding, options)["layers"]):
        tree: Params = {}
        for name, _ in options.adapter_ranks:
            # Find the projection among the layer's parts.
            path: tuple[str, ...] = ("attention",)
            if name in ("gate_up", "down"):
                path = ("moe", "shared") if "moe" in specs else ("mlp",)
            spec, place = specs, tree
            for key in (*path, name):
                spec, place = spec[key], place.setdefault(key, {})
            # Join and place its factors.
            a, b, owner = _join(name, i, adapters, config, sharding)
            place["lora_a"], place["lora_b"] = (
                placing.place(x.astype(jnp.dtype(options.dtype)), NamedSharding(mesh, spec[key]))
                for key, x in (("lora_a", a), ("lora_b", b))
            )
            place["lora_owner"] = placing.place(owner, NamedSharding(mesh, P(None)))
        layers.append(tree)
    return {"layers": layers}


def _join(
    name: str, layer: int, adapters: Sequence[AdapterFactors], config: ModelConfig, sharding: Sharding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and B of all adapters of a projection, and the number of each rank's adapter. Zeros where a layer has none."""
    shapes = _shapes(config, layer)
    all_a, all_b, owner = [], [], list[int]()
    for part, number in _blocks(name, adapters):
        adapter = adapters[number - 1]
        inputs, outputs = shapes[part]
        zeros = np.zeros((adapter.rank, *inputs), np.float32), np.zeros((*outputs, adapter.rank), np.float32)
        a, b = adapter.layers.get(layer, {}).get(part, zeros)
        others = {p: np.zeros((*shapes[p][1], adapter.rank), np.float32) for p in _PARTS[name]}
        all_a.append(a)
        all_b.append(_fused_outputs({**others, part: b}, config, sharding))
        owner += [number] * adapter.rank
    a = np.concatenate(all_a)
    if name == "down":
        parts = _padded_part(a.reshape(len(a), sharding.tensor, -1), config, sharding, axis=2)
        a = parts.reshape(len(a), -1)
    return a, np.concatenate(all_b, axis=-1), np.asarray(owner, np.int32)


def _padded_part(x: np.ndarray, config: ModelConfig, sharding: Sharding, axis: int) -> np.ndarray:
    """Fills up an axis of a shard's feed-forward width as `qwen_jax.inference.weights.fuse` does."""
    part, n = x.shape[axis], sharding.tensor
    more = padded_width(n * part, n, config.quantization is not None) // n - part
    return np.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])


def _fused_outputs(parts: dict[str, np.ndarray], config: ModelConfig, sharding: Sharding) -> np.ndarray:
    """Joins the outputs of the parts of a projection as `qwen_jax.inference.weights.fuse` joins their weights."""
    repeat = sharding.kv_heads // config.num_kv_heads

    def split(part: str) -> np.ndarray:
        x = np.repeat(parts[part], repeat, axis=0) if part in ("k", "v") else parts[part]
        return x.reshape(sharding.tensor, -1, *x.shape[1:])

    if "q" in parts:
        return np.concatenate([split(part) for part in ("q", "k", "v")], axis=1)
    if "gate" in parts:
        return _padded_part(np.stack([split("gate"), split("up")], axis=1), config, sharding, axis=2)
    (only,) = parts.values()
    return only


def with_masks(params: Params, adapter_BT: jax.Array) -> Params:
    """Replaces "lora_owner" by the mask of the ranks that each row uses, for `bind`.

    Args:
      params: the fused parameters with `place_factors`.
      adapter_BT: int32, the number of the adapter of each row ([B, 1]) or token; 0 is none.
    """

    def walk(tree: Any) -> Any:
        if isinstance(tree, list):
            return [walk(part) for part in tree]
        if not isinstance(tree, dict):
            return tree
        masks = {"lora_mask": adapter_BT[..., None] == tree["lora_owner"]} if "lora_owner" in tree else {}
        return {name: walk(part) for name, part in tree.items() if name != "lora_owner"} | masks

    result: Params = walk(params)
    return result
