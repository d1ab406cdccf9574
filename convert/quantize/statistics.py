"""Sums over the calibration rows that a matrix sees: the Hessian of its error, and how large each input is."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_FEWEST = 256  # Rows that are multiplied together, at least.


class Statistics(NamedTuple):
    """Sums over rows x of I inputs, float32.

    Attributes:
      squares_II: sum of x x^T.
      absolute_I: sum of |x|.
      rows: how many there were.
    """

    squares_II: jax.Array
    absolute_I: jax.Array
    rows: int

    @classmethod
    def empty(cls, inputs: int) -> "Statistics":
        """Of no rows."""
        return cls(jnp.zeros((inputs, inputs)), jnp.zeros(inputs), 0)

    def plus(self, x_NI: jax.Array, rows: int | None = None) -> "Statistics":
        """With more rows; this object's arrays are used up.

        Args:
          x_NI: float32.
          rows: how many of them count; the others are zero. By default all.
        """
        squares_II, absolute_I = _plus(self.squares_II, self.absolute_I, x_NI)
        return Statistics(squares_II, absolute_I, self.rows + (rows or len(x_NI)))

    @property
    def hessian_II(self) -> jax.Array:
        """2 X X^T over the number of rows: the second derivative of an output's mean squared error."""
        return self.squares_II * (2 / max(self.rows, 1))

    @property
    def activity_I(self) -> jax.Array:
        """Mean absolute value of each input."""
        return self.absolute_I / max(self.rows, 1)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _plus(squares_II: jax.Array, absolute_I: jax.Array, x_NI: jax.Array) -> tuple[jax.Array, jax.Array]:
    return squares_II + jnp.matmul(x_NI.T, x_NI, precision="highest"), absolute_I + jnp.abs(x_NI).sum(0)


def chosen_rows(chosen_N: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers of the rows that are chosen, filled up with row 0 to a power of two: few sizes are compiled.

    Args:
      chosen_N: bool.

    Returns:
      int32 numbers, and how many of them count.
    """
    rows = np.flatnonzero(chosen_N).astype(np.int32)
    size = max(1 << max(len(rows) - 1, 0).bit_length(), _FEWEST)
    return np.pad(rows, (0, size - len(rows))), len(rows)
