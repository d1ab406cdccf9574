"""Sampling plans: how many tokens of each domain and quality bucket a run sees, within caps on repetition."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import read_json, to_json
from train.curate.mixture_table import UNSCORED, Cell, CellTable
from train.data.mixture import MANY_EPOCHS
from train.files import write_file

# Weights of data sets are integers of this sum: a pattern of so many rows, which the trainer lays out in a second.
_RESOLUTION = 1 << 16


@dataclasses.dataclass(frozen=True)
class PlannedCell:
    """What a plan takes of a cell.

    Attributes:
      cell: what there is.
      weight: how often a token of it is to be seen, relative to the other buckets of its domain.
      cap: tokens that may be taken at most.
      tokens: that are taken, including repetitions.
    """

    cell: Cell
    weight: float
    cap: int
    tokens: int

    @property
    def epochs(self) -> float:
        """How often the cell is read; below 1 it is down-sampled."""
        return self.tokens / self.cell.tokens if self.cell.tokens else 0.0

    @property
    def is_capped(self) -> bool:
        """Whether more of it would be taken but for the cap on repetition."""
        return 0 < self.cap == self.tokens


@dataclasses.dataclass(frozen=True)
class PlannedDomain:
    """What a plan takes of a domain.

    Attributes:
      name: of the domain.
      asked: share of the budget that was asked for.
      share: of the planned tokens that it gets.
      available: tokens that it has.
      tokens: that are taken.
      cap: tokens that may be taken at most.
    """

    name: str
    asked: float
    share: float
    available: int
    tokens: int
    cap: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sampling plan. Its tokens and what is missing add up to the budget.

    Attributes:
      budget: tokens of the run.
      asked: share of each domain that was asked for; they add up to 1.
      max_epochs: cap on repetition of each domain.
      cells: what is taken of each cell.
      thresholds: of the buckets of each domain; see `CellTable`.
      quality: name of the column of scores; None without scores.
    """

    budget: int
    asked: Mapping[str, float]
    max_epochs: Mapping[str, float]
    cells: tuple[PlannedCell, ...]
    thresholds: Mapping[str, tuple[float, ...]]
    quality: str | None

    @property
    def tokens(self) -> int:
        """Tokens of all cells."""
        return sum(one.tokens for one in self.cells)

    @property
    def missing(self) -> int:
        """Tokens of the budget that no cell can give."""
        return self.budget - self.tokens

    @property
    def domains(self) -> list[PlannedDomain]:
        """What is taken of each domain, by name."""
        found, total = [], max(self.tokens, 1)
        for name, asked in self.asked.items():
            mine = [one for one in self.cells if one.cell.domain == name]
            taken = sum(one.tokens for one in mine)
            available, cap = sum(one.cell.tokens for one in mine), sum(one.cap for one in mine)
            found.append(PlannedDomain(name, asked, taken / total, available, taken, cap))
        return found

    def mixture(self) -> dict[str, int]:
        """The weight of each cell's data set, for `train.config.Stage.mixture`; cells that give nothing are left out.

        Weights are integers. The share of a data set is that of the plan to within 1 / 65,536.
        """
        taken = [one for one in self.cells if one.tokens]
        if not taken:
            return {}
        weights = water_fill(_RESOLUTION, [Fraction(one.tokens) for one in taken], [_RESOLUTION] * len(taken))
        common = math.gcd(*weights)
        return {one.cell.name: weight // common for one, weight in zip(taken, weights, strict=True) if weight}

    def steps(self, batch_size: int, length: int) -> int:
        """Steps of training that see the planned tokens, at least 1.

        Args:
          batch_size: rows in the global batch.
          length: tokens in a row.
        """
        return max(1, round(self.tokens / (batch_size * length)))

    def notes(self) -> list[str]:
        """What the plan could not do as it was asked, a sentence each."""
        found: list[str] = []
        rest = "" if self.missing else " Other domains get the rest."
        for one in self.domains:
            cap = f"{self.max_epochs[one.name]:g} epochs"
            if one.asked and not one.cap:
                found.append(
                    f"{one.name}: asked for {one.asked:.2%}, gets nothing: no bucket with a weight has tokens."
                )
            elif one.tokens == one.cap and one.tokens < round(one.asked * self.budget):
                found.append(
                    f"{one.name}: asked for {one.asked:.2%}, gets {one.tokens / self.budget:.2%} of the budget: "
                    f"{one.tokens:,} tokens are {cap} of all that has a weight.{rest}"
                )
        unscored = sum(one.cell.tokens for one in self.cells if one.cell.bucket == UNSCORED and not one.tokens)
        if unscored:
            found.append(f"{unscored:,} tokens of documents without a score are left out.")
        mixture = self.mixture()
        lost = [one.cell.name for one in self.cells if one.tokens and one.cell.name not in mixture]
        if lost:
            found.append(f"Too small for a weight in the mixture: {', '.join(lost)}.")
        if self.missing:
            found.append(
                f"The plan has {self.tokens:,} tokens, {self.missing:,} less than the budget of {self.budget:,}: "
                "everything is repeated as often as it may be. Add data, or allow more epochs."
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """As a JSON object for `from_json`, with derived values for readers of the file."""
        cells = [
            {**dataclasses.asdict(one), "name": one.cell.name, "epochs": one.epochs, "capped": one.is_capped}
            for one in self.cells
        ]
        return {
            "budget": self.budget,
            "tokens": self.tokens,
            "missing": self.missing,
            "quality": self.quality,
            "thresholds": {name: list(found) for name, found in self.thresholds.items()},
            "max_epochs": dict(self.max_epochs),
            "asked": dict(self.asked),
            "domains": [dataclasses.asdict(one) for one in self.domains],
            "cells": cells,
            "mixture": self.mixture(),
            "notes": self.notes(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """A plan from the object of `to_json`."""
        cells = tuple(
            PlannedCell(Cell(**one["cell"]), one["weight"], one["cap"], one["tokens"]) for one in value["cells"]
        )
        thresholds = {name: tuple(found) for name, found in value["thresholds"].items()}
        return cls(value["budget"], value["asked"], value["max_epochs"], cells, thresholds, value["quality"])


def make_plan(
    table: CellTable,
    budget: int,
    shares: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    weights: Sequence[float] = (),
    unscored: float = 0.0,
    max_epochs: float | Mapping[str, float] = MANY_EPOCHS,
) -> Plan:
    """Distributes a budget of tokens over cells.

    A domain gets its share of the budget, unless it has too little for it: then it gives all that it has, as often as
    it may be repeated, and the other domains share the rest in their proportions. A domain's tokens are distributed
    over its buckets in the same way, in proportion to weight times tokens: a bucket of weight 2 is repeated twice as
    often as one of weight 1, until it is capped. Numbers are exact integers.

    Args:
      table: what there is.
      budget: tokens of the run.
      shares: of each domain, which add up to 1; by default from `temperature`.
      temperature: shares are proportional to tokens ** (1 / temperature), of the cells with a weight: 1 is
        proportional, infinity gives all domains the same (Devlin 2018, multilingual BERT; Xue et al. 2021, mT5).
      weights: of quality buckets, the lowest quality first; by default all are 1. Weight 0 leaves a bucket out.
      unscored: weight of documents without a score.
      max_epochs: how often a token may be seen, or for each domain; by default 4 (Muennighoff et al. 2023,
        arXiv:2305.16264).

    Raises:
      InputError: a number out of range, shares of other domains or that do not add up to 1, other numbers of weights.
    """
    if budget < 1:
        raise InputError(f"The budget must be at least 1 token, got {budget}.")
    weights = list(weights) or [1.0] * table.buckets
    if len(weights) != table.buckets:
        raise InputError(f"Expected {table.buckets} weights, one for each quality bucket, got {list(weights)}.")
    if any(not (weight >= 0 and math.isfinite(weight)) for weight in (*weights, unscored)) or not any(weights):
        raise InputError(f"Weights must be numbers of at least 0, and one above 0; got {[*weights, unscored]}.")
    caps = {name: max_epochs for name in table.domains} if not isinstance(max_epochs, Mapping) else dict(max_epochs)
    _check_names("max_epochs", caps, table.domains)
    if bad := [f"{name}={cap}" for name, cap in caps.items() if not (cap > 0 and math.isfinite(cap))]:
        raise InputError(f"max_epochs must be above 0, got {bad[0]}.")
    weight_of = {cell: unscored if cell.bucket == UNSCORED else weights[cell.bucket] for cell in table.cells}
    cap_of = {c: math.floor(Fraction(caps[c.domain]) * c.tokens) if weight_of[c] > 0 else 0 for c in table.cells}
    usable = {name: sum(c.tokens for c in table.cells if c.domain == name and cap_of[c]) for name in table.domains}
    asked = _temperature_shares(usable, temperature) if shares is None else _checked_shares(shares, table.domains)
    # Domains, then the cells of each.
    names = list(asked)
    totals = water_fill(
        budget,
        [Fraction(asked[name]) for name in names],
        [sum(cap_of[cell] for cell in table.cells if cell.domain == name) for name in names],
    )
    planned = []
    for name, total in zip(names, totals, strict=True):
        mine = [cell for cell in table.cells if cell.domain == name]
        taken = water_fill(total, [Fraction(weight_of[c]) * c.tokens for c in mine], [cap_of[c] for c in mine])
        planned += [PlannedCell(c, weight_of[c], cap_of[c], t) for c, t in zip(mine, taken, strict=True)]
    return Plan(budget, asked, caps, tuple(planned), table.thresholds, table.quality)


def water_fill(total: int, weights: Sequence[Fraction], caps: Sequence[int]) -> list[int]:
    """Distributes a total in proportion to weights, within caps; what a capped one leaves goes to the others.

    Args:
      total: to distribute.
      weights: of each, at least 0; one of weight 0 gets nothing.
      caps: of each.

    Returns:
      Integers within 1 of the exact solution. They add up to the total, or to all caps where these are less.
    """
    exact = [Fraction(0)] * len(weights)
    rest, open_ = Fraction(total), [i for i, weight in enumerate(weights) if weight > 0 and caps[i] > 0]
    while open_:
        level = rest / sum(weights[i] for i in open_)
        full = [i for i in open_ if level * weights[i] >= caps[i]]
        for i in full or open_:
            exact[i] = Fraction(caps[i]) if full else level * weights[i]
        if not full:
            break
        rest -= sum(caps[i] for i in full)
        open_ = [i for i in open_ if i not in full]
    # Largest remainders get one more; a fraction is below its cap, which is an integer.
    result = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (result[i] - exact[i], i))
    for i in order[: int(sum(exact)) - sum(result)]:
        result[i] += 1
    return result


def write_plan(plan: Plan, path: Path) -> None:
    """Writes a plan as JSON.

    Raises:
      InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (to_json(plan.to_json(), indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Give another file.") from None


def read_plan(path: Path) -> Plan:
    """Reads what `write_plan` wrote.

    Raises:
      InputError: no such file, or it has no plan.
    """
    value = read_json(path)
    try:
        return Plan.from_json(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a plan of `qwen-jax data mixture plan`: {type(error).__name__} {error}."
        ) from None


def read_mixture(path: Path, data: str) -> tuple[dict[str, str], dict[str, int]]:
    """What a run needs of a plan: the folder of each cell's data set, and their weights.

    Args:
      path: of plan.json.
      data: folder that has a folder of `qwen-jax data build` for each cell, under the cell's name.

    Returns:
      `RunConfig.data` and `Stage.mixture`.

    Raises:
      InputError: no such plan.
    """
    mixture = read_plan(path).mixture()
    return {name: str(Path(data) / name) for name in mixture}, mixture


def plan_text(plan: Plan) -> str:
    """A table of the plan for people, with what it could not do."""
    head = ("domain", "asked", "gets", "epochs", "tokens", "of")
    rows = [head]
    for one in plan.domains:
        epochs = one.tokens / one.available if one.available else 0.0
        mark = " capped" if 0 < one.tokens == one.cap else ""
        asked, share = f"{one.asked:.2%}", f"{one.share:.2%}"
        rows.append((one.name, asked, share, f"{epochs:.3g}{mark}", f"{one.tokens:,}", f"{one.available:,}"))
        mine = [cell for cell in plan.cells if cell.cell.domain == one.name]
        for cell in mine if plan.quality is not None else ():
            mark = " capped" if cell.is_capped else ""
            share = f"{cell.tokens / max(plan.tokens, 1):.2%}"
            tokens = f"{cell.tokens:,}", f"{cell.cell.tokens:,}"
            rows.append((f"  {cell.cell.name}", f"x{cell.weight:g}", share, f"{cell.epochs:.3g}{mark}", *tokens))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            part.ljust(w) if i == 0 else part.rjust(w) for i, (part, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.append(f"{plan.tokens:,} tokens of a budget of {plan.budget:,}, {plan.missing:,} missing")
    return "\n".join([*lines, *plan.notes()])


def _temperature_shares(tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    if not temperature > 0:
        raise InputError(f"temperature must be above 0, got {temperature}.")
    most = max(tokens.values())
    if not most:
        raise InputError("No cell with a weight has tokens. Give weights to buckets that have some.")
    # Relative to the largest one, so that no power overflows.
    powers = {name: (count / most) ** (1 / temperature) if count else 0.0 for name, count in tokens.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def _checked_shares(shares: Mapping[str, float], domains: Sequence[str]) -> dict[str, float]:
    _check_names("shares", shares, domains)
    if bad := [f"{name}={share}" for name, share in shares.items() if not (share >= 0 and math.isfinite(share))]:
        raise InputError(f"Shares must be numbers of at least 0, got {bad[0]}.")
    total = math.fsum(shares.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"Shares must add up to 1, got {json.dumps(dict(shares))}, which add up to {total:g}.")
    return {name: shares[name] / total for name in sorted(shares)}


def _check_names(what: str, given: Mapping[str, float], domains: Sequence[str]) -> None:
    if unknown := sorted(set(given) - set(domains)):
        raise InputError(f"{what}: there is no domain {unknown[0]!r}. There are: {', '.join(domains)}.")
    if missing := sorted(set(domains) - set(given)):
        raise InputError(
            f"{what}: {missing[0]!r} is missing. Give a number for each domain; a share of 0 leaves it out."
        )
