"""Reading and writing Orbax checkpoint folders: `params/` and config.json.

`params/` is a plain Orbax checkpoint of the stacked parameter tree. Orbax writes its metadata; the data is written
block by block in the layout of TensorStore, Orbax's storage library, so that no stacked leaf is ever completely in
memory. It is stored uncompressed (the low bits of weights are noise, which only costs time to compress), in chunks of
about 32 MiB that never span two layers of a large leaf.
"""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.typing import DTypeLike
from orbax.checkpoint import type_handlers

from convert.names import Leaf, check_names, leaves
from convert.safetensors import write_all
from convert.source import BLOCK_BYTES, Source, Span, blocks
from convert.write import write_checkpoint
from qwen_jax.config import DTYPES, ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.params import Params

PARAMS = "params"


class _Shell:
    """Placeholder for a leaf whose data is written later."""

    def __init__(self, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.chunks, self.dtype = shape, chunks, dtype


class _Handler(type_handlers.TypeHandler):
    """Lets Orbax write a leaf's metadata without its data, and open a leaf without reading it."""

    def __init__(self, typestr: str) -> None:
        self._typestr = typestr

    def typestr(self) -> str:
        return self._typestr

    async def metadata(self, infos: Sequence[type_handlers.ParamInfo]) -> Sequence[Any]:
        raise NotImplementedError

    async def serialize(
        self, values: Sequence[_Shell], infos: Sequence[type_handlers.ParamInfo], args: object = None
    ) -> Sequence[Any]:
        for shell, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            metadata = {
                "shape": shell.shape,
                "chunks": shell.chunks,
                "dtype": "bfloat16" if shell.dtype.name == "bfloat16" else shell.dtype.str,
                "compressor": None,
            }
            await ts.open({**_spec(info), "metadata": metadata}, create=True)
        return []

    async def deserialize(self, infos: Sequence[type_handlers.ParamInfo], args: object = None) -> Sequence[Any]:
        return [await ts.open(_spec(info), open=True, read=True) for info in infos]


def _spec(info: type_handlers.ParamInfo) -> dict[str, Any]:
    """TensorStore's specification of a leaf, in any of the layouts that Orbax has."""
    if info.is_ocdbt_checkpoint:
        kvstore = {"driver": "ocdbt", "base": f"file://{info.parent_dir}/", "path": info.name}
    else:
        kvstore = {"driver": "file", "path": os.path.join(info.parent_dir, info.name)}
    # A missing chunk must be an error, not zeros.
    return {"driver": "zarr3" if info.use_zarr3 else "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}


@contextlib.contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    # Orbax would warn about parts of a checkpoint that this layout does not have.
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        # NumPy's type name makes the checkpoint restorable on any topology, without a target.
        registry = type_handlers.create_type_handler_registry(
            (_Shell, _Handler("np.ndarray")),
            (jax.Array, _Handler("jax.Array")),
            (int, _Handler("scalar")),
            (str, _Handler("string")),
        )
        # By default Orbax would wait for processes that do not take part.
        this_process = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process-{jax.process_index()}",
        )
        several = {"multiprocessing_options": this_process} if jax.process_count() > 1 else {}
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, type_handler_registry=registry, **several
        )
        with ocp.Checkpointer(handler, **several) as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)


