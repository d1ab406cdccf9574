"""Stages without an engine."""

import dataclasses

import pyarrow as pa
import pytest

from qwen_jax.errors import InputError
from train.curate.operator import Compute, Operator
from train.curate.stage import Map


@dataclasses.dataclass(frozen=True)
class Slow(Operator):
    """Takes long to say what it makes, such as an operator that reads it from a model."""

    @property
    def makes(self) -> pa.Schema:  # type: ignore[override]
        """Notes that it was asked."""
        ASKED.append(1)
        return pa.schema([pa.field("one", pa.int8())])

    def start(self) -> Compute:
        return lambda table: pa.table({"one": pa.array([1] * len(table), pa.int8())})


ASKED: list[int] = []


def test_an_operator_is_not_asked_for_each_batch_what_it_makes() -> None:
    compute = Map("m", [Slow()]).start()
    ASKED.clear()
    for _ in range(3):
        assert compute(pa.table({"text": ["a", "b"]})).num_rows == 2
    assert not ASKED


@dataclasses.dataclass(frozen=True)
class Wrong(Operator):
    """Makes strings where it promised integers."""

    makes = pa.schema([pa.field("one", pa.int8())])

    def start(self) -> Compute:
        return lambda table: pa.table({"one": ["a"] * len(table)})


def test_a_column_of_another_type_names_the_operator_and_both_types() -> None:
    compute = Map("m", [Wrong()]).start()
    with pytest.raises(InputError, match=r"operator Wrong must make one int8; it made one string: .*'a'"):
        compute(pa.table({"text": ["a", "b"]}))
