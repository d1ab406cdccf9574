"""Quantised weights of other formats in GGUF files, without quantising them anew."""

import dataclasses

import numpy as np

from convert.gguf.blocks import pack
from convert.gguf.names import Tensor
from convert.quantized.codes import Codes
from convert.quantized.stored import StoredCodes
from convert.source import Source
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import TensorType


class ExactCodes:
    """The projections of a quantised `Source`, whose codes are written as Q4_0 or Q8_0."""

    def __init__(self, source: Source) -> None:
        """
        Args:
          source: of a model with `ModelConfig.quantization`.
        """
        self._stored = StoredCodes(source)

    def type_of(self, tensor: Tensor) -> TensorType | None:
        """The type that holds a tensor's codes; None if the tensor is not quantised.

        Raises:
          InputError: no type does.
        """
        kinds = {self._type(leaf.names[i]) for leaf, i in tensor.parts}
        if len(kinds) > 1:
            raise InputError(f"The experts of {tensor.name} are quantised differently; give --type to quantise anew.")
        return kinds.pop()

    def _type(self, name: str) -> TensorType | None:
        module = name.removesuffix("weight")
        if f"{module}scales" not in self._stored.places:
            return None
        return pack(self._codes(name, slice(0, 1)))[0]

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a matrix in that type.

        Args:
          name: of the matrix in Hugging Face's layout.
          rows: range of the parameter's first axis.

        Returns:
          uint8 [outputs, bytes of a row].

        Raises:
          InputError: codes that the type does not hold, such as zero points.
        """
        return pack(self._codes(name, rows))[1]

    def _codes(self, name: str, rows: slice) -> Codes:
        codes = self._stored.codes(name.removesuffix(".weight"), rows)
        if codes.order is not None and np.array_equal(codes.order, np.arange(len(codes.order))):
            codes = dataclasses.replace(codes, order=None)  # An order that changes nothing is none.
        return codes
