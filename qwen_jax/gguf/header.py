"""The header of a GGUF file: metadata, and where each tensor is. Everything is checked before any weights are read."""

import dataclasses
import functools
import math
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import why_unusable

SUFFIX = ".gguf"
ALIGNMENT = 32
"""Of the tensors' data in bytes, where the metadata do not say otherwise."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
# Types of metadata values by number: format of `struct`, and the dtype of arrays of them.
_NUMBERS = {
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_STRING, _ARRAY = 8, 9
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class TensorType:
    """How a tensor's values are stored.

    Attributes:
      number: in the file.
      name: as llama.cpp calls it.
      block: values that are stored together.
      nbytes: of a block.
    """

    number: int
    name: str
    block: int
    nbytes: int


TYPES = {
    name: TensorType(number, name, block, nbytes)
    for number, name, block, nbytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 40),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
    )
}
"""Every type of a tensor by its name."""
_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file.

    Attributes:
      name: in llama.cpp's naming.
      type: how its values are stored.
      shape: in PyTorch's order; the file has it reversed.
      file: that holds it.
      offset: of its data in the file, in bytes.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) // self.type.block * self.type.nbytes


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says about its model.

    Attributes:
      path: the file, or the first of a model that is split into several.
      metadata: numbers, booleans and strings; arrays of numbers as NumPy arrays, arrays of strings as lists.
      tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a GGUF file, which need not exist."""
    return Path(path).suffix.lower() == SUFFIX


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads the header of a GGUF file, of all files if the model is split (NAME-00001-of-00003.gguf).

    Args:
      path: the file; any of them for a split model.

    Raises:
      InputError: no such file, no GGUF file, a version or byte order that is not supported, or a damaged file.
    """
    files = _split_files(Path(path))
    try:
        stamps = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    except OSError:
        stamps = ()  # Reading it says what is wrong.
    return _read_all(files, stamps)


@functools.lru_cache(maxsize=4)
def _read_all(files: tuple[Path, ...], _: tuple[tuple[int, int], ...]) -> Header:
    """Reads the headers of a model's files; config and tokenizer are asked for one after the other."""
    headers = [_read_file(file) for file in files]
    first = headers[0]
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or max(count, 1) != len(files):
        raise InputError(
            f"{first.path} says that its model has {count} files, and its name says {len(files)}. Give the files the "
            "names that they were published with, such as NAME-00001-of-00003.gguf."
        )
    tensors: dict[str, TensorInfo] = {}
    for i, header in enumerate(headers):
        part = header.metadata.get("split.no")
        if len(files) > 1 and part != i:
            raise InputError(f"{header.path} says that it is part {part!r:.40}, counted from 0; expected {i}.")
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise InputError(f"{header.path} has tensor {min(twice)}, which another file of the model has, too.")
        tensors |= header.tensors
    return Header(first.path, first.metadata, tensors)


def _split_files(path: Path) -> tuple[Path, ...]:
    """The files of a model, by the name of one of them."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match[3])
    names = [f"{match[1]}-{i:05d}-of-{match[3]}{SUFFIX}" for i in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or count == 0:
        raise InputError(
            f"{path} is one of {count} files of a model; {path.parent} lacks {len(missing)} of them: "
            f"{', '.join(missing[:3])}. Fetch all of them into one folder."
        )
    return tuple(path.parent / name for name in names)


def _read_file(path: Path) -> Header:
    problem = why_unusable(path)
    if problem is not None:
        raise InputError(problem)
    with path.open("rb") as file:
        start = file.read(24)
        if start[:4] != _MAGIC:
            raise InputError(f"{path} is no GGUF file: it begins with {start[:4]!r}, expected {_MAGIC!r}.")
        if len(start) < 24:
            raise InputError(f"{path} ends within its header, after {len(start)} bytes. Fetch it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, data)


def _parse(path: Path, data: mmap.mmap) -> Header:
    at = _Cursor(path, data)
    at.position = 4
    # The version tells the byte order: it is a small number.
    version = at.number("<I")
    if version & 0xFFFF == 0:
        raise InputError(
            f"{path} is a big-endian GGUF file; only little-endian ones can be read. Convert it with "
            "`gguf-convert-endian FILE little` of the gguf package."
        )
    if version not in _VERSIONS:
        raise InputError(
            f"{path} has version {version} of GGUF, expected {' or '.join(map(str, _VERSIONS))}. Convert the model "
            "again with a current llama.cpp."
        )
    num_tensors, num_values = at.number("<Q"), at.number("<Q")

    # Metadata.
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = at.string()
        if key in metadata:
            raise InputError(f"{path} has the metadata key {key!r} twice. The file is damaged.")
        metadata[key] = at.value(key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise InputError(f"{path} has general.alignment={alignment!r}; expected a power of 2.")

    # The table of tensors; their offsets count from the end of the header.
    table: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        name = at.string()
        if name in table:
            raise InputError(f"{path} has tensor {name!r} twice. The file is damaged.")
        table[name] = at.tensor(name)
    start = -(-at.position // alignment) * alignment
    tensors = {
        name: TensorInfo(name, kind, shape, path, start + offset) for name, (kind, shape, offset) in table.items()
    }
    _check_places(path, list(tensors.values()), alignment, start, len(data))
    return Header(path, metadata, tensors)


def _check_places(path: Path, tensors: list[TensorInfo], alignment: int, start: int, size: int) -> None:
    """Raises InputError unless every tensor's data are aligned, inside the file, and its own."""
    end, before = start, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if (tensor.offset - start) % alignment:
            raise InputError(f"{path}: tensor {tensor.name} is not aligned to {alignment} bytes. The file is damaged.")
        if tensor.offset + tensor.nbytes > size:
            raise InputError(
                f"{path} ends too early: tensor {tensor.name} reaches to byte {tensor.offset + tensor.nbytes:,}, and "
                f"the file has {size:,}. The download is incomplete; fetch it again."
            )
        if tensor.offset < end:
            raise InputError(f"{path}: tensors {before} and {tensor.name} overlap. The file is damaged.")
        end, before = tensor.offset + tensor.nbytes, tensor.name


