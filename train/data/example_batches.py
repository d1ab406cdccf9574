"""Batches of whole examples, packed into rows: a pure function of (store, seed, step)."""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from qwen_jax.errors import InputError
from train.data.batch import Batch
from train.data.example_store import ExampleStore, Selection, TooLong, random_keys, select
from train.data.examples import Example, Kind, Pair
from train.data.feed import Batches
from train.data.packing import best_fit, pack_segments
from train.data.pairs import PairBatch, pack_pairs
from train.data.shards import digest

B = TypeVar("B")
# Changes when the same seed gives other batches.
_ORDER = 1


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """How examples become batches.

    Attributes:
      length: tokens in a row.
      batch_size: rows in the global batch.
      seed: seed of the order.
      epochs: how many times the examples are read; the last batch may have empty rows. None reads them without end.
      too_long: what becomes of examples that are longer than a row: they are left out, cut, or an error. Of a pair,
        both answers with their prompts have to fit into one row.
      max_segments: most segments in a row; a pair has two. None is any number.

    Raises:
      InputError: a value out of range.
    """

    length: int
    batch_size: int
    seed: int = 0
    epochs: int | None = None
    too_long: TooLong = "drop"
    max_segments: int | None = None

    def __post_init__(self) -> None:
        if self.too_long not in ("drop", "truncate", "error"):
            raise InputError(f"too_long must be drop, truncate or error, got {self.too_long!r}.")
        least = {"length": 2, "batch_size": 1, "seed": 0, "epochs": 1, "max_segments": 1}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise InputError(f"{name} must be at least {value}, got {given}.")


