"""Hugging Face checkpoint folders: safetensors and config.json, in and out."""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from convert.names import LM_HEAD, Leaf, check_names, in_fused, is_ignored, leaves
from convert.placement import place
from convert.safetensors import Entry, Writer, read_folder, read_rows, row_offset
from convert.source import Source, Span, blocks
from convert.write import write_checkpoint
from qwen_jax.config import ModelConfig, load_config
from qwen_jax.errors import InputError
from qwen_jax.options import Options
from qwen_jax.params import Params

MAX_SHARD_BYTES = 5e9  # What `save_pretrained` of transformers takes.


class SafetensorsSource:
    """A Hugging Face folder, checked whole before anything is read from it."""

    workers = min(4, os.cpu_count() or 1)

    def __init__(self, folder: str | os.PathLike[str], config: ModelConfig | None = None) -> None:
        """
        Args:
          folder: with config.json and safetensors.
          config: by default that of the folder.

        Raises:
          InputError: files that are missing, damaged, or do not hold the tensors that the config describes.
        """
        self.folder: Path | None = Path(folder)
        self.config = config or load_config(folder)
        self._entries = read_folder(Path(folder))
        self._leaves = leaves(self.config)
        if self.config.moe is not None:
            self._take_apart()
        self._check(Path(folder))
        self._files = _Files()
        if self.config.tie_word_embeddings and LM_HEAD in self._entries:
            self._compare_head()

    def _take_apart(self) -> None:
        """Finds the tensors of single experts in those that hold all experts of a layer."""
        assert self.config.moe is not None
        moe, D = self.config.moe, self.config.hidden_size
        fused: set[str] = set()
        for name in [name for leaf in self._leaves for name in leaf.names if name not in self._entries]:
            found = in_fused(name)
            entry = self._entries.get(found[0]) if found else None
            if found is None or entry is None:
                continue
            expert, part, parts = found[1]
            rows, columns = (moe.intermediate_size, D) if parts == 2 else (D, moe.intermediate_size)
            if entry.shape != (moe.num_experts, parts * rows, columns):
                raise InputError(
                    f"{entry.file}: {found[0]} has shape {list(entry.shape)}, config.json asks for "
                    f"{[moe.num_experts, parts * rows, columns]}. Check that config.json belongs to these weights."
                )
            fused.add(found[0])
            self._entries[name] = entry.part((expert * parts + part) * rows, rows)
        for name in fused:
            del self._entries[name]

    def _check(self, folder: Path) -> None:
        expected = {name: leaf for leaf in self._leaves for name in leaf.names}
        found = {name: entry for name, entry in self._entries.items() if not is_ignored(name)}
        missing = [name for name in expected if name not in found]
        if missing == [LM_HEAD]:
            raise InputError(
                f"{folder} has no {LM_HEAD}, and config.json says tie_word_embeddings=false. If the head of this model "
                "is its embedding, set tie_word_embeddings to true in config.json; otherwise the checkpoint is "
                "incomplete."
            )
        tied_head = {LM_HEAD} if self.config.tie_word_embeddings else set()
        unknown = [name for name in found if name not in expected and name not in tied_head]
        check_names(folder, missing, unknown, self.config)
        shapes = {name: leaf.hf_shape for name, leaf in expected.items()}
        if tied_head & found.keys():
            shapes[LM_HEAD] = (self.config.vocab_size, self.config.hidden_size)
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise InputError(
                    f"{found[name].file}: {name} has shape {list(found[name].shape)}, config.json asks for "
                    f"{list(shape)}. Check that config.json belongs to these weights."
                )
        for leaf in self._leaves:
            dtypes = {found[name].dtype.name for name in leaf.names}
            if len(dtypes) > 1:
                raise InputError(
                    f"{folder} stores {'.'.join(leaf.path)} in {' and '.join(sorted(dtypes))} in different layers; "
                    "expected one dtype. Save it in one with transformers."
                )

    def _compare_head(self) -> None:
        """Says so where a tied checkpoint carries a head of its own that differs: nobody would notice otherwise."""
        embed = self._leaves[0]
        head = Leaf(("lm_head", "weight"), (LM_HEAD,), (), (), embed.shape, embed.hf_shape)
        same = self.dtype(embed) == self.dtype(head) and all(
            self.read(embed, *block).tobytes() == self.read(head, *block).tobytes()
            for block in blocks(embed, self.dtype(embed).itemsize)
        )
        if not same:
            warnings.warn(
                f"{self.folder} has tie_word_embeddings=true and an {LM_HEAD} that differs from the embedding. The "
                "embedding is used, as transformers does. If that is wrong, set tie_word_embeddings to false.",
                stacklevel=2,
            )

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._entries[leaf.names[0]].dtype

    def read(self, leaf: Leaf, tensors: slice, rows: slice) -> np.ndarray:
        names = leaf.names[tensors]
        inner = leaf.shape[1:]
        out = np.empty((len(names), rows.stop - rows.start, *inner), self.dtype(leaf))
        there = _rows_there(leaf, rows)
        for name, part in zip(names, out, strict=True):
            entry = self._entries[name]
            read_rows(self._files.descriptor(entry), entry, there, part)
        return out

    def spans(self, leaf: Leaf, tensors: slice, rows: slice) -> list[Span]:
        there = _rows_there(leaf, rows)
        found = []
        for name in leaf.names[tensors]:
            entry = self._entries[name]
            start, stop = row_offset(entry, there.start), row_offset(entry, there.stop)
            found.append(Span(entry.file, start, stop - start))
        return found


