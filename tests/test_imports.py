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
    """`qwen-jax --help` answers at once, and importing a subcommand's module takes no longer than its options need."""
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


def modules() -> dict[str, Path]:
    """Every module of the packages, by name; a package's own module is its `__init__`."""
    found = {}
    for package in FORBIDDEN:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the packages that a module imports, in functions too, but not only for type checkers.

    `from a.b import c` imports the module a.b.c if there is one, otherwise a.b. That importing a.b.c first runs the
    `__init__` of a and of a.b is not counted: an `__init__` that collects the names of its own modules is no circle.
    """
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {x if x in known else node.module for x in inside}
    return (found & known.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even inside functions: each module can be read and tested after those that it needs."""
    known = modules()
    assert circles({name: imported_modules(name, path, known) for name, path in known.items()}) == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_type_checkers_of_others_see_the_types(package: str) -> None:
    """setup.cfg packages the marker of PEP 561 where there is one."""
    assert (ROOT / package / "py.typed").is_file()
    assert "* = py.typed" in (ROOT / "setup.cfg").read_text()
