"""The data mixture: which rows make up the batch of a step, a pure function of (seed, step, schedule)."""

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
from train.data.feed import Batches
from train.data.packing import rows_to_batch
from train.data.rows import PackedRows
from train.data.shards import digest

Weight = float | int | str | Fraction
_MAX_PERIOD = 2**20
# Up to four epochs, repeated data is nearly as good as new data; beyond, its value decays
# (Muennighoff et al. 2023, "Scaling data-constrained language models", arXiv:2305.16264).
MANY_EPOCHS = 4


@dataclasses.dataclass(frozen=True)
class MixtureStage:
    """Consecutive steps with the same data mixture.

    Attributes:
      steps: number of steps.
      batch_size: rows in the global batch of a step.
      length: tokens in a row; the data sets must have been built with it.
      weights: weight of each data set, by name. Its share of the rows is its weight over the sum of all weights. A
        weight is an exact number: an integer, a `Fraction`, "1/3", or a float, which is taken as the simplest fraction
        that rounds to it.
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
        """The exact share of each data set, by name, without data sets of weight 0.

        Raises:
          InputError: a weight is negative or not a number, all weights are 0, or their pattern is too long.
        """
        return exact_shares(self.weights)


def exact_shares(weights: Mapping[str, Weight]) -> dict[str, Fraction]:
    """The exact share of each data set, by name, without data sets of weight 0; see `MixtureStage.weights`.

    Raises:
      InputError: a weight is negative or not a number, all weights are 0, or their pattern is too long.
    """
    exact = {name: _exact(name, weight) for name, weight in sorted(weights.items())}
    total = sum(exact.values(), Fraction(0))
    if not total:
        raise InputError(f"The mixture weights {dict(weights)} add up to nothing. Give at least one a weight above 0.")
    shares = {name: weight / total for name, weight in exact.items() if weight}
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period > _MAX_PERIOD:
        raise InputError(
            f"The mixture weights {dict(weights)} repeat only after {period} rows, more than {_MAX_PERIOD}. "
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


class Mixture(Batches[Batch]):
    """The batches of a run, by step.

    Shares are exact rather than sampled: after any number of rows of a stage, the number of rows of each data set is
    its share of them to within one row. In each epoch of a data set every row comes once, in a new order. A data set
    that a later stage uses again continues where it was, so that later stages do not change earlier batches.

    Attributes:
      stages: the schedule.
      datasets: data sets, by name.
      seed: seed of the orders.
      names: names of the data sets, sorted; `rows` refers to them by index.
    """

    def __init__(self, stages: Sequence[MixtureStage], datasets: Mapping[str, PackedRows], seed: int):
        """Checks that schedule and data sets fit together.

        Args:
          stages: the schedule, in order.
          datasets: data sets by name. The weights of stages refer to these names; data sets without weight are unused.
          seed: decides the order of the rows of each data set.

        Raises:
          InputError: there is no stage, a data set is unknown or has another row length, or tokenizers differ.
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
        # Rows of each data set before each stage, and their orders.
        self._ends = list(accumulate(stage.steps for stage in self.stages))
        self._patterns = [Pattern(stage.shares(), self.names) for stage in self.stages]
        counts = [p.counts(s.steps * s.batch_size) for p, s in zip(self._patterns, self.stages, strict=True)]
        self._drawn = np.cumsum([np.zeros(len(self.names), np.int64), *counts], axis=0)
        self._orders = [_order(len(self.datasets[name]), f"{seed}/{name}") for name in self.names]

    def _used(self, stages: Sequence[MixtureStage]) -> list[str]:
        return sorted({name for stage in stages for name in stage.shares()})

    def __len__(self) -> int:
        """Number of steps in all stages."""
        return self._ends[-1]

    @property
    def end(self) -> int:
        """The number of steps in all stages."""
        return len(self)

    def stage(self, step: int) -> int:
        """The index of the stage of a step, both counted from 0."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a schedule of {len(self)}")
        return bisect_right(self._ends, step)

    def rows(self, step: int, process_index: int = 0, process_count: int = 1) -> np.ndarray:
        """Chooses the rows of a step.

        Args:
          step: counted from 0.
          process_index: index of the process that reads the rows.
          process_count: number of processes.

        Returns:
          int64 [batch_size / process_count, 2]: the index of the data set in `names`, and the row in it.

        Raises:
          InputError: the batch does not divide by the number of processes.
        """
        size, index = self.part_size(step, process_count), self.stage(step)
        stage, pattern = self.stages[index], self._patterns[index]
        first = (step - self._ends[index] + stage.steps) * stage.batch_size + process_index * size
        which, draws = pattern.draws(np.arange(first, first + size))
        draws += self._drawn[index][which]
        rows = [self._orders[d][draw] for d, draw in zip(which.tolist(), draws.tolist(), strict=True)]
        return np.stack([which, np.array(rows, np.int64)], axis=1)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """Reads the batch of a step, or the part of one process; see `Batches.batch`."""
        chosen = self.rows(step, process_index, process_count)
        shape = len(chosen), self.stages[self.stage(step)].length
        tokens, starts, num_tokens = np.empty(shape, np.int32), np.empty(shape, bool), np.empty(len(chosen), np.int64)
        for d in np.unique(chosen[:, 0]).tolist():
            mine = chosen[:, 0] == d
            tokens[mine], starts[mine], num_tokens[mine] = self.datasets[self.names[d]].read(chosen[mine, 1])
        return rows_to_batch(tokens, starts, num_tokens)

    def batch_size(self, step: int) -> int:
        """Rows in the global batch of a step."""
        return self.stages[self.stage(step)].batch_size

    def part_size(self, step: int, process_count: int) -> int:
        """Rows of a step that one of several processes reads; see `Batches.part_size`."""
        size, rest = divmod(self.batch_size(step), process_count)
        if rest:
            raise InputError(
                f"Stage {self.stage(step) + 1} has {self.batch_size(step)} rows in a batch, which does not divide by "
                f"{process_count} processes. Choose a multiple as batch_size."
            )
        return size

    def draws(self, step: int | None = None) -> dict[str, int]:
        """Number of rows that come from each data set before a step.

        Args:
          step: counted from 0; by default the end of the schedule.
        """
        step = len(self) if step is None else step
        index = min(bisect_right(self._ends, step), len(self.stages) - 1)
        taken = (step - self._ends[index] + self.stages[index].steps) * self.stages[index].batch_size
        total = self._drawn[index] + self._patterns[index].counts(taken)
        return dict(zip(self.names, total.tolist(), strict=True))

    def epochs(self) -> dict[str, float]:
        """How many times the schedule reads each of its data sets, by name."""
        return {name: rows / len(self.datasets[name]) for name, rows in self.draws().items() if rows}

    def describe_epochs(self) -> str:
        """A line on `epochs`, with a warning if a data set is read more than `MANY_EPOCHS` times."""
        epochs = self.epochs()
        shown = [f"{name} {count:.2g}" if count < 10 else f"{name} {count:,.0f}" for name, count in epochs.items()]
        line = f"epochs of each data set: {', '.join(shown)}"
        many = [name for name, count in epochs.items() if count > MANY_EPOCHS]
        if not many:
            return line
        return f"{line} (more than {MANY_EPOCHS} of {', '.join(many)}: more data or a smaller weight may be better)"

    def batch_hash(self, step: int) -> str:
        """A sha256 (hex) of the global batch of a step; the same on every host, for any number of hosts."""
        digest = hashlib.sha256()
        for array in jax.tree.leaves(self.batch(step)):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def check_tokenizer(self, fingerprint: str) -> None:
        """Checks that data and model have the same tokenizer.

        Args:
          fingerprint: `Tokenizer.fingerprint()` of the model's tokenizer.

        Raises:
          InputError: the tokenizers differ.
        """
        if fingerprint != self.tokenizer:
            raise InputError(
                f"The data was built with the tokenizer {self.tokenizer[:12]}..., the model has {fingerprint[:12]}.... "
                "Build the data with the model's tokenizer."
            )

    def record(self) -> dict[str, Any]:
        """Everything that decides the batches, to be saved in checkpoints; see `check_resume`."""
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
        """A sha256 (hex) of everything that decides the batches before a step; by default, all batches."""
        return digest(_past(self.record(), len(self) if step is None else step))

    def check_resume(self, saved: Mapping[str, Any], step: int) -> None:
        """Checks that a run has seen the same batches before a step. Later batches may differ.

        Args:
          saved: `record()` of the run.
          step: number of steps that the run has taken.

        Raises:
          InputError: the batches differ; the message says in what.
        """
        was, now = _past(saved, step), _past(self.record(), step)
        different = [_difference(name, was.get(name), now[name]) for name in now if was.get(name) != now[name]]
        if different:
            raise InputError(
                f"The run has taken {step} steps with other data: {'; '.join(different)}. "
                "Resume with the same data (later stages may change), or begin a new run."
            )
        if step > len(self):
            raise InputError(f"The run has taken {step} steps, and the schedule has {len(self)}. Append stages to it.")


def _past(record: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The part of a `Mixture.record()` that decides the batches before a step."""
    stages, left = [], step
    for stage in record["stages"]:
        if left > 0:
            stages.append({**stage, "steps": min(stage["steps"], left)})
        left -= stage["steps"]
    used = {name for stage in stages for name in stage["shares"]}
    datasets = {name: value for name, value in record["datasets"].items() if name in used}
    return {**record, "stages": stages, "datasets": datasets}


