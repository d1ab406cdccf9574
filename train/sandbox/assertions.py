"""Assertions about a Python program, checked in a sandbox of their own.

The program runs in one sandbox and the assertions in another; a pipe carries calls and plain values. The program never
shares a process, a file or a name space with the test or with its expected values, so it can neither read nor change
them. The test's last word is a nonce, new each time, that the program's sandbox never contains.
"""

import dataclasses
import secrets
from pathlib import Path

from train.sandbox.job import Job, Limits, Outcome, Run, Runner

_INSIDE = Path(__file__).parent / "inside"


def _script(name: str) -> bytes:
    return (_INSIDE / name).read_bytes()


def check(runner: Runner, program: Job, code: str, python: str) -> Run:
    """Runs assertions about a program.

    Args:
      runner: runs both.
      program: the job that would run the program `main.py`.
      code: Python source that raises an exception if the program is wrong. It sees the names that the program defines.
      python: the interpreter.

    Returns:
      PASS, FAIL, or ERROR also where the test itself is at fault: it does not compile, or passes to the program what
      cannot be sent. The standard error is that of the program.
    """
    nonce = secrets.token_hex(32)
    limits = program.limits
    wire = {"sandbox_wire.py": _script("sandbox_wire.py")}
    answering = dataclasses.replace(
        program,
        command=(python, "-B", "sandbox_answering.py"),
        files={**program.files, **wire, "sandbox_answering.py": _script("sandbox_answering.py")},
    )
    asking = Job(
        command=(python, "-I", "-B", "-c", _ASKING),
        limits=_for_tests(limits),
        files={
            **wire,
            "sandbox_asking.py": _script("sandbox_asking.py"),
            "test.py": code.encode(),
            "nonce": nonce.encode(),
        },
        address_space=program.address_space,
    )
    asked, answered = runner.converse(asking, answering)
    return judge(nonce, asked, answered)


# Isolated from the environment and from packages of the user, but with its own folder on the path.
_ASKING = "import sys; sys.path.insert(0, '.'); exec(open('sandbox_asking.py').read())"


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
        return result(Outcome.FAIL, f"the test ended without a verdict: {asked.reason or 'status 0'}")
    outcome = {"PASS": Outcome.PASS, "FAIL": Outcome.FAIL}.get(kind, Outcome.ERROR)
    return result(outcome, why if outcome is not Outcome.PASS else "")
