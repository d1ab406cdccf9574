"""Synthetic tables of MoE runs whose law is known, and how often bootstrap intervals hold the truth.

python -m experiments.scaling.coverage --form bilinear --tables 200 --samples 200
"""

import argparse
import dataclasses
import time

import numpy as np

from train.scaling.moe import MoeForm, MoeLaw, MoeRuns, fit_moe
from train.scaling.moe_equivalent import dense_equivalent, equivalent_interval

SIZES, TOKENS = 2e7 * 2.0 ** np.arange(6), (2e9, 8e9, 32e9)
TRUE: dict[MoeForm, dict[str, float]] = {
    "leverage": {
        "e": 1.7, "a": 400, "alpha": 0.34, "b": 1000, "beta": 0.33, "k0": 0.4, "k1": 0.01, "k2": 0.08, "k3": -0.02,
        "C0": 5e18,
    },
    # The values of Abnar et al. 2025, table of fitted coefficients, as remembered.
    "sparsity": {
        "e": 0.94, "a": 16612.5, "alpha": 0.5962, "b": 5455.67, "beta": 0.3954, "c": 0.4598, "lambda": -0.1666,
        "d": 17.26, "delta": 0.1603, "gamma": 0.1595,
    },
    "granularity": {
        "c": 0.9, "g": 3.0, "gamma": 0.6, "a": 60.0, "alpha": 0.22, "b": 60.0, "beta": 0.2,
        "c_dense": 0.9, "a_dense": 60.0, "alpha_dense": 0.2, "b_dense": 60.0, "beta_dense": 0.2,
    },
    # Clark et al. 2022, table 3, S-Base.
    "bilinear": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104},
    "saturated": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.85, "E_max": 300.0},
}  # fmt: skip


def design(form: MoeForm) -> MoeRuns:
    """A grid of models that determines a form, without losses."""
    if form in ("bilinear", "saturated"):
        rows = [(n, n * (1 + 0.3 * (e - 1)), 1.3e11, 1, e, 1) for n in SIZES * 2 for e in 2.0 ** np.arange(10)]
    else:
        ratios = (1, 16) if form == "granularity" else (1, 2, 4, 8, 16)
        rows = [
            (n, n * r, d, 1, 1 if r == 1 else 4 * r, g)
            for n in SIZES
            for r in ratios
            for d in TOKENS
            for g in ((1,) if r == 1 else (1, 4, 8))
        ]
    return MoeRuns(*np.array(rows, np.float64).T)


def measured(form: MoeForm, generator: np.random.Generator, noise: float) -> tuple[MoeRuns, MoeLaw]:
    """A table of runs, and the law that made it."""
    runs = design(form)
    ranges = {name: (0.0, np.inf) for name in ("active", "total", "ratio", "tokens", "experts", "granularity")}
    law = MoeLaw(form, TRUE[form], [], 0.0, ranges, [])
    loss = law.loss(runs) * np.exp(noise * generator.normal(size=len(runs)))
    return dataclasses.replace(runs, loss=loss), law


@dataclasses.dataclass(frozen=True)
class Held:
    """How many intervals held the truth.

    Attributes:
      what: the quantity: a parameter, or the dense equivalent at a random run.
      level: of the intervals.
      held: intervals that did.
      tables: how many there are.
    """

    what: str
    level: float
    held: int
    tables: int

    def to_text(self) -> str:
        """A row of Markdown: the share with its standard error."""
        share = self.held / self.tables
        error = (share * (1 - share) / self.tables) ** 0.5
        return f"| {self.what} | {self.level:.0%} | {share:.1%} ± {error:.1%} | {self.tables} |"


def coverage(
    form: MoeForm, tables: int, samples: int, noise: float, seed: int = 0, levels: tuple[float, ...] = (0.9, 0.95)
) -> list[Held]:
    """Fits fresh tables, and counts the intervals that hold the truth.

    Args:
      form: of the law that makes the tables and that is fitted.
      tables: how many.
      samples: of the bootstrap.
      noise: standard deviation of the log loss of a run.
      seed: of the tables.
      levels: of the intervals.
    """
    generator = np.random.default_rng(seed)
    inside: dict[tuple[str, float], list[bool]] = {}
    for _ in range(tables):
        runs, true = measured(form, generator, noise)
        law = fit_moe(runs, form, samples=samples, seed=int(generator.integers(2**31)))
        place = int(generator.choice(np.flatnonzero(~runs.dense)))
        given = {"experts": runs.experts[place]} if form == "bilinear" else {"total": runs.total[place]}
        at = (runs.active[place], runs.tokens[place])
        fine = float(runs.granularity[place])
        one, truth = (dense_equivalent(each, *at, **given, granularity=fine) for each in (law, true))
        for level in levels:
            low, high = equivalent_interval(law, one, fine, level)
            inside.setdefault(("dense equivalent", level), []).append(low <= truth.dense <= high)
            for name, (low, high) in law.intervals(level).items():
                # Parameters whose meaning does not depend on the unit C0.
                if name != "k0":
                    inside.setdefault((name, level), []).append(low <= true.parameters[name] <= high)
    return [Held(what, level, sum(found), len(found)) for (what, level), found in sorted(inside.items())]


def main() -> None:
    """Prints a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--form", choices=("bilinear", "sparsity", "leverage"), default="bilinear")
    parser.add_argument("--tables", type=int, default=200)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--noise", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.perf_counter()
    print("| quantity | level | intervals that hold the truth | tables |\n|---|---|---|---|")
    for one in coverage(options.form, options.tables, options.samples, options.noise, options.seed):
        print(one.to_text())
    print(f"{options.form}, {options.samples} draws, noise {options.noise:g}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
