"""Writing a checkpoint folder of any format, from one process or from several that hold its shards."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import numpy as np
from jax.typing import DTypeLike

from convert.folder import check_side_files, new_folder, write_side_files
from convert.names import Leaf, leaves
from convert.source import Sink, Source, Span, TreeSource, as_source, check_storable, copy, nbytes, parse_dtype
from qwen_jax.config import ModelConfig
from qwen_jax.parallel.multihost import in_step
from qwen_jax.params import Params

OpenSink = Callable[[Source, np.dtype | None, Path], AbstractContextManager[Sink]]


def write_checkpoint(
    params: Params | Source,
    config: ModelConfig,
    folder: str | os.PathLike[str],
    dtype: DTypeLike | None,
    extra_files_from: str | os.PathLike[str] | None,
    progress: Callable[[int], None] | None,
    open_sink: OpenSink,
    both_dialects: bool,
) -> None:
    """Writes a checkpoint folder; after a failure nothing is left. Of several processes, process 0 writes.

    Args:
      params, config, folder, dtype, extra_files_from, progress: as for `convert.huggingface.export`.
      open_sink: makes the `Sink` of a format from the source, the dtype (None: as stored) and the new folder.
      both_dialects: whether transformers 4 must understand the config.json.

    Raises:
      InputError: the destination exists, the disk is too small, a file to copy is damaged, or the parameters do not
        fit the config. If process 0 fails, all processes raise.
    """
    source = as_source(params, config)
    origin = Path(extra_files_from) if extra_files_from is not None else source.folder
    target = None if dtype is None else parse_dtype(dtype)
    check_storable(source, target)
    stated = target or (source.dtype(leaves(config)[0]) if source.folder is None else None)

    @contextlib.contextmanager
    def new_checkpoint() -> Iterator[Sink]:
        check_side_files(origin)
        with new_folder(Path(folder), nbytes(source, target)) as temporary:
            with open_sink(source, target, temporary) as sink:
                yield sink
            write_side_files(config, stated.name if stated else None, origin, temporary, both_dialects)

    # This process holds everything.
    if not (isinstance(source, TreeSource) and source.scattered):
        with new_checkpoint() as sink:
            copy(source, sink, target, progress)
        return
    # Other processes hold some of the shards: all take part in gathering, process 0 writes.
    with contextlib.ExitStack() as stack:
        tolerant: _TolerantSink | None = None
        with in_step(f"Writing {folder}"):
            if jax.process_index() == 0:
                tolerant = _TolerantSink(stack.enter_context(new_checkpoint()))
        with in_step(f"Writing {folder}"):
            copy(source, tolerant, target, progress)
            if tolerant is not None and tolerant.problem is not None:
                raise tolerant.problem
            stack.close()


class _TolerantSink:
    """A sink that ignores further blocks after a failure.

    Reading a block is a collective: other processes would wait forever for one that stops.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.problem: Exception | None = None

    def write(self, leaf: Leaf, tensors: slice, rows: slice, data: np.ndarray) -> None:
        if self.problem is None:
            try:
                self._sink.write(leaf, tensors, rows, data)
            except Exception as error:
                self.problem = error

    def receive(self, leaf: Leaf, tensors: slice, rows: slice, spans: list[Span]) -> None:
        raise NotImplementedError("Parameters in memory are not in files.")
