"""Moving checkpoints: Hugging Face safetensors, Orbax and GGUF to and from each other, and any of them onto a mesh.

This module is the public interface; the module of a format is imported when it is needed.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from convert.folder import Format, check_destination, check_new_file, detect
from convert.source import Source, nbytes, parse_dtype
from qwen_jax.config import DTYPES, ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.gguf.header import is_gguf
from qwen_jax.hub import CONFIG, is_hub_id, resolve
from qwen_jax.options import Options
from qwen_jax.params import Params

_log = logging.getLogger(__name__)

__all__ = ["convert", "detect", "is_quantized", "load", "load_params", "merge_adapter", "open_source", "write_folder"]


def open_source(path: str | os.PathLike[str], config: ModelConfig | None = None) -> Source:
    """Opens a checkpoint of any format and checks it, without reading the weights.

    Args:
      path: a Hugging Face folder, an Orbax folder, a GGUF file, or a Hub id.
      config: the architecture that the checkpoint must have; by default that of its config.json.

    Raises:
      InputError: no such checkpoint, a damaged one, or an unsupported model.
    """
    if is_hub_id(path):
        load_config(resolve(path, CONFIG))  # Refuse an unsupported model before its weights are downloaded.
    folder = resolve(path)
    stored = detect(folder)
    if stored == "gguf":
        from convert.gguf import QuantizedGGUF

        return QuantizedGGUF(folder, config)
    if stored == "hf":
        from convert.quantized.source import QuantizedSource

        return QuantizedSource(folder, config)
    from convert.orbax import OrbaxSource

    return OrbaxSource(folder, config)


def is_quantized(folder: Path) -> bool:
    """Whether a checkpoint says that its weights are quantised. They are not looked at."""
    from convert.quantized.formats import QUANTIZE_CONFIG
    from convert.quantized.source import quantization_config

    if is_gguf(folder):
        return True
    return (folder / QUANTIZE_CONFIG).is_file() or quantization_config(folder) is not None


def merge_adapter(source: Source, adapter: str | os.PathLike[str] | None) -> Source:
    """A checkpoint with an adapter merged into its weights, summed in float32.

    Args:
      source: the base model.
      adapter: a LoRA folder of PEFT; None returns the source.

    Raises:
      InputError: an adapter that does not fit the model, or of another kind.
    """
    if adapter is None:
        return source
    from convert.adapter import MergedSource, read_adapter

    if source.config.quantization is not None:
        raise InputError(
            f"The weights of {source.folder or 'this model'} are quantised, so that {adapter} cannot be merged into "
            f"them. Serve the adapter beside them (qwen-jax serve --adapter NAME={adapter}), or merge it into the "
            f"dequantised weights: qwen-jax convert --to hf --dtype bfloat16 --merge-adapter {adapter}."
        )
    return MergedSource(source, read_adapter(adapter, source.config))


def load(
    path: str | os.PathLike[str],
    mesh: Mesh,
    dtype: DTypeLike | None = None,
    options: Options = Options(stacked=False),
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[ModelConfig, Params]:
    """Loads a checkpoint of any format onto a mesh, tensor by tensor; each process reads what its devices hold.

    Args:
      path: a Hugging Face folder, an Orbax folder, a GGUF file, or a Hub id.
      mesh: from `make_mesh`.
      dtype: of the parameters; by default as stored.
      options: `stacked` decides the layout; by default that of inference.
      adapter: a LoRA folder of PEFT, which is merged into the weights.

    Returns:
      The config, with the end ids of generation_config.json after its own, and the tree of
      `abstract_params(config, sharding, options)`.

    Raises:
      InputError: no such checkpoint, a damaged one, an unsupported model, or too small a mesh or memory; or an
        adapter that does not fit.
    """
    from qwen_jax.inference.settings import add_end_ids

    source = merge_adapter(open_source(path), adapter)
    assert source.folder is not None
    return add_end_ids(source.config, source.folder), _place(source, mesh, dtype, options)


def load_params(
    path: str | os.PathLike[str],
    config: ModelConfig,
    mesh: Mesh,
    dtype: DTypeLike | None = None,
    options: Options = Options(),
) -> Params:
    """Loads the parameters of a checkpoint that must have a given architecture; see `load`.

    Args:
      path, mesh, dtype: as for `load`.
      config: the architecture; the tensors are checked against it.
      options: `stacked` decides the layout; by default that of training.

    Returns:
      The tree of `abstract_params(config, sharding, options)`.

    Raises:
      InputError: as `load`.
    """
    return _place(open_source(path, config), mesh, dtype, options)


def _place(source: Source, mesh: Mesh, dtype: DTypeLike | None, options: Options) -> Params:
    from convert.placement import place

    return place(source, mesh, dtype, options)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: Format | None = None,
    dtype: DTypeLike | None = None,
    progress: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    quantization: str | None = None,
    recipe: str | None = None,
    intermediate_size: int | None = None,
) -> None:
    """Converts a checkpoint, block by block, into a new folder or GGUF file. After a failure nothing is left of it.

    Args:
      src: a Hugging Face folder, an Orbax folder, a GGUF file, or a Hub id.
      dst: the new folder, which must not exist or be empty; or the new file, for "gguf".
      to: "hf", "orbax" or "gguf". By default "gguf" if `dst` ends with .gguf; otherwise "hf" or "orbax", the one that
        `src` does not have, or with an adapter the one that it has.
      dtype: of the written weights; by default as stored, and then every tensor keeps its bytes. Quantised weights need
        one.
      progress: show a bar on standard error if that is a terminal.
      adapter: a LoRA folder of PEFT, which is merged into the weights.
      quantization: "gptq", "awq", "compressed-tensors" or "fp8", to write the codes of a quantised model in that
        format.
      recipe: for "gguf", a key of `convert.gguf.RECIPES`, such as "q4_k_m"; by default as stored, and then quantised
        weights keep their codes.
      intermediate_size: of the written model, without the padding that the source has in its feed-forward layers; see
        `convert.quantized.padding`. By default the padding of the quantised 72B models is dropped where they are
        dequantised into a folder, and kept with codes and in a GGUF file.

    Raises:
      InputError: a damaged or unsupported checkpoint, an existing destination, too small a disk, or rows that are not
        padding.
    """
    to = to or ("gguf" if is_gguf(dst) and not Path(dst).is_dir() else None)
    target = check_options(dst, to, dtype, recipe)
    source = open_source(src)
    if quantization is not None:
        if intermediate_size is not None:
            raise InputError("Codes keep the padding of their model. Leave out the intermediate size, or give a dtype.")
        _repack(source, quantization, dst, to, dtype, progress, adapter)
        return
    # GGUF files take codes as they are, unless they are changed.
    if source.config.quantization is not None and (to != "gguf" or adapter or intermediate_size):
        source = _dequantized(source, np.dtype(np.float32) if to == "gguf" else target)
        if to != "gguf" and intermediate_size is None:
            from convert.quantized.padding import published_width

            intermediate_size = published_width(source.config)
    source = _without_padding(merge_adapter(source, adapter), intermediate_size)
    assert source.folder is not None
    stored = detect(source.folder)
    other: Format = "orbax" if stored == "hf" else "hf"
    write_folder(source, dst, to or (other if adapter is None or stored == "gguf" else stored), dtype, progress, recipe)


def _without_padding(source: Source, width: int | None) -> Source:
    """A checkpoint with the intermediate size asked for; None keeps its own."""
    padded = source.config.intermediate_size
    if width in (None, padded):
        return source
    assert width is not None
    from convert.quantized.padding import UnpaddedSource

    found = UnpaddedSource(source, width)
    _log.warning("%d rows of padding are dropped: intermediate size %d -> %d.", padded - width, padded, width)
    return found


def _repack(
    source: Source,
    quantization: str,
    dst: str | os.PathLike[str],
    to: Format | None,
    dtype: DTypeLike | None,
    progress: bool,
    adapter: str | os.PathLike[str] | None,
) -> None:
    """Writes a quantised model in another quantised format."""
    from convert.quantized.between import METHODS, format_of
    from convert.quantized.export import export

    if quantization not in METHODS:
        raise InputError(f"Expected the quantisation {', '.join(METHODS)}, got {quantization!r}.")
    if to in ("orbax", "gguf") or adapter is not None:
        raise InputError(
            f"Codes of {quantization} are written into a Hugging Face folder, without an adapter. Leave the other "
            "options out."
        )
    target = check_options(dst, to, dtype)
    info = format_of(quantization, source.config)
    with _bar(nbytes(source, target), progress and sys.stderr.isatty()) as advance:
        export(source, info, dst, target, progress=advance)


def write_folder(
    source: Source,
    dst: str | os.PathLike[str],
    to: Format,
    dtype: DTypeLike | None = None,
    progress: bool = False,
    recipe: str | None = None,
) -> None:
    """Writes a checkpoint folder or a GGUF file from a `Source`.

    Args:
      source: the parameters.
      dst, dtype, progress, recipe: as for `convert`.
      to: "hf", "orbax" or "gguf".

    Raises:
      InputError: as `convert`.
    """
    target = check_options(dst, to, dtype, recipe)
    if source.config.quantization is not None and to != "gguf":
        source = _dequantized(source, target)
    with _bar(nbytes(source, target), progress and sys.stderr.isatty()) as advance:
        if to == "gguf":
            from convert.gguf import export as export_gguf

            export_gguf(source, dst, recipe, progress=advance)
        elif to == "hf":
            from convert.huggingface import export

            export(source, source.config, dst, target, progress=advance)
        else:
            from convert.orbax import save

            save(source, source.config, dst, target, progress=advance)


def _dequantized(source: Source, dtype: np.dtype | None) -> Source:
    """A quantised checkpoint in full precision."""
    from convert.dequantize import DequantizedSource
    from convert.gguf import QuantizedGGUF

    if dtype is None:
        raise InputError(
            f"The weights of {source.folder or 'this model'} are quantised. Give the dtype to dequantise them to, one "
            f"of {', '.join(DTYPES)} (--dtype bfloat16)."
        )
    return source.full_precision() if isinstance(source, QuantizedGGUF) else DequantizedSource(source)


def check_options(
    dst: str | os.PathLike[str], to: str | None, dtype: DTypeLike | None, recipe: str | None = None
) -> np.dtype | None:
    """Checks what does not depend on the source, before it is downloaded or opened; returns the parsed dtype."""
    if to not in (None, "hf", "orbax", "gguf"):
        raise InputError(f"Expected the format 'hf', 'orbax' or 'gguf', got {to!r}.")
    if to != "gguf":
        if recipe is not None:
            raise InputError(f"A type ({recipe}) is for a GGUF file, whose name ends with .gguf; got {dst}.")
        check_destination(Path(dst))
        return None if dtype is None else parse_dtype(dtype)
    from convert.gguf import RECIPES
    from convert.gguf.package import gguf_library

    if not is_gguf(dst):
        raise InputError(f"{dst}: the name of a GGUF file ends with .gguf.")
    if dtype is not None:
        raise InputError(f"GGUF files have a type in place of a dtype. Give a type of {', '.join(RECIPES)} (--type).")
    if recipe not in (None, *RECIPES):
        raise InputError(f"Expected a type of {', '.join(RECIPES)}; got {recipe!r}.")
    gguf_library()
    check_new_file(Path(dst))
    return None


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None] | None]:
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
