"""Which rows make up which step: a schedule of exact mixtures, a pure function of (seed, step, schedule)."""

import dataclasses
import functools
import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import grain
import jax
import numpy as np

from qwen_jax.errors import InputError
from train.data.batch import Batch
from train.data.packing import rows_to_batch
from train.data.rows import PackedRows
from train.data.shards import digest

Weight = float | int | str | Fraction
_MAX_PERIOD = 2**20


@dataclasses.dataclass(frozen=True)
class MixtureStage:
    """A stretch of training with one mixture.

    Attributes:
      steps: how many.
      batch_size: rows in the global batch of a step.
      length: tokens in a row; the data sets must have been built with it.
      weights: for each data set its weight; shares are weights over their sum. A weight is an exact number: an integer,
        a `Fraction`, "1/3", or a float, which stands for the simplest fraction that rounds to it.
    """

    steps: int
    batch_size: int
    length: int
    weights: Mapping[str, Weight]

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} of a stage must be at least {least}, got {getattr(self, name)}.")
        self.shares()

    def shares(self) -> dict[str, Fraction]:
        """The exact share of each data set, by name; those of weight 0 are left out.

        Raises:
          InputError: a weight is negative or no number, all are 0, or they are too fine for an exact pattern.
        """
        weights = {name: _exact(name, weight) for name, weight in sorted(self.weights.items())}
        total = sum(weights.values(), Fraction(0))
        if not total:
            raise InputError(
                f"The mixture weights {dict(self.weights)} add up to nothing. Give at least one a weight above 0."
            )
        shares = {name: weight / total for name, weight in weights.items() if weight}
        period = math.lcm(*(share.denominator for share in shares.values()))
        if period > _MAX_PERIOD:
            raise InputError(
                f"The mixture weights {dict(self.weights)} repeat only after {period} rows, more than {_MAX_PERIOD}. "
                "Round them to a few digits, or give small integers or fractions such as '1/3'."
            )
        return shares


def _exact(name: str, weight: Weight) -> Fraction:
    try:
        if isinstance(weight, float):
            simple = Fraction(weight).limit_denominator(10**6)
            exact = simple if float(simple) == weight else Fraction(str(weight))
        else:
            exact = Fraction(weight)
    except (ValueError, OverflowError, TypeError, ZeroDivisionError):
        exact = Fraction(-1)
    if exact < 0:
        raise InputError(
            f"The weight of {name!r} must be a number of at least 0, such as 0.4, 2 or '1/3', got {weight!r}."
        )
    return exact


