"""Supervises the sandboxes of many workers in a process for each worker, because Python runs one thread at a time.

`Supervisors` is a Runner of the process that wants jobs to be run. This file is also the script of its processes: one
reads a line of JSON, an array with a job, or with the two of a conversation, and then the contents of their files; runs
them with the runner of one worker; and writes a line with the runs. Neither side does anything else with what it reads.
"""

import base64
import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax.errors import InputError
from train.sandbox.bubblewrap import Bubblewrap
from train.sandbox.job import Job, Limits, Outcome, Run, Runner
from train.sandbox.local import LocalRunner, failed
from train.sandbox.runc import Runc
from train.sandbox.unconfined import Unconfined
from train.worker_pool import WorkerPool

Isolation = Literal["bubblewrap", "runc", "none"]
"""What runs programs on this machine."""

# More workers than this have a process each. A reward by one test takes 41 ms of CPU time in sandboxes and 5 ms in the
# thread that supervises them, so that eight workers would nearly fill one process of Python.
MAX_THREADS = 8
# Seconds that a supervisor may take beside the time of its job, to set up and to clean up on a busy machine.
_PATIENCE = 60.0
# The longest answer: outputs may be as large as their limits, which are the jobs' own.
_ANSWER_BYTES = 1 << 30


def make_runner(isolation: Isolation, workers: int, folders: Sequence[str | Path] = (), first: int = 0) -> Runner:
    """What runs jobs on this machine, supervised by this process; see `Sandbox` for arguments and errors.

    Args:
      first: number of the first of the workers, where other processes have those before it.
    """
    if isolation == "none":
        return Unconfined()
    return Runc(workers, folders, first) if isolation == "runc" else Bubblewrap(workers, folders, first)


class Supervisors:
    """A Runner whose jobs are supervised by a process for each worker.

    The processes start when they are needed, and end with this one. Each worker has user ids of its own, as with one
    process. A job whose supervisor dies, or does not start, ends as a failure of the machine; the sandboxes of a
    supervisor die with it.

    Args:
      isolation, workers, folders: see `Sandbox`.

    Raises:
      InputError: as `make_runner`.
    """

    def __init__(self, isolation: Isolation, workers: int, folders: Sequence[str | Path] = ()):
        here = make_runner(isolation, workers, folders)
        self.description: Mapping[str, Any] = {**here.description, "supervisors": workers}
        self.find = here.find
        self._pool = WorkerPool(
            Path(__file__),
            (isolation, json.dumps([str(Path(folder).resolve()) for folder in folders])),
            workers,
            _PATIENCE,
            answer_bytes=_ANSWER_BYTES,
            environment={"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": tempfile.gettempdir()},
            ended=here.clean_after if isinstance(here, LocalRunner) else None,
        )

    def execute(self, job: Job) -> Run:
        """Runs a job; see `Runner`."""
        return self._ask(job)[0]

    def converse(self, asking: Job, answering: Job) -> tuple[Run, Run]:
        """Runs two jobs whose standard outputs and inputs are connected crosswise; see `Runner`."""
        asked, answered = self._ask(asking, answering)
        return asked, answered

    def processes(self) -> list[int]:
        """The ids of the supervisors that are alive."""
        return self._pool.processes()

    def close(self) -> None:
        """Ends the supervisors, and with them what they run."""
        self._pool.close()

    def _ask(self, *jobs: Job) -> list[Run]:
        began = time.monotonic()
        seconds = max(job.limits.seconds for job in jobs) + _PATIENCE
        contents: list[bytes] = []
        try:
            answer = self._pool.ask_one([_job_fields(job, contents) for job in jobs], seconds, contents)
        except (InputError, OSError) as error:
            # It does not start.
            return [failed(error, began)] * len(jobs)
        if answer is None:
            return [failed(RuntimeError("the supervisor has died or hangs"), began)] * len(jobs)
        return [_run(fields) for fields in answer]


def main() -> None:
    """The script of a supervisor. Arguments: isolation, JSON array of folders, number of the worker."""
    isolation, folders, number = sys.argv[1:]
    runner = make_runner(isolation, 1, json.loads(folders), int(number))  # type: ignore[arg-type]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        jobs = [_job(fields, sys.stdin.buffer.read) for fields in json.loads(line)]
        runs = [runner.execute(*jobs)] if len(jobs) == 1 else runner.converse(*jobs)
        print(json.dumps([_run_fields(run) for run in runs]), flush=True)


def _end_with_parent() -> None:
    """Kills this process, and with it its sandboxes, when nobody holds the other end of its input."""
    poll = select.poll()
    # Without events it waits for the hang-up alone.
    poll.register(sys.stdin.fileno(), 0)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


# --- jobs and runs as JSON


def _job_fields(job: Job, contents: list[bytes]) -> dict[str, Any]:
    """A job with sizes in the place of contents, which are appended to a list."""

    def size(content: bytes) -> int:
        contents.append(content)
        return len(content)

    return {
        **vars(job),
        "limits": vars(job.limits),
        "files": {name: size(content) for name, content in job.files.items()},
        "archive": None if job.archive is None else size(job.archive),
        "stdin": size(job.stdin),
        "environment": dict(job.environment),
    }


def _job(fields: Mapping[str, Any], read: Callable[[int], bytes]) -> Job:
    """The job of `_job_fields`; `read` gives the contents in their order."""
    changed = {
        "command": tuple(fields["command"]),
        "limits": Limits(**fields["limits"]),
        "files": {name: read(size) for name, size in fields["files"].items()},
        "archive": None if fields["archive"] is None else read(fields["archive"]),
        "stdin": read(fields["stdin"]),
        "folders": tuple(fields["folders"]),
    }
    return Job(**{**fields, **changed})


def _run_fields(run: Run) -> dict[str, Any]:
    return {**vars(run), "outcome": run.outcome.value, "stdout": _text(run.stdout), "stderr": _text(run.stderr)}


def _run(fields: Mapping[str, Any]) -> Run:
    changed = {
        "outcome": Outcome(fields["outcome"]),
        "stdout": base64.b64decode(fields["stdout"]),
        "stderr": base64.b64decode(fields["stderr"]),
    }
    return Run(**{**fields, **changed})


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


if __name__ == "__main__":
    main()
