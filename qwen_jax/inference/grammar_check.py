"""A process that tries grammars before the engine compiles them, so that one that hangs or crashes ends only itself.

llguidance bounds most of its work, but not all: intersections of patterns can take minutes, and a long chain of rules
overflows the stack. The process compiles with a vocabulary of single bytes, on which neither depends.
"""

import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""The longest that a grammar may take to compile."""
_START_SECONDS = 60.0  # For the process itself, which imports llguidance.
# Less than a thread of the engine has, so that what compiles here compiles there.
_STACK = 1 << 20
_MEMORY = 2 << 30


class Checker:
    """Tries grammars in a process of its own, which starts with the first one. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, kind: str, text: str, limits: dict[str, int]) -> tuple[str, str | None]:
        """Returns the grammar as llguidance takes it, and why it cannot be used, or None.

        Args:
          kind: "lark", or "gbnf" for a grammar that is translated first.
          text: the grammar.
          limits: of `llguidance.LLParserLimits`.
        """
        request = json.dumps({"kind": kind, "text": text, "limits": limits}).encode() + b"\n"
        with self._lock:
            try:
                if self._process is None:
                    self._process = _start()
                    # Also at the end of the interpreter, before its modules are gone.
                    self._end = weakref.finalize(self, _end, self._process)
                    self._read(_START_SECONDS)
                assert self._process.stdin is not None
                self._process.stdin.write(request)
                self._process.stdin.flush()
                reply = json.loads(self._read(SECONDS))
            except TimeoutError:
                self._stop()
                return text, f"it takes longer than {SECONDS:.0f} seconds to compile"
            except (EOFError, BrokenPipeError):
                self._stop()
                return text, "it is nested too deeply or needs too much memory"
            except BaseException:
                self._stop()  # A reply may still be on its way.
                raise
        return reply["text"], reply["error"]

    def close(self) -> None:
        """Ends the process. The next check starts another one."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        self._process, process = None, self._process
        if process is not None:
            self._end()

    def _read(self, seconds: float) -> bytes:
        """Reads a line. Raises TimeoutError, or EOFError if the process has ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        end = time.monotonic() + seconds
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError
                part = os.read(file, 1 << 16)
                if not part:
                    raise EOFError
                line += part
        return line


def _start() -> "subprocess.Popen[bytes]":
    spec = importlib.util.find_spec("llguidance")
    assert spec is not None
    assert spec.origin is not None
    # A session of its own: Ctrl-C must not reach it. -P keeps this file's folder off its path.
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(spec.origin).parents[1]), "RUST_BACKTRACE": "0"},
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # Of what was never sent.
            pipe.close()


# --- in the process ---


def _try(request: dict[str, Any], tokenizer: Any) -> dict[str, str | None]:
    import llguidance

    text = request["text"]
    if request["kind"] == "gbnf":
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text)
        except Exception as error:  # The library raises bare Exception.
            return {"text": text, "error": f"it cannot be read as GBNF: {error}"}
    limits = llguidance.LLParserLimits(**request["limits"], verbose_errors=False)
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return {"text": text, "error": matcher.get_error() or None}


def _main() -> None:
    import resource

    import llguidance

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK)
    tokenizer = llguidance.LLTokenizer("byte")

    def answer(line: bytes) -> None:
        reply = _try(json.loads(line), tokenizer)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()

    print("ready", flush=True)
    for line in sys.stdin.buffer:
        thread = threading.Thread(target=answer, args=(line,))
        thread.start()
        thread.join()


if __name__ == "__main__":
    _main()
