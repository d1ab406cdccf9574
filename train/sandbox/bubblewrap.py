"""Runs jobs in bubblewrap: namespaces, a user of no rights, limits, a filter of system calls.

The layers, from outside: a control group where one can be made; a user id of its own (`setpriv`, where this process is
root); `bwrap` with all namespaces unshared, no capabilities, an empty environment, /usr read-only, and files in memory
of limited size; limits of resources (`prlimit`); seccomp. The supervisor stays outside of all of it.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.sandbox.cgroup import Group, find_parent
from train.sandbox.job import WORK, Job, Run
from train.sandbox.local import (
    FIRST_UID,
    INSIDE,
    PASSWD,
    PROCESS_1,
    SHARED_MEMORY_BYTES,
    LocalRunner,
    Streams,
    beside_usr,
    contents,
    limited,
    readable,
    to_run,
)
from train.sandbox.seccomp import filter_bytes, machine

_INSTALL = "Install it (Debian, Ubuntu: apt-get install bubblewrap)"


class Bubblewrap(LocalRunner):
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
        self._root = os.geteuid() == 0
        super().__init__(workers, folders, ["setpriv"] if self._root else [])
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise InputError(f"bubblewrap (bwrap) is needed to run untrusted programs and not installed. {_INSTALL}.")
        self._bwrap = bwrap
        self._filter = filter_bytes(machine()) if seccomp else None
        self._cgroup = find_parent()
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
        command += ["--uid", str(INSIDE), "--gid", str(INSIDE), "--json-status-fd", str(status)]
        # Files to read. Where /bin and /lib are links into /usr, they are links inside too.
        command += ["--ro-bind", "/usr", "/usr"]
        links, folders = beside_usr()
        for path in links:
            command += ["--symlink", os.readlink(path).lstrip("/"), path]
        for path in folders:
            command += ["--ro-bind", path, path]
        for path in readable(job):
            command += ["--ro-bind-try", path, path]
        # Files to write, in memory. The folders of bwrap's own have no limit of size, so they become read-only.
        command += ["--proc", "/proc", "--dev", "/dev"]
        command += ["--size", str(SHARED_MEMORY_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
        command += ["--size", str(limits.disk_bytes), "--tmpfs", "/tmp", "--dir", WORK, "--chdir", WORK]
        # Also below /tmp.
        for path in self._folders:
            command += ["--ro-bind", path, path]
        for path, descriptor in data.items():
            command += ["--perms", "0644", "--file", str(descriptor), path]
        command += ["--remount-ro", "/"]
        if seccomp is not None:
            command += ["--seccomp", str(seccomp)]
        for name, value in self._environment(job).items():
            command += ["--setenv", name, value]
        return [*command, "--", *PROCESS_1, *limited(job), *job.arguments()]

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
            left = memoryview(content)
            while left:
                left = left[os.write(descriptor, left) :]
            os.lseek(descriptor, 0, os.SEEK_SET)
            return descriptor

        # Everything that goes in, as files in memory whose descriptors bwrap inherits.
        status = memory_file("status", b"")
        data = {path: memory_file("data", x) for path, x in {**contents(job), "/etc/passwd": PASSWD}.items()}
        seccomp = memory_file("seccomp", self._filter) if self._filter is not None else None
        # The layers around it.
        command = self.command(job, status, seccomp, data)
        if self._root:
            command = [*_as_user(FIRST_UID + user), *command]
        group = self._group(job, held)
        if group is not None:
            command = group.joined(command)
        ended = self._serve(
            command,
            job,
            functools.partial(_field, status, "child-pid"),
            streams,
            stop,
            # bwrap's own environment can be read inside, as that of process 1.
            environment={},
            descriptors=[status, *data.values(), *([] if seccomp is None else [seccomp])],
            group=group,
        )
        exit_status = _field(status, "exit-code")
        return to_run(job, ended, exit_status, group is not None and group.out_of_memory())

    def _group(self, job: Job, held: contextlib.ExitStack) -> Group | None:
        """A control group for a job, which `held` removes; None where there are none."""
        if self._cgroup is None:
            return None
        name = f"qwen-jax-sandbox-{os.getpid()}-{id(self):x}-{next(self._count)}"
        group = Group(self._cgroup, name, job.limits.memory_bytes, job.limits.processes + 8)
        held.callback(group.close)
        return group


def _as_user(uid: int) -> list[str]:
    """The prefix that gives up root for a user without groups and capabilities."""
    ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    return ["setpriv", *ids, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]


def _field(status: int, name: str) -> int | None:
    """A number from bwrap's reports: JSON objects, perhaps with the last one still incomplete."""
    text = os.pread(status, 1 << 16, 0).decode(errors="replace")
    for report in re.findall(r"\{[^{}]*\}", text):
        with contextlib.suppress(ValueError):
            value = json.loads(report).get(name)
            if isinstance(value, int):
                return value
    return None
