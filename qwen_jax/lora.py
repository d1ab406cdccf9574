"""Low-rank adaptation of the projections (LoRA, Hu et al. 2021, arXiv:2106.09685): settings and factors.

A projection with a weight W becomes `x W^T + scale (x A^T) B^T`. In training, dropout may act on the x before A. Only
A [rank, in] and B [out, rank] are trained; `qwen_jax.linear.Linear` holds and multiplies them.
"""

import dataclasses
import functools
import math
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections that can be adapted: of attention, of feed-forward layers, and of the shared expert."""
WHOLE = ("embed", "norm", "lm_head", "score")
"""Parts outside of the layers, which can be trained whole beside the adapted projections."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which projections are adapted, and how.

    Attributes:
      rank: of the update of a weight.
      alpha: the update is multiplied by alpha / rank.
      targets: of `TARGETS`. In a model with experts, "gate", "up" and "down" are those of layers without experts and
        of the shared expert; routed experts are not adapted.
      rank_stabilised: multiply by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
      whole: parts of `WHOLE` whose own weights are trained too (PEFT's `modules_to_save`), such as the head of a reward
        model.
      dropout: in training, the part of the inputs of A that is 0; the others are divided by 1 - dropout, as in PEFT.
        Each projection draws its own.
      dropout_seed: of dropout. With it, the step and the micro-batch determine what is dropped.

    Raises:
      InputError: a value out of range, or an unknown name.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    rank_stabilised: bool = False
    whole: tuple[str, ...] = ()
    dropout: float = 0.0
    dropout_seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InputError(f"The rank of LoRA must be a positive integer, got {self.rank!r}.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InputError(f"alpha of LoRA must be positive, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout of LoRA must be at least 0 and below 1, got {self.dropout}.")
        if not 0 <= self.dropout_seed < 2**31:
            raise InputError(f"dropout_seed of LoRA must be at least 0 and below 2^31, got {self.dropout_seed}.")
        for field, known in (("targets", TARGETS), ("whole", WHOLE)):
            names = getattr(self, field)
            unknown = [name for name in names if name not in known]
            if unknown or len(set(names)) < len(names):
                experts = " Routed experts cannot be adapted." if any("expert" in str(name) for name in unknown) else ""
                raise InputError(
                    f"{field} of LoRA must be different names of {', '.join(known)}; got {names}.{experts}"
                )
        if not self.targets:
            raise InputError(f"LoRA needs at least one target of {', '.join(TARGETS)}, got none.")

    @property
    def scale(self) -> float:
        """The factor on the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def check_whole(lora: LoRA, model: ModelConfig) -> None:
    """Checks that a model has the modules that are trained in full beside the adapter.

    Args:
      lora: the settings.
      model: the architecture.

    Raises:
      InputError: `lora.whole` names a head that the model does not have.
    """
    if "score" in lora.whole and model.score is None:
        raise InputError("whole of LoRA names score, which only a reward model has; this model has none. Leave it out.")
    if "lm_head" in lora.whole and not model.has_lm_head:
        why = "its head is its embedding; name embed" if model.score is None else "it has a score head; leave it out"
        raise InputError(f"whole of LoRA names lm_head, which this model does not have: {why}.")


def with_dropout(params: dict[str, Any], lora: LoRA, step: jax.Array, part: jax.Array | int = 0) -> dict[str, Any]:
    """Parameters with a seed of dropout, "lora_seed", beside the factors of each projection: uint32 for each layer.

    The same projection of the same layer gets the same seed, whether layers are stacked or listed.

    Args:
      params: all of the model's, as `bind` takes them.
      lora: the settings, with dropout.
      step: int32, number of the step.
      part: number of the micro-batch in the step.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(lora.dropout_seed), step), part)

    def seeds(name: str, layers: jax.Array) -> jax.Array:
        of_name = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.vmap(lambda layer: jax.random.bits(jax.random.fold_in(of_name, layer)))(layers)

    def walk(tree: dict[str, Any], path: str, counts: Counter[str] | None) -> dict[str, Any]:
        if "lora_a" not in tree:
            some = {
                n: walk(part, f"{path}.{n}", counts) if isinstance(part, dict) else part for n, part in tree.items()
            }
            return some
        if counts is None:
            return {**tree, "lora_seed": seeds(path, jnp.arange(len(tree["lora_a"])))}
        # Layers of a list are counted by the parts that they have, as stacks of them are.
        counts[path] += 1
        return {**tree, "lora_seed": seeds(path, jnp.arange(counts[path] - 1, counts[path]))[0]}

    layers, counts = params["layers"], Counter[str]()
    if isinstance(layers, dict):
        return {**params, "layers": walk(layers, "", None)}
    return {**params, "layers": [walk(layer, "", counts) for layer in layers]}


@dataclasses.dataclass(frozen=True)
class AdapterFactors:
    """The low-rank factors of one adapter, on the host.

    Attributes:
      rank: of every update.
      layers: by number of the layer and name of `TARGETS`, A [rank, inputs...] and B [outputs..., rank]. B is
        multiplied by the scale already. Heads are an axis of their own, as in the weights.
    """

    rank: int
    layers: Mapping[int, Mapping[str, tuple[np.ndarray, np.ndarray]]]


def merged(params: dict[str, Any], lora: LoRA) -> dict[str, Any]:
    """Parameters in which the updates are added to the weights, without those of LoRA. Sums are in float32.

    Args:
      params: with or without stacked layers.
      lora: the settings that they were trained with.
    """

    def walk(tree: Any) -> Any:
        if isinstance(tree, list):
            return [walk(part) for part in tree]
        if not isinstance(tree, dict):
            return tree
        if "lora_a" not in tree:
            return {name: walk(part) for name, part in tree.items()}
        rest = {name: part for name, part in tree.items() if name not in ("lora_a", "lora_b")}
        weight, a, b = (tree[name].astype(jnp.float32) for name in ("weight", "lora_a", "lora_b"))
        product = functools.partial(jnp.tensordot, axes=1, precision="highest")
        # Stacked layers have a leading axis: both factors together have two axes more than the weight, without it.
        stacked = a.ndim + b.ndim - weight.ndim == 3
        update = (jax.vmap(product) if stacked else product)(b, a)
        sharding = jax.typeof(weight).sharding
        return {**rest, "weight": (weight + lora.scale * jax.reshard(update, sharding)).astype(tree["weight"].dtype)}

    result: dict[str, Any] = walk(params)
    return result