class _Cursor:
    """Reads the parts of a header one after the other, never beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._size = path, data, len(data)
        self.position = 0

    def _take(self, count: int) -> int:
        """Moves on by a number of bytes; returns where they begin."""
        start = self.position
        if count > self._size - start:
            raise InputError(
                f"{self._path} ends within its header: byte {start:,} announces {count:,} bytes more, and the file has "
                f"{self._size:,}. The download is incomplete or damaged; fetch it again."
            )
        self.position = start + count
        return start

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self._data, self._take(struct.calcsize(form)))[0]

    def string(self) -> str:
        count = self.number("<Q")
        start = self._take(count)
        try:
            return self._data[start : start + count].decode("utf-8")
        except UnicodeDecodeError:
            raise self._not_utf8(start) from None

    def _not_utf8(self, position: int) -> InputError:
        return InputError(f"{self._path}: the text at byte {position:,} is not UTF-8. The file is damaged.")

    def value(self, key: str) -> Any:
        kind = self.number("<I")
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind][0])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise InputError(f"{self._path}: metadata {key!r} has the unknown type {kind}. The file is damaged.")
        # An array.
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind][1])
            start = self._take(count * dtype.itemsize)
            return np.frombuffer(self._data, dtype, count, start).copy() if count else np.empty(0, dtype)
        if kind != _STRING:
            raise InputError(f"{self._path}: metadata {key!r} is an array of type {kind}; expected numbers or texts.")
        if count * 8 > self._size - self.position:  # Every text has a length of 8 bytes.
            self._take(count * 8)
        return self._strings(count)

    def _strings(self, count: int) -> list[str]:
        """Vocabularies have hundreds of thousands of these: `string` in a loop, without its calls."""
        data, size, position = self._data, self._size, self.position
        length = struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                (n,) = length(data, position)
                position += 8
                if n > size - position:
                    raise struct.error
                found.append(data[position : position + n].decode("utf-8"))
                position += n
        except struct.error:
            self.position = position
            self._take(self._size - position + 1)
        except UnicodeDecodeError:
            raise self._not_utf8(position) from None
        self.position = position
        return found

    def tensor(self, name: str) -> tuple[TensorType, tuple[int, ...], int]:
        """Type, shape in PyTorch's order, and offset."""
        dimensions = self.number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise InputError(f"{self._path}: tensor {name!r} has {dimensions} dimensions; expected 1 to 4.")
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        number, offset = self.number("<I"), self.number("<Q")
        kind = _BY_NUMBER.get(number)
        if kind is None:
            raise InputError(
                f"{self._path}: tensor {name!r} has the unknown type {number}. Known are {', '.join(TYPES)}; quantise "
                "the model in one of them."
            )
        if math.prod(shape) == 0 or shape[-1] % kind.block:
            raise InputError(
                f"{self._path}: tensor {name!r} has shape {list(shape)}; its type {kind.name} needs rows of a positive "
                f"multiple of {kind.block} values. The file is damaged."
            )
        return kind, shape, offset