def _rows_there(leaf: Leaf, rows: slice) -> slice:
    """Rows of the tensor on disk: where a row here is a head, they are head_dim times as many. The same bytes."""
    per_row = leaf.hf_shape[0] // leaf.shape[0]
    return slice(rows.start * per_row, rows.stop * per_row)


class _Files:
    """Descriptors of files, opened at first use and closed with this object."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def descriptor(self, entry: Entry) -> int:
        if entry.file not in self._open:
            # Two threads may both open it: the first one stays, the other is closed.
            descriptor = os.open(entry.file, os.O_RDONLY)
            if self._open.setdefault(entry.file, descriptor) != descriptor:
                os.close(descriptor)
        return self._open[entry.file]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def load_params(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    mesh: Mesh,
    dtype: Any = None,
    options: Options = Options(),
) -> Params:
    """Loads a Hugging Face folder onto a mesh, tensor by tensor, each process only what its devices hold.

    Args:
      folder: with safetensors.
      config: the architecture; the tensors are checked against it.
      mesh: from `make_mesh`.
      dtype: of the parameters; by default as stored.
      options: `stacked` decides the layout.

    Returns:
      The tree of `abstract_params(config, sharding, options)`.

    Raises:
      InputError: files that are missing, damaged, or do not fit the config; a mesh or a memory too small.
    """
    return place(SafetensorsSource(folder, config), mesh, dtype, options)


class _Sink:
    """Puts blocks into their places in safetensors files."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        # A file takes one write at a time anyway; a thread that waits here does not spin in the kernel.
        self._lock = threading.Lock()

    def write(self, leaf: Leaf, tensors: slice, rows: slice, data: np.ndarray) -> None:
        with self._lock:
            for name, part in zip(leaf.names[tensors], data, strict=True):
                self._writer.write(name, rows.start * part[:1].nbytes, part)

    def receive(self, leaf: Leaf, tensors: slice, rows: slice, spans: list[Span]) -> None:
        with self._lock:
            for name, span in zip(leaf.names[tensors], spans, strict=True):
                descriptor, start = self._writer.place(name)
                span.copy_to(descriptor, start + rows.start * (span.nbytes // (rows.stop - rows.start)))


def export(
    params: Params | Source,
    config: ModelConfig,
    folder: str | os.PathLike[str],
    dtype: Any = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    extra_files_from: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers 4 and 5 load, whole or not at all.

    Args:
      params: a parameter tree, stacked or not, on any mesh; or a `Source`. Where several processes hold the shards,
        all of them must call this; the first one writes.
      config: the architecture.
      folder: the new folder; must not exist or be empty.
      dtype: of the written weights; by default as they are.
      max_shard_bytes: a larger model is written in several files with an index.
      extra_files_from: folder from which tokenizer, generation config and config.json are taken; by default that of
        the source.
      progress: called with the bytes of each block written.

    Raises:
      InputError: the destination is taken, the disk too small, or the parameters do not fit the config.
    """

    @contextlib.contextmanager
    def open_sink(source: Source, target: np.dtype | None, temporary: Path) -> Iterator[_Sink]:
        named = ((name, leaf) for leaf in leaves(config) for name in leaf.names)
        tensors = {
            name: (target or source.dtype(leaf), leaf.hf_shape)
            for name, leaf in sorted(named, key=lambda x: _order(x[0]))
        }
        with Writer(temporary, tensors, max_shard_bytes) as writer:
            yield _Sink(writer)

    write_checkpoint(params, config, folder, dtype, extra_files_from, progress, open_sink, both_dialects=True)


def _order(name: str) -> tuple[int, int]:
    """Sorts tensors as the model runs: embedding, layers, norm, head."""
    parts = name.split(".")
    if parts[1] == "layers":
        return 1, int(parts[2])
    return (0, 0) if parts[1] == "embed_tokens" else (2, 0)
