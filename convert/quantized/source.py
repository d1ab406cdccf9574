"""Hugging Face folders with quantised weights as a `Source`."""

import dataclasses
import functools
import logging
import math
import os
import threading
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.huggingface import SafetensorsSource
from convert.names import LM_HEAD, Leaf, leaves, projections
from convert.quantized.codes import Codes
from convert.quantized.formats import is_cache_scale, quantized_modules, read_format, tensor_names, unpack
from convert.quantized.info import FormatInfo, check_tensors
from convert.safetensors import Entry, read_rows
from convert.source import Span
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.quantization import Activations, Quantization, Scheme

_log = logging.getLogger(__name__)

# Unpacked matrices that are kept: the arrays of one are read one after the other.
_KEPT = 4


def quantization_config(folder: Path) -> dict[str, object] | None:
    """`quantization_config` of a folder's config.json; None if there is none. Its content is not checked."""
    hf = read_json(folder / "config.json")
    found: dict[str, object] | None = hf.get("quantization_config") or hf.get("compression_config")
    return found


class QuantizedSource(SafetensorsSource):
    """A folder of GPTQ, AWQ, compressed-tensors or fp8 weights. Its config says how each projection is quantised.

    A quantised head is read in full precision.
    """

    def __init__(self, folder: str | os.PathLike[str], config: ModelConfig | None = None) -> None:
        """
        Args:
          folder: with config.json and safetensors.
          config: the architecture, without quantisation; by default that of the folder.

        Raises:
          InputError: as `SafetensorsSource`; a method or layout that is not supported; or tensors that contradict the
            configuration.
        """
        self._infos: dict[str, FormatInfo] = {}
        self._packed: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._unpacked: dict[str, Codes] = {}
        super().__init__(folder, config)

    def _find(self, folder: Path) -> dict[str, Entry]:
        entries = super()._find(folder)
        info = read_format(folder, quantization_config(folder), entries)
        if info is None:
            return entries
        # Which projections are quantised, and by which tensors.
        shapes = projections(self.config)
        how = quantized_modules(info, [*shapes, "lm_head"], entries, folder)
        self._infos = {module: found for module, found in how.items() if found is not None}
        shapes["lm_head"] = self.config.vocab_size, self.config.hidden_size
        hint = f"Check the sizes and the quantisation in {folder / 'config.json'}, and that the download is complete."
        for module, found in self._infos.items():
            expected = tensor_names(module, shapes[module], found)
            packed = {name: entries.pop(name) for name in expected if name in entries}
            check_tensors(packed, expected, module, hint)
            self._packed |= packed
        self._shapes = shapes
        self.config = dataclasses.replace(self.config, quantization=self._quantization(folder, info))
        return {name: entry for name, entry in entries.items() if not is_cache_scale(name)}

    def _quantization(self, folder: Path, info: FormatInfo) -> Quantization:
        """How the projections are quantised, by their paths in the parameter tree."""
        schemes: dict[str, Scheme | None] = {}
        rounded: set[Activations] = set()
        for leaf in leaves(dataclasses.replace(self.config, quantization=None)):
            if leaf.names[0].removesuffix(".weight") not in self._shapes or not leaf.layers:
                continue
            for i, layer in enumerate(leaf.layers):
                names = leaf.names[i * leaf.per_layer : (i + 1) * leaf.per_layer]
                found = {self._scheme(name.removesuffix(".weight")) for name in names}
                if len(found) > 1:
                    raise InputError(
                        f"{folder}: the experts of layer {layer} are quantised differently ({names[0]} and others), "
                        "which is not supported. Take another version of the model."
                    )
                path = f"layers.{layer}." + ".".join(leaf.path[1:]).removesuffix(".weight")
                (schemes[path],) = found
                module = self._infos.get(names[0].removesuffix(".weight"))
                if module is not None:
                    rounded.add(module.activations)
        counted = Counter(scheme for scheme in schemes.values() if scheme is not None)
        if not counted:
            raise InputError(f"{folder}: config.json has a quantization_config, but no projection is quantised.")
        common = counted.most_common(1)[0][0]
        exceptions = tuple((path, scheme) for path, scheme in schemes.items() if scheme != common)
        activations: Activations = rounded.pop() if len(rounded) == 1 else "none"
        kinds = {common, *(scheme for _, scheme in exceptions if scheme is not None)}
        if any(scheme.group or scheme.offset != "none" or scheme.codes != activations for scheme in kinds):
            activations = "none"
        if activations == "none" and info.activations != "none":
            _log.warning("%s: activations are not rounded, since some projections have other codes.", folder)
        return Quantization(common, exceptions, activations)

    def _scheme(self, module: str) -> Scheme | None:
        info = self._infos.get(module)
        if info is None:
            return None
        names = tensor_names(module, self._shapes[module], info)
        scales = next(
            self._packed[name].dtype.name
            for name in names
            if "scale" in name.rpartition(".")[2] and name in self._packed
        )
        return Scheme(info.codes, info.scheme_group, scales, info.offset, info.ordered)  # type: ignore[arg-type]

    def _stored_leaves(self) -> tuple[Leaf, ...]:
        """The leaves whose tensors are in the files as they are."""
        return tuple(leaf for leaf in leaves(self.config) if leaf.stored is None and not self._is_head(leaf))

    def _is_head(self, leaf: Leaf) -> bool:
        return leaf.names == (LM_HEAD,) and "lm_head" in self._infos

    def dtype(self, leaf: Leaf) -> np.dtype:
        if self._is_head(leaf):
            return np.dtype(self.config.dtype)
        return super().dtype(leaf) if leaf.stored is None else np.dtype(jnp.dtype(leaf.stored))

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        return None if leaf.stored is not None or self._is_head(leaf) else super().spans(leaf, tensors, rows)

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        if self._is_head(leaf):
            return self._codes("lm_head").outputs(rows).dequantize()[None]
        if leaf.stored is None:
            return super().read(leaf, tensors, rows)
        read = functools.partial(self._array, leaf, rows)
        return np.stack([read(*name.rsplit(".", 1)) for name in leaf.names[tensors]])

    def _array(self, leaf: Leaf, rows: slice, module: str, array: str) -> np.ndarray:
        """Rows of one of the arrays of a projection."""
        codes = self._codes(module)
        if array == "order":
            order = codes.order
            return np.arange(rows.start, rows.stop, dtype=np.int32) if order is None else order[rows]
        found = {"weight": codes.codes, "scales": codes.scales, "zeros": codes.zeros, "mins": codes.mins}[array]
        if found is None:
            return np.zeros((rows.stop - rows.start, *leaf.shape[1:]), self.dtype(leaf))
        if found.dtype != self.dtype(leaf) or found.size != math.prod(leaf.shape):
            raise InputError(
                f"{module}: expected {array} {self.dtype(leaf)} {list(leaf.shape)}, got {found.dtype} "
                f"{list(found.shape)}. Check that config.json belongs to these weights."
            )
        return found.reshape(leaf.shape)[rows]

    def _codes(self, module: str) -> Codes:
        """One matrix, unpacked; the last few are kept."""
        with self._lock:
            if module not in self._unpacked:
                while len(self._unpacked) >= _KEPT:  # Before the next one is unpacked.
                    del self._unpacked[next(iter(self._unpacked))]
                info, shape = self._infos[module], self._shapes[module]
                names = [name for name in tensor_names(module, shape, info) if name in self._packed]
                codes = unpack({name: self._read_whole(self._packed[name]) for name in names}, info, module, shape)
                self._unpacked[module] = codes
            return self._unpacked[module]

    def _read_whole(self, entry: Entry) -> np.ndarray:
        out = np.empty(entry.shape, entry.dtype)
        read_rows(self._files.descriptor(entry), entry, slice(0, entry.shape[0] if entry.shape else 1), out)
        return out
