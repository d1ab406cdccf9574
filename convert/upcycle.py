"""Upcycling a dense checkpoint to a mixture of experts by the recipe of Qwen's own models, tensor by tensor.

The Qwen2 report (arXiv:2407.10671, section 2.2.2) replicates the feed-forward layer until there are enough hidden
neurons, shuffles the neurons of each replica, cuts them into experts, and initialises half of each expert's parameters
anew. The report leaves some choices open; they are made here:

- Whole neurons are initialised anew, with the mean and standard deviation of the layer's weights (measured in
  arXiv:2502.19261).
- The router is new. If the experts divide into whole replicas, and the experts per token too, all experts of a replica
  start with the same router row (the virtual groups of arXiv:2410.07524): a token is then routed to a whole
  feed-forward layer.
- The shared expert is the dense layer if it is as wide, and its gate starts at sigmoid(0) = 1/2. A wider shared expert
  has further neurons with zero output weights; a narrower one has some of the neurons, all with zero output weights.
- Output weights of the experts are scaled to undo the router's weights, so that together they are one dense layer. With
  `norm_topk_prob`, virtual groups, and nothing initialised anew, the new model computes what the dense one does.
  Without `norm_topk_prob` the router's rows are so small that all experts start with nearly the same probability.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import numpy as np
from jax.typing import DTypeLike

from convert import check_options, detect, open_source, write_folder
from convert.folder import Format
from convert.names import Leaf, leaves
from convert.source import Source
from qwen_jax.config import ModelConfig, MoE, load_config
from qwen_jax.errors import InputError
from qwen_jax.hub import CONFIG, resolve

# The purpose of a random draw, which is part of its seed.
_ORDER, _WHICH, _VALUES, _ROUTER, _EXTRA = range(5)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a dense model is turned into a mixture of experts.

    Attributes:
      moe: the experts.
      reinit: fraction of each routed expert's neurons that are initialised anew.
      seed: of everything random.
    """

    moe: MoE
    reinit: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.reinit <= 1:
            raise InputError(f"reinit must be a fraction from 0 to 1, got {self.reinit}.")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}.")


