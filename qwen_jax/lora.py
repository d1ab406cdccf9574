"""Low-rank adaptation of the projections (LoRA, Hu et al. 2021, arXiv:2106.09685): settings and factors.

A projection with a weight W becomes `x W^T + scale (x A^T) B^T`. Only A [rank, in] and B [out, rank] are trained;
`qwen_jax.linear.Linear` holds and multiplies them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

    Raises:
      InputError: a value out of range, or an unknown name.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    rank_stabilised: bool = False
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InputError(f"The rank of LoRA must be a positive integer, got {self.rank!r}.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InputError(f"alpha of LoRA must be positive, got {self.alpha}.")
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
