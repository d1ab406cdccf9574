"""Batches by step: read ahead, by the parts of processes, and placed on the devices of a mesh."""

import abc
from collections.abc import Iterator
from typing import Generic, TypeVar

import grain
from jax.sharding import Mesh

from train.data.batch import place_part, row_part

B = TypeVar("B")


class Batches(abc.ABC, Generic[B]):
    """The batches of a run by step, of which each process reads a part of the rows."""

    @property
    @abc.abstractmethod
    def end(self) -> int:
        """The number of steps; a very large one if the batches do not end."""

    @abc.abstractmethod
    def batch_size(self, step: int) -> int:
        """Rows in the global batch of a step, counted from 0."""

    @abc.abstractmethod
    def part_size(self, step: int, process_count: int) -> int:
        """Rows of a step that one of several processes reads.

        Raises:
          InputError: the batch does not divide by the number of processes.
        """

    @abc.abstractmethod
    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> B:
        """Reads the batch of a step, or the part of one process.

        The concatenated parts of all processes are the global batch, for any number of processes.

        Args:
          step: counted from 0.
          process_index: index of this process.
          process_count: number of processes.

        Returns:
          NumPy arrays [batch_size / process_count, length].

        Raises:
          InputError: the batch does not divide by the number of processes.
        """

    def __getitem__(self, step: int) -> B:
        """The global batch of a step, counted from 0."""
        return self.batch(step)

    def loader(
        self, start: int = 0, process_index: int = 0, process_count: int = 1, *, threads: int = 2, ahead: int = 4
    ) -> "grain.IterDataset[B]":
        """Iterates over batches from a step to the end; threads read ahead.

        Args:
          start: the first step, counted from 0.
          process_index: index of this process.
          process_count: number of processes.
          threads: number of reading threads; 0 does not read ahead.
          ahead: number of batches to keep in memory, 16 bytes a token.

        Raises:
          InputError: the batch does not divide by the number of processes.
        """
        self.part_size(start, process_count)  # Raises here what would be raised in a thread.
        steps = grain.MapDataset.range(start, self.end)
        batches = steps.map(lambda step: self.batch(step, process_index, process_count))
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))


class Feed(Generic[B]):
    """The global batches of a run from a step on, in order. Each process reads only its part of the rows.

    `feed[step]` is the next batch, already on the devices.
    """

    def __init__(self, batches: Batches[B], start: int, mesh: Mesh):
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
