"""Quantising a checkpoint: layer by layer, with one layer in memory, and resumable."""

import contextlib
import dataclasses
import importlib.metadata
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qwen_jax
from convert import open_source
from convert.folder import (
    SIDE_FILES,
    check_destination,
    check_room,
    check_side_files,
    new_folder,
    remove_unfinished,
    write_side_files,
)
from convert.huggingface import MAX_SHARD_BYTES
from convert.names import EMBED, Leaf, leaves
from convert.quantize.calibration import CalibrationText
from convert.quantize.forward import Forward
from convert.quantize.layer import Layer, matrices
from convert.quantize.quantizer import Outcome, Quantizer
from convert.quantize.recipe import Recipe
from convert.quantize.work import Work, open_work
from convert.quantized.awq import Awq
from convert.quantized.between import routers
from convert.quantized.export import add_config
from convert.quantized.formats import QUANTIZE_CONFIG, tensor_names
from convert.safetensors import Writer
from convert.source import Source, Span, blocks, check_storable
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from qwen_jax.gguf.header import is_gguf
from qwen_jax.hub import CONFIG, is_hub_id, resolve
from qwen_jax.parallel.sharding import make_mesh
from qwen_jax.tokenizer import load_tokenizer

_log = logging.getLogger(__name__)

REPORT = "quantize_report.json"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run made.

    Attributes:
      folder: the new folder.
      bytes_before, bytes_after: of all weights.
      outcomes: of all matrices, in the order of the model.
    """

    folder: Path
    bytes_before: int
    bytes_after: int
    outcomes: tuple[Outcome, ...]

    def by_kind(self) -> dict[str, tuple[float, float]]:
        """Root mean squares of the error, and of that of rounding to nearest, by the name of a projection."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.module.rsplit(".", 1)[1], []).append(outcome)

        def mean(values: list[float]) -> float:
            return math.sqrt(sum(value**2 for value in values) / len(values))

        return {
            kind: (mean([outcome.error for outcome in some]), mean([outcome.nearest_error for outcome in some]))
            for kind, some in found.items()
        }


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    recipe: Recipe,
    calibration: CalibrationText | None = None,
    *,
    batch: int = 8,
    progress: bool = False,
    after_layer: Callable[[int], None] = lambda number: None,
) -> Report:
    """Quantises a checkpoint into a new Hugging Face folder.

    Finished layers are kept in the folder `.NAME.quantize` beside the new one. After a run that failed or was killed
    the same call goes on with the next layer, and gives the same bytes.

    Args:
      src: a Hugging Face folder, an Orbax folder, or a Hub id.
      dst: the new folder; must not exist or be empty.
      recipe: method and format.
      calibration: the text; needed by gptq and awq. With the other methods the report then has errors of outputs.
      batch: calibration rows that are run together. It changes the order of sums, so it belongs to the run.
      progress: show a bar on standard error if that is a terminal.
      after_layer: called with the number of each layer that was finished.

    Returns:
      Sizes and errors, which are also in `quantize_report.json` of the new folder.

    Raises:
      InputError: a checkpoint that cannot be read or is quantised already, choices that do not fit it, a text that is
        too short, an existing destination, or too small a disk.
    """
    # Everything that can be refused is refused before the first layer.
    dst = Path(os.path.abspath(dst))
    check_destination(dst)
    if recipe.needs_calibration and calibration is None:
        raise InputError(
            f"{recipe.method} needs a text to calibrate on: --calibration FILE, plain text or JSON lines with a field "
            "text, like what the model will read. Without one use rtn, fp8 or int8."
        )
    if batch < 1:
        raise InputError(f"The batch must be at least 1, got {batch}.")
    _check_unquantized(src)
    source = open_source(src)
    assert source.folder is not None
    config = source.config
    if config.quantization is not None:
        raise _quantized_already(src, "the types of its GGUF file" if is_gguf(source.folder) else "some method")
    check_storable(source, None)
    check_side_files(source.folder)
    recipe.check(config)
    tokens_RT = None
    if calibration is not None:
        calibration.check(config)
        tokens_RT = calibration.tokens(load_tokenizer(source.folder), config)

    stored = source.dtype(next(leaf for leaf in leaves(config) if leaf.path[-2:] == ("q", "weight"))).name
    total = sum(len(matrices(config, number)) for number in range(config.num_layers))
    job = _job(source, recipe, calibration, batch)
    folder = dst.parent / f".{dst.name}.quantize"
    if not folder.exists():
        # All layers are in the work folder when the new folder is written.
        check_room(dst, 2 * _smallest_size(source, recipe))
    with open_work(folder, job) as work, _bar(total, progress) as advance:
        remove_unfinished(dst)
        # Layers.
        forward = None if tokens_RT is None else Forward(config, make_mesh({}, jax.devices()[:1]))
        quantizer = Quantizer(recipe, recipe.grid(stored), forward, batch, lambda: advance(1))
        first = work.finished()
        if first:
            _log.warning(
                "%s has %d of %d layers; the run goes on with the next.", work.folder, first, config.num_layers
            )
            advance(sum(len(matrices(config, number)) for number in range(first)))
        x_RTD = None
        if tokens_RT is not None and first < config.num_layers:
            x_RTD = work.outputs(first - 1) if first else _embedded(source, tokens_RT)
        for number in range(first, config.num_layers):
            tensors, outcomes = quantizer.quantize(Layer(source, number), x_RTD)
            work.save(number, tensors, outcomes, x_RTD)
            del tensors
            after_layer(number)
        # The new folder.
        return _assemble(source, work, dst, recipe, calibration)


