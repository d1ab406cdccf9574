"""Runs jobs in bubblewrap: namespaces, a user of no rights, limits, a filter of system calls.

The layers, from outside: a control group where one can be made; a user id of its own (`setpriv`, where this process is
root); `bwrap` with all namespaces unshared, no capabilities, an empty environment, /usr read-only, and files in memory
of limited size; limits of resources (`prlimit`); seccomp. The supervisor stays outside of all of it.
"""

import contextlib
import functools
import glob
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from qwen_jax.errors import InputError
from train.sandbox.cgroup import Group, find_parent
from train.sandbox.job import ARCHIVE, WORK, Job, Outcome, Run
from train.sandbox.seccomp import filter_bytes, machine
from train.sandbox.supervise import GRACE, Ended, supervise
from train.sandbox.watch import watcher

# The user and group of the programs, as they see themselves.
_INSIDE = 1000
# Outside, where this process is root: ids that no distribution gives to anybody (systemd's list leaves them free).
FIRST_UID = 60_600
MAX_WORKERS = 256
_SEARCH_PATH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/local/go/bin")
# What dynamically linked programs and Debian's links to compilers need of /etc; nothing else of it is visible.
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
_SHARED_MEMORY_BYTES = 16 << 20
_STACK_BYTES = 8 << 20
_PASSWD = f"sandbox:x:{_INSIDE}:{_INSIDE}::{WORK}:/bin/sh\n".encode()
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
_PROCESS_1 = ("/bin/sh", "-c", 'exec 3>&2 2>/dev/null; "$@" 2>&3 3>&-; exit $?', "sh")
# Standard input and output of a job.
Streams = tuple[IO[bytes], IO[bytes]]
_INSTALL = "Install it (Debian, Ubuntu: apt-get install bubblewrap)"