def _difference(name: str, was: Any, now: Any) -> str:
    """Says how the part `name` of two records differs."""
    if name == "order":
        return "this version of Grain shuffles in another order; use the version that the run began with"
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


class Pattern:
    """The sequence of data sets in a stage, which repeats with a period."""

    def __init__(self, shares: Mapping[str, Fraction], names: Sequence[str]):
        """
        Args:
          shares: of data sets, by name; they add up to 1.
          names: of all data sets, to which the results refer by index.
        """
        period = math.lcm(*(share.denominator for share in shares.values()))
        self._each = np.zeros(len(names), np.int64)  # Rows of each data set in a period.
        for name, share in shares.items():
            self._each[names.index(name)] = share.numerator * (period // share.denominator)
        self._which = _lay_out(tuple(self._each.tolist()))
        self._rank = np.zeros(period, np.int64)  # Rows of the same data set before this one in the period.
        for d in np.flatnonzero(self._each):
            self._rank[self._which == d] = np.arange(self._each[d])

    def draws(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions in the stage: the data set, and the number of its rows before the position in the stage."""
        periods, places = np.divmod(positions, len(self._which))
        which = self._which[places]
        return which, periods * self._each[which] + self._rank[places]

    def counts(self, rows: int) -> np.ndarray:
        """Number of rows of each data set among the first `rows` rows of the stage."""
        periods, rest = divmod(rows, len(self._which))
        return periods * self._each + np.bincount(self._which[:rest], minlength=len(self._each))


@functools.lru_cache
def _lay_out(each: tuple[int, ...]) -> np.ndarray:
    """Orders one period so that of n rows a data set of share w has floor(n w) or ceil(n w).

    Row k of a data set of share w must be at a position in [floor(k / w), ceil((k + 1) / w)). Of the data sets whose
    window has begun, the one whose window ends first comes next. This always succeeds: it is the pfair schedule of
    unit tasks on one processor (Baruah et al. 1996, "Proportionate progress", Algorithmica 15).

    Args:
      each: rows of each data set in the period.

    Returns:
      int64 [sum(each)], index of the data set at each position.
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


def _order(rows: int, name: str) -> "grain.MapDataset[int]":
    """An endless map from a draw to a row; every row comes once in each epoch."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return grain.MapDataset.range(rows).shuffle(seed=seed).repeat()


def _order_probe() -> str:
    """A value that differs between versions of Grain that shuffle differently."""
    order = _order(1000, "probe")
    return digest([order[i] for i in range(990, 1020)])
