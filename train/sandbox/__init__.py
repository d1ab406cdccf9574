"""Runs untrusted programs: isolated, limited, and judged from outside.

`Sandbox` is the door. `job.py` defines what it takes and returns, and the interface of a `Runner`; `bubblewrap.py` is
the runner of this machine.
"""

from train.sandbox.job import Job, Limits, Outcome, Run, Runner
from train.sandbox.languages import LANGUAGES, Language, Toolchain
from train.sandbox.sandbox import Sandbox, Test

__all__ = [
    "LANGUAGES",
    "Job",
    "Language",
    "Limits",
    "Outcome",
    "Run",
    "Runner",
    "Sandbox",
    "Test",
    "Toolchain",
]
