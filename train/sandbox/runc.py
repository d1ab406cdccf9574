"""Runs jobs in containers of runc, the runtime of Docker: the same layers as bubblewrap's, set up by an OCI runtime.

A container is a bundle, a folder with a description (`config.json`, OCI runtime specification 1.0) and a root file
system, which here has mount points alone. crun and gVisor's runsc take bundles of the same form; they have not been
tried.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import InputError
from train.sandbox.job import WORK, Job, Run
from train.sandbox.local import (
    FIRST_UID,
    INSIDE,
    MAX_WORKERS,
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
from train.sandbox.seccomp import filter_of_oci, machine
from train.sandbox.supervise import GRACE

_INPUT = "/input.tar"
# Process 1 ends with runc, and runc with this process. What goes in is unpacked inside, where it can do no harm.
_BEGIN = ("setpriv", "--pdeathsig", "KILL", "--", "/bin/sh", "-c")
_UNPACK = f'tar -xof {_INPUT} -C /tmp && cd {WORK} && exec "$@"'
_NAMESPACES = ("pid", "network", "ipc", "uts", "mount", "user", "cgroup")


class Runc(LocalRunner):
    """A Runner on this machine, for root.

    Args:
      workers: jobs at one time. Each has user ids of its own.
      folders: folders of the machine with tool chains that lie outside /usr, such as /opt/go. Programs may read them,
        and their `bin` is on the search path.

    Raises:
      InputError: runc or another program is missing, this process is not root, other users cannot enter the folder
        of temporary files, or the machine's architecture has no filter of system calls.
    """

    def __init__(self, workers: int = 8, folders: Sequence[str | Path] = ()):
        super().__init__(workers, folders, ["setpriv", "unshare"])
        runc = shutil.which("runc")
        if runc is None:
            raise InputError("runc is needed for containers and not installed (Debian, Ubuntu: apt-get install runc).")
        if os.geteuid() != 0:
            raise InputError("Containers give each worker user ids of its own, for which this process must be root.")
        folder = Path(tempfile.gettempdir()).resolve()
        if closed := [str(path) for path in (folder, *folder.parents) if not path.stat().st_mode & 0o001]:
            raise InputError(
                f"Containers are set up in {folder}, and their users cannot enter {closed[-1]}. Name another folder "
                "for temporary files (TMPDIR)."
            )
        self._runc = runc
        self._filter = filter_of_oci(machine())
        version = subprocess.run([runc, "--version"], capture_output=True, text=True).stdout.splitlines()
        self.description: Mapping[str, Any] = {
            "isolation": "runc",
            "version": version[0] if version else "",
            "users": f"{FIRST_UID}-{FIRST_UID + 2 * workers - 1}",
            "seccomp": True,
            "memory": "watched from outside",
            "folders": self._folders,
        }

    def config(self, job: Job, bundle: Path, user: int) -> dict[str, Any]:
        """The description of a container.

        Args:
          job: to run in it.
          bundle: its folder, which has the files "input.tar" and "passwd".
          user: number of the user that runs it.
        """
        bound = {"/usr": "/usr", "/etc/passwd": f"{bundle}/passwd", _INPUT: f"{bundle}/input.tar"}
        for path in (*beside_usr()[1], *readable(job)):
            if os.path.exists(path):
                bound[path] = path
        in_memory = {"/dev": (65536, "755"), "/dev/shm": (SHARED_MEMORY_BYTES, "1777")}
        in_memory["/tmp"] = (job.limits.disk_bytes, "1777")
        mounts = [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]}]
        for path, (size, mode) in in_memory.items():
            options = ["nosuid", f"size={size}", f"mode={mode}", *(["nodev"] if path != "/dev" else [])]
            mounts.append({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options})
        # Folders of tool chains may lie below /tmp.
        for path, source in {**bound, **{path: path for path in self._folders}}.items():
            options = ["rbind", "ro", "nosuid", "nodev"]
            mounts.append({"destination": path, "type": "bind", "source": source, "options": options})
        kinds = ("bounding", "effective", "permitted", "inheritable", "ambient")
        outside = {INSIDE: FIRST_UID + user, 0: FIRST_UID + 2 * MAX_WORKERS + user}
        ids = [{"containerID": inside, "hostID": host, "size": 1} for inside, host in outside.items()]
        return {
            "ociVersion": "1.0.2",
            "hostname": "sandbox",
            "root": {"path": "root", "readonly": True},
            "process": {
                "args": [*_BEGIN, _UNPACK, "sh", *PROCESS_1, *limited(job), *job.arguments()],
                "cwd": "/tmp",
                "env": [f"{name}={value}" for name, value in self._environment(job).items()],
                "user": {"uid": INSIDE, "gid": INSIDE},
                "capabilities": {kind: [] for kind in kinds},
                "noNewPrivileges": True,
            },
            "mounts": mounts,
            "linux": {
                "namespaces": [{"type": kind} for kind in _NAMESPACES],
                "uidMappings": ids,
                "gidMappings": ids,
                "seccomp": self._filter,
            },
        }

    def _attempt(
        self,
        job: Job,
        user: int,
        streams: Streams | None,
        stop: threading.Event | None,
        held: contextlib.ExitStack,
    ) -> Run:
        bundle = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=f"qwen-jax-runc-{os.getpid()}-")))
        # runc mounts as the container's root, which owns nothing here.
        bundle.chmod(0o755)
        (bundle / "root").mkdir()
        for link in beside_usr()[0]:
            (bundle / f"root{link}").symlink_to(os.readlink(link).lstrip("/"))
        # Nobody else may read what goes in.
        (bundle / "input.tar").touch(0o400)
        (bundle / "input.tar").write_bytes(_archived(job))
        os.chown(bundle / "input.tar", FIRST_UID + user, FIRST_UID + user)
        (bundle / "passwd").write_bytes(PASSWD)
        config = self.config(job, bundle, user)
        for mount in config["mounts"]:
            _make_mount_point(bundle / "root", mount)
        (bundle / "config.json").write_text(json.dumps(config))
        pid_file, log = bundle / "pid", bundle / "log"
        of_runc = [self._runc, f"--root={bundle}/state", f"--log={log}"]
        # What runc mounts for a moment outside of the container, its own program, is not seen or left on the machine.
        command = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "--", *of_runc]
        command += ["run", f"--bundle={bundle}", f"--pid-file={pid_file}", bundle.name]

        def first() -> int | None:
            """The id, outside, of the container's process 1."""
            with contextlib.suppress(OSError, ValueError):
                return int(pid_file.read_text())
            return None

        def clean() -> None:
            # A runc that was killed has left the container's control groups.
            if (bundle / "state" / bundle.name).exists():
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    subprocess.run([*of_runc, "delete", "--force", bundle.name], capture_output=True, timeout=GRACE)

        held.callback(clean)
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        ended = self._serve(command, job, first, streams, stop, environment=environment)
        began = first() is not None
        return to_run(
            job,
            ended,
            # runc ends as the container's process 1 has; without one, its own status says nothing of the program.
            ended.status if began and ended.status is not None and ended.status >= 0 else None,
            out_of_memory=False,
            said=log.read_text(errors="replace") if log.exists() else "",
        )


def _make_mount_point(root: Path, mount: Mapping[str, Any]) -> None:
    """Makes the folder or the empty file at which something is mounted. The container's root may not."""
    path, in_memory = root / mount["destination"].lstrip("/"), ("/dev/", "/tmp/")
    if mount["destination"].startswith(in_memory):
        return
    if mount["type"] == "bind" and not os.path.isdir(mount["source"]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    else:
        path.mkdir(parents=True, exist_ok=True)
        # runc gives a file system in memory the mode of the folder that it is mounted on.
        path.chmod(0o1777 if mount["destination"] == "/tmp" else 0o755)


def _archived(job: Job) -> bytes:
    """What goes into a container's /tmp, as a tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        folder = tarfile.TarInfo(os.path.relpath(WORK, "/tmp"))
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for path, content in contents(job).items():
            member = tarfile.TarInfo(os.path.relpath(path, "/tmp"))
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()