class OrbaxSource:
    """An Orbax checkpoint as a `Source`: of a parameter tree, or of a training state that has one under `params`."""

    workers = min(4, os.cpu_count() or 1)

    def __init__(self, folder: str | os.PathLike[str], config: ModelConfig | None = None) -> None:
        """
        Args:
          folder: with config.json, and `params/` as the Orbax checkpoint.
          config: by default that of the folder.

        Raises:
          InputError: files that are missing or damaged, or another model than the config describes.
        """
        self.folder: Path | None = Path(folder)
        self.config = config or load_config(folder)
        self._path = Path(folder).absolute() / PARAMS
        tree = _open(self._path)
        if "params" in tree and "embed" not in tree:
            tree = tree["params"]
        found = {
            tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)): store
            for path, store in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        expected = {leaf.path: leaf for leaf in leaves(self.config)}
        missing, unknown = (list(map(".".join, paths)) for paths in (expected.keys() - found, found.keys() - expected))
        check_names(self._path, missing, unknown, self.config)
        for path, leaf in expected.items():
            store = found[path]
            if tuple(store.shape) != leaf.full_shape:
                raise InputError(
                    f"{self._path}: {'.'.join(path)} has shape {list(store.shape)}, config.json asks for "
                    f"{list(leaf.full_shape)}. Check that config.json belongs to these weights."
                )
            if store.dtype.numpy_dtype.name not in DTYPES:
                raise InputError(
                    f"{self._path}: {'.'.join(path)} has dtype {store.dtype.numpy_dtype.name}; expected one of "
                    f"{', '.join(DTYPES)}."
                )
        # A checkpoint of a training run may hold chunks of many layers: keep one decoded while its layers are read.
        largest = max(_chunk_bytes(store) for store in found.values())
        context = ts.Context({"cache_pool": {"total_bytes_limit": largest if largest > 2 * BLOCK_BYTES else 0}})
        self._stores = {path: ts.open(found[path].spec(), context=context).result() for path in expected}
        # Leaves whose chunks are files with the bytes of one block each, as `save` writes them, can be copied as files.
        self._plain = {leaf: chunks for leaf in expected.values() if (chunks := self._plain_chunks(leaf))}

    def dtype(self, leaf: Leaf) -> np.dtype:
        return np.dtype(self._stores[leaf.path].dtype.numpy_dtype)

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        store = self._stores[leaf.path]
        region = leaf.region(tensors)
        shape = (*(part.stop - part.start for part in region), rows.stop - rows.start, *leaf.shape[1:])
        out = np.empty(shape, self.dtype(leaf))
        try:
            ts.array(out).write(store[(*region, rows)][ts.d[:].translate_to[0]]).result()
        except ValueError as error:
            raise InputError(
                f"{self._path}: {'.'.join(leaf.path)} cannot be read; the checkpoint is damaged or incomplete "
                f"({str(error).splitlines()[0]})."
            ) from None
        return out.reshape(tensors.stop - tensors.start, *out.shape[len(region) :])

    def _plain_chunks(self, leaf: Leaf) -> tuple[int, ...] | None:
        """The chunk shape of a leaf whose chunks are plain files, each with the bytes of one block; otherwise None."""
        spec = self._stores[leaf.path].spec().to_json()
        metadata, kvstore = spec["metadata"], spec["kvstore"]
        in_own_folder = kvstore["driver"] == "file" and Path(kvstore["path"]) == self._path / ".".join(leaf.path)
        if spec["driver"] != "zarr" or not in_own_folder:
            return None
        plain = metadata["compressor"] is None and metadata.get("filters") is None and metadata["order"] == "C"
        if not plain or metadata["dimension_separator"] != "." or metadata["dtype"].startswith(">"):
            return None
        expected = _first_block(leaf, self.dtype(leaf).itemsize)
        return expected if tuple(metadata["chunks"]) == expected else None

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span] | None:
        chunks = self._plain.get(leaf)
        if chunks is None:
            return None
        file = _chunk_file(self._path, leaf, chunks, tensors, rows)
        itemsize = self.dtype(leaf).itemsize
        size = file.stat().st_size if file.is_file() else 0
        if size != math.prod(chunks) * itemsize:
            raise InputError(
                f"{file} must have {math.prod(chunks) * itemsize} bytes, it has {size}; the checkpoint is damaged or "
                "incomplete."
            )
        each = (rows.stop - rows.start) * math.prod(leaf.shape[1:]) * itemsize
        return [Span(file, i * each, each) for i in range(tensors.stop - tensors.start)]


def _first_block(leaf: Leaf, itemsize: int) -> tuple[int, ...]:
    """The shape of the blocks of a leaf; only the last block of an uneven split is smaller."""
    tensors, rows = next(blocks(leaf, itemsize))
    return (*(part.stop - part.start for part in leaf.region(tensors)), rows.stop - rows.start, *leaf.shape[1:])


