"""Quantised weights of other formats in GGUF files, without quantising them anew."""

import numpy as np

from convert.gguf.blocks import pack
from convert.gguf.names import Tensor
from convert.names import Leaf, leaves
from convert.quantized.codes import Codes
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
        self._source = source
        # By the name of each array: the leaf that holds it, and its place there.
        self._places = {name: (leaf, i) for leaf in leaves(source.config) for i, name in enumerate(leaf.names)}

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
        if f"{module}scales" not in self._places:
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
        module, arrays = name.removesuffix("weight"), {}
        for array in ("weight", "scales", "zeros", "mins"):
            if f"{module}{array}" in self._places:
                leaf, i = self._places[f"{module}{array}"]
                found = self._source.read(leaf, slice(i, i + 1), rows)[0]
                arrays["codes" if array == "weight" else array] = found.reshape(_outputs(leaf, rows), -1)
        if f"{module}order" in self._places:
            leaf, i = self._places[f"{module}order"]
            order = self._source.read(leaf, slice(i, i + 1), slice(0, leaf.shape[0]))[0]
            # An order that changes nothing is none.
            arrays |= {} if np.array_equal(order, np.arange(len(order))) else {"order": order}
        return Codes(**arrays)


def _outputs(leaf: Leaf, rows: slice) -> int:
    """Outputs in a range of the first axis: head_dim times as many for heads."""
    return (rows.stop - rows.start) * (leaf.hf_shape[0] // leaf.shape[0])
