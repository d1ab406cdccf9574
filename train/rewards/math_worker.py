"""A process that compares mathematical answers with math-verify. `train.rewards.workers` starts it as a script.

It reads one JSON object a line, {"gold": ..., "answer": ...}, and writes one, {"equal": true, false or null}; null says
that the gold answer cannot be read, or that the comparison failed. sympy works on texts that a model wrote, which may
take for ever or exhaust memory: the process limits itself, and its supervisor kills it. It imports nothing of this
project.
"""

import json
import os
import resource
import sys
from typing import Any


def main() -> None:
    """Serves until the input ends. Arguments: seconds of CPU time for a comparison, bytes of memory."""
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A seldom used part of sympy is imported when it is first needed, so this comes before the other limits.
    equal = _make_equal()
    equal("1", "1")
    # Answers go through a pipe of their own: what a library prints must not look like one.
    pipe = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    pipe.write("ready\n")
    pipe.flush()
    os.dup2(nowhere, 2)
    # It writes no files, opens few, and starts no processes (root is exempt from the last limit).
    for limit, value in ((resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_NPROC, 0)):
        resource.setrlimit(limit, (value, value))
    for line in sys.stdin:
        task = json.loads(line)
        # Ends the process also where its supervisor is gone.
        used = resource.getrusage(resource.RUSAGE_SELF)
        most = int(used.ru_utime + used.ru_stime) + seconds + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            found = equal(task["gold"], task["answer"])
        except Exception:
            # RecursionError and MemoryError too.
            found = None
        pipe.write(json.dumps({"equal": found}) + "\n")
        pipe.flush()


def _make_equal() -> Any:
    """A function of the gold answer and another, which tells whether they are equal."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Each text stands in a box of ours, so that all of it is the answer. Only LaTeX is read: the other reader of
    # math-verify gives texts to `sympy.parse_expr`, which evaluates them as Python.
    reader = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> Any:
        # Timeouts are the supervisor's: those of math-verify use SIGALRM.
        return parse(
            "\\boxed{" + text + "}", reader, extraction_mode="first_match", parsing_timeout=None, raise_on_error=True
        )  # fmt: skip

    def equal(gold: str, answer: str) -> bool | None:
        expected = read(gold)
        if not expected:
            return None
        return bool(verify(expected, read(answer), timeout_seconds=None, raise_on_error=True))

    return equal


if __name__ == "__main__":
    main()
