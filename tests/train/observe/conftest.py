"""The run that the tests of this folder look at; it takes some seconds, and is made once."""

from pathlib import Path

import pytest

from tests.helpers.watched import Watched, make_material, watch


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


@pytest.fixture(scope="session")
def watched(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return watch(material, tmp_path_factory.mktemp("runs") / "watched")
