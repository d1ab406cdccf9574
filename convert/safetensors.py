"""Reading and writing safetensors files, a block of rows at a time, with plain reads and writes.

The format: 8 bytes of header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Nothing is memory-mapped: mapped pages count as resident memory.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from convert.folder import PICKLES
from qwen_jax.config import adapter_problem
from qwen_jax.errors import InputError
from qwen_jax.files import read_json, why_unusable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Dtypes of weights; the last one is only read.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
# Those of quantised weights, and the others that NumPy has.
_STORED = {
    **DTYPES,
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_CODES = {dtype: code for code, dtype in _STORED.items()}
# Bits of an element of every dtype of the format, for tensors that are not read.
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_MAX_HEADER = 100_000_000  # The reference implementation's limit.


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is stored.

    Attributes:
      file: the file.
      code: the format's name of the dtype, such as "BF16".
      shape: of the tensor.
      offset: of its first byte in the file.
    """

    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """The dtype, if NumPy has it."""
        return _STORED[self.code]

    def part(self, first: int, rows: int) -> "Entry":
        """Some rows, counted over all axes but the last, as a tensor [rows, columns] of its own."""
        columns = self.shape[-1]
        return Entry(self.file, self.code, (rows, columns), self.offset + first * columns * self.dtype.itemsize)


def read_header(path: Path) -> dict[str, Entry]:
    """Reads the names, dtypes and shapes of the tensors of one safetensors file.

    Raises:
      InputError: not a complete and valid safetensors file.
    """
    problem = why_unusable(path)
    if problem is not None:
        raise InputError(problem)
    # The header.
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
            raise _invalid(path, f"it has {size} bytes and its header claims {length}; it is truncated or corrupt")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, _DuplicateKeyError) as error:
        raise _invalid(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _invalid(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    # The tensors: each has the bytes that its shape needs, and together they fill the file without gaps.
    data_start, entries, spans = 8 + length, {}, []
    for name, value in header.items():
        code, shape, start, stop = _fields(path, name, value)
        expected = -(-math.prod(shape) * _BITS[code] // 8)
        if stop - start != expected:
            raise _invalid(path, f"tensor {name} of {code}{list(shape)} needs {expected} bytes, has {stop - start}")
        entries[name] = Entry(path, code, shape, data_start + start)
        spans.append((start, stop, name))
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            raise _invalid(path, f"tensor {name} starts at byte {start} of the data where {position} was expected")
        position = stop
    if data_start + position != size:
        raise _invalid(path, f"expected {data_start + position} bytes, it has {size}; it is truncated or corrupt")
    return entries


class _DuplicateKeyError(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _DuplicateKeyError("a key stands in it twice")
    return result


def _invalid(path: Path, what: str) -> InputError:
    return InputError(f"{path} is not a valid safetensors file: {what}. Fetch or write it again.")


def _fields(path: Path, name: str, value: object) -> tuple[str, tuple[int, ...], int, int]:
    """The checked fields of one header entry: dtype code, shape, first and last byte."""

    def naturals(x: object) -> bool:
        return isinstance(x, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in x)

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _invalid(path, f"the entry of {name} lacks dtype, shape or data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    if not naturals(shape) or not naturals(offsets) or len(offsets) != 2:
        raise _invalid(path, f"the entry of {name} has shape {shape} and data_offsets {offsets}")
    code = value["dtype"]
    if not isinstance(code, str) or code not in _BITS:
        raise _invalid(path, f"tensor {name} has dtype {code!r}, which the format does not have")
    return code, tuple(shape), offsets[0], offsets[1]


def read_folder(folder: Path, optional: Callable[[str], bool] = lambda name: False) -> dict[str, Entry]:
    """Finds the tensors of a folder: in `model.safetensors`, or in the files that `model.safetensors.index.json` names.

    Args:
      folder: the checkpoint folder.
      optional: whether the model does without a tensor of that name, as it does without the output head where the
        config ties it to the embedding. The index and the files may disagree about such tensors.

    Raises:
      InputError: a missing, truncated or corrupt file, an index that does not fit the files, a tensor that is in two
        files, or an adapter instead of a model.
    """
    single, index = folder / SINGLE, folder / INDEX
    has_single, has_index = _is_listed(single), _is_listed(index)
    problem = adapter_problem(folder)
    if problem is not None and not has_single and not has_index:
        raise InputError(problem)
    if problem is not None and any(folder.glob("adapter_model.*")):
        raise InputError(
            f"{folder} holds a model and an adapter beside it, which would not be applied. Merge the adapter into the "
            "model with PEFT (merge_and_unload), or move the adapter_* files to another folder."
        )
    if not has_index:
        if has_single:
            return read_header(single)
        raise _no_weights(folder)
    # The index.
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} must hold a weight_map from tensor names to file names.")
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file:
            raise InputError(f"{index} names the file {file!r}; expected a plain file name beside the index.")
    if has_single and files != [SINGLE]:
        raise InputError(f"{folder} has both {SINGLE} and {INDEX}, which names other files. Remove the wrong one.")
    missing = [file for file in files if not _is_listed(folder / file)]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing[:3])} ({len(missing)} of {len(files)} files that {INDEX} names). "
            "Complete the download."
        )
    # The files, against the index.
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read_header(folder / file).items():
            if name not in entries or (optional(name) and weight_map.get(name) == file):
                entries[name] = entry
            elif not optional(name):
                raise InputError(f"{folder}: both {entries[name].file.name} and {file} hold tensor {name}.")
    for name, file in weight_map.items():
        if (name not in entries or entries[name].file.name != file) and not optional(name):
            raise InputError(f"{index} says that {file} holds tensor {name}; it does not.")
    unlisted = sorted(name for name in set(entries) - set(weight_map) if not optional(name))
    if unlisted:
        raise InputError(f"{entries[unlisted[0]].file} holds tensor {unlisted[0]}, which {INDEX} does not list.")
    return entries


def _is_listed(path: Path) -> bool:
    """Whether the folder lists a file, be it a symbolic link whose target is gone: `read_header` says what is wrong."""
    return path.exists() or path.is_symlink()


def _no_weights(folder: Path) -> InputError:
    """What to say of a folder without safetensors weights."""
    pickled = sorted(file for ending in PICKLES for file in folder.glob(f"*{ending}"))
    if pickled:
        return InputError(
            f"{folder} holds {pickled[0].name}, a pickle, which can run code when loaded; it is not read. Get the "
            "safetensors version, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) of transformers writes safetensors."
        )
    found = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))[:3])
    return InputError(
        f"{folder} has neither {SINGLE} nor {INDEX}"
        + (f", only {found}. Fetch the index too." if found else ". Expected a folder with safetensors weights.")
    )


