"""The one way in which implementations are selected."""

import logging

import jax.numpy as jnp
import pytest

from qwen_jax.errors import InputError
from qwen_jax.kernels import select
from qwen_jax.kernels.matmul import few_rows
from qwen_jax.kernels.select import Candidate, unmet
from tests.helpers.platforms import as_if_on

CANDIDATES = (
    Candidate("fast", ("a Fast GPU", "float32")),
    Candidate("good"),
    Candidate("named", automatic=False),
    Candidate("plain", slow=True),
)


@pytest.fixture(autouse=True)
def _nothing_logged_yet() -> None:
    select.log_once.cache_clear()


def run(asked: str, candidates: tuple[Candidate, ...] = CANDIDATES) -> str:
    return select.select(candidates, asked, "frobnication", "int8, size 3")


def test_auto_selects_the_first_that_can_run() -> None:
    assert run("auto") == "good"
    assert run("auto", CANDIDATES[::-1]) == "plain"
    assert run("auto", (CANDIDATES[2], CANDIDATES[1])) == "good", "only a name selects what is not automatic"


def test_a_name_selects_that_implementation() -> None:
    for name in ("good", "named", "plain"):
        assert run(name) == name


def test_what_cannot_run_is_refused_with_its_needs_and_the_alternatives() -> None:
    """Nothing falls back: an implementation that was asked for runs or raises."""
    with as_if_on("GPU"), pytest.raises(InputError) as error:
        run("fast")
    assert str(error.value) == (
        "Frobnication by fast needs a Fast GPU and float32; got int8, size 3 on gpu. "
        "Use implementation='good' or 'plain'."
    )


def test_auto_without_any_that_can_run_is_refused() -> None:
    with pytest.raises(InputError, match=r"No implementation of frobnication can do int8, size 3 on .*: fast needs"):
        run("auto", CANDIDATES[:1])


def test_an_unknown_name_is_refused_with_all_names() -> None:
    with pytest.raises(
        InputError, match="Unknown frobnication implementation 'quick': use auto, fast, good, named, plain"
    ):
        run("quick")


@pytest.mark.parametrize("asked", ["auto", "good"])
def test_each_outcome_is_logged_once(asked: str, caplog: pytest.LogCaptureFixture) -> None:
    with as_if_on("CPU"), caplog.at_level(logging.INFO, "qwen_jax.kernels"):
        for _ in range(3):
            run(asked)
        run("plain")
    assert [r.getMessage() for r in caplog.records] == [
        "frobnication, int8, size 3 on cpu: good",
        "frobnication, int8, size 3 on cpu: plain",
    ]
    assert all(r.levelno == logging.INFO for r in caplog.records)


@pytest.mark.parametrize(
    ("where", "asked", "warns"), [("CPU", "auto", False), ("TPU", "auto", True), ("TPU", "plain", False)]
)
def test_a_slow_fall_back_on_an_accelerator_is_a_warning_that_says_why(
    where: str, asked: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless the caller asked for it by name, or on a CPU, where nothing is faster."""
    with as_if_on(where), caplog.at_level(logging.INFO, "qwen_jax.kernels"):
        assert run(asked, (CANDIDATES[0], CANDIDATES[3])) == "plain"
    [record] = caplog.records
    assert (record.levelno == logging.WARNING) == warns
    assert record.getMessage().endswith("which is slow here (fast needs a Fast GPU and float32)") == warns


def test_unmet_needs_keep_their_order() -> None:
    assert unmet({"a": False, "b": True, "c": False}) == ("a", "c")


@pytest.mark.parametrize(
    ("change", "supported"),
    [
        ({}, True),
        ({"rows": 129}, False),
        ({"tokens_per_row": 2}, False),
        ({"dtype": jnp.float32}, False),
        ({"outputs": 4604}, False),
        ({"inputs": 3616}, False),
        ({"rows": 1, "outputs": 3584}, True),  # 24.5 MiB
        ({"rows": 1, "outputs": 2560}, False),  # 17.5 MiB
        ({"rows": 16, "outputs": 2560}, True),
        ({"outputs": 128}, False),  # 0.9 MiB
    ],
)
def test_the_kernel_for_few_rows_is_used_for_large_matrices_on_hopper(change: dict, supported: bool) -> None:
    case = {"rows": 64, "tokens_per_row": 1, "dtype": jnp.bfloat16, "outputs": 4608, "inputs": 3584} | change
    with as_if_on("Hopper GPU"):
        assert few_rows.supports(**case) == supported
    for where in ("GPU", "TPU", "CPU"):
        with as_if_on(where):
            assert not few_rows.supports(**case)
