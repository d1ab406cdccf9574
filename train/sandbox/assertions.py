"""Assertions about a Python program, checked in a sandbox of their own.

The program runs in one sandbox and the assertions in another; a pipe carries calls and plain values. The program never
shares a process, a file or a name space with the test or with its expected values, so it can neither read nor change
them. The test's last word is a nonce, new each time, that the program's sandbox never contains.
"""

import dataclasses
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path

from train.sandbox.job import Job, Limits, Outcome, Run, Runner

_INSIDE = Path(__file__).parent / "inside"
_WIRE, _ASKING, _ANSWERING = _SCRIPTS = ("sandbox_wire", "sandbox_asking", "sandbox_answering")
# Prints the bytecode of scripts, a line each.
_COMPILE = """
import py_compile, sys
for name in sys.argv[1:]:
    py_compile.compile(name + ".py", name + ".pyc", doraise=True)
    with open(name + ".pyc", "rb") as file:
        print(file.read().hex())
"""
# How Python ends at bytecode that another version has made: its status, and all that it says.
_OTHER_VERSION = 1, b"RuntimeError: Bad magic number in .pyc file"


class Assertions:
    """Checks assertions about Python programs.

    The scripts that run inside are compiled once, by the interpreter that will run them, in a sandbox without any
    program. Their bytecode is kept here, where no program can change it.

    Args:
      runner: runs the programs and the assertions.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self._compiled: dict[str, Mapping[str, bytes]] = {}
        self._lock = threading.Lock()

    def check(self, program: Job, code: str, python: str) -> Run:
        """Runs assertions about a program.

        Args:
          program: the job that would run the program `main.py`.
          code: Python source that raises an exception if the program is wrong. It sees the names that the program
            defines.
          python: the interpreter.

        Returns:
          PASS, FAIL, or ERROR also where the test itself is at fault: it does not compile, or passes to the program
          what cannot be sent. The standard error is that of the program.
        """
        with self._lock:
            if python not in self._compiled:
                compiled = self._compile(python, program.limits)
                if isinstance(compiled, Run):
                    return compiled
                self._compiled[python] = compiled
        return self._converse(self._compiled[python], program, code, python)

    def _compile(self, python: str, limits: Limits) -> Mapping[str, bytes] | Run:
        """The bytecode of the scripts by their names, or the run of the machine that has failed to make it."""
        sources = {f"{name}.py": (_INSIDE / f"{name}.py").read_bytes() for name in _SCRIPTS}
        limits = _for_tests(limits.of_compiler())
        command = (python, "-I", "-S", "-B", "-c", _COMPILE, *_SCRIPTS)
        run = self._runner.execute(Job(command, limits, sources))
        if run.outcome is Outcome.PASS:
            try:
                lines = map(bytes.fromhex, run.stdout.decode().splitlines())
                compiled = dict(zip(_SCRIPTS, lines, strict=True))
            except ValueError:
                run = dataclasses.replace(run, reason="what it printed is no bytecode")
            else:
                # A right program passes.
                trial = Job((), limits, {"main.py": b"def f(x): return [x]"})
                run = self._converse(compiled, trial, "assert f(1) == [1]", python)
                if run.outcome is Outcome.PASS:
                    return compiled
        reason = f"{python} cannot run tests with assertions: {run.reason}"
        return dataclasses.replace(run, outcome=Outcome.ERROR, killed_by=None, reason=reason)

    def _converse(self, compiled: Mapping[str, bytes], program: Job, code: str, python: str) -> Run:
        nonce = secrets.token_hex(32)

        def scripts(*names: str) -> dict[str, bytes]:
            return {f"{name}.pyc": compiled[name] for name in names}

        answering = dataclasses.replace(
            program,
            command=(python, "-B", f"{_ANSWERING}.pyc"),
            files={**program.files, **scripts(_WIRE, _ANSWERING)},
        )
        asking = Job(
            # Isolated from the environment and from packages of the user.
            command=(python, "-I", "-B", f"{_ASKING}.pyc"),
            limits=_for_tests(program.limits),
            files={**scripts(_WIRE, _ASKING), "test.py": code.encode(), "nonce": nonce.encode()},
            address_space=program.address_space,
        )
        asked, answered = self._runner.converse(asking, answering)
        return judge(nonce, asked, answered)


def _for_tests(limits: Limits) -> Limits:
    return dataclasses.replace(limits, output_bytes=max(limits.output_bytes, 1 << 16))


def judge(nonce: str, asked: Run, answered: Run) -> Run:
    """The verdict from the two runs.

    Args:
      nonce: without which there is no verdict of the test.
      asked: the run of the test; the last line of its standard error is the nonce, PASS, FAIL or ERROR, and a reason.
      answered: the run of the program.
    """

    def result(outcome: Outcome, reason: str, killed_by: str | None = None) -> Run:
        seconds = max(asked.seconds, answered.seconds)
        return Run(outcome, answered.exit_status, b"", answered.stderr, seconds, killed_by, reason)

    for run in (asked, answered):
        if run.outcome is Outcome.ERROR:
            return result(Outcome.ERROR, run.reason)
    # A program at its limits fails, whatever the test made of the end of the pipe.
    if answered.killed_by not in (None, "stop"):
        return result(Outcome.FAIL, answered.reason, answered.killed_by)
    if asked.killed_by is not None:
        return result(Outcome.FAIL, f"the test {asked.reason}", asked.killed_by)
    lines = asked.stderr.decode(errors="replace").rstrip().split("\n")
    said, _, rest = lines[-1].partition(" ")
    kind, _, why = rest.partition(" ")
    if not secrets.compare_digest(said.encode(), nonce.encode()):
        if (asked.exit_status, asked.stderr.strip()) == _OTHER_VERSION:
            return result(Outcome.ERROR, "the interpreter is not the one that has compiled the scripts of a test")
        return result(Outcome.FAIL, f"the test ended without a verdict: {asked.reason or 'status 0'}")
    outcome = {"PASS": Outcome.PASS, "FAIL": Outcome.FAIL}.get(kind, Outcome.ERROR)
    return result(outcome, why if outcome is not Outcome.PASS else "")
