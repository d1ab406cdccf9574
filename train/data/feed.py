"""Batches on the devices of a mesh, read ahead."""

from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from jax.sharding import Mesh

from train.data.batch import place_part, row_part

B = TypeVar("B")
Read = TypeVar("Read", covariant=True)


class Parts(Protocol[Read]):
    """Batches of which a process reads a part of the rows, such as `Mixture` and `PackedExamples`."""

    def batch_size(self, step: int) -> int:
        """Rows in the global batch of a step."""
        ...

    def loader(self, start: int, process_index: int, process_count: int) -> Iterable[Read]:
        """Iterates over the parts of one process, from a step on."""
        ...


class Feed(Generic[B]):
    """The global batches of a run from a step on, in order. Each process reads only its part of the rows.

    `feed[step]` is the next batch, already on the devices.
    """

    def __init__(self, batches: Parts[B], start: int, mesh: Mesh):
        """Begins to read ahead.

        Args:
          batches: batches of the run; trees of [batch, length] arrays.
          start: the first step.
          mesh: mesh of the current stage, where batches are placed.

        Raises:
          InputError: the batch does not divide by the number of processes.
        """
        self._source, self._mesh, self._next = batches, mesh, start
        self._part = row_part(mesh, batches.batch_size(start))
        self._batches: Iterator[B] = iter(batches.loader(start, *self._part))

    def __getitem__(self, step: int) -> B:
        """The global batch of a step, as `jax.Array`s.

        Args:
          step: `start` in the first call, and one more in each further call.
        """
        if step != self._next:
            raise ValueError(f"A Feed returns batches in order: the next step is {self._next}, got {step}.")
        self._next += 1
        return place_part(next(self._batches), self._source.batch_size(step), self._mesh)
