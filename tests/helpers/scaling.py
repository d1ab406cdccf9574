"""Synthetic tables of runs of a known loss law."""

from typing import Any

import numpy as np

from train.scaling.loss import LossLaw
from train.scaling.runs import RunTable

# Near the published fit of 240 runs (Besiroglu et al. 2024).
CHINCHILLA = LossLaw(1.8172, 478.0, 2143.0, 0.3473, 0.3672)
BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21)


def table_of(**columns: Any) -> RunTable:
    """A table with these columns; flops are 6 N D."""
    values = {name: np.asarray(column, float) for name, column in columns.items()}
    values.setdefault("flops", 6 * values["params"] * values["tokens"])
    return RunTable(values, np.arange(1, len(values["loss"]) + 1), {"path": "synthetic", "sha256": "", "columns": {}})


def draw_runs(
    generator: np.random.Generator,
    law: LossLaw = CHINCHILLA,
    noise: float = 0.002,
    sizes: int = 9,
    off: float = 1.0,
    missing: float = 0.0,
    budgets: tuple[float, ...] = BUDGETS,
) -> RunTable:
    """Runs of several budgets.

    Args:
      generator: of the noise.
      law: true.
      noise: standard deviation of log loss.
      sizes: of each budget, from a sixth to six times its centre.
      off: centre of the sizes relative to the optimum.
      missing: share of runs that are left out.
      budgets: in FLOPs.
    """
    flops = np.repeat(budgets, sizes)
    centre = np.array([law.optimum(value)[0] for value in flops])
    params = centre * off * np.tile(np.geomspace(1 / 6, 6, sizes), len(budgets))
    tokens = flops / (6 * params)
    loss = law.loss(params, tokens) * np.exp(generator.normal(0, noise, len(params)))
    kept = generator.random(len(params)) >= missing
    return table_of(params=params[kept], tokens=tokens[kept], loss=loss[kept])
