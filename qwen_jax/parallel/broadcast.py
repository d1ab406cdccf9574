"""Messages between the processes of a job: from process 0 to the others in order, or from each to all in rounds.

They travel through the key-value store of JAX's distributed runtime, which process 0 of the job holds. So no device
takes part: a receiver may wait for hours, and devices run programs meanwhile.
"""

import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qwen_jax.errors import InputError

Message = tuple[Any, list[np.ndarray]]
"""A JSON value, and arrays of any shapes and of NumPy's own dtypes."""
# Messages that are sent before it is checked that all receivers have got those of the block before.
_BLOCK = 64
# How long one request to the store waits for a message; then it is made again.
_WAIT_MS = 10_000
_FAILED = b"!"
# How an array is sent; smaller ones, in bytes, always whole.
_WHOLE, _CHANGES, _SMALL = "whole", "changes", 1024
# Messages that are compressed, in bytes.
_LARGE = 16_384
_made = itertools.count()


class Broadcast:
    """Messages of process 0 to all others. All processes make their broadcasts in the same order.

    A message is a JSON object with arrays. The sender is at most two blocks of messages ahead of the slowest receiver.
    One thread of each process uses it.

    Attributes:
      sends: whether this process is the sender.
    """

    def __init__(self) -> None:
        self.sends = jax.process_index() == 0
        self._name = f"qwen_jax/broadcast/{next(_made)}"
        self._numbers = itertools.count()
        self._last: dict[str, Sequence[np.ndarray]] = {}

    def send(self, message: Any, arrays: Sequence[np.ndarray] = (), like: str = "", column: int | None = None) -> None:
        """Sends a message.

        Args:
          message: JSON values.
          arrays: of any shapes and of NumPy's own dtypes; not changed afterwards if `like` is given.
          like: of messages whose arrays differ little: those of the same shapes are sent as their differences.
          column: of matrices whose rows may have changed places since then: those with the same number in this column
            are compared.

        Raises:
          jax.errors.JaxRuntimeError: the store cannot be reached.
        """
        kinds, parts = list[str](), list[np.ndarray]()
        for x, before in zip(arrays, self._before(like), strict=False):
            kind, some = _difference(x, before, column)
            kinds.append(kind)
            parts += some
        # What cannot be packed gets no number: receivers would wait for it.
        data = _packed([message, like, kinds], parts)
        block, place = divmod(next(self._numbers), _BLOCK)
        if place == 0 and block >= 2:
            for receiver in range(1, jax.process_count()):
                _wait(f"{self._name}/got/{block - 2}/{receiver}")
            _store().key_value_delete(f"{self._name}/{block - 2}/")
            _store().key_value_delete(f"{self._name}/got/{block - 2}/")
        if like:
            self._last[like] = arrays
        _store().key_value_set_bytes(f"{self._name}/{block}/{place}", data)

    def receive(self) -> Message:
        """Waits for the next message. The arrays are read-only.

        Raises:
          jax.errors.JaxRuntimeError: the store cannot be reached.
        """
        block, place = divmod(next(self._numbers), _BLOCK)
        data = _wait(f"{self._name}/{block}/{place}")
        if place == _BLOCK - 1:
            _store().key_value_set_bytes(f"{self._name}/got/{block}/{jax.process_index()}", b"1")
        (message, like, kinds), found = _unpacked(data)
        parts = iter(found)
        arrays = [
            next(parts) if kind == _WHOLE else _changed(before, *(next(parts) for _ in range(3)))
            for kind, before in zip(kinds, self._before(like), strict=False)
        ]
        if like:
            self._last[like] = arrays
        return message, arrays

    def _before(self, like: str) -> Iterator[Any]:
        """The arrays of the last message that was like one, and then None for ever."""
        return itertools.chain(self._last.get(like, ()), itertools.repeat(None))


