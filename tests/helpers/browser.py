"""A headless Chromium for tests of pages; without one they are skipped."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

SIZES = {"phone": {"width": 390, "height": 844}, "desktop": {"width": 1280, "height": 800}}


@contextlib.contextmanager
def open_chromium() -> Iterator[Any]:
    """Playwright's browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()