class Mixture:
    """The batches of a run, by the number of their step.

    Within a stage, after any number of rows each data set has given its share of them to within one row; nothing is
    sampled. A data set gives each of its rows once before any comes again, in an order drawn anew for each pass; when a
    later stage names it again, it goes on where it was. So what comes later in the schedule changes nothing before it.

    Attributes:
      stages: the schedule.
      datasets: by name.
      seed: of the orders.
      names: of the data sets, sorted; `rows` counts them in this order.
    """

    def __init__(self, stages: Sequence[MixtureStage], datasets: Mapping[str, PackedRows], seed: int):
        """Checks that schedule and data sets fit.

        Args:
          stages: in order.
          datasets: what the stages' weights name; others may be there and are not used.
          seed: decides the order in which each data set gives its rows.

        Raises:
          InputError: no stage, an unknown data set, one of another length, or data sets of different tokenizers.
        """
        if not stages:
            raise InputError("A mixture needs at least one stage of training, got none.")
        self.stages, self.datasets, self.seed = tuple(stages), dict(datasets), seed
        self.names = sorted(self.datasets)
        for number, stage in enumerate(self.stages, 1):
            for name in stage.weights:
                if name not in self.datasets:
                    raise InputError(
                        f"Stage {number} names the data set {name!r}, which is not there: "
                        f"there are {', '.join(map(repr, self.names)) or 'none'}."
                    )
            for name in stage.shares():
                if self.datasets[name].length != stage.length:
                    raise InputError(
                        f"Stage {number} has rows of {stage.length} tokens, the data set {name!r} has rows of "
                        f"{self.datasets[name].length}. Build it again with --length {stage.length}, or name another."
                    )
        tokenizers = {name: self.datasets[name].manifest.tokenizer for name in self._used(self.stages)}
        if len(set(tokenizers.values())) > 1:
            raise InputError(
                f"The data sets were built with different tokenizers: {tokenizers}. Build them with the model's."
            )
        self.tokenizer: str = next(iter(tokenizers.values()))
        self._ends = list(accumulate(stage.steps for stage in self.stages))
        self._patterns = [_Pattern(stage.shares(), self.names) for stage in self.stages]
        counts = [p.counts(s.steps * s.batch_size) for p, s in zip(self._patterns, self.stages, strict=True)]
        self._drawn = np.cumsum([np.zeros(len(self.names), np.int64), *counts], axis=0)
        self._orders = [_order(len(self.datasets[name]), f"{seed}/{name}") for name in self.names]

    def _used(self, stages: Sequence[MixtureStage]) -> list[str]:
        return sorted({name for stage in stages for name in stage.shares()})

    def __len__(self) -> int:
        """Steps in all stages."""
        return self._ends[-1]

    def stage(self, step: int) -> int:
        """The index of the stage that a step, counted from 0, belongs to."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a schedule of {len(self)}")
        return bisect_right(self._ends, step)

    def rows(self, step: int, process_index: int = 0, process_count: int = 1) -> np.ndarray:
        """Which rows make up a step.

        Args:
          step: counted from 0.
          process_index: of the process whose part is asked for.
          process_count: of all processes.

        Returns:
          int64 [batch_size / process_count, 2]: the index of the data set in `names`, and the row in it.

        Raises:
          InputError: the processes do not divide the batch.
        """
        index = self.stage(step)
        stage, pattern = self.stages[index], self._patterns[index]
        if stage.batch_size % process_count:
            raise InputError(
                f"Stage {index + 1} has {stage.batch_size} rows in a batch, which {process_count} processes do not "
                "divide. Choose a batch that is a multiple."
            )
        size = stage.batch_size // process_count
        first = (step - self._ends[index] + stage.steps) * stage.batch_size + process_index * size
        which, draws = pattern.draws(np.arange(first, first + size))
        draws += self._drawn[index][which]
        rows = [self._orders[d][draw] for d, draw in zip(which.tolist(), draws.tolist(), strict=True)]
        return np.stack([which, np.array(rows, np.int64)], axis=1)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The rows of a step, or the part of them that a process feeds.

        The parts of all processes, in order, are the global batch, whatever their number.

        Args:
          step: counted from 0.
          process_index: of this process.
          process_count: of all processes.

        Returns:
          NumPy arrays [batch_size / process_count, length].

        Raises:
          InputError: the processes do not divide the batch.
        """
        chosen = self.rows(step, process_index, process_count)
        shape = len(chosen), self.stages[self.stage(step)].length
        tokens, starts, num_tokens = np.empty(shape, np.int32), np.empty(shape, bool), np.empty(len(chosen), np.int64)
        for d in np.unique(chosen[:, 0]).tolist():
            mine = chosen[:, 0] == d
            tokens[mine], starts[mine], num_tokens[mine] = self.datasets[self.names[d]].read(chosen[mine, 1])
        return rows_to_batch(tokens, starts, num_tokens)

    def __getitem__(self, step: int) -> Batch:
        """The global batch of a step, counted from 0."""
        return self.batch(step)

    def loader(
        self, start: int = 0, process_index: int = 0, process_count: int = 1, *, threads: int = 2, ahead: int = 4
    ) -> "grain.IterDataset[Batch]":
        """Batches from a step to the end of the schedule, read ahead by threads.

        Args:
          start: the first step.
          process_index: of this process.
          process_count: of all processes.
          threads: that read; 0 reads only when asked.
          ahead: batches that wait in memory, 16 bytes a token.
        """
        self.rows(start, process_index, process_count)  # An error is better here than in a thread.
        steps = grain.MapDataset.range(start, len(self))
        batches = steps.map(lambda step: self.batch(step, process_index, process_count))
        return batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))

    def draws(self, step: int | None = None) -> dict[str, int]:
        """How many rows each data set has given before a step; by default, to the end of the schedule.

        Over `len(datasets[name])` it is the number of passes.
        """
        step = len(self) if step is None else step
        index = min(bisect_right(self._ends, step), len(self.stages) - 1)
        taken = (step - self._ends[index] + self.stages[index].steps) * self.stages[index].batch_size
        total = self._drawn[index] + self._patterns[index].counts(taken)
        return dict(zip(self.names, total.tolist(), strict=True))

    def batch_hash(self, step: int) -> str:
        """A sha256 (hex) of the global batch of a step: the same on every host and for any number of them."""
        digest = hashlib.sha256()
        for array in jax.tree.leaves(self.batch(step)):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def check_tokenizer(self, fingerprint: str) -> None:
        """Compares the tokenizer of the data with that of the model.

        Args:
          fingerprint: `Tokenizer.fingerprint()` of the model's.

        Raises:
          InputError: it is another.
        """
        if fingerprint != self.tokenizer:
            raise InputError(
                f"The data was built with the tokenizer {self.tokenizer[:12]}..., the model has {fingerprint[:12]}.... "
                "Build the data with the model's tokenizer."
            )

    def record(self) -> dict[str, Any]:
        """All that decides the batches, as JSON values, for a checkpoint to keep; see `check_resume`."""
        return {
            "seed": self.seed,
            "tokenizer": self.tokenizer,
            "order": _order_probe(),
            "stages": [
                {
                    "steps": stage.steps,
                    "batch_size": stage.batch_size,
                    "length": stage.length,
                    "shares": {name: str(share) for name, share in stage.shares().items()},
                }
                for stage in self.stages
            ],
            "datasets": {name: self.datasets[name].manifest.fingerprint for name in self._used(self.stages)},
        }

    def fingerprint(self, step: int | None = None) -> str:
        """A sha256 (hex) of all that decides the batches before a step; by default, of the whole schedule."""
        return digest(_past(self.record(), len(self) if step is None else step))

    def check_resume(self, saved: Mapping[str, Any], step: int) -> None:
        """Checks that the batches before a step are those that a run has seen. What comes after may be another.

        Args:
          saved: `record()` of the run.
          step: how many steps the run has taken.

        Raises:
          InputError: they are not; it says what differs.
        """
        was, now = _past(saved, step), _past(self.record(), step)
        different = [_difference(name, was.get(name), now[name]) for name in now if was.get(name) != now[name]]
        if different:
            raise InputError(
                f"The run has taken {step} steps with other data: {'; '.join(different)}. "
                "Resume with what it has seen (later stages may change), or begin a new run."
            )
        if step > len(self):
            raise InputError(f"The run has taken {step} steps, and the schedule has {len(self)}. Append stages to it.")


