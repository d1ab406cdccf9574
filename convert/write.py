"""Writing a checkpoint folder of any format, by one process or by several that hold it together."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np

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
    dtype: Any,
    extra_files_from: str | os.PathLike[str] | None,
    progress: Callable[[int], None] | None,
    open_sink: OpenSink,
    both_dialects: bool,
) -> None:
    """Writes a checkpoint folder, whole or not at all. Where several processes hold the shards, the first one writes.

    Args:
      params, config, folder, dtype, extra_files_from, progress: as for `convert.huggingface.export`.
      open_sink: from the source, the dtype (None: as stored) and a new folder, what takes the blocks.
      both_dialects: whether transformers 4 must understand the config.json.

    Raises:
      InputError: the destination is taken, the disk too small, or the parameters do not fit the config. Where the first
        of several processes fails, all of them do.
    """
    source = as_source(params, config)
    origin = Path(extra_files_from) if extra_files_from is not None else source.folder
    target = None if dtype is None else parse_dtype(dtype)
    check_storable(source, target)
    check_side_files(origin)
    stated = target or (source.dtype(leaves(config)[0]) if source.folder is None else None)

    @contextlib.contextmanager
    def new_checkpoint() -> Iterator[Sink]:
        with new_folder(Path(folder), nbytes(source, target)) as temporary:
            with open_sink(source, target, temporary) as sink:
                yield sink
            write_side_files(config, stated.name if stated else None, origin, temporary, both_dialects)

    if not (isinstance(source, TreeSource) and source.scattered):
        with new_checkpoint() as sink:
            copy(source, sink, target, progress)
        return
    with contextlib.ExitStack() as stack:
        patient: _Patient | None = None
        with in_step(f"Writing {folder}"):
            if jax.process_index() == 0:
                patient = _Patient(stack.enter_context(new_checkpoint()))
        with in_step(f"Writing {folder}"):
            copy(source, patient, target, progress)
            if patient is not None and patient.problem is not None:
                raise patient.problem
            stack.close()


class _Patient:
    """Goes on taking blocks after a failure, because other processes wait for this one to gather them."""

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
        raise NotImplementedError("Parameters in memory lie in no file.")
