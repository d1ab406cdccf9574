"""A quantised checkpoint as one in full precision."""

import dataclasses

import numpy as np

from convert.names import Leaf, leaves
from convert.source import Source, Span
from qwen_jax.config import ModelConfig


class DequantizedSource:
    """The values of the weights of a quantised `Source`, computed in float32 as they are read."""

    def __init__(self, source: Source) -> None:
        """
        Args:
          source: of a quantised model, which may have projections that are not quantised.
        """
        self.config: ModelConfig = dataclasses.replace(source.config, quantization=None)
        self.workers, self.folder = source.workers, source.folder
        self._source = source
        # By tensor name: the leaf of the source that holds it, and its place there.
        self._places = {name: (leaf, i) for leaf in leaves(source.config) for i, name in enumerate(leaf.names)}

    def dtype(self, leaf: Leaf) -> np.dtype:
        held, _ = self._places[leaf.names[0]]
        return np.dtype(self.config.dtype) if held.stored is not None else self._source.dtype(held)

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        return None

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        return np.stack([self._tensor(name, rows) for name in leaf.names[tensors]])

    def _tensor(self, name: str, rows: slice) -> np.ndarray:
        held, _ = self._places[name]
        if held.stored is None:
            return self._array(name, rows)
        module = name.removesuffix("weight")
        codes = self._array(name, rows)
        scales = self._array(f"{module}scales", rows).astype(np.float32)
        grouped = codes.astype(np.float32).reshape(*scales.shape, -1)
        if f"{module}zeros" in self._places:
            grouped -= self._array(f"{module}zeros", rows).astype(np.float32)[..., None]
        grouped *= scales[..., None]
        if f"{module}mins" in self._places:
            grouped -= self._array(f"{module}mins", rows)[..., None]
        if f"{module}order" in self._places:
            flat = grouped.reshape(*scales.shape[:-1], -1)
            in_order = np.empty_like(flat)
            in_order[..., self._array(f"{module}order", slice(0, flat.shape[-1]))] = flat
            grouped = in_order
        return grouped.reshape(codes.shape)

    def _array(self, name: str, rows: slice) -> np.ndarray:
        leaf, i = self._places[name]
        return self._source.read(leaf, slice(i, i + 1), rows)[0]
