"""A sweep over size, tokens, learning rate, batch and MoE shape: its runs, in rounds, within a budget of FLOPs."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from qwen_jax.config import ModelConfig, MoE
from qwen_jax.errors import InputError
from train.config import RunConfig
from train.fields import at_least, call, set_fields
from train.observe.metrics import flops_per_token
from train.scaling.design import Point, next_points
from train.scaling.run_config import configure, rows_of_batch
from train.small_runs import check_small_run

# Steps that a run has at least: fewer say nothing about a learning rate.
_LEAST_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs of all combinations, or a sequential design that begins with them.

    Attributes:
      base: the run that all others are made of, with one stage and held-out data. Sizes, tokens, rates and batches are
        replaced; its schedule keeps its kind and its shares of warm-up and decay.
      sizes: models by a short name. With `moe`, the layers of each get the experts.
      tokens: of a run, D.
      learning_rates: peaks. For the sequential design, a geometric progression.
      batches: tokens of a step, whole rows. For the sequential design, a geometric progression of whole ratio.
      flops: model FLOPs that all runs together may have; see `train.observe.metrics.flops_per_token`.
      moe: shapes of experts by a short name; None is a dense model.
      cells: (size, tokens) of the runs; by default all combinations.
      seeds: of weights and data order; each run is made with all of them.
      design: "grid" is all combinations. "sequential" begins with them in each cell, a coarse grid, and adds runs near
        the predicted optimum or past the edge until the optimum is bracketed.
      most_runs: points in a cell of the sequential design, at most.
      start: points that a cell begins with instead of all combinations: (0, 0) is the first rate with the first batch,
        (1, 2) the second rate with the third, and (-1, 0) is one ratio below the first rate. Those that cannot be run
        in a cell, because of its tokens or of `most_steps`, are left out there.
      most_steps: of a run; smaller batches are not run where they need more.
      warmup: share of the steps; by default the base's.

    Raises:
      InputError: a value that cannot be used.
    """

    base: RunConfig
    sizes: Mapping[str, ModelConfig]
    tokens: tuple[int, ...]
    learning_rates: tuple[float, ...]
    batches: tuple[int, ...]
    flops: float
    moe: Mapping[str, MoE | None] = dataclasses.field(default_factory=lambda: {"": None})
    cells: tuple[tuple[str, int], ...] | None = None
    seeds: tuple[int, ...] = (0,)
    design: Literal["grid", "sequential"] = "grid"
    most_runs: int = 24
    start: tuple[Point, ...] = ()
    most_steps: int | None = None
    warmup: float | None = None

    def __post_init__(self) -> None:
        check_small_run(self.base)
        at_least(self, most_runs=1, most_steps=_LEAST_STEPS)
        for name in ("sizes", "tokens", "learning_rates", "batches", "moe", "seeds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} must have one value or more, each once; got {values}.")
        if not self.pairs() or len(set(self.pairs())) < len(self.pairs()):
            raise InputError(f"cells must have one (size, tokens) or more, each once; got {self.cells}.")
        for size, tokens in self.cells or ():
            if size not in self.sizes or tokens not in self.tokens:
                raise InputError(f"The cell ({size!r}, {tokens}) has no such size or number of tokens in the sweep.")
        if self.design not in ("grid", "sequential"):
            raise InputError(f"design must be grid or sequential, got {self.design!r}.")
        if not (self.flops > 0 and all(rate > 0 and math.isfinite(rate) for rate in self.learning_rates)):
            raise InputError(f"flops and learning_rates must be positive, got {self.flops} and {self.learning_rates}.")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise InputError(f"warmup is a share of the steps, from 0 to below 1; got {self.warmup}.")
        unit = self.base.stages[0].length * rows_of_batch(self.base)
        if wrong := [batch for batch in self.batches if batch < 1 or batch % unit]:
            raise InputError(
                f"batches must be multiples of {unit} tokens (the length of a row, times micro-batches and shards of "
                f"the mesh), got {wrong}."
            )
        if max(self.batches) * _LEAST_STEPS > min(tokens for _, tokens in self.pairs()):
            raise InputError(
                f"The largest batch, {max(self.batches)} tokens, gives the shortest run fewer than {_LEAST_STEPS} "
                "steps. Give smaller batches, or more tokens."
            )
        if self.design == "sequential" or self.start:
            for name in ("learning_rates", "batches"):
                _ratio(name, getattr(self, name))
        if len(set(self.start)) < len(self.start):
            raise InputError(f"start must have each point once, got {self.start}.")

    def pairs(self) -> list[tuple[str, int]]:
        """(size, tokens) of the cells, without MoE shapes."""
        return list(self.cells if self.cells is not None else itertools.product(self.sizes, self.tokens))


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one model and one number of tokens.

    Attributes:
      name: of the model.
      model: the architecture.
      tokens: of a run.
    """

    name: str
    model: ModelConfig
    tokens: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
      name: of the run, and of its folder.
      cell: what it belongs to.
      point: its place on the lattice of the sequential design.
      learning_rate: the peak.
      batch_tokens: tokens of a step.
      seed: of weights and data order.
      flops: model FLOPs.
      config: of the run.
    """

    name: str
    cell: Cell
    point: Point
    learning_rate: float
    batch_tokens: int
    seed: int
    flops: float
    config: RunConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a sweep as far as they are known.

    Attributes:
      runs: in order, those that have ended among them.
      complete: no run is to be added, whatever the results of those that wait.
      flops: of all of them.
      notes: what the budget has left out.
    """

    runs: tuple[Run, ...]
    complete: bool
    flops: float
    notes: tuple[str, ...] = ()


def load_sweep(path: str, changes: Sequence[str] = ()) -> Sweep:
    """Calls the function of a sweep's file and applies changes.

    Args:
      path: "FILE.py" or "FILE.py:function".
      changes: each "path.to.field=value", such as "flops=1e17" or "base.step.remat=none".

    Raises:
      InputError: no such file, function or field, or a value that cannot be used.
    """
    sweep = call(path)
    if not isinstance(sweep, Sweep):
        raise InputError(f"{path} must return a train.scaling.sweep.Sweep, got {type(sweep).__name__}.")
    return set_fields(sweep, *changes)


def make_plan(sweep: Sweep, folder: Path, results: Mapping[str, float]) -> Plan:
    """The runs of a sweep: a pure function of the sweep and of the results, so that a restart goes on as before.

    Rounds of the sequential design follow one another: what a round adds depends on all runs of those before it.

    Args:
      sweep: what to run.
      folder: of the sweep, which the folders of the runs are in.
      results: the loss of each run that has ended, by name; infinite if it diverged.

    Raises:
      InputError: the first round is over the budget, or has no run of a cell.
    """
    cells = list(_cells(sweep))
    runs = [run for cell in cells for point in _first(sweep, cell) for run in _runs(sweep, folder, cell, point)]
    if len({run.name for run in runs}) < len(runs):
        twice = next(name for name, count in Counter(run.name for run in runs).items() if count > 1)
        raise InputError(
            f"Two runs of the sweep have the name {twice}: two sizes or MoE shapes whose names join to one, or "
            "learning rates that agree in four digits. Give other names or rates."
        )
    spent = sum(run.flops for run in runs)
    if spent > sweep.flops:
        raise InputError(
            f"The {len(runs)} runs of the grid have {spent:.3g} FLOPs, more than the budget of {sweep.flops:.3g}. Give "
            "fewer or smaller ones, or a larger budget (flops)."
        )
    notes: list[str] = []
    while sweep.design == "sequential" and all(run.name in results for run in runs):
        added: list[Run] = []
        for cell in cells:
            losses = _losses(cell, runs, results)
            points = next_points(losses, lambda point, cell=cell: _allowed(sweep, cell, point))  # type: ignore[misc]
            for point in points[: max(sweep.most_runs - len(losses), 0)]:
                new = list(_runs(sweep, folder, cell, point))
                cost = sum(run.flops for run in new)
                if spent + cost <= sweep.flops:
                    added += new
                    spent += cost
                else:
                    notes.append(f"{new[0].name} is left out: it would exceed the budget")
        if not added:
            return Plan(tuple(runs), True, spent, tuple(notes))
        notes.clear()
        runs += added
    return Plan(tuple(runs), sweep.design == "grid", spent)


def bracketed(cell: Cell, runs: Sequence[Run], results: Mapping[str, float]) -> bool:
    """Whether the best run of a cell has runs with a higher loss on all sides.

    Args:
      cell: of the sweep.
      runs: of the sweep.
      results: as for `make_plan`.
    """
    losses = _losses(cell, [run for run in runs if run.name in results], results)
    finite = {point: loss for point, loss in losses.items() if math.isfinite(loss)}
    return bool(finite) and not next_points(losses, lambda point: True)


def _losses(cell: Cell, runs: Sequence[Run], results: Mapping[str, float]) -> dict[Point, float]:
    """The mean loss over the seeds at each point of a cell."""
    found: dict[Point, list[float]] = {}
    for run in runs:
        if run.cell == cell:
            found.setdefault(run.point, []).append(results[run.name])
    return {point: sum(losses) / len(losses) for point, losses in found.items()}


def _cells(sweep: Sweep) -> Iterator[Cell]:
    for (size, tokens), (shape, moe) in itertools.product(sweep.pairs(), sweep.moe.items()):
        name = f"{size}-{shape}" if shape else size
        yield Cell(name, dataclasses.replace(sweep.sizes[size], moe=moe), tokens)


def _first(sweep: Sweep, cell: Cell) -> list[Point]:
    """The points that a cell begins with."""
    if sweep.start:
        points = [point for point in sweep.start if _allowed(sweep, cell, point)]
    else:
        grid = itertools.product(range(len(sweep.learning_rates)), range(len(sweep.batches)))
        points = [(rate, batch) for rate, batch in grid if not _too_long(sweep, cell, sweep.batches[batch])]
    if not points:
        raise InputError(
            f"No point of the cell {cell.name}, {cell.tokens:,} tokens, can be run: batches have whole rows and leave "
            f"{_LEAST_STEPS} steps{f' to {sweep.most_steps:,}' if sweep.most_steps else ''}. Give other batches, or "
            "another start."
        )
    return points


def _runs(sweep: Sweep, folder: Path, cell: Cell, point: Point) -> Iterator[Run]:
    """The runs at a point, one for each seed. A name says which seed it has, so that other seeds may follow."""
    rate, batch = _at(sweep, point)
    for seed in sweep.seeds:
        name = f"{cell.name}-{cell.tokens}-lr{rate:.4g}-b{batch}" + (f"-s{seed}" if seed else "")
        config = configure(
            sweep.base,
            learning_rate=rate,
            batch_tokens=batch,
            tokens=cell.tokens,
            model=cell.model,
            warmup=sweep.warmup,
            seed=seed,
            output=str(folder.absolute() / "runs" / name),
        )
        stage = config.stages[0]
        flops = flops_per_token(config.model, stage.length) * stage.steps * batch
        yield Run(name, cell, point, rate, batch, seed, flops, config)


def _at(sweep: Sweep, point: Point) -> tuple[float, int]:
    """Learning rate and tokens of a batch at a point of the lattice."""
    rate, batch = point
    rates, batches = sweep.learning_rates, sweep.batches
    if rate == int(rate) and 0 <= rate < len(rates):
        learning_rate = rates[int(rate)]
    else:
        learning_rate = float(f"{rates[0] * _ratio('learning_rates', rates) ** rate:.4g}")
    if 0 <= batch < len(batches):
        return learning_rate, batches[batch]
    return learning_rate, round(batches[0] * _ratio("batches", batches) ** batch)


def _allowed(sweep: Sweep, cell: Cell, point: Point) -> bool:
    """Whether a point can be run: its batch is of whole rows and leaves enough steps, and not too many."""
    (rate, batch), unit = point, sweep.base.stages[0].length * rows_of_batch(sweep.base)
    # An axis with one value is not searched.
    if (len(sweep.learning_rates) == 1 and rate) or (len(sweep.batches) == 1 and batch):
        return False
    exact = sweep.batches[0] * _ratio("batches", sweep.batches) ** batch
    whole = exact >= unit and exact % unit == 0
    return whole and exact * _LEAST_STEPS <= cell.tokens and not _too_long(sweep, cell, exact)


def _too_long(sweep: Sweep, cell: Cell, batch: float) -> bool:
    return sweep.most_steps is not None and cell.tokens > batch * sweep.most_steps


def _ratio(name: str, values: Sequence[float]) -> float:
    """The ratio between neighbours of a geometric progression; 1 for a single value."""
    if len(values) == 1:
        return 1.0
    ratio = (values[-1] / values[0]) ** (1 / (len(values) - 1))
    if name == "batches":
        ratio = round(ratio)
    if not ratio > 1 or any(abs(b / a / ratio - 1) > 0.05 for a, b in itertools.pairwise(values)):
        kind = "a geometric progression" + (" with a whole ratio" if name == "batches" else "")
        raise InputError(f"{name} of a sequential design must be {kind}, in rising order; got {tuple(values)}.")
    return ratio
