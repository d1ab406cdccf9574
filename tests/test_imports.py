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
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not {name.split(".")[0] for name in imported(path)} & FORBIDDEN[package], path


def test_only_the_command_line_reaches_train_and_convert_and_nothing_reaches_the_command_line() -> None:
    for path in (path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))):
        if ROOT / "qwen_jax" / "cli" not in path.parents:
            assert "sibling(" not in path.read_text(), path
            from_cli = {name for name in imported(path) if name.startswith("qwen_jax.cli")}
            assert not from_cli or path == ROOT / "qwen_jax" / "__main__.py", path


def test_the_command_line_imports_nothing_before_it_is_needed() -> None:
    """So `qwen-jax --help` is there at once, and a subcommand's module costs no more than its options."""
    modules = sorted(path.stem for path in (ROOT / "qwen_jax" / "cli").glob("*.py"))
    code = (
        "import sys, qwen_jax.cli\n"
        "assert qwen_jax.cli.main(['--help']) == 0\n"
        "assert not {'jax', 'numpy', 'tyro', 'train', 'convert'} & sys.modules.keys()\n"
        f"for name in {modules}: __import__('qwen_jax.cli.' + name)\n"
        "assert not {'jax', 'train', 'convert'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_import_starts_no_backend() -> None:
    code = (
        "import qwen_jax, qwen_jax.cli, qwen_jax.inference, qwen_jax.model, convert, train.pretrain, train.loop\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_type_checkers_of_others_see_the_types(package: str) -> None:
    """setup.cfg packages the marker of PEP 561 where there is one."""
    assert (ROOT / package / "py.typed").is_file()
    assert "* = py.typed" in (ROOT / "setup.cfg").read_text()
