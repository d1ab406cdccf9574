"""What runs jobs on this machine: slots for jobs, programs that they can start, and what the end of a job means."""

import contextlib
import glob
import itertools
import os
import queue
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from qwen_jax.errors import InputError
from train.sandbox.cgroup import Group
from train.sandbox.job import ARCHIVE, WORK, Job, Outcome, Run
from train.sandbox.supervise import GRACE, Ended, supervise
from train.sandbox.watch import watcher

# The user and group of the programs, as they see themselves.
INSIDE = 1000
# Outside, where this process is root: ids that no distribution gives to anybody (systemd's list leaves them free).
FIRST_UID = 60_600
MAX_WORKERS = 256
_SEARCH_PATH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/go/bin")
# What dynamically linked programs and Debian's links to compilers need of /etc; nothing else of it is visible.
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
SHARED_MEMORY_BYTES = 16 << 20
_STACK_BYTES = 8 << 20
PASSWD = f"sandbox:x:{INSIDE}:{INSIDE}::{WORK}:/bin/sh\n".encode()
ENVIRONMENT = {
    "HOME": WORK,
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# Process 1 of a sandbox: a shell that waits for the program, and for processes whose parent has ended. With bwrap's own
# process 1, bwrap ends before it has waited, which leaves a zombie where the machine's process 1 waits for nobody (most
# containers). The shell's own messages ("Killed") are not the program's.
PROCESS_1 = ("/bin/sh", "-c", 'exec 3>&2 2>/dev/null; "$@" 2>&3 3>&-; exit $?', "sh")
# Standard input and output of a job.
Streams = tuple[IO[bytes], IO[bytes]]


class LocalRunner(ABC):
    """A Runner on this machine.

    Args:
      workers: jobs at one time. Each has user ids of its own where this process is root.
      folders: folders of the machine with tool chains that lie outside /usr, such as /opt/go. Programs may read them,
        and their `bin` is on the search path.
      programs: that the runner needs besides `prlimit`, `sh` and `tar`.

    Raises:
      InputError: a number of workers that is not possible, a folder or a program that is missing.
    """

    def __init__(self, workers: int, folders: Sequence[str | Path], programs: Sequence[str] = ()):
        if not 1 <= workers <= MAX_WORKERS:
            raise InputError(f"A sandbox has between 1 and {MAX_WORKERS} workers, not {workers}.")
        for program in ("prlimit", "sh", "tar", *programs):
            if not any(os.access(f"{folder}/{program}", os.X_OK) for folder in ("/usr/bin", "/bin")):
                raise InputError(f"The sandbox needs the program {program} in /usr/bin. Install it (util-linux, tar).")
        self._folders = [str(Path(folder).resolve()) for folder in folders]
        for folder in self._folders:
            if not Path(folder).is_dir():
                raise InputError(f"The folder of tool chains {folder} does not exist.")
        self._path = [*(f"{folder}/bin" for folder in self._folders), *_SEARCH_PATH]
        # A conversation takes one slot and two users.
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(workers):
            self._slots.put(slot)

    def find(self, program: str) -> str | None:
        """The path of a program that jobs can start, or None."""
        visible = ("/usr/", "/bin/", *(f"{folder}/" for folder in self._folders))
        for folder in self._path:
            path = f"{folder}/{program}"
            real = os.path.realpath(path)
            if os.access(path, os.X_OK) and real.startswith(visible) and os.stat(real).st_mode & 0o005 == 0o005:
                return path
        return None

    def execute(self, job: Job) -> Run:
        """Runs a job; see `Runner`."""
        with self._slot() as slot:
            return self._run(job, user=2 * slot)

    def converse(self, asking: Job, answering: Job) -> tuple[Run, Run]:
        """Runs two jobs whose standard outputs and inputs are connected crosswise; see `Runner`."""
        with self._slot() as slot:
            return converse(
                lambda *streams: self._run(asking, 2 * slot, *streams),
                lambda *streams: self._run(answering, 2 * slot + 1, *streams),
            )

    @contextlib.contextmanager
    def _slot(self) -> Iterator[int]:
        slot = self._slots.get()
        try:
            yield slot
        finally:
            self._slots.put(slot)

    def _run(self, job: Job, user: int, streams: Streams | None = None, stop: threading.Event | None = None) -> Run:
        """Runs a job in a new sandbox. `streams` are its standard input and output, which are closed here."""
        began = time.monotonic()
        with contextlib.ExitStack() as held:
            for stream in streams or ():
                held.callback(stream.close)
            try:
                return self._attempt(job, user, streams, stop, held)
            except OSError as error:
                return failed(error, began)

    @abstractmethod
    def _attempt(
        self,
        job: Job,
        user: int,
        streams: Streams | None,
        stop: threading.Event | None,
        held: contextlib.ExitStack,
    ) -> Run:
        """Runs a job, and registers in `held` what must be given back. Raises OSError where the machine fails.

        Args:
          job: to run.
          user: number of the user that runs it, of twice as many as there are workers.
          streams: standard input and output instead of pipes, or None.
          stop: is set to have the job killed, or None.
          held: is closed when the job has ended.
        """

    def _serve(
        self,
        command: Sequence[str],
        job: Job,
        first: Callable[[], int | None],
        streams: Streams | None,
        stop: threading.Event | None,
        *,
        environment: Mapping[str, str],
        descriptors: Sequence[int] = (),
        group: Group | None = None,
    ) -> Ended:
        """Starts a sandbox and serves it until it ends.

        Args:
          command: starts it, waits for its process 1 and then ends by itself.
          job: that it runs.
          first: the id, outside, of its process 1, once it is known.
          streams, stop: as for `_attempt`.
          environment: of the command.
          descriptors: that the command inherits.
          group: that limits its memory; without one, memory is watched from outside.
        """
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if streams is None else streams[0],
            stdout=subprocess.PIPE if streams is None else streams[1],
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            pass_fds=descriptors,
            start_new_session=True,
        )
        # Each end of a conversation's pipes is now in one process only, so that its end is seen.
        for stream in streams or ():
            stream.close()
        look = watcher(
            lambda: f"/proc/{pid}/root" if (pid := first()) is not None else None,
            job.limits.memory_bytes if group is None else None,
            job.limits.files,
        )
        return supervise(
            process,
            stdin=job.stdin,
            seconds=job.limits.seconds,
            output_bytes=job.limits.output_bytes,
            kill=lambda: _kill(process, first),
            watch=lambda: "memory" if group is not None and group.out_of_memory() else look(),
            stop=stop,
        )

    def _environment(self, job: Job) -> Mapping[str, str]:
        """The variables of a job's processes."""
        return {"PATH": ":".join(self._path), **ENVIRONMENT, **job.environment}


