"""Runs the program under test and lets the tests, which are elsewhere, use its functions."""

from __future__ import annotations

import os
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    # Standard input and output are the connection; the program gets an empty input, and its output goes to the log.
    read, write = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    sys.path.insert(0, os.getcwd())
    from sandbox_wire import Peer  # type: ignore[import-not-found]

    peer = Peer(read, write, everything=True)
    module = types.ModuleType("solution")
    module.__file__ = "main.py"
    sys.modules["solution"] = module
    # Not as the main program: parts of it that would read standard input are for other tests.
    with open("main.py", "rb") as file:
        exec(compile(file.read(), "main.py", "exec", dont_inherit=True), module.__dict__)

    def names() -> dict[str, Any]:
        return {name: value for name, value in vars(module).items() if not name.startswith("__")}

    # The first object, by which the other side gets all others.
    peer.encode(names)
    peer.serve()


main()
