"""Messages from process 0 of a job to the others, in order.

They travel through the key-value store of JAX's distributed runtime, which process 0 of the job holds. So no device
takes part: a receiver may wait for hours, and devices run programs meanwhile.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

# Messages that are sent before it is checked that all receivers have got those of the block before.
_BLOCK = 64
# How long one request to the store waits for a message; then it is made again.
_WAIT_MS = 10_000
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

    def send(self, message: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Sends a message. Raises `jax.errors.JaxRuntimeError` if the store cannot be reached.

        Args:
          message: JSON values.
          arrays: of any shapes, and of NumPy's own dtypes.
        """
        number = next(self._numbers)
        block, place = divmod(number, _BLOCK)
        if place == 0 and block >= 2:
            for receiver in range(1, jax.process_count()):
                self._wait(f"{self._name}/got/{block - 2}/{receiver}")
            _store().key_value_delete(f"{self._name}/{block - 2}/")
            _store().key_value_delete(f"{self._name}/got/{block - 2}/")
        kinds = [(x.dtype.str, x.shape) for x in arrays]
        head = json.dumps([message, kinds]).encode()
        parts = [len(head).to_bytes(4, "little"), head, *(np.ascontiguousarray(x).tobytes() for x in arrays)]
        _store().key_value_set_bytes(f"{self._name}/{block}/{place}", b"".join(parts))

    def receive(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Waits for the next message. The arrays are read-only.

        Raises:
          jax.errors.JaxRuntimeError: the store cannot be reached.
        """
        block, place = divmod(next(self._numbers), _BLOCK)
        data = self._wait(f"{self._name}/{block}/{place}")
        if place == _BLOCK - 1:
            _store().key_value_set_bytes(f"{self._name}/got/{block}/{jax.process_index()}", b"1")
        at = 4 + int.from_bytes(data[:4], "little")
        message, kinds = json.loads(data[4:at])
        arrays = []
        for name, shape in kinds:
            dtype = np.dtype(name)
            count = int(np.prod(shape, dtype=np.int64))
            arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize
        return message, arrays

    def _wait(self, key: str) -> bytes:
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
