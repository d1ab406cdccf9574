"""One layer of a checkpoint in memory, and the matrices of it that are quantised."""

import dataclasses
from typing import Any

import jax
import numpy as np

from convert.names import Leaf, leaves
from convert.source import Source, cast
from qwen_jax.config import ModelConfig

# Projections by their path in a layer: which input they have, in the order in which a layer computes them.
_INPUTS = {
    "attention.q.weight": "qkv",
    "attention.k.weight": "qkv",
    "attention.v.weight": "qkv",
    "attention.o.weight": "o",
    "mlp.gate.weight": "gate_up",
    "mlp.up.weight": "gate_up",
    "mlp.down.weight": "down",
    "moe.experts.gate_up": "experts.gate_up",
    "moe.shared.gate.weight": "gate_up",
    "moe.shared.up.weight": "gate_up",
    "moe.experts.down": "experts.down",
    "moe.shared.down.weight": "down",
}
STAGES = ("qkv", "o", "gate_up", "down")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A projection of one layer, as a matrix [outputs, inputs].

    Attributes:
      module: its name in a Hugging Face folder, such as "model.layers.3.mlp.up_proj".
      path: of the parameter in the layer, such as "mlp.up.weight".
      index: of the matrix in the parameter: expert, and gate (0) or up (1); () if the parameter is the matrix.
      shape: outputs and inputs.
      inputs: which activations it multiplies: "qkv", "o", "gate_up" or "down"; of an expert, "experts.gate_up.7".
    """

    module: str
    path: str
    index: tuple[int, ...]
    shape: tuple[int, int]
    inputs: str

    @property
    def stage(self) -> str:
        """When a layer computes it: one of `STAGES`."""
        return self.inputs.split(".")[1] if self.inputs.startswith("experts.") else self.inputs

    @property
    def expert(self) -> int | None:
        """The expert that it belongs to."""
        return self.index[0] if self.inputs.startswith("experts.") else None


class Layer:
    """The parameters of one layer on the host, float32, and what is written of them.

    Attributes:
      number: of the layer, from 0.
      params: arrays by path, such as "mlp.up.weight".
      matrices: the projections, in the order in which the layer computes them.
    """

    def __init__(self, source: Source, number: int) -> None:
        """
        Args:
          source: the checkpoint.
          number: of the layer.
        """
        self.number = number
        self._leaves = {path: leaf for path, leaf in _layer_leaves(source.config) if number in leaf.layers}
        self.dtypes = {path: source.dtype(leaf) for path, leaf in self._leaves.items()}
        self.params: dict[str, np.ndarray] = {}
        for path, leaf in self._leaves.items():
            first = leaf.layers.index(number) * leaf.per_layer
            data = source.read(leaf, slice(first, first + leaf.per_layer), slice(0, leaf.shape[0]))
            self.params[path] = data.astype(np.float32).reshape(leaf.layer_shape)
        self.matrices = matrices(source.config, number)

    def weight(self, matrix: Matrix) -> jax.Array:
        """A projection, float32 [outputs, inputs], on the device."""
        # A copy: the array of the host may be changed later.
        return jax.device_put(self.params[matrix.path][matrix.index], may_alias=False).reshape(matrix.shape)

    def set_weight(self, matrix: Matrix, weight_OI: jax.Array) -> None:
        """Replaces a projection."""
        array = self.params[matrix.path]
        array[matrix.index] = np.asarray(weight_OI).reshape(array[matrix.index].shape)

    def tree(self) -> dict[str, Any]:
        """The parameters as a nested dict."""
        result: dict[str, Any] = {}
        for path, array in self.params.items():
            *parents, name = path.split(".")
            inner = result
            for key in parents:
                inner = inner.setdefault(key, {})
            inner[name] = array
        return result

    def plain_tensors(self) -> dict[str, np.ndarray]:
        """What is not quantised (norms, biases, routers) by Hugging Face's names, in the stored dtypes."""
        return {
            leaf.names[leaf.layers.index(self.number)]: cast(
                self.params[path].reshape(leaf.hf_shape), self.dtypes[path], leaf
            )
            for path, leaf in self._leaves.items()
            if path not in _INPUTS
        }


def _layer_leaves(config: ModelConfig) -> list[tuple[str, Leaf]]:
    """The leaves that layers have, by their path in a layer."""
    return [(".".join(leaf.path[1:]), leaf) for leaf in leaves(config) if leaf.layers]


def matrices(config: ModelConfig, number: int) -> list[Matrix]:
    """The projections of a layer, in the order in which it computes them.

    Args:
      config: the architecture.
      number: of the layer.
    """
    found = []
    for path, leaf in _layer_leaves(config):
        if path not in _INPUTS or number not in leaf.layers:
            continue
        first = leaf.layers.index(number) * leaf.per_layer
        for i, name in enumerate(leaf.names[first : first + leaf.per_layer]):
            index = tuple(int(n) for n in np.unravel_index(i, leaf.stack[1:])) if leaf.stack[1:] else ()
            inputs = f"{_INPUTS[path]}.{index[0]}" if index else _INPUTS[path]
            shape = leaf.hf_shape[0], leaf.hf_shape[1]
            found.append(Matrix(name.removesuffix(".weight"), path, index, shape, inputs))
    return sorted(found, key=lambda matrix: STAGES.index(matrix.stage))