def _smallest_size(source: Source, recipe: Recipe) -> int:
    """Bytes of the quantised matrices, with the narrowest dtypes that the format has for scales."""
    stored = (
        tensor
        for number in range(source.config.num_layers)
        for matrix in matrices(source.config, number)
        for tensor in tensor_names(matrix.module, matrix.shape, recipe.info()).values()
        if not tensor.optional
    )
    return sum(min(dtype.itemsize for dtype in tensor.dtypes) * math.prod(tensor.shapes[0]) for tensor in stored)


def _check_unquantized(src: str | os.PathLike[str]) -> None:
    """Raises InputError if a checkpoint says that it is quantised."""
    file = resolve(src, CONFIG) / "config.json" if is_hub_id(src) else Path(src) / "config.json"
    settings = read_json(file).get("quantization_config") if file.is_file() else None
    beside = file.parent / QUANTIZE_CONFIG
    if settings is None and beside.is_file():
        settings = {"quant_method": "gptq"}
    if settings is not None:
        method = settings.get("quant_method", "some method") if isinstance(settings, dict) else "some method"
        raise _quantized_already(src, method)


def _quantized_already(src: str | os.PathLike[str], method: str) -> InputError:
    return InputError(
        f"{src} is quantised already, by {method}. Rounding twice loses more than once: quantise the original model in "
        "bfloat16."
    )


def _job(source: Source, recipe: Recipe, calibration: CalibrationText | None, batch: int) -> dict[str, Any]:
    """What decides the bytes of a run."""
    assert source.folder is not None
    # What is read; other files of the folder, such as a log, may change while the run is stopped.
    read = ("config.json", "*.safetensors", "*.safetensors.index.json", "params/**/*", *SIDE_FILES)
    found = (path for pattern in read for path in source.folder.glob(pattern) if path.is_file())
    files = [source.folder] if source.folder.is_file() else sorted(set(found))
    text = None
    if calibration is not None:
        text = {"sha256": calibration.digest(), "rows": calibration.rows, "length": calibration.length}
    return {
        "source": str(source.folder.resolve()),
        "files": [
            [str(path.relative_to(source.folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files
        ],
        "recipe": dataclasses.asdict(recipe),
        "calibration": text,
        "batch": batch,
        "device": jax.devices()[0].device_kind,
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
            "qwen-jax": qwen_jax.__version__,
        },
    }


def _embedded(source: Source, tokens_RT: np.ndarray) -> np.ndarray:
    """The embeddings of tokens, float32 [R, T, D]; the table is read in parts."""
    leaf = leaves(source.config)[0]
    assert leaf.names == (EMBED,)
    x_RTD = np.empty((*tokens_RT.shape, source.config.hidden_size), np.float32)
    for _, rows in blocks(leaf, source.dtype(leaf).itemsize):
        here = (tokens_RT >= rows.start) & (tokens_RT < rows.stop)
        if here.any():
            x_RTD[here] = source.read(leaf, slice(0, 1), rows)[0][tokens_RT[here] - rows.start]
    return x_RTD


def _assemble(source: Source, work: Work, dst: Path, recipe: Recipe, calibration: CalibrationText | None) -> Report:
    """Puts the layers together with what is outside of them."""
    config = source.config
    embed, *rest = [leaf for leaf in leaves(config) if not leaf.layers]
    of_layers = [work.tensors(number) for number in range(config.num_layers)]
    outside = {leaf: (source.dtype(leaf), leaf.hf_shape) for leaf in (embed, *rest)}
    # In the order of the model, in which they fill the shards.
    tensors = {embed.names[0]: outside[embed]}
    for entries in of_layers:
        tensors.update({name: (entry.dtype, entry.shape) for name, entry in sorted(entries.items())})
    tensors.update({leaf.names[0]: outside[leaf] for leaf in rest})
    after = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    before = sum(leaf.size * source.dtype(leaf).itemsize for leaf in leaves(config))
    outcomes = tuple(outcome for number in range(config.num_layers) for outcome in work.outcomes(number))
    report = Report(dst, before, after, outcomes)
    with new_folder(dst, after) as temporary:
        with Writer(temporary, tensors, MAX_SHARD_BYTES) as writer:
            for leaf in outside:
                _copy_plain(source, leaf, writer)
            for entries in of_layers:
                for name, entry in entries.items():
                    size = math.prod(entry.shape) * entry.dtype.itemsize
                    Span(entry.file, entry.offset, size).copy_to(*writer.place(name))
        write_side_files(source.config, None, source.folder, temporary, both_dialects=True)
        info = recipe.info()
        if isinstance(info, Awq):
            info = dataclasses.replace(info, skipped=routers(config))
        add_config(info, temporary)
        text = to_json(_as_json(report, recipe, calibration), indent=2)
        (temporary / REPORT).write_text(text + "\n", encoding="utf-8")
    return report


def _copy_plain(source: Source, leaf: Leaf, writer: Writer) -> None:
    for tensors, rows in blocks(leaf, source.dtype(leaf).itemsize):
        data = np.ascontiguousarray(source.read(leaf, tensors, rows)[0])
        writer.write(leaf.names[0], rows.start * data[:1].nbytes, data)


def _as_json(report: Report, recipe: Recipe, calibration: CalibrationText | None) -> dict[str, Any]:
    """The content of the report's file."""
    text = None
    if calibration is not None:
        text = {"file": str(calibration.file), "rows": calibration.rows, "length": calibration.length}
    return {
        "recipe": dataclasses.asdict(recipe),
        "calibration": text,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "by_kind": {
            kind: {"error": error, "nearest_error": nearest} for kind, (error, nearest) in report.by_kind().items()
        },
        "matrices": [
            {key: value for key, value in dataclasses.asdict(outcome).items() if value is not None}
            for outcome in report.outcomes
        ],
    }


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over matrices on standard error, if that is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("matrices"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
