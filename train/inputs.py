"""The data of a run: built data sets, raw documents that are built first, and held-out rows, read on demand."""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from qwen_jax.errors import InputError
from qwen_jax.parallel.multihost import in_step
from train.config import RunConfig
from train.data.batch import Batch, place_part, row_part
from train.data.build import BuildConfig, build
from train.data.rows import PackedRows
from train.data.shards import MANIFEST, load_manifest
from train.data.text import find_files


def open_data(config: RunConfig, console: Console) -> tuple[dict[str, PackedRows], dict[str, PackedRows]]:
    """Opens the data of a run. Raw documents are built first, by process 0, into `data/` of the run's folder.

    Args:
      config: of the run.
      console: for progress.

    Returns:
      Data sets to train on and to evaluate on, by name.

    Raises:
      InputError: data that is missing or damaged; too many raw documents, or not those that the run began with.
    """
    lengths: dict[str, set[int]] = {}
    for stage in config.mixture_stages():
        for name in stage.weights:
            # A data set of weight 0 is not used, but it must exist.
            if name in stage.shares() or name not in lengths:
                lengths.setdefault(name, set()).add(stage.length)
    opened: tuple[dict[str, PackedRows], dict[str, PackedRows]] = {}, {}
    kinds = (("data", config.data), ("held_out", config.held_out))
    for into, (kind, sources) in zip(opened, kinds, strict=True):
        for name, source in sources.items():
            # A built held-out data set keeps its own row length.
            wanted = lengths.get(name, set()) if kind == "data" else {config.stages[0].length}
            with in_step(f"Opening {kind}.{name}"):
                if _built(Path(source)):
                    into[name] = PackedRows(source, config.verify_data)
                elif wanted:
                    folder = Path(config.output).absolute() / "data" / kind / name
                    if jax.process_index() == 0:
                        _build(config, f"{kind}.{name}", source, wanted, folder, console)
            if name not in into and wanted:
                with in_step(f"Opening {kind}.{name}"):
                    into[name] = PackedRows(folder, config.verify_data)
    return opened


def data_fingerprint(source: str) -> str | None:
    """A hash of the content of a data set, whatever its path: of a built folder's manifest, or of raw documents.

    Args:
      source: a folder of `qwen-jax data build`; or files, folders or a pattern of raw documents.

    Returns:
      The hash in hex; None where there is nothing.

    Raises:
      InputError: a damaged or unfinished folder.
    """
    if _built(Path(source)):
        return load_manifest(Path(source)).fingerprint
    try:
        files = find_files([source])
    except InputError:
        return None
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()


def _built(source: Path) -> bool:
    """Whether a path is a folder of `qwen-jax data build`, finished or not."""
    return source.is_dir() and any((source / name).exists() for name in (MANIFEST, "units", "shard-00000.tokens"))


def _build(config: RunConfig, name: str, source: str, lengths: set[int], folder: Path, console: Console) -> None:
    if len(lengths) > 1:
        raise InputError(
            f"{name} is raw documents, which are built into rows of one length, and stages ask for {sorted(lengths)}. "
            "List them once for each length, under a different name."
        )
    (length,) = lengths
    files = find_files([source])
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    if megabytes > config.max_raw_megabytes:
        raise InputError(
            f"{name}: the raw documents of {source} have {megabytes:,.1f} MB, more than the "
            f"{config.max_raw_megabytes:g} that a run builds when it starts (max_raw_megabytes). Build them first: "
            f"qwen-jax data build --input {shlex.quote(source)} --tokenizer {shlex.quote(config.tokenizer)} --length "
            f"{length} --output DIR, and give DIR."
        )
    try:
        build_config = BuildConfig((source,), Path(config.tokenizer), length, folder, domain=name, workers=1)
        manifest = build(build_config, progress=console)
    except InputError as error:
        begun = (folder / MANIFEST).exists()
        hint = " A run keeps the documents that it began with: restore them, or begin a new run." if begun else ""
        raise InputError(f"{name}, {source}: {error}{hint}") from None
    if left_out := manifest.left_out(folder):
        console.print(f"{name}: {left_out}", highlight=False, markup=False, soft_wrap=True)


class HeldOutBatches(Sequence[Batch]):
    """All rows of a data set in order, as batches on the devices of a mesh, read on demand.

    The last batch is padded with empty rows. Each process reads only the rows of its own devices.
    """

    def __init__(self, rows: PackedRows, batch_size: int, mesh: Mesh):
        """Args:
        rows: of the data set.
        batch_size: rows in a global batch.
        mesh: where batches are placed.
        """
        self._rows, self._size, self._mesh = rows, batch_size, mesh
        self._part = row_part(mesh, batch_size)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        part, count = self._part
        size = self._size // count
        first = index * self._size + part * size
        batch = self._rows.take(range(min(first, len(self._rows)), min(first + size, len(self._rows))))
        missing = size - batch.shape[0]
        padded: Batch = jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0))), batch)
        return place_part(padded, self._size, self._mesh)
