"""AWQ: large inputs get finer steps, by scales that the previous layer takes back; and a search of clipping.

Source: Lin et al. 2023 (arXiv:2306.00978). The inputs of a matrix W are divided by s = a^alpha, a the mean absolute
value of each input, and the weights multiplied by s, which changes nothing before rounding. alpha is searched; 0 is
rounding to nearest. Then the range of each group is shrunk by the factor that gives the least error.

Errors are those of the outputs on the calibration inputs, d H d^T for a change d of a row of weights with the Hessian
H = 2 X X^T: no activations need to be kept.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from convert.quantize.grid import Grid, Rounded, round_to, squared_error

STEPS = 20  # Of the search of alpha.
CLIPS = 10  # Of the search of clipping, from the whole range to half of it.


def search_scales(
    weights: Sequence[jax.Array], hessians: Sequence[jax.Array], activity_I: jax.Array, grid: Grid
) -> tuple[jax.Array, float]:
    """Finds the scales of the inputs that several matrices share.

    Args:
      weights: float32 [O, I] each.
      hessians: float32 [I, I], of the rows that each matrix sees.
      activity_I: mean absolute value of each input. Inputs with equal activity get equal scales.
      grid: the grid.

    Returns:
      float32 [I], positive, with which weights are to be multiplied and inputs divided; and alpha.
    """
    losses = functools.reduce(
        jnp.add, [_losses(weight, hessian, activity_I, grid) for weight, hessian in zip(weights, hessians, strict=True)]
    )
    # The first of equal losses: with the smallest alpha.
    best = int(jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf)))
    alpha = best / STEPS
    return _scales(activity_I, alpha), alpha


@functools.partial(jax.jit, static_argnames="grid")
def _losses(weight_OI: jax.Array, hessian_II: jax.Array, activity_I: jax.Array, grid: Grid) -> jax.Array:
    """The squared error of all outputs for each alpha."""

    def loss(alpha: jax.Array) -> jax.Array:
        scales = _scales(activity_I, alpha)
        values = round_to(weight_OI * scales, grid).values_OI / scales
        return squared_error(weight_OI, values, hessian_II).sum()

    return lax.map(loss, jnp.arange(STEPS) / STEPS)


@jax.jit
def _scales(activity_I: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """a^alpha, scaled so that the smallest times the largest is 1."""
    scales = jnp.maximum(activity_I, 1e-4) ** alpha
    return scales / jnp.sqrt(scales.max() * scales.min())


@functools.partial(jax.jit, static_argnames=("grid", "clip"))
def awq(weight_OI: jax.Array, hessian_II: jax.Array, grid: Grid, clip: bool = True) -> Rounded:
    """Rounds a matrix whose inputs are scaled already.

    Args:
      weight_OI: float32; the group divides I.
      hessian_II: float32, of the scaled inputs.
      grid: the grid.
      clip: search the range of each group for which the error of the group alone is least. An output keeps its clipped
        groups only if their error together is not larger than without clipping.
    """
    plain = round_to(weight_OI, grid)
    if not clip:
        return plain
    outputs, inputs = weight_OI.shape
    group = grid.group_of(inputs)
    groups = jnp.arange(inputs // group)
    # Blocks of the Hessian on its diagonal, [G, g, g].
    within = hessian_II.reshape(len(groups), group, len(groups), group)[groups, :, groups]
    shrinks = 1 - jnp.arange(CLIPS) / (2 * CLIPS)

    def error(shrink: jax.Array) -> jax.Array:
        change = (round_to(weight_OI, grid, shrink).values_OI - weight_OI).reshape(outputs, -1, group)
        return jnp.einsum("ogi,gij,ogj->og", change, within, change, precision="highest")

    shrink_OG = shrinks[lax.map(error, shrinks).argmin(0)]
    clipped = round_to(weight_OI, grid, shrink_OG)
    before, after = (squared_error(weight_OI, rounded.values_OI, hessian_II) for rounded in (plain, clipped))
    return round_to(weight_OI, grid, jnp.where((after <= before)[:, None], shrink_OG, 1.0))