def _open(path: Path) -> dict[str, Any]:
    """Opens a checkpoint as a tree with an open TensorStore at each leaf."""
    if not (path / "_METADATA").is_file():
        raise InputError(f"{path} is not an Orbax checkpoint: it has no _METADATA. It may be incomplete.")
    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.restore(path)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise InputError(f"{path} is not a readable Orbax checkpoint: {str(error).splitlines()[0]}.") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__}; expected a parameter tree.")
    return tree


def _chunk_bytes(store: ts.TensorStore) -> int:
    return int(np.prod(np.array(store.chunk_layout.read_chunk.shape))) * store.dtype.numpy_dtype.itemsize


class _Sink:
    """A new Orbax checkpoint as a `Sink`; each block becomes one of its chunks."""

    def __init__(self, path: Path, source: Source, dtype: np.dtype | None) -> None:
        tree: dict[str, Any] = {}
        self._path, self._itemsize = path, {}
        self._chunks: dict[Leaf, tuple[int, ...]] = {}
        for leaf in leaves(source.config):
            leaf_dtype = dtype or source.dtype(leaf)
            chunks = _first_block(leaf, leaf_dtype.itemsize)
            self._chunks[leaf], self._itemsize[leaf] = chunks, leaf_dtype.itemsize
            node = tree
            for key in leaf.path[:-1]:
                node = node.setdefault(key, {})
            node[leaf.path[-1]] = _Shell(leaf.full_shape, chunks, leaf_dtype)
        with _checkpointer() as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(tree))

    def write(self, leaf: Leaf, tensors: slice, rows: slice, data: np.ndarray) -> None:
        with self._open(leaf, tensors, rows) as file:
            write_all(file.fileno(), data.reshape(-1).view(np.uint8).data, 0)

    def receive(self, leaf: Leaf, tensors: slice, rows: slice, spans: list[Span]) -> None:
        with self._open(leaf, tensors, rows) as file:
            for i, span in enumerate(spans):
                span.copy_to(file.fileno(), i * span.nbytes)

    def _open(self, leaf: Leaf, tensors: slice, rows: slice) -> BinaryIO:
        """Creates a chunk's file at full size: the last chunk of an uneven split is padded."""
        chunks = self._chunks[leaf]
        file = _chunk_file(self._path, leaf, chunks, tensors, rows).open("xb", buffering=0)
        os.ftruncate(file.fileno(), math.prod(chunks) * self._itemsize[leaf])
        return file


def _chunk_file(path: Path, leaf: Leaf, chunks: Sequence[int], tensors: slice, rows: slice) -> Path:
    """The file of a chunk. In Zarr 2 it holds only the elements, in C order and little-endian."""
    starts = [*(part.start for part in leaf.region(tensors)), rows.start]
    index = [start // size for start, size in zip(starts, chunks, strict=False)]
    index += [0] * (len(leaf.full_shape) - len(index))
    return path / ".".join(leaf.path) / ".".join(map(str, index))


def save(
    params: Params | Source,
    config: ModelConfig,
    folder: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    extra_files_from: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes an Orbax folder. After a failure nothing is left.

    `params/` in it can also be restored by plain Orbax: `StandardCheckpointer().restore(folder / "params")`.

    Args:
      params: a parameter tree, stacked or not, on any mesh; or a `Source`. Where several processes hold the shards,
        all of them must call this; process 0 writes.
      config: the architecture.
      folder: the new folder; must not exist or be empty.
      dtype: of the written weights; by default that of the parameters.
      extra_files_from: folder from which tokenizer, generation config and config.json are copied; by default that of
        the source.
      progress: called with the number of bytes of each block written.

    Raises:
      InputError: the destination exists, the disk is too small, or the parameters do not fit the config.
    """

    def open_sink(source: Source, target: np.dtype | None, temporary: Path) -> contextlib.nullcontext[_Sink]:
        return contextlib.nullcontext(_Sink(temporary / PARAMS, source, target))

    write_checkpoint(params, config, folder, dtype, extra_files_from, progress, open_sink, both_dialects=False)
