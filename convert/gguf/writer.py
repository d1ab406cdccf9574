"""Writing a model as a GGUF file."""

import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.dequantize import DequantizedSource
from convert.folder import new_file
from convert.gguf import kquants
from convert.gguf.blocks import FLOATS
from convert.gguf.exact import ExactCodes
from convert.gguf.metadata import write_config
from convert.gguf.names import Tensor, has_head, tensors
from convert.gguf.package import gguf_library
from convert.gguf.quantized import QuantizedGGUF
from convert.gguf.reader import GGUFSource
from convert.gguf.recipes import RECIPES, Recipe, type_of
from convert.source import Source, check_storable, run_all
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import ALIGNMENT, TensorType
from qwen_jax.gguf.metadata import EMBED
from qwen_jax.hub import has_vocabulary
from qwen_jax.inference.settings import add_end_ids
from qwen_jax.tokenizer.bpe import ByteLevelBPE
from qwen_jax.tokenizer.gguf import to_gguf

_log = logging.getLogger(__name__)

_VALUES_AT_A_TIME = 2**20  # Quantising needs many temporary arrays of this size.
_QUANTIZATION_VERSION = 2
_FLOAT_RECIPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def export(
    source: Source,
    file: str | os.PathLike[str],
    recipe: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a GGUF file that llama.cpp and transformers load. After a failure nothing is left.

    Tensors of another GGUF file that keep their type keep their bytes. Without a recipe, symmetric codes of other
    formats become Q4_0 or Q8_0 and keep their values.

    Args:
      source: the parameters; tokenizer and further end ids are read from its folder.
      file: the new file.
      recipe: a key of `RECIPES`; by default the dtype or the codes of the parameters, and for a GGUF file the types
        that it has.
      progress: called with the number of bytes of each block in the dtype of `source`, when it is written.

    Raises:
      InputError: the file exists, the disk is too small, the package gguf is not installed, or the model has something
        that llama.cpp has not.
    """
    if recipe is not None and recipe not in RECIPES:
        raise InputError(f"Expected a type of {', '.join(RECIPES)}; got {recipe!r}.")
    gguf_library()
    exact = None
    if isinstance(source, QuantizedGGUF):
        source = source.full_precision()
    elif source.config.quantization is not None:
        exact = ExactCodes(source) if recipe is None else None
        source = DequantizedSource(source)
    check_storable(source, None)
    stored = source if isinstance(source, GGUFSource) else None
    types, file_type = _types(source, recipe, exact)
    metadata = _metadata(source, stored, file_type)
    listed = tensors(source.config, has_head(source.config))
    sizes = {tensor.name: _nbytes(tensor, types[tensor.name]) for tensor in listed}
    with new_file(Path(file), sum(sizes.values())) as temporary:
        _write_header(temporary, metadata, listed, types, sizes)
        # Each tensor's data at its place, in blocks.
        start, tasks = _aligned(temporary.stat().st_size), []
        with temporary.open("r+b") as out:
            out.truncate(start + sum(map(_aligned, sizes.values())))
            for tensor in listed:
                kind = types[tensor.name]
                for block in _blocks(tensor, kind):
                    read = functools.partial(_read_block, source, stored, exact, kind, block)
                    write = functools.partial(_write_block, read, out.fileno(), start, source, block, progress)
                    tasks.append(write)
                start += _aligned(sizes[tensor.name])
            run_all(source.workers, tasks)


def _types(source: Source, recipe: str | None, exact: ExactCodes | None) -> tuple[dict[str, TensorType], int]:
    """The type of each tensor, and the number of the mix."""
    config = source.config
    listed = tensors(config, has_head(config))
    if recipe is None and isinstance(source, GGUFSource):
        kinds = {tensor.name: _stored_type(source, tensor) for tensor in listed}
        file_type = source.header.metadata.get("general.file_type")
        return kinds, file_type if isinstance(file_type, int) else RECIPES["f32"].file_type
    embed = next(tensor for tensor in listed if tensor.name == EMBED).parts[0][0]
    chosen: Recipe = RECIPES[recipe or _FLOAT_RECIPES[source.dtype(embed).name]]
    kinds = {tensor.name: type_of(chosen, tensor, config) for tensor in listed}
    if exact is None:
        return kinds, chosen.file_type
    codes = {tensor.name: exact.type_of(tensor) for tensor in listed}
    kinds |= {name: kind for name, kind in codes.items() if kind is not None}
    counted = Counter(kind.name.lower() for kind in codes.values() if kind is not None)
    return kinds, RECIPES[counted.most_common(1)[0][0]].file_type


def _stored_type(source: GGUFSource, tensor: Tensor) -> TensorType:
    """The type in which a GGUF file stores a tensor's values."""
    leaf, i = tensor.parts[0]
    return source.info(leaf.names[i]).type


# --- The header --------------------------------------------------------------------------------------------------


def _metadata(source: Source, stored: GGUFSource | None, file_type: int) -> dict[str, Any]:
    """All metadata but the architecture's name, in the order in which they are written."""
    config: ModelConfig = source.config if source.folder is None else add_end_ids(source.config, source.folder)
    if stored is not None:
        general = {key: x for key, x in stored.header.metadata.items() if key.startswith("general.")}
        general = {key: x for key, x in general.items() if isinstance(x, str) and key != "general.architecture"}
    else:
        general = {"general.type": "model", "general.name": _name(source.folder)}
    metadata: dict[str, Any] = {**general, **write_config(config)}
    tokenizer = _tokenizer(source.folder)
    metadata |= {"tokenizer.ggml.model": "none"} if tokenizer is None else to_gguf(tokenizer, config.vocab_size)
    metadata |= {"general.quantization_version": _QUANTIZATION_VERSION, "general.file_type": file_type}
    return metadata


def _name(folder: Path | None) -> str:
    """The model's name: that of its folder, or of its repository in the Hub's cache."""
    if folder is None:
        return "model"
    folder = folder.absolute()
    return folder.parent.parent.name.split("--")[-1] if folder.parent.name == "snapshots" else folder.name


def _tokenizer(folder: Path | None) -> ByteLevelBPE | None:
    from qwen_jax.gguf.header import is_gguf, read_header
    from qwen_jax.tokenizer import load_tokenizer
    from qwen_jax.tokenizer.gguf import has_tokenizer

    if folder is not None and is_gguf(folder):
        there = has_tokenizer(read_header(folder))
    else:
        there = folder is not None and has_vocabulary(folder)
    if folder is None or not there:
        _log.warning("%s has no tokenizer, and so has the GGUF file: llama.cpp takes only ids for it.", folder)
        return None
    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer, ByteLevelBPE):
        raise InputError(
            f"{folder} has a SentencePiece tokenizer; GGUF files of Qwen2 models have a byte-level one. Keep the model "
            "in another format."
        )
    return tokenizer


