"""Batches of a mixture on the devices of a mesh, read ahead."""

from collections.abc import Iterator

from jax.sharding import Mesh

from train.data.batch import Batch, place_part, row_part
from train.data.mixture import Mixture


class Feed:
    """The global batches of a mixture, in order from a step on; each process reads only its part of the rows.

    `feed[step]` gives them one after the other, already on the devices.
    """

    def __init__(self, mixture: Mixture, start: int, mesh: Mesh):
        """Begins to read.

        Args:
          mixture: of the run.
          start: the first step.
          mesh: where batches are placed; it is that of one stage.

        Raises:
          InputError: the processes do not divide the batch.
        """
        self._mixture, self._mesh, self._next = mixture, mesh, start
        self._part = row_part(mesh, self._batch_size(start))
        self._batches: Iterator[Batch] = iter(mixture.loader(start, *self._part))

    def _batch_size(self, step: int) -> int:
        return self._mixture.stages[self._mixture.stage(step)].batch_size

    def __getitem__(self, step: int) -> Batch:
        """The global batch of a step, as `jax.Array`s.

        Args:
          step: one more than that of the call before.
        """
        if step != self._next:
            raise ValueError(f"A feed gives its batches in order: the next is {self._next}, not {step}.")
        self._next += 1
        return place_part(next(self._batches), self._batch_size(step), self._mesh)
