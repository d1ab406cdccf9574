"""Synthetic tables of runs over learning rate and batch size, with a known law."""

import dataclasses

import numpy as np

from train.scaling.cells import Cell, group_cells
from train.scaling.hyperparameters import PairLaw

# Curvature of log loss in (log learning rate, log batch size): twice the best learning rate costs 0.3%, twice the batch
# size 0.17%, both together 0.18%.
CURVATURE = np.array([[0.0125, -0.006], [-0.006, 0.007]])

# Cells and grids like those of Li et al. 2025: learning rates a factor √2 apart, batch sizes from 2^16 to 2^21 tokens.
_SIZES = {
    214.7e6: (4e9, 11.4e9, 20e9, 50e9, 100e9),
    268.3e6: (5e9, 14.2e9, 28.4e9, 80e9),
    429.3e6: (8e9, 22.7e9, 40e9, 50e9),
    536.9e6: (10e9, 28.4e9, 50e9),
    1073.7e6: (56.9e9,),
}
STEP_LAW_CELLS = [(size, tokens) for size, some in _SIZES.items() for tokens in some]
RATES = 0.011 * 2 ** (-np.arange(12) / 2)
BATCHES = 2048.0 * np.array([32, 64, 96, 128, 192, 256, 352, 512, 736, 1024])


@dataclasses.dataclass
class Table:
    """Columns of runs."""

    params: np.ndarray
    tokens: np.ndarray
    learning_rate: np.ndarray
    batch_tokens: np.ndarray
    loss: np.ndarray

    def cells(self) -> list[Cell]:
        return group_cells(self.params, self.tokens, self.learning_rate, self.batch_tokens, self.loss)[0]


def sweep(
    generator: np.random.Generator,
    law: PairLaw,
    cells: list[tuple[float, float]],
    *,
    noise: float = 0.0,
    holes: float = 0.0,
    scatter: float = 0.0,
    spread: float = 0.0,
    wall: float = 0.0,
    rates: np.ndarray = RATES,
    batches: np.ndarray = BATCHES,
    off_centre: float | None = None,
    shift: float = 0.0,
) -> Table:
    """Runs on a grid in each cell.

    Args:
      generator: of all that is random.
      law: of the best learning rate and batch size.
      cells: model size and tokens of each.
      noise: standard deviation of log loss.
      holes: share of the grid that is missing.
      scatter: standard deviation of a cell's log optimum about the law.
      spread: standard deviation of log of a factor of each cell's curvature.
      wall: coefficient of the third power of log learning rate above the best.
      rates: learning rates of the grid.
      batches: batch sizes of the grid in tokens.
      off_centre: the grid of each cell is five points a side, a factor 1.6 apart, whose middle is this far from the
        optimum at most, in log units; None for the grid of `rates` and `batches`.
      shift: added to the middle's log learning rate.
    """
    rows = []
    for size, tokens in cells:
        best = law.point(size, tokens) + generator.normal(0, scatter, 2)
        curvature = CURVATURE * np.exp(generator.normal(0, spread))
        lowest = 1.8 + 290 / size**0.3478 + 1250 / tokens**0.3658
        if off_centre is not None:
            middle = best + generator.uniform(-off_centre, off_centre, 2) + [shift, 0.0]
            rates, batches = (np.exp(one + np.log(1.6) * np.arange(-2, 3)) for one in middle)
        # The largest size saw low learning rates only.
        some = rates[-6:] if size > 1e9 and off_centre is None else rates
        for rate in some:
            for batch in batches:
                step = np.log([rate, batch]) - best
                excess = step @ curvature @ step / 2 + wall * max(step[0], 0.0) ** 3
                if generator.random() >= holes and excess < 0.3:
                    rows.append((size, tokens, rate, batch, lowest * np.exp(excess + generator.normal(0, noise))))
    order = generator.permutation(len(rows))
    return Table(*np.array(rows)[order].T)
