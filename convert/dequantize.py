"""A quantised checkpoint as one in full precision."""

import dataclasses

import numpy as np

from convert.names import Leaf
from convert.quantized.stored import StoredCodes
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
        self._source, self._stored = source, StoredCodes(source)

    def dtype(self, leaf: Leaf) -> np.dtype:
        held, _ = self._stored.places[leaf.names[0]]
        return np.dtype(self.config.dtype) if held.stored is not None else self._source.dtype(held)

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        return None

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        return np.stack([self._tensor(name, rows) for name in leaf.names[tensors]])

    def _tensor(self, name: str, rows: slice) -> np.ndarray:
        held, _ = self._stored.places[name]
        if held.stored is None:
            return self._stored.read(name, rows)
        values = self._stored.codes(name.removesuffix(".weight"), rows).dequantize()
        return values.reshape(rows.stop - rows.start, *held.shape[1:])
