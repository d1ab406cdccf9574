"""Writing Hugging Face folders of quantised weights."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from convert.folder import check_side_files, new_folder, write_side_files
from convert.huggingface import MAX_SHARD_BYTES, name_order
from convert.names import Leaf, leaves, projections
from convert.quantized.codes import Codes
from convert.quantized.formats import QUANTIZE_CONFIG, pack, write_config
from convert.quantized.info import FormatInfo
from convert.quantized.stored import StoredCodes
from convert.safetensors import Writer
from convert.source import Source, blocks, cast, check_storable, dtype_of, parse_dtype
from qwen_jax.errors import InputError
from qwen_jax.files import read_json
from qwen_jax.quantization import Scheme

Places = dict[str, tuple[Leaf, int]]


def export(
    source: Source,
    info: FormatInfo,
    folder: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    extra_files_from: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a quantised model as a folder of GPTQ, AWQ, compressed-tensors or fp8, matrix by matrix.

    Args:
      source: of a quantised model; its codes are packed as they are.
      info: the format.
      folder: the new folder; must not exist or be empty.
      dtype: of what is not quantised; by default as stored.
      max_shard_bytes, extra_files_from, progress: as for `convert.huggingface.export`.

    Raises:
      InputError: the format cannot hold these codes, the destination exists, or the disk is too small.
    """
    config, target = source.config, None if dtype is None else parse_dtype(dtype)
    if config.quantization is None:
        raise InputError("This model is not quantised. Quantise it first, with qwen-jax quantize.")
    check_storable(source, target)
    origin = Path(extra_files_from) if extra_files_from is not None else source.folder
    check_side_files(origin)
    # What is written: tensors of matrices that are not quantised, and the packed ones of the others.
    stored = StoredCodes(source)
    places = stored.places
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    plain = [leaf for leaf in leaves(config) if leaf.stored is None]
    for leaf in plain:
        for name in leaf.names:
            tensors[name] = dtype_of(leaf, target, source.dtype(leaf)), leaf.hf_shape
    for module in (*projections(config), "lm_head"):
        named = info.of(module) is not None and not (info.method == "fp8" and module == "lm_head")
        if named and f"{module}.weight" in tensors:
            raise InputError(
                f"{module} is not quantised, but the {info.method} configuration names it. Leave it out there."
            )
    modules = [module for module in projections(config) if places[f"{module}.weight"][0].stored is not None]
    for module in modules:
        own = info.of(module)
        if own is None:
            raise InputError(f"{module} is quantised, but the {info.method} configuration leaves it out.")
        shapes = _packed_shapes(*_abstract(module, places), own)
        tensors.update({f"{module}.{name}": entry for name, entry in shapes.items()})
    ordered = dict(sorted(tensors.items(), key=lambda entry: (name_order(entry[0]), entry[0])))
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())

    with new_folder(Path(folder), total) as temporary:
        with Writer(temporary, ordered, max_shard_bytes) as writer:
            for name, offset, data in _plain_parts(source, plain, target):
                writer.write(name, offset, data)
                if progress is not None:
                    progress(data.nbytes)
            for module in modules:
                packed = pack(stored.codes(module), info.of(module) or info, module)
                for name, data in packed.items():
                    if (data.dtype, data.shape) != tensors[name]:
                        raise InputError(f"{name} was packed as {data.dtype} {data.shape}, expected {tensors[name]}.")
                    writer.write(name, 0, np.ascontiguousarray(data))
                if progress is not None:
                    progress(sum(data.nbytes for data in packed.values()))
        stated = target.name if target is not None else None
        write_side_files(dataclasses.replace(config, quantization=None), stated, origin, temporary, both_dialects=True)
        add_config(info, temporary)


def add_config(info: FormatInfo, folder: Path) -> None:
    """Writes the quantisation into config.json of a folder; of gptq also where older readers look."""
    settings = write_config(info)
    hf = {**read_json(folder / "config.json"), "quantization_config": settings}
    written = {"config.json": hf, **({QUANTIZE_CONFIG: settings} if info.method == "gptq" else {})}
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain_parts(source: Source, plain: list[Leaf], dtype: np.dtype | None) -> Iterator[tuple[str, int, np.ndarray]]:
    """The blocks of what is not quantised: name, offset in bytes, data."""
    for leaf in plain:
        target = dtype_of(leaf, dtype, source.dtype(leaf))
        for tensors, rows in blocks(leaf, target.itemsize):
            for name, part in zip(leaf.names[tensors], source.read(leaf, tensors, rows), strict=True):
                data = np.ascontiguousarray(cast(part, target, leaf))
                yield name, rows.start * data[:1].nbytes, data


def _abstract(module: str, places: Places) -> tuple[tuple[int, int], Scheme]:
    """Outputs and inputs of a quantised matrix, and its scheme."""
    leaf, _ = places[f"{module}.weight"]
    scales, _ = places[f"{module}.scales"]
    assert leaf.stored is not None
    assert scales.stored is not None
    offset = "zero" if f"{module}.zeros" in places else "min" if f"{module}.mins" in places else "none"
    group = leaf.hf_shape[1] // scales.hf_shape[1]
    scheme = Scheme(leaf.stored, group, scales.stored, offset, f"{module}.order" in places)  # type: ignore[arg-type]
    return (leaf.hf_shape[0], leaf.hf_shape[1]), scheme


@functools.lru_cache(maxsize=64)
def _packed_shapes(
    shape: tuple[int, int], scheme: Scheme, info: FormatInfo
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of the tensors that a matrix is packed into, found by packing one of zeros."""
    outputs, inputs = shape
    groups = outputs, scheme.groups(inputs)
    arrays = {
        name: np.zeros(groups, np.dtype(jnp.dtype(dtype)))
        for name, dtype in scheme.arrays().items()
        if name not in ("weight", "order")
    }
    if scheme.ordered:
        arrays["order"] = np.arange(inputs, dtype=np.int32)
    codes = Codes(np.zeros(shape, np.dtype(jnp.dtype(scheme.codes))), **arrays)
    return {name: (data.dtype, data.shape) for name, data in pack(codes, info).items()}