def _past(record: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The part of a record that decides the batches before a step."""
    stages, left = [], step
    for stage in record["stages"]:
        if left > 0:
            stages.append({**stage, "steps": min(stage["steps"], left)})
        left -= stage["steps"]
    used = {name for stage in stages for name in stage["shares"]}
    datasets = {name: value for name, value in record["datasets"].items() if name in used}
    return {**record, "stages": stages, "datasets": datasets}


def _difference(name: str, was: Any, now: Any) -> str:
    if name == "order":
        return "this version of Grain shuffles in another order; use the one that the run began with"
    if name == "datasets":
        changed = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
        return f"the content of {', '.join(map(repr, changed))} has changed"
    if name == "stages":
        for number, (a, b) in enumerate(zip(was, now, strict=False), 1):
            keys = [key for key in b if a.get(key) != b[key]]
            if keys:
                return f"stage {number}: {', '.join(f'{key} was {a.get(key)!r} and is now {b[key]!r}' for key in keys)}"
        return f"there were {len(was)} stages up to here and are now {len(now)}"
    return f"{name} was {was!r} and is now {now!r}"


class _Pattern:
    """The sequence of data sets in a stage, which repeats after a period."""

    def __init__(self, shares: Mapping[str, Fraction], names: Sequence[str]):
        period = math.lcm(*(share.denominator for share in shares.values()))
        self._each = np.zeros(len(names), np.int64)  # Rows of each data set in a period.
        for name, share in shares.items():
            self._each[names.index(name)] = share.numerator * (period // share.denominator)
        self._which = _lay_out(tuple(self._each.tolist()))
        self._rank = np.zeros(period, np.int64)  # How many of the same data set came before in the period.
        for d in np.flatnonzero(self._each):
            self._rank[self._which == d] = np.arange(self._each[d])

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions in the stage: which data set, and how many of its rows came before in the stage."""
        periods, places = np.divmod(positions, len(self._which))
        which = self._which[places]
        return which, periods * self._each[which] + self._rank[places]

    def counts(self, rows: int) -> np.ndarray:
        """How many rows of each data set are among the first ones."""
        periods, rest = divmod(rows, len(self._which))
        return periods * self._each + np.bincount(self._which[:rest], minlength=len(self._each))


@functools.lru_cache
def _lay_out(each: tuple[int, ...]) -> np.ndarray:
    """Orders one period so that after n rows each data set has had floor or ceil of n x its share.

    The k-th row of a data set of share w must come within positions [floor(k / w), ceil((k + 1) / w)). Of those whose
    window is open, the one whose window ends first is taken; that always succeeds, for it is the schedule of unit tasks
    on one processor (Baruah et al. 1996, "Proportionate progress", Algorithmica 15).

    Args:
      each: rows of each data set in the period.

    Returns:
      int64 [sum(each)]: the index of a data set.
    """
    period = sum(each)
    taken = [0] * len(each)
    order = np.empty(period, np.int64)
    for n in range(period):
        open_ = [d for d, count in enumerate(each) if taken[d] < count and taken[d] * period // count <= n]
        d = min(open_, key=lambda d: -(-(taken[d] + 1) * period // each[d]))
        order[n] = d
        taken[d] += 1
    return order


def _order(rows: int, name: str) -> Any:
    """An endless map from draw to row; each pass has every row once."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return grain.MapDataset.range(rows).shuffle(seed=seed).repeat()


def _order_probe() -> str:
    """Tells versions of Grain apart that would draw other orders."""
    order = _order(1000, "probe")
    return digest([order[i] for i in range(990, 1020)])
