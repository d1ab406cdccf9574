"""Rounding to nearest: every weight becomes the nearest value of its group's grid. It needs no calibration text."""

import functools

import jax

from convert.quantize.grid import Grid, Rounded, round_to


@functools.partial(jax.jit, static_argnames="grid")
def rtn(weight_OI: jax.Array, grid: Grid) -> Rounded:
    """Rounds a matrix to nearest.

    Args:
      weight_OI: float32; the group divides I.
      grid: the grid.
    """
    return round_to(weight_OI, grid)
