"""Reads .gz and .zst files: all that comes before damage, and from any Zstandard frame on."""

import collections
import io
import os
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from qwen_jax.errors import InputError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LAST = 4
_FRAME, _SKIPPABLE, _SKIPPABLE_MASK = 0xFD2FB528, 0x184D2A50, 0xFFFFFFF0
_LONGEST_HEADER, _BLOCK_HEADER, _CHECKSUM, _RLE = 18, 3, 4, 1


class Archive(io.RawIOBase):
    """Decompresses a file. At damage it gives all that could be decompressed, and then raises EOFError with the place.

    Attributes:
      frames: of Zstandard, the decompressed and the compressed position of each frame that has begun.
      boundary: decompressed position of the frame at `end`; None until that frame begins.
    """

    def __init__(self, file: BinaryIO, zstandard: ModuleType | None, start: int = 0, end: int | None = None):
        """
        Args:
          file: the compressed file.
          zstandard: the library, for .zst; None for .gz.
          start: byte at which a member or frame begins.
          end: byte at which a later piece begins; reading may go on behind it.
        """
        self.frames: collections.deque[tuple[int, int]] = collections.deque()
        self.boundary: int | None = None
        self._file, self._zstandard, self._end = file, zstandard, end
        # Zstandard makes up to 30,000 bytes of one, gzip 1,000: little is read at a time.
        self._at_once, self._name = (1 << 14, "gzip member") if zstandard is None else (1 << 10, "Zstandard frame")
        self._codec: Any = None
        # Compressed bytes that are done, and decompressed ones; where the frame began in both.
        self._done = self._began = start
        self._made = self._made_before = 0
        self._rest = b""
        self._ready = memoryview(b"")
        self._damage = ""
        if start:
            file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        while not self._ready:
            if self._damage:
                raise EOFError(self._damage)
            if not self._decompress():
                return 0
        into = memoryview(buffer)
        size = min(len(into), len(self._ready))
        into[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def place(self, position: int) -> str:
        """Names a decompressed position that has been read: in its Zstandard frame, if it is not in the first one.

        Args:
          position: not before that of the last call.
        """
        while len(self.frames) > 1 and self.frames[1][0] <= position:
            self.frames.popleft()
        made, began = self.frames[0] if self.frames else (0, 0)
        return f"byte {position - made}" + (f" of the frame at byte {began}" if began else "")

    def _decompress(self) -> bool:
        """Decompresses the next bytes; false at the end of the file."""
        data = self._rest or self._file.read(self._at_once)
        self._rest = b""
        if self._codec is None and self._zstandard is None:
            # Zeros may fill the last block of a tape.
            size = len(data)
            data = data.lstrip(b"\0")
            self._done += size - len(data)
            if size and not data:
                return True
        if not data:
            if self._codec is not None:
                self._damage = f"it ends in the middle of the {self._part()}"
            return self._codec is not None
        if self._codec is None:
            self._begin()
        try:
            made = self._codec.decompress(data)
        except self._errors() as error:
            made, place = self._before_damage()
            self._damage = f"it is damaged at byte {place}, in the {self._part()}: {error}"
        else:
            self._rest = self._codec.unused_data if self._codec.eof else b""
            self._done += len(data) - len(self._rest)
            if self._codec.eof:
                self._codec = None
        self._made += len(made)
        self._ready = memoryview(made)
        return True

    def _begin(self) -> None:
        self._codec, self._began, self._made_before = self._new(), self._done, self._made
        if self._zstandard is not None:
            self.frames.append((self._made, self._done))
        if self.boundary is None and self._end is not None and self._done >= self._end:
            self.boundary = self._made

    def _before_damage(self) -> tuple[bytes, int]:
        """Decompresses the damaged frame again, the last bytes one by one: what they give, and where it is damaged."""
        codec, made, place = self._new(), self._made_before, self._began
        self._file.seek(self._began)
        while place < self._done:
            data = self._file.read(min(self._done - place, self._at_once))
            made += len(codec.decompress(data))
            place += len(data)
        found = b""
        try:
            while byte := self._file.read(1):
                found += codec.decompress(byte)
                place += 1
        except self._errors():
            pass
        return found[max(self._made - made, 0) :], place

    def _new(self) -> Any:
        if self._zstandard is not None:
            # Corpora are often compressed with windows of up to 2 GiB (zstd --long=31).
            return self._zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        return zlib.decompressobj(wbits=31)

    def _errors(self) -> tuple[type[Exception], ...]:
        return (zlib.error,) if self._zstandard is None else (self._zstandard.ZstdError,)

    def _part(self) -> str:
        return f"{self._name} that begins at byte {self._began}"

    def close(self) -> None:
        self._file.close()
        super().close()


class UntilDamage:
    """A file that ends where it is damaged, for libraries that take no errors, such as that of WARC files.

    Attributes:
      damage: once its place has been reached.
      end: the last four bytes that have been read.
    """

    def __init__(self, file: io.BufferedReader):
        self._file, self._position, self.end = file, 0, b""
        self.damage: Exception | None = None

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end and at damage."""
        try:
            data = b"" if self.damage else self._file.read1(size)
        except (OSError, EOFError) as error:
            self.damage = error
            return b""
        self._position += len(data)
        self.end = (self.end + data[-_LAST:])[-_LAST:]
        return data

    def damage_behind(self) -> Exception | None:
        """The damage here or behind: garbage may be noticed before the damage that has made it."""
        while self.read(1 << 20):
            pass
        return self.damage

    def tell(self) -> int:
        """How many bytes have been read."""
        return self._position


def frame_starts(path: Path, zstandard: ModuleType) -> list[int]:
    """The byte at which each frame of a Zstandard file begins; reads headers alone, and stops where one is damaged.

    Source: RFC 8878, section 3.1.

    Args:
      path: of the file.
      zstandard: the library.

    Raises:
      InputError: the file cannot be read.
    """
    starts: list[int] = []
    try:
        with path.open("rb", buffering=0) as file:
            at, size = 0, os.fstat(file.fileno()).st_size
            while at < size:
                header = os.pread(file.fileno(), _LONGEST_HEADER, at)
                (magic,) = struct.unpack("<I", header[:4].ljust(4, b"\0"))
                if magic & _SKIPPABLE_MASK == _SKIPPABLE:
                    end = at + 8 + int.from_bytes(header[4:8], "little")
                elif magic == _FRAME:
                    end = _end_of_frame(file.fileno(), at, header, zstandard)
                else:
                    break
                starts.append(at)
                at = end
    except zstandard.ZstdError:
        pass
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    return starts


def _end_of_frame(file: int, at: int, header: bytes, zstandard: ModuleType) -> int:
    """Steps over the blocks of a frame; a file that ends too early ends the frame."""
    parameters = zstandard.get_frame_parameters(header)
    at += zstandard.frame_header_size(header)
    last = False
    while not last:
        block = os.pread(file, _BLOCK_HEADER, at)
        if len(block) < _BLOCK_HEADER:
            return at + _BLOCK_HEADER
        word = int.from_bytes(block, "little")
        last = bool(word & 1)
        at += _BLOCK_HEADER + (1 if word >> 1 & 3 == _RLE else word >> 3)
    return int(at + (_CHECKSUM if parameters.has_checksum else 0))
