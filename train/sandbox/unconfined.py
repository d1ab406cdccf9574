"""Runs jobs without isolation: for programs that one trusts, on machines without bubblewrap.

A program has the rights of this process: it can read and change files, use the network, and leave processes behind.
Only time, output and, where there is `prlimit`, the limits of each process are enforced.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.sandbox.job import ARCHIVE, WORK, Job, Run
from train.sandbox.local import ENVIRONMENT, Streams, converse, failed, limited, to_run
from train.sandbox.supervise import supervise


class Unconfined:
    """A Runner without isolation."""

    description: Mapping[str, Any] = {"isolation": "none"}

    def find(self, program: str) -> str | None:
        """The path of a program that jobs can start, or None."""
        return shutil.which(program)

    def execute(self, job: Job) -> Run:
        """Runs a job; see `Runner`."""
        return self._run(job)

    def converse(self, asking: Job, answering: Job) -> tuple[Run, Run]:
        """Runs two jobs whose standard outputs and inputs are connected crosswise; see `Runner`."""
        return converse(
            lambda *streams: self._run(asking, *streams),
            lambda *streams: self._run(answering, *streams),
        )

    def _run(
        self,
        job: Job,
        streams: Streams | None = None,
        stop: threading.Event | None = None,
    ) -> Run:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="qwen-jax-unconfined-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            for path, content in job.files.items():
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            if job.archive is not None:
                (folder / "program.tar").write_bytes(job.archive)
            here = [part.replace(ARCHIVE, f"{folder}/program.tar").replace(WORK, name) for part in job.arguments()]
            prefix = []
            if shutil.which("prlimit") is not None:
                # Not the number of processes: that would count all of this user's.
                prefix = [part for part in limited(job) if not part.startswith("--nproc")]
            try:
                process = subprocess.Popen(
                    [*prefix, *here],
                    stdin=subprocess.PIPE if streams is None else streams[0],
                    stdout=subprocess.PIPE if streams is None else streams[1],
                    stderr=subprocess.PIPE,
                    env={"PATH": os.environ.get("PATH", os.defpath), **ENVIRONMENT, "HOME": name, **job.environment},
                    cwd=folder,
                    start_new_session=True,
                )
            except OSError as error:
                for stream in streams or ():
                    stream.close()
                return failed(error, began)
            for stream in streams or ():
                stream.close()

            def kill() -> None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)

            ended = supervise(
                process,
                stdin=job.stdin,
                seconds=job.limits.seconds,
                output_bytes=job.limits.output_bytes,
                kill=kill,
                watch=lambda: None,
                stop=stop,
                patience=0.5,
            )
            kill()
            status = ended.status
            if ended.killed_by is None and status is not None:
                status = 128 - status if status < 0 else status
            return to_run(job, ended, status, out_of_memory=False, may_leave=True)
