"""float8_e4m3fn weights with one scale an output: the largest absolute weight becomes 448, the largest code."""

from convert.quantize.grid import Grid


def fp8_grid(scales: str = "float32") -> Grid:
    """The grid of float8 weights.

    Args:
      scales: dtype of the scales.
    """
    return Grid("float8_e4m3fn", group=0, symmetric=True, scales=scales)
