"""Rounding algorithms: against the paper in float64, against each other, and where they must agree exactly."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.quantize.awq import awq, search_scales
from convert.quantize.gptq import gptq
from convert.quantize.grid import Grid, Rounded, squared_error, to_codes
from convert.quantize.rtn import rtn
from tests.helpers.runs import print_seed

O, I = 24, 160
# Several groups in a block with a last block that is not full, one group, and groups longer than a block.
CASES = [(Grid("int4", 32), I), (Grid("int4", 0, symmetric=False), I), (Grid("int8", 144, symmetric=False), 288)]


def problem(rng: np.random.Generator, inputs: int = I) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Hessian of correlated inputs of different sizes; float32."""
    mixed = rng.normal(size=(4 * inputs, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)))
    x = mixed * np.exp(rng.normal(size=inputs))
    return rng.normal(size=(O, inputs)).astype(np.float32), (2 * x.T @ x / len(x)).astype(np.float32)


def loss(weight: np.ndarray, rounded: Rounded, hessian: np.ndarray) -> float:
    return float(squared_error(jnp.asarray(weight), rounded.values_OI, jnp.asarray(hessian)).sum())


def reference(weight: np.ndarray, hessian: np.ndarray, grid: Grid, damping: float = 0.01) -> np.ndarray:
    """GPTQ in float64, one input after the other: the inverse Hessian loses each input by Gaussian elimination."""
    w, inputs = weight.astype(np.float64), weight.shape[1]
    inverse = np.linalg.inv(hessian + damping * np.diag(hessian).mean() * np.eye(inputs))
    group, low, high = grid.group or inputs, -1 - grid.highest, grid.highest
    values = np.zeros_like(w)
    for i in range(inputs):
        if i % group == 0:
            part = w[:, i : i + group]
            if grid.symmetric:
                scale, zero = np.abs(part).max(1) / (high + 0.5), 0
            else:
                scale = (np.maximum(part.max(1), 0) - np.minimum(part.min(1), 0)) / (2 * high + 1)
            scale = scale.astype(np.float16).astype(np.float64)
            if not grid.symmetric:
                zero = np.clip(low - np.round(np.minimum(part.min(1), 0) / scale), low, high)
        values[:, i] = (np.clip(np.round(w[:, i] / scale) + zero, low, high) - zero) * scale
        w -= np.outer((w[:, i] - values[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return values


@pytest.mark.parametrize(("grid", "inputs"), CASES, ids=str)
def test_gptq_is_the_papers_algorithm_and_beats_rounding_to_nearest(grid: Grid, inputs: int) -> None:
    """Ties and near-ties may round the other way in float32 and move later inputs, so the loss is compared too."""
    weight, hessian = problem(print_seed(), inputs)
    rounded, damping = gptq(jnp.asarray(weight), jnp.asarray(hessian), grid)
    assert damping == 0.01
    want = reference(weight, hessian, grid)
    steps = np.repeat(np.asarray(rounded.scales_OG), inputs // rounded.scales_OG.shape[1], 1)
    assert (np.abs(rounded.values_OI - want) < 0.5 * steps).mean() > 0.9
    change = want - weight
    ours = loss(weight, rounded, hessian)
    np.testing.assert_allclose(ours, np.einsum("oi,ij,oj->", change, hessian, change), rtol=0.05)
    assert ours < loss(weight, rtn(jnp.asarray(weight), grid), hessian)


def test_gptq_rounds_to_nearest_where_inputs_are_independent() -> None:
    """With a diagonal Hessian no input can make up for another."""
    rng = print_seed()
    weight, grid = jnp.asarray(rng.normal(size=(O, I)), jnp.float32), CASES[0][0]
    hessian = jnp.diag(jnp.asarray(rng.uniform(0.1, 9.0, I), jnp.float32))
    got, nearest = gptq(weight, hessian, grid)[0], rtn(weight, grid)
    np.testing.assert_array_equal(got.codes_OI, nearest.codes_OI)
    np.testing.assert_array_equal(got.scales_OG, nearest.scales_OG)


def test_inputs_that_were_always_zero_are_rounded_to_nearest() -> None:
    weight, _ = problem(print_seed())
    got, _ = gptq(jnp.asarray(weight), jnp.zeros((I, I)), CASES[0][0])
    np.testing.assert_array_equal(got.values_OI, rtn(jnp.asarray(weight), CASES[0][0]).values_OI)


def test_gptq_says_when_the_hessian_is_useless() -> None:
    with pytest.raises(FloatingPointError, match="factorised"):
        gptq(jnp.ones((O, I)), jnp.full((I, I), jnp.nan), CASES[0][0])


def test_act_order_of_inputs_that_are_in_order_changes_nothing() -> None:
    weight, hessian = problem(print_seed())
    order = np.argsort(-np.diag(hessian))
    weight, hessian, grid = weight[:, order], hessian[order][:, order], CASES[0][0]
    plain, ordered = (
        gptq(jnp.asarray(weight), jnp.asarray(hessian), grid, act_order=act_order)[0] for act_order in (False, True)
    )
    np.testing.assert_array_equal(ordered.order_I, np.arange(I))
    np.testing.assert_array_equal(ordered.values_OI, plain.values_OI)


@pytest.mark.parametrize("grid", [CASES[0][0], CASES[1][0]], ids=str)
def test_act_order_is_that_of_a_permuted_matrix(grid: Grid) -> None:
    """Permuting the inputs, rounding and permuting back; the codes on the host stand for the same values."""
    weight, hessian = problem(print_seed())
    got, _ = gptq(jnp.asarray(weight), jnp.asarray(hessian), grid, act_order=True)
    order = np.argsort(-np.diag(hessian), kind="stable")
    want, _ = gptq(jnp.asarray(weight[:, order]), jnp.asarray(hessian[order][:, order]), grid)
    np.testing.assert_array_equal(np.asarray(got.values_OI)[:, order], want.values_OI)
    codes = to_codes(got, grid)
    np.testing.assert_array_equal(codes.dequantize(), got.values_OI)
    if grid.group:
        assert codes.order is not None
        assert (np.diff(codes.order.reshape(-1, grid.group), axis=1) > 0).all()
    else:
        assert codes.order is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("codes", ["int4", "int8"])
def test_rounding_to_nearest_errs_by_half_a_step(codes: str, symmetric: bool) -> None:
    """Scales are rounded to float16 first, which may move the ends of a range of 2^b codes by 2^b / 2^11 steps.

    Asymmetric zeros are rounded too, which moves the ends by another half step.
    """
    rng = print_seed()
    grid = Grid(codes, 32, symmetric)  # type: ignore[arg-type]
    weight = (rng.normal(size=(O, I)) * np.exp(3 * rng.normal(size=(O, 1)))).astype(np.float32)
    weight[0] = 0
    rounded = rtn(jnp.asarray(weight), grid)
    steps = np.abs(np.asarray(rounded.values_OI) - weight) / np.repeat(np.asarray(rounded.scales_OG), 32, 1)
    assert steps.max() <= (0.5 if symmetric else 1.0) + 2**grid.bits / 2**11 + 1e-3
    # Only what has the lowest or the highest code may lie outside of the range.
    inside = np.abs(np.asarray(rounded.codes_OI, np.int32) + 0.5) < grid.highest
    assert inside.any()
    assert steps[inside].max() <= 0.5 + 1e-3
    assert not np.asarray(rounded.values_OI)[0].any()
    np.testing.assert_array_equal(to_codes(rounded, grid).dequantize(), rounded.values_OI)


def test_float8_codes_are_the_nearest_float8() -> None:
    rng = print_seed()
    grid = Grid("float8_e4m3fn", 0, scales="float32")
    weight = rng.normal(size=(O, I)).astype(np.float32)
    codes = to_codes(rtn(jnp.asarray(weight), grid), grid)
    want = np.clip(weight / codes.scales, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes.codes.view(np.uint8), want.view(np.uint8))


def test_awq_is_no_worse_than_rounding_to_nearest_and_clipping_no_worse_than_none() -> None:
    """alpha = 0 and the whole range are among what is searched. Float32 sums differ by their order: 1e-4."""
    rng = print_seed()
    weight, hessian = (jnp.asarray(x) for x in problem(rng))
    activity = jnp.sqrt(jnp.diagonal(hessian))
    grid = Grid("int4", 32, symmetric=False)
    scales, alpha = search_scales([weight], [hessian], activity, grid)
    assert 0 <= alpha < 1
    inner = hessian / scales / scales[:, None]
    plain, clipped = (awq(weight * scales, inner, grid, clip) for clip in (False, True))
    by_output = [squared_error(weight * scales, rounded.values_OI, inner) for rounded in (plain, clipped)]
    assert (by_output[1] <= by_output[0] * 1.0001).all()
    assert by_output[1].sum() < by_output[0].sum()
    assert by_output[0].sum() <= squared_error(weight, rtn(weight, grid).values_OI, hessian).sum() * 1.0001


def test_scales_of_groups_are_those_that_a_file_holds() -> None:
    """Codes are chosen for scales after their rounding."""
    weight, _ = problem(print_seed())
    for scales in ("float16", "bfloat16", "float32"):
        grid = dataclasses.replace(CASES[0][0], scales=scales)
        rounded = rtn(jnp.asarray(weight), grid)
        codes = to_codes(rounded, grid)
        assert str(codes.scales.dtype) == scales
        np.testing.assert_array_equal(codes.scales.astype(np.float32), rounded.scales_OG)
