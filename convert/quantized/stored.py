"""The matrices of a quantised `Source`, one at a time, in the form that all formats share."""

import numpy as np

from convert.names import Leaf, leaves
from convert.quantized.codes import Codes
from convert.source import Source


class StoredCodes:
    """Finds the arrays of quantised matrices in a source.

    Attributes:
      places: for every tensor, by name, the leaf that holds it and its number there.
    """

    def __init__(self, source: Source) -> None:
        """
        Args:
          source: of a quantised model, which may have projections that are not quantised.
        """
        self._source = source
        self.places: dict[str, tuple[Leaf, int]] = {
            name: (leaf, i) for leaf in leaves(source.config) for i, name in enumerate(leaf.names)
        }

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Rows of a tensor, by default all, in the shape of the parameter."""
        leaf, i = self.places[name]
        return self._source.read(leaf, slice(i, i + 1), rows or slice(0, leaf.shape[0]))[0]

    def codes(self, module: str, rows: slice | None = None) -> Codes:
        """A quantised matrix, or the outputs of it in a range of the parameter's first axis.

        Args:
          module: Hugging Face's name of the matrix.
          rows: the range; None for all.
        """
        leaf, _ = self.places[f"{module}.weight"]
        rows = rows or slice(0, leaf.shape[0])
        # Outputs are head_dim times as many as heads.
        outputs = (rows.stop - rows.start) * (leaf.hf_shape[0] // leaf.shape[0])
        arrays = {
            "codes" if name == "weight" else name: self.read(f"{module}.{name}", rows).reshape(outputs, -1)
            for name in ("weight", "scales", "zeros", "mins")
            if f"{module}.{name}" in self.places
        }
        if f"{module}.order" in self.places:
            arrays["order"] = self.read(f"{module}.order")
        return Codes(**arrays)
