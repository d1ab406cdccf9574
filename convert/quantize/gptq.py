"""GPTQ: rounds one input after the other, and lets the inputs that follow make up for the error of each.

Source: Frantar et al. 2022 (arXiv:2210.17323), algorithm 1. For the outputs' squared error on calibration inputs X the
Hessian of each row of weights is H = 2 X X^T. With H^-1 = U^T U, U upper triangular, the best change of the inputs
after j, once input j is rounded with the error e, is -e / U[j, j] * U[j, j+1:].

U is the inverse of R in H = R R^T, R upper triangular, which is a Cholesky factor of H with its rows and columns
reversed. So H itself is never inverted, and float32 is enough.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from convert.quantize.grid import Grid, Rounded, as_rounded, decode, encode, fit

BLOCK = 128  # Inputs whose errors are applied to all later inputs together.
_STRONGER = 10.0  # Factor of the damping after a factorisation that failed.
_DAMPINGS = 4  # How often it is tried.


def gptq(
    weight_OI: jax.Array, hessian_II: jax.Array, grid: Grid, *, damping: float = 0.01, act_order: bool = False
) -> tuple[Rounded, float]:
    """Rounds a matrix by GPTQ.

    Args:
      weight_OI: float32; the group divides I.
      hessian_II: float32, symmetric, of the calibration inputs, times any positive number.
      grid: the grid; groups are fitted when their first input is reached.
      damping: added to the diagonal, in units of its mean. If the factorisation fails in float32, it is repeated with
        ten times as much.
      act_order: inputs are rounded in the descending order of the Hessian's diagonal, and groups are consecutive in
        that order (desc_act). Within a group the result has the inputs in their own order.

    Returns:
      The rounded matrix, and the damping that was used.

    Raises:
      FloatingPointError: the Hessian is not finite, or not positive at all.
    """
    order = jnp.argsort(-jnp.diagonal(hessian_II), stable=True) if act_order else None
    if order is not None:
        weight_OI, hessian_II = weight_OI[:, order], hessian_II[order][:, order]
    for _ in range(_DAMPINGS):
        upper = _upper(hessian_II, damping)
        if bool(jnp.isfinite(upper).all()):
            break
        damping *= _STRONGER
    else:
        raise FloatingPointError("The Hessian of the calibration inputs cannot be factorised.")
    rounded = _round_in_turn(weight_OI, upper, grid)
    return (rounded if order is None else _ordered(rounded, order, grid)), damping


@jax.jit
def _upper(hessian_II: jax.Array, damping: jax.Array | float) -> jax.Array:
    """U of the module's docstring; not finite if the damped Hessian is not positive definite in float32."""
    mean = jnp.diagonal(hessian_II).mean()
    # Inputs that were always zero: any positive diagonal makes them independent of the others.
    damp = jnp.where(mean > 0, damping * mean, 1.0)
    damped = hessian_II + damp * jnp.eye(len(hessian_II), dtype=hessian_II.dtype)
    factor = lax.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return lax.linalg.triangular_solve(factor, jnp.eye(len(factor), dtype=factor.dtype), left_side=True, lower=False)


