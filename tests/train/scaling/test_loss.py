"""The loss law: known parameters are recovered, intervals hold as often as they say, weak data is named."""

import dataclasses
import math

import numpy as np
import pytest

from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from tests.helpers.scaling import CHINCHILLA, draw_runs, table_of
from train.scaling.bootstrap import draw_laws, interval, leave_out, sensitivity
from train.scaling.loss import (
    LossLaw,
    _projected,
    budgets,
    check_runs,
    fit_approach2,
    fit_approach3,
    fit_huber,
    fit_vpnls,
    fit_warnings,
)
from train.scaling.predict import compute_optimal, fit_loss, predict_loss
from train.scaling.report import loss_text


def test_exact_losses_give_the_exact_law() -> None:
    """Without noise VPNLS finds the parameters, whatever the centre of the grid and whatever is missing."""
    generator = print_seed()
    for off in (1.0, generator.uniform(0.25, 4.0)):
        law = LossLaw(*generator.uniform([0.5, 100, 500, 0.2, 0.2], [2.5, 1000, 5000, 0.6, 0.6]))
        table = draw_runs(generator, law, noise=0.0, off=off, missing=0.3)
        np.testing.assert_allclose(fit_vpnls(table).values(), law.values(), rtol=1e-4)


def test_exact_losses_give_the_exact_law_by_approach3() -> None:
    """BFGS on the summed Huber loss reaches the same minimum."""
    table = draw_runs(print_seed(), noise=0.0, sizes=6, off=2.0)
    np.testing.assert_allclose(fit_approach3(table).values(), CHINCHILLA.values(), rtol=1e-2)


def test_adapted_weights_reach_the_minimum_of_approach3() -> None:
    """Reweighted VPNLS and BFGS minimise the same Huber loss, and runs that went wrong hardly move them."""
    generator = print_seed()
    table = draw_runs(generator, sizes=6)
    loss = table["loss"].copy()
    loss[generator.choice(len(loss), 3, replace=False)] *= 1.1
    spoiled = table_of(params=table["params"], tokens=table["tokens"], loss=loss)
    laws = [fit_huber(spoiled), fit_approach3(spoiled)]
    for name, tolerance in (("E", 0.01), ("a", 0.01), ("b", 0.01)):
        assert abs(getattr(laws[0], name) - getattr(laws[1], name)) < tolerance
    assert abs(laws[0].a - CHINCHILLA.a) < 0.04
    assert abs(laws[0].b - CHINCHILLA.b) < 0.04


