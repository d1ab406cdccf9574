"""Imports go one way, and importing touches no device."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "qwen_jax": {"train", "convert", "experiments"},
    "train": {"convert", "experiments"},
    "convert": {"train", "experiments"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        if path != ROOT / "qwen_jax" / "cli.py":
            assert not imported(path) & FORBIDDEN[package], path


def test_import_starts_no_backend() -> None:
    code = (
        "import qwen_jax, qwen_jax.cli, qwen_jax.inference, qwen_jax.model, convert, train.pretrain, train.loop\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
