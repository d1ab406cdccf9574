"""The sandbox of the tests of benchmarks: made once."""

from collections.abc import Iterator

import pytest

from train.evaluate.task import Tools
from train.sandbox import Limits, Sandbox


@pytest.fixture(scope="session")
def tools() -> Iterator[Tools]:
    with Sandbox(Limits(seconds=8.0), workers=2) as sandbox:
        yield Tools(sandbox=sandbox, workers=2)
