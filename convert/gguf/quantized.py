"""A GGUF file as a `Source` of codes, which the model runs with."""

import dataclasses
import logging
import os
from collections import Counter

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from convert.gguf.blocks import code_type, describe, unpack
from convert.gguf.reader import GGUFSource
from convert.names import Leaf, leaves, projections
from convert.source import Span
from qwen_jax.config import ModelConfig
from qwen_jax.gguf.header import TensorType
from qwen_jax.quantization import Quantization, Scheme

_log = logging.getLogger(__name__)


class QuantizedGGUF(GGUFSource):
    """A GGUF file. Its config says how each projection is quantised; the other weights are read in full precision.

    A projection whose type can only be dequantised is read in full precision, too. So are the experts of a layer, if
    gate and up have different types.
    """

    def __init__(self, path: str | os.PathLike[str], config: ModelConfig | None = None) -> None:
        """
        Args:
          path, config: as for `GGUFSource`. How weights are quantised is read from the file.

        Raises:
          InputError: as `GGUFSource`.
        """
        super().__init__(path, config and dataclasses.replace(config, quantization=None))
        self._full_config = self.config
        schemes = self._schemes()
        counted = Counter(found for found in schemes.values() if found is not None)
        if counted:
            common = counted.most_common(1)[0][0]
            exceptions = tuple((module, found) for module, found in schemes.items() if found != common)
            self.config = dataclasses.replace(self.config, quantization=Quantization(common, exceptions))
        kinds = {self.info(f"{module}.weight").type for module in projections(self._full_config)}
        if any(kind.block > 1 for kind in kinds):
            _log.warning("%s: types of its projections: %s.", path, describe(kinds))

    def _schemes(self) -> dict[str, Scheme | None]:
        """The scheme of each projection by its path in the parameter tree."""
        known, schemes = projections(self.config), {}
        for leaf in leaves(self.config):
            if not leaf.layers or leaf.names[0].removesuffix(".weight") not in known:
                continue
            for i, layer in enumerate(leaf.layers):
                names = leaf.names[i * leaf.per_layer : (i + 1) * leaf.per_layer]
                kinds = {self.info(name).type for name in names}
                path = f"layers.{layer}." + ".".join(leaf.path[1:]).removesuffix(".weight")
                schemes[path] = scheme(next(iter(kinds))) if len(kinds) == 1 else None
        return schemes

    def full_precision(self, dtype: DTypeLike = "float32") -> GGUFSource:
        """The same file as values; `dtype` as for `GGUFSource`."""
        assert self.folder is not None
        return GGUFSource(self.folder, self._full_config, dtype)

    def dtype(self, leaf: Leaf) -> np.dtype:
        return super().dtype(leaf) if leaf.stored is None else np.dtype(jnp.dtype(leaf.stored))

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        return super().spans(leaf, tensors, rows) if leaf.stored is None else None

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        if leaf.stored is None:
            return super().read(leaf, tensors, rows)
        per_row = leaf.hf_shape[0] // leaf.shape[0]
        hf_rows = slice(rows.start * per_row, rows.stop * per_row)
        parts = []
        for name in leaf.names[tensors]:
            module, _, array = name.rpartition(".")
            codes = self.codes(f"{module}.weight", hf_rows)
            assert codes is not None
            found = {"weight": codes.codes, "scales": codes.scales, "mins": codes.mins}[array]
            assert found is not None
            parts.append(found.reshape(rows.stop - rows.start, *leaf.shape[1:]))
        return np.stack(parts)


def scheme(kind: TensorType) -> Scheme | None:
    """How the codes of a type are held in memory; None if it can only be dequantised."""
    codes = code_type(kind)
    if codes is None:
        return None
    found = unpack(np.zeros((1, kind.nbytes), np.uint8), kind)
    offset = "none" if found.mins is None else "min"
    return Scheme(codes, found.group, found.scales.dtype.name, offset)  # type: ignore[arg-type]
