"""What a sandbox is asked and what it answers: limits, jobs, runs, and the interface of what can run a job."""

import dataclasses
import enum
import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Protocol

from qwen_jax.errors import InputError

# Where programs start. Everything that they can write is below /tmp and /dev/shm, in memory, and ends with them.
WORK = "/tmp/work"
_MIB = 1 << 20


class Outcome(enum.Enum):
    """What is known after a run."""

    PASS = "pass"
    FAIL = "fail"
    # The machine failed, not the program: no verdict, so a reward of None and never of zero.
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. A program that exceeds a limit is killed with all that it has started, and fails."""

    seconds: float = 10.0
    """Wall-clock time of one run."""
    cpu_seconds: int = 10
    """CPU time of each process."""
    memory_bytes: int = 1024 * _MIB
    """Memory of all processes together; for native programs also the address space of each."""
    file_bytes: int = 64 * _MIB
    """Size of one file."""
    disk_bytes: int = 128 * _MIB
    """Size of all files together. They are in memory."""
    files: int = 10_000
    """Number of files and folders."""
    processes: int = 64
    """Processes and threads at one time."""
    open_files: int = 256
    """Open files of one process."""
    output_bytes: int = _MIB
    """Bytes of standard output, and as many of standard error."""
    source_bytes: int = 256 * 1024
    """Size of the source; a longer one fails without being run."""
    compile_seconds: float = 30.0
    """Wall-clock time of the compilation and of the check of syntax."""
    compile_memory_bytes: int = 2048 * _MIB
    """Memory of all processes of a compiler."""
    compile_disk_bytes: int = 1024 * _MIB
    """Size of all files of a compiler together."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int) or (isinstance(value, float) and isinstance(field.default, float))
            if not number or isinstance(value, bool) or not 0 < value < math.inf:
                kind = "number" if isinstance(field.default, float) else "whole number"
                raise InputError(f"Limits.{field.name} must be a positive {kind}, not {value!r}.")

    @property
    def archive_bytes(self) -> int:
        """Size of a compiled program as an archive. It is unpacked beside itself, and the program needs room too."""
        return max(1, self.disk_bytes // 8)

    def of_compiler(self) -> "Limits":
        """The limits under which a compiler runs. Its output is the compiled program, which must fit in later runs."""
        return dataclasses.replace(
            self,
            seconds=self.compile_seconds,
            # A compiler may use several threads, whose CPU time adds up.
            cpu_seconds=math.ceil(4 * self.compile_seconds),
            memory_bytes=self.compile_memory_bytes,
            file_bytes=self.compile_disk_bytes,
            disk_bytes=self.compile_disk_bytes,
            processes=max(self.processes, 64),
            open_files=max(self.open_files, 256),
            output_bytes=self.archive_bytes,
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """What happened when a job ran."""

    outcome: Outcome
    """PASS: it ended by itself with status 0, and where there was a test, the test passed."""
    exit_status: int | None
    """Of the program; 128 + n after signal n; None if it never ran. The program chooses it: it is no evidence."""
    stdout: bytes
    stderr: bytes
    seconds: float
    """Wall-clock time, start of the sandbox included."""
    killed_by: str | None
    """The limit that ended it: "time", "cpu", "memory", "files", "file size", "output"; None if none did."""
    reason: str
    """Why it did not pass, in one line; empty if it passed."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A command for a runner.

    Args:
      command: program and arguments. It runs in a folder of its own, `WORK`.
      limits: for it.
      files: content by path relative to that folder.
      archive: tar archive that is unpacked there first, inside the sandbox.
      stdin: bytes of standard input.
      address_space: bytes that each process may map, or None for no limit besides that of memory.
      environment: variables besides those of every run.
      folders: absolute paths of the machine that the program may read, besides /usr.
    """

    command: tuple[str, ...]
    limits: Limits
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    archive: bytes | None = None
    stdin: bytes = b""
    address_space: int | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.files:
            path = PurePosixPath(name)
            if not name or "\0" in name or path.is_absolute() or ".." in path.parts or not path.parts:
                raise InputError(f"A file of a sandbox is named by a relative path without '..', not {name!r}.")
        for what, size, most in (
            ("files of a run have", sum(map(len, self.files.values())), self.limits.disk_bytes // 4),
            ("compiled program has", len(self.archive or b""), self.limits.archive_bytes),
        ):
            if size > most:
                raise InputError(
                    f"The {what} {size} bytes. The limit disk_bytes={self.limits.disk_bytes} leaves room for {most}: "
                    "raise it or give less."
                )

    def arguments(self) -> tuple[str, ...]:
        """The command as it runs in the sandbox: the archive is unpacked there, where it can do no harm."""
        if self.archive is None:
            return self.command
        unpack = f'tar -xf {ARCHIVE} -C {WORK} && rm {ARCHIVE} && exec "$@"'
        return ("/bin/sh", "-c", unpack, "sh", *self.command)


# The archive of a job, inside.
ARCHIVE = "/tmp/program.tar"


class Runner(Protocol):
    """Something that runs jobs in isolation: bubblewrap here; a container, gVisor or a cluster elsewhere.

    Methods are called from several threads at once. A failure of the machine is a Run with Outcome.ERROR, not an
    exception.
    """

    description: Mapping[str, Any]
    """How it isolates, for records: JSON values."""

    def execute(self, job: Job) -> Run:
        """Runs a job. Returns when nothing of it is left."""
        ...

    def converse(self, asking: Job, answering: Job) -> tuple[Run, Run]:
        """Runs two jobs, isolated from each other, each one's standard output being the other's standard input.

        It ends when `asking` ends; `answering` is killed then. Neither's `stdin` is used, neither's stdout is returned.
        """
        ...

    def find(self, program: str) -> str | None:
        """The path of a program that jobs can start, or None."""
        ...