class Upcycled:
    """The mixture as a `Source`: each tensor is computed from the dense checkpoint when it is read.

    Attributes:
      preserves: whether the new model computes what the dense one does, up to `rounds`.
      rounds: whether scaled output weights of experts are rounded to the dtype in which they are stored.
    """

    workers = 1  # Tensors of one layer are computed from the same dense weights, which are cached.

    def __init__(self, dense: Source, recipe: Recipe) -> None:
        """
        Args:
          dense: the dense checkpoint.
          recipe: the mixture.

        Raises:
          InputError: the checkpoint already has experts.
        """
        _check_dense(dense.config)
        self._dense, self._recipe, self.folder = dense, recipe, dense.folder
        self.config = dataclasses.replace(dense.config, moe=recipe.moe)
        self._of_dense = {leaf.path: leaf for leaf in leaves(dense.config)}
        self._held: tuple[int, dict[str, np.ndarray]] = (-1, {})
        self._like: dict[str, tuple[float, float]] = {}  # Mean and standard deviation of the cached weights.
        moe, F = recipe.moe, dense.config.intermediate_size
        segments, uneven = divmod(F, moe.intermediate_size)
        # Experts in a replica; 0 if the experts do not divide into whole replicas.
        whole = not uneven and moe.num_experts % segments == 0 and moe.num_experts_per_tok % segments == 0
        self._group = segments if whole else 0
        self._shared_has_all = moe.shared_intermediate_size >= F
        self.preserves = bool(self._group) and moe.norm_topk_prob and recipe.reinit == 0
        # A token's experts are together this many dense layers wide, and each expert's output has this weight.
        taken = moe.num_experts_per_tok * moe.intermediate_size / F
        each = 1 / moe.num_experts_per_tok if moe.norm_topk_prob else 1 / moe.num_experts
        self._scale = (0.5 if self._shared_has_all else 1.0) / (taken * each)
        self._dtype = dense.dtype(self._of_dense[("layers", "mlp", "up", "weight")])  # Of the new tensors.
        self.rounds = math.frexp(self._scale)[0] != 0.5 and self._dtype != np.float32

    def dtype(self, leaf: Leaf) -> np.dtype:
        same = self._of_dense.get(leaf.path)
        return self._dtype if same is None else self._dense.dtype(same)

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> None:
        return None

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        made = [self._tensor(leaf, i, rows) for i in range(tensors.start, tensors.stop)]
        return np.stack(made).astype(self.dtype(leaf))

    def _tensor(self, leaf: Leaf, i: int, rows: slice) -> np.ndarray:
        """A range of rows of a tensor; float32 if it is a new one."""
        layer, *index = map(int, np.unravel_index(i, leaf.stack)) if leaf.stack else (0,)
        same = self._of_dense.get(leaf.path)
        if same is not None:
            at = leaf.layers[layer] if leaf.layers else 0
            return self._dense.read(same, slice(at, at + 1), rows)[0]
        make: dict[str, Callable[..., np.ndarray]] = {
            "experts.gate_up": self._gate_up,
            "experts.down": self._down,
            "router.weight": self._router,
            "shared.gate.weight": functools.partial(self._shared, "gate"),
            "shared.up.weight": functools.partial(self._shared, "up"),
            "shared.down.weight": functools.partial(self._shared, "down"),
            "shared_gate.weight": lambda _: np.zeros((1, self.config.hidden_size), np.float32),
        }
        return make[".".join(leaf.path[2:])](leaf.layers[layer], *index)[rows]

    def _random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self._recipe.seed, *what])

    def _weight(self, layer: int, name: str) -> np.ndarray:
        """A matrix of the dense feed-forward layer, float32; those of one layer are cached."""
        if self._held[0] != layer:
            self._held, self._like = (layer, {}), {}
        if name not in self._held[1]:
            leaf = self._of_dense[("layers", "mlp", name, "weight")]
            whole = self._dense.read(leaf, slice(layer, layer + 1), slice(0, leaf.shape[0]))[0]
            self._held[1][name] = whole.astype(np.float32)
        return self._held[1][name]

    def _neurons(self, layer: int, expert: int) -> np.ndarray:
        """Indices of the dense layer's neurons that an expert has."""
        F, f = self.config.intermediate_size, self._recipe.moe.intermediate_size
        first = expert * f
        orders = [
            self._random(_ORDER, layer, replica).permutation(F)
            for replica in range(first // F, (first + f - 1) // F + 1)
        ]
        start = first - first // F * F
        return np.concatenate(orders)[start : start + f]

    def _reinitialised(self, layer: int, expert: int) -> np.ndarray:
        """Indices of an expert's neurons that are initialised anew."""
        f = self._recipe.moe.intermediate_size
        return self._random(_WHICH, layer, expert).permutation(f)[: round(self._recipe.reinit * f)]

    def _drawn(self, layer: int, name: str, shape: tuple[int, ...], *what: int) -> np.ndarray:
        """Random values with the mean and standard deviation of a matrix of the dense layer."""
        like = self._weight(layer, name)
        if name not in self._like:
            self._like[name] = float(like.mean()), float(like.std())
        seed = {"gate": 0, "up": 1, "down": 2}[name]
        return self._random(*what, seed).normal(*self._like[name], shape).astype(np.float32)

    def _gate_up(self, layer: int, expert: int, part: int) -> np.ndarray:
        name = ("gate", "up")[part]
        weight = self._weight(layer, name)[self._neurons(layer, expert)]
        anew = self._reinitialised(layer, expert)
        if len(anew):
            weight[anew] = self._drawn(layer, name, (len(anew), weight.shape[1]), _VALUES, layer, expert)
        return weight

    def _down(self, layer: int, expert: int) -> np.ndarray:
        weight = self._weight(layer, "down")[:, self._neurons(layer, expert)]
        anew = self._reinitialised(layer, expert)
        if len(anew):
            weight[:, anew] = self._drawn(layer, "down", (weight.shape[0], len(anew)), _VALUES, layer, expert)
        return weight * np.float32(self._scale)

    def _router(self, layer: int) -> np.ndarray:
        moe, D = self._recipe.moe, self.config.hidden_size
        rows = moe.num_experts // (self._group or 1)
        # The router's inputs are about 1. Without normalisation the scale is right only for nearly equal probabilities.
        deviation = self.config.initializer_range / (1 if moe.norm_topk_prob else D**0.5)
        drawn = self._random(_ROUTER, layer).normal(0.0, deviation, (rows, D)).astype(np.float32)
        return np.repeat(drawn, self._group or 1, axis=0)

    def _shared(self, name: str, layer: int) -> np.ndarray:
        weight, width = self._weight(layer, name), self._recipe.moe.shared_intermediate_size
        silent = name == "down" and not self._shared_has_all
        if name == "down":
            weight = weight.T
        extra = width - weight.shape[0]
        if extra > 0:
            zeros = np.zeros((extra, weight.shape[1]), np.float32)
            more = zeros if name == "down" else self._drawn(layer, name, zeros.shape, _EXTRA, layer)
            weight = np.concatenate([weight, more])
        else:
            weight = weight[self._random(_EXTRA, layer).permutation(len(weight))[:width]]
        weight = np.zeros_like(weight) if silent else weight
        return weight.T if name == "down" else weight


def _check_dense(config: ModelConfig) -> None:
    if config.moe is not None:
        raise InputError(
            f"Expected a dense checkpoint, got one with {config.moe.num_experts} experts in a layer. Only a dense "
            "model can be upcycled."
        )


def upcycle(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    recipe: Recipe,
    to: Format | None = None,
    dtype: DTypeLike | None = None,
    progress: bool = False,
) -> Upcycled:
    """Writes a dense checkpoint as a mixture of experts into a new folder. After a failure nothing is left of it.

    Args:
      src: a Hugging Face folder, an Orbax folder, or a Hub id.
      dst: the new folder; must not exist or be empty.
      recipe: the mixture.
      to: "hf" or "orbax"; by default the format that `src` has.
      dtype: of the written weights; by default as stored.
      progress: show a bar on standard error if that is a terminal.

    Returns:
      The mixture that was written.

    Raises:
      InputError: as `convert.convert`; or the checkpoint already has experts.
    """
    check_options(dst, to, dtype)
    _check_dense(load_config(resolve(src, CONFIG)))
    source = Upcycled(open_source(src), recipe)
    assert source.folder is not None
    write_folder(source, dst, to or detect(source.folder), dtype, progress)
    return source