class Bubblewrap:
    """A Runner on this machine.

    Args:
      workers: jobs at one time. Each has user ids of its own where this process is root.
      folders: folders of the machine with tool chains that lie outside /usr, such as /opt/go. Programs may read them,
        and their `bin` is on the search path.
      seccomp: whether system calls are filtered.

    Raises:
      InputError: bwrap or another program is missing, or the machine's architecture has no filter.
    """

    def __init__(self, workers: int = 8, folders: Sequence[str | Path] = (), seccomp: bool = True):
        if not 1 <= workers <= MAX_WORKERS:
            raise InputError(f"A sandbox has between 1 and {MAX_WORKERS} workers, not {workers}.")
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise InputError(f"bubblewrap (bwrap) is needed to run untrusted programs and not installed. {_INSTALL}.")
        self._bwrap = bwrap
        self._root = os.geteuid() == 0
        for program in ("prlimit", "sh", "tar", *(["setpriv"] if self._root else [])):
            if not any(os.access(f"{folder}/{program}", os.X_OK) for folder in ("/usr/bin", "/bin")):
                raise InputError(f"The sandbox needs the program {program} in /usr/bin. Install it (util-linux, tar).")
        self._folders = [str(Path(folder).resolve()) for folder in folders]
        for folder in self._folders:
            if not Path(folder).is_dir():
                raise InputError(f"The folder of tool chains {folder} does not exist.")
        self._path = [*(f"{folder}/bin" for folder in self._folders), *_SEARCH_PATH]
        self._filter = filter_bytes(machine()) if seccomp else None
        self._cgroup = find_parent()
        # A conversation takes one slot and two users.
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(workers):
            self._slots.put(slot)
        self._count = itertools.count()
        version = subprocess.run([bwrap, "--version"], capture_output=True, text=True).stdout.strip()
        self.description: Mapping[str, Any] = {
            "isolation": "bubblewrap",
            "version": version,
            "users": f"{FIRST_UID}-{FIRST_UID + 2 * workers - 1}" if self._root else str(os.geteuid()),
            "seccomp": seccomp,
            "memory": f"cgroup of version {self._cgroup.version}" if self._cgroup else "watched from outside",
            "folders": self._folders,
        }

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

    def command(self, job: Job, status: int, seccomp: int | None, data: Mapping[str, int]) -> list[str]:
        """The command line from bwrap on.

        Args:
          job: to run.
          status: descriptor to which bwrap writes what becomes of it.
          seccomp: descriptor of the filter.
          data: descriptors of the contents of files, by their paths inside.
        """
        limits = job.limits
        command = [self._bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
        command += ["--as-pid-1", "--new-session", "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox"]
        command += ["--uid", str(_INSIDE), "--gid", str(_INSIDE), "--json-status-fd", str(status)]
        # Files to read. Where /bin and /lib are links into /usr, they are links inside too.
        command += ["--ro-bind", "/usr", "/usr"]
        for path in ("/bin", "/sbin", "/lib", "/lib64", "/lib32"):
            if os.path.islink(path):
                command += ["--symlink", os.readlink(path).lstrip("/"), path]
            elif os.path.isdir(path):
                command += ["--ro-bind", path, path]
        for path in (*_ETC, *itertools.chain.from_iterable(glob.glob(name) for name in job.folders)):
            command += ["--ro-bind-try", path, path]
        # Files to write, in memory. The folders of bwrap's own have no limit of size, so they become read-only.
        command += ["--proc", "/proc", "--dev", "/dev"]
        command += ["--size", str(_SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
        command += ["--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--dir", WORK, "--chdir", WORK]
        # Also below /tmp.
        for path in self._folders:
            command += ["--ro-bind", path, path]
        for path, descriptor in data.items():
            command += ["--perms", "0644", "--file", str(descriptor), path]
        command += ["--remount-ro", "/"]
        if seccomp is not None:
            command += ["--seccomp", str(seccomp)]
        for name, value in {"PATH": ":".join(self._path), **ENVIRONMENT, **job.environment}.items():
            command += ["--setenv", name, value]
        return [*command, "--", *_PROCESS_1, *limited(job), *job.arguments()]

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

    def _attempt(
        self,
        job: Job,
        user: int,
        streams: Streams | None,
        stop: threading.Event | None,
        held: contextlib.ExitStack,
    ) -> Run:
        """Runs a job, and registers in `held` what must be given back. Raises OSError where the machine fails."""

        def memory_file(name: str, content: bytes) -> int:
            descriptor = os.memfd_create(name)
            held.callback(os.close, descriptor)
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(content)
            os.lseek(descriptor, 0, os.SEEK_SET)
            return descriptor

        # Everything that goes in, as files in memory whose descriptors bwrap inherits.
        status = memory_file("status", b"")
        contents = {f"{WORK}/{name}": content for name, content in job.files.items()}
        contents |= {"/etc/passwd": _PASSWD}
        if job.archive is not None:
            contents[ARCHIVE] = job.archive
        data = {path: memory_file("data", content) for path, content in contents.items()}
        seccomp = memory_file("seccomp", self._filter) if self._filter is not None else None
        # The layers around it.
        command = self.command(job, status, seccomp, data)
        if self._root:
            command = [*_as_user(FIRST_UID + user), *command]
        group: Group | None = None
        if self._cgroup is not None:
            name = f"qwen-jax-sandbox-{os.getpid()}-{id(self):x}-{next(self._count)}"
            group = Group(self._cgroup, name, job.limits.memory_bytes, job.limits.processes + 8)
            held.callback(group.close)
            command = group.joined(command)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if streams is None else streams[0],
            stdout=subprocess.PIPE if streams is None else streams[1],
            stderr=subprocess.PIPE,
            # bwrap's own environment can be read inside, as that of process 1.
            env={},
            cwd="/",
            pass_fds=[status, *data.values(), *([] if seccomp is None else [seccomp])],
            start_new_session=True,
        )
        # Each end of a conversation's pipes is now in one process only, so that its end is seen.
        for stream in streams or ():
            stream.close()
        # Serve it until it ends.
        first = functools.partial(_first_process, status)
        look = watcher(
            lambda: Path(f"/proc/{pid}/root") if (pid := first()) is not None else None,
            job.limits.memory_bytes if group is None else None,
            job.limits.files,
        )
        ended = supervise(
            process,
            stdin=job.stdin,
            seconds=job.limits.seconds,
            output_bytes=job.limits.output_bytes,
            kill=lambda: _kill(process, first),
            watch=lambda: "memory" if group is not None and group.out_of_memory() else look(),
            stop=stop,
        )
        exit_status = _field(status, "exit-code")
        return to_run(job, ended, exit_status, group is not None and group.out_of_memory())


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


def _as_user(uid: int) -> list[str]:
    """The prefix that gives up root for a user without groups and capabilities."""
    ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]


def to_run(job: Job, ended: Ended, exit_status: int | None, out_of_memory: bool, may_leave: bool = False) -> Run:
    """What the end of a sandbox says about the program, or about the machine.

    Args:
      job: that ran.
      ended: how the outermost process ended.
      exit_status: of the program as bwrap reports it; None if it did not, because it was killed or could not set up.
      out_of_memory: whether the control group's limit of memory was met.
      may_leave: whether processes may be left: there is no isolation.
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
        said = ended.stderr.decode(errors="replace").strip().splitlines()
        reason = f"the sandbox ended with status {ended.status}: {said[-1] if said else 'no message'}"
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


def _kill(process: "subprocess.Popen[bytes]", first: "functools.partial[int | None]") -> None:
    """Kills a sandbox by its process 1, with which the kernel kills all of its namespace. bwrap then ends by itself."""
    # bwrap asks for the signal of its parent's death early, but not at once: wait until it has forked.
    until = time.monotonic() + 1
    while (pid := first()) is None and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    if pid is None:
        process.kill()
    elif process.poll() is None:
        # While bwrap lives the id is not given to another process, for bwrap has not waited for it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _first_process(status: int) -> int | None:
    """The id, outside, of the sandbox's process 1."""
    return _field(status, "child-pid")


def _field(status: int, name: str) -> int | None:
    """A number from bwrap's reports: JSON objects, perhaps with the last one still incomplete."""
    text = os.pread(status, 1 << 16, 0).decode(errors="replace")
    for report in re.findall(r"\{[^{}]*\}", text):
        with contextlib.suppress(ValueError):
            value = json.loads(report).get(name)
            if isinstance(value, int):
                return value
    return None
