"""transformers 4, which `make check` installs beside the newest version, for tests of what both read and write."""

import os
import sys
from pathlib import Path

import pytest


def environment() -> dict[str, str]:
    """The environment of a process that imports transformers 4. Skips the test where that is not installed."""
    folder = Path(sys.prefix) / "transformers4"
    if not (folder / ".installed").exists():
        pytest.skip(f"{folder} is missing; `make check` installs it")
    return {**os.environ, "PYTHONPATH": str(folder)}
