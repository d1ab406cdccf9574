"""Log-probabilities of preference pairs under a reference model, computed once before training."""

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from qwen_jax.params import Params
from train.data.batch import place_part, row_part
from train.data.example_batches import PackedPairs, RowConfig
from train.dpo import Dpo, make_reference_pass
from train.step import StepConfig


def reference_log_probs(
    objective: Dpo, config: StepConfig, mesh: Mesh, params: Params, packed: PackedPairs, console: Console
) -> np.ndarray:
    """Log-probabilities of the answers of all pairs.

    Args:
      objective: of the training, with the model of the reference.
      config: of the step.
      mesh: of the parameters; the current mesh.
      params: of the reference, with stacked layers.
      packed: the pairs, in the rows of the training.
      console: for a progress bar.

    Returns:
      Float32 [pairs of the store, 2], of the chosen and the rejected answer; 0 for pairs that are not used. The same
      in every process.
    """
    run = make_reference_pass(objective, config, mesh)
    size = packed.config.batch_size
    rows = RowConfig(**{**vars(packed.config), "epochs": 1})
    once = PackedPairs(packed.store, rows, packed.selection.units)
    part, values = row_part(mesh, size), np.zeros((len(packed.store), 2), np.float32)
    layout = once.rows(0)
    lengths = dict(zip(once.selection.units.tolist(), once.selection.lengths.tolist(), strict=True))
    steps = track(range(len(once)), "Reference model", console=console, transient=True, disable=not console.is_terminal)
    for step in steps:
        found = run(params, place_part(once.batch(step, *part), size, mesh)).reference_BT
        whole = np.asarray(multihost_utils.process_allgather(found, tiled=True))
        for row, units in zip(whole, layout[step * size : (step + 1) * size], strict=False):
            # The last token of each segment has the sum.
            ends = np.cumsum([n for unit in units for n in lengths[unit]]) - 1
            values[units] = row[ends].reshape(-1, 2)
    return values
