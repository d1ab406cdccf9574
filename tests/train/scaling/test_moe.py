"""Laws of MoE models: recovery of each form, the dense equivalent and its inverse, input that cannot be used."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.scaling.coverage import TOKENS, TRUE, coverage, measured
from qwen_jax.errors import InputError
from tests.helpers.runs import print_seed
from train.scaling.moe import MoeForm, fit_moe, leverages, moe_runs, percentiles
from train.scaling.moe_equivalent import dense_equivalent, equal_to_dense
from train.scaling.moe_law import equivalents, fit_table, picture, predict, predict_text, read_law, table_runs
from train.scaling.runs import RunTable

PUBLIC = os.environ.get("QWEN_JAX_RUN_TABLES")


@pytest.mark.parametrize("form", TRUE)
def test_recovers_each_form(form: MoeForm) -> None:
    """Least squares project the noise: it is the residuals and, orthogonal to them, the error of the predictions.

    With 0.02% of noise, an error of 0.2% of a prediction would be at least ten standard deviations. Parameters are near
    the truth.
    """
    generator = print_seed()
    runs, true = measured(form, generator, 2e-4)
    law = fit_moe(runs, form, samples=0)
    noise, moved = (np.log(loss / true.loss(runs)) for loss in (runs.loss, law.loss(runs)))
    # Up to the curvature of the law.
    assert law.error**2 + np.mean(moved**2) == pytest.approx(np.mean(noise**2), rel=0.02)
    np.testing.assert_allclose(law.loss(runs), true.loss(runs), rtol=2e-3)
    for name in {"leverage": ("alpha", "beta", "k0"), "bilinear": ("a", "b", "d")}.get(form, ()):  # well determined
        assert law.parameters[name] == pytest.approx(true.parameters[name], rel=0.1)


@pytest.mark.draw(2)
@pytest.mark.parametrize("form", TRUE)
def test_leverages_are_those_of_the_linearised_law(form: MoeForm) -> None:
    """Each is between 0 and 1, and they sum to the number of parameters that the runs determine."""
    runs, true = measured(form, print_seed(), 0.0)
    found = leverages(true, runs)
    assert ((found > 0) & (found < 1)).all()
    determined = len(true.parameters) - (form == "leverage")  # C0 is a unit.
    assert found.sum() == pytest.approx(determined, abs=1e-3)


def test_each_draw_of_the_bootstrap_fits_the_law_with_residuals_of_random_signs() -> None:
    """The form `bilinear` is linear in the log loss, so that the law of a draw is known.

    With the hat matrix H, whose diagonal is h, and residuals r a draw moves the fitted log losses by H (w r / (1 - h)),
    where w = ±1. So moves are fixed by H, their norm is at most that of r / (1 - h), and each is at most the sum of all
    amounts. Without noise all draws are the law.
    """
    generator = print_seed()
    runs, true = measured("bilinear", generator, 2e-3)
    law = fit_moe(runs, "bilinear", samples=10, seed=int(generator.integers(100)))
    size, experts = np.log10(runs.active), np.log10(runs.experts)
    design = np.column_stack([size, experts, size * experts, np.ones(len(runs))])
    hat = design @ np.linalg.pinv(design)
    np.testing.assert_allclose(leverages(law, runs), np.diag(hat), rtol=1e-4)
    scaled = np.abs(np.log(runs.loss / law.loss(runs))) / (1 - np.diag(hat))
    for sample in law.samples():
        moved = np.log(sample.loss(runs) / law.loss(runs))
        np.testing.assert_allclose(hat @ moved, moved, atol=1e-8)
        assert np.linalg.norm(moved) <= np.linalg.norm(scaled) * (1 + 1e-6)
        assert (np.abs(moved) <= np.abs(hat) @ scaled + 1e-9).all()
        assert np.linalg.norm(moved) > 0
    exact = dataclasses.replace(runs, loss=true.loss(runs))
    for sample in fit_moe(exact, "bilinear", samples=3).samples():
        np.testing.assert_allclose(sample.loss(runs), exact.loss, rtol=1e-9)


def test_the_study_of_coverage_counts_nested_intervals() -> None:
    """Of each quantity the wider intervals hold the truth at least as often."""
    found = coverage("bilinear", 3, 20, 2e-3, seed=int(print_seed().integers(1000)), levels=(0.5, 0.9))
    held = {(one.what, one.level): one.held for one in found}
    assert {what for what, _ in held} == {"a", "b", "c", "d", "dense equivalent"}
    assert all(one.tables == 3 and one.held <= 3 for one in found)
    assert all(held[what, 0.5] <= held[what, 0.9] for what, _ in held)


def test_ends_of_intervals_are_order_statistics() -> None:
    """Of n exchangeable draws and a further one, this one is outside with a probability of at most 1 - level.

    The rank of the further one among all is uniform: the two ends leave k of n + 1 ranks out on each side.
    """
    rng = print_seed()
    for level in (0.8, 0.9, 0.95):
        for count in (40, 99, 200):
            values = rng.permutation(count).astype(float)
            low, high = percentiles(values.tolist(), level)
            left_out = (low + 1) + (count - high)
            assert left_out / (count + 1) <= 1 - level + 1e-9 or left_out == 2
            assert (left_out + 2) / (count + 1) > 1 - level
    assert percentiles([np.inf, 1.0, 2.0], 0.9) == (1.0, np.inf)


@pytest.mark.parametrize("form", ["leverage", "sparsity"])
def test_dense_equivalents_are_near(form: MoeForm) -> None:
    """From runs with 0.2% noise, the dense equivalents of models in the range are within 20% of the truth."""
    generator = print_seed()
    runs, true = measured(form, generator, 2e-3)
    law = fit_moe(runs, form, samples=0)
    for place in generator.choice(np.flatnonzero(~runs.dense), 5, replace=False):
        given = {"total": runs.total[place], "granularity": runs.granularity[place]}
        one, truth = (dense_equivalent(each, runs.active[place], runs.tokens[place], **given) for each in (law, true))
        assert one.dense == pytest.approx(truth.dense, rel=0.2)


@pytest.mark.parametrize("form", TRUE)
def test_the_dense_equivalent_inverts(form: MoeForm) -> None:
    """The dense model has the loss of the MoE, a dense run equals itself, and the inverse question gives it back."""
    generator = print_seed()
    _, law = measured(form, generator, 0.0)
    tokens = 1.3e11 if form in ("bilinear", "saturated") else float(generator.choice(TOKENS))
    dense = float(generator.uniform(1e8, 4e8))
    ratios = (16.0,) if form == "granularity" else (2.0, 8.0, 16.0)
    answers = equal_to_dense(law, dense, tokens, ratios)
    assert len(answers) == len(ratios)
    for answer in answers:
        assert answer.dense == pytest.approx(dense, rel=1e-6)
        assert law.dense_loss(answer.dense, tokens) == pytest.approx(answer.loss, rel=1e-9)
        assert answer.leverage == pytest.approx(dense / answer.active, rel=1e-6)
    if form in ("bilinear", "saturated"):
        same = dense_equivalent(law, dense, tokens, experts=1)
    else:
        same = dense_equivalent(law, dense, tokens, total=dense)
        # A larger share of sleeping parameters needs fewer active ones.
        assert sorted(one.active for one in answers)[::-1] == [one.active for one in answers]
    assert same.dense == pytest.approx(dense, rel=1e-6)


def test_which_sizes_equal_14b_and_72b() -> None:
    """The report's question, from a table to rows of active and total size, through law.json; far outside is said."""
    generator = print_seed()
    runs, true = measured("leverage", generator, 1e-3)
    names = {"active_params": "active", "total_params": "total"}
    columns = {
        name: getattr(runs, names.get(name, name)) for name in ("active_params", "total_params", "tokens", "loss")
    }
    columns |= {"granularity": np.where(runs.dense, np.nan, runs.granularity)}
    table = RunTable(columns, np.arange(len(runs)) + 1, {"path": "runs.csv"})
    np.testing.assert_array_equal(table_runs(table).granularity, runs.granularity)
    content, law, _ = fit_table(table, "leverage", samples=5, counting="without embeddings")
    assert read_law(content).parameters == law.parameters
    for dense in (14e9, 72e9):
        rows = equivalents(content, dense, 18e12, (4, 8), granularity=4)
        want = equal_to_dense(true, dense, 18e12, (4, 8), granularity=4)
        for row, truth in zip(rows, want, strict=True):
            assert row["active_params"] == pytest.approx(truth.active, rel=0.3)
            assert row["total_params"] > row["active_params"]
            assert row["dense_params"] == pytest.approx(dense, rel=1e-6)
            back = predict(content, row["active_params"], 18e12, total=row["total_params"], granularity=4)
            assert back["dense_params"] == pytest.approx(dense, rel=1e-6)
        assert "tokens 1.8e+13 is outside the fit's 2e+09 to 3.2e+10" in predict_text(rows)


