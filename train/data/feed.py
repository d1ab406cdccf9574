"""Batches of a data mixture on the devices of a mesh, read ahead."""

from collections.abc import Iterator

from jax.sharding import Mesh

from train.data.batch import Batch, place_part, row_part
from train.data.mixture import Mixture


class Feed:
    """The global batches of a data mixture from a step on, in order. Each process reads only its part of the rows.

    `feed[step]` is the next batch, already on the devices.
    """

    def __init__(self, mixture: Mixture, start: int, mesh: Mesh):
        """Begins to read ahead.

        Args:
          mixture: data mixture of the run.
          start: the first step.
          mesh: mesh of the current stage, where batches are placed.

        Raises:
          InputError: the batch does not divide by the number of processes.
        """
        self._mixture, self._mesh, self._next = mixture, mesh, start
        self._part = row_part(mesh, self._batch_size(start))
        self._batches: Iterator[Batch] = iter(mixture.loader(start, *self._part))

    def _batch_size(self, step: int) -> int:
        return self._mixture.stages[self._mixture.stage(step)].batch_size

    def __getitem__(self, step: int) -> Batch:
        """The global batch of a step, as `jax.Array`s.

        Args:
          step: `start` in the first call, and one more in each further call.
        """
        if step != self._next:
            raise ValueError(f"A Feed returns batches in order: the next step is {self._next}, got {step}.")
        self._next += 1
        return place_part(next(self._batches), self._batch_size(step), self._mesh)
