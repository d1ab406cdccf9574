"""Sandboxes for tests: of this process, and of another user's process that is driven through pipes."""

import base64
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from train.sandbox import Limits, Outcome, Run, Sandbox, Test

ROOT = Path(__file__).parents[2]
# Small, so that attacks meet them soon; the seconds leave room for a busy machine.
LIMITS = Limits(
    seconds=1.5,
    cpu_seconds=1,
    memory_bytes=200 << 20,
    file_bytes=8 << 20,
    disk_bytes=16 << 20,
    files=400,
    processes=24,
    open_files=64,
    output_bytes=1 << 16,
    compile_seconds=2.0,
    compile_memory_bytes=1 << 30,
)
# The user as which the sandbox is tried where the tests run as root.
OTHER = 61_990
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap: apt-get install bubblewrap")
needs_runc = pytest.mark.skipif(
    shutil.which("runc") is None or os.geteuid() != 0, reason="containers need root and runc: apt-get install runc"
)
ISOLATIONS = ("bubblewrap", pytest.param("runc", marks=needs_runc))

_DRIVER = """
import base64, dataclasses, json, sys
from train.sandbox import Limits, Sandbox, Test
with Sandbox(Limits(**json.loads(sys.argv[1])), workers=2) as box:
    print("ready", flush=True)
    for line in sys.stdin:
        language, source, stdin, tests = json.loads(line)
        if tests is None:
            runs = [box.run(language, source, stdin.encode())]
        else:
            runs = box.run_tests(language, source, [Test(**test) for test in tests])
        records = [dataclasses.asdict(run) | {"outcome": run.outcome.value} for run in runs]
        for record in records:
            for name in ("stdout", "stderr"):
                record[name] = base64.b64encode(record[name]).decode()
        print(json.dumps(records), flush=True)
"""


def other_python() -> str | None:
    """A Python that another user can start and that can import the sandbox, or None."""
    for python in (sys.executable, "/usr/bin/python3"):
        code = "import sys; assert sys.version_info >= (3, 11); import train.sandbox"
        done = subprocess.run([*as_other(python), "-c", code], cwd="/", env=_environment(), capture_output=True)
        if done.returncode == 0:
            return python
    return None


def as_other(*command: str) -> list[str]:
    """A command as another user, who has no rights."""
    return ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", "--", *command]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


class OtherUser:
    """The two methods of a Sandbox, in a process of another user."""

    def __init__(self, python: str):
        limits = json.dumps(dataclasses.asdict(LIMITS))
        self.process = subprocess.Popen(
            [*as_other(python, "-c", _DRIVER), limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env=_environment(),
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def _ask(self, *message: Any) -> list[Run]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        records = json.loads(self.process.stdout.readline())
        for record in records:
            record["outcome"] = Outcome(record["outcome"])
            for name in ("stdout", "stderr"):
                record[name] = base64.b64decode(record[name])
        return [Run(**record) for record in records]

    def run(self, language: str, source: str, stdin: bytes = b"", files: Mapping[str, bytes] | None = None) -> Run:
        assert not files
        return self._ask(language, source, stdin.decode(), None)[0]

    def run_tests(self, language: str, source: str, tests: Sequence[Test]) -> list[Run]:
        texts = [{"code": test.code} for test in tests]
        assert all(text["code"] for text in texts), "only tests with assertions are passed on"
        return self._ask(language, source, "", texts)

    @property
    def supervisor(self) -> int:
        return self.process.pid

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(20) == 0


def box_of(who: str) -> Iterator[Any]:
    """Yields a sandbox of this process, as whoever the tests run, with bubblewrap or in containers; or of a user
    without rights."""
    if who in ("this user", "in containers"):
        with Sandbox(LIMITS, workers=2, isolation="bubblewrap" if who == "this user" else "runc") as here:
            here.supervisor = os.getpid()  # type: ignore[attr-defined]
            yield here
        return
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; the tests run as a user already")
    python = other_python()
    if python is None:
        pytest.skip("no Python 3.11 that another user can start, or the checkout cannot be read by others")
    box = OtherUser(python)
    yield box
    box.close()


def processes_with(mark: str) -> list[int]:
    """The processes of this machine whose command line contains a text, in whatever namespace."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if mark.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                pass
    return found