def test_linear_parameters_are_those_of_nnls() -> None:
    """At any exponents E, A, B are what scipy's non-negative least squares finds, also where one of them is zero."""
    import scipy.optimize

    generator = print_seed()
    zeros = 0
    for _ in range(30):
        n, d, loss = generator.normal(size=(3, 12))
        loss = loss**2
        weight = generator.exponential(size=12)
        a, b = generator.uniform(0.1, 1.5, 2)
        squares, found = _projected(n, d, loss, weight, np.array([a]), np.array([b]))
        columns = np.stack([np.ones(12), np.exp(-a * n), np.exp(-b * d)], 1)
        root = np.sqrt(weight)
        expected, residual = scipy.optimize.nnls(columns * root[:, None], loss * root)
        np.testing.assert_allclose([value[0, 0] for value in found], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(squares[0, 0], residual**2, rtol=1e-6)
        zeros += int((expected == 0).any())
    assert zeros > 0


@pytest.mark.parametrize("off", [1.0, 3.0])
def test_noisy_losses_give_the_law_within_stated_errors(off: float) -> None:
    """With 0.2% of noise, 30% of the runs missing and grids off the centre: exponents within 0.03, E within 3%.

    About five standard deviations of the estimates of such tables.
    """
    table = draw_runs(print_seed(), off=off, missing=0.3, sizes=12)
    law = fit_vpnls(table)
    assert abs(law.a - CHINCHILLA.a) < 0.03
    assert abs(law.b - CHINCHILLA.b) < 0.03
    assert abs(law.E / CHINCHILLA.E - 1) < 0.03


def test_two_largest_budgets_are_predicted() -> None:
    """Fitted to the smaller budgets, the law predicts the two largest with a mean error below 0.6%."""
    table = draw_runs(print_seed(), noise=0.003, off=1.5, missing=0.1)
    largest = np.concatenate(budgets(table["flops"])[-2:])
    mask = np.isin(np.arange(len(table)), largest)
    found = leave_out(table, mask, "the two largest")
    assert found.law is not None
    assert len(found.errors) == mask.sum() > 10
    assert np.abs(found.errors).mean() < 0.006


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 90% intervals of E, a, b, and of the loss and the optimal size 30 times beyond the runs, about 90% hold it.

    The 5 intervals of a table depend on each other. In the worst case all or none hold the truth; with a probability of
    85%, 9 of 24 tables or fewer do so once in ten million times. That intervals are neither too wide nor too narrow is
    the second check, with the deviation of the estimates of 400 tables, which is known to 4%.
    """
    generator = print_seed()
    flops = 30 * 3e20
    params, tokens = CHINCHILLA.optimum(flops)
    truth = [CHINCHILLA.E, CHINCHILLA.a, CHINCHILLA.b, float(CHINCHILLA.loss(params, tokens)), math.log(params)]

    def statistics(law: LossLaw) -> list[float]:
        return [law.E, law.a, law.b, float(law.loss(params, tokens)), math.log(law.optimum(flops)[0])]

    hits, widths, estimates = [], [], []
    for i in range(400):
        table = draw_runs(generator, noise=0.003, sizes=6, budgets=(6e18, 3e19, 6e19, 1e20, 3e20))
        law = fit_vpnls(table)
        estimates.append(statistics(law))
        if i >= 24:
            continue
        drawn = np.array(
            [statistics(one) for one in draw_laws(table, law, count=40, seed=int(generator.integers(2**31)))]
        )
        ends = [interval(column, 0.9) for column in drawn.T]
        hits.append([low <= value <= high for value, (low, high) in zip(truth, ends, strict=True)])
        widths.append([high - low for low, high in ends])
    assert np.mean(hits) > 9 / 24, np.mean(hits, 0)
    # A normal 90% interval is 3.29 deviations wide.
    ratio = np.mean(widths, 0) / (3.29 * np.std(estimates, 0, ddof=1))
    assert (ratio > 0.6).all(), ratio
    assert (ratio < 1.9).all(), ratio


def test_optimum_is_the_lowest_loss_of_a_budget() -> None:
    """No size with the same FLOPs has a lower loss, and approach 2 finds the exponent b / (a + b)."""
    generator = print_seed()
    flops = 10 ** generator.uniform(18, 25)
    params, tokens = CHINCHILLA.optimum(flops)
    np.testing.assert_allclose(6 * params * tokens, flops, rtol=1e-9)
    others = params * np.geomspace(0.1, 10, 1001)
    assert CHINCHILLA.loss(params, tokens) <= CHINCHILLA.loss(others, flops / (6 * others)).min() * (1 + 1e-12)
    found = fit_approach2(draw_runs(generator, noise=0.0))
    np.testing.assert_allclose(found.size, CHINCHILLA.b / (CHINCHILLA.a + CHINCHILLA.b), atol=1e-3)


def test_predictions_and_their_warnings() -> None:
    """Inside the runs nothing is warned of; beyond them it is named, and intervals grow."""
    table = draw_runs(print_seed(), sizes=6)
    fitted = fit_loss(table, counting="total", bootstrap=30, checks=False)
    inside = predict_loss(fitted, table["params"][8], table["tokens"][8])
    low, high = inside["interval"]
    assert low <= inside["loss"] <= high
    assert inside["run_interval"][0] < low < high < inside["run_interval"][1]
    assert not inside["warnings"]
    near, far = (compute_optimal(fitted, flops) for flops in (1e20, 1e24))
    assert not near["warnings"]
    assert any("factor of 1e+03" in text for text in far["warnings"])
    assert any("far" in text for text in far["warnings"])
    width = [one["intervals"]["params"][1] / one["intervals"]["params"][0] for one in (near, far)]
    assert width[0] < width[1]
    with pytest.raises(InputError, match="params must be a positive number"):
        predict_loss(fitted, -1.0, 1e9)
    with pytest.raises(InputError, match="flops must be a positive number"):
        compute_optimal(fitted, math.nan)


@pytest.mark.parametrize("term", ["params", "tokens"])
def test_a_loss_without_a_term_has_no_optimum(term: str) -> None:
    """If size or tokens do not lower the loss, there is no optimal size, and predictions say what is not determined."""
    generator = print_seed()
    sizes, tokens = np.meshgrid(*(np.geomspace(1, 30, 4) * 10 ** generator.uniform(7, 9) for _ in range(2)))
    law = dataclasses.replace(CHINCHILLA, **{"A" if term == "params" else "B": 0.0})
    # Raised a little, so that rounding does not look like a term.
    raised = 0.01 * np.log(sizes if term == "params" else tokens)
    table = table_of(params=sizes.ravel(), tokens=tokens.ravel(), loss=(law.loss(sizes, tokens) + raised).ravel())
    fitted = fit_loss(table, counting="total", bootstrap=3)
    assert fitted.law.size_exponent is None
    assert fitted.to_json()["size_exponent"] is None
    assert "size_exponent" not in fitted.intervals()
    warnings = " ".join(predict_loss(fitted, sizes[0, 0], tokens[0, 0])["warnings"])
    assert f"The exponent {'a' if term == 'params' else 'b'}" in warnings
    with pytest.raises(InputError, match="no optimum"):
        compute_optimal(fitted, 1e20)
    rows = [line for line in loss_text(fitted).splitlines() if line.split()[:1] in (["vpnls"], ["approach3"])]
    assert [row.endswith(" -") for row in rows] == [True, True]


def test_intervals_without_noise_bring_no_warnings() -> None:
    """Laws of noiseless runs differ in the last digits only: nothing has moved, whichever runs are left out."""
    fitted = fit_loss(draw_runs(print_seed(), noise=0.0, sizes=5), counting="total", bootstrap=5, checks=False)
    assert fitted.warnings == ()


def test_runs_that_cannot_determine_the_law_are_refused() -> None:
    """One size, few cells, one loss, and tokens in proportion to size are each named."""
    table = draw_runs(print_seed())
    one = table.select(np.arange(9))
    with pytest.raises(InputError, match="1 sizes and"):
        check_runs(table_of(params=np.full(9, 1e8), tokens=one["tokens"], loss=one["loss"]))
    with pytest.raises(InputError, match="5 runs with 5 cells"):
        check_runs(table.select(np.arange(5)))
    with pytest.raises(InputError, match="same loss"):
        check_runs(table_of(params=table["params"], tokens=table["tokens"], loss=np.full(len(table), 2.0)))
    with pytest.raises(InputError, match="Tokens per parameter hardly vary"):
        check_runs(table_of(params=table["params"], tokens=20 * table["params"], loss=table["loss"]))
    assert any("cells" in text for text in check_runs(table.select(np.arange(8))))


def test_outliers_are_named_with_their_rows() -> None:
    """A run that did not end as it should is far from the law and is named; without it the law is the true one."""
    table = draw_runs(print_seed(), noise=0.001)
    loss = table["loss"].copy()
    loss[13] *= 1.5
    spoiled = table_of(params=table["params"], tokens=table["tokens"], loss=loss)
    assert any("row 14 " in text for text in fit_warnings(fit_vpnls(spoiled), spoiled))
    assert not any("far from" in text for text in fit_warnings(fit_vpnls(table), table))


def test_sensitivity_says_what_is_left_out() -> None:
    """Each case leaves out what its name says, and predicts it; a case without a law says why."""
    table = draw_runs(print_seed(), sizes=6)
    found = {one.what: one for one in sensitivity(table)}
    assert found["the largest budget"].runs == len(table) - 6 == len(table) - len(found["the largest budget"].errors)
    assert found["the 5 highest losses"].runs == len(table) - 5
    assert all(np.abs(one.errors).mean() < 0.02 for one in found.values())
    few = {one.what: one for one in sensitivity(table.select(np.arange(12)))}
    assert few["the largest budget"].law is not None
    smaller = leave_out(table, np.arange(len(table)) >= 4, "most")
    assert smaller.law is None
    assert "cells" in smaller.problem