class Exchange:
    """Messages of every process to all, in rounds. All processes make their exchanges in the same order.

    One thread at a time of each process uses it. With one process, nothing is sent.
    """

    def __init__(self) -> None:
        self._name = f"qwen_jax/exchange/{next(_made)}"
        self._rounds = itertools.count()

    def share(self, what: str, work: Callable[[], Message]) -> list[Message]:
        """Does some work, and gives its result to all processes. It succeeds in every process or fails in every one.

        Args:
          what: describes the work in a message, such as "Sampling".
          work: of this process.

        Returns:
          The results of all processes, by index.

        Raises:
          InputError: the work of another process failed. A process that failed raises its own exception.
        """
        if jax.process_count() == 1:
            return [work()]
        problem: Exception | None = None
        data = _FAILED
        try:
            data = _packed(*work())
        except Exception as error:
            problem = error
        number, here = next(self._rounds), jax.process_index()
        if number >= 2:
            # All have posted in the last round, for which they had read the one before it.
            _store().key_value_delete(f"{self._name}/{number - 2}/{here}")
        _store().key_value_set_bytes(f"{self._name}/{number}/{here}", data)
        found = [data if i == here else _wait(f"{self._name}/{number}/{i}") for i in range(jax.process_count())]
        if problem is not None:
            raise problem
        if _FAILED in found:
            raise InputError(f"{what} failed in process {found.index(_FAILED)}; its message says why.")
        return [_unpacked(one) for one in found]

    def from_process_0(self, what: str, work: Callable[[], Any]) -> Any:
        """What some work in process 0 returns, a JSON value, in all processes; as `share`."""
        return self.share(what, lambda: (work() if jax.process_index() == 0 else None, []))[0][0]


def _difference(x: np.ndarray, before: np.ndarray | None, column: int | None) -> tuple[str, list[np.ndarray]]:
    """How an array is sent: whole, or the places and values that differ from the rows of an earlier one."""
    if before is None or before.shape != x.shape or before.dtype != x.dtype or x.nbytes <= _SMALL:
        return _WHOLE, [x]
    if x.itemsize not in (1, 2, 4, 8):
        return _WHOLE, [x]
    order = np.arange(len(x), dtype=np.int32)
    if x.ndim == 2 and column is not None:
        key, sorter = before[:, column], np.argsort(before[:, column])
        order = sorter[np.minimum(np.searchsorted(key, x[:, column], sorter=sorter), len(key) - 1)].astype(np.int32)
    before = before[order]
    # Bits are compared, because 0.0 equals -0.0.
    flat, bits = np.ascontiguousarray(x).reshape(-1), f"u{x.itemsize}"
    places = np.flatnonzero(before.reshape(-1).view(bits) != flat.view(bits))
    if 4 * len(places) < len(flat):
        return _CHANGES, [order, places.astype(np.int32), flat[places]]
    return _WHOLE, [x]


def _changed(before: np.ndarray, order: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The array of which `_difference` told the difference."""
    x = before[order]
    x.reshape(-1)[places] = values
    return x


def _packed(message: Any, arrays: Sequence[np.ndarray]) -> bytes:
    head = json.dumps([message, [(x.dtype.str, x.shape) for x in arrays]]).encode()
    data = b"".join([len(head).to_bytes(4, "little"), head, *(np.ascontiguousarray(x).tobytes() for x in arrays)])
    # The store is slow: 10 MB/s to 40 MB/s.
    return b"c" + zlib.compress(data, 1) if len(data) > _LARGE else b"p" + data


def _unpacked(data: bytes) -> Message:
    data = zlib.decompress(data[1:]) if data[:1] == b"c" else data[1:]
    at = 4 + int.from_bytes(data[:4], "little")
    message, kinds = json.loads(data[4:at])
    arrays = []
    for name, shape in kinds:
        dtype, count = np.dtype(name), math.prod(shape)
        arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape))
        at += count * dtype.itemsize
    return message, arrays


def _wait(key: str) -> bytes:
    """What is under a key, as soon as there is something."""
    while True:
        try:
            found: bytes = _store().blocking_key_value_get_bytes(key, _WAIT_MS)
            return found
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _store() -> Any:
    """The client of the key-value store. JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
