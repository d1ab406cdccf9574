"""Reading the weights of a GGUF file."""

import os
import weakref
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from convert.gguf.blocks import FLOATS, code_type, dequantize, unpack
from convert.gguf.names import place, tensors
from convert.names import Leaf, check_names, leaves
from convert.quantized.codes import Codes
from convert.source import Span, parse_dtype
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import Header, TensorInfo, read_header

# Types that are no weights, or that are only for activations.
_NOT_WEIGHTS = frozenset(("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"))


class GGUFSource:
    """A GGUF file as a `Source` of full-precision values; all of its header is checked before any weights are read.

    Attributes:
      header: of the file.
      folder: the file itself, which has config and tokenizer in it.
    """

    workers = min(4, os.cpu_count() or 1)

    def __init__(
        self, path: str | os.PathLike[str], config: ModelConfig | None = None, dtype: DTypeLike = "float32"
    ) -> None:
        """
        Args:
          path: the file; any of them for a split model.
          config: by default that of the file.
          dtype: which `dtype` names for quantised weights; float32 holds their values as the file gives them.

        Raises:
          InputError: files that are missing or damaged, another architecture, or tensors that do not fit the config.
        """
        self.folder: Path | None = Path(path)
        self.header: Header = read_header(path)
        self.config = config or ModelConfig.from_gguf(self.header)
        self._quantized = parse_dtype(dtype)
        self._infos = self._check()
        self._dtypes = {leaf: self._common_dtype(leaf) for leaf in leaves(self.config)}
        self._descriptors: dict[Path, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    def _check(self) -> dict[str, TensorInfo]:
        """Compares names, shapes and types with what the config describes; returns the tensors by name."""
        expected, found = {tensor.name: tensor for tensor in tensors(self.config)}, self.header.tensors
        missing = [name for name in expected if name not in found]
        unknown = [name for name in found if name not in expected]
        check_names(self.header.path, missing, unknown, self.config)
        for name, tensor in expected.items():
            info = found[name]
            if _without_ones(info.shape) != _without_ones(tensor.shape):
                raise InputError(
                    f"{info.file}: {name} has shape {list(info.shape)}, the metadata ask for {list(tensor.shape)}. The "
                    "file is damaged, or was written by a tool that lays tensors out in another way."
                )
            is_vector = len(tensor.parts[0][0].hf_shape) == 1
            if info.type.name in _NOT_WEIGHTS or (is_vector and info.type.name not in FLOATS):
                raise InputError(
                    f"{info.file}: {name} has the type {info.type.name}, which {'vectors are' if is_vector else 'is'} "
                    f"not read from. Quantise the model in another way; vectors stay in {', '.join(FLOATS)}."
                )
        return found

    def _common_dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype of a leaf: that of its tensors, or the one that holds the values of all of them."""
        kinds = {self.info(name).type.name for name in leaf.names}
        if not kinds <= FLOATS.keys():
            return self._quantized
        return FLOATS[kinds.pop()] if len(kinds) == 1 else np.dtype(np.float32)

    def info(self, name: str) -> TensorInfo:
        """The tensor of the file that holds one of Hugging Face's."""
        return self._infos[place(name).name]

    def dtype(self, leaf: Leaf) -> np.dtype:
        if leaf not in self._dtypes:  # Some of the layers, where the others are quantised.
            self._dtypes[leaf] = self._common_dtype(leaf)
        return self._dtypes[leaf]

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        per_row = leaf.hf_shape[0] // leaf.shape[0]
        hf_rows = slice(rows.start * per_row, rows.stop * per_row)
        shape = (rows.stop - rows.start, *leaf.shape[1:])
        parts = []
        for name in leaf.names[tensors]:
            info, data = self.info(name), self.read_rows(name, hf_rows, leaf.hf_shape[0])
            stored = FLOATS.get(info.type.name)
            if stored is not None:
                parts.append(data.view(stored).reshape(shape))
                continue
            values = dequantize(data, info.type)
            if not np.isfinite(values).all():
                raise _not_finite(info)
            parts.append(values.reshape(shape))
        return np.stack(parts)

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        per_row, found = leaf.hf_shape[0] // leaf.shape[0], []
        for name in leaf.names[tensors]:
            if FLOATS.get(self.info(name).type.name) != self.dtype(leaf):
                return None
            found.append(self._span(name, slice(rows.start * per_row, rows.stop * per_row), leaf.hf_shape[0]))
        return found

    def read_rows(self, name: str, rows: slice, num_rows: int) -> np.ndarray:
        """Reads rows of one of Hugging Face's tensors as the file stores them.

        Args:
          name: of the tensor.
          rows: of its first axis.
          num_rows: size of that axis.

        Returns:
          uint8 [rows, bytes of a row].
        """
        span = self._span(name, rows, num_rows)
        if span.file not in self._descriptors:
            # Two threads may both open it: the first descriptor is kept, the other is closed.
            descriptor = os.open(span.file, os.O_RDONLY)
            if self._descriptors.setdefault(span.file, descriptor) != descriptor:
                os.close(descriptor)
        out = np.empty(span.nbytes, np.uint8)
        done = 0
        while done < span.nbytes:
            count = os.preadv(self._descriptors[span.file], [out.data[done:]], span.offset + done)
            if count == 0:
                raise InputError(f"{span.file} ends too early; it changed while it was read.")
            done += count
        return out.reshape(rows.stop - rows.start, -1)

    def _span(self, name: str, rows: slice, num_rows: int) -> Span:
        where = place(name)
        info, experts = self._infos[where.name], 1 if where.expert is None else self._infos[where.name].shape[0]
        row_bytes = info.nbytes // (experts * num_rows)
        first = (where.expert or 0) * num_rows + rows.start
        return Span(info.file, info.offset + first * row_bytes, (rows.stop - rows.start) * row_bytes)

    def codes(self, name: str, rows: slice | None = None) -> Codes | None:
        """The codes of one of Hugging Face's matrices, as its type stores them.

        Args:
          name: of the matrix, such as "model.layers.0.mlp.down_proj.weight".
          rows: range of its outputs; by default all.

        Returns:
          Codes and scales; None if the matrix is not quantised, or in a type that can only be dequantised.

        Raises:
          InputError: a scale that is not finite.
        """
        info = self.info(name)
        if code_type(info.type) is None:
            return None
        outputs = info.shape[-2] if len(info.shape) > 1 else 1
        data = self.read_rows(name, rows or slice(0, outputs), outputs)
        found = unpack(data, info.type)
        for scales in (found.scales, found.mins):
            if scales is not None and not np.isfinite(scales).all():
                raise _not_finite(info)
        return found


def _not_finite(info: TensorInfo) -> InputError:
    return InputError(
        f"{info.file}: tensor {info.name} of type {info.type.name} has a scale that is not a finite number. The "
        "file is damaged, or the model was quantised from weights with NaN."
    )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without axes of size 1: files differ in whether a matrix of one row is a vector."""
    return tuple(size for size in shape if size != 1)


def _close_all(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