def test_unusable_runs_are_named() -> None:
    generator = print_seed()
    runs, _ = measured("leverage", generator, 1e-3)
    values = [getattr(runs, field.name) for field in dataclasses.fields(runs)]
    bad = values[3].copy()
    bad[5] = np.nan
    with pytest.raises(InputError, match=r"in loss, got nan in run 5 \(1 such"):
        moe_runs(values[0], values[1], values[2], bad)
    with pytest.raises(InputError, match="columns exchanged"):
        moe_runs(values[1], values[0], values[2], values[3])
    with pytest.raises(InputError, match="of one length"):
        moe_runs(values[0], values[1], values[2], bad[:3])
    with pytest.raises(InputError, match="same loss, 3"):
        fit_moe(dataclasses.replace(runs, loss=np.full(len(runs), 3.0)), "leverage")
    with pytest.raises(InputError, match="at least 9 MoE runs for the form granularity, got 0"):
        fit_moe(runs.take(runs.dense), "granularity")
    with pytest.raises(InputError, match="at least 9 runs"):
        fit_moe(runs.take(np.arange(5)), "leverage")
    with pytest.raises(InputError, match="several values of active"):
        fit_moe(runs.take(runs.active == runs.active[0]), "leverage")
    with pytest.raises(InputError, match="several values of total / active"):
        fit_moe(runs.take(runs.dense), "leverage")
    with pytest.raises(InputError, match="one number of tokens, got 2e\\+09 to"):
        fit_moe(runs, "bilinear")
    with pytest.raises(InputError, match="several values of granularity"):
        fit_moe(runs.take(runs.granularity == 1), "granularity")
    # Without dense runs: said, and the dense equivalent of two separate laws is refused.
    fine, _ = measured("granularity", generator, 1e-3)
    law = fit_moe(fine.take(~fine.dense), "granularity", samples=0)
    assert "dense equivalent is not known" in " ".join(law.warnings)
    assert picture(law, fine.take(~fine.dense)).startswith(b"\x89PNG")
    with pytest.raises(InputError, match="without enough dense runs"):
        dense_equivalent(law, 1e8, 8e9, total=16e8)
    assert "No dense runs" in fit_moe(runs.take(~runs.dense), "leverage", samples=0).warnings[0]
    twice = runs.take(np.append(np.arange(len(runs)), [0, 1]))
    assert "2 runs are copies" in fit_moe(twice, "leverage", samples=0).warnings[0]
    with pytest.raises(InputError, match="total number of parameters"):
        dense_equivalent(fit_moe(runs, "leverage", samples=0), 1e8, 8e9)


@pytest.mark.skipif(PUBLIC is None, reason="QWEN_JAX_RUN_TABLES names no folder of public runs")
def test_public_routed_models() -> None:
    """The bilinear law of the public runs of Clark et al. 2022 has the coefficients known for this subset."""
    import pandas as pd

    path = Path(str(PUBLIC)) / "curves.csv.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    table = pd.read_csv(path)
    table = table[table["step"] == table["step"].max()]
    routed = (table["router_type"] == "S-Base") & (table["k"] == 1) & (table["routing_frequency"] == 0.5)
    table = table[routed]
    runs = moe_runs(
        table["dense_parameter_count"],
        table["total_parameter_count"],
        np.full(len(table), 1.3e11),
        table["loss_validation"],
        table["num_experts"],
    )
    law = fit_moe(runs, "bilinear", samples=0)
    for name, value in {"a": -0.0802, "b": -0.0883, "c": 0.0075, "d": 1.079}.items():
        assert law.parameters[name] == pytest.approx(value, rel=0.1)