def _write_header(
    file: Path,
    metadata: dict[str, Any],
    listed: list[Tensor],
    types: dict[str, TensorType],
    sizes: dict[str, int],
) -> None:
    library = gguf_library()
    kinds = library.GGUFValueType
    # The keys of the architecture begin with its name.
    architecture = next(key for key in metadata if key.endswith(".block_count")).partition(".")[0]
    writer = library.GGUFWriter(file, architecture)
    for key, value in metadata.items():
        kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
        writer.add_key_value(key, value, kind[type(value)])
    for tensor in listed:
        number = library.GGMLQuantizationType(types[tensor.name].number)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), sizes[tensor.name], number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


# --- The data ----------------------------------------------------------------------------------------------------

# A part of a tensor: index among `parts`, rows of the parameter, and the offset of its data in the tensor's.
_Block = tuple[Tensor, int, slice, int]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _nbytes(tensor: Tensor, kind: TensorType) -> int:
    return math.prod(tensor.shape) // kind.block * kind.nbytes


def _blocks(tensor: Tensor, kind: TensorType) -> Iterator[_Block]:
    """Cuts a tensor into ranges of rows of its parts."""
    each = _nbytes(tensor, kind) // len(tensor.parts)
    for i, (leaf, _) in enumerate(tensor.parts):
        rows, values = leaf.shape[0], math.prod(leaf.shape)
        step = max(1, _VALUES_AT_A_TIME * rows // values)
        for start in range(0, rows, step):
            yield tensor, i, slice(start, min(start + step, rows)), i * each + start * each // rows


def _read_block(
    source: Source, stored: GGUFSource | None, exact: ExactCodes | None, kind: TensorType, block: _Block
) -> np.ndarray:
    """The bytes of a block.

    Args:
      source: the parameters in full precision.
      stored: the same, if they are in a GGUF file.
      exact: their codes, if they are in another format.
      kind: how the values are stored.
      block: which values.
    """
    tensor, i, rows, _ = block
    leaf, index = tensor.parts[i]
    name = leaf.names[index]
    if stored is not None and _stored_type(stored, tensor) == kind:
        per_row = leaf.hf_shape[0] // leaf.shape[0]
        return stored.read_rows(name, slice(rows.start * per_row, rows.stop * per_row), leaf.hf_shape[0])
    if exact is not None and exact.type_of(tensor) is not None:
        return exact.rows(name, rows)
    values = source.read(leaf, slice(index, index + 1), rows)
    return encode(values.reshape(-1, tensor.shape[-1] if len(tensor.shape) > 1 else values.size), kind, tensor.name)


def _write_block(
    read: Callable[[], np.ndarray],
    descriptor: int,
    start: int,
    source: Source,
    block: _Block,
    progress: Callable[[int], None] | None,
) -> None:
    """Writes a block to its place in a file, where the tensor's data begin at `start`."""
    tensor, i, rows, offset = block
    written, content = 0, read().reshape(-1).view(np.uint8).data
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], start + offset + written)
    if progress is not None:
        leaf, _ = tensor.parts[i]
        progress((rows.stop - rows.start) * math.prod(leaf.shape[1:]) * source.dtype(leaf).itemsize)


def encode(rows: np.ndarray, kind: TensorType, name: str) -> np.ndarray:
    """Stores rows of values in a type.

    Args:
      rows: [rows, columns] of any float dtype; columns a multiple of the type's block.
      kind: one of `RECIPES` or that these fall back to.
      name: of the tensor, for messages.

    Returns:
      uint8 [rows, bytes of a row].

    Raises:
      InputError: values that the type cannot hold.
    """
    dtype = FLOATS.get(kind.name)
    if dtype == rows.dtype:
        return np.ascontiguousarray(rows).view(np.uint8)
    values = np.ascontiguousarray(rows, np.float32)
    if kind.name not in ("F32", "BF16") and not np.abs(values).max() <= np.finfo(np.float16).max:  # NaN too.
        raise InputError(
            f"{name} has values that are not finite or beyond the range of float16, in which {kind.name} stores its "
            "scales. Write the model as f32 or bf16."
        )
    if dtype is not None:
        return values.astype(dtype).view(np.uint8)
    if kind.name in kquants.QUANTIZE:
        return kquants.QUANTIZE[kind.name](values)
    library = gguf_library()
    try:
        result: np.ndarray = library.quants.quantize(values, library.GGMLQuantizationType(kind.number))
    except NotImplementedError:
        raise InputError(f"{name} cannot be quantised to {kind.name}; types are {', '.join(RECIPES)}.") from None
    return result