def read_rows(file: int, entry: Entry, rows: slice, out: np.ndarray) -> None:
    """Reads rows of a tensor.

    Args:
      file: descriptor of `entry.file`.
      entry: the tensor.
      rows: a range of its first axis.
      out: C-contiguous array with as many elements and the tensor's dtype; filled.

    Raises:
      InputError: the file ends early.
    """
    view = out.reshape(-1).view(np.uint8).data
    position = row_offset(entry, rows.start)
    while view:
        count = os.preadv(file, [view], position)
        if count == 0:
            raise _invalid(entry.file, "it ended before the tensor that was being read")
        view, position = view[count:], position + count


def row_offset(entry: Entry, row: int) -> int:
    """Offset in the file of a row of a tensor's first axis."""
    return entry.offset + row * math.prod(entry.shape[1:]) * entry.dtype.itemsize


_PAGE = 4096


class Writer:
    """Writes a set of tensors as Hugging Face does: one file, or shards of limited size and an index.

    Tensors may be written in any order and by several threads. Use it as a context manager: a clean exit writes the
    index. Flushing to the disk is the caller's.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_shard_bytes: float
    ) -> None:
        """Lays the files out and creates them.

        Args:
          folder: an existing folder.
          tensors: dtype and shape by name, in the order in which they fill the shards.
          max_shard_bytes: a file holds no more, unless a single tensor does.
        """
        self._folder = folder
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
        shards = _split(sizes, max_shard_bytes)
        self._index: dict[str, Any] | None = None
        files = [SINGLE]
        if len(shards) > 1:
            files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            parameters = sum(math.prod(shape) for _, shape in tensors.values())
            totals = {"total_parameters": parameters, "total_size": sum(sizes.values())}
            self._index = {"metadata": totals, "weight_map": weight_map}
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        for file, shard in zip(files, shards, strict=True):
            descriptor = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._files.append(descriptor)
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            position = 0
            # Whole pages first: between page-aligned places the kernel copies whole pages. Then wider dtypes first,
            # as the reference implementation orders them, which keeps every tensor aligned.
            for name in sorted(shard, key=lambda name: (sizes[name] % _PAGE > 0, -tensors[name][0].itemsize, name)):
                dtype, shape = tensors[name]
                span = [position, position + sizes[name]]
                header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": span}
                position = span[1]
            raw = json.dumps(header, separators=(",", ":")).encode()
            raw += b" " * (-(8 + len(raw)) % _PAGE)
            write_all(descriptor, memoryview(len(raw).to_bytes(8, "little") + raw), 0)
            os.ftruncate(descriptor, 8 + len(raw) + position)
            for name in shard:
                self._places[name] = (descriptor, 8 + len(raw) + header[name]["data_offsets"][0])

    def write(self, name: str, byte_offset: int, data: np.ndarray) -> None:
        """Writes a part of a tensor.

        Args:
          name: which tensor.
          byte_offset: of the part in the tensor.
          data: C-contiguous, in the tensor's dtype.
        """
        descriptor, start = self.place(name)
        write_all(descriptor, data.reshape(-1).view(np.uint8).data, start + byte_offset)

    def place(self, name: str) -> tuple[int, int]:
        """The open file of a tensor, and the offset of its first byte in it."""
        return self._places[name]

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for descriptor in self._files:
            os.close(descriptor)
        if kind is None and self._index is not None:
            text = json.dumps(self._index, indent=2, sort_keys=True) + "\n"
            (self._folder / INDEX).write_text(text, encoding="utf-8")


def _split(sizes: Mapping[str, int], max_shard_bytes: float) -> list[list[str]]:
    """Fills shards in order."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_all(descriptor: int, view: memoryview, position: int) -> None:
    """Writes bytes at a position of an open file."""
    start, nbytes = position, len(view)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count
    begin_writeback(descriptor, start, nbytes)


def begin_writeback(descriptor: int, position: int, nbytes: int) -> None:
    """Lets the disk begin with what was just written, so that the final flush is short. A hint, without waiting."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, position, nbytes, os.POSIX_FADV_DONTNEED)