class PackedExamples(Batches[B]):
    """The batches of a run, by step.

    In each epoch every example comes once, whole, in one row. Which examples share a row changes between epochs among
    those of the same length; the number of rows and their sizes do not. Rows come in a new order in each epoch, and
    the batches are cut from the rows of all epochs one after the other.

    Attributes:
      store: the examples.
      config: how they become batches.
      selection: which of them are used.
      rows_per_epoch: number of rows that an epoch fills.
      max_segments: most segments that any row has, in any epoch.
    """

    kind: Kind
    _answers: int  # Segments of a unit.

    def __init__(self, store: ExampleStore, config: RowConfig, units: np.ndarray | None = None):
        """Packs the examples.

        Args:
          store: tokenized examples.
          config: how they become batches.
          units: indices of the examples to use; by default all.

        Raises:
          InputError: the store holds examples of the other kind, or none that fits.
        """
        if store.kind != self.kind:
            raise InputError(
                f"expected data of the kind {self.kind}, got {store.kind} ({', '.join(store.info.files[:3])}). Give "
                f"data with the columns of {self.kind}."
            )
        if config.max_segments is not None and config.max_segments < self._answers:
            raise InputError(f"max_segments must be at least {self._answers}, got {config.max_segments}.")
        self.store, self.config = store, config
        self.selection: Selection = select(store, config.length, too_long=config.too_long, units=units)
        # Items of equal length are interchangeable, so the layout is made once: an epoch only deals out its slots.
        self._sizes = self.selection.lengths.sum(axis=1)
        slots = -np.sort(-self._sizes)
        max_items = None if config.max_segments is None else config.max_segments // self._answers
        self._layout = [np.array(row) for row in best_fit(slots, config.length, max_items)]
        self.rows_per_epoch = len(self._layout)
        self.max_segments = max(map(len, self._layout)) * self._answers
        self._epoch = functools.lru_cache(maxsize=2)(self._deal)

    def _deal(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The item in each slot, and the order of the rows."""
        keys = random_keys(self.config.seed, epoch, len(self._sizes) + self.rows_per_epoch)
        items = np.lexsort((keys[: len(self._sizes)], -self._sizes))
        return items, np.argsort(keys[len(self._sizes) :], kind="stable")

    def row(self, number: int) -> np.ndarray:
        """Items of a row of the run; none where the epochs are over.

        Args:
          number: of the row, counted from 0 over all epochs.
        """
        epoch, row = divmod(number, self.rows_per_epoch)
        if self.config.epochs is not None and epoch >= self.config.epochs:
            return np.zeros(0, np.int64)
        items, order = self._epoch(epoch)
        return items[self._layout[order[row]]]

    def rows(self, epoch: int) -> list[list[int]]:
        """Indices in the store of the examples in each row of an epoch, in order.

        Args:
          epoch: counted from 0.
        """
        first = epoch * self.rows_per_epoch
        return [self.selection.units[self.row(first + i)].tolist() for i in range(self.rows_per_epoch)]

    @property
    def fill(self) -> float:
        """Fraction of all positions of an epoch that hold tokens."""
        return float(self._sizes.sum() / (self.rows_per_epoch * self.config.length))

    def __len__(self) -> int:
        """Number of steps.

        Raises:
          InputError: the number of epochs is not given.
        """
        if self.config.epochs is None:
            raise InputError("The examples are read without end. Give a number of epochs.")
        return -(-self.config.epochs * self.rows_per_epoch // self.config.batch_size)

    @property
    def end(self) -> int:
        """The number of steps; a very large one if the examples are read without end."""
        return len(self) if self.config.epochs is not None else 2**62

    def batch_size(self, step: int) -> int:
        """Rows in the global batch of a step."""
        return self.config.batch_size

    def part_size(self, step: int, process_count: int) -> int:
        """Rows of a step that one of several processes reads; see `Batches.part_size`."""
        size, rest = divmod(self.config.batch_size, process_count)
        if rest:
            raise InputError(
                f"A batch of {self.config.batch_size} rows does not divide by {process_count} processes. Change "
                "batch_size."
            )
        return size

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> B:
        """Reads the batch of a step, or the part of one process; see `Batches.batch`."""
        size = self.part_size(step, process_count)
        first = step * self.config.batch_size + process_index * size
        return self.assemble([self.row(first + i) for i in range(size)])

    @abc.abstractmethod
    def assemble(self, rows: list[np.ndarray]) -> B:
        """Reads the items of each row, as from `row`, and writes them into a batch."""

    def _read(self, item: int) -> tuple[Example, ...]:
        """The answers of an item, cut as `selection` says."""
        lengths = self.selection.lengths[item].tolist()
        answers = self.store.answers(int(self.selection.units[item]))
        return tuple(Example(a.ids[:n], a.trained[:n]) for a, n in zip(answers, lengths, strict=True))

    def describe(self) -> str:
        """Lines on the data, for people: what it holds, what is left out, and how full the rows are."""
        rows = (
            f"{len(self._sizes):,} {'pairs' if self._answers == 2 else 'examples'} in {self.rows_per_epoch:,} rows of "
            f"{self.config.length:,} tokens ({self.fill:.1%} full, up to {self.max_segments} segments) in each epoch"
        )
        return "\n".join(filter(None, (self.store.info.describe(), self.selection.describe(self.store), rows)))

    def record(self) -> dict[str, Any]:
        """Everything that decides the batches, to be saved in checkpoints; see `check_resume`."""
        config = dataclasses.asdict(self.config)
        return {
            **{name: config[name] for name in ("seed", "length", "batch_size", "epochs", "too_long", "max_segments")},
            "store": self.store.fingerprint,
            "selection": self.selection.fingerprint(),
            "order": _ORDER,
        }

    def fingerprint(self) -> str:
        """A sha256 (hex) of everything that decides the batches; the same on every host."""
        return digest(self.record())

    def check_resume(self, saved: Mapping[str, Any], step: int) -> None:
        """Checks that a run has seen the same batches before a step. The number of epochs may grow.

        Args:
          saved: `record()` of the run.
          step: number of steps that the run has taken.

        Raises:
          InputError: the batches differ; the message says in what.
        """
        now = self.record()
        different = [name for name in now if name != "epochs" and saved.get(name) != now[name]] if step else []
        # With another number of epochs, the batches are the same up to the end of the shorter run.
        rows = step * self.config.batch_size
        for epochs in (saved.get("epochs"), now["epochs"]):
            if saved.get("epochs") != now["epochs"] and epochs is not None and rows > epochs * self.rows_per_epoch:
                different.append("epochs")
                break
        if different:
            names = {"store": "the fingerprint of files, tokenizer, chat template and options"}
            shown = [f"{names.get(name, name)} was {saved.get(name)!r} and is now {now[name]!r}" for name in different]
            raise InputError(
                f"The run has taken {step} steps with other data: {'; '.join(shown)}. Resume with the same data, or "
                "begin a new run."
            )


class PackedSequences(PackedExamples[Batch]):
    """Batches for supervised fine-tuning: loss weights are 1 on trained tokens."""

    kind = "sft"
    _answers = 1

    def assemble(self, rows: list[np.ndarray]) -> Batch:
        segments = [[answer for item in row.tolist() for answer in self._read(item)] for row in rows]
        return pack_segments(segments, self.config.length)


class PackedPairs(PackedExamples[PairBatch]):
    """Batches of preference pairs; the answers of a pair are neighbouring segments.

    Attributes:
      references: float32 [pairs of the store, 2], log-probabilities of the chosen and the rejected answer of each pair
        under the reference model; None is 0. It may be set at any time before batches are read.
    """

    kind = "pairs"
    _answers = 2

    def __init__(
        self,
        store: ExampleStore,
        config: RowConfig,
        units: np.ndarray | None = None,
        references: np.ndarray | None = None,
    ):
        """Packs the pairs.

        Args:
          store: tokenized pairs.
          config: how they become batches.
          units: indices of the pairs to use; by default all.
          references: see the attribute.

        Raises:
          InputError: the store holds no pairs, or none that fits.
        """
        super().__init__(store, config, units)
        self.references = references

    def assemble(self, rows: list[np.ndarray]) -> PairBatch:
        pairs = [[self._pair(item) for item in row.tolist()] for row in rows]
        units = [self.selection.units[row] for row in rows]
        references = None if self.references is None else [self.references[unit].tolist() for unit in units]
        return pack_pairs(pairs, self.config.length, references)

    def _pair(self, item: int) -> Pair:
        chosen, rejected = self._read(item)
        return Pair(chosen, rejected, float(self.store.margins[self.selection.units[item]]))