@functools.partial(jax.jit, static_argnames="grid")
def _round_in_turn(weight_OI: jax.Array, upper_II: jax.Array, grid: Grid) -> Rounded:
    """Algorithm 1 of the paper: blocks of inputs, and one input after the other in a block."""
    outputs, inputs = weight_OI.shape
    group = grid.group_of(inputs)
    whole, block = group == inputs, _block(group, inputs)
    # Zero weights that no other weight depends on fill the last block: they are rounded without an error.
    padding = -inputs % block
    weight = jnp.pad(weight_OI, ((0, 0), (0, padding)))
    upper = jnp.pad(upper_II, ((0, padding), (0, padding)))
    upper += jnp.diag(jnp.pad(jnp.zeros(inputs), (0, padding), constant_values=1.0))
    columns = jnp.arange(inputs + padding)
    fitted = fit(weight_OI, grid) if whole else (jnp.ones(outputs), jnp.zeros(outputs))

    def one_block(carry: tuple, start: jax.Array) -> tuple[tuple, tuple]:
        weight, scale_and_zero = carry
        rows = lax.dynamic_slice_in_dim(upper, start, block, 0)
        factor = lax.dynamic_slice_in_dim(rows, start, block, 1)
        part = lax.dynamic_slice_in_dim(weight, start, block, 1)
        if group > block and not whole:
            scale_and_zero = lax.cond(
                start % group == 0,
                lambda: fit(lax.dynamic_slice_in_dim(weight, start, group, 1), grid),
                lambda: scale_and_zero,
            )
        # Inputs of the block, a group at a time.
        step = min(group, block)

        def one_group(i: jax.Array, state: tuple) -> tuple:
            part, errors, codes, found = state
            scale, zero = scale_and_zero
            if group <= block and not whole:
                scale, zero = fit(lax.dynamic_slice_in_dim(part, i * step, step, 1), grid)
            one = functools.partial(_one_input, factor, scale, zero, grid)
            part, errors, codes = lax.fori_loop(i * step, (i + 1) * step, one, (part, errors, codes))
            kept = [
                lax.dynamic_update_index_in_dim(all_of, new, i, 1)
                for all_of, new in zip(found, (scale, zero), strict=True)
            ]
            return part, errors, codes, tuple(kept)

        nothing, none_found = jnp.zeros_like(part), jnp.zeros((outputs, block // step))
        state = part, nothing, nothing, (none_found, none_found)
        _, errors, codes, (scales, zeros) = lax.fori_loop(0, block // step, one_group, state)
        # Later inputs make up for the errors of the block.
        later = jnp.where(columns >= start + block, rows, 0)
        weight -= jnp.matmul(errors, later, precision="highest")
        return (weight, scale_and_zero), (codes, scales, zeros)

    starts = jnp.arange(0, inputs + padding, block)
    _, parts = lax.scan(one_block, (weight, fitted), starts)
    codes, scales, zeros = (part.transpose(1, 0, 2).reshape(outputs, -1) for part in parts)
    # Groups of several blocks have their scale once for each block.
    repeated = 1 if group <= block else group // block
    groups = inputs // group
    if whole:
        scales, zeros = scales[:, :1], zeros[:, :1]
    else:
        scales, zeros = scales[:, ::repeated][:, :groups], zeros[:, ::repeated][:, :groups]
    return as_rounded(codes[:, :inputs], scales, zeros, grid)


def _block(group: int, inputs: int) -> int:
    """Inputs of a block: at most 128, whole groups, or equal parts of a group."""
    if group == inputs:
        return min(BLOCK, inputs)
    if group <= BLOCK:
        return BLOCK // group * group
    return max(size for size in range(1, BLOCK + 1) if group % size == 0)


def _one_input(
    factor: jax.Array, scale_O: jax.Array, zero_O: jax.Array, grid: Grid, j: jax.Array, state: tuple
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rounds input j of a block: the weights after it, the scaled errors, and the codes."""
    weight, errors, codes = state
    column = lax.dynamic_index_in_dim(weight, j, 1, keepdims=False)
    row = lax.dynamic_index_in_dim(factor, j, 0, keepdims=False)
    code = encode(column, scale_O, zero_O, grid)
    error = (column - decode(code, scale_O, zero_O)) / row[j]
    weight -= error[:, None] * row
    return (
        weight,
        lax.dynamic_update_index_in_dim(errors, error, j, 1),
        lax.dynamic_update_index_in_dim(codes, code, j, 1),
    )


def _ordered(rounded: Rounded, order_I: jax.Array, grid: Grid) -> Rounded:
    """A matrix whose inputs were permuted: values in their own order, codes sorted by group and then by input."""
    inverse = jnp.argsort(order_I)
    values = rounded.values_OI[:, inverse]
    if not grid.group:
        return rounded._replace(values_OI=values, codes_OI=rounded.codes_OI[:, inverse])
    grouped = order_I.reshape(-1, grid.group)
    places = (jnp.argsort(grouped, axis=1) + jnp.arange(len(grouped))[:, None] * grid.group).reshape(-1)
    return rounded._replace(
        values_OI=values, codes_OI=rounded.codes_OI[:, places], order_I=order_I[places].astype(jnp.int32)
    )
