"""int8 weights: one scale an output for W8A8 products, or groups of inputs for weights alone."""

from typing import Literal

from convert.quantize.grid import Grid


def int8_grid(group: int, scales: str = "float32") -> tuple[Grid, Literal["none", "int8"]]:
    """The grid of int8 weights, and what activations are rounded to.

    Args:
      group: inputs that share a scale; 0 for one scale an output, with which products of int8 by int8 are exact.
      scales: dtype of the scales.

    Returns:
      A symmetric grid that spans the largest absolute weight; and "int8" for W8A8 (one scale an output), else "none".
    """
    return Grid("int8", group, symmetric=True, scales=scales), "none" if group else "int8"