def converse(asking: Callable[..., Run], answering: Callable[..., Run]) -> tuple[Run, Run]:
    """Runs two jobs at a time, each one's standard output being the other's standard input.

    Args:
      asking: runs a job with the streams that it is given, and closes them.
      answering: the same; it is given an event too, which is set when `asking` has ended.
    """
    began = time.monotonic()
    answers: list[Run] = []
    stop = threading.Event()
    with contextlib.ExitStack() as pipes:
        try:
            # File objects, which may be closed twice.
            to_answering, from_asking = (pipes.enter_context(end) for end in _pipe())
            to_asking, from_answering = (pipes.enter_context(end) for end in _pipe())
            streams = to_answering, from_answering
            thread = threading.Thread(target=lambda: answers.append(answering(streams, stop)), name="sandbox-answering")
            thread.start()
        except (OSError, RuntimeError) as error:
            return failed(error, began), failed(error, began)
        try:
            asked = asking((to_asking, from_asking))
        finally:
            stop.set()
            thread.join()
    return asked, answers[0] if answers else failed(RuntimeError("the thread of a program ended"), began)


def failed(error: Exception, began: float) -> Run:
    """The run of a job for which the machine had no process, memory or descriptor."""
    return Run(Outcome.ERROR, None, b"", b"", time.monotonic() - began, None, f"cannot start: {error}")


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    """The reading and the writing end of a new pipe."""
    read, write = os.pipe()
    return open(read, "rb", buffering=0), open(write, "wb", buffering=0)


def beside_usr() -> tuple[list[str], list[str]]:
    """The folders of programs and libraries beside /usr: those that are links into it, and the others."""
    there = [path for path in ("/bin", "/sbin", "/lib", "/lib64", "/lib32") if os.path.isdir(path)]
    return [path for path in there if os.path.islink(path)], [path for path in there if not os.path.islink(path)]


