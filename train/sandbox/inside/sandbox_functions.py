"""Calls `evaluate(text)` of a function's source for many texts, and prints one character for each.

1 and 0 are True and False, e is an exception or another value, t is too long, k is a process that ended, f is a process
that answered more often than it was asked. The function runs in a process of its own; all that it can spoil is its own
answers. The argument is the number of seconds for one text.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from typing import Any

# Texts at which a function may fail to answer before it is given up.
MOST_LOST = 2


def answer(code: Any, text: str) -> bytes:
    """One answer. The function is defined anew each time, so that it knows nothing of other texts."""
    try:
        space: dict[str, Any] = {"__name__": "function"}
        exec(code, space)
        result = space["evaluate"](text)
    except BaseException:
        return b"e"
    return b"1" if result is True else b"0" if result is False else b"e"


def start(code: Any, texts: list[str]) -> tuple[int, int]:
    """A process that answers for texts: its id, and the pipe that it writes to."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        os.close(read)
        for text in texts:
            os.write(write, answer(code, text))
        os._exit(0)
    os.close(write)
    return process, read


def end(process: int, read: int) -> None:
    """Ends a process and all that it has started in its group."""
    os.close(read)
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def answers(code: Any, texts: list[str], seconds: float) -> str:
    """The answers for all texts."""
    found, lost = "", 0
    while len(found) < len(texts):
        try:
            process, read = start(code, texts[len(found) :])
        except OSError:
            return found + "k" * (len(texts) - len(found))
        why = ""
        while not why:
            if not select.select([read], [], [], seconds)[0]:
                why = "t"
            elif not (got := os.read(read, 1 << 16)):
                why = "k"
            else:
                found += got.decode("ascii", "replace")
        if len(found) == len(texts) and why == "t":
            # It has answered, and does not end.
            why = "k"
        end(process, read)
        if len(found) > len(texts) or set(found) - set("10etk"):
            return "f" * len(texts)
        if len(found) < len(texts):
            found, lost = found + why, lost + 1
            if lost >= MOST_LOST:
                found += why * (len(texts) - len(found))
    return found


def main() -> None:
    with open("function.py", encoding="utf-8") as file:
        source = file.read()
    with open("texts.json", encoding="utf-8") as file:
        texts = json.load(file)
    try:
        code = compile(source, "function.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        print("e" * len(texts))
        return
    print(answers(code, texts, float(sys.argv[1])))


main()
