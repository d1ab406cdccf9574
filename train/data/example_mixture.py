"""Batches of whole examples of several data sets with weights: a pure function of (stores, weights, seed, step)."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from qwen_jax.errors import InputError
from train.data.example_batches import PackedExamples
from train.data.feed import Batches
from train.data.mixture import Pattern, Weight, exact_shares

B = TypeVar("B")


class MixedExamples(Batches[B]):
    """The batches of a run, by step: each row is of one data set.

    Shares are those of rows, and exact as in `train.data.mixture.Mixture`: after any number of rows, the number of rows
    of each data set is its share of them to within one. Each data set is packed for itself, and in each of its epochs
    every example comes once, in a new order.

    Attributes:
      sources: data sets with a weight, by name, sorted.
      rows_per_epoch: number of rows that all data sets fill. In as many rows of the mixture, a data set is read more
        than once if its weight is larger than its part of these rows.
      max_segments: most segments that any row has.
    """

    def __init__(self, sources: Mapping[str, PackedExamples[B]], weights: Mapping[str, Weight]):
        """Checks that the data sets fit together.

        Args:
          sources: data sets by name, read without end, in rows of one length and batches of one size.
          weights: of the data sets, as in `train.data.mixture.MixtureStage`.

        Raises:
          InputError: a weight is no number of at least 0 or names no data set, or the data sets have different rows.
        """
        self.shares = exact_shares(weights)
        for name in weights:
            if name not in sources:
                raise InputError(f"The mixture names {name!r}, which is not there: there are {', '.join(sources)}.")
        self.sources = {name: sources[name] for name in self.shares}
        configs = {name: source.config for name, source in self.sources.items()}
        shapes = {(config.length, config.batch_size, config.epochs) for config in configs.values()}
        self.config = next(iter(configs.values()))
        if len(shapes) > 1 or self.config.epochs is not None:
            raise InputError(
                "Data sets of a mixture must be read without end, in rows of one length and batches of one size; got "
                f"{configs}."
            )
        self._names = list(self.sources)
        self._pattern = Pattern(self.shares, self._names)
        self.rows_per_epoch = sum(source.rows_per_epoch for source in self.sources.values())
        self.max_segments = max(source.max_segments for source in self.sources.values())

    @property
    def end(self) -> int:
        """A very large number: the batches do not end."""
        return 2**62

    def batch_size(self, step: int) -> int:
        """Rows in the global batch of a step."""
        return self.config.batch_size

    def part_size(self, step: int, process_count: int) -> int:
        """Rows of a step that one of several processes reads; see `Batches.part_size`."""
        return self.sources[self._names[0]].part_size(step, process_count)

    def rows(self, step: int, process_index: int = 0, process_count: int = 1) -> list[tuple[str, int]]:
        """The rows of a step, or the part of one process: the data set of each, and its number in that data set."""
        size = self.part_size(step, process_count)
        first = step * self.config.batch_size + process_index * size
        which, draws = self._pattern.draws(np.arange(first, first + size))
        return [(self._names[d], draw) for d, draw in zip(which.tolist(), draws.tolist(), strict=True)]

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> B:
        """Reads the batch of a step, or the part of one process; see `Batches.batch`."""
        rows = self.rows(step, process_index, process_count)
        parts, places = [], []
        for name, source in self.sources.items():
            mine = [i for i, (of, _) in enumerate(rows) if of == name]
            if mine:
                parts.append(source.assemble([source.row(rows[i][1]) for i in mine]))
                places += mine
        order = np.argsort(places)
        batch: B = jax.tree.map(lambda *arrays: np.concatenate(arrays)[order], *parts)
        return batch

    def draws(self, step: int) -> dict[str, int]:
        """Number of rows that come from each data set before a step."""
        counts = self._pattern.counts(step * self.config.batch_size)
        return dict(zip(self._names, counts.tolist(), strict=True))

    def describe(self) -> str:
        """Lines on the data, for people: each data set, its share, and how often an epoch of the mixture reads it."""
        lines = []
        for name, source in self.sources.items():
            share = self.shares[name]
            epochs = float(share * self.rows_per_epoch / source.rows_per_epoch)
            lines.append(
                f"{name}: {float(share):.1%} of the rows, read {epochs:.2g} times in each epoch of the mixture"
            )
            lines.append(source.describe())
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """Everything that decides the batches, to be saved in checkpoints; see `check_resume`."""
        return {
            "shares": {name: str(share) for name, share in self.shares.items()},
            "sources": {name: source.record() for name, source in self.sources.items()},
        }

    def check_resume(self, saved: Mapping[str, Any], step: int) -> None:
        """Checks that a run has seen the same batches before a step.

        Args:
          saved: `record()` of the run.
          step: number of steps that the run has taken.

        Raises:
          InputError: the batches differ; the message says in what.
        """
        now = self.record()
        if step and saved.get("shares") != now["shares"]:
            raise InputError(
                f"The run has taken {step} steps with other shares of its data: {saved.get('shares', 'none')}, and now "
                f"{now['shares']}. Resume with the same weights, or begin a new run."
            )
        for name, source in self.sources.items():
            source.check_resume(saved["sources"][name] if step else {}, step if self.draws(step)[name] else 0)
