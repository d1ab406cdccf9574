"""Runs the tests. The program that they test is in another sandbox; its functions are called through a pipe.

The last line of standard error is the verdict, after a nonce that only this process and the supervisor know.
"""

from __future__ import annotations

import builtins
import os
import sys
import types

sys.path.insert(0, ".")
from sandbox_wire import Broken, CannotSend, Peer, Remote  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def verdict(peer: Any, source: str) -> tuple[str, str]:
    """Whether the tests pass: "PASS", "FAIL" or "ERROR", and why."""
    try:
        code = compile(source, "test.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "ERROR", f"the test does not compile: {error}"
    try:
        names = Remote(peer, 0)()
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names):
            return "FAIL", "the program's names cannot be read"
        # Not the names of built-in functions: a program must not bring its own `abs` or `sorted` to its test.
        public = {name: value for name, value in names.items() if not name.startswith("__")}
        used = {name: value for name, value in public.items() if not hasattr(builtins, name)}
        module = types.ModuleType("solution")
        module.__dict__.update(public, __all__=list(used))
        sys.modules["solution"] = sys.modules["main"] = module
        # Nor its own `math`: where the test uses a module of the standard library, it is that one.
        used.update(_standard_modules(source, used))
        space = {"__name__": "__main__", **used}
        exec(code, space)
        _call_functions(space, used)
        if peer.broken is not None:
            raise peer.broken
    except Broken as error:
        return "FAIL", f"the program {error}"
    except CannotSend as error:
        return "ERROR", str(error)
    except AssertionError as error:
        return "FAIL", f"an assertion failed: {error}" if str(error) else "an assertion failed"
    except BaseException as error:
        return "FAIL", f"{type(error).__name__}: {error}"
    return "PASS", ""


def _standard_modules(source: str, names: dict[str, Any]) -> dict[str, types.ModuleType]:
    """The modules of the standard library that a test uses by names of the program, as in `math.isclose`."""
    standard = set(names).intersection(getattr(sys, "stdlib_module_names", ()))
    if not standard:
        return {}
    import _ast  # Not `ast`, which is slow to import.

    used: set[str] = set()
    nodes: list[Any] = [compile(source, "test.py", "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, _ast.Attribute) and isinstance(node.value, _ast.Name):
            used.add(node.value.id)
        for value in (getattr(node, field, None) for field in node._fields):
            nodes += [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, _ast.AST)]
    return {name: __import__(name) for name in sorted(standard & used)}


def _call_functions(space: dict[str, Any], used: dict[str, Any]) -> None:
    """Calls test functions and test cases that the source has only defined."""
    mine = {name: value for name, value in space.items() if name not in used}
    for name, value in mine.items():
        if name.startswith("test") and isinstance(value, types.FunctionType) and value.__code__.co_argcount == 0:
            value()
    # A test that has test cases has imported this.
    unittest = sys.modules.get("unittest")
    if unittest is None:
        return
    cases = [v for v in mine.values() if isinstance(v, type) and issubclass(v, unittest.TestCase)]
    for case in (case for case in cases if case.__module__ == "__main__"):
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
        if not result.wasSuccessful() or result.skipped:
            problems = [text for _, text in (*result.errors, *result.failures)] + [why for _, why in result.skipped]
            last = [line for line in problems[0].splitlines() if line.strip()] if problems else []
            raise AssertionError(last[-1] if last else "a test case failed")


def main() -> None:
    with open("nonce") as file:
        nonce = file.read()
    with open("test.py", encoding="utf-8") as file:
        source = file.read()
    read, write = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    kind, why = verdict(Peer(read, write, everything=False), source)
    sys.stdout.flush()
    why = " ".join(why.split())[:300].encode("ascii", "replace").decode()
    os.write(2, f"\n{nonce} {kind} {why}\n".encode())
    os._exit(0)


main()
