"""What curation costs: hours are sizes over rates, and the table of the documentation is the one that is computed."""

import pytest

from experiments.data.cost import BYTES_PER_TOKEN, PAGE_BYTES, STEPS, table
from tests.helpers.runs import print_seed
from tests.test_docs import ROOT


def test_hours_are_sizes_over_rates() -> None:
    rng = print_seed()
    tokens, raw = float(rng.uniform(1e9, 1e13)), float(rng.uniform(1, 20))
    kept = tokens * BYTES_PER_TOKEN
    for step in STEPS:
        size = {"kept": kept, "raw": raw * kept, "pages": raw * kept * PAGE_BYTES}[step.reads]
        assert step.core_hours(raw * kept, kept) * 3600 * step.megabytes * 1e6 == pytest.approx(size)


def test_the_table_of_the_documentation() -> None:
    assert table(18e12, 5.0) in (ROOT / "docs/curation.md").read_text()