def readable(job: Job) -> list[str]:
    """What a job may read besides the folders of programs and libraries; some of it may not exist."""
    return [*_ETC, *itertools.chain.from_iterable(map(glob.glob, job.folders))]


def contents(job: Job) -> dict[str, bytes]:
    """The files that a job finds, by their paths inside."""
    files = {f"{WORK}/{name}": content for name, content in job.files.items()}
    return files if job.archive is None else {**files, ARCHIVE: job.archive}


def limited(job: Job) -> list[str]:
    """The prefix that limits the resources of a job's processes; the limits are inherited."""
    limits = job.limits
    numbers = {
        # At the first number SIGXCPU, at the second SIGKILL.
        "cpu": f"{limits.cpu_seconds}:{limits.cpu_seconds + 1}",
        "fsize": limits.file_bytes,
        "nofile": limits.open_files,
        # Counted in the user namespace, so other workers do not matter.
        "nproc": limits.processes,
        "stack": _STACK_BYTES,
        "core": 0,
        "msgqueue": 0,
        "memlock": 65536,
    }
    if job.address_space is not None:
        numbers["as"] = job.address_space
    return ["prlimit", *(f"--{name}={number}" for name, number in numbers.items()), "--"]


def to_run(
    job: Job,
    ended: Ended,
    exit_status: int | None,
    out_of_memory: bool,
    may_leave: bool = False,
    said: str | None = None,
) -> Run:
    """What the end of a sandbox says about the program, or about the machine.

    Args:
      job: that ran.
      ended: how the outermost process ended.
      exit_status: of the program as the sandbox reports it; None if it did not, because it was killed or could not set
        up.
      out_of_memory: whether the control group's limit of memory was met.
      may_leave: whether processes may be left: there is no isolation.
      said: messages of what sets up the sandbox, if they are not in its standard error.
    """
    killed_by = "memory" if out_of_memory else ended.killed_by
    if killed_by is None and exit_status == 128 + signal.SIGXCPU:
        killed_by = "cpu"
    if killed_by is None and exit_status == 128 + signal.SIGXFSZ:
        killed_by = "file size"
    outcome, reason = Outcome.FAIL, ""
    if ended.status is None or (ended.open and not may_leave):
        outcome, reason = Outcome.ERROR, f"processes of the sandbox are left {GRACE:g} seconds after its end"
    elif killed_by is not None:
        reason = _exceeded(killed_by, job)
    elif exit_status is None:
        outcome = Outcome.ERROR
        lines = (ended.stderr.decode(errors="replace") if said is None else said).strip().splitlines()
        reason = f"the sandbox ended with status {ended.status}: {lines[-1] if lines else 'no message'}"
    elif exit_status == 0:
        outcome = Outcome.PASS
    elif 128 < exit_status <= 128 + signal.NSIG:
        reason = f"ended by signal {exit_status - 128}"
    else:
        reason = f"ended with status {exit_status}"
    return Run(outcome, exit_status, ended.stdout, ended.stderr, ended.seconds, killed_by, reason)


def _exceeded(killed_by: str, job: Job) -> str:
    limits = job.limits
    most = {
        "time": f"{limits.seconds:g} seconds",
        "cpu": f"{limits.cpu_seconds} seconds of CPU time",
        "memory": f"{limits.memory_bytes} bytes of memory",
        "files": f"{limits.files} files",
        "file size": f"{limits.file_bytes} bytes in a file",
        "output": f"{limits.output_bytes} bytes of output",
    }
    return f"used more than {most[killed_by]}" if killed_by in most else "was stopped"


def _kill(process: "subprocess.Popen[bytes]", first: Callable[[], int | None]) -> None:
    """Kills a sandbox by its process 1, with which the kernel kills all of its namespace.

    Args:
      process: has started it, waits for it and then ends by itself.
      first: the id, outside, of its process 1, once it is known.
    """
    # The process asks for the signal of its parent's death early, but not at once: wait until it has forked.
    until = time.monotonic() + 1
    while (pid := first()) is None and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    if pid is None:
        process.kill()
    elif process.poll() is None:
        # While the process lives the id is not given to another one, for it has not waited for it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
